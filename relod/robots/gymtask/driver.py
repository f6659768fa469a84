"""A Gymnasium environment as the device process drives it, over its unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from msgspec import Meta

from ...config import Section
from ...errors import SafetyStop, StartError
from ...runtime.clock import monotonic_ns
from ...types import NO_REQUEST
from .simulation import Shape

__all__ = ["GymDriver", "GymRobotSettings", "PacketReader", "connect", "make_driver"]

STILL_PACKETS = 3
READ_BYTES = 65_536


class GymRobotSettings(Section, frozen=True):
    """How the environment's socket is used."""

    answer_limit_s: Annotated[float, Meta(gt=0, le=60, description="how long it may take to send its first packet")] = (
        5.0
    )
    reopen_limit_s: Annotated[
        float, Meta(ge=0, le=600, description="how long it may take to come back before the run ends")
    ] = 5.0


def connect(address: str) -> socket.socket:
    """A socket connected to the environment, non-blocking; `StartError` when there is none."""
    wire = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    wire.setblocking(False)
    try:
        wire.connect(address)
    except OSError as error:
        wire.close()
        raise StartError(f"no environment at {address}: {error.strerror or error}", "leave out --robot") from error
    return wire


class PacketReader:
    """Cuts the stream of a connected, non-blocking socket into packets."""

    def __init__(self, wire: socket.socket, shape: Shape) -> None:
        self._wire, self._packet = wire, shape.packet
        self._rest = b""

    def read(self) -> list[tuple[float, ...]]:
        """The packets that have come. `OSError`: it is gone; `BlockingIOError`: nothing has come."""
        data = self._wire.recv(READ_BYTES)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "it hung up")
        data = self._rest + data
        whole = len(data) - len(data) % self._packet.size
        self._rest = data[whole:]
        return list(self._packet.iter_unpack(data[:whole]))


class GymDriver:
    """`runtime.device.DeviceDriver` of an environment; `make_driver` says which."""

    shape: Shape
    sensor_names: tuple[str, ...]
    command_names: tuple[str, ...]

    def __init__(
        self,
        address: str,
        settings: GymRobotSettings,
        publish: Callable[[int, Sequence[float]], object],
        on_event: Callable[[str], object],
    ) -> None:
        self.address = address
        self.connection_epoch = 0
        self.reopen_limit_s = settings.reopen_limit_s
        self._answer_limit_s, self._publish = settings.answer_limit_s, publish
        self._wire: socket.socket | None = None
        self._news = asyncio.Event()  # the first packet, or a loss
        self._loss = ""
        self._recent: deque[tuple[int, tuple[float, ...]]] = deque(maxlen=STILL_PACKETS)
        self._packets = 0
        self._still = (0.0,) * len(self.command_names)
        self._values = self._still

    async def open(self) -> None:
        """Connect and wait for the first packet; `StartError` when none comes."""
        self._hang_up()
        self._recent.clear()
        self._news.clear()
        self._loss = ""
        self._wire = connect(self.address)
        self.connection_epoch += 1
        self._reader = PacketReader(self._wire, self.shape)
        asyncio.get_running_loop().add_reader(self._wire, self._on_readable)
        self.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._answer_limit_s):
                await self._news.wait()
        if self._loss or not self._recent:
            self._hang_up()
            raise StartError(f"the environment at {self.address} sent no packet", "leave out --robot")

    async def run(self) -> None:
        """Serve the socket until it is lost: `SafetyStop`."""
        self._news.clear()
        while not self._loss:
            await self._news.wait()
        raise SafetyStop(self._loss, "is the environment still there?")

    async def close(self) -> None:
        """Leave it standing."""
        self.stop()
        self._hang_up()

    def command(self, values: tuple[float, ...]) -> None:
        """Set the actions, and whether it is to go on. `OSError`: it is gone."""
        self._values = values
        self._send(NO_REQUEST)

    def request(self, request: int) -> None:
        """Begin an episode with this seed."""
        self._send(request)

    def stop(self) -> None:
        """Make it stand. Never raises."""
        with contextlib.suppress(OSError):
            self.command(self._still)

    def guarded_wire(self) -> None:
        """Nobody has to guard it: it stands when this process hangs up."""

    def stands(self, after_ns: int) -> bool:
        """Whether the newest packets, all after `after_ns`, are of the same step of the same episode."""
        if len(self._recent) < STILL_PACKETS or self._recent[0][0] <= after_ns:
            return False
        return len({values[-2:] for _, values in self._recent}) == 1

    def counters(self) -> dict[str, float | str]:
        """Figures since the driver was made."""
        return {"packets": float(self._packets), "connection_epoch": float(self.connection_epoch)}

    def _send(self, request: int) -> None:
        if self._wire is None:
            raise OSError(errno.ENODEV, f"{self.address} is not open")
        self._wire.send(self.shape.command.pack(*self._values, request))

    def _on_readable(self) -> None:
        try:
            packets = self._reader.read()
        except BlockingIOError:
            return
        except OSError as error:
            self._loss = f"the connection to {self.address} was lost ({error.strerror or error})"
            self._hang_up()
            self._news.set()
            return
        arrived_ns = monotonic_ns()
        for values in packets:
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


def make_driver(shape: Shape) -> Any:
    """The driver of environments of this shape."""
    names = {"shape": shape, "sensor_names": shape.sensor_names, "command_names": shape.command_names}
    return type("GymDriver", (GymDriver,), names)
