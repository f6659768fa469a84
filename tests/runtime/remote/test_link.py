"""The robot's end of the link, against a learner made here, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from relod.config import LinkSettings
from relod.errors import LinkLost, RelodError, SettingsError, StartError
from relod.runtime.clock import monotonic_ns
from relod.runtime.log.format import EncodedFrame
from relod.runtime.remote import wire
from relod.runtime.remote.access import learner_proof, robot_proof, server_tls
from relod.runtime.remote.link import JoinFacts, RobotLink
from relod.runtime.remote.outbox import Outbox
from relod.types import Step, TaskSpec
from tests.runtime.remote.certificates import LOCAL_CERT, LOCAL_KEY, OTHER_CERT, OTHER_KEY

SPEC = TaskSpec(
    name="small",
    robot="none",
    cycle_ns=45_000_000,
    frames=2,
    camera_hw=(20, 24),
    camera_fps=20.0,
    image_hw=(20, 24),
    proprio_names=("p",),
    action_names=("a", "b"),
    max_steps=100,
    sensor_window=1,
)
JOIN = JoinFacts(robot="arm", run="0" * 32, acts="robot", task=SPEC, codec="raw", algorithm="sac", presets={})
SETTINGS = LinkSettings(wait_s=5.0, ping_every_s=0.03, silence_s=0.15, retry_s=0.05, drain_s=2.0)
TOKEN = b"a secret"
NONCE = bytes(range(16))
FRAME = bytes(20 * 24 * 3)


def run(work: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await work

    uvloop.run(limited())


class Events:
    """What the link told, in order."""

    def __init__(self) -> None:
        self.states: list[bool] = []
        self.policies: list[tuple[Any, tuple[int, int]]] = []
        self.answers: list[tuple[wire.Answer, bytes]] = []
        self.heard: list[wire.LearnerNews] = []
        self.holds: list[str] = []
        self.ends: list[str] = []
        self.errors: list[RelodError] = []
        self.lines: list[str] = []

    def policy(self, values: Any, version: tuple[int, int]) -> None:
        self.policies.append((values, version))

    def answer(self, head: wire.Answer, values: bytes) -> None:
        self.answers.append((head, values))

    def news(self, news: wire.LearnerNews) -> None:
        self.heard.append(news)

    def link_state(self, up: bool) -> None:
        self.states.append(up)

    def hold(self, reason: str) -> None:
        self.holds.append(reason)

    def finished(self, reason: str) -> None:
        self.ends.append(reason)

    def failed(self, error: RelodError) -> None:
        self.errors.append(error)

    def say(self, text: str) -> None:
        self.lines.append(text)


class Learner:
    """Welcomes a robot, logs its records and acks them; tests change what they need."""

    def __init__(self) -> None:
        self.token: bytes | None = None
        self.first: wire.FromLearner | None = None  # instead of a challenge
        self.reply: wire.FromLearner | None = None  # instead of a welcome
        self.welcome: dict[str, Any] = {}  # fields that differ from the usual
        self.acks = True
        self.mute = False  # takes everything and says nothing
        self.joins: list[wire.Join] = []
        self.connections: list[list[wire.FromRobot]] = []  # what came after each handshake
        self.log: list[bytes] = []
        self.payloads: list[bytes] = []  # of questions
        self.sockets: list[ServerConnection] = []
        self.arrived = asyncio.Event()
        self.server: Server | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    @property
    def heads(self) -> list[wire.FromRobot]:
        return [head for heads in self.connections for head in heads]

    def heads_of(self, kind: type[Any]) -> list[Any]:
        return [head for head in self.heads if isinstance(head, kind)]

    async def start(self, **options: Any) -> None:
        protocols = [Subprotocol(wire.SUBPROTOCOL)]
        options = {"subprotocols": protocols, "compression": None, "ping_interval": None} | options
        self.server = await serve(self.handle, "127.0.0.1", self.port, **options)
        self.port = next(iter(self.server.sockets)).getsockname()[1]

    async def stop(self) -> None:
        if self.server is not None:
            for connection in self.sockets:
                connection.transport.abort()
            self.server.close()
            await self.server.wait_closed()
            self.server = None

    async def handle(self, connection: ServerConnection) -> None:
        self.sockets.append(connection)
        with contextlib.suppress(ConnectionClosed):
            first = self.first or wire.Challenge(
                protocol=wire.PROTOCOL, relod="0", nonce=NONCE, token=self.token is not None
            )
            await connection.send(wire.pack(first))
            join, _ = wire.unpack_from_robot(await connection.recv(decode=False))
            assert isinstance(join, wire.Join)
            self.joins.append(join)
            await connection.send(wire.pack(self.reply or self.make_welcome(join)))
            if self.reply is None:
                self.connections.append([])
                await self.serve(connection, self.connections[-1])

    def make_welcome(self, join: wire.Join) -> wire.Welcome:
        proof = b"" if self.token is None else learner_proof(self.token, NONCE, join.nonce, join.robot, join.run)
        usual = {
            "learner": "1" * 32,
            "run_dir": "runs/learner",
            "algorithm": "sac",
            "preset": "paper",
            "agent": {"batch_size": 8},
            "seed": 0,
            "position": (0, len(self.log) - 1) if self.log else None,
            "env_steps": 0,
            "policy_size": 100_000,
            "has_policy": False,
            "precision": "float16",
            "proof": proof,
        }
        return wire.Welcome(**(usual | self.welcome))

    async def serve(self, connection: ServerConnection, heads: list[wire.FromRobot]) -> None:
        while True:
            head, payload = wire.unpack_from_robot(await connection.recv(decode=False))
            received_ns = monotonic_ns()
            heads.append(head)
            self.arrived.set()
            if isinstance(head, wire.RecordHead):
                self.log.append(bytes(payload))
                if self.acks:
                    await self.tell(wire.Ack(seq=head.seq))
            elif isinstance(head, wire.Observe):
                self.payloads.append(bytes(payload))
            elif isinstance(head, wire.Ping) and not self.mute:
                stamps = {"received_ns": received_ns, "replied_ns": monotonic_ns()}
                await self.tell(wire.Pong(sent_ns=head.sent_ns, **stamps))

    async def tell(self, head: wire.FromLearner, payload: bytes = b"") -> None:
        await self.sockets[-1].send(wire.pack(head, payload))

    async def until(self, condition: Callable[[], bool]) -> None:
        await wait_until(condition, self.arrived)


async def wait_until(condition: Callable[[], bool], news: asyncio.Event | None = None) -> None:
    while not condition():
        if news is None:
            await asyncio.sleep(0.002)
        else:
            news.clear()
            await news.wait()


class Robot:
    """A link with its outbox and what it told."""

    def __init__(self, folder: Path, url: str, **options: Any) -> None:
        self.events = Events()
        self.outbox = Outbox(folder / "outbox", memory_bytes=1 << 20, spool_bytes=1 << 20)
        usual: dict[str, Any] = {"token": None, "ca": None, "join": JOIN, "settings": SETTINGS}
        self.link = RobotLink(url, outbox=self.outbox, events=self.events, **(usual | options))
        self.steps = 0

    def step(self) -> None:
        """One more step, whose two frames are the newest."""
        index, self.steps = self.steps, self.steps + 1
        for frame_id in (index + 1, index + 2):
            self.outbox.add_frame(frame_id, EncodedFrame(data=FRAME, captured_ns=frame_id))
        values = np.zeros(2, np.float32)
        step = Step(
            episode=0,
            index=index,
            frame_ids=(index + 1, index + 2),
            proprio=values[:1],
            action=values,
            reward=-1.0,
            terminated=False,
            truncated=False,
            extras=values[:0],
            policy_version=(0, 0),
            observed_ns=index,
            acted_ns=index,
        )
        assert self.outbox.add(step)
        self.link.wake()


@contextlib.asynccontextmanager
async def connected(folder: Path, learner: Learner, **options: Any) -> AsyncIterator[Robot]:
    if learner.server is None:
        await learner.start()
    robot = Robot(folder, learner.url, **options)
    try:
        await robot.link.open()
        await learner.until(lambda: bool(learner.heads))
        yield robot
    finally:
        await robot.link.close(drain=False)
        robot.outbox.close()
        await learner.stop()


def with_learner(folder: Path, body: Callable[[Learner, Robot], Awaitable[None]], **options: Any) -> None:
    """Run `body` with a robot that is connected."""

    async def work() -> None:
        learner = Learner()
        async with connected(folder, learner, **options) as robot:
            await body(learner, robot)

    run(work())


def open_error(folder: Path, learner: Learner | None = None, **options: Any) -> RelodError:
    """The error that `open` raises."""

    async def work() -> None:
        nonlocal raised
        if learner is not None:
            await learner.start(**options.pop("server", {}))
        robot = Robot(folder, options.pop("url", learner.url if learner is not None else ""), **options)
        try:
            await robot.link.open()
        except RelodError as error:
            raised = error
        finally:
            await robot.link.close(drain=False)
            if learner is not None:
                await learner.stop()

    raised: RelodError | None = None
    run(work())
    assert raised is not None
    assert "\n" not in str(raised)
    return raised


# -- records -----------------------------------------------------------------------------------------------------------


def test_records_are_delivered_each_frame_once_and_the_end_is_said(tmp_path: Path) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        for _ in range(20):
            robot.step()
        assert await robot.link.close(drain=True)
        assert [head.seq for head in learner.heads_of(wire.RecordHead)] == list(range(1, 21))
        assert [head.id for head in learner.heads_of(wire.FrameHead)] == list(range(1, 22))
        assert isinstance(learner.heads[-1], wire.Bye)
        assert robot.events.states == [True, False]
        assert not robot.events.errors

    with_learner(tmp_path, body)


def test_a_cut_loses_and_doubles_nothing(tmp_path: Path) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        learner.acks = False
        for cut in range(5):
            for _ in range(7):
                robot.step()
            await learner.until(lambda cut=cut: len(learner.log) >= 7 * cut + 3)
            learner.sockets[-1].transport.abort()
            await learner.until(lambda cut=cut: len(learner.connections) == cut + 2)
        learner.acks = True
        robot.step()
        assert await robot.link.close(drain=True)
        assert len(learner.log) == len(set(learner.log)) == 36
        assert robot.link.figures()["reconnects"] == 5
        assert robot.events.states == [True, False] * 6
        assert not robot.events.errors

    with_learner(tmp_path, body)


def test_a_silent_link_is_given_up_and_begun_again(tmp_path: Path) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        learner.mute = True
        muted_ns = monotonic_ns()
        await wait_until(lambda: False in robot.events.states)
        noticed_s = (monotonic_ns() - muted_ns) / 1e9
        learner.mute = False
        assert 0.1 < noticed_s < 0.3
        assert "silent for 0.15 s" in robot.events.lines[0]
        await wait_until(lambda: robot.events.states == [True, False, True])
        assert robot.link.figures()["state"] == "up"

    with_learner(tmp_path, body)


def test_a_loop_that_was_held_up_does_not_take_its_learner_for_silent(tmp_path: Path) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        for _ in range(3):
            held_ns = monotonic_ns() + 200_000_000
            while monotonic_ns() < held_ns:  # longer than `silence_s`
                pass
            seen = len(learner.heads)
            await learner.until(lambda seen=seen: len(learner.heads) > seen + 1)
        assert robot.events.states == [True]

    with_learner(tmp_path, body)


def test_what_is_not_acked_is_not_said_to_be_delivered(tmp_path: Path) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        learner.acks = False
        robot.step()
        assert not await robot.link.close(drain=True)
        assert not learner.heads_of(wire.Bye)

    with_learner(tmp_path, body, settings=LinkSettings(drain_s=0.1))


def test_draining_outlasts_a_cut(tmp_path: Path) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        learner.acks = False
        robot.step()
        await learner.until(lambda: len(learner.log) == 1)
        learner.sockets[-1].transport.abort()
        assert await robot.link.close(drain=True)  # the welcome says that it is there
        assert len(learner.log) == 1

    with_learner(tmp_path, body)


def test_a_learner_that_lost_what_it_acked_ends_the_link(tmp_path: Path) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        robot.step()
        await wait_until(lambda: robot.outbox.empty)
        learner.log.clear()
        learner.sockets[-1].transport.abort()
        await wait_until(lambda: bool(robot.events.errors))
        assert isinstance(robot.events.errors[0], LinkLost)

    with_learner(tmp_path, body)


# -- observations ------------------------------------------------------------------------------------------------------


def observe(ask: int, *frame_ids: int) -> wire.Observe:
    return wire.Observe(ask=ask, episode=0, index=ask, frame_ids=frame_ids, now_ns=0)


def test_an_observation_follows_its_frames_and_is_answered(tmp_path: Path) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        robot.step()
        await learner.until(lambda: len(learner.log) == 1)
        robot.outbox.add_frame(3, EncodedFrame(data=FRAME, captured_ns=3))
        robot.link.frame(3)  # ahead of its question
        await learner.until(lambda: len(learner.heads_of(wire.FrameHead)) == 3)
        robot.link.ask(observe(1, 2, 3), b"\0" * 4)
        await learner.until(lambda: bool(learner.heads_of(wire.Observe)))
        assert len(learner.heads_of(wire.FrameHead)) == 3
        values = np.array([0.5, -0.5, 1.5], "<f4").tobytes()
        await learner.tell(wire.Answer(ask=1, version=(1, 2), actions=2), values)
        await wait_until(lambda: bool(robot.events.answers))
        assert robot.events.answers == [(wire.Answer(ask=1, version=(1, 2), actions=2), values)]
        assert 0 < robot.link.figures()["answer_ms"]["max"] < 1000

    with_learner(tmp_path, body)


def test_an_observation_carries_the_frames_that_were_not_sent(tmp_path: Path) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        robot.step()
        await learner.until(lambda: len(learner.log) == 1)  # which names frames 1 and 2
        robot.outbox.add_frame(3, EncodedFrame(data=FRAME, captured_ns=33))
        robot.link.ask(observe(1, 2, 3), b"\0" * 4)
        await learner.until(lambda: bool(learner.heads_of(wire.Observe)))
        (question,) = learner.heads_of(wire.Observe)
        assert question.frames == (wire.CarriedFrame(id=3, captured_ns=33, size=len(FRAME)),)
        assert learner.payloads[-1] == b"\0" * 4 + FRAME
        robot.link.ask(observe(2, 2, 3), b"\0" * 4)
        await learner.until(lambda: len(learner.heads_of(wire.Observe)) == 2)
        assert learner.heads_of(wire.Observe)[1].frames == ()

    with_learner(tmp_path, body)


def test_only_the_newest_observation_is_sent(tmp_path: Path) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        robot.step()
        for ask in range(1, 6):
            robot.link.ask(observe(ask, 1, 2), b"\0" * 4)
        robot.link.ask(observe(6, 1, 99), b"\0" * 4)  # its frame was lost: nobody can answer it
        await learner.until(lambda: len(learner.log) == 1)
        assert not learner.heads_of(wire.Observe)
        for ask in range(7, 10):
            robot.link.ask(observe(ask, 1, 2), b"\0" * 4)
        await learner.until(lambda: bool(learner.heads_of(wire.Observe)))
        assert [head.ask for head in learner.heads_of(wire.Observe)] == [9]

    with_learner(tmp_path, body)


def test_late_answers_are_counted(tmp_path: Path) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        robot.step()
        for ask in (1, 2):
            robot.link.ask(observe(ask, 1, 2), b"\0" * 4)
            await learner.until(lambda ask=ask: len(learner.heads_of(wire.Observe)) == ask)
        for ask in (1, 2):
            await learner.tell(wire.Answer(ask=ask, version=(0, 0), actions=2), b"\0" * 8)
        await wait_until(lambda: len(robot.events.answers) == 2)
        assert robot.link.figures()["late_answers"] == 1

    with_learner(tmp_path, body)


def test_nothing_is_asked_while_the_link_is_down(tmp_path: Path) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        robot.step()
        await learner.until(lambda: len(learner.log) == 1)
        await learner.stop()
        await wait_until(lambda: robot.events.states[-1] is False)
        robot.link.ask(observe(1, 1, 2), b"\0" * 4)
        robot.link.frame(1)
        await learner.start()
        await learner.until(lambda: len(learner.connections) == 2 and len(learner.connections[-1]) > 1)
        assert not any(isinstance(head, wire.Observe | wire.FrameHead) for head in learner.connections[-1])

    with_learner(tmp_path, body)


# -- what the learner sends --------------------------------------------------------------------------------------------


async def send_policy(learner: Learner, values: Any, version: tuple[int, int]) -> None:
    data = values.astype("<f2").tobytes()
    for offset in range(0, len(data), wire.POLICY_PART_BYTES):
        head = wire.PolicyPart(version=version, precision="float16", size=len(values), offset=offset)
        await learner.tell(head, data[offset : offset + wire.POLICY_PART_BYTES])


def test_policies_are_put_together_and_older_ones_passed_over(tmp_path: Path) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        values = np.random.default_rng(0).normal(size=100_000)
        for version in ((1, 5), (1, 4), (1, 5), (2, 0)):
            await send_policy(learner, values * version[1], version)
        await wait_until(lambda: len(robot.events.policies) == 2)
        (first, one), (second, two) = robot.events.policies
        assert (one, two) == ((1, 5), (2, 0))
        assert first.dtype == np.float32
        np.testing.assert_array_equal(first, (values * 5).astype(np.float16))
        np.testing.assert_array_equal(second, 0)

    with_learner(tmp_path, body)


def test_a_policy_cut_off_by_the_end_of_a_connection_is_begun_again(tmp_path: Path) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        head = wire.PolicyPart(version=(1, 1), precision="float16", size=100_000, offset=0)
        await learner.tell(head, bytes(wire.POLICY_PART_BYTES))
        learner.sockets[-1].transport.abort()
        await learner.until(lambda: len(learner.connections) == 2)
        await send_policy(learner, np.ones(100_000), (1, 1))
        await wait_until(lambda: bool(robot.events.policies))
        assert robot.events.policies[0][0].min() == 1

    with_learner(tmp_path, body)


def test_news_and_holds_are_passed_on(tmp_path: Path) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        news = wire.LearnerNews(updates=1, updates_per_s=2.0, replay_steps=3, env_steps=4, metrics={"loss": 0.5})
        await learner.tell(news)
        await learner.tell(wire.Hold(reason="an update"))
        await wait_until(lambda: robot.events.holds == ["an update"])
        assert robot.events.heard == [news]
        learner.sockets[-1].transport.abort()  # whoever holds says so again after a cut
        await wait_until(lambda: robot.events.holds == ["an update", ""])

    with_learner(tmp_path, body)


def test_a_finished_learner_is_not_waited_for(tmp_path: Path) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        learner.acks = False
        robot.step()
        await learner.until(lambda: len(learner.log) == 1)
        await learner.tell(wire.Finished(reason="200 steps"))
        await wait_until(lambda: robot.events.ends == ["200 steps"])
        await learner.stop()
        begun_ns = monotonic_ns()
        assert not await robot.link.close(drain=True)
        assert monotonic_ns() - begun_ns < 1e9
        assert not robot.events.errors

    with_learner(tmp_path, body)


@pytest.mark.parametrize(
    ("head", "payload"),
    [
        (wire.Ack(seq=7), b""),  # never sent
        (wire.Answer(ask=1, version=(0, 0), actions=3), bytes(12)),  # another task's
        (wire.Answer(ask=1, version=(0, 0), actions=2), bytes(4)),
        (wire.Answer(ask=1, version=(0, 0), actions=2), np.array([np.nan, 0], "<f4").tobytes()),
        (wire.PolicyPart(version=(1, 1), precision="float16", size=2**50, offset=0), bytes(8)),
        (wire.PolicyPart(version=(1, 1), precision="float32", size=100_000, offset=0), bytes(8)),
        (wire.PolicyPart(version=(1, 1), precision="float16", size=100_000, offset=8), bytes(8)),
        (wire.PolicyPart(version=(1, 1), precision="float16", size=100_000, offset=0), bytes(7)),
        (wire.PolicyPart(version=(1, 1), precision="float16", size=100_000, offset=0), b""),
        (wire.PolicyPart(version=(1, 1), precision="float16", size=100_000, offset=0), b"\xff\x7f" * 8),  # NaN
        (wire.Challenge(protocol=1, relod="0", nonce=NONCE, token=False), b""),
    ],
)
def test_a_learner_that_says_what_it_should_not_ends_the_link(
    tmp_path: Path, head: wire.FromLearner, payload: bytes
) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        await learner.tell(head, payload)
        await wait_until(lambda: bool(robot.events.errors))
        assert isinstance(robot.events.errors[0], LinkLost)
        assert "the learner sent what it should not" in str(robot.events.errors[0])
        assert robot.events.states == [True, False]

    with_learner(tmp_path, body)


def test_a_refusal_in_mid_run_ends_the_link_with_the_learners_words(tmp_path: Path) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        await learner.tell(wire.Refused(exit_code=4, message="the disk is full", hint="make room"))
        await wait_until(lambda: bool(robot.events.errors))
        (error,) = robot.events.errors
        assert (error.exit_code, str(error)) == (4, "the learner says: the disk is full; make room")

    with_learner(tmp_path, body)


def test_a_broken_callback_ends_the_link(tmp_path: Path) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        def broken(news: wire.LearnerNews) -> None:
            raise KeyError("oops")

        robot.events.news = broken  # type: ignore[method-assign]
        await learner.tell(wire.LearnerNews(updates=1, updates_per_s=0.0, replay_steps=0, env_steps=0, metrics={}))
        await wait_until(lambda: bool(robot.events.errors))
        assert (robot.events.errors[0].exit_code, str(robot.events.errors[0])) == (
            1,
            "the link broke: KeyError: 'oops'",
        )

    with_learner(tmp_path, body)


def test_figures(tmp_path: Path) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        robot.step()
        await learner.until(lambda: len(learner.heads_of(wire.Ping)) >= 4)
        figures = robot.link.figures()
        assert figures["state"] == "up"
        assert figures["down_s"] == 0
        assert 0 < figures["rtt_ms"]["p50"] < 100
        assert abs(figures["clock_offset_ms"]) <= figures["clock_uncertainty_ms"] + 0.01  # one clock
        assert figures["up_ms"] + figures["down_ms"] == pytest.approx(figures["rtt_ms"]["p50"], abs=20)
        assert figures["uplink_bytes"] > 2 * len(FRAME)
        assert figures["uplink_bytes_per_s"] > 0
        assert figures["downlink_bytes_per_s"] > 0

    with_learner(tmp_path, body)


# -- another learner ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("welcome", "text"),
    [
        ({"learner": "2" * 32, "run_dir": "runs/other"}, "another learner answers"),
        ({"agent": {"batch_size": 16}}, "another agent"),
        ({"precision": "float32"}, "another precision"),
        ({"policy_size": 7}, "another policy_size"),
    ],
)
def test_a_learner_that_is_no_longer_the_same_ends_the_link(tmp_path: Path, welcome: dict[str, Any], text: str) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        learner.welcome = welcome
        learner.sockets[-1].transport.abort()
        await wait_until(lambda: bool(robot.events.errors))
        assert isinstance(robot.events.errors[0], LinkLost)
        assert text in str(robot.events.errors[0])
        assert robot.events.states == [True, False]

    with_learner(tmp_path, body)


def test_a_learner_that_stays_away_ends_the_link(tmp_path: Path) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        await learner.stop()
        await wait_until(lambda: bool(robot.events.errors))
        assert isinstance(robot.events.errors[0], LinkLost)
        assert "no learner at" in str(robot.events.errors[0])
        assert "connection refused" in str(robot.events.errors[0])

    with_learner(tmp_path, body, settings=LinkSettings(wait_s=0.2, retry_s=0.05))


def test_a_page_where_the_learner_was_is_waited_out(tmp_path: Path) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        await learner.stop()
        await learner.start(process_request=lambda connection, _: connection.respond(404, "moved"))
        await wait_until(lambda: any("HTTP 404" in line for line in robot.events.lines))
        await learner.stop()
        await learner.start()
        await wait_until(lambda: robot.events.states == [True, False, True])

    with_learner(tmp_path, body)


def test_a_connection_that_never_lasts_makes_no_storm(tmp_path: Path) -> None:
    async def body(learner: Learner, robot: Robot) -> None:
        async def refuse(connection: ServerConnection, heads: list[wire.FromRobot]) -> None:
            await connection.close()

        learner.serve = refuse  # type: ignore[method-assign]
        learner.sockets[-1].transport.abort()
        await asyncio.sleep(0.3)
        assert 2 <= len(learner.connections) <= 14

    with_learner(tmp_path, body)


# -- the start ---------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_a_learner_that_starts_later_is_waited_for(tmp_path: Path) -> None:
    async def work() -> None:
        learner = Learner()
        learner.port = free_port()
        robot = Robot(tmp_path, learner.url)
        opening = asyncio.create_task(robot.link.open())
        await asyncio.sleep(0.2)
        assert robot.link.figures()["state"] == "connecting"
        await learner.start()
        assert (await opening).preset == "paper"
        assert robot.events.lines == [f"waiting for the learner at {learner.url}: connection refused"]
        await robot.link.close(drain=False)
        await learner.stop()

    run(work())


def test_no_learner_in_time(tmp_path: Path) -> None:
    error = open_error(tmp_path, url=f"ws://127.0.0.1:{free_port()}", settings=LinkSettings(wait_s=0.1, retry_s=0.05))
    assert isinstance(error, StartError)
    assert "connection refused" in str(error)


NO_ADDRESSES = (
    "nonsense 127.0.0.1:8765 http://127.0.0.1:8765 ws:// ws://:8765 ws://host ws://host:99999 ws://host:0 "
    "ws://user:word@host:1 ws://host:1/path ws://host:1?x=1 ws://[::1:8765 ws://höst:1"
)


@pytest.mark.parametrize("url", NO_ADDRESSES.split())
def test_an_address_that_is_none(tmp_path: Path, url: str) -> None:
    with pytest.raises(SettingsError, match="no address of a learner"):
        Robot(tmp_path, url)


def test_an_unknown_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(uvloop.Loop, "getaddrinfo", unknown, raising=False)
    error = open_error(tmp_path, url="ws://nowhere.invalid:8765")
    assert isinstance(error, StartError)
    assert "no host 'nowhere.invalid'" in str(error)


def test_a_web_page_is_no_learner(tmp_path: Path) -> None:
    def page(connection: ServerConnection, request: Request) -> Response:
        return connection.respond(200, "hello")

    error = open_error(tmp_path, Learner(), server={"process_request": page})
    assert isinstance(error, StartError)
    assert "not a relod learner (HTTP 200)" in str(error)


def test_another_websocket_is_no_learner(tmp_path: Path) -> None:
    error = open_error(tmp_path, Learner(), server={"subprotocols": None})
    assert isinstance(error, StartError)
    assert "websocket of another kind" in str(error)


def test_a_port_that_speaks_no_http(tmp_path: Path) -> None:
    async def work() -> None:
        async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 mail.example ESMTP\r\n")
            writer.close()

        server = await asyncio.start_server(greet, "127.0.0.1", 0)
        robot = Robot(tmp_path, f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        async with server:
            with pytest.raises(StartError, match="not a relod learner"):
                await robot.link.open()

    run(work())


def test_another_protocol_version(tmp_path: Path) -> None:
    learner = Learner()
    learner.first = wire.Challenge(protocol=2, relod="9.0", nonce=NONCE, token=False)
    error = open_error(tmp_path, learner)
    assert isinstance(error, StartError)
    assert "(relod 9.0) speaks protocol 2, this robot 1" in str(error)


def test_a_refusal_is_the_learners(tmp_path: Path) -> None:
    learner = Learner()
    learner.reply = wire.Refused(exit_code=2, message="robot 'arm' has another action_names", hint="give --task reach")
    error = open_error(tmp_path, learner)
    assert isinstance(error, SettingsError)
    assert str(error) == "the learner says: robot 'arm' has another action_names; give --task reach"


def test_a_refusal_for_now_is_waited_out(tmp_path: Path) -> None:
    async def work() -> None:
        learner = Learner()
        learner.reply = wire.Refused(exit_code=3, message="32 robots are here", retry=True)
        await learner.start()
        robot = Robot(tmp_path, learner.url)
        opening = asyncio.create_task(robot.link.open())
        await wait_until(lambda: len(learner.joins) >= 3)
        learner.reply = None
        await opening
        assert robot.events.lines == [f"waiting for the learner at {learner.url}: 32 robots are here"]
        await robot.link.close(drain=False)
        await learner.stop()

    run(work())


def test_both_prove_the_token(tmp_path: Path) -> None:
    async def work() -> None:
        learner = Learner()
        learner.token = TOKEN
        async with connected(tmp_path, learner, token=TOKEN):
            (join,) = learner.joins
            assert join.proof == robot_proof(TOKEN, NONCE, join.nonce, "arm", "0" * 32)

    run(work())


def test_a_learner_that_cannot_prove_the_token(tmp_path: Path) -> None:
    learner = Learner()
    learner.token = b"another"
    error = open_error(tmp_path, learner, token=TOKEN)
    assert isinstance(error, StartError)
    assert "did not prove that it knows the token" in str(error)
    assert TOKEN.decode() not in str(error)


def test_a_token_that_is_asked_for_and_not_given(tmp_path: Path) -> None:
    learner = Learner()
    learner.token = TOKEN
    error = open_error(tmp_path, learner)
    assert isinstance(error, StartError)
    assert "asks for its token" in str(error)
    assert not learner.joins


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A self-signed certificate for localhost and 127.0.0.1, and its key."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_text(LOCAL_CERT)
    key.write_text(LOCAL_KEY)
    return cert, key


def test_tls(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    async def work() -> None:
        learner = Learner()
        await learner.start(ssl=server_tls(*certificate))
        robot = Robot(tmp_path, f"wss://127.0.0.1:{learner.port}", ca=certificate[0])
        await robot.link.open()
        robot.step()
        assert await robot.link.close(drain=True)
        assert len(learner.log) == 1
        await learner.stop()

    run(work())


@pytest.mark.parametrize(("ca", "text"), [(None, "self-signed certificate"), (OTHER_CERT, "self-signed certificate")])
def test_a_certificate_that_is_not_trusted(
    tmp_path: Path, certificate: tuple[Path, Path], ca: str | None, text: str
) -> None:
    learner = Learner()
    learner.port = free_port()
    if ca is not None:
        (tmp_path / "ca.pem").write_text(ca)
    error = open_error(
        tmp_path,
        learner,
        url=f"wss://127.0.0.1:{learner.port}",
        ca=tmp_path / "ca.pem" if ca is not None else None,
        server={"ssl": server_tls(*certificate)},
    )
    assert isinstance(error, StartError)
    assert f"is not to be trusted: {text}" in str(error)


def test_a_certificate_for_another_host(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_text(OTHER_CERT)
    key.write_text(OTHER_KEY)
    learner = Learner()
    learner.port = free_port()
    error = open_error(
        tmp_path, learner, url=f"wss://127.0.0.1:{learner.port}", ca=cert, server={"ssl": server_tls(cert, key)}
    )
    assert isinstance(error, StartError)
    assert "is not to be trusted: IP address mismatch" in str(error)


SHORT = LinkSettings(wait_s=0.1, retry_s=0.05)


def test_a_learner_with_tls_that_is_called_without(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    error = open_error(tmp_path, Learner(), settings=SHORT, server={"ssl": server_tls(*certificate)})
    assert isinstance(error, StartError)
    assert "closed at once (with --cert it is at wss://)" in str(error)


def test_a_learner_without_tls(tmp_path: Path) -> None:
    learner = Learner()
    learner.port = free_port()
    error = open_error(tmp_path, learner, url=f"wss://127.0.0.1:{learner.port}", settings=SHORT)
    assert isinstance(error, StartError)
    assert "closed at once (without --cert it is at ws://)" in str(error)


def test_a_port_that_answers_tls_with_something_else(tmp_path: Path) -> None:
    async def work() -> None:
        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            await writer.drain()
            await reader.read()
            writer.close()

        server = await asyncio.start_server(greet, "127.0.0.1", 0)
        robot = Robot(tmp_path, f"wss://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        async with server:
            with pytest.raises(StartError, match="does not speak TLS"):
                await robot.link.open()

    run(work())
