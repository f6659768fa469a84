"""One attempt to reach a learner: addresses, TCP, TLS, websocket and handshake, and a line for whatever goes wrong.

It says which failures may pass (`NotNow`) and which will not (a `RelodError`); when to try again is `link`'s business.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidStatus
from websockets.typing import Subprotocol

from ... import __version__
from ...errors import RelodError, SettingsError, StartError, error_with_code
from ...types import TaskSpec
from ..clock import NS_PER_MS, monotonic_ns
from . import wire
from .access import client_tls, learner_proof, robot_proof

__all__ = ["Dialer", "JoinFacts", "NoLearner", "NotNow", "refusal"]

# The largest message of a learner is a part of a policy.
MAX_MESSAGE_BYTES = 4 + wire.MAX_HEADER_BYTES + wire.POLICY_PART_BYTES
# A message waits behind at most this much of those before it, in the kernel; the rest is held back here, in order of
# urgency.
UNSENT_BYTES = 1 << 16
PROBE_SHARE = 0.5  # of the time for the handshake: a learner turns away who has not joined by its end
FORGET_AFTER = 20  # failed attempts, some 5 s
BUSY_STATUS = (429, 500, 502, 503, 504)  # HTTP: too many connections, or a gateway whose learner is not there yet


class NoLearner(StartError):
    """There is no such host, or what answers is no relod learner, or none whose certificate is to be trusted."""


class NotNow(Exception):
    """The learner cannot be had at the moment; the text says why. `refused`: something there says so itself."""

    def __init__(self, text: str, *, refused: bool = False) -> None:
        super().__init__(text)
        self.refused = refused


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinFacts:
    """What a robot says of itself; the fields of `wire.Join`."""

    robot: str
    run: str
    acts: Literal["robot", "learner"]
    task: TaskSpec
    codec: Literal["raw", "jpeg"]
    algorithm: str
    presets: dict[str, dict[str, Any]]


def refusal(refused: wire.Refused) -> RelodError | NotNow:
    """What a learner's refusal means for the robot."""
    if refused.retry:
        return NotNow(refused.message, refused=True)
    return error_with_code(refused.exit_code, f"the learner says: {refused.message}", refused.hint)


class Dialer:
    """Connects a robot to the learner at `url`, as often as asked.

    Raises:
        SettingsError: `url` is no address of a learner.
        StartError: the certificates of `ca` cannot be had.
    """

    def __init__(self, url: str, *, token: bytes | None, ca: Path | None, join: JoinFacts | None) -> None:
        self.host, self.port = _address(url)
        self.url = url
        self._token = token
        self._join = join
        self._tls = client_tls(url, ca)
        self._addresses: list[tuple[Any, ...]] = []
        self._failures = 0

    async def dial(self, *, connect_s: float, hello_s: float) -> tuple[ClientConnection, wire.Welcome]:
        """A connection that was welcomed; `connect_s` limits TCP per address, `hello_s` all that follows it.

        Raises:
            NotNow: nobody answers, or not yet.
            RelodError: the learner will not have this robot, or whoever answers is no learner to trust.
        """
        async with self._reached(connect_s, hello_s) as websocket:
            return websocket, await self._shake_hands(websocket)

    async def greet(self, *, connect_s: float, hello_s: float) -> wire.Challenge:
        """The learner's first word, and nothing more; raises as `dial` does."""
        async with self._reached(connect_s, hello_s) as websocket:
            challenge = await self._challenge(websocket)
            websocket.transport.abort()
            return challenge

    async def probe(
        self, *, connect_s: float, hello_s: float, pings: int, every_s: float
    ) -> tuple[wire.Challenge, list[float]]:
        """The learner's first word, and round trips in ms to it; nobody joins. Raises as `dial` does.

        The protocol's own pings are for robots that were let in, so these are the websocket's, which every peer
        answers. Fewer than `pings` come back where `hello_s` ends before.
        """
        round_trips_ms: list[float] = []
        async with self._reached(connect_s, hello_s) as websocket:
            challenge = await self._challenge(websocket)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROBE_SHARE * hello_s):
                    for _ in range(pings):
                        sent_ns = monotonic_ns()
                        await (await websocket.ping())
                        round_trips_ms.append((monotonic_ns() - sent_ns) / NS_PER_MS)
                        await asyncio.sleep(every_s)
            websocket.transport.abort()
        return challenge, round_trips_ms

    @contextlib.asynccontextmanager
    async def _reached(self, connect_s: float, hello_s: float) -> AsyncIterator[ClientConnection]:
        """A websocket for the time of the handshake; aborted when that fails."""
        sock = await self._tcp(connect_s)
        try:
            async with asyncio.timeout(hello_s):
                websocket = await self._websocket(sock)
                try:
                    yield websocket
                except BaseException:
                    websocket.transport.abort()
                    raise
        except TimeoutError as error:
            raise NotNow("no answer") from error
        except ConnectionClosed as error:
            raise NotNow("closed in the handshake") from error

    @property
    def _closed_at_once(self) -> str:
        """What a relay does whose learner is not there, and a learner whose port is of the other kind."""
        return "closed at once" + (
            " (without --cert it is at ws://)" if self._tls else " (with --cert it is at wss://)"
        )

    async def _tcp(self, connect_s: float) -> socket.socket:
        problem = OSError()
        for family, kind, protocol, _, address in await self._resolve():
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
                async with asyncio.timeout(connect_s):
                    await asyncio.get_running_loop().sock_connect(sock, address)
            except OSError as error:  # TimeoutError among them
                sock.close()
                problem = error
            except BaseException:
                sock.close()
                raise
            else:
                return sock
        self._failures += 1
        if self._failures % FORGET_AFTER == 0:
            self._addresses = []  # it may have another by now
        text = os.strerror(problem.errno).lower() if problem.errno else "no answer"
        raise NotNow(text, refused=isinstance(problem, ConnectionRefusedError))

    async def _resolve(self) -> list[tuple[Any, ...]]:
        """The addresses found first are kept: while a network is down, looking them up again takes seconds."""
        if not self._addresses:
            try:
                self._addresses = list(
                    await asyncio.get_running_loop().getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
                )
            except OSError as error:
                if error.errno == socket.EAI_AGAIN:
                    raise NotNow(f"the name of host {self.host!r} cannot be looked up at the moment") from error
                raise NoLearner(
                    f"there is no host {self.host!r} in this network ({error.strerror})",
                    f"check --learner {self.url}, or give the host's IP address",
                ) from error
        return self._addresses

    async def _websocket(self, sock: socket.socket) -> ClientConnection:
        no_learner = f"what answers at {self.url} is not a relod learner"
        check = "check host and port against the address that `relod learner` printed"
        tls: dict[str, Any] = {"ssl": self._tls, "server_hostname": self.host} if self._tls is not None else {}
        try:
            websocket = await connect(
                self.url,
                sock=sock,
                subprotocols=[Subprotocol(wire.SUBPROTOCOL)],
                compression=None,
                ping_interval=None,  # `link` pings by itself, to compare clocks
                open_timeout=None,
                close_timeout=0.5,
                max_size=MAX_MESSAGE_BYTES,
                write_limit=1,  # who sends waits until the kernel has it all; with 0, asyncio's TLS waits for ever
                **tls,
            )
        except ssl.SSLCertVerificationError as error:
            raise NoLearner(
                f"the certificate of {self.url} is not to be trusted: {error.verify_message}",
                "give the learner's certificate or its authority's by --ca, and the host name that it is for",
            ) from error
        except ssl.SSLError as error:
            raise NoLearner(
                f"{self.url} does not speak TLS as expected ({error.reason})", "a learner without --cert is at ws://"
            ) from error
        except OSError as error:
            raise NotNow(self._closed_at_once) from error
        except InvalidStatus as error:
            status = error.response.status_code
            if status in BUSY_STATUS:
                raise NotNow(f"HTTP {status}", refused=True) from error
            raise NoLearner(f"{no_learner} (HTTP {status})", check) from error
        except InvalidMessage as error:
            if isinstance(error.__cause__, EOFError):
                raise NotNow(self._closed_at_once) from error
            raise NoLearner(f"{no_learner} (no HTTP)", check) from error
        except AssertionError as error:  # raised by websockets for what speaks, and closes, before it is asked
            raise NoLearner(f"{no_learner} (no HTTP)", check) from error
        except (InvalidHandshake, ValueError) as error:  # ValueError: HTTP that redirects
            raise NoLearner(f"{no_learner} ({error})", check) from error
        if websocket.subprotocol != wire.SUBPROTOCOL:
            websocket.transport.abort()
            raise NoLearner(f"{no_learner} (a websocket of another kind)", check)
        return websocket

    async def _challenge(self, websocket: ClientConnection) -> wire.Challenge:
        challenge = await self._receive(websocket)
        if not isinstance(challenge, wire.Challenge):
            raise NoLearner(f"{self.url} began with {type(challenge).__name__}, not with a challenge")
        if challenge.protocol != wire.PROTOCOL:
            raise NoLearner(
                f"the learner at {self.url} (relod {challenge.relod}) speaks protocol {challenge.protocol}, "
                f"this robot {wire.PROTOCOL}",
                "install the same version of relod on both",
            )
        return challenge

    async def _shake_hands(self, websocket: ClientConnection) -> wire.Welcome:
        challenge = await self._challenge(websocket)
        if challenge.token and self._token is None:
            raise StartError(
                f"the learner at {self.url} asks for its token",
                "copy its token file to this host and give it by --token-file, or the token by RELOD_TOKEN",
            )
        nonce = os.urandom(wire.NONCE_BYTES)
        await websocket.send(wire.pack(self._introduction(challenge, nonce)))
        welcome = await self._receive(websocket)
        if not isinstance(welcome, wire.Welcome):
            raise StartError(f"{self.url} answered with {type(welcome).__name__}, not with a welcome")
        self._check_proof(welcome, challenge.nonce, nonce)
        return welcome

    def _introduction(self, challenge: wire.Challenge, nonce: bytes) -> wire.Join:
        facts = self._join
        assert facts is not None  # None is enough to greet
        proof = b""
        if self._token is not None:
            proof = robot_proof(self._token, challenge.nonce, nonce, facts.robot, facts.run)
        return wire.Join(
            protocol=wire.PROTOCOL,
            relod=__version__,
            robot=facts.robot,
            run=facts.run,
            acts=facts.acts,
            task=facts.task,
            codec=facts.codec,
            algorithm=facts.algorithm,
            presets=facts.presets,
            nonce=nonce,
            proof=proof,
        )

    def _check_proof(self, welcome: wire.Welcome, challenge_nonce: bytes, nonce: bytes) -> None:
        if self._token is None or self._join is None:
            return
        expected = learner_proof(self._token, challenge_nonce, nonce, self._join.robot, self._join.run)
        if not hmac.compare_digest(expected, welcome.proof):
            raise StartError(
                f"the learner at {self.url} did not prove that it knows the token",
                "start it with the same token, or this robot without one",
            )

    async def _receive(self, websocket: ClientConnection) -> wire.FromLearner:
        """The next message of the handshake, unless it is a refusal."""
        try:
            head, _ = wire.unpack_from_learner(await websocket.recv(decode=False))
        except wire.WireError as error:
            raise StartError(
                f"{self.url} does not speak this version's protocol ({error})",
                "install the same version of relod on both",
            ) from error
        if isinstance(head, wire.Refused):
            raise refusal(head)
        return head


def _address(url: str) -> tuple[str, int]:
    """Host and port of a learner's address; `SettingsError`."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    else:
        if parts.scheme not in ("ws", "wss") or parts.path not in ("", "/") or "@" in parts.netloc or parts.query:
            host = None
    if not host or not port or not url.isascii():
        raise SettingsError(f"{url!r} is no address of a learner", "write it as ws://HOST:8765, or wss://HOST:8765")
    return host, port
