"""The process in which ur_rtde runs: it hears the arm's packets and tells it its newest joint speeds, once for each.

ur_rtde blocks, holds the interpreter's lock while it connects, and has crashed with a segmentation fault after a
lost connection (15 of 24). So it is alone here, one process per connection: the driver (`driver.py`) kills it and
starts another. This process stops the arm when its order is old or the driver is gone; when it dies itself, the
watchdog of the script on the controller does.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...runtime.clock import NS_PER_MS, monotonic_ns
from ...runtime.scheduling import lock_if_inherited, name_process
from .listener import FREQUENCY_HZ, StateListener

__all__ = [
    "CLOSE",
    "FAILED",
    "LOST",
    "MESSAGE_BYTES",
    "ORDER",
    "READY",
    "STATE",
    "STATE_BYTES",
    "Lost",
    "Plan",
    "Session",
]

JOINTS = 6

# From here to the driver, one datagram each: a first byte, then the state or a text.
STATE = b"S"
READY = b"R"  # orders are obeyed
FAILED = b"F"  # it could not begin, and why
LOST = b"L"  # it could not go on, and why
# stamp; what `listener.STATES` names: joint angles, joint speeds, both again as targets; controller's time, robot mode,
# safety mode, runtime state, speed scaling
STATE_BYTES = struct.Struct(f"<q{4 * JOINTS + 5}d")

# From the driver to here: joint speeds, or the wish to end.
ORDER = struct.Struct(f"<{JOINTS}d")
CLOSE = b"C"

MESSAGE_BYTES = 4096  # the longest of all, a text

SPEEDS, TARGET_SPEEDS = slice(JOINTS, 2 * JOINTS), slice(3 * JOINTS, 4 * JOINTS)
TIME, MODE, SAFETY, RUNTIME = (4 * JOINTS + place for place in range(4))
RUNNING, PLAYING, SAFE = 7, 2, (1, 2)  # robot mode, runtime state, safety modes (normal, reduced)
STAND = (0.0,) * JOINTS
STILL_RAD_S = 0.01

SILENCE_NS = 200 * NS_PER_MS
LOOK_S = 0.05
REFUSALS = 25  # of commands in a row, one per packet: 0.2 s
START_LIMIT_S = 2.0  # from the script's upload until the packets show that it plays
LEAVE_LIMIT_NS = 600 * NS_PER_MS  # from the fastest task's 0.7 rad/s it takes 0.2 s
CALL_LIMIT_S = 1.0  # of the last call; who is stuck in it is ended by SIGALRM


class Lost(Exception):
    """The connection is of no more use; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What this process is told when it is started, as JSON."""

    address: str
    acceleration_rad_s2: float
    stop_rad_s2: float
    hold_ms: float  # age of an order at which the arm is stopped
    watchdog_hz: float
    connect_limit_s: float


class Session:
    """One connection at work. `states` and `control` lead to the controller, `wire` to the driver."""

    def __init__(self, states: StateListener, control: Any, wire: socket.socket, plan: Plan) -> None:
        self._states, self._control, self._wire, self._plan = states, control, wire, plan
        self._hold_ns = int(plan.hold_ms * NS_PER_MS)
        self._speeds, self._ordered_ns = STAND, 0
        self._drivable = self._stands = False
        self._heard_ns, self._time_s = monotonic_ns(), -1.0  # of the newest packet: here, and at the controller
        self._refusals = 0
        self._leaving = False
        wire.setblocking(False)

    def run(self) -> None:
        """Until the driver has had enough or is gone, and the arm stands. `Lost`: the controller is gone."""
        leave_by_ns = 0
        while True:
            asked_ns = monotonic_ns()
            ready = self._wait()
            if self._wire in ready:
                self._take_orders()
            if self._states in ready:
                self._hear()
            if asked_ns - self._heard_ns > SILENCE_NS:  # however long this process was kept from looking
                raise Lost("the controller has fallen silent")
            if ready:
                self._drive()
            if self._leaving:
                leave_by_ns = leave_by_ns or monotonic_ns() + LEAVE_LIMIT_NS
                if self._stands or not self._drivable or monotonic_ns() > leave_by_ns:
                    return

    def wait_until_playing(self) -> None:
        """Until the packets show that the script plays; `Lost` when they do not within 2 s."""
        give_up_ns = monotonic_ns() + int(START_LIMIT_S * 1e9)
        while not self._drivable:
            if select.select([self._states], [], [], LOOK_S)[0]:
                self._hear()
            if monotonic_ns() > give_up_ns:
                raise Lost("the control script was uploaded but does not play")

    def say(self, kind: bytes, text: str = "") -> None:
        """Tell the driver; what it does not read in time is lost."""
        with contextlib.suppress(OSError):
            self._wire.send((kind + text.encode())[:MESSAGE_BYTES])

    # Orders

    def _take_orders(self) -> None:
        """The newest order counts. End of file: the driver is gone."""
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    order = self._wire.recv(256)
                except ConnectionResetError:
                    order = b""
                if len(order) == ORDER.size:
                    self._speeds, self._ordered_ns = ORDER.unpack(order), monotonic_ns()
                else:
                    self._leaving, self._speeds = True, STAND
                    return

    def _drive(self) -> None:
        if not self._drivable:
            return
        fresh = monotonic_ns() - self._ordered_ns <= self._hold_ns
        speeds = self._speeds if fresh else STAND
        acceleration = self._plan.acceleration_rad_s2 if any(speeds) else self._plan.stop_rad_s2
        if self._control.speedJ(list(speeds), acceleration, 0.0):
            self._refusals = 0
            return
        self._refusals += 1
        if self._refusals >= REFUSALS:
            raise Lost(f"the controller refused {REFUSALS} commands in a row")

    # Packets

    def _wait(self) -> list[Any]:
        """The wires on which there are packets or orders; none after a while."""
        wires: list[Any] = [self._states] if self._leaving else [self._states, self._wire]
        return select.select(wires, [], [], LOOK_S)[0]

    def _hear(self) -> None:
        """Pass on every packet that is new; the newest says whether the arm obeys and stands."""
        if not self._control.isConnected():
            raise Lost("the connection for commands to the controller was lost")
        try:
            packets = self._states.read()
        except (OSError, ValueError) as error:
            raise Lost(f"the connection to the controller was lost: {error}") from error
        arrived_ns = monotonic_ns()
        for values in packets:
            if values[TIME] == self._time_s:
                continue
            self._heard_ns, self._time_s = arrived_ns, values[TIME]
            mode, safety, runtime = (values[place] for place in (MODE, SAFETY, RUNTIME))
            self._drivable = mode == RUNNING and safety in SAFE and runtime == PLAYING
            self._stands = max(map(abs, values[SPEEDS])) < STILL_RAD_S and not any(values[TARGET_SPEEDS])
            if all(map(math.isfinite, values)):
                with contextlib.suppress(OSError):
                    self._wire.send(STATE + STATE_BYTES.pack(arrived_ns, *values))


def serve(wire: socket.socket, plan: Plan, connect: Callable[[Plan], tuple[StateListener, Any]]) -> None:
    """Connect, then drive until the end; tells the driver what became of it."""
    try:
        states, control = connect(plan)
    except (OSError, RuntimeError, ValueError) as error:  # the last two are what ur_rtde raises
        wire.send((FAILED + str(error).encode())[:MESSAGE_BYTES])
        return
    session = Session(states, control, wire, plan)
    try:
        session.wait_until_playing()
        if not control.setWatchdog(plan.watchdog_hz):
            raise Lost("the script's watchdog could not be set")
        session.say(READY)
        session.run()
    except Lost as loss:
        session.say(LOST, str(loss))
        return
    signal.setitimer(signal.ITIMER_REAL, CALL_LIMIT_S)
    control.stopScript()


def connect(plan: Plan) -> tuple[StateListener, Any]:
    """The way to hear the controller, and ur_rtde's to command it; who hangs in them, as in front of a port that
    accepts and says nothing, is ended."""
    import rtde_control  # type: ignore[import-not-found]  # not every platform has it

    signal.setitimer(signal.ITIMER_REAL, plan.connect_limit_s)
    states = StateListener(plan.address)
    control = rtde_control.RTDEControlInterface(plan.address, FREQUENCY_HZ, rt_priority=-1)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return states, control


def main() -> None:
    """Arguments: the descriptor of the socket to the driver, the plan as JSON."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they go to a whole group; the driver decides
    name_process("client")
    lock_if_inherited()
    interfaces = []

    def connect_and_keep(plan: Plan) -> tuple[StateListener, Any]:
        interfaces.append(connect(plan))
        return interfaces[0]

    serve(socket.socket(fileno=int(sys.argv[1])), Plan(**json.loads(sys.argv[2])), connect_and_keep)
    os._exit(0)  # with the interface alive: its destructor sleeps for half a second, or crashes


if __name__ == "__main__":
    main()
