"""A simulated robot's control socket: faults and questions as JSON lines on a unix socket.

Each line is an object with `op` and that operation's fields, for example `{"op": "camera_stall", "seconds": 2}`.
Each answer is a line `{"ok": true, ...}` or `{"ok": false, "error": "..."}`. Which operations there are is the
robot's business; those of the simulated camera are the same for all.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeAlias

import msgspec
from msgspec import Meta

from ..errors import StartError

__all__ = [
    "CameraCable",
    "CameraCorrupt",
    "CameraFaults",
    "CameraOperation",
    "CameraResize",
    "CameraStall",
    "CameraUnplug",
    "FaultServer",
    "Operation",
    "Seconds",
    "ask",
]

Seconds: TypeAlias = Annotated[float, Meta(gt=0, le=3600)]
LINE_LIMIT_BYTES = 64 * 1024


class Operation(msgspec.Struct, frozen=True, tag_field="op", tag=str.lower, forbid_unknown_fields=True):
    """Base of what can be asked."""


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


CameraOperation: TypeAlias = CameraStall | CameraUnplug | CameraResize | CameraCorrupt


class CameraFaults(Protocol):
    """What can go wrong with a simulated camera; a `FrameServer` can all of it."""

    def stall(self, duration_s: float) -> None: ...

    def resize(self, height: int, width: int) -> None: ...

    def corrupt(self, frames: int) -> None: ...

    async def unplug(self) -> None: ...

    async def plug(self) -> None: ...


class CameraCable:
    """Breaks a simulated camera as it is asked to; None where the world has no camera. Use on one event loop."""

    def __init__(self, camera: CameraFaults | None) -> None:
        self._camera = camera
        self._pulled: asyncio.Task[None] | None = None

    def apply(self, operation: CameraOperation) -> None:
        """Perform an operation; ValueError when it cannot be."""
        camera = self._camera
        if camera is None:
            raise ValueError("there is no camera")
        match operation:
            case CameraStall():
                camera.stall(operation.seconds)
            case CameraResize():
                camera.resize(operation.height, operation.width)
            case CameraCorrupt():
                camera.corrupt(operation.count)
            case CameraUnplug():
                if self._pulled is not None and not self._pulled.done():
                    raise ValueError("the camera's cable is already pulled")
                self._pulled = asyncio.create_task(_pull(camera, operation.seconds), name="camera-cable")

    def cancel(self) -> None:
        """Leave a pulled cable as it is."""
        if self._pulled is not None:
            self._pulled.cancel()


async def _pull(camera: CameraFaults, seconds: float) -> None:
    await camera.unplug()
    await asyncio.sleep(seconds)
    await camera.plug()


class FaultServer:
    """Serves the control socket; an async context manager.

    Args:
        operations: the union of operations that this robot knows.
        apply: performs one and returns what to answer, ValueError to refuse.

    Raises:
        StartError: on entering, when there can be no socket at `path`.
    """

    def __init__(self, path: Path, operations: Any, apply: Callable[[Any], dict[str, Any]]) -> None:
        self.path = path
        self._apply = apply
        self._decoder = msgspec.json.Decoder(operations)
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
        # A line too long, a client that went away, and the server's own end all end a conversation.
        try:
            with contextlib.suppress(ValueError, ConnectionError, asyncio.CancelledError):
                while line := await reader.readline():
                    writer.write(msgspec.json.encode(self._answer(line)) + b"\n")
                    await writer.drain()
        finally:
            self._clients.discard(task)
            writer.close()

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            return {"ok": True, **self._apply(self._decoder.decode(line))}
        except ValueError as error:  # msgspec's errors among them
            return {"ok": False, "error": str(error)}


def ask(path: Path | str, op: str, timeout_s: float = 5.0, **fields: object) -> dict[str, Any]:
    """Ask a simulated robot one thing and wait for the answer; for tests and scripts.

    Raises:
        ValueError: it refused.
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
