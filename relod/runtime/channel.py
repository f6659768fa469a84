"""The channel between the parent and a child process: messages both ways, and the end of file that tells of a death.

Each child holds one end of a socket pair. Either side learns at once that the other is gone, however it died.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any

import msgspec

__all__ = ["MAX_ERROR_CHARS", "Channel", "Event", "Failed", "Finish", "Message", "Ready", "Report", "Tell", "readable"]


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Child to parent: it does its work now; `info` says where to find it."""

    info: dict[str, str] = {}


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Child to parent: it ends because of this."""

    exit_code: int
    message: str
    hint: str = ""
    again: bool = False  # whether another start may mend it


class Event(msgspec.Struct, frozen=True, tag=True):
    """Child to parent: something a person should read."""

    text: str


class Report(msgspec.Struct, frozen=True, tag=True):
    """Child to parent: figures for the live view and the metrics."""

    values: dict[str, float | str]


class Finish(msgspec.Struct, frozen=True, tag=True):
    """Parent to child: end in good order."""

    reason: str = ""


class Tell(msgspec.Struct, frozen=True, tag=True):
    """Parent to child: something happened that the child may care about."""

    text: str


Message = Ready | Failed | Event | Report | Finish | Tell
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_MAX_MESSAGE_BYTES = 1 << 16
MAX_ERROR_CHARS = 2000  # of an error with, say, a whole array in it; the log has all


class Channel:
    """One end of the socket pair between the parent and a child; never blocks."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.setblocking(False)

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Two connected ends."""
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(left), cls(right)

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: Message) -> bool:
        """Send, or say False when the other end is gone or does not read."""
        try:
            self._sock.send(_encoder.encode(message))
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            return False
        return True

    def receive(self) -> Message | None:
        """The next message, or None when none waits; `EOFError` when the other end is gone."""
        try:
            data = self._sock.recv(_MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return None
        except ConnectionResetError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        return _decoder.decode(data)

    def pending(self) -> list[Message]:
        """All messages that wait; `EOFError` only once nothing is left to read."""
        found: list[Message] = []
        with contextlib.suppress(EOFError):
            while (message := self.receive()) is not None:
                found.append(message)
            return found
        if not found:
            raise EOFError
        return found

    async def finished(self, on_tell: Callable[[str], None] = lambda text: None) -> str:
        """Wait until the parent asks this child to finish or is gone; returns the reason."""
        while True:
            try:
                message = self.receive()
            except EOFError:
                return "the parent process is gone"
            match message:
                case Finish(reason):
                    return reason
                case Tell(text):
                    on_tell(text)
                case None:
                    await readable(self)

    def close(self) -> None:
        self._sock.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"sock": self._sock}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["sock"])  # type: ignore[misc]


async def readable(source: Any) -> None:
    """Wait until `source` (anything with a fileno) can be read."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    fd = os.dup(source.fileno())  # a loop has one reader per descriptor: a second waiter would silence the first
    loop.add_reader(fd, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)
