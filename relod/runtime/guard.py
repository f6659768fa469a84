"""The guard: stops a robot that has no watchdog of its own when the process that drives it is gone or hangs.

Run as a script in its own session, `python -I -S guard.py WIRE_FD LEASH_FD LIMIT_MS STOP_HEX`, by `guardian.Guard`.
It holds a duplicate of the robot's serial port and one end of a socket pair, the leash, whose other end only the
device process holds, so the leash ends with that process however it dies. Nothing of relod is imported: a guard
must not fail for a reason that felled what it guards.

The device process says BEAT while the robot may move, QUIET once it has to stand, FAREWELL when it has stood.
"""

import os
import select
import sys

BEAT = b"B"
QUIET = b"Q"
FAREWELL = b"F"
READY = b"R"  # the guard's own: it watches now
STOPPED = b"S"  # the guard's own: beats stayed away, the robot was told to stop

PADDING = bytes(4)  # completes a command of which only the first bytes were sent; the robot ignores opcode 0
ROUNDS = 2  # apart in time, so that one burst of noise on the wire cannot damage both
ROUND_PAUSE_S = 0.02
FULL_PAUSE_S = 0.005  # between attempts while the port's output buffer is full
FULL_TRIES = 20


def put(wire: int, data: bytes) -> bool:
    """Write all of `data`, waiting up to 0.1 s for room in the port's buffer; False when it could not."""
    tries = FULL_TRIES
    while data and tries:
        try:
            data = data[os.write(wire, data) :]
        except BlockingIOError:
            tries -= 1
            select.select([], [], [], FULL_PAUSE_S)
        except OSError:
            return False
    return not data


def stop_robot(wire: int, stop: bytes) -> None:
    """Tell the robot to stop, twice."""
    for left in reversed(range(ROUNDS)):
        put(wire, PADDING + stop)
        if left:
            select.select([], [], [], ROUND_PAUSE_S)


def hear(leash: int, limit_s: float | None) -> bytes | None:
    """What the device process said last; b"" when it is gone, None when it said nothing for `limit_s`."""
    ready, _, _ = select.select([leash], [], [], limit_s)
    if not ready:
        return None
    try:
        return os.read(leash, 4096)[-1:]
    except OSError:
        return b""


def say(leash: int, word: bytes) -> None:
    """Tell the device process something, if it is there to hear it."""
    try:
        os.write(leash, word)
    except OSError:
        pass


def watch(wire: int, leash: int, limit_s: float, stop: bytes) -> None:
    """Watch until the device process says farewell or is gone."""
    say(leash, READY)
    beating = False
    while True:
        word = hear(leash, limit_s if beating else None)
        if word == FAREWELL:
            return
        if word is None or word == b"":
            stop_robot(wire, stop)
        if word == b"":
            return
        if word is None:
            say(leash, STOPPED)
        beating = word == BEAT


def settle() -> None:
    """Take a name, and stay in memory if a real-time process started this one: it sleeps until it is needed."""
    try:
        with open("/proc/self/comm", "w") as file:
            file.write("relod-guard")
        if os.sched_getscheduler(0) == os.SCHED_FIFO:
            import ctypes

            ctypes.CDLL(None).mlockall(7)  # MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT
    except (OSError, ImportError, AttributeError):
        pass  # it guards all the same


if __name__ == "__main__":
    settle()
    watch(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) / 1000, bytes.fromhex(sys.argv[4]))
