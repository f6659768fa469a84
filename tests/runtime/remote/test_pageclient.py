"""The learner's server driven by a robot that was written from docs/wire-protocol.md alone."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from relod.config import ServerSettings
from relod.runtime.log.format import EncodedFrame
from relod.runtime.remote.server import Admission, LearnerServer
from relod.runtime.remote.wire import Join, Observe, Welcome
from relod.types import EpisodeEnd, FloatArray, Image, Step
from tests.runtime.remote.pageclient import PageRobot, Refused, proof

PAGE = Path(__file__).parents[3] / "docs" / "wire-protocol.md"
RUN = "0123456789abcdef" * 2
VERSION = (1, 7)


class FakeHall:
    """A learner that keeps records in a list."""

    def __init__(self) -> None:
        self.records: list[tuple[Step | EpisodeEnd, dict[int, bytes]]] = []
        self.questions: list[tuple[Observe, tuple[Image, ...], FloatArray]] = []
        self.position: tuple[int, int] | None = None

    def admit(self, join: Join) -> Admission:
        welcome = Welcome(
            learner="f" * 32,
            run_dir="/runs/here",
            algorithm="sac",
            preset="sac",
            agent={"discount": 0.99},
            seed=3,
            position=self.position,
            env_steps=len(self.records),
            policy_size=40_000,
            has_policy=True,
            precision="float16",
            proof=b"",
        )
        return Admission(
            stream=0, robot=join.robot, run=join.run, acts=join.acts, spec=join.task, codec=join.codec, welcome=welcome
        )

    def record(self, admission: Admission, message: Step | EpisodeEnd, frames: Mapping[int, EncodedFrame]) -> None:
        self.records.append((message, {frame_id: bytes(frame.data) for frame_id, frame in frames.items()}))
        self.position = message.episode, message.index if isinstance(message, Step) else message.length

    def act(
        self, admission: Admission, images: tuple[Image, ...], head: Observe, proprio: FloatArray
    ) -> tuple[FloatArray, FloatArray, tuple[int, int]]:
        self.questions.append((head, images, proprio.copy()))
        return np.array([0.5, -0.25], np.float32), np.array([2.0], np.float32), VERSION

    def left(self, admission: Admission, reason: str) -> None: ...


Body = Callable[[FakeHall, LearnerServer, str], Awaitable[None]]


def with_learner(body: Body, *, token: bytes | None = None) -> None:
    async def main() -> None:
        hall = FakeHall()
        server = LearnerServer(hall=hall, settings=ServerSettings(), token=token, tls=None)
        port = await server.start("127.0.0.1", 0)
        try:
            async with asyncio.timeout(20):
                await body(hall, server, f"ws://127.0.0.1:{port}")
        finally:
            await server.close(None)

    asyncio.run(main())


async def episode(robot: PageRobot, number: int, length: int) -> dict[int, bytes]:
    """Send a whole episode; its frames."""
    first = 100 * number + 1
    pixels = {first: await robot.frame(first)}
    for index in range(length):
        newest = first + index + 1
        pixels[newest] = await robot.frame(newest)
        await robot.step(number, index, [newest - 1, newest], terminated=index == length - 1)
    await robot.end(number, length, [first + length, first + length])
    return pixels


def test_a_robot_that_acts_itself_delivers_its_records_and_gets_policies():
    async def body(hall: FakeHall, server: LearnerServer, url: str) -> None:
        robot = PageRobot("page", RUN)
        await robot.connect(url)
        assert (robot.welcome["position"], robot.welcome["precision"]) == (None, "float16")
        pixels = await episode(robot, 0, 3)
        await robot.acked()
        steps, (end, _) = hall.records[:-1], hall.records[-1]
        assert [step.index for step, _ in steps] == [0, 1, 2]
        assert isinstance(end, EpisodeEnd)
        assert (end.length, end.return_, end.terminated, end.reason) == (3, -3.0, True, "goal")
        step, frames = steps[1]
        assert isinstance(step, Step)
        assert (step.proprio.tolist(), step.action.tolist(), step.reward) == ([0.25, 1.0], [0.5, -1.0], -1.0)
        assert frames == {frame_id: pixels[frame_id] for frame_id in step.frame_ids}
        values = np.linspace(-1, 1, 40_000, dtype=np.float32)
        server.publish(values, VERSION)
        version, received = await robot.policy()
        assert tuple(version) == VERSION
        assert received == values.astype(np.float16).tolist()
        await robot.bye()

    with_learner(body)


def test_after_a_reconnection_what_is_in_the_log_is_not_logged_again():
    async def body(hall: FakeHall, server: LearnerServer, url: str) -> None:
        first = PageRobot("page", RUN)
        await first.connect(url)
        await episode(first, 0, 2)
        await first.acked()
        first.websocket.transport.abort()
        second = PageRobot("page", RUN)
        await second.connect(url)
        assert second.welcome["position"] == [0, 2]
        await episode(second, 0, 2)  # all of it again, then what is new
        await episode(second, 1, 1)
        await second.acked()
        assert [(type(m).__name__, m.episode) for m, _ in hall.records] == [
            ("Step", 0),
            ("Step", 0),
            ("EpisodeEnd", 0),
            ("Step", 1),
            ("EpisodeEnd", 1),
        ]
        assert server.figures()["page"]["duplicates"] == 3
        await second.bye()

    with_learner(body)


def test_a_robot_that_asks_gets_actions():
    async def body(hall: FakeHall, server: LearnerServer, url: str) -> None:
        robot = PageRobot("page", RUN, acts="learner")
        await robot.connect(url)
        pixels = [await robot.frame(frame_id) for frame_id in (1, 2)]
        header, action, extras = await robot.observe(1, [1, 2])
        assert (header["ask"], tuple(header["version"]), action, extras) == (1, VERSION, [0.5, -0.25], [2.0])
        _, images, proprio = hall.questions[0]
        assert [image.tobytes() for image in images] == pixels
        assert proprio.tolist() == [1.0, 2.0]
        await robot.bye()

    with_learner(body)


def test_a_ping_is_answered_with_the_learners_clock():
    async def body(hall: FakeHall, server: LearnerServer, url: str) -> None:
        robot = PageRobot("page", RUN)
        await robot.connect(url)
        await robot.send({"type": "ping", "sent_ns": -5})  # a stamp may be negative; the backlog has a default
        pong, _ = await robot.wait_for("pong")
        assert pong["sent_ns"] == -5
        assert pong["received_ns"] <= pong["replied_ns"]
        await robot.bye()

    with_learner(body)


def test_each_proves_to_the_other_that_it_knows_the_token():
    async def body(hall: FakeHall, server: LearnerServer, url: str) -> None:
        robot = PageRobot("page", RUN, token=b"right")
        await robot.connect(url)  # checks the learner's proof
        await robot.bye()
        with pytest.raises(Refused, match="token"):
            await PageRobot("page", RUN, token=b"wrong").connect(url)

    with_learner(body, token=b"right")


def test_the_pages_own_proofs_are_right():
    text = PAGE.read_text("utf-8")
    for name, role in (("robot", b"relod-robot"), ("learner", b"relod-learner")):
        stated = re.search(rf"^{name} +([0-9a-f]{{64}})$", text, re.MULTILINE)
        assert stated is not None
        assert stated[1] == proof(role, b"secret", bytes(16), b"\1" * 16, "create", "0" * 32).hex()


@pytest.mark.parametrize(
    ("header", "payload", "words"),
    [
        ({"type": "frame", "id": 1, "captured_ns": 0}, b"short", "bytes"),
        ({"type": "record", "seq": 1}, b"\xc1", "record"),
        ({"type": "record", "seq": 0}, b"", "record 0"),
        ({"type": "ping"}, b"", "sent_ns"),
        ({"type": "ping", "sent_ns": 1, "more": 1}, b"", "more"),
        ({"type": "welcome"}, b"", "welcome"),
    ],
)
def test_a_bad_message_is_refused_in_words_and_only_its_sender_is_cut(header, payload, words):
    async def body(hall: FakeHall, server: LearnerServer, url: str) -> None:
        good, bad = PageRobot("good", RUN), PageRobot("bad", RUN[::-1])
        await good.connect(url)
        await bad.connect(url)
        await bad.send(header, payload)
        with pytest.raises(Refused, match=words):
            await bad.wait_for("nothing")
        with pytest.raises(ConnectionClosed):
            await bad.websocket.recv()
        await episode(good, 0, 1)
        await good.acked()
        await good.bye()

    with_learner(body)
