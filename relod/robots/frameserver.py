"""How a simulated camera reaches its readers as a real one does: over a wire, at its own pace.

One server offers the newest frame in two ways: raw pixels with a header on a unix socket, for the camera process of
this host; JPEGs over HTTP (`multipart/x-mixed-replace`), for OpenCV and browsers. Readers that are slow miss frames;
they never delay the camera or each other. Faults can be injected: stall, unplug, another size, damaged frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeAlias, cast

import numpy as np

from ..errors import StartError
from ..runtime.clock import NS_PER_S, monotonic_ns
from ..types import Image
from .simcamera import SimFrame
from .vision import cv2

__all__ = ["HEADER", "MAGIC", "FrameServer"]

# Before the pixels, which are (height, width, 3) bytes BGR: magic, height, width, captured_ns of this host's
# monotonic clock.
HEADER = struct.Struct("<4sHHq")
MAGIC = b"rlf1"

JPEG_QUALITY = 90
REQUEST_TIMEOUT_S = 5.0  # a browser sends its request at once; what is silent that long is no HTTP client
REQUEST_LIMIT_BYTES = 16_384
_SEND_BUFFER_BYTES = 65_536  # about one raw frame: what lies in the kernel's buffer only grows old

_RESPONSE = (
    b"HTTP/1.0 200 OK\r\nCache-Control: no-cache\r\nConnection: close\r\n"
    b"Content-Type: multipart/x-mixed-replace; boundary=frame\r\n\r\n"
)
_REFUSAL = b"HTTP/1.0 405 Method Not Allowed\r\nAllow: GET\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

_Encode: TypeAlias = Callable[["_Sent"], bytes]
_Handler: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass(slots=True)
class _Sent:
    """A frame as readers get it; encoded once for all of them, and only if somebody wants it."""

    captured_ns: int
    image: Image
    damaged: bool
    jpeg: bytes = b""


class FrameServer:
    """Serves the newest frame; an async context manager, to be used on one event loop.

    Args:
        path: unix socket for raw frames, or None.
        http_port: port of 127.0.0.1 for MJPEG, 0 for any free one, or None.

    Raises:
        StartError: on entering, when the socket or the port cannot be had.
    """

    def __init__(self, *, path: Path | None = None, http_port: int | None = None) -> None:
        self._path, self._http_port = path, http_port
        self._servers: list[asyncio.Server] = []
        self._clients: set[asyncio.Task[None]] = set()
        self._newest: _Sent | None = None
        self._news = asyncio.Event()
        self._stalled_until_ns = 0
        self._size_hw: tuple[int, int] | None = None
        self._damage = 0
        self.published = 0

    async def __aenter__(self) -> Self:
        await self.plug()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.unplug()

    @property
    def url(self) -> str | None:
        """Where MJPEG is served; None when it is not."""
        return None if self._http_port is None else f"http://127.0.0.1:{self._http_port}/"

    def publish(self, frame: SimFrame) -> None:
        """Make `frame` the newest; returns at once."""
        if monotonic_ns() < self._stalled_until_ns:
            return
        image = frame.image
        if self._size_hw is not None:
            height, width = self._size_hw
            image = cast(Image, cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA))
        self._newest = _Sent(frame.captured_ns, image, damaged=self._damage > 0)
        self._damage = max(0, self._damage - 1)
        self.published += 1
        news, self._news = self._news, asyncio.Event()
        news.set()

    def stall(self, duration_s: float) -> None:
        """Deliver nothing for a while, connections left open, as a hung camera does."""
        self._stalled_until_ns = monotonic_ns() + round(duration_s * NS_PER_S)

    def resize(self, height: int, width: int) -> None:
        """Deliver frames of another size from now on."""
        self._size_hw = (height, width)

    def corrupt(self, frames: int = 1) -> None:
        """Damage the next `frames` frames: a header that is none, a JPEG cut short."""
        self._damage = frames

    async def unplug(self) -> None:
        """Drop every reader and refuse new ones until `plug`."""
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
        for client in tuple(self._clients):
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        for server in servers:
            await server.wait_closed()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    async def plug(self) -> None:
        """Take readers (again), on the same port as before."""
        where = str(self._path)
        try:
            if self._path is not None:
                self._path.unlink(missing_ok=True)  # left by a process that was killed
                serve_raw = self._serve(self._stream_raw)
                self._servers.append(await asyncio.start_unix_server(serve_raw, self._path))
            if self._http_port is not None:
                where = f"127.0.0.1:{self._http_port}"
                serve_http = self._serve(self._stream_http)
                self._servers.append(
                    await asyncio.start_server(serve_http, "127.0.0.1", self._http_port, limit=REQUEST_LIMIT_BYTES)
                )
                self._http_port = self._servers[-1].sockets[0].getsockname()[1]
        except OSError as error:
            await self.unplug()
            raise StartError(f"camera frames cannot be served at {where}: {error.strerror or error}") from error

    def _serve(self, stream: _Handler) -> _Handler:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = cast("asyncio.Task[None]", asyncio.current_task())
            if not self._servers:  # unplugged since the connection was made
                writer.transport.abort()
                return
            self._clients.add(task)
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
            writer.transport.set_write_buffer_limits(0)  # drain then waits until the kernel has everything
            try:
                with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
                    await stream(reader, writer)
            except asyncio.CancelledError:
                pass  # unplugged
            finally:
                self._clients.discard(task)
                writer.transport.abort()

        return serve

    async def _stream_raw(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._stream(reader, writer, _raw_message)

    async def _stream_http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            request = await reader.readuntil(b"\r\n\r\n")
        if not request.startswith(b"GET "):
            writer.write(_REFUSAL)
            await writer.drain()
            return
        writer.write(_RESPONSE)
        await self._stream(reader, writer, _http_part)

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, encode: _Encode) -> None:
        """Send the newest frame, then the one that is newest by then, until the reader hangs up."""
        hung_up = asyncio.ensure_future(reader.read())
        sent = self._newest  # a frame from before the connection may be old: a camera that hangs has nothing to say
        try:
            while not hung_up.done():
                newest = self._newest
                if newest is None or newest is sent:
                    news = asyncio.ensure_future(self._news.wait())
                    try:
                        await asyncio.wait((news, hung_up), return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        news.cancel()
                    continue
                sent = newest
                writer.write(encode(sent))
                await writer.drain()
        finally:
            hung_up.cancel()


def _raw_message(frame: _Sent) -> bytes:
    height, width = frame.image.shape[:2]
    magic = b"\0\0\0\0" if frame.damaged else MAGIC
    return HEADER.pack(magic, height, width, frame.captured_ns) + frame.image.tobytes()


def _http_part(frame: _Sent) -> bytes:
    if not frame.jpeg:
        done, encoded = cv2.imencode(".jpg", frame.image, (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY))
        assert done
        frame.jpeg = np.asarray(encoded).tobytes()
        if frame.damaged:
            frame.jpeg = frame.jpeg[: len(frame.jpeg) // 2]
    return b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n" % (len(frame.jpeg), frame.jpeg)
