"""The outbox against a learner in memory whose link is cut at any moment, and at the limits of memory and disk."""

from __future__ import annotations

import errno
import random
from collections import deque
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from relod.errors import LinkLost, SafetyStop, StartError
from relod.runtime.log.format import EncodedFrame
from relod.runtime.messages import decode, encode
from relod.runtime.remote import wire
from relod.runtime.remote.outbox import OVERHEAD_BYTES, Outbox
from relod.runtime.remote.spool import find_spool, read_spool
from relod.runtime.rundir import Appender
from relod.types import EpisodeEnd, Step
from tests.runtime.logs import make_end, make_step

FRAME_BYTES = 1000
FRAMES_KEPT = 8
RECORD_BYTES = FRAME_BYTES + OVERHEAD_BYTES + 150  # at most, with one new frame
MEMORY_BYTES = 48 * RECORD_BYTES  # a file of the spool takes two or three
SPOOL_BYTES = 20 * RECORD_BYTES
LONGEST = 10  # records of an episode

Sent = tuple[bytes, tuple[tuple[int, bytes], ...]]  # a record, with the stamp and bytes of each frame it names


def frame(frame_id: int, size_bytes: int = FRAME_BYTES) -> EncodedFrame:
    return EncodedFrame(captured_ns=7 * frame_id, data=frame_id.to_bytes(4, "little") * (size_bytes // 4))


def as_sent(message: Step | EpisodeEnd) -> Sent:
    return encode(message), tuple((frame(i).captured_ns, bytes(frame(i).data)) for i in message.frame_ids)


def make_outbox(folder: Path, **sizes: int) -> Outbox:
    limits = {"memory_bytes": MEMORY_BYTES, "spool_bytes": SPOOL_BYTES, "frames_kept": FRAMES_KEPT, **sizes}
    return Outbox(folder, **limits)


def frame_messages(outbox: Outbox, *frame_ids: int) -> list[bytes]:
    """Those frames that the learner lacks, as messages of their own."""
    return [
        wire.pack(wire.FrameHead(id=frame_id, captured_ns=frame.captured_ns), frame.data)
        for frame_id, frame in outbox.frames_for(frame_ids).items()
    ]


class Learner:
    """Keeps a log, and of each connection what the protocol lets it: the newest frames, and the last `seq`."""

    def __init__(self) -> None:
        self.log: list[Sent] = []
        self.position: tuple[int, int] | None = None
        self.frames: dict[int, tuple[int, bytes]] = {}
        self.seq = 0

    def connected(self) -> tuple[int, int] | None:
        self.frames, self.seq = {}, 0
        return self.position

    def take(self, data: bytes) -> int | None:
        """Take a message in; the `seq` to ack when it is a record."""
        head, payload = wire.unpack_from_robot(data)
        if isinstance(head, wire.FrameHead):
            assert head.id not in self.frames, "sent twice over one connection"
            self.frames[head.id] = (head.captured_ns, bytes(payload))
            while len(self.frames) > FRAMES_KEPT:
                del self.frames[next(iter(self.frames))]
            return None
        assert isinstance(head, wire.RecordHead)
        assert self.seq == 0 or head.seq == self.seq + 1
        message = decode(bytes(payload))
        assert isinstance(message, Step | EpisodeEnd)
        position = (message.episode, message.index if isinstance(message, Step) else message.length)
        assert self.position is None or position > self.position, "doubled or out of order"
        self.log.append((bytes(payload), tuple(self.frames[i] for i in message.frame_ids)))
        for frame_id in [i for i in self.frames if i < message.frame_ids[0]]:
            del self.frames[frame_id]
        self.seq, self.position = head.seq, position
        return head.seq


class World:
    """A robot, its outbox, a link that keeps what is on its way, and a learner."""

    def __init__(self, folder: Path, **sizes: int) -> None:
        self.outbox = make_outbox(folder, **sizes)
        self.learner = Learner()
        self.up = False
        self.to_learner: deque[bytes] = deque()
        self.to_robot: deque[int] = deque()
        self.made: list[Sent] = []
        self.episode, self.index, self.newest_frame = 0, 0, 0

    def camera(self) -> None:
        self.newest_frame += 1
        self.outbox.add_frame(self.newest_frame, frame(self.newest_frame))

    def record(self, new_frames: int, *, end: bool) -> None:
        """A step or, if there was one, the episode's end; names the newest two frames. None while it is to wait."""
        if self.outbox.full and self.index == 0:
            return
        for _ in range(max(new_frames, 2 - self.newest_frame)):
            self.camera()
        end = self.index == LONGEST - 1 or (end and self.index > 0)
        make = make_end if end else make_step
        message = make(self.episode, self.index, first_frame=self.newest_frame - 1)
        assert self.outbox.add(message)
        self.made.append(as_sent(message))
        self.episode, self.index = (self.episode + 1, 0) if end else (self.episode, self.index + 1)

    def connect(self) -> None:
        self.outbox.connected(self.learner.connected())
        self.up = True

    def cut(self) -> None:
        self.up = False
        self.to_learner.clear()
        self.to_robot.clear()

    def send(self) -> None:
        if (message := self.outbox.next()) is not None:
            self.to_learner.append(message)

    def show(self) -> None:
        """Send the newest frames ahead of the records that will name them."""
        self.to_learner += frame_messages(self.outbox, self.newest_frame - 1, self.newest_frame)

    def arrive(self) -> None:
        if self.to_learner and (seq := self.learner.take(self.to_learner.popleft())) is not None:
            self.to_robot.append(seq)

    def ack(self, skipped: int = 0) -> None:
        """The robot gets an ack; the ones it stands for are left out."""
        for _ in range(min(skipped, len(self.to_robot) - 1)):
            self.to_robot.popleft()
        if self.to_robot:
            self.outbox.ack(self.to_robot.popleft())

    def drain(self) -> None:
        """Let everything through, within a bounded number of messages."""
        if not self.up:
            self.connect()
        for _ in range(10 * len(self.made) + 10):
            if self.outbox.empty:
                return
            self.send()
            self.arrive()
            self.ack()

    def check(self) -> None:
        """What holds at any time."""
        outbox = self.outbox
        assert self.learner.log == self.made[: len(self.learner.log)]
        assert outbox.acked <= len(self.learner.log) <= outbox.sent
        assert outbox.backlog == len(self.made) - outbox.acked
        in_files = sum(path.stat().st_size for path in find_spool(outbox._spool._folder))
        assert in_files == outbox._spool.size_bytes <= SPOOL_BYTES
        assert held_bytes(outbox) <= MEMORY_BYTES

    def check_end(self) -> None:
        self.drain()
        assert self.outbox.empty
        assert self.learner.log == self.made
        assert held_bytes(self.outbox) == 0
        assert not find_spool(self.outbox._spool._folder)
        assert not self.outbox.full
        self.outbox.close()


def held_bytes(outbox: Outbox) -> int:
    """Counted anew: what the records in memory and their frames take, each frame object once."""
    records = [*outbox._flight, *outbox._waiting, *outbox._overflow]
    frames = {id(each): len(each.data) for record in records for each in record.frames.values()}
    held = sum(record.own_bytes for record in records) + sum(frames.values())
    assert held == outbox._memory.used_bytes
    return held


class Cuts(RuleBasedStateMachine):
    """Any order of records, deliveries, acks and cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.world = World(Path(self.folder.name) / "outbox")

    @rule(count=st.integers(1, 30), new_frames=st.integers(0, 2), end=st.booleans())
    def record(self, count: int, new_frames: int, end: bool) -> None:
        for _ in range(count):
            self.world.record(new_frames, end=end)

    @precondition(lambda self: not self.world.up)
    @rule()
    def connect(self) -> None:
        self.world.connect()

    @precondition(lambda self: self.world.up)
    @rule()
    def cut(self) -> None:
        self.world.cut()

    @precondition(lambda self: self.world.up)
    @rule(count=st.integers(1, 20))
    def send(self, count: int) -> None:
        for _ in range(count):
            self.world.send()

    @precondition(lambda self: self.world.up and self.world.newest_frame > 1)
    @rule()
    def show(self) -> None:
        self.world.show()

    @rule(count=st.integers(1, 20))
    def arrive(self, count: int) -> None:
        for _ in range(count):
            self.world.arrive()

    @rule(skipped=st.integers(0, 5))
    def ack(self, skipped: int) -> None:
        self.world.ack(skipped)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.check_end()
        self.folder.cleanup()


TestCuts = Cuts.TestCase
TestCuts.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def run_seed(folder: Path, seed: int) -> World:
    """A robot of a hundred records whose link is cut again and again."""
    rng = random.Random(seed)
    world = World(folder)
    weights = [rng.random() for _ in range(4)]
    while len(world.made) < 100:
        if world.up and rng.random() < 0.03:
            world.cut()
        elif not world.up and rng.random() < 0.1:
            world.connect()
        match rng.choices(("record", "send", "arrive", "ack"), weights)[0]:
            case "record":
                world.record(rng.randrange(3), end=rng.random() < 0.1)
            case "send" if world.up:
                world.send()
            case "arrive":
                world.arrive()
            case "ack":
                world.ack(rng.randrange(3))
            case _ if rng.random() < 0.02:
                world.drain()
    return world


def check_seeds(folder: Path, seeds: range) -> tuple[int, int]:
    """Runs whose records went through files, and records that were sent again."""
    spooled = resent = 0
    for seed in seeds:
        world = run_seed(folder / str(seed), seed)
        spooled += (folder / str(seed)).exists()
        world.check()
        world.check_end()
        resent += world.outbox.resent
    return spooled, resent


def test_cuts_by_seed(tmp_path: Path) -> None:
    spooled, resent = check_seeds(tmp_path, range(40))
    assert spooled > 4
    assert resent > 40


@pytest.mark.slow
def test_a_thousand_sequences_of_cuts(tmp_path: Path) -> None:
    spooled, resent = check_seeds(tmp_path, range(40, 1040))
    assert spooled > 100
    assert resent > 1000


# -- one thing at a time -----------------------------------------------------------------------------------------------


def fill(outbox: Outbox, count: int, *, first: int = 0, length: int = 1000) -> list[Sent]:
    """Add steps of episodes without ends, each with a new frame."""
    made: list[Sent] = []
    for number in range(first, first + count):
        outbox.add_frame(number + 1, frame(number + 1))
        outbox.add_frame(number + 2, frame(number + 2))
        step = make_step(number // length, number % length, first_frame=number + 1)
        assert outbox.add(step)
        made.append(as_sent(step))
    return made


def send_all(outbox: Outbox, learner: Learner) -> None:
    while (message := outbox.next()) is not None:
        learner.take(message)


def deliver(outbox: Outbox, learner: Learner) -> None:
    """Send and ack until there is nothing left."""
    outbox.connected(learner.connected())
    while not outbox.empty:
        before = len(learner.log)
        send_all(outbox, learner)
        assert len(learner.log) > before
        outbox.ack(learner.seq)


def test_sends_each_frame_once_and_before_the_record_that_names_it(tmp_path: Path) -> None:
    outbox = make_outbox(tmp_path)
    fill(outbox, 3)
    outbox.connected(None)
    heads = []
    while (message := outbox.next()) is not None:
        heads.append(wire.unpack_from_robot(message)[0])
    assert heads == [
        wire.FrameHead(id=1, captured_ns=7),
        wire.FrameHead(id=2, captured_ns=14),
        wire.RecordHead(seq=1),
        wire.FrameHead(id=3, captured_ns=21),
        wire.RecordHead(seq=2),
        wire.FrameHead(id=4, captured_ns=28),
        wire.RecordHead(seq=3),
    ]
    assert (outbox.sent, outbox.acked, outbox.resent, outbox.backlog) == (3, 0, 0, 3)


def test_frames_of_a_question_go_out_once_in_a_connection(tmp_path: Path) -> None:
    outbox = make_outbox(tmp_path)
    made = fill(outbox, 1)
    outbox.connected(None)
    learner = Learner()
    for message in frame_messages(outbox, 1, 2):
        learner.take(message)
    assert outbox.frames_for((1, 2)) == {}
    send_all(outbox, learner)  # the learner of these tests refuses a frame that it has
    assert learner.log == made
    outbox.connected(learner.connected())
    assert len(outbox.frames_for((2, 1))) == 2


def test_a_frame_that_the_learner_had_to_forget_is_sent_again(tmp_path: Path) -> None:
    outbox, learner = make_outbox(tmp_path), Learner()
    made = fill(outbox, FRAMES_KEPT)
    outbox.connected(None)
    for frame_id in range(2, FRAMES_KEPT + 2):  # all it can keep, ahead of the records that will name them
        for message in frame_messages(outbox, frame_id):
            learner.take(message)
    send_all(outbox, learner)
    assert learner.log == made


def test_a_question_about_a_lost_frame_is_refused(tmp_path: Path) -> None:
    outbox = make_outbox(tmp_path)
    fill(outbox, FRAMES_KEPT)  # the newest frame is FRAMES_KEPT + 1
    assert len(outbox.frames_for((2, 3))) == 2
    with pytest.raises(ValueError, match="frame 1 is not among the newest 8"):
        outbox.frames_for((1, 2))


def test_a_lost_frame_costs_the_rest_of_its_episode(tmp_path: Path) -> None:
    outbox, learner = make_outbox(tmp_path), Learner()
    made = fill(outbox, 2, length=3)
    assert not outbox.add(make_step(0, 2, first_frame=90))
    outbox.add_frame(90, frame(90))
    outbox.add_frame(91, frame(91))
    assert not outbox.add(make_end(0, 3, first_frame=90))
    made += fill(outbox, 1, first=3, length=3)
    assert outbox.dropped == 2
    deliver(outbox, learner)
    assert learner.log == made


def test_an_ack_ends_a_record(tmp_path: Path) -> None:
    outbox, learner = make_outbox(tmp_path), Learner()
    made = fill(outbox, 5)
    outbox.connected(None)
    send_all(outbox, learner)
    outbox.ack(3)
    outbox.ack(3)
    outbox.ack(2)
    assert (outbox.sent, outbox.acked, outbox.backlog) == (5, 3, 2)
    again = Learner()
    again.position = (0, 2)
    outbox.connected(again.connected())
    send_all(outbox, again)
    assert again.log == made[3:]
    assert outbox.resent == 2
    outbox.ack(5)
    assert outbox.empty
    assert held_bytes(outbox) == 0


def test_an_ack_of_what_was_not_sent_is_refused(tmp_path: Path) -> None:
    outbox = make_outbox(tmp_path)
    fill(outbox, 3)
    outbox.connected(None)
    with pytest.raises(ValueError, match="record 1, which was not sent"):
        outbox.ack(1)
    send_all(outbox, Learner())
    with pytest.raises(ValueError, match="record 4, which was not sent"):
        outbox.ack(4)
    outbox.connected(None)
    with pytest.raises(ValueError, match="record 3, which was not sent"):
        outbox.ack(3)


@pytest.mark.parametrize("position", [None, (0, 0)])
def test_a_learner_that_lost_what_it_acked_is_refused(tmp_path: Path, position: tuple[int, int] | None) -> None:
    outbox = make_outbox(tmp_path)
    fill(outbox, 3)
    outbox.connected(None)
    send_all(outbox, Learner())
    outbox.ack(2)
    there = "nothing" if position is None else "episode 0, index 0"
    with pytest.raises(LinkLost, match=f"has this run up to {there}, and acked it up to episode 0, index 1"):
        outbox.connected(position)


def test_a_learner_that_has_what_was_never_sent_is_refused(tmp_path: Path) -> None:
    outbox = make_outbox(tmp_path)
    fill(outbox, 3)
    with pytest.raises(LinkLost, match="up to episode 0, index 0, and it was sent up to nothing"):
        outbox.connected((0, 0))


def test_a_shared_frame_is_held_once_also_after_it_came_back_from_disk(tmp_path: Path) -> None:
    outbox, learner = make_outbox(tmp_path), Learner()
    fill(outbox, 1)
    one = held_bytes(outbox)
    fill(outbox, 1, first=1)
    assert held_bytes(outbox) - one < OVERHEAD_BYTES + FRAME_BYTES + 150
    fill(outbox, 25, first=2)  # the last of them into files
    assert find_spool(tmp_path)
    outbox.connected(None)
    send_all(outbox, learner)
    outbox.ack(20)
    send_all(outbox, learner)
    held_bytes(outbox)  # compares what is counted with the objects that are there
    outbox.ack(27)
    assert outbox.empty


def test_memory_then_files_then_the_reserve(tmp_path: Path) -> None:
    outbox, learner = make_outbox(tmp_path), Learner()
    made: list[Sent] = []
    while not outbox.full:
        made += fill(outbox, 1, first=len(made))
    assert 0.9 * MEMORY_BYTES / 2 < held_bytes(outbox) < 0.6 * MEMORY_BYTES
    assert 0.8 * SPOOL_BYTES < outbox.backlog_bytes - held_bytes(outbox) <= SPOOL_BYTES
    assert outbox.trouble == ""
    made += fill(outbox, LONGEST, first=len(made))
    with pytest.raises(SafetyStop, match=r"records wait for the learner .* its files are at their limit"):
        fill(outbox, 1000, first=len(made))
    assert held_bytes(outbox) <= MEMORY_BYTES
    assert outbox.backlog_max == outbox.backlog
    waiting = outbox.backlog
    deliver(outbox, learner)
    assert learner.log[: len(made)] == made
    assert len(learner.log) == waiting
    assert not outbox.full
    assert not find_spool(tmp_path)


def test_a_small_record_does_not_overtake_a_large_one(tmp_path: Path) -> None:
    large = 10 * FRAME_BYTES
    outbox, learner = make_outbox(tmp_path, spool_bytes=large), Learner()
    made = fill(outbox, 26)
    assert find_spool(tmp_path)
    outbox.add_frame(40, frame(40, large))
    outbox.add_frame(41, frame(41))
    outbox.add_frame(42, frame(42))
    assert outbox.add(make_step(0, 26, first_frame=40))
    assert outbox.add(make_step(0, 27, first_frame=41))
    deliver(outbox, learner)
    assert learner.log[: len(made)] == made
    assert learner.position == (0, 27)


def test_without_files_the_memory_is_all_there_is(tmp_path: Path) -> None:
    outbox, learner = make_outbox(tmp_path / "none", spool_bytes=0), Learner()
    made: list[Sent] = []
    while not outbox.full:
        made += fill(outbox, 1, first=len(made))
    made += fill(outbox, LONGEST, first=len(made))
    deliver(outbox, learner)
    assert learner.log == made
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("already", [24, 32])  # before the first file, and with some
def test_a_disk_that_is_full_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, already: int) -> None:
    outbox, learner = make_outbox(tmp_path), Learner()
    made = fill(outbox, already)
    with monkeypatch.context() as patch:
        patch.setattr(Appender, "append", refuse)
        made += fill(outbox, LONGEST, first=len(made))
        assert outbox.full
        assert outbox.trouble == f"the disk is full: {tmp_path}"
        with pytest.raises(SafetyStop, match="there is no room for the next: the disk is full"):
            fill(outbox, 1000, first=len(made))
        assert held_bytes(outbox) <= MEMORY_BYTES
        rest = outbox.backlog
    fill(outbox, 1, first=rest)  # the disk takes the reserve as well
    assert outbox.trouble == ""
    assert find_spool(tmp_path)
    deliver(outbox, learner)
    assert learner.log[: len(made)] == made
    assert len(learner.log) == rest + 1


def refuse(appender: Appender, data: bytes) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_former_run_s_records_are_not_mixed_in(tmp_path: Path) -> None:
    outbox = make_outbox(tmp_path)
    fill(outbox, 1)
    outbox.close()
    with pytest.raises(StartError, match="records of another run"):
        make_outbox(tmp_path)


@pytest.mark.parametrize("count", [3, 30, 60])
def test_what_is_not_acked_stays_in_files(tmp_path: Path, count: int) -> None:
    outbox, learner = make_outbox(tmp_path), Learner()
    made = fill(outbox, count)
    outbox.connected(None)
    send_all(outbox, learner)
    outbox.ack(2)
    outbox.close()
    kept = [
        (encode(message), tuple((frames[i].captured_ns, bytes(frames[i].data)) for i in message.frame_ids))
        for message, frames in read_spool(tmp_path)
    ]
    assert kept == made[2:]


@pytest.mark.parametrize("harm", ["cut", "flip", "gone", "short"])
def test_a_damaged_file_ends_the_run(tmp_path: Path, harm: str) -> None:
    outbox = make_outbox(tmp_path)
    fill(outbox, 32)
    oldest = find_spool(tmp_path)[0]
    data = oldest.read_bytes()
    match harm:
        case "cut":
            oldest.write_bytes(data[:-1])
        case "flip":
            oldest.write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
        case "gone":
            oldest.unlink()
        case "short":
            oldest.write_bytes(b"")
    learner = Learner()
    outbox.connected(None)
    send_all(outbox, learner)
    outbox.ack(20)
    with pytest.raises(SafetyStop, match=r"outbox-000001\.spool") as caught:
        send_all(outbox, learner)
    assert "\n" not in str(caught.value)
