"""The emulator's control socket: faults and questions as JSON lines on a unix socket.

Each line is an object with `op` and that operation's fields, for example `{"op": "wheel_drop", "left": true}`.
Each answer is a line `{"ok": true, ...}` or `{"ok": false, "error": "..."}`.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from ...errors import StartError

__all__ = ["FaultServer", "Operation", "ask"]

Seconds: TypeAlias = Annotated[float, Meta(gt=0, le=3600)]
LINE_LIMIT_BYTES = 64 * 1024


class Operation(msgspec.Struct, frozen=True, tag_field="op", tag=str.lower, forbid_unknown_fields=True):
    """Base of what can be asked."""


class Battery(Operation, frozen=True):
    """Set the charge."""

    charge_mah: Annotated[float, Meta(ge=0, le=65535)]


class Dock(Operation, frozen=True):
    """Put the home base there or take it away."""

    present: bool


class Cliff(Operation, frozen=True):
    """Make the floor vanish under cliff sensors."""

    left: bool = False
    front_left: bool = False
    front_right: bool = False
    right: bool = False


class WheelDrop(Operation, frozen=True, tag="wheel_drop"):
    """Lift the robot off wheels."""

    left: bool = False
    right: bool = False


class Bump(Operation, frozen=True):
    """Press the bumper."""

    left: bool = False
    right: bool = False


class Charger(Operation, frozen=True):
    """Plug the charger into the robot's side."""

    plugged: bool


class Force(Operation, frozen=True):
    """Report a fixed value as a packet; null ends it."""

    packet: int
    value: int | None


class Stall(Operation, frozen=True):
    """Send nothing for a while; the robot goes on."""

    seconds: Seconds


class Freeze(Operation, frozen=True):
    """The firmware hangs for a while: hears and sends nothing, the wheels turn on."""

    seconds: Seconds


class Drop(Operation, frozen=True):
    """Lose the next bytes to the host."""

    count: Annotated[int, Meta(ge=0)]


class Corrupt(Operation, frozen=True):
    """Flip a bit in the next bytes to the host."""

    count: Annotated[int, Meta(ge=0)]


class HangUp(Operation, frozen=True, tag="hang_up"):
    """Pull the cable; put it back after a while. The robot goes on."""

    seconds: Seconds


class Wake(Operation, frozen=True):
    """Pulse the line that wakes a sleeping robot."""


class Place(Operation, frozen=True):
    """Carry the robot somewhere else."""

    x_m: float
    y_m: float
    heading_rad: float


class CameraStall(Operation, frozen=True, tag="camera_stall"):
    """The camera hangs for a while, its connections open."""

    seconds: Seconds


class CameraUnplug(Operation, frozen=True, tag="camera_unplug"):
    """Pull the camera's cable; put it back after a while."""

    seconds: Seconds


class CameraResize(Operation, frozen=True, tag="camera_resize"):
    """The camera delivers pictures of another size from now on."""

    height: Annotated[int, Meta(ge=1, le=4096)]
    width: Annotated[int, Meta(ge=1, le=4096)]


class CameraCorrupt(Operation, frozen=True, tag="camera_corrupt"):
    """Damage the camera's next frames."""

    count: Annotated[int, Meta(ge=0)]


class State(Operation, frozen=True):
    """Ask for everything about the robot."""


class WheelLog(Operation, frozen=True, tag="wheel_log"):
    """Ask for the wheel log."""


AnyOperation: TypeAlias = (
    Battery
    | Dock
    | Cliff
    | WheelDrop
    | Bump
    | Charger
    | Force
    | Stall
    | Freeze
    | Drop
    | Corrupt
    | HangUp
    | Wake
    | Place
    | CameraStall
    | CameraUnplug
    | CameraResize
    | CameraCorrupt
    | State
    | WheelLog
)


class FaultServer:
    """Serves the control socket; `apply` performs an operation and returns what to answer, ValueError to refuse."""

    def __init__(self, path: Path, apply: Callable[[AnyOperation], dict[str, Any]]) -> None:
        self.path = path
        self._apply = apply
        self._decoder = msgspec.json.Decoder(AnyOperation)
        self._clients: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> FaultServer:
        try:
            self.path.unlink(missing_ok=True)
            self._server = await asyncio.start_unix_server(self._serve, self.path, limit=LINE_LIMIT_BYTES)
            os.chmod(self.path, 0o600)
        except OSError as error:
            raise StartError(
                f"no control socket at {self.path}: {error}", "a socket's path has at most 107 characters"
            ) from error
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        self.path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            while line := await reader.readline():
                writer.write(msgspec.json.encode(self._answer(line)) + b"\n")
                await writer.drain()
        except (ValueError, ConnectionError, asyncio.CancelledError):  # line too long, client gone, server ended
            pass
        finally:
            self._clients.discard(task)
            writer.close()

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            return {"ok": True, **self._apply(self._decoder.decode(line))}
        except ValueError as error:  # msgspec's errors among them
            return {"ok": False, "error": str(error)}


def ask(path: Path | str, op: str, timeout_s: float = 5.0, **fields: object) -> dict[str, Any]:
    """Ask an emulator one thing and wait for the answer; for tests and scripts.

    Raises:
        ValueError: the emulator refused.
        OSError: nobody listens at `path`, or no answer in `timeout_s`.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(timeout_s)
        client.connect(str(path))
        client.sendall(msgspec.json.encode({"op": op, **fields}) + b"\n")
        with client.makefile("rb") as lines:
            answer: dict[str, Any] = msgspec.json.decode(lines.readline())
    if not answer.pop("ok"):
        raise ValueError(answer["error"])
    return answer
