"""The learner's loop under virtual time: when it updates, what it publishes, how it goes on and how it goes back."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from relod.algos.sac import SAC, SacSettings
from relod.config import load
from relod.errors import EXIT_SAFETY, SafetyStop, SettingsError
from relod.runtime.checkpoint import PUBLISHED_POLICY, Checkpoint, newest_readable, write_checkpoint
from relod.runtime.clock import NS_PER_S
from relod.runtime.replay import ReplayNews
from relod.runtime.sources import BURST_S, UpdateSchedule
from tests.runtime.smallrun import AGENT, SPEC, Run, make_learner

# -- schedule ----------------------------------------------------------------------------------------------------------

steps = st.integers(0, 1000)


@given(cap=st.floats(0.01, 10), update_after=st.integers(0, 100), env_steps=steps, updates=st.integers(0, 500))
def test_the_schedule_never_passes_its_cap_and_always_reaches_it(cap, update_after, env_steps, updates):
    due = UpdateSchedule(cap, update_after).due(env_steps, updates, 0)
    earned = cap * max(0, env_steps - update_after)
    assert due >= 0
    assert due == 0 or updates + due <= earned + 1e-6
    assert updates + due > earned - 1


@given(cap=st.floats(0.01, 10), every=st.floats(0.1, 100), env_steps=steps)
def test_the_stricter_of_both_caps_per_step_holds(cap, every, env_steps):
    both = UpdateSchedule(cap, 10, update_every_steps=every)
    assert both.due(env_steps, 0, 0) == min(
        UpdateSchedule(cap, 10).due(env_steps, 0, 0), UpdateSchedule(1 / every, 10).due(env_steps, 0, 0)
    )


@given(rate=st.floats(0.5, 1000), pauses_ns=st.lists(st.integers(0, 3 * NS_PER_S), min_size=1, max_size=30))
def test_the_rate_limit_holds_over_every_stretch_of_time_and_a_busy_learner_reaches_it(rate, pauses_ns):
    schedule = UpdateSchedule(1e9, 0, max_updates_per_s=rate)
    now_ns, done_at = NS_PER_S, []
    for pause_ns in pauses_ns:
        now_ns += pause_ns
        for _ in range(schedule.due(1, 0, now_ns)):
            schedule.spend(now_ns)
            done_at.append(now_ns)
        assert schedule.due(1, 0, now_ns) == 0
        wait_ns = schedule.held_ns(1, 0, now_ns)
        assert wait_ns is not None
        assert schedule.due(1, 0, now_ns + wait_ns - 1) == 0
        assert schedule.due(1, 0, now_ns + wait_ns) == 1
    for first in range(len(done_at)):
        for last in range(first, len(done_at)):
            elapsed_s = (done_at[last] - done_at[first]) / NS_PER_S
            assert last - first + 1 <= rate * (elapsed_s + BURST_S) * (1 + 1e-6) + 1


def test_a_limit_of_20_updates_a_second_is_reached_between_cycles_and_kept_after_a_pause():
    schedule = UpdateSchedule(10, 0, max_updates_per_s=20)

    def updates_in(cycles: int, start_ns: int) -> int:
        done = 0
        for cycle in range(cycles):
            now_ns = start_ns + cycle * 45_000_000
            due = schedule.due(10**6, 0, now_ns)
            for _ in range(due):
                schedule.spend(now_ns)
            done += due
        return done

    assert updates_in(1000, NS_PER_S) in range(899, 903)  # 45 s
    assert updates_in(1000, 1000 * NS_PER_S) in range(899, 903)  # what the pause of 15 minutes saved up is lost


@pytest.mark.parametrize("rate", [0.5, 5.0, 20.0])
def test_an_update_that_comes_late_does_not_lower_the_rate(rate):
    schedule = UpdateSchedule(1, 0, max_updates_per_s=rate)
    now_ns, done = 0, 0
    while now_ns < 100 * NS_PER_S:
        wait_ns = schedule.held_ns(10**6, 0, now_ns)
        assert wait_ns is not None
        now_ns += wait_ns + 13_000_000  # an update's own time
        schedule.spend(now_ns)
        done += 1
    assert abs(done - 100 * rate) <= 3


def test_steps_that_are_missing_are_not_the_rate_limits_doing():
    schedule = UpdateSchedule(1, 10, max_updates_per_s=1)
    assert schedule.held_ns(10, 0, 0) is None
    assert UpdateSchedule(1, 10).held_ns(100, 0, 0) is None


def test_the_papers_small_computers_are_profiles_over_any_preset():
    sections = {"agent": SacSettings}
    presets = {name: {k: v for k, v in tree.items() if k != "task"} for name, tree in SAC.presets.items()}
    for preset in presets.values():
        laptop = load(sections, presets=[preset, SAC.profiles["laptop"]])
        assert (laptop.agent.batch_size, laptop.replay.capacity) == (64, 16_000)
        assert laptop.learner.update_every_steps == 0
        nano = load(sections, presets=[preset, SAC.profiles["jnano-em"]])
        assert (nano.agent.batch_size, nano.replay.capacity) == (64, 16_000)
        schedule = UpdateSchedule(
            nano.agent.max_updates_per_step, 1000, update_every_steps=nano.learner.update_every_steps
        )
        assert [schedule.due(1000 + step, 0, 0) for step in (11, 12, 23, 24, 120_000)] == [0, 1, 1, 2, 10_000]


# -- updates and policies ----------------------------------------------------------------------------------------------


def test_updates_follow_the_steps_under_virtual_time():
    run = Run()
    assert run.steps(20) == 0
    assert run.steps(40) == 20
    assert run.loop.updates == 20


def test_the_settings_limits_reach_the_loop():
    assert Run(update_every_steps=4.0).steps(60) == 10
    run = Run(max_updates_per_s=4.0)
    assert run.steps(60) in (7, 8)  # in the 1.8 s after update_after, the first one at once
    assert run.loop.idle_ms(1000) <= 250


def test_a_loop_that_waits_for_steps_is_not_woken_for_the_rate_limit():
    run = Run(max_updates_per_s=4.0)
    assert run.loop.idle_ms(1000) == 1000
    run.steps(10)
    assert run.loop.idle_ms(1000) == 1000
    unsampled = Run(max_updates_per_s=4.0)
    unsampled.loop.memory.apply(ReplayNews(chunk=0, generation=0, start=0, stop=0, env_steps=100).pack())
    assert unsampled.loop.idle_ms(1000) == 1000


def test_the_first_policy_comes_with_the_first_update_then_once_a_second():
    run = Run()
    run.steps(22)
    assert run.published == [(1, 1)]
    run.steps(50)  # 2.25 s, an update every second cycle: the first one after a second is 24 cycles later
    assert run.published == [(1, 1), (1, 13), (1, 25)]
    run.loop.publish_policy()
    run.loop.publish_policy()
    assert run.published[-1] == (1, run.loop.updates)
    assert len(run.published) == len(set(run.published))


def test_a_limit_on_updates_is_kept():
    run = Run()
    for _ in range(60):
        run.pass_step()
    assert run.loop.run_updates(limit=3) == 3
    assert run.loop.due() == 17


def test_same_seed_same_weights():
    weights = []
    for seed in (0, 0, 1):
        run = Run(seed)
        run.steps(40)
        weights.append(run.weights())
    assert np.array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2])


# -- going on ----------------------------------------------------------------------------------------------------------


def interrupted(tmp_path: Path, **loop: float) -> tuple[Run, Run]:
    """A run of 80 steps, and one that was interrupted after 50 and resumed from a file on the same clock."""
    straight, first, second = Run(**loop), Run(**loop), Run(seed=5, epoch=9, **loop)
    straight.steps(80)
    first.steps(50)
    write_checkpoint(tmp_path, first.loop.checkpoint())
    for _ in range(50):  # the replay is rebuilt from the experience log, and the clock goes on where it stood
        second.pass_step()
    found = newest_readable(tmp_path).checkpoint
    assert found is not None
    second.loop.resume(found, same_clock=True)
    assert second.published == first.published[-1:]
    assert np.array_equal(second.policies[0], first.policies[-1])
    assert not np.array_equal(second.policies[0], first.weights())  # the learner is ahead of the policy that acts
    second.steps(30)
    return straight, second


@pytest.mark.parametrize("loop", [{}, {"max_updates_per_s": 9.0}, {"update_every_steps": 3.0}], ids=str)
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, loop):
    straight, resumed = interrupted(tmp_path, **loop)
    assert resumed.published == straight.published[-len(resumed.published) :]
    assert len(resumed.published) > 1
    assert all(map(np.array_equal, resumed.policies, straight.policies[-len(resumed.policies) :]))
    ours, theirs = straight.loop.checkpoint(), resumed.loop.checkpoint()
    assert ours.counters == theirs.counters
    assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in ours.tensors | theirs.tensors)


def test_on_a_new_clock_versions_go_on_in_a_higher_epoch():
    first, second, third = Run(epoch=4), Run(epoch=2), Run(epoch=7)
    first.steps(40)
    checkpoint = first.loop.checkpoint()
    second.loop.resume(checkpoint)
    third.loop.resume(checkpoint)
    assert second.published == [(5, 1)]
    assert third.published == [(7, 1)]
    assert second.loop.updates == first.loop.updates == 10


def test_the_rate_limit_starts_anew_on_a_new_clock():
    first, second = Run(max_updates_per_s=4.0), Run(max_updates_per_s=4.0)
    first.clock.advance_to(1000 * NS_PER_S)  # a host that was up for longer than the next one
    first.steps(60)
    for _ in range(70):
        second.pass_step()
    second.loop.resume(first.loop.checkpoint())
    assert second.loop.due() == 1


def test_a_checkpoint_before_the_first_policy_has_none():
    run = Run()
    run.steps(5)
    checkpoint = run.loop.checkpoint({"task": "small"})
    assert PUBLISHED_POLICY not in checkpoint.tensors
    assert checkpoint.counters["extra"] == {"task": "small"}
    resumed = Run()
    resumed.loop.resume(checkpoint)
    assert resumed.published == []
    resumed.steps(22)
    assert resumed.published[0][1] == 1


def test_a_checkpoint_of_another_network_is_refused():
    run = Run()
    run.steps(22)
    agent = msgspec.structs.replace(AGENT, hidden=(8,))
    other = SAC.build_learner(SPEC, agent, seed=0, device=torch.device("cpu"))
    with pytest.raises(SettingsError, match="another network"):
        other.load_state(run.loop.checkpoint().tensors)


# -- going back --------------------------------------------------------------------------------------------------------


class Recovering(Run):
    """A run whose learner can go back to the checkpoint that `save` made."""

    def __init__(self) -> None:
        self.saved: Checkpoint | None = None
        super().__init__(recover=lambda: (make_learner(), self.saved))

    def save(self) -> None:
        self.saved = self.loop.checkpoint()


def poison(module: nn.Module, value: float = math.nan) -> None:
    with torch.no_grad():
        next(module.parameters())[0] = value


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_policy_that_is_not_finite_is_never_published_and_the_learner_goes_back(value):
    run = Recovering()
    run.steps(60)
    run.loop.publish_policy()
    run.save()
    good = run.weights()
    run.steps(20)
    draws = run.loop.rng.bit_generator.state
    poison(run.loop.learner.policy(), value)
    run.loop.publish_policy()
    assert run.said == ["the policy is not finite at update 30: went back to the checkpoint of update 20"]
    assert run.published[-1] == (2, 20)
    assert np.array_equal(run.policies[-1], good)
    assert np.array_equal(run.weights(), good)
    assert (run.loop.updates, run.loop.epoch, run.loop.rollbacks) == (20, 2, 1)
    assert run.loop.metrics() == {}
    assert run.loop.rng.bit_generator.state == draws  # not the draws that led here
    run.steps(40)  # the updates that were lost are due again
    assert run.loop.updates == 50
    assert math.isfinite(run.loop.metrics()["critic_loss"])
    assert all(np.isfinite(policy).all() for policy in run.policies)
    assert run.published == sorted(set(run.published))


def test_without_a_checkpoint_the_learner_starts_again_with_new_networks():
    run = Recovering()
    run.steps(60)
    poison(run.loop.learner.policy())
    run.loop.publish_policy()
    assert run.said == [
        "the policy is not finite at update 20: started again with new networks, as there is no checkpoint yet"
    ]
    assert run.published[-1] == (2, 0)
    assert np.array_equal(run.weights(), Run().weights())
    run.steps(2)
    assert run.loop.updates == 21


def test_a_loss_that_is_not_finite_is_seen_before_anything_leaves():
    for leave in (lambda run: run.loop.metrics(), lambda run: run.loop.checkpoint(), lambda run: run.steps(30)):
        run = Recovering()
        run.steps(40)
        run.save()
        poison(run.loop.learner._critic)
        run.steps(2)
        leave(run)
        assert "critic_loss is nan at update" in run.said[0]
        assert run.loop.rollbacks == 1
        assert all(torch.isfinite(t).all() for t in run.loop.learner.state().values() if t.is_floating_point())


def test_no_checkpoint_holds_what_is_not_finite():
    run = Recovering()
    run.steps(40)
    run.save()
    run.steps(10)
    poison(run.loop.learner._target_critic)
    checkpoint = run.loop.checkpoint()
    assert run.said[0].startswith("target_critic.")
    assert "is not finite at update 15: went back to the checkpoint of update 10" in run.said[0]
    assert checkpoint.counters["updates"] == 10
    assert checkpoint.counters["rollbacks"] == 1
    assert checkpoint.counters["epoch"] == 2
    assert all(torch.isfinite(t).all() for t in checkpoint.tensors.values() if t.is_floating_point())


def test_the_second_time_the_run_ends_also_after_a_restart():
    first = Recovering()
    first.steps(40)
    poison(first.loop.learner.policy())
    first.loop.publish_policy()
    first.steps(10)
    resumed = Recovering()
    resumed.loop.resume(first.loop.checkpoint())
    for run in (first, resumed):
        poison(run.loop.learner.policy())
        run.loop.updates += 1
        published = len(run.published)
        with pytest.raises(SafetyStop, match=r"diverged: the policy is not finite again at update \d+; lower the") as e:
            run.loop.publish_policy()
        assert e.value.exit_code == EXIT_SAFETY
        assert len(run.published) == published


def test_a_reward_that_is_not_finite_ends_the_run_at_its_second_draw():
    run = Recovering()
    run.steps(40)
    run.save()
    with pytest.raises(SafetyStop, match="critic_loss is nan again"):
        run.steps(200, reward=math.nan)
    assert len(run.said) == 1
    assert all(np.isfinite(policy).all() for policy in run.policies)


def test_a_loop_that_cannot_go_back_ends_at_once():
    run = Run()
    run.steps(40)
    poison(run.loop.learner.policy())
    with pytest.raises(SafetyStop, match=r"diverged: the policy is not finite at update 10; lower the"):
        run.loop.publish_policy()
