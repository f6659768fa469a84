"""The learner's server on loopback, against robots made by hand."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import uvloop
from websockets import ConnectionClosed, InvalidStatus
from websockets.asyncio.client import ClientConnection

from relod.config import ServerSettings
from relod.errors import EXIT_BUG, EXIT_SETTINGS, EXIT_START, SafetyStop, SettingsError, StartError
from relod.runtime.messages import encode
from relod.runtime.remote import wire
from relod.runtime.remote.access import client_tls, learner_proof, server_tls
from relod.runtime.remote.dialing import Dialer
from relod.runtime.remote.server import LearnerServer
from tests.runtime.logs import make_end, make_step
from tests.runtime.remote.certificates import LOCAL_CERT, LOCAL_KEY, OTHER_CERT, OTHER_KEY
from tests.runtime.remote.wirerobots import HOST, OTHER_RUN, RUN, SPEC, FakeHall, Learner, Robot, learner, pixels, until

Scene = Callable[[], Awaitable[None]]


def play(scene: Scene) -> None:
    """Run a test on the loop that the learner runs on."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scene())


async def refusal(socket: ClientConnection) -> wire.Refused:
    """What the connection is refused with; it is closed next."""
    refused = await Robot(socket).get(wire.Refused)
    async with asyncio.timeout(5):
        with contextlib.suppress(ConnectionClosed):
            while True:
                await socket.recv()
    return refused


async def bring(robot: Robot, steps: range, episode: int = 0) -> None:
    for index in steps:
        await robot.record(make_step(episode, index, first_frame=index + 1))


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_robot_brings_an_episode_and_says_goodbye() -> None:
    async def scene() -> None:
        async with learner() as at:
            async with at.robot() as robot:
                await bring(robot, range(3))
                await robot.record(make_end(0, 3, first_frame=4))
                await robot.acked(4)
                assert at.hall.positions() == [(0, 0), (0, 1), (0, 2), (0, 3)]
                assert at.hall.frames == {(RUN, frame_id): pixels(frame_id) for frame_id in range(1, 6)}
                await robot.send(wire.Bye(reason="all done"))
                await until(lambda: at.hall.leavings)
            assert at.hall.leavings == [("one", "all done")]
            assert at.server.figures()["one"] | {"bytes_in": 0, "bytes_out": 0} == {
                "state": "away",
                "connections": 1,
                "steps": 3,
                "episodes": 1,
                "duplicates": 0,
                "rejected": 0,
                "frames": 5,
                "asked": 0,
                "answered": 0,
                "bytes_in": 0,
                "bytes_out": 0,
            }
            assert at.said == []

    play(scene)


def test_a_ping_is_answered_at_once() -> None:
    async def scene() -> None:
        async with learner() as at, at.robot() as robot:
            await robot.send(wire.Ping(sent_ns=-5, backlog=7))
            pong = await robot.get(wire.Pong)
            assert pong.sent_ns == -5
            assert pong.received_ns <= pong.replied_ns
            assert at.server.figures()["one"]["backlog"] == 7

    play(scene)


def test_who_only_measures_the_way_costs_nobody_anything() -> None:
    async def scene() -> None:
        async with learner(token=b"secret") as at, at.robot(token=b"secret") as robot:
            dialer = Dialer(f"ws://{HOST}:{at.port}", token=None, ca=None, join=None)
            challenge, round_trips_ms = await dialer.probe(connect_s=1.0, hello_s=5.0, pings=5, every_s=0.001)
            assert challenge.token
            assert len(round_trips_ms) == 5
            assert min(round_trips_ms) > 0
            await robot.send(wire.Ping(sent_ns=1))
            await robot.get(wire.Pong)
            assert list(at.server.figures()) == ["one"]
            assert at.said == []

    play(scene)


def test_the_same_run_goes_on_where_the_log_is() -> None:
    async def scene() -> None:
        async with learner() as at:
            async with at.robot() as robot:
                assert robot.welcome.position is None
                await bring(robot, range(3))
                await robot.acked(3)
            async with at.robot() as again:
                assert again.welcome.position == (0, 2)
                again.seq = 1
                await bring(again, range(1, 5))
                await again.acked(5)
            assert at.hall.positions() == [(0, index) for index in range(5)]
            assert at.server.figures()["one"]["duplicates"] == 2
            assert at.server.figures()["one"]["connections"] == 2

    play(scene)


def test_frames_are_sent_again_over_a_new_connection() -> None:
    async def scene() -> None:
        async with learner() as at:
            async with at.robot() as robot:
                await bring(robot, range(1))
                await robot.acked(1)
            async with at.robot() as again:
                await again.send(wire.RecordHead(seq=2), encode(make_step(0, 1, first_frame=1)))
                assert "frame 1 was not sent" in (await refusal(again.socket)).message

    play(scene)


def test_a_new_connection_of_the_same_run_takes_the_place_of_the_old_at_once() -> None:
    async def scene() -> None:
        async with learner() as at, at.robot() as old:
            await bring(old, range(2))
            await old.acked(2)
            async with at.robot() as new:
                assert new.welcome.position == (0, 1)
                with pytest.raises(ConnectionClosed):
                    await old.get(wire.Ack)
                await bring(new, range(2, 3))
                await new.acked(1)
            assert at.hall.leavings[0] == ("one", "the robot connected anew")
            assert at.hall.positions() == [(0, 0), (0, 1), (0, 2)]

    play(scene)


def test_two_robots_of_one_name() -> None:
    async def scene() -> None:
        async with learner() as at, at.robot() as first:
            async with at.socket() as socket:
                await Robot(socket).join(run=OTHER_RUN)
                refused = await refusal(socket)
            assert (refused.exit_code, refused.retry) == (EXIT_START, False)
            assert refused.message == "robot name 'one' is in use"
            assert "--name" in refused.hint
            async with at.robot(robot="two", run=OTHER_RUN):
                pass
            await bring(first, range(1))
            await first.acked(1)

    play(scene)


def test_a_robot_that_was_started_again_takes_its_own_place_once_the_old_one_is_silent() -> None:
    async def scene() -> None:
        async with learner(silence_s=1.0) as at, at.robot():
            at.server._sessions["one"].connection.heard_ns -= 600_000_000
            async with at.robot(run=OTHER_RUN) as robot:
                assert robot.welcome.position is None
            assert at.hall.leavings[0] == ("one", "another run of the robot took its place")

    play(scene)


def test_a_silent_robot_is_dropped() -> None:
    async def scene() -> None:
        async with learner(silence_s=0.1) as at, at.robot(), at.robot(robot="two", run=OTHER_RUN) as alive:
            while not at.hall.leavings:
                await alive.send(wire.Ping(sent_ns=0))
                await asyncio.sleep(0.01)
            assert [name for name, _ in at.hall.leavings] == ["one"]
            assert at.hall.leavings[0][1].startswith("silent for 0.1")
            assert at.server.figures()["two"]["state"] == "connected"

    play(scene)


def test_a_vanished_robot_frees_what_it_held() -> None:
    async def scene() -> None:
        async with learner() as at:
            async with at.robot() as robot:
                await robot.frames(range(50))
                await until(lambda: at.server.figures()["one"]["frames"] == 50)
                intake = at.server._sessions["one"]._intake
                assert len(intake._frames) == 50
                robot.socket.transport.abort()
                await until(lambda: at.hall.leavings)
            assert not intake._frames
            assert at.hall.leavings == [("one", "the link was cut")]

    play(scene)


# -- policies and answers ----------------------------------------------------------------------------------------------


def test_a_policy_goes_to_robots_that_act_now_and_later() -> None:
    async def scene() -> None:
        values = np.linspace(-1, 1, 100_000, dtype=np.float32)
        async with learner() as at, at.robot() as first, at.robot(robot="asks", run=OTHER_RUN, acts="learner") as asks:
            at.server.publish(values, (1, 5))
            version, got = await first.policy()
            assert version == (1, 5)
            assert np.array_equal(got, values.astype(np.float16))
            async with at.robot(robot="late", run="2" * 32) as late:
                assert (await late.policy())[0] == (1, 5)
            await asks.send(wire.Ping(sent_ns=0))
            assert isinstance((await asks.receive())[0], wire.Pong)  # and no policy before it
            assert at.server.figures()["one"]["policy_version"] == (1, 5)

    play(scene)


def test_a_slow_reader_gets_the_newest_policy_and_holds_nobody_up() -> None:
    async def scene() -> None:
        async with learner() as at, at.robot() as slow, at.robot(robot="two", run=OTHER_RUN) as quick:
            slow.socket.transport.pause_reading()
            for updates in range(1, 9):
                at.server.publish(np.full(2_000_000, updates, np.float32), (1, updates))
                assert (await quick.policy())[0] == (1, updates)
            await bring(slow, range(3))  # is taken in all the same
            await until(lambda: len(at.hall.positions()) == 3)
            slow.socket.transport.resume_reading()
            versions = [(await slow.policy())[0]]
            while versions[-1] != (1, 8):
                versions.append((await slow.policy())[0])
            assert len(versions) <= 3  # one that was on its way, perhaps one in the buffers, and the newest

    play(scene)


def test_a_question_is_answered_from_what_it_names() -> None:
    async def scene() -> None:
        async with learner() as at, at.robot(acts="learner") as robot:
            await robot.frames((4, 5))
            proprio = np.array([0.5, -2], np.float32).tobytes()
            question = {"episode": 0, "index": 0, "frame_ids": (4, 5), "now_ns": 0}
            await robot.send(wire.Observe(ask=3, **question), proprio)
            head, payload = await robot.receive()
            assert (head.ask, head.version, head.actions) == (3, (1, 3), 1)
            assert np.frombuffer(payload, "<f4").tolist() == [5.0, 0.5, -2.0]
            assert at.server.figures()["one"]["answered"] == 1

    play(scene)


def test_of_questions_that_come_together_the_first_and_the_newest_are_answered() -> None:
    async def scene() -> None:
        async with learner() as at, at.robot(acts="learner") as robot:
            await robot.frames((1, 2))
            question = {"episode": 0, "index": 0, "frame_ids": (1, 2), "now_ns": 0}
            for number in (1, 2, 3, 4):  # all are there before the learner, on the same loop, reads the first
                await robot.send(wire.Observe(ask=number, **question), bytes(8))
            assert [(await robot.get(wire.Answer)).ask for _ in range(2)] == [1, 4]
            assert at.hall.acted == [1, 4]


def test_a_question_is_answered_before_what_came_behind_it_is_read() -> None:
    async def scene() -> None:
        async with learner() as at, at.robot(acts="learner") as robot:
            await robot.frames((1, 2))
            question = {"episode": 0, "index": 0, "frame_ids": (1, 2), "now_ns": 0}
            await robot.send(wire.Observe(ask=1, **question), bytes(8))
            await robot.record(make_step())
            assert [type((await robot.receive())[0]) for _ in range(2)] == [wire.Answer, wire.Ack]

    play(scene)


def test_what_all_are_told_newcomers_are_told_too() -> None:
    async def scene() -> None:
        async with learner() as at, at.robot() as robot:
            at.server.tell(wire.Hold(reason="update"))
            assert (await robot.get(wire.Hold)).reason == "update"
            async with at.robot(robot="two", run=OTHER_RUN) as late:
                assert (await late.get(wire.Hold)).reason == "update"

    play(scene)


def test_robots_wait_until_they_have_the_next_policy() -> None:
    async def scene() -> None:
        async with learner() as at, at.robot() as robot, at.robot(robot="asks", run=OTHER_RUN, acts="learner") as asks:
            at.server.hold("the learner updates")
            for each in (robot, asks):
                assert (await each.get(wire.Hold)).reason == "the learner updates"
            async with at.robot(robot="late", run="2" * 32) as late:
                assert (await late.get(wire.Hold)).reason == "the learner updates"
            at.server.publish(np.ones(100_000, np.float32), (1, 1))
            assert (await robot.policy())[0] == (1, 1)
            for each in (robot, asks):
                assert (await each.get(wire.Hold)).reason == ""
            at.server.publish(np.ones(100_000, np.float32), (1, 2))
            assert (await robot.policy())[0] == (1, 2)
            await robot.send(wire.Ping(sent_ns=0))
            assert isinstance((await robot.receive())[0], wire.Pong)  # nothing is lifted that does not hold

    play(scene)


# -- access ------------------------------------------------------------------------------------------------------------


def test_both_ends_prove_the_token() -> None:
    async def scene() -> None:
        async with learner(b"secret") as at, at.socket() as socket:
            robot = Robot(socket)
            challenge = await robot.join(token=b"secret")
            assert challenge.token
            proof = (await robot.get(wire.Welcome)).proof
            nonce = bytes(range(wire.NONCE_BYTES))
            assert hmac.compare_digest(proof, learner_proof(b"secret", challenge.nonce, nonce, "one", RUN))

    play(scene)


def test_wrong_tokens_are_refused_and_soon_not_even_looked_at() -> None:
    async def scene() -> None:
        async with learner(b"secret") as at:
            for _ in range(5):
                async with at.socket() as socket:
                    await Robot(socket).join(token=b"guess")
                    refused = await refusal(socket)
                assert (refused.exit_code, refused.message) == (EXIT_START, "the token is not this learner's")
                assert not refused.retry
            async with at.socket() as socket:  # no challenge
                refused = await refusal(socket)
            assert refused.message.startswith(f"too many wrong tokens from {HOST}")
            assert refused.retry
            assert at.hall.leavings == []
            assert len(at.said) == 1  # strangers do not fill the screen

    play(scene)


def test_no_token_at_all() -> None:
    async def scene() -> None:
        async with learner(b"secret") as at, at.socket() as socket:
            await Robot(socket).join()
            refused = await refusal(socket)
            assert refused.message == "this learner asks for a token"
            assert "--token-file" in refused.hint

    play(scene)


def test_what_the_hall_does_not_want_is_told_so() -> None:
    async def scene() -> None:
        async with learner() as at, at.socket() as socket:
            at.hall.error = SettingsError("the robot's image_hw is 3", "use 2")
            await Robot(socket).join()
            refused = await refusal(socket)
            assert (refused.exit_code, refused.message, refused.hint) == (
                EXIT_SETTINGS,
                "the robot's image_hw is 3",
                "use 2",
            )

    play(scene)


def test_more_robots_than_are_served() -> None:
    async def scene() -> None:
        async with learner(max_robots=1) as at, at.robot():
            async with at.socket() as socket:
                await Robot(socket).join(robot="two", run=OTHER_RUN)
                refused = await refusal(socket)
            assert refused.message == "this learner has its 1 robots"
            assert refused.retry

    play(scene)


@pytest.mark.parametrize("extra", [False, True])
def test_another_version_of_the_protocol(extra: bool) -> None:
    async def scene() -> None:
        async with learner() as at, at.socket() as socket:
            if extra:  # a join with a field of its own
                header = msgspec.msgpack.encode({"type": "join", "protocol": 9, "colour": "red"})
                await socket.send(len(header).to_bytes(4, "little") + header)
            else:
                await Robot(socket).join(protocol=9)
            refused = await refusal(socket)
            assert refused.exit_code == EXIT_SETTINGS
            assert refused.message == f"the robot speaks version 9 of the protocol, this learner {wire.PROTOCOL}"

    play(scene)


def test_tls_with_the_learners_own_certificate(tmp_path: Path) -> None:
    for name, text in {"crt": LOCAL_CERT, "key": LOCAL_KEY, "other": OTHER_CERT, "other.key": OTHER_KEY}.items():
        (tmp_path / name).write_text(text)

    async def scene() -> None:
        async with learner(tls=server_tls(tmp_path / "crt", tmp_path / "key")) as at:
            async with at.socket(ssl=client_tls(f"wss://{HOST}", tmp_path / "crt")) as socket:
                robot = Robot(socket)
                await robot.join()
                await robot.get(wire.Welcome)
                await bring(robot, range(1))
                await robot.acked(1)
            with pytest.raises(ssl.SSLCertVerificationError):
                async with at.socket(ssl=client_tls(f"wss://{HOST}", tmp_path / "other")):
                    pass

    play(scene)


# -- bad input ---------------------------------------------------------------------------------------------------------

STEP = encode(make_step())
FRAME = wire.pack(wire.FrameHead(id=1, captured_ns=0), pixels(1))
QUESTION = wire.Observe(ask=1, episode=0, index=0, frame_ids=(1, 2), now_ns=0)


def record(**changes: Any) -> bytes:
    return wire.pack(wire.RecordHead(seq=1), encode(dataclasses.replace(make_step(), **changes)))


BAD = {
    "nothing": b"",
    "half a length": b"\x01\x00",
    "a header that is cut off": FRAME[:10],
    "a header of hostile length": b"\xff\xff\xff\xff" + FRAME,
    "no msgpack": b"\x04\x00\x00\x00\xc1\xc1\xc1\xc1",
    "nesting without end": (50_000).to_bytes(4, "little") + b"\x91" * 50_000,
    "an unknown type": (13).to_bytes(4, "little") + msgspec.msgpack.encode({"type": "shell"}),
    "a message of the learner": wire.pack(wire.Ack(seq=1)),
    "a field of the wrong type": FRAME.replace(b"\xa2id\x01", b"\xa2id\xc3"),
    "a text": "hello",
    "a frame of another size": wire.pack(wire.FrameHead(id=1, captured_ns=0), pixels(1)[:-1]),
    "a record without its frames": wire.pack(wire.RecordHead(seq=1), STEP),
    "a truncated record": wire.pack(wire.RecordHead(seq=1), STEP[:-3]),
    "a question of a robot that acts": wire.pack(QUESTION, bytes(8)),
}
BAD_RECORDS = {
    "NaN": record(reward=float("nan")),
    "another shape": record(action=np.zeros(3, np.float32)),
    "an action too large": record(action=np.full(1, 7, np.float32)),
    "a step out of order": record(index=3),
    "sequence number 0": wire.pack(wire.RecordHead(seq=0), STEP),
}


@contextlib.asynccontextmanager
async def bystander(at: Learner) -> AsyncIterator[None]:
    """A robot that must not notice anything."""
    async with at.robot(robot="bystander", run=OTHER_RUN) as other:
        await bring(other, range(1))
        yield
        await bring(other, range(1, 3))
        await other.acked(3)
        assert at.hall.positions(OTHER_RUN) == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize("case", [*BAD, *BAD_RECORDS])
def test_a_bad_message_costs_its_sender_the_connection_and_nobody_else_anything(case: str) -> None:
    async def scene() -> None:
        async with learner() as at, bystander(at), at.robot() as robot:
            if case in BAD_RECORDS:
                await robot.frames((1, 2))
            await robot.socket.send({**BAD, **BAD_RECORDS}[case])
            refused = await refusal(robot.socket)
            assert refused.exit_code == EXIT_BUG
            assert refused.message.startswith("the learner got a bad message: ")
            assert not refused.retry
            assert at.hall.positions() == []
            assert at.server.figures()["one"]["rejected"] == 1
            assert [line.startswith("robot one: a bad message: ") for line in at.said] == [True]
            assert all(line.isprintable() and len(line) < 400 for line in at.said)
            assert at.hall.leavings[0][0] == "one"

    play(scene)


@pytest.mark.parametrize("case", BAD)
def test_a_stranger_with_a_bad_message(case: str) -> None:
    async def scene() -> None:
        async with learner() as at, bystander(at), at.socket() as socket:
            await socket.send(BAD[case])
            assert "a bad message" in (await refusal(socket)).message
            assert len(at.said) == 1

    play(scene)


def test_a_message_beyond_all_sizes() -> None:
    async def scene() -> None:
        async with learner() as at, bystander(at):
            async with at.socket() as stranger:
                await stranger.send(bytes(wire.MAX_HEADER_BYTES + 1))
                with pytest.raises(ConnectionClosed, match="1009"):
                    await Robot(stranger).get(wire.Welcome)
            async with at.robot() as robot:
                await robot.socket.send(bytes(3 * wire.MAX_HEADER_BYTES))
                with pytest.raises(ConnectionClosed, match="1009"):
                    await robot.receive()
                await until(lambda: at.hall.leavings)
            assert at.server.figures()["one"]["rejected"] == 1
            assert "1009" in at.said[-1]

    play(scene)


def test_a_task_of_hostile_size() -> None:
    async def scene() -> None:
        async with learner() as at, at.socket() as socket:
            await Robot(socket).join(spec=dataclasses.replace(SPEC, image_hw=(1 << 40, 1 << 40)))
            assert "too large" in (await refusal(socket)).message

    play(scene)


def test_a_jpeg_that_is_none_is_the_senders_fault() -> None:
    async def scene() -> None:
        async with learner() as at, bystander(at), at.robot(codec="jpeg", acts="learner") as robot:
            await robot.frames((1, 2))
            await robot.send(QUESTION, bytes(8))
            assert "a frame of question 1" in (await refusal(robot.socket)).message

    play(scene)


def test_a_record_that_the_hall_cannot_use_is_the_senders_fault() -> None:
    async def scene() -> None:
        async with learner() as at, at.robot() as robot:
            at.hall.error = ValueError("frame 1 is no JPEG")
            await bring(robot, range(1))
            assert (await refusal(robot.socket)).message == "the learner got a bad message: frame 1 is no JPEG"
            assert not at.server.failed.done()

    play(scene)


@pytest.mark.parametrize("acts", ["robot", "learner"])
def test_a_defect_costs_one_robot_its_connection(acts: str) -> None:
    async def scene() -> None:
        async with learner() as at, bystander(at), at.robot(acts=acts) as robot:
            await robot.frames((1, 2))
            at.hall.error = KeyError("oops")
            await (robot.send(QUESTION, bytes(8)) if acts == "learner" else robot.record(make_step()))
            refused = await refusal(robot.socket)
            assert refused.message == "a defect of the learner: KeyError: 'oops'"
            assert at.said == ["robot one: a defect of the learner: KeyError: 'oops'; its connection is closed"]

    play(scene)


def test_a_safety_stop_ends_the_learner() -> None:
    async def scene() -> None:
        async with learner() as at, at.robot() as robot:
            at.hall.error = SafetyStop("the disk is full")
            await bring(robot, range(1))
            with pytest.raises(SafetyStop, match="the disk is full"):
                await at.server.failed

    play(scene)


def test_a_safety_stop_while_a_robot_joins_does_too() -> None:
    async def scene() -> None:
        async with learner() as at, at.socket() as socket:
            at.hall.error = SafetyStop("the disk is full")
            await Robot(socket).join()
            with pytest.raises(SafetyStop, match="the disk is full"):
                await at.server.failed

    play(scene)


def test_a_robot_that_sends_too_much_is_read_more_slowly_and_loses_nothing() -> None:
    async def scene() -> None:
        # A hundred small messages pass at once, then one in 0.1 s: longer than anyone else may be silent.
        async with learner(max_mib_per_s=0.01, silence_s=0.08) as at, at.robot() as robot:
            await robot.frames(range(100))
            frames = at.server._tallies["one"]
            await until(lambda: frames.frames >= 94)
            assert frames.frames < 100
            await until(lambda: frames.frames == 100)
            assert at.hall.leavings == []

    play(scene)


# -- strangers ---------------------------------------------------------------------------------------------------------


async def http(port: int, text: str) -> str:
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(text.replace("\n", "\r\n").encode())
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    return answer.decode()


def test_a_browser_gets_a_page_that_says_what_this_is() -> None:
    async def scene() -> None:
        async with learner() as at:
            page = await http(at.port, "GET / HTTP/1.1\nHost: <b>me</b>\n\n")
            assert page.startswith("HTTP/1.1 200 OK")
            assert "This is a relod learner" in page
            assert f"--learner ws://HOST:{at.port}" in page
            assert "<b>me" not in page
            assert at.said == []

    play(scene)


def test_a_websocket_that_speaks_something_else() -> None:
    async def scene() -> None:
        async with learner() as at:
            for options in ({"subprotocols": None}, {"subprotocols": ["chat"]}):
                with pytest.raises(InvalidStatus, match="400"):
                    async with at.socket(**options):
                        pass

    play(scene)


def test_a_page_in_a_browser_on_this_machine_cannot_play_a_robot() -> None:
    async def scene() -> None:
        async with learner() as at:
            with pytest.raises(InvalidStatus, match="403"):
                async with at.socket(origin="http://evil.example"):
                    pass

    play(scene)


@pytest.mark.parametrize("said", ["", "GET / HT", "GET / HTTP/1.1\r\nHost: me\r\n"])
def test_who_speaks_too_slowly_is_hung_up_on(said: str) -> None:
    async def scene() -> None:
        async with learner(hello_s=0.1) as at, bystander(at):
            reader, writer = await asyncio.open_connection(HOST, at.port)
            writer.write(said.encode())
            async with asyncio.timeout(2):
                with contextlib.suppress(ConnectionError):
                    await reader.read()
            writer.close()

    play(scene)


def test_who_does_not_join_in_time_is_refused() -> None:
    async def scene() -> None:
        async with learner(hello_s=0.1) as at, at.socket() as socket:
            assert (await refusal(socket)).message == "it did not say who it is in time"

    play(scene)


def test_many_strangers_do_not_keep_a_robot_out() -> None:
    async def scene() -> None:
        async with learner(max_connections=4) as at, bystander(at):
            strangers = [await asyncio.open_connection(HOST, at.port) for _ in range(10)]
            async with at.robot() as robot:
                await bring(robot, range(1))
                await robot.acked(1)
                assert at.server._connections <= 4
            for _, writer in strangers:
                writer.close()

    play(scene)


def test_bytes_that_are_no_websocket_are_hung_up_on_at_once() -> None:
    async def scene() -> None:
        async with learner() as at, bystander(at), asyncio.timeout(1):
            assert "101" not in await http(at.port, "\x16\x03\x01 nonsense\n\n")

    play(scene)


# -- beginning and end -------------------------------------------------------------------------------------------------


def test_a_port_in_use() -> None:
    async def scene() -> None:
        async with learner() as at:
            second = LearnerServer(hall=FakeHall(), settings=ServerSettings(), token=None, tls=None)
            with pytest.raises(StartError, match=f"port {at.port} of {HOST} is in use; .*--listen"):
                await second.start(HOST, at.port)

    play(scene)


def test_an_address_of_another_machine() -> None:
    async def scene() -> None:
        server = LearnerServer(hall=FakeHall(), settings=ServerSettings(), token=None, tls=None)
        with pytest.raises(StartError, match=r"cannot listen at 192\.0\.2\.1:1234"):
            await server.start("192.0.2.1", 1234)

    play(scene)


def test_a_learner_that_is_finished_waits_for_goodbyes() -> None:
    async def scene() -> None:
        async with learner() as at, at.robot() as robot:
            closing = asyncio.create_task(at.server.close("enough steps"))
            assert (await robot.get(wire.Finished)).reason == "enough steps"
            await bring(robot, range(1))  # what was on its way is taken in
            await robot.acked(1)
            assert not closing.done()
            await robot.send(wire.Bye(reason="the learner is finished"))
            await closing
            assert at.hall.leavings == [("one", "the learner is finished")]

    play(scene)


def test_a_learner_that_is_finished_does_not_wait_forever() -> None:
    async def scene() -> None:
        async with learner() as at, at.robot():
            await at.server.close("enough", wait_s=0.05)
            assert at.said == ["one did not say goodbye within 0.05 s"]
            assert [name for name, _ in at.hall.leavings] == ["one"]

    play(scene)


def test_closing_ends_every_connection_and_frees_the_port() -> None:
    async def scene() -> None:
        async with learner() as at, at.robot() as robot:
            await at.server.close(None)
            with pytest.raises(ConnectionClosed):
                await robot.get(wire.Finished)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((HOST, at.port), 1)

    play(scene)
