"""Log and replay together, fed by several robots: what is in one is in the other, also after a new start."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from relod.runtime.experience import Experience
from relod.runtime.log.codec import make_codec
from relod.runtime.log.format import EncodedFrame, Kind
from relod.runtime.log.reader import LogReader
from relod.runtime.replay import ReplaySampler
from tests.runtime.remote.teaching import RobotTape, make_plan, picture, resumed
from tests.runtime.smallrun import HW


class Bench:
    """Experience with a sampler that hears its news."""

    def __init__(self, folder, plan=None):
        self.folder, self.plan = folder, plan or make_plan(folder)
        self.experience = Experience(self.plan, folder)
        self.sampler = ReplaySampler(self.experience.table, threads=1)
        self.experience.send = self.sampler.apply

    def add(self, stream, *records):
        for message, frames in records:
            self.experience.add_record(stream, message, frames)

    def again(self, **refill):
        """Another process goes on, after this one was killed."""
        bench = Bench(self.folder, resumed(self.plan, self.folder))
        bench.ends = bench.experience.refill(0, **refill)
        return bench

    def transitions(self):
        """All transitions there are to draw: (stream, reward, whether it is an episode's last)."""
        table = self.experience.table
        offered = self.experience.writer._offered
        found = []
        for chunk, row in zip(*np.nonzero(offered), strict=True):
            record = table.rows[chunk, row]
            frame = table.frames[chunk * table.layout.slots + record["slots"][0]].view(np.uint8)
            found.append((int(frame.reshape(-1, 3)[0, 0]) - 1, float(record["reward"]), bool(record["last"])))
        return sorted(found)

    def kinds(self):
        return [(record.kind, record.stream) for record in LogReader(self.folder / "log").iterate()]


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_robots_that_take_turns_keep_their_own_episodes(bench):
    one, two = RobotTape(0), RobotTape(1)
    for _ in range(3):
        bench.add(0, one.step(-1.0))
        bench.add(1, two.step(-2.0))
    bench.add(0, one.end())
    bench.add(1, two.end())
    assert bench.transitions() == [(0, -1.0, False)] * 2 + [(0, -1.0, True)] + [(1, -2.0, False)] * 2 + [
        (1, -2.0, True)
    ]
    assert len(bench.sampler) == 6
    assert bench.experience.positions == {0: (0, 3), 1: (0, 3)}
    assert not bench.experience.open


def test_the_log_holds_the_same_bytes(bench):
    tape = RobotTape()
    bench.add(0, tape.step(), tape.step(), tape.end())
    for record in LogReader(bench.folder / "log").iterate():
        for frame_id, image in record.frames.items():
            assert np.array_equal(image, picture(0, frame_id))
            assert record.frames.captured_ns((frame_id,)) == (100 * frame_id,)


def test_an_episode_begun_while_one_is_open_cuts_that_one(bench):
    tape = RobotTape()
    bench.add(0, tape.step(), tape.step(), tape.step())
    tape.restart_episode()
    bench.add(0, tape.step(), tape.end())
    assert bench.kinds() == [(Kind.STEP, 0)] * 3 + [(Kind.CUT, 0), (Kind.STEP, 0), (Kind.END, 0)]
    assert bench.transitions() == [(0, -1.0, False), (0, -1.0, True), (0, -1.0, True)]


def test_a_step_that_the_robot_lost_cuts_its_episode(bench):
    tape = RobotTape()
    bench.add(0, tape.step(), tape.step())
    tape.lose()
    bench.add(0, tape.step(), tape.step(), tape.end())
    assert [kind for kind, _ in bench.kinds()] == [Kind.STEP] * 2 + [Kind.CUT] + [Kind.STEP] * 2 + [Kind.END]
    assert sum(last for *_, last in bench.transitions()) == 2


def test_a_lost_last_step_cuts_the_episode_before_its_end(bench):
    tape = RobotTape()
    bench.add(0, tape.step(), tape.step())
    tape.lose()
    bench.add(0, tape.end())
    assert [kind for kind, _ in bench.kinds()] == [Kind.STEP] * 2 + [Kind.CUT, Kind.END]
    assert bench.transitions() == [(0, -1.0, True)]


def test_a_bad_image_is_refused_before_anything_is_written(tmp_path):
    bench = Bench(tmp_path, make_plan(tmp_path, codec="jpeg"))
    message, frames = RobotTape().step()
    with pytest.raises(ValueError, match="no JPEG"):
        bench.experience.add_record(0, message, frames)
    assert bench.experience.log.env_steps == 0
    codec = make_codec("jpeg", image_hw=HW)
    good = {i: EncodedFrame(captured_ns=1, data=codec.encode(picture(0, i))) for i in frames}
    bench.experience.add_record(0, message, good)
    assert bench.experience.log.env_steps == 1


def test_a_robot_goes_on_in_its_episode_after_the_learner_was_killed(bench):
    tapes = RobotTape(0), RobotTape(1)
    for stream, tape in enumerate(tapes):
        bench.add(stream, tape.step(), tape.step(), tape.step())
    again = bench.again()
    assert again.experience.positions == {0: (0, 2), 1: (0, 2)}
    assert again.experience.open == {0, 1}
    for stream, tape in enumerate(tapes):
        again.add(stream, tape.step(), tape.end())
    assert Kind.CUT not in dict(again.kinds())
    assert len(again.transitions()) == 8
    assert sum(last for *_, last in again.transitions()) == 2
    assert again.experience.writer.env_steps == again.experience.log.env_steps == 8


def test_positions_of_older_records_are_read_without_filling_the_replay(bench):
    silent, busy = RobotTape(0), RobotTape(1)
    bench.add(0, silent.step(), silent.end())
    bench.add(1, *[busy.step() for _ in range(5)])
    again = Bench(bench.folder, resumed(bench.plan, bench.folder))
    seen = []
    again.experience.refill(3, read_from=0, see=seen.append)
    assert len(seen) == 7
    assert again.experience.positions == {0: (0, 1), 1: (0, 4)}
    assert all(stream == 1 for stream, *_ in again.transitions())


def test_more_streams_than_fit_evict_the_longest_silent(tmp_path):
    bench = Bench(tmp_path, make_plan(tmp_path, robots=2))
    tapes = [RobotTape(stream) for stream in range(5)]
    for turn in range(3):
        for stream, tape in enumerate(tapes):
            bench.add(stream, *[tape.step(-float(turn)) for _ in range(4)])
    assert len(bench.experience.writer._open) <= 2
    for stream, tape in enumerate(tapes):
        bench.add(stream, tape.end())
    assert bench.kinds().count((Kind.CUT, 0)) == 0  # the log loses nothing by it
    again = bench.again()
    assert again.experience.positions == dict.fromkeys(range(5), (0, 12))
    assert again.transitions() == bench.transitions()


def test_a_replay_that_overflows_goes_on(tmp_path):
    bench = Bench(tmp_path, make_plan(tmp_path, robots=3))
    tapes = [RobotTape(stream) for stream in range(3)]
    for _ in range(200):
        for stream, tape in enumerate(tapes):
            bench.add(stream, *[tape.step() for _ in range(7)], tape.end())
    steps = bench.experience.writer.env_steps
    assert steps == 200 * 3 * 7
    assert bench.plan.settings.replay.capacity <= len(bench.transitions()) < steps


def test_a_silent_robots_chunk_does_not_keep_the_whole_log(tmp_path):
    plan = make_plan(tmp_path, robots=2)
    settings = plan.settings
    log = type(settings.log)(codec="raw", segment_mib=1.0, limit_gib=4 / 1024)
    plan = replace(plan, settings=type(settings)(replay=settings.replay, log=log, agent=settings.agent))
    bench = Bench(tmp_path, plan)
    silent, busy = RobotTape(0), RobotTape(1)
    bench.add(0, silent.step())
    for _ in range(500):
        bench.add(1, *[busy.step() for _ in range(10)], busy.end())
    layout = bench.experience.table.layout
    needed = layout.chunks * layout.rows * 1600
    assert bench.experience.log.size_bytes <= max(needed, 4 << 20) + (2 << 20)
    assert min(p.name for p in (tmp_path / "log").iterdir()) != "segment-000001.relodlog"


def test_releasing_what_is_not_there_is_nothing(bench):
    bench.experience.release(7)
    bench.add(7, RobotTape(7).step())
    bench.experience.release(7)
    bench.experience.release(7)
    assert not bench.experience.writer._open
