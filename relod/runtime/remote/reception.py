"""Reception at a learner's door: connections that are counted, who says what they are, and what those are told who
may not come in.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from http import HTTPStatus
from typing import Any, Protocol

import msgspec
from websockets import ConnectionClosed, Headers, Request, Response
from websockets.asyncio.server import ServerConnection

from ... import __version__
from ...errors import EXIT_BUG, EXIT_LINK, RelodError, SettingsError, StartError
from ..clock import monotonic_ns
from .wire import POLICY_PART_BYTES, PROTOCOL, SUBPROTOCOL, Join, Refused, WireError, pack, unpack_from_robot

__all__ = ["Connection", "Counter", "Refusal", "cannot_listen", "explain", "greet", "read_join", "refuse", "why_closed"]

CLOSE_S = 1.0  # how long the other end of a closed connection may take to agree
MAX_TEXT = 300  # of what strangers say, in lines for people
LENGTH_BYTES = 4  # of a header's length

_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>relod learner</title></head><body>
<h1>This is a relod learner</h1>
<p>It learns from robots, and speaks to them over a websocket; there is nothing to see in a browser.</p>
<p>To connect a robot, run there:</p>
<pre>relod robot --task TASK --mode remote-local --learner {url}</pre>
</body></html>
"""


class Refusal(Exception):
    """Somebody is not let in."""

    def __init__(self, error: RelodError, *, retry: bool = False) -> None:
        super().__init__(str(error))
        self.error, self.retry = error, retry


class _AnyJoin(msgspec.Struct, tag_field="type", tag="join"):
    """What a join of every version of the protocol has."""

    protocol: int


_any_join = msgspec.msgpack.Decoder(_AnyJoin)


class Counter(Protocol):
    """Counts connections."""

    def came(self, connection: Connection) -> None:
        """A connection was made."""
        ...

    def went(self, connection: Connection) -> None:
        """A connection is gone."""
        ...


class Connection(ServerConnection):
    """A websocket connection that is counted from its first byte on, and knows when it last heard one."""

    def __init__(self, counter: Counter, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counter = counter
        self.opened_ns = self.heard_ns = monotonic_ns()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Acks and answers never wait behind more than this of a policy in the kernel.
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, POLICY_PART_BYTES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(transport)
        self._counter.came(self)

    def data_received(self, data: bytes) -> None:
        self.heard_ns = monotonic_ns()
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._counter.went(self)
        super().connection_lost(exc)


def greet(connection: ServerConnection, request: Request, url: str) -> Response | None:
    """The answer to an HTTP request that is none of a robot; what comes with a browser gets a page.

    Args:
        url: what a robot is to be given.
    """
    if request.headers.get("Upgrade", "").lower() != "websocket":
        page = _PAGE.format(url=url).encode()
        headers = Headers({"Content-Type": "text/html; charset=utf-8", "Content-Length": str(len(page))})
        headers["Connection"] = "close"
        return Response(HTTPStatus.OK, "OK", headers, page)
    offered = ",".join(request.headers.get_all("Sec-WebSocket-Protocol")).split(",")
    if SUBPROTOCOL not in (name.strip() for name in offered):
        return connection.respond(HTTPStatus.BAD_REQUEST, f"this learner speaks the subprotocol {SUBPROTOCOL!r}\n")
    return None


def read_join(data: str | bytes) -> Join:
    """The first message of a robot; of another version of the protocol, that much is said."""
    if not isinstance(data, bytes):
        raise WireError("a text message")
    try:
        join, _ = unpack_from_robot(data)
        protocol = join.protocol if isinstance(join, Join) else PROTOCOL
    except WireError:
        protocol = _protocol_of(data)
        if protocol == PROTOCOL:
            raise
    if protocol != PROTOCOL:
        error = SettingsError(
            f"the robot speaks version {protocol} of the protocol, this learner {PROTOCOL}",
            f"install relod {__version__} on the robot",
        )
        raise Refusal(error)
    if not isinstance(join, Join):
        raise WireError(f"a {type(join).__name__} before the join")
    return join


def _protocol_of(data: bytes) -> int:
    """Version of the protocol in what looks like a join; ours when there is none."""
    end = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
    try:
        return _any_join.decode(data[LENGTH_BYTES:end]).protocol
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return PROTOCOL


def explain(error: Exception) -> tuple[Refused, str]:
    """What a robot is told of the error that cost it its connection, and what people are."""
    retry = isinstance(error, Refusal) and error.retry
    if isinstance(error, Refusal):
        error = error.error
    match error:
        case RelodError():
            text, refused = str(error), (error.exit_code, error.message, error.hint)
        case WireError() | ValueError():
            text = f"a bad message: {error}"
            refused = (EXIT_BUG, f"the learner got {text}", "use the same version of relod on both ends")
        case TimeoutError():
            text = "it did not say who it is in time"
            refused = (EXIT_LINK, text, "")
        case _:
            text = f"a defect of the learner: {type(error).__name__}: {error}"
            refused = (EXIT_BUG, text, "")
    exit_code, message, hint = refused
    return Refused(exit_code=exit_code, message=_printable(message), hint=_printable(hint), retry=retry), _printable(
        text
    )


def _printable(text: str) -> str:
    """A line that cannot play tricks with a terminal, whoever wrote parts of it."""
    return "".join(each if each.isprintable() else "?" for each in text[:MAX_TEXT])


async def refuse(connection: Connection, refused: Refused) -> None:
    try:
        async with asyncio.timeout(CLOSE_S):
            await connection.send(pack(refused))
    except (ConnectionClosed, TimeoutError):
        pass


def why_closed(error: ConnectionClosed) -> str:
    if error.rcvd is None and error.sent is None:
        return "the link was cut"
    return _printable(str(error))


def cannot_listen(host: str, port: int, error: OSError) -> StartError:
    if error.errno == errno.EADDRINUSE:
        return StartError(f"port {port} of {host} is in use", "end what listens there, or give --listen another port")
    reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
    return StartError(f"cannot listen at {host}:{port}: {reason}", "give --listen HOST:PORT of this machine")
