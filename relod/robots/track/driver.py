"""The rig as the device process drives it, over its unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Annotated

from msgspec import Meta

from ...config import Section
from ...errors import SafetyStop, StartError
from ...runtime.clock import monotonic_ns
from .rig import COMMAND, COMMAND_NAMES, SENSOR_COLUMNS, STAND, STATE

__all__ = ["StateReader", "TrackDriver", "TrackRobotSettings", "moved"]

STILL_PACKETS = 4
STILL_MM = 0.1  # from one state to the next: slower than 10 mm/s
READ_BYTES = 4096
AXES = len(COMMAND_NAMES)


class TrackRobotSettings(Section, frozen=True):
    """How the rig's socket is used."""

    answer_limit_s: Annotated[
        float, Meta(gt=0, le=60, description="how long the rig may take to send its first state")
    ] = 1.0
    reopen_limit_s: Annotated[
        float, Meta(ge=0, le=600, description="how long a lost rig may take to come back before the run ends")
    ] = 5.0


class StateReader:
    """Cuts the stream of a connected, non-blocking socket into states."""

    def __init__(self, wire: socket.socket) -> None:
        self._wire = wire
        self._rest = b""

    def read(self) -> list[tuple[float, ...]]:
        """The states that have come. `OSError`: the rig is gone; `BlockingIOError`: nothing has come."""
        data = self._wire.recv(READ_BYTES)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "it hung up")
        data = self._rest + data
        whole = len(data) - len(data) % STATE.size
        self._rest = data[whole:]
        return list(STATE.iter_unpack(data[:whole]))


def connect(address: str) -> socket.socket:
    """A socket connected to the rig, non-blocking; `StartError` when there is none."""
    wire = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    wire.setblocking(False)
    try:
        wire.connect(address)  # on one host it is done at once, or not at all
    except OSError as error:
        wire.close()
        hint = "start one with: relod emulate track --link PATH"
        raise StartError(f"no rig at {address}: {error.strerror or error}", hint) from error
    return wire


def moved(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether the rig moved from one state to the next, or is asked to."""
    return any(after[AXES : 2 * AXES]) or any(abs(after[i] - before[i]) > STILL_MM for i in range(AXES))


class TrackDriver:
    """`runtime.device.DeviceDriver` of a rig; one per socket, on one event loop.

    `publish(arrived_ns, values)` gets every state, values in the order of `SENSOR_COLUMNS`; `on_event(text)` what a
    person should read.
    """

    sensor_names = SENSOR_COLUMNS
    command_names = COMMAND_NAMES

    def __init__(
        self,
        address: str,
        settings: TrackRobotSettings,
        publish: Callable[[int, Sequence[float]], object],
        on_event: Callable[[str], object],
    ) -> None:
        self.address = address
        self.connection_epoch = 0
        self.reopen_limit_s = settings.reopen_limit_s
        self._answer_limit_s, self._publish, self._on_event = settings.answer_limit_s, publish, on_event
        self._wire: socket.socket | None = None
        self._news = asyncio.Event()  # the first state, or a loss
        self._loss = ""
        self._recent: deque[tuple[int, tuple[float, ...]]] = deque(maxlen=STILL_PACKETS)
        self._packets = 0

    async def open(self) -> None:
        """Connect, make the rig stand, and wait for its first state.

        Raises:
            StartError: no rig, a busy one, or a silent one.
        """
        self._hang_up()
        self._recent.clear()
        self._news.clear()
        self._loss = ""
        self._wire = connect(self.address)
        self.connection_epoch += 1
        self._reader = StateReader(self._wire)
        asyncio.get_running_loop().add_reader(self._wire, self._on_readable)
        self.stop()  # who commands first drives; a rig that somebody else drives hangs up
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._answer_limit_s):
                await self._news.wait()
        if self._loss or not self._recent:
            self._hang_up()
            silent = f"sent no state within {self._answer_limit_s:g} s"
            raise StartError(
                f"the rig at {self.address} {'hung up' if self._loss else silent}", "does another program drive it?"
            )

    async def run(self) -> None:
        """Serve the socket until it is lost: `SafetyStop`."""
        self._news.clear()
        while not self._loss:
            await self._news.wait()
        raise SafetyStop(self._loss, "is the emulator still there?")

    async def close(self) -> None:
        """Leave the rig standing."""
        self.stop()
        self._hang_up()

    def command(self, values: tuple[float, ...]) -> None:
        """Set the velocities in mm/s. The rig cuts them to what it can, and stands at what is no number.

        Raises:
            OSError: the rig is gone, or has not read for long.
        """
        if self._wire is None:
            raise OSError(errno.ENODEV, f"{self.address} is not open")
        self._wire.send(COMMAND.pack(*values))

    def request(self, request: int) -> None:
        """The rig knows no requests."""
        self._on_event(f"request {request} is none of the rig's")

    def stop(self) -> None:
        """Make the rig stand. Never raises."""
        if self._wire is not None:
            with contextlib.suppress(OSError):
                self._wire.send(STAND)

    def guarded_wire(self) -> None:
        """Nobody has to guard the rig: it stands when this process hangs up, and 200 ms after its last command."""

    def stands(self, after_ns: int) -> bool:
        """Whether the newest states, all after `after_ns`, ask for no motion and show none."""
        if len(self._recent) < STILL_PACKETS or self._recent[0][0] <= after_ns:
            return False
        states = [values for _, values in self._recent]
        return not any(map(moved, states, states[1:]))

    def counters(self) -> dict[str, float | str]:
        """Figures since the driver was made."""
        return {"packets": float(self._packets), "connection_epoch": float(self.connection_epoch)}

    def _on_readable(self) -> None:
        try:
            states = self._reader.read()
        except BlockingIOError:
            return
        except OSError as error:
            self._loss = f"the connection to {self.address} was lost ({error.strerror or error})"
            self._hang_up()
            self._news.set()
            return
        arrived_ns = monotonic_ns()
        for values in states:
            if not self._recent:
                self._news.set()
            self._packets += 1
            self._recent.append((arrived_ns, values))
            self._publish(arrived_ns, (*values, self.connection_epoch))

    def _hang_up(self) -> None:
        if self._wire is not None:
            asyncio.get_running_loop().remove_reader(self._wire)
            self._wire.close()
            self._wire = None
