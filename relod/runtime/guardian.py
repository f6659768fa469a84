"""The device process's side of the guard (`guard.py`): starts it, keeps it quiet or beating, notices its death."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

from ..errors import StartError
from . import guard

__all__ = ["Guard"]

START_LIMIT_S = 5.0  # an interpreter without site packages starts in 15 ms, 0.3 s on a machine that is swapping
END_LIMIT_S = 1.0
# A service manager's SIGTERM goes to every process of its group; this one has to outlive the device process.
BLOCKED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Guard:
    """A running guard. `on_end` is called once when it dies by itself; `stops` counts how often it stopped the robot.

    It stops the robot at once when this process is gone, and after `limit_ms` without a `beat` once one was given.
    """

    def __init__(self, process: subprocess.Popen[bytes], leash: socket.socket, on_end: Callable[[], None]) -> None:
        self._process, self._leash, self._on_end = process, leash, on_end
        self._ready = asyncio.Event()
        self._ended = asyncio.Event()
        self._beating = False
        self.stops = 0
        asyncio.get_running_loop().add_reader(leash.fileno(), self._hear)

    @classmethod
    async def start(cls, *, wire_fd: int, stop: bytes, limit_ms: float, on_end: Callable[[], None]) -> Guard:
        """Start a guard and wait until it watches.

        Raises:
            StartError: it did not come up.
        """
        process, leash = _spawn(wire_fd, limit_ms, stop)
        made = cls(process, leash, on_end)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_LIMIT_S):
                await made._ready.wait()
        if not made._ready.is_set() or not made.alive:
            await made.abandon()
            raise StartError("the guard that stops the robot if relod dies could not be started", "see the run's log")
        return made

    @property
    def alive(self) -> bool:
        """Whether it watches."""
        return not self._ended.is_set()

    @property
    def pid(self) -> int:
        return self._process.pid

    def beat(self) -> None:
        """The robot may move and this process is well."""
        self._beating = True
        self._say(guard.BEAT)

    def quiet(self) -> None:
        """The robot has to stand; nothing is said until the next `beat`."""
        if self._beating:
            self._beating = False
            self._say(guard.QUIET)

    async def dismiss(self) -> None:
        """End the guard without it touching the robot, and wait until it has let go of the port."""
        self._say(guard.FAREWELL)
        await self._end()

    async def abandon(self) -> None:
        """Let go of the leash: a guard that was not dismissed stops the robot and ends."""
        with contextlib.suppress(OSError):
            self._leash.shutdown(socket.SHUT_WR)
        await self._end()

    async def _end(self) -> None:
        self._on_end = _nothing
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_LIMIT_S):
                await self._ended.wait()
        if not self._ended.is_set():
            self._process.kill()
            self._close()
        self._process.wait()  # it has closed the leash by ending: it is gone within microseconds

    def _say(self, word: bytes) -> None:
        with contextlib.suppress(OSError):  # a full leash holds newer words than it needs; a broken one is noticed
            self._leash.send(word)

    def _hear(self) -> None:
        try:
            words = self._leash.recv(64)
        except BlockingIOError:
            return
        except OSError:
            words = b""
        self.stops += words.count(guard.STOPPED)
        if guard.READY in words:
            self._ready.set()
        if not words:
            self._close()
            self._on_end()

    def _close(self) -> None:
        if self._leash.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._leash.fileno())
            self._leash.close()
        self._ready.set()
        self._ended.set()


def _spawn(wire_fd: int, limit_ms: float, stop: bytes) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The guard's process and this process's end of its leash."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    words = (str(wire_fd), str(theirs.fileno()), f"{limit_ms:g}", stop.hex())
    with theirs, _signals_blocked():
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, *words],
            stdin=subprocess.DEVNULL,
            pass_fds=(wire_fd, theirs.fileno()),
            start_new_session=True,
        )
    return process, ours


def _nothing() -> None:
    pass


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """A child started inside never sees these signals: a signal mask outlives exec."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
