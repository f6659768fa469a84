"""A learner's run behind its server: who may join, what is kept of them, and how it goes on after a death."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import fields, replace

import msgspec
import numpy as np
import pytest

from relod.algos.agent import flatten_policy
from relod.algos.sac import SAC
from relod.errors import SettingsError
from relod.runtime.experiments import find_runs
from relod.runtime.log.format import Kind
from relod.runtime.log.reader import LogReader
from relod.runtime.policy import PolicyWriter
from relod.runtime.remote.hall import LearnerRun
from relod.runtime.remote.wire import Observe
from relod.runtime.rundir import RunFolder
from relod.types import TaskSpec
from tests.runtime.remote.teaching import OTHER_RUN, RobotTape, make_join, make_plan, resumed
from tests.runtime.smallrun import AGENT, HW, SPEC

LEARNER_ID = "c" * 32
ABOUT = {
    "clock": "wall",
    "mode": "learner",
    "task": "small",
    "algorithm": "sac",
    "preset": "",
    "device": "",
    "world": "",
}


@pytest.fixture
def start(tmp_path):
    """Runs that go on in one folder after another, each closed as a kill would close it: without a word."""
    opened = []

    def begin() -> LearnerRun:
        plan = make_plan(tmp_path)
        if opened:
            folder, former = opened[-1]
            former.close()
            folder.close()
            plan = resumed(plan, folder.path, session=len(opened) + 1)
            folder = RunFolder.reopen(folder.path, plan.settings, {})
        else:
            folder = RunFolder.create("learner", plan.settings, ABOUT)
        run = LearnerRun(plan, folder, learner_id=LEARNER_ID)
        if plan.resume is not None:
            run.restore(None)
        opened.append((folder, run))
        return run

    yield begin
    folder, run = opened[-1]
    run.close()
    folder.close()


def feed(run, admission, *records):
    for message, frames in records:
        run.record(admission, message, frames)


def test_a_robot_is_told_what_it_needs(start):
    run = start()
    admission = run.admit(make_join())
    welcome = admission.welcome
    assert (welcome.learner, welcome.algorithm, welcome.seed, welcome.position) == (LEARNER_ID, "sac", 0, None)
    assert welcome.policy_size == run.learner.box.size
    assert msgspec.convert(welcome.agent, type(AGENT)) == AGENT
    assert welcome.run_dir == str(run.folder.path)


def test_policies_travel_in_the_precision_that_the_algorithm_needs(start):
    run = start()
    assert run.admit(make_join()).welcome.precision == "float16"
    run.learner.needs = dataclasses.replace(run.learner.needs, precision="float32")
    assert run.admit(make_join()).welcome.precision == "float32"


def test_no_two_robots_explore_alike(start):
    run = start()
    seeds = [run.admit(make_join(name)).welcome.seed for name in ("x", "y")]
    assert len(set(seeds)) == 2


@pytest.mark.parametrize("name", [field.name for field in fields(TaskSpec)])
def test_a_robot_of_another_task_is_told_in_which_field(start, name):
    run = start()
    value = getattr(SPEC, name)
    other = "other" if isinstance(value, str) else (*value, value[-1]) if isinstance(value, tuple) else value + 1
    if name.endswith("_hw"):
        other = (value[0] + 1, value[1])
    with pytest.raises(SettingsError, match=f"its {name} is"):
        run.admit(make_join(task=replace(SPEC, **{name: other})))
    assert not run.robots


def test_a_robot_of_another_codec_or_algorithm_is_refused(start):
    run = start()
    with pytest.raises(SettingsError, match=r"sends jpeg images.*--image-codec raw"):
        run.admit(make_join(codec="jpeg"))
    with pytest.raises(SettingsError, match=r"acts with ppo.*teaches sac"):
        run.admit(make_join(algorithm="ppo"))
    run.admit(make_join(algorithm=""))


def test_what_is_acked_is_found_again_after_a_kill(start):
    run, tape = start(), RobotTape()
    feed(run, run.admit(make_join()), tape.step(), tape.step(), tape.end(), tape.step())
    again = start()
    admission = again.admit(make_join())
    assert admission.stream == 0
    assert admission.welcome.position == (1, 0)
    assert admission.welcome.env_steps == 3
    feed(again, admission, tape.step(), tape.end())
    assert [record.kind for record in LogReader(again.folder.path / "log").iterate()] == [
        *(Kind.STEP, Kind.STEP, Kind.END),
        *(Kind.STEP, Kind.STEP, Kind.END),
    ]


def test_a_new_run_of_a_robot_cuts_what_the_old_one_left_open(start):
    run, tape = start(), RobotTape()
    feed(run, run.admit(make_join()), tape.step(), tape.step())
    feed(run, other := run.admit(make_join("y")), RobotTape(1).step())
    again = run.admit(make_join(run=OTHER_RUN))
    assert (again.stream, again.welcome.position) == (2, None)
    assert run.experience.open == {other.stream}
    assert run.robots["x"].joins == 2


def test_positions_survive_the_deletion_of_what_they_name(start):
    run, silent, busy = start(), RobotTape(0), RobotTape(1)
    first, second = run.admit(make_join("silent")), run.admit(make_join("busy"))
    feed(run, first, silent.step(), silent.step())
    log = run.experience.log
    while log.position.segment < 3:
        feed(run, second, *[busy.step() for _ in range(30)], busy.end())
    for path in sorted((run.folder.path / "log").iterdir())[:1]:
        path.unlink()  # as the size limit does
    again = start()
    assert again.admit(make_join("silent")).welcome.position == (0, 1)
    assert again.admit(make_join("busy")).welcome.position == again.experience.positions[1]


def test_a_log_that_lost_its_tail_decides_over_the_book(start):
    run, tape = start(), RobotTape()
    admission = run.admit(make_join())
    feed(run, admission, *[tape.step() for _ in range(5)])
    run.left(admission)
    path = next((run.folder.path / "log").iterdir())
    run.experience.log.sync()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 3)
    assert start().admit(make_join()).welcome.position == (0, 3)


def test_episodes_that_the_folder_missed_are_told_after_a_kill(start):
    run, tapes = start(), (RobotTape(0), RobotTape(1))
    admissions = [run.admit(make_join(name)) for name in ("x", "y")]
    for tape, admission in zip(tapes, admissions, strict=True):
        feed(run, admission, tape.step(), tape.step())
    feed(run, admissions[0], tapes[0].end())
    message, frames = tapes[1].end()
    run.experience.add_record(1, message, frames)  # killed before the folder had it
    again = start()
    lines = again.folder.episodes()
    assert [(line.steps, line.length) for line in lines] == [(4, 2), (4, 2)]
    assert again.episodes == 2
    assert len(start().folder.episodes()) == 2


def test_its_folder_can_be_plotted(start):
    run, tape = start(), RobotTape()
    feed(run, run.admit(make_join()), tape.step(), tape.step(), tape.end())
    runs, _ = find_runs([run.folder.path])
    assert [episode.return_ for episode in runs[0].episodes] == [-2.0]
    assert runs[0].episodes[0].experience_s == pytest.approx(2 * 0.045)


def test_it_counts_what_each_robot_did(start):
    run, tape = start(), RobotTape()
    admission = run.admit(make_join())
    feed(run, admission, tape.step(), tape.end(), tape.step(policy_version=(1, 9)))
    run.left(admission)
    run.admit(make_join())
    book = run.robots["x"]
    assert (book.joins, book.steps, book.ends, list(book.returns)) == (2, 2, 1, [-1.0])
    assert book.policy_version == (1, 9)
    assert run.env_steps == 2


def test_the_end_cuts_what_is_open_in_log_and_replay(start):
    run, tape = start(), RobotTape()
    feed(run, run.admit(make_join()), tape.step(), tape.step())
    run.close_episodes()
    assert [record.kind for record in LogReader(run.folder.path / "log").iterate()][-1] is Kind.CUT
    assert not run.experience.writer._open


# -- acting ------------------------------------------------------------------------------------------------------------

IMAGES = tuple(np.full((*HW, 3), value, np.uint8) for value in (10, 20))
PROPRIO = np.zeros(1, np.float32)


def ask(run, admission, count=1):
    head = Observe(ask=1, episode=0, index=0, frame_ids=(1, 2), now_ns=5)
    return [run.act(admission, IMAGES, head, PROPRIO) for _ in range(count)]


def publish(run, version):
    flat = flatten_policy(SAC.build_actor(SPEC, AGENT))
    PolicyWriter(run.learner.box).publish(flat, version)
    return flat


def warmed(run):
    """Past its random actions."""
    run.experience.log.env_steps = AGENT.init_steps
    return run


def test_random_actions_are_held_for_each_robot_by_itself(start):
    run = start()
    one, two = (run.admit(make_join(name, acts="learner")) for name in ("x", "y"))
    first, other = ask(run, one)[0], ask(run, two)[0]
    assert first[2] == other[2] == (0, 0)
    assert first[0] != other[0]
    held = SAC.needs(SPEC, AGENT).init_hold
    assert all(np.array_equal(answer[0], first[0]) for answer in ask(run, one, held - 1))


def test_the_newest_policy_acts(start):
    run = start()
    admission = run.admit(make_join(acts="learner"))
    publish(run, (1, 3))
    assert ask(warmed(run), admission)[0][2] == (0, 0)  # nobody has looked yet
    assert asyncio.run(run.policies.take())[1] == (1, 3)
    action, _, version, *_ = ask(run, admission)[0]
    assert version == (1, 3)
    assert action.shape == (1,)
    assert np.all(np.abs(action) <= 1)


def test_a_policy_is_taken_once_and_copied(start):
    run = start()
    assert asyncio.run(run.policies.take()) is None
    flat = publish(run, (1, 3))
    values, version = asyncio.run(run.policies.take())
    assert np.array_equal(values, flat)
    assert asyncio.run(run.policies.take()) is None
    for number in range(4, 8):
        publish(run, (1, number))
    assert np.array_equal(values, flat)
    assert version == (1, 3)
