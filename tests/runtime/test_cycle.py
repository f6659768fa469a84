"""The pure control cycle: phases, bookkeeping of steps and episodes, and that every way out commands a stop."""

from __future__ import annotations

import itertools
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relod.config import SafetySettings
from relod.errors import SafetyStop
from relod.packages import Watch
from relod.robots.limits import Limits
from relod.runtime.clock import NS_PER_MS
from relod.runtime.cycle import Phase, Tick
from relod.types import Command, Outcome, SensorWindow
from tests.fakes import CYCLE_NS, FULL_SPEED, RESET_SPEED, STOP, Bench, DistantActor, FakeTask, ScriptedActor


def running(bench: Bench, steps: int = 0) -> Bench:
    """The bench in an episode after `steps` completed steps."""
    bench.until(Phase.RUNNING)
    for _ in range(steps):
        assert bench.tick().step is not None
    return bench


# -- phases ------------------------------------------------------------------------------------------------------------


def test_the_first_cycles_hold_reset_wait_and_run():
    bench = Bench(FakeTask(reset_cycles=2))
    ticks = [bench.tick() for _ in range(6)]
    assert [t.phase for t in ticks] == [
        Phase.RESETTING,
        Phase.RESETTING,
        Phase.WAITING,
        Phase.WAITING,
        Phase.RUNNING,
        Phase.RUNNING,
    ]
    assert [t.command.values for t in ticks[:4]] == [(RESET_SPEED,), (RESET_SPEED,), (0.0,), (0.0,)]
    assert [t.step is not None for t in ticks] == [False] * 5 + [True]


def test_it_stands_and_starts_nothing_while_senses_are_missing():
    bench = Bench()
    for senses in ({"packet": False}, {"frame": False}, {"packet": False, "frame": False}):
        tick = Bench().tick(**senses)
        assert (tick.phase, tick.command) == (Phase.HOLDING, STOP)
    assert bench.task.resets == 0


def test_a_reset_is_sent_the_time_and_the_newest_window():
    bench = Bench(FakeTask(reset_cycles=2))
    bench.until(Phase.WAITING)
    assert bench.task.seen_in_reset == [bench.now_ns - CYCLE_NS, bench.now_ns]


def test_a_reset_that_has_nothing_to_do_is_over_at_once():
    bench = Bench(FakeTask(reset_cycles=0))
    tick = bench.tick()
    assert (tick.phase, tick.command) == (Phase.WAITING, STOP)
    bench.until(Phase.RUNNING)


def test_a_reset_stands_while_senses_are_stale_and_goes_on_afterwards():
    bench = Bench(FakeTask(reset_cycles=20))
    bench.until(Phase.RESETTING)
    tick = bench.go(10, packet=False)
    assert (tick.phase, tick.command) == (Phase.RESETTING, STOP)
    assert bench.tick().command.values == (RESET_SPEED,)
    assert bench.task.resets == 1


@pytest.mark.parametrize("missing", ["packet", "frame"])
def test_an_episode_starts_only_when_all_it_sees_is_younger_than_the_resets_end(missing):
    bench = Bench(FakeTask(reset_cycles=1))
    bench.until(Phase.WAITING)
    reset_end_ns = bench.now_ns
    # One new packet or frame is not enough: the observation has two of each, and the other is from the reset.
    bench.tick()
    for _ in range(3):
        tick = bench.tick(**{missing: False})
        assert (tick.phase, tick.command) == (Phase.WAITING, STOP)
    assert bench.tick().phase is Phase.RUNNING
    assert bench.senses.frames[-2].captured_ns > reset_end_ns
    assert bench.senses.packets[-2][0] > reset_end_ns


def test_what_was_taken_before_the_resets_end_but_arrives_later_does_not_count():
    bench = Bench(FakeTask(reset_cycles=1))
    bench.until(Phase.WAITING)
    for _ in range(4):
        assert bench.tick(age_ns=4 * CYCLE_NS + 1).phase is Phase.WAITING


# -- steps and episodes ------------------------------------------------------------------------------------------------


def test_a_step_has_the_observation_the_action_and_the_outcome_seen_one_cycle_later():
    bench = running(Bench(actor=ScriptedActor([0.25, -0.5])))
    began_ns = bench.now_ns
    tick = bench.tick()
    step, (first, second) = tick.step, bench.actor.observations
    assert step is not None
    assert (step.episode, step.index, step.reward, step.policy_version) == (0, 0, -1.0, (1, 7))
    assert (step.terminated, step.truncated) == (False, False)
    assert step.frame_ids == first.frame_ids
    assert (step.observed_ns, step.acted_ns) == (began_ns, began_ns)
    np.testing.assert_array_equal(step.proprio, first.proprio)
    assert step.action.tolist() == [0.25]
    assert second.now_ns == bench.now_ns
    assert tick.command.values == (-0.5 * FULL_SPEED,)
    # The outcome was judged in the newest senses, not in those of the observation.
    index, x, grey = bench.task.judged[-1]
    assert (index, x, grey) == (0, second.proprio[0], second.frame_ids[-1])


def test_images_of_an_observation_are_those_of_its_frame_ids_oldest_first():
    bench = running(Bench(), steps=2)
    for observation in bench.actor.observations:
        assert observation.frame_ids[0] + 1 == observation.frame_ids[1]
        assert tuple(int(image[0, 0, 0]) for image in observation.images) == observation.frame_ids


def test_each_image_is_shrunk_once():
    bench = Bench()
    seen: list[int] = []

    def shrink(image):
        seen.append(int(image[0, 0, 0]))
        return image

    bench.cycle._shrink = shrink
    running(bench, steps=3)
    assert len(seen) == len(set(seen))


def test_an_episode_at_its_time_limit_is_truncated_and_closed_with_its_last_observation():
    bench = running(Bench(), steps=4)
    tick = bench.tick()
    assert tick.step is not None
    assert tick.end is not None
    assert (tick.step.index, tick.step.terminated, tick.step.truncated) == (4, False, True)
    end = tick.end
    assert (end.episode, end.length, end.return_, end.terminated, end.reason) == (0, 5, -5.0, False, "time limit")
    assert end.observed_ns == bench.now_ns
    assert end.frame_ids == tuple(frame.id for frame in bench.senses.frames[-2:])
    assert end.proprio[1] == tick.step.action[0]
    assert (tick.phase, tick.command) == (Phase.HOLDING, STOP)
    assert len(bench.actor.observations) == 5  # nobody was asked for an action that would never be taken


def test_a_terminated_episode_is_not_truncated():
    goal = Outcome(reward=3.0, terminated=True, truncated=True, reason="goal")
    tick = running(Bench(FakeTask(outcomes={1: goal})), steps=1).tick()
    assert tick.step is not None
    assert tick.end is not None
    assert (tick.step.terminated, tick.step.truncated, tick.step.reward) == (True, False, 3.0)
    assert (tick.end.terminated, tick.end.reason, tick.end.return_) == (True, "goal", 2.0)


def test_steps_and_episodes_count_on_across_resets():
    bench = Bench()
    for _ in range(40):
        bench.tick()
    steps = [t.step for t in bench.ticks if t.step is not None]
    ends = [t.end for t in bench.ticks if t.end is not None]
    assert len(ends) >= 3
    assert [e.episode for e in ends] == list(range(len(ends)))
    assert bench.cycle.steps == len(steps)
    for before, after in pairwise(steps):
        same = after.episode == before.episode
        assert after.index == (before.index + 1 if same else 0)
        assert same or after.frame_ids[0] > before.frame_ids[-1]
    assert bench.task.resets in (len(ends), len(ends) + 1)  # one may be open


def test_the_runs_last_step_ends_it():
    bench = Bench(max_steps=7)
    tick = bench.until(Phase.OVER)
    assert bench.cycle.steps == 7
    assert tick.step is not None
    assert tick.end is not None
    assert (tick.step.truncated, tick.step.terminated, tick.end.reason, tick.end.length) == (
        True,
        False,
        "end of the run",
        2,
    )
    after = bench.tick()
    assert (after.phase, after.command, after.step, after.end) == (Phase.OVER, STOP, None, None)


def test_a_last_step_that_reaches_the_goal_says_so():
    goal = Outcome(reward=0.0, terminated=True, reason="goal")
    tick = Bench(FakeTask(outcomes={2: goal}), max_steps=3).until(Phase.OVER)
    assert tick.step is not None
    assert tick.end is not None
    assert (tick.step.terminated, tick.step.truncated, tick.end.reason) == (True, False, "goal")


@pytest.mark.parametrize("history", [0, 1, 2, 3])
def test_previous_actions_are_the_newest_oldest_first_and_zero_after_a_reset(history):
    actor = ScriptedActor([0.1 * n for n in range(1, 6)])
    bench = running(Bench(FakeTask(action_history=history), actor), steps=5)
    end = bench.ticks[-1].end
    assert end is not None
    taken = [0.0] * history + [0.1 * n for n in range(1, 6)]
    shown = [o.proprio[1:] for o in actor.observations] + [end.proprio[1:]]
    for number, previous in enumerate(shown):
        np.testing.assert_allclose(previous, taken[number : number + history], rtol=1e-6)
    bench.until(Phase.RUNNING)
    assert not actor.observations[-1].proprio[1:].any()


# -- trouble -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("missing", "reason"), [("packet", "no sensor data"), ("frame", "no camera image")])
def test_stale_senses_close_the_episode_at_the_last_fresh_observation(missing, reason):
    bench = running(Bench(FakeTask(outcomes={n: Outcome(reward=-1.0) for n in range(99)})), 3)
    while True:
        tick = bench.tick(**{missing: False})
        if tick.phase is not Phase.RUNNING:
            break
    completed = [t.step for t in bench.ticks if t.step is not None]
    last = bench.actor.observations[-1]
    assert tick.step is None  # the step in flight has no trustworthy outcome
    assert tick.end is not None
    assert (tick.phase, tick.command, tick.end.reason) == (Phase.HOLDING, STOP, reason)
    assert reason in tick.event
    assert (tick.end.length, tick.end.terminated) == (len(completed), False)
    assert (tick.end.observed_ns, tick.end.frame_ids) == (last.now_ns, last.frame_ids)
    np.testing.assert_array_equal(tick.end.proprio, last.proprio)
    resets = bench.task.resets
    assert bench.tick().phase is Phase.RESETTING
    assert bench.task.resets == resets + 1


@pytest.mark.parametrize(("missing", "limit_ms"), [("packet", 250.0), ("frame", 500.0)])
def test_senses_are_stale_just_past_their_limit(missing, limit_ms):
    bench = running(Bench(FakeTask(outcomes={n: Outcome(reward=0.0) for n in range(99)})))
    fresh_ns = bench.now_ns - 5 * NS_PER_MS
    while bench.tick(**{missing: False}).phase is Phase.RUNNING:
        assert bench.now_ns - fresh_ns <= limit_ms * NS_PER_MS
    assert limit_ms * NS_PER_MS < bench.now_ns - fresh_ns <= limit_ms * NS_PER_MS + CYCLE_NS


def test_an_episode_without_a_completed_step_leaves_no_end():
    bench = running(Bench())
    bench.epoch = 2.0
    tick = bench.tick()
    assert (tick.phase, tick.end, tick.step, bench.cycle.episode) == (Phase.HOLDING, None, None, 0)


def test_a_robot_that_was_connected_again_ends_the_episode():
    bench = running(Bench(), steps=2)
    bench.epoch = 2.0
    tick = bench.tick()
    assert tick.end is not None
    assert (tick.phase, tick.command, tick.end.length) == (Phase.HOLDING, STOP, 2)
    assert "connected again" in tick.end.reason
    bench.until(Phase.RUNNING)
    assert bench.tick().step is not None  # the new connection is the one to compare with


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_action_that_is_no_number_stops_the_robot_at_once_and_is_counted(bad):
    slow = Limits(low=(-FULL_SPEED,), high=(FULL_SPEED,), max_slew=(10.0,))
    bench = running(Bench(FakeTask(limits=slow), ScriptedActor([1.0, 1.0, bad, 1.0])), steps=1)
    assert bench.ticks[-1].command.values == (20.0,)
    tick = bench.tick()
    assert (tick.phase, tick.command, bench.cycle.rejected) == (Phase.RUNNING, STOP, 1)
    following = bench.tick()
    assert following.step is not None
    assert following.step.action.tolist() == [0.0]  # what was done, so that nobody learns from NaN
    assert following.command.values == (10.0,)
    assert bench.cycle.rejected == 1


def test_limits_hold_for_every_command():
    narrow = Limits(low=(-30.0,), high=(20.0,), max_slew=(8.0,))
    bench = running(Bench(FakeTask(limits=narrow), ScriptedActor([1.0, 1.0, 1.0, -1.0])), steps=4)
    assert [t.command.values[0] for t in bench.ticks[-5:]] == [8.0, 16.0, 20.0, 12.0, 4.0]


@given(script=st.lists(st.floats(-1e9, 1e9) | st.just(float("nan")), min_size=1, max_size=20))
def test_no_script_of_actions_leaves_the_limits(script):
    bench = Bench(actor=ScriptedActor(script))
    for _ in range(30):
        values = bench.tick().command.values
        bound = FULL_SPEED if bench.cycle.phase is Phase.RUNNING else RESET_SPEED
        assert all(abs(value) <= bound for value in values)


@pytest.mark.parametrize("missing", ["packet", "frame"])
def test_senses_that_stay_away_end_the_run(missing):
    bench = running(Bench(safety=SafetySettings(stall_limit_s=2.0)))
    began_ns = bench.now_ns
    with pytest.raises(SafetyStop, match="for 2 s; the robot was stopped"):
        bench.go(1000, **{missing: False})
    assert bench.ticks[-1].command == STOP
    assert 2.0 < (bench.now_ns - began_ns) / 1e9 < 2.0 + 0.5 + 0.1


def test_a_wait_for_fresh_senses_is_bounded_too():
    bench = Bench(FakeTask(reset_cycles=1), safety=SafetySettings(stall_limit_s=0.3))
    bench.until(Phase.WAITING)
    with pytest.raises(SafetyStop, match="after the reset for"):
        bench.go(10, frame=False)


def test_short_gaps_do_not_add_up():
    bench = Bench(FakeTask(reset_cycles=1), safety=SafetySettings(stall_limit_s=1.0))
    for _ in range(5):
        bench.until(Phase.RUNNING)
        bench.go(15, packet=False)


# -- the end of a run --------------------------------------------------------------------------------------------------


def in_phase(phase: Phase) -> Bench:
    bench = Bench()
    if phase is not Phase.HOLDING:
        bench.until(phase)
    return bench


@pytest.mark.parametrize("phase", [Phase.HOLDING, Phase.RESETTING, Phase.WAITING, Phase.RUNNING])
def test_an_interruption_stops_the_robot_in_any_phase(phase):
    bench = in_phase(phase)
    tick = bench.cycle.interrupt("Ctrl-C")
    assert (tick.phase, tick.command, tick.step, tick.end) == (Phase.OVER, STOP, None, None)
    assert (bench.tick().phase, bench.tick().command) == (Phase.OVER, STOP)


def test_an_interruption_closes_the_episode_and_drops_the_step_in_flight():
    bench = running(Bench(), steps=3)
    last = bench.actor.observations[-1]
    tick = bench.cycle.interrupt("Ctrl-C")
    assert tick.end is not None
    assert (tick.end.length, tick.end.reason, tick.end.terminated) == (3, "Ctrl-C", False)
    assert tick.end.frame_ids == last.frame_ids
    assert bench.cycle.interrupt("again").end is None


def moving(tick: Tick) -> bool:
    return any(tick.command.values)


@given(gaps=st.lists(st.sampled_from(["none", "packet", "frame", "epoch"]), min_size=20, max_size=120))
def test_whatever_goes_missing_the_robot_moves_only_in_resets_and_episodes(gaps):
    bench = Bench()
    for gap in gaps:
        bench.epoch += gap == "epoch"
        tick = bench.tick(packet=gap != "packet", frame=gap != "frame")
        if tick.phase not in (Phase.RUNNING, Phase.RESETTING):
            assert not moving(tick)
        assert (tick.end is None) or tick.phase in (Phase.HOLDING, Phase.OVER)
    ends = [t.end for t in bench.ticks if t.end is not None]
    for end in ends:
        steps = [t.step for t in bench.ticks if t.step is not None and t.step.episode == end.episode]
        assert end.length == len(steps)
        assert end.return_ == sum(step.reward for step in steps)


# -- held between episodes ---------------------------------------------------------------------------------------------


def test_a_hold_begins_no_episode_and_ends_none():
    bench = Bench()
    assert bench.go(5, hold="waiting").phase is Phase.HOLDING
    assert bench.task.resets == 0
    bench.until(Phase.WAITING)
    assert bench.go(10, hold="waiting").phase is Phase.WAITING
    running(bench, steps=2)
    assert bench.go(3, hold="waiting").step is not None


def test_a_hold_may_last():
    bench = Bench()
    bench.until(Phase.WAITING)
    bench.go(int(2 * SafetySettings().stall_limit_s * 1e9 / CYCLE_NS), hold="waiting")
    bench.until(Phase.RUNNING)


# -- actions that come later -------------------------------------------------------------------------------------------


def distant(*answers: float, **options) -> Bench:
    """A bench in an episode whose actor is elsewhere, after as many answered cycles."""
    bench = Bench(actor=DistantActor(), **options)
    bench.until(Phase.RUNNING)
    for value in answers:
        assert bench.answer(value) is not None
        bench.tick()
    return bench


def test_an_answer_within_its_cycle_is_the_steps_action():
    bench = distant()
    tick = bench.ticks[-1]
    assert (tick.asked, tick.command) == (bench.actor.observations[-1], STOP)
    command = bench.answer(0.5, after_ms=7)
    assert command is not None
    assert command.values == (0.5 * FULL_SPEED,)
    asked = bench.actor.observations[-1]
    step = bench.tick().step
    assert step is not None
    assert (step.action.tolist(), step.observed_ns) == ([0.5], asked.now_ns)
    assert step.acted_ns == asked.now_ns + 7 * NS_PER_MS
    assert bench.cycle.late == 0


def test_until_the_first_answer_the_robot_stands_and_no_step_is_made():
    bench = distant()
    tick = bench.tick()
    assert (tick.step, tick.command, tick.asked) == (None, STOP, bench.actor.observations[-1])
    assert bench.answer(0.5) is not None
    step = bench.tick().step
    assert step is not None
    assert (step.index, step.observed_ns) == (0, bench.actor.observations[-2].now_ns)


def test_an_action_that_is_late_is_held_and_recorded_as_what_was_done():
    bench = distant(0.5)
    tick = bench.tick()  # what was asked before has no answer
    assert tick.step is not None
    assert (tick.step.action.tolist(), tick.command.values) == ([0.5], (0.5 * FULL_SPEED,))
    assert bench.cycle.late == 1


class CarefulTask(FakeTask):
    """Drives only as long as `x` is small."""

    def command(self, action: np.ndarray, window: SensorWindow) -> Command:
        return super().command(action, window) if window.newest("x") < self.edge else STOP


def test_an_action_that_is_held_is_a_command_by_where_the_robot_is_now():
    task = CarefulTask()
    task.edge = math.inf
    bench = distant(0.5, task=task)
    assert bench.tick().command.values == (0.5 * FULL_SPEED,)
    task.edge = 0.0
    assert bench.tick().command == STOP


def test_a_late_answer_counts_for_the_cycle_in_which_it_comes():
    bench = distant(0.5)
    bench.tick()
    command = bench.answer(-0.25, asked=-2)
    assert command is not None
    assert command.values == (-0.25 * FULL_SPEED,)
    step = bench.tick().step
    assert step is not None
    assert step.action.tolist() == [-0.25]
    assert bench.cycle.late == 2


def test_a_link_always_one_cycle_late_still_drives_the_robot():
    bench = distant(0.5)
    for value in (-1.0, 0.2, 1.0):
        tick = bench.tick()
        assert tick.step is not None
        assert bench.answer(float(value), asked=-2) is not None
    assert bench.cycle.phase is Phase.RUNNING


def test_an_older_answer_after_a_newer_one_is_of_no_use():
    bench = distant(0.5)
    bench.tick()
    assert bench.answer(0.1) is not None
    assert bench.answer(0.9, asked=-2) is None
    step = bench.tick().step
    assert step is not None
    assert step.action.tolist() == [np.float32(0.1)]


def test_without_answers_the_robot_stands_after_two_held_cycles_and_the_episode_is_closed():
    bench = distant(0.5, 0.5)
    assert moving(bench.tick())  # held while the answer to what was asked before might come, and once more
    tick = bench.tick()
    assert (tick.phase, tick.command, tick.step) == (Phase.HOLDING, STOP, None)
    assert tick.end is not None
    assert (tick.end.length, tick.end.terminated) == (3, False)
    assert "learner" in tick.end.reason
    assert bench.answer(0.5) is None  # it comes after the end
    bench.until(Phase.RUNNING)


def test_an_answer_to_the_episode_before_is_of_no_use():
    bench = distant(0.5)
    asked = len(bench.actor.observations) - 1
    bench.go(3)
    bench.until(Phase.RUNNING)
    assert bench.answer(0.7, asked=asked) is None


def test_an_answer_with_nan_makes_the_robot_stand():
    bench = distant(0.5)
    command = bench.answer(float("nan"))
    assert command == STOP
    assert bench.cycle.rejected == 1


def test_two_answers_in_a_cycle_slew_from_where_the_cycle_began():
    task = FakeTask()
    task.limits = Limits(low=(-FULL_SPEED,), high=(FULL_SPEED,), max_slew=(10.0,))
    bench = distant(0.0, task=task)
    bench.tick()
    assert bench.answer(1.0, asked=-2).values == (10.0,)
    assert bench.answer(1.0).values == (10.0,)


def test_a_watch_knows_the_actor_by_its_name_and_when_it_was_asked():
    class Named(ScriptedActor):
        name = "package.Policy.forward"

    for actor, name in ((Named(), "package.Policy.forward"), (ScriptedActor(), "the actor")):
        watch = Watch(itertools.count(1000, 7).__next__)
        bench = running(Bench(actor=actor, watch=watch))
        start_ns, end_ns = watch.calls[name]
        assert bench.cycle.actor_name == name
        assert end_ns - start_ns == 7
        watch.restart()
        assert not watch.calls
