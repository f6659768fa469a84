"""One welcomed connection to the learner, used once: what goes out in which order, and what comes in."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from ...config import LinkSettings
from ...errors import LinkLost, RelodError
from ..clock import NS_PER_S, monotonic_ns
from ..log.format import EncodedFrame
from ..tasks import TaskGroup
from . import wire
from .dialing import NotNow, refusal
from .figures import LinkFigures
from .outbox import Outbox
from .policyparts import PolicyParts

__all__ = ["LinkConnection", "LinkEvents"]

EAGER_FRAMES = 8  # frames waiting to be sent ahead of their observation; older ones are of no use


class LinkEvents(Protocol):
    """What the link tells its session; all are called on the loop and must be quick."""

    def policy(self, values: npt.NDArray[np.float32], version: tuple[int, int]) -> None:
        """A newer policy; the values are the callee's."""
        ...

    def answer(self, head: wire.Answer, values: bytes) -> None:
        """The answer to an observation, perhaps not the newest; `values` are the action, then the extras, float32."""
        ...

    def news(self, news: wire.LearnerNews) -> None:
        """How learning goes."""
        ...

    def link_state(self, up: bool) -> None:
        """The link came up or was lost."""
        ...

    def hold(self, reason: str) -> None:
        """Begin no episode, until the reason is empty."""
        ...

    def finished(self, reason: str) -> None:
        """The learner's run is over."""
        ...

    def failed(self, error: RelodError) -> None:
        """The link is given up."""
        ...

    def say(self, text: str) -> None:
        """A line for people."""
        ...


class LinkConnection:
    """Sends from the outbox and hands on what the learner says, until the connection is lost.

    Args:
        websocket: to a learner that said welcome.
        progress: set at every ack.
    """

    def __init__(
        self,
        websocket: ClientConnection,
        *,
        settings: LinkSettings,
        action_dim: int,
        outbox: Outbox,
        events: LinkEvents,
        parts: PolicyParts,
        figures: LinkFigures,
        progress: asyncio.Event,
    ) -> None:
        self._websocket = websocket
        self._settings = settings
        self._action_dim = action_dim
        self._outbox = outbox
        self._events = events
        self._parts = parts
        self._figures = figures
        self._progress = progress
        self._wake = asyncio.Event()  # something to send
        self._ping_due = False
        self._question: tuple[wire.Observe, bytes] | None = None
        self._eager: deque[int] = deque(maxlen=EAGER_FRAMES)
        self._bye = ""
        self._heard_ns = 0  # when something came in last
        self.held = False  # the learner wants no episode to begin
        self.finished = False  # the learner said that its run is over

    def wake(self) -> None:
        """The outbox has something new."""
        self._wake.set()

    def ask(self, head: wire.Observe, proprio: bytes) -> None:
        """Send an observation, unless a newer one comes first."""
        self._question = head, proprio
        self._figures.asked(head.ask, monotonic_ns())
        self._wake.set()

    def frame(self, frame_id: int) -> None:
        """Send a camera frame of the outbox ahead of the observation that will name it."""
        self._eager.append(frame_id)
        self._wake.set()

    def say_bye(self, reason: str) -> None:
        """Close the connection; with a goodbye, when all records are acked."""
        self._bye = reason
        self._wake.set()

    async def run(self) -> str:
        """Use the connection for as long as it lasts; returns why it was lost.

        Raises:
            RelodError: the learner refused to go on, or sent what it should not.
        """
        lost: BaseExceptionGroup[Exception] | None = None
        failed: BaseExceptionGroup[Exception] | None = None
        self._parts.begin()
        self._heard_ns = monotonic_ns()
        try:
            async with TaskGroup() as group:
                for work in (self._receive(), self._send(), self._pulse()):
                    group.create_task(work)
        except* (ConnectionClosed, NotNow) as caught:
            lost = caught
        except* Exception as caught:
            failed = caught
        finally:
            self._websocket.transport.abort()
        if failed is not None:
            raise failed.exceptions[0]
        return _reason(lost)

    async def _pulse(self) -> None:
        """Ask for a ping every `ping_every_s`; `NotNow` when the learner was silent for `silence_s`."""
        every_ns, silence_ns = int(self._settings.ping_every_s * NS_PER_S), int(self._settings.silence_s * NS_PER_S)
        ping_ns = wake_ns = monotonic_ns()
        while True:
            now_ns = monotonic_ns()
            # Silence counts only while this loop runs: after it was held up, what came meanwhile is still unread.
            self._heard_ns = min(now_ns, self._heard_ns + max(0, now_ns - wake_ns))
            if now_ns - self._heard_ns >= silence_ns:
                raise NotNow(f"silent for {self._settings.silence_s:g} s")
            if now_ns >= ping_ns:
                self._ping_due = True
                self._wake.set()
                ping_ns = now_ns + every_ns
                self._figures.tick(now_ns)
            wake_ns = min(ping_ns, self._heard_ns + silence_ns)
            await asyncio.sleep((wake_ns - now_ns) / NS_PER_S)

    # -- out -----------------------------------------------------------------------------------------------------------

    async def _send(self) -> None:
        """Send what is most urgent, one message at a time: pings, observations, frames for them, the end, records."""
        while True:
            if self._ping_due:
                self._ping_due = False
                await self._put(wire.pack(self._ping()))
            elif self._question is not None:
                await self._put_question(*self._question)
            elif self._eager:
                await self._put_frame(self._eager.popleft())
            elif self._bye:
                if self._outbox.empty:
                    await self._put(wire.pack(wire.Bye(reason=self._bye)))
                await self._websocket.close()
                return
            elif (message := self._outbox.next()) is not None:
                await self._put(message)
                await asyncio.sleep(0)  # a socket that takes everything at once would never let go
            else:
                self._wake.clear()
                await self._wake.wait()

    def _ping(self) -> wire.Ping:
        rtt_ms = self._figures.rtt_ms
        return wire.Ping(sent_ns=monotonic_ns(), backlog=self._outbox.backlog, rtt_ms=rtt_ms)

    async def _put_question(self, head: wire.Observe, proprio: bytes) -> None:
        """Send a question with the frames that the learner lacks, unless one is so old that nobody asks any more."""
        self._question = None
        frames = self._lacking(head.frame_ids)
        if frames is None:
            return
        if frames:
            carried = tuple(
                wire.CarriedFrame(id=i, captured_ns=frame.captured_ns, size=len(frame.data))
                for i, frame in frames.items()
            )
            head = msgspec.structs.replace(head, frames=carried)
            proprio = b"".join((proprio, *(frame.data for frame in frames.values())))
        self._figures.sent(head.ask, monotonic_ns())
        await self._put(wire.pack(head, proprio))

    async def _put_frame(self, frame_id: int) -> None:
        for each, frame in (self._lacking((frame_id,)) or {}).items():
            await self._put(wire.pack(wire.FrameHead(id=each, captured_ns=frame.captured_ns), frame.data))

    def _lacking(self, frame_ids: tuple[int, ...]) -> dict[int, EncodedFrame] | None:
        """Those of these frames that are to be sent now; None when one was lost."""
        try:
            return self._outbox.frames_for(frame_ids)
        except ValueError:
            return None

    async def _put(self, message: bytes) -> None:
        await self._websocket.send(message)
        self._figures.uplink_bytes += len(message)

    # -- in ------------------------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            message = await self._websocket.recv(decode=False)
            self._heard_ns = now_ns = monotonic_ns()
            self._figures.downlink_bytes += len(message)
            try:
                head, payload = wire.unpack_from_learner(message)
                policy = self._accept(head, payload, now_ns)
            except (wire.WireError, ValueError) as error:
                raise LinkLost(
                    f"the learner sent what it should not: {error}", "install the same version of relod on both"
                ) from error
            self._hand_on(head, payload, policy, now_ns)

    def _accept(self, head: wire.FromLearner, payload: memoryview, now_ns: int) -> npt.NDArray[np.float32] | None:
        """Check a message and take what is for the link itself; the policy that it completed. `ValueError`."""
        match head:
            case wire.Ack():
                self._outbox.ack(head.seq)
                self._figures.acked(head.seq, now_ns)
                self._progress.set()
            case wire.Answer():
                if head.actions != self._action_dim or len(payload) % 4 or len(payload) < 4 * head.actions:
                    raise ValueError(f"an answer of {head.actions} action values in {len(payload)} bytes")
                values = np.frombuffer(payload, "<f4")
                if not np.isfinite(values).all():
                    raise ValueError("an answer with values that are not finite")
                if np.abs(values[: head.actions]).max() > 1 + wire.ACTION_SLACK:
                    raise ValueError("an action outside [-1, 1]")
            case wire.PolicyPart():
                return self._parts.add(head, payload)
            case wire.Challenge() | wire.Welcome():
                raise ValueError(f"a {type(head).__name__} after the handshake")
        return None

    def _hand_on(
        self, head: wire.FromLearner, payload: memoryview, policy: npt.NDArray[np.float32] | None, now_ns: int
    ) -> None:
        match head:
            case wire.Answer():
                self._events.answer(head, bytes(payload))
                self._figures.answered(head, now_ns)
            case wire.PolicyPart() if policy is not None:
                self._events.policy(policy, head.version)
            case wire.Pong():
                self._figures.pong(head.sent_ns, head.received_ns, head.replied_ns, now_ns)
            case wire.LearnerNews():
                self._events.news(head)
            case wire.Hold():
                self.held = bool(head.reason)
                self._events.hold(head.reason)
            case wire.Finished():
                self.finished = True
                self._events.finished(head.reason)
            case wire.Refused():
                raise refusal(head)


def _reason(lost: BaseExceptionGroup[Exception] | None) -> str:
    """Why a connection was lost, by the first of its tasks to notice."""
    first = lost.exceptions[0] if lost is not None else None
    if isinstance(first, ConnectionClosed):
        return f"closed: {first.rcvd.reason}" if first.rcvd is not None and first.rcvd.reason else "closed"
    return str(first or "closed")
