"""The learner's door: listens, finds out who is there, keeps one session per robot, and tells all of them things.

It knows nothing of replay, log or networks: what robots send goes to a `Hall`, what they get comes from one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import logging
import secrets
import ssl
from collections.abc import Callable, Coroutine
from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt
from websockets import ConnectionClosed, Request, Response, Subprotocol
from websockets.asyncio.server import Server, ServerConnection, serve

from ... import __version__
from ...config import ServerSettings
from ...errors import SafetyStop, StartError
from ..clock import NS_PER_S, monotonic_ns
from .access import Attempts, learner_proof, robot_proof
from .intake import check_spec
from .owed import PackedPolicy, pack_policy
from .reception import CLOSE_S, Connection, Refusal, cannot_listen, explain, greet, read_join, refuse, why_closed
from .serversession import Admission, Hall, RobotSession, Tally
from .wire import (
    MAX_HEADER_BYTES,
    NONCE_BYTES,
    PROTOCOL,
    SUBPROTOCOL,
    Challenge,
    Finished,
    FromLearner,
    Hold,
    Join,
    Precision,
    pack,
)

__all__ = ["Admission", "Hall", "LearnerServer"]

AWAY_S = 5.0  # how long a finished learner waits for robots whose link is down: they retry three times a second
GOODBYE_LOOK_S = 0.1
TALLIES_KEPT = 256  # robots whose counts are kept after they left
COMPLAIN_EVERY_NS = NS_PER_S  # lines about strangers
BROKEN = {1002, 1007, 1009}  # what a connection is closed with whose bytes are no websocket's, or too many


class LearnerServer:
    """Serves robots from `start` to `close`; made on a running loop.

    Args:
        token: what robots must prove to know; None lets everyone in.
        say: takes lines for people.
        image_hw: of the images that suit the learner's networks; robots that were told nothing else send such.
        preset: the agent's; a task may know images that suit both better.
    """

    def __init__(
        self,
        *,
        hall: Hall,
        settings: ServerSettings,
        token: bytes | None,
        tls: ssl.SSLContext | None,
        say: Callable[[str], object] = lambda text: None,
        image_hw: tuple[int, int] | None = None,
        preset: str = "",
    ) -> None:
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # why the learner must end
        self._hall, self._settings, self._token, self._tls, self._say = hall, settings, token, tls, say
        self._image_hw, self._preset = image_hw, preset
        self._precision: Precision = settings.precision
        self._sessions: dict[str, RobotSession] = {}
        self._tallies: dict[str, Tally] = {}
        self._attempts = Attempts()
        self._strangers: dict[Connection, None] = {}  # those that have not joined, the longest waiting first
        self._connections = 0
        self._complaints, self._complained_ns = 0, -COMPLAIN_EVERY_NS
        self._told: dict[type[FromLearner], bytes] = {}  # the newest of each kind, for those who come later
        self._policy: PackedPolicy | None = None
        self._holding = False
        self._unpacked: tuple[npt.NDArray[np.float32], tuple[int, int]] | None = None
        self._published, self._changed = asyncio.Event(), asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._server: Server | None = None
        self._port = 0

    # -- for the learner -----------------------------------------------------------------------------------------------

    async def start(self, host: str, port: int, *, listening: bool = True) -> int:
        """Listen; returns the port, which is another one where 0 was asked for. `StartError` when it cannot be had.

        Args:
            listening: False only takes the port; until `listen`, robots are refused and come again.
        """
        try:
            self._server = await serve(
                self._serve,
                host,
                port,
                ssl=self._tls,
                origins=[None],  # no page that a browser on this machine shows may speak for a robot
                subprotocols=[Subprotocol(SUBPROTOCOL)],
                compression=None,
                process_request=self._greet,
                server_header=None,
                open_timeout=self._settings.hello_s,
                ping_interval=None,
                close_timeout=CLOSE_S,
                max_size=MAX_HEADER_BYTES,  # of strangers; a session sets its own
                start_serving=listening,
                logger=logging.Logger("relod.server", logging.CRITICAL + 1),  # what matters is said here
                create_connection=cast(Any, functools.partial(Connection, self)),
            )
        except OSError as error:
            raise cannot_listen(host, port, error) from error
        self._port = int(next(iter(self._server.sockets)).getsockname()[1])
        self._tasks = [self._start_task(self._sweep(), "sweep"), self._start_task(self._pack(), "pack")]
        return self._port

    def settle(self, image_hw: tuple[int, int], precision: Precision) -> None:
        """The task is known: robots that come send images of this size, and policies go out in this precision."""
        self._image_hw, self._preset, self._precision = image_hw, "", precision

    async def listen(self) -> None:
        """Let robots in from now on."""
        assert self._server is not None
        await self._server.start_serving()

    def publish(self, values: npt.NDArray[np.float32], version: tuple[int, int]) -> None:
        """Send a policy to every robot that acts itself, now or when it comes; the server keeps `values`."""
        self._unpacked = values, version
        self._published.set()

    def tell(self, message: FromLearner, *, last: bool = False) -> None:
        """Send a message to all robots, and to those that come later; a newer one of its kind takes its place.

        `last`: after the newest policy.
        """
        packed = self._told[type(message)] = pack(message)
        for session in self._sessions.values():
            session.tell(type(message), packed, last=last)

    def hold(self, reason: str) -> None:
        """Have all robots, also those that come later, begin no episode until they have the next policy."""
        self._holding = True
        self.tell(Hold(reason=reason))

    async def close(self, finished: str | None, *, wait_s: float = 10.0) -> None:
        """Stop serving; nobody calls the hall afterwards.

        Args:
            finished: why the learner's run is over; robots then end theirs. None: they wait for it to come back.
            wait_s: how long robots that are told may take to say goodbye.
        """
        if finished is not None:
            self.tell(Finished(reason=finished))
            await self._wait_for_goodbyes(wait_s)
        for task in self._tasks:
            task.cancel()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _wait_for_goodbyes(self, wait_s: float) -> None:
        """Of those who are here, as long as they send what they have; and of those whose link is down just now."""
        away_ns = monotonic_ns() + int(AWAY_S * NS_PER_S)
        heard_ns, taken = monotonic_ns(), 0
        while True:
            now_ns, tallies = monotonic_ns(), self._tallies.values()
            records = sum(tally.steps + tally.episodes for tally in tallies)
            if records > taken:
                heard_ns, taken = now_ns, records
            away = any(not tally.said_goodbye for name, tally in self._tallies.items() if name not in self._sessions)
            if not self._sessions and not (away and now_ns < away_ns):
                return
            if self._sessions and now_ns - heard_ns > wait_s * NS_PER_S:
                self._say(f"{', '.join(self._sessions)} did not say goodbye within {wait_s:g} s")
                return
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GOODBYE_LOOK_S):
                    await self._changed.wait()

    def figures(self) -> dict[str, dict[str, Any]]:
        """What is known of each robot by its name, those that left among them."""
        return {name: self._figures(name, tally) for name, tally in self._tallies.items()}

    def _figures(self, name: str, tally: Tally) -> dict[str, Any]:
        now_ns, session = monotonic_ns(), self._sessions.get(name)
        figures: dict[str, Any] = {
            "state": "connected" if session is not None else "away",
            "connections": tally.connections,
            "steps": tally.steps,
            "episodes": tally.episodes,
            "duplicates": tally.duplicates,
            "rejected": tally.rejected,
            "frames": tally.frames,
            "asked": tally.asked,
            "answered": tally.answered,
            "bytes_in": tally.bytes_in,
            "bytes_out": tally.bytes_out,
        }
        if tally.rtt_ms > 0:
            figures["rtt_ms"] = tally.rtt_ms
        if session is not None:
            figures |= {
                "acts": session.admission.acts,
                "stream": session.admission.stream,
                "steps_per_s": tally.steps_per_s(now_ns),
                "backlog": tally.backlog,
                "silent_s": max(0, now_ns - session.connection.heard_ns) / NS_PER_S,
                "policy_version": session.owed.policy_version,
            }
        return figures

    # -- connections ---------------------------------------------------------------------------------------------------

    def came(self, connection: Connection) -> None:
        """A connection was made. Of too many, the stranger that has said nothing for the longest goes."""
        self._connections += 1
        self._strangers[connection] = None
        if self._connections > self._settings.max_connections:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.transport.abort()
            self._complain(f"more than {self._settings.max_connections} connections; one of a stranger was closed")

    def went(self, connection: Connection) -> None:
        """A connection is gone."""
        self._connections -= 1
        self._strangers.pop(connection, None)

    def _greet(self, connection: ServerConnection, request: Request) -> Response | None:
        return greet(connection, request, f"{'ws' if self._tls is None else 'wss'}://HOST:{self._port}")

    async def _serve(self, websocket: ServerConnection) -> None:
        """One connection, from its first message to its end."""
        connection = cast(Connection, websocket)
        address = str((connection.remote_address or ("?",))[0])
        waited_s = (monotonic_ns() - connection.opened_ns) / NS_PER_S
        try:
            async with asyncio.timeout(max(0.0, self._settings.hello_s - waited_s)):
                session = await self._admit(connection, address)
        except ConnectionClosed:
            return
        except SafetyStop as error:
            return self._fail(error)
        except Exception as error:
            refused, text = explain(error)
            self._complain(f"{address} was turned away: {text}")
            return await refuse(connection, refused)
        await self._converse(session)

    async def _converse(self, session: RobotSession) -> None:
        name, connection = session.admission.robot, session.connection
        try:
            self._leave(session, await session.run() or "goodbye")
        except ConnectionClosed as error:
            text = why_closed(error)
            if error.sent is not None and error.sent.code in BROKEN:
                session.tally.rejected += 1
                self._say(f"robot {name}: {text}")
            self._leave(session, text)
        except SafetyStop as error:
            self._leave(session, "the learner must end")
            self._fail(error)
        except Exception as error:
            refused, text = explain(error)
            session.tally.rejected += 1
            self._leave(session, text)
            self._say(f"robot {name}: {text}; its connection is closed")
            await refuse(connection, refused)
        except asyncio.CancelledError:
            self._leave(session, "the learner is ending")
            raise

    # -- letting in ----------------------------------------------------------------------------------------------------

    async def _admit(self, connection: Connection, address: str) -> RobotSession:
        """Find out who it is; registered as a session, and welcomed, when this returns."""
        if wait_s := self._attempts.wait_s(address, monotonic_ns()):
            error = StartError(f"too many wrong tokens from {address}", f"wait {wait_s:.0f} s")
            raise Refusal(error, retry=True)
        challenge = secrets.token_bytes(NONCE_BYTES)
        asks_token = self._token is not None
        greeting = Challenge(
            protocol=PROTOCOL,
            relod=__version__,
            nonce=challenge,
            token=asks_token,
            image_hw=self._image_hw,
            preset=self._preset,
        )
        await connection.send(pack(greeting))
        join = read_join(await connection.recv())
        if self._token is not None:
            self._check_proof(self._token, challenge, join, address)
        check_spec(join.task)
        self._make_room(join)
        admission = self._hall.admit(join)
        session = self._register(connection, admission)
        proof = b""
        if self._token is not None:
            proof = learner_proof(self._token, challenge, join.nonce, join.robot, join.run)
        try:
            await connection.send(pack(msgspec.structs.replace(admission.welcome, proof=proof)))
        except BaseException:
            self._leave(session, "it did not wait for the welcome")
            raise
        for kind, packed in self._told.items():
            session.tell(kind, packed)
        if self._policy is not None:
            session.offer(self._policy)
        return session

    def _check_proof(self, token: bytes, challenge: bytes, join: Join, address: str) -> None:
        hint = "give the learner's token with --token-file or RELOD_TOKEN"
        if not join.proof:
            raise Refusal(StartError("this learner asks for a token", hint))
        if self._attempts.wait_s(address, monotonic_ns()) > 0:  # others of this address failed meanwhile
            raise Refusal(StartError("too many wrong tokens from this address", "wait a minute"), retry=True)
        if not hmac.compare_digest(join.proof, robot_proof(token, challenge, join.nonce, join.robot, join.run)):
            self._attempts.wrong(address, monotonic_ns())
            raise Refusal(StartError("the token is not this learner's", hint))

    def _make_room(self, join: Join) -> None:
        """End the robot's former connection, or refuse the new one where another robot has its name."""
        former = self._sessions.get(join.robot)
        if former is None:
            if len(self._sessions) >= self._settings.max_robots:
                error = StartError(f"this learner has its {self._settings.max_robots} robots", "see server.max_robots")
                raise Refusal(error, retry=True)
            return
        if former.admission.run == join.run:
            self._retire(former, "the robot connected anew")
            return
        # A robot pings four times a second: one that was silent for so long was started again.
        if monotonic_ns() - former.connection.heard_ns < self._settings.silence_s * NS_PER_S / 2:
            raise Refusal(StartError(f"robot name {join.robot!r} is in use", "give this robot another with --name"))
        self._retire(former, "another run of the robot took its place")

    def _register(self, connection: Connection, admission: Admission) -> RobotSession:
        name = admission.robot
        tally = self._tallies.setdefault(name, Tally())
        tally.connections += 1
        if len(self._tallies) > TALLIES_KEPT:
            away = [each for each in self._tallies if each not in self._sessions and each != name]
            for each in away[:1]:
                del self._tallies[each]
        session = RobotSession(connection, admission, self._hall, self._settings, tally)
        self._sessions[name] = session
        self._strangers.pop(connection, None)
        return session

    # -- ends ----------------------------------------------------------------------------------------------------------

    def _retire(self, session: RobotSession, reason: str) -> None:
        session.retire()
        self._leave(session, reason)

    def _leave(self, session: RobotSession, reason: str) -> None:
        """The robot's connection is over; done once."""
        name = session.admission.robot
        if self._sessions.get(name) is not session:
            return
        del self._sessions[name]
        session.release()
        self._changed.set()
        self._hall.left(session.admission, reason)

    def _fail(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)

    def _complain(self, text: str) -> None:
        """A line about strangers; they do not decide how many there are."""
        self._complaints += 1
        now_ns = monotonic_ns()
        if now_ns - self._complained_ns < COMPLAIN_EVERY_NS:
            return
        before = f" ({self._complaints - 1} more before)" if self._complaints > 1 else ""
        self._complaints, self._complained_ns = 0, now_ns
        self._say(text + before)

    # -- in the background ---------------------------------------------------------------------------------------------

    def _start_task(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"server-{name}")
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    async def _sweep(self) -> None:
        """Drop robots that have been silent for too long, and mark counts, a few times in `silence_s`."""
        period_ns = int(self._settings.silence_s * NS_PER_S / 4)
        while True:
            before_ns = monotonic_ns()
            await asyncio.sleep(period_ns / NS_PER_S)
            now_ns = monotonic_ns()
            for tally in self._tallies.values():
                tally.marks.append((now_ns, tally.steps))
            if now_ns - before_ns > 2 * period_ns:  # the loop was busy: what they sent may still be unread
                continue
            for session in list(self._sessions.values()):
                silent_s = (now_ns - session.connection.heard_ns) / NS_PER_S
                if silent_s > self._settings.silence_s:
                    self._retire(session, f"silent for {silent_s:.1f} s")

    async def _pack(self) -> None:
        """Make wire messages of the newest policy, in a thread: half precision takes a while."""
        while True:
            await self._published.wait()
            self._published.clear()
            if self._unpacked is None:
                continue
            (values, version), self._unpacked = self._unpacked, None
            policy = await asyncio.to_thread(pack_policy, values, version, self._precision)
            self._policy = policy
            for session in self._sessions.values():
                session.offer(policy)
            if self._holding:
                self._holding = False
                self.tell(Hold(reason=""), last=True)
