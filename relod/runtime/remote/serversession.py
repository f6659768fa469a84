"""One robot's connection at the learner, from its welcome to its end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from ...config import ServerSettings
from ...types import EpisodeEnd, FloatArray, Image, Step, TaskSpec
from ..clock import NS_PER_MS, NS_PER_S, WallClock, monotonic_ns
from ..log.codec import make_codec
from ..log.format import EncodedFrame
from ..tasks import TaskGroup
from .access import Throttle
from .intake import Intake
from .owed import Owed, PackedPolicy
from .reception import Connection
from .wire import (
    Answer,
    Bye,
    FrameHead,
    FromLearner,
    FromRobot,
    Join,
    Observe,
    Ping,
    RecordHead,
    Stamps,
    Welcome,
    WireError,
    pack,
    unpack_from_robot,
)

__all__ = ["Acted", "Admission", "Hall", "RobotSession", "Tally"]

MIB = 1 << 20
MESSAGE_COST_BYTES = 1024  # what a message counts for beside its bytes, so that tiny ones are held to a rate too
TURN = 32  # messages of one robot before the others get their turn
ANSWER_APART_NS = 5 * NS_PER_MS  # questions closer than this came while the learner or the link was held up
RATE_MARKS = 21  # a mark every sweep: 10 s at the default silence_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A robot that the learner let in."""

    stream: int  # of the experience log
    robot: str
    run: str
    acts: str  # who answers its observations: robot or learner
    spec: TaskSpec
    codec: str
    welcome: Welcome  # its proof is empty


class Acted(NamedTuple):
    """An answer to an observation."""

    action: FloatArray  # (A,)
    extras: FloatArray  # (E,)
    version: tuple[int, int]  # of the policy
    asked_ns: int = 0  # when the network was asked; 0 where it is not known
    acted_ns: int = 0  # when its action was there


class Hall(Protocol):
    """The learner behind the server; called on the loop."""

    def admit(self, join: Join) -> Admission:
        """Let a robot in whose proof and sizes are right; `RelodError` to refuse it."""
        ...

    def record(self, admission: Admission, message: Step | EpisodeEnd, frames: Mapping[int, EncodedFrame]) -> None:
        """The robot's next record, with the frames it names; it is in the log when this returns.

        Index 0 while the stream's former episode is open means that its outcome is unknown.

        Raises:
            SafetyStop: the learner cannot go on.
            ValueError: the record or a frame of it is not what it says; this costs the robot its connection.
        """
        ...

    def act(
        self, admission: Admission, images: tuple[Image, ...], head: Observe, proprio: FloatArray
    ) -> Acted | tuple[FloatArray, FloatArray, tuple[int, int]]:
        """The answer to an observation; nothing else is served meanwhile."""
        ...

    def left(self, admission: Admission, reason: str) -> None:
        """The robot's connection is over; it may come back."""
        ...


@dataclass(slots=True)
class Tally:
    """Counts of one robot's name, over all its connections."""

    connections: int = 0
    steps: int = 0
    episodes: int = 0
    duplicates: int = 0
    rejected: int = 0  # messages that cost it its connection
    frames: int = 0
    asked: int = 0
    answered: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    rtt_ms: float = 0.0  # median, as of its last ping
    said_goodbye: bool = False
    backlog: int = 0  # records it had not seen acked, as of its last ping
    marks: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=RATE_MARKS))  # (ns, steps)

    def steps_per_s(self, now_ns: int) -> float:
        """Steps a second since the oldest mark."""
        if not self.marks or now_ns <= self.marks[0][0]:
            return 0.0
        marked_ns, steps = self.marks[0]
        return (self.steps - steps) * NS_PER_S / (now_ns - marked_ns)


class RobotSession:
    """Serves one robot's connection; `run` once."""

    def __init__(
        self, connection: Connection, admission: Admission, hall: Hall, settings: ServerSettings, tally: Tally
    ) -> None:
        self.connection, self.admission, self.tally = connection, admission, tally
        self.retired = False
        self.owed = Owed(WallClock())
        self._hall = hall
        self._intake = Intake(admission.spec, admission.codec, admission.welcome.position)
        self._codec = make_codec(admission.codec, image_hw=admission.spec.image_hw)
        self._throttle = Throttle(settings.max_mib_per_s * MIB)
        self._handlers: dict[type[FromRobot], Callable[[Any, memoryview], None]] = {
            FrameHead: self._take_frame,
            RecordHead: self._take_record,
            Observe: self._take_question,
            Ping: self._take_ping,
        }
        self._wake, self._asked = asyncio.Event(), asyncio.Event()
        self._answered_ns = 0
        self._question: tuple[Observe, tuple[EncodedFrame, ...], FloatArray, int] | None = None
        connection.protocol.max_message_size = self._intake.max_message_bytes

    # -- for the server ------------------------------------------------------------------------------------------------

    async def run(self) -> str:
        """Serve the robot until it says goodbye, or is retired; returns its reason.

        Raises:
            WireError: a message that is not of the protocol, or not of the robot's task.
            ConnectionClosed: the link was cut.
            Exception: whatever the hall raised.
        """
        try:
            async with TaskGroup() as tasks:
                helpers = [tasks.create_task(self._send_owed(), name="send")]
                if self.admission.acts == "learner":
                    helpers.append(tasks.create_task(self._answer(), name="answer"))
                goodbye = await self._receive()
                for helper in helpers:
                    helper.cancel()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        return goodbye

    def offer(self, policy: PackedPolicy) -> None:
        """The newest policy; only for a robot that acts itself."""
        if self.admission.acts == "robot":
            self.owed.offer(policy)
            self._wake.set()

    def tell(self, kind: type[FromLearner], packed: bytes, *, last: bool = False) -> None:
        """Send a message, at once or after the newest policy; one of its kind that still waits is dropped."""
        self.owed.tell(kind, packed, last=last)
        self._wake.set()

    def retire(self) -> None:
        """End the connection at once; nothing of it that is still unread is taken in."""
        self.retired = True
        self.connection.transport.abort()

    def release(self) -> None:
        """Free what the robot's messages took."""
        self._intake.release()

    # -- from the robot ------------------------------------------------------------------------------------------------

    async def _receive(self) -> str:
        turn = 0
        while True:
            data = await self.connection.recv()
            if self.retired:
                return ""
            if not isinstance(data, bytes):
                raise WireError("a text message")
            head, payload = unpack_from_robot(data)
            self.tally.bytes_in += len(data)
            if isinstance(head, Bye):
                self.tally.said_goodbye = True
                return head.reason
            take = self._handlers.get(type(head))
            if take is None:
                raise WireError("a second join")
            take(head, payload)
            if self._asked.is_set() and monotonic_ns() - self._answered_ns > ANSWER_APART_NS:
                await asyncio.sleep(0)  # it is answered before more is read
            wait_s = self._throttle.take(len(data) + MESSAGE_COST_BYTES, now_ns := monotonic_ns())
            turn += 1
            if wait_s > 0 or turn % TURN == 0:
                self.connection.heard_ns = now_ns + int(wait_s * NS_PER_S)  # who is not listened to is not silent
                await asyncio.sleep(wait_s)

    def _take_frame(self, head: FrameHead, payload: memoryview) -> None:
        self._intake.frame(head, payload)
        self.tally.frames += 1

    def _take_record(self, head: RecordHead, payload: memoryview) -> None:
        taken = self._intake.record(head, payload)
        if taken is None:
            self.tally.duplicates += 1
        else:
            message, frames = taken
            self._hall.record(self.admission, message, frames)
            self.tally.steps += isinstance(message, Step)
            self.tally.episodes += isinstance(message, EpisodeEnd)
        self.owed.ack(head.seq)
        self._wake.set()

    def _take_question(self, head: Observe, payload: memoryview) -> None:
        if self.admission.acts != "learner":
            raise WireError("a question of a robot that acts itself")
        self._question = (head, *self._intake.question(head, payload), monotonic_ns())
        self.tally.asked += 1
        self.tally.frames += len(head.frames)
        self._asked.set()

    def _take_ping(self, head: Ping, payload: memoryview) -> None:
        self.owed.pong(head.sent_ns, monotonic_ns())
        self.tally.backlog, self.tally.rtt_ms = head.backlog, head.rtt_ms
        self._wake.set()

    # -- to the robot --------------------------------------------------------------------------------------------------

    async def _send_owed(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while (message := self.owed.next()) is not None:
                await self._send(message)

    async def _send(self, message: bytes) -> None:
        self.tally.bytes_out += len(message)
        await self.connection.send(message)

    async def _answer(self) -> None:
        """Answer the newest question; of those that came while another was answered, all but the last are dropped."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            assert self._question is not None
            head, frames, proprio, arrived_ns = self._question
            try:
                images = tuple(self._codec.decode(frame.data) for frame in frames)
            except ValueError as error:
                raise WireError(f"a frame of question {head.ask}: {error}") from None
            decoded_ns = monotonic_ns()
            acted = Acted(*self._hall.act(self.admission, images, head, proprio))
            answer = Answer(
                ask=head.ask,
                version=acted.version,
                actions=acted.action.size,
                stamps=Stamps(arrived_ns, decoded_ns, acted.asked_ns or decoded_ns, acted.acted_ns or monotonic_ns()),
            )
            values = np.concatenate([acted.action, acted.extras])
            await self._send(pack(answer, values.astype("<f4", copy=False).tobytes()))
            self.tally.answered += 1
            self._answered_ns = monotonic_ns()
