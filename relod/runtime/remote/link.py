"""The robot's end of the link: one websocket to the learner, kept up for as long as the run lasts.

Records go out losslessly, from the outbox; observations, answers and policies are newest-wins. The link begins again
by itself: the first attempt at once, the next after pauses with jitter, for up to `wait_s`.

    CONNECTING → UP ⇄ DOWN → closed, or given up (`LinkEvents.failed`)
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection

from ...config import LinkSettings
from ...errors import LinkLost, RelodError, StartError
from ..clock import NS_PER_S, monotonic_ns
from ..spans import SpanWriter
from . import wire
from .connection import LinkConnection, LinkEvents
from .dialing import Dialer, JoinFacts, NoLearner, NotNow
from .figures import LinkFigures
from .outbox import Outbox
from .policyparts import PolicyParts

__all__ = ["JoinFacts", "LinkEvents", "LinkState", "RobotLink", "greet_learner"]

# A second attempt to connect beats waiting for TCP to try again, which it does after 1 s, then 2 s. A link whose round
# trip takes longer is of no use to a robot.
CONNECT_S = 0.4
# A learner that gets its first robot builds its replay before it says welcome.
FIRST_HELLO_S = 20.0
CLOSE_S = 1.0  # for saying goodbye
OWN_STATE = ("algorithm", "preset", "agent", "policy_size", "precision")  # what a learner must not change on the way


async def greet_learner(
    url: str, *, ca: Path | None, settings: LinkSettings, say: Callable[[str], object]
) -> wire.Challenge:
    """What the learner at `url` says of itself to everybody, waiting up to `wait_s` for one.

    Raises:
        SettingsError: `url` is no address of a learner.
        StartError: there is no learner in time, or what is there is none.
    """
    dialer = Dialer(url, token=None, ca=ca, join=None)
    begun_ns, said = monotonic_ns(), False
    while True:
        try:
            return await dialer.greet(connect_s=CONNECT_S, hello_s=FIRST_HELLO_S)
        except NotNow as problem:
            if not said:
                say(f"waiting for the learner at {url}: {problem}")
                said = True
            if _seconds_since(begun_ns) >= settings.wait_s:
                raise no_learner(url, settings, problem, StartError) from problem
        await asyncio.sleep(settings.retry_s)


def no_learner(url: str, settings: LinkSettings, problem: NotNow | NoLearner, kind: type[RelodError]) -> RelodError:
    """What to say when a learner stayed away."""
    return kind(
        f"no learner at {url} for {settings.wait_s:g} s ({problem})",
        "start it with `relod learner --listen`, or check the address and the network",
    )


class LinkState(Enum):
    """State of the link."""

    CONNECTING = "connecting"  # not welcomed yet
    UP = "up"
    DOWN = "down"  # lost; attempts to connect go on, until it is closed or given up


class RobotLink:
    """The link of one robot's run. All methods are for the loop's thread.

    Raises:
        SettingsError: `url` is no address of a learner.
        StartError: the certificates of `ca` cannot be had.
    """

    def __init__(
        self,
        url: str,
        *,
        token: bytes | None,
        ca: Path | None,
        join: JoinFacts,
        settings: LinkSettings,
        outbox: Outbox,
        events: LinkEvents,
        spans: SpanWriter | None = None,
    ) -> None:
        self._dialer = Dialer(url, token=token, ca=ca, join=join)
        self._url = url
        self._action_dim = join.task.action_dim
        self._settings = settings
        self._outbox = outbox
        self._events = events
        self._figures = LinkFigures(spans)
        self._task: asyncio.Task[None] | None = None
        self._state = LinkState.CONNECTING
        self._changed_ns = monotonic_ns()  # when the state did
        self._lasted_s = 0.0  # the last connection
        self._welcome: wire.Welcome | None = None
        self._parts = PolicyParts(0, "float32")
        self._connection: LinkConnection | None = None  # while the link is up
        self._held = False  # the learner wants no episode to begin
        self._finished = False  # the learner said that its run is over
        self._closing = False  # what is left is delivered, and no more
        self._leaving = False  # the learner is told goodbye
        self._said: set[str] = set()  # about the present attempts to connect
        self._progress = asyncio.Event()  # records were delivered, or the link ended

    # -- for the session -----------------------------------------------------------------------------------------------

    async def open(self) -> wire.Welcome:
        """Connect, waiting up to `wait_s` for a learner, and keep the link from then on.

        Raises:
            StartError: there is no learner in time, or what is there is none to trust.
            RelodError: the learner refused this robot; the error is the learner's.
        """
        websocket, welcome = await self._connect("waiting for the learner at", StartError)
        self._welcome = welcome
        self._parts = PolicyParts(welcome.policy_size, welcome.precision)
        self._task = asyncio.create_task(self._keep(websocket, welcome), name="link")
        self._task.add_done_callback(lambda _: self._progress.set())
        return welcome

    def wake(self) -> None:
        """The outbox has something new."""
        self._figures.recorded(self._outbox.added, monotonic_ns())
        if self._connection is not None:
            self._connection.wake()

    def ask(self, head: wire.Observe, proprio: bytes) -> None:
        """Send an observation, unless a newer one comes first. Nothing while the link is down: it would be late."""
        if self._connection is not None:
            self._connection.ask(head, proprio)

    def frame(self, frame_id: int) -> None:
        """Send a camera frame of the outbox now, ahead of the observation that will name it."""
        if self._connection is not None:
            self._connection.frame(frame_id)

    async def close(self, *, drain: bool) -> bool:
        """End the link: with `drain`, after its records are delivered or `drain_s` is over. True when all were."""
        self._closing = True
        if self._task is None:
            return self._outbox.empty
        if drain:
            try:
                async with asyncio.timeout(self._settings.drain_s):
                    while not (self._outbox.empty or self._task.done()):
                        self._progress.clear()
                        await self._progress.wait()
            except TimeoutError:
                pass
        if self._connection is not None:
            self._leaving = True
            self._connection.say_bye("the robot's run is over")
            await asyncio.wait({self._task}, timeout=CLOSE_S)
        self._task.cancel()
        await asyncio.wait({self._task})
        return self._outbox.empty

    def figures(self) -> dict[str, Any]:
        """State, round trips, bytes and clocks of the link, for people and for --json."""
        down_s = round(_seconds_since(self._changed_ns), 3) if self._state is LinkState.DOWN else 0.0
        return {"state": self._state.value, "down_s": down_s, **self._figures.to_dict()}

    # -- staying connected ---------------------------------------------------------------------------------------------

    async def _keep(self, websocket: ClientConnection, welcome: wire.Welcome) -> None:
        try:
            while True:
                problem = await self._use(websocket, welcome)
                if self._leaving:
                    return
                websocket, welcome = await self._reconnect(problem)
        except _Gone:
            return
        except RelodError as error:
            self._give_up(error)
        except Exception as error:
            self._give_up(RelodError(f"the link broke: {type(error).__name__}: {error}"))
            raise

    async def _use(self, websocket: ClientConnection, welcome: wire.Welcome) -> str:
        """Send and receive over a new connection until it is lost; returns why."""
        try:
            self._check_same(welcome)
            self._outbox.connected(welcome.position)
        except LinkLost:
            websocket.transport.abort()
            raise
        self._progress.set()
        self._said.clear()
        connection = LinkConnection(
            websocket,
            settings=self._settings,
            action_dim=self._action_dim,
            outbox=self._outbox,
            events=self._events,
            parts=self._parts,
            figures=self._figures,
            progress=self._progress,
        )
        self._came_up(connection)
        try:
            return await connection.run()
        finally:
            self._went_down(connection)

    def _came_up(self, connection: LinkConnection) -> None:
        if self._state is LinkState.DOWN:
            self._events.say(f"the link to the learner is back after {_seconds_since(self._changed_ns):.1f} s")
        self._state, self._changed_ns, self._connection = LinkState.UP, monotonic_ns(), connection
        self._events.link_state(True)
        if self._held:  # it may have been lifted meanwhile; a learner that still holds says so again
            self._held = False
            self._events.hold("")

    def _went_down(self, connection: LinkConnection) -> None:
        self._lasted_s = _seconds_since(self._changed_ns)
        self._state, self._changed_ns, self._connection = LinkState.DOWN, monotonic_ns(), None
        self._held = connection.held
        self._finished |= connection.finished
        self._figures.cut()
        self._events.link_state(False)

    async def _reconnect(self, problem: str) -> tuple[ClientConnection, wire.Welcome]:
        self._figures.reconnects += 1
        if not (self._finished or self._closing):
            self._events.say(f"the link to the learner is down ({problem}); reconnecting")
        if self._lasted_s < self._settings.retry_s:  # no storm of attempts
            await asyncio.sleep(self._pause_s())
        return await self._connect("no learner at", LinkLost)

    def _check_same(self, welcome: wire.Welcome) -> None:
        before = self._welcome or welcome
        if welcome.learner != before.learner:
            raise LinkLost(
                f"another learner answers at {self._url}: its run is in {welcome.run_dir}, not in {before.run_dir}",
                "resume the former one with `relod learner --resume`, or begin another run of the robot",
            )
        changed = [name for name in OWN_STATE if getattr(welcome, name) != getattr(before, name)]
        if changed:
            raise LinkLost(
                f"the learner came back with another {changed[0]}",
                "resume it with the settings it had, or begin another run of the robot",
            )

    async def _connect(self, waiting: str, kind: type[RelodError]) -> tuple[ClientConnection, wire.Welcome]:
        """A welcomed connection; an error of `kind` when there is none within `wait_s`."""
        begun_ns = monotonic_ns()
        hello_s = self._settings.silence_s if self._welcome is not None else FIRST_HELLO_S
        while True:
            tried_ns = monotonic_ns()
            try:
                return await self._dialer.dial(connect_s=CONNECT_S, hello_s=hello_s)
            except (NotNow, NoLearner) as problem:
                if isinstance(problem, NoLearner) and self._welcome is None:
                    raise
                if self._finished and isinstance(problem, NotNow) and problem.refused:
                    raise _Gone from None
                self._say_once(f"{waiting} {self._url}: {problem}")
                if _seconds_since(begun_ns) >= self._settings.wait_s:
                    raise no_learner(self._url, self._settings, problem, kind) from problem
            if _seconds_since(tried_ns) >= hello_s:  # connected, and no welcome: it is busy
                hello_s = min(2 * hello_s, FIRST_HELLO_S)
            await asyncio.sleep(max(0.0, self._pause_s() - _seconds_since(tried_ns)))

    def _pause_s(self) -> float:
        """Robots that lost their learner together do not come back together."""
        return self._settings.retry_s * random.uniform(0.5, 1.0)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._events.say(text)

    def _give_up(self, error: RelodError) -> None:
        if self._closing:
            self._events.say(str(error))
        else:
            self._events.failed(error)


class _Gone(Exception):
    """The learner said that it is finished, and is no longer there."""


def _seconds_since(then_ns: int) -> float:
    return (monotonic_ns() - then_ns) / NS_PER_S
