"""A run's bookkeeping: what the view, the run folder and the summary are told."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

from relod.runtime import progress as progress_module
from relod.runtime.clock import NS_PER_S
from relod.runtime.device import MAY_BE_MOVING
from relod.runtime.modes import resolve
from relod.runtime.profile import Profile
from relod.runtime.progress import Progress
from relod.runtime.session import open_folder
from relod.runtime.spans import SpanRing, Stage
from relod.types import EpisodeEnd, Step
from tests.fakes import small_request

NOTHING = np.zeros(0, np.float32)


def step(index: int, reward: float = -1.0, version: tuple[int, int] = (0, 0)) -> Step:
    return Step(
        episode=0,
        index=index,
        frame_ids=(1, 2),
        proprio=NOTHING,
        action=NOTHING,
        reward=reward,
        terminated=False,
        truncated=False,
        extras=NOTHING,
        policy_version=version,
        observed_ns=0,
        acted_ns=0,
    )


def end(length: int, return_: float, *, terminated: bool = False, reason: str = "time limit") -> EpisodeEnd:
    return EpisodeEnd(
        episode=0,
        length=length,
        frame_ids=(1, 2),
        proprio=NOTHING,
        return_=return_,
        terminated=terminated,
        success=terminated and reason == "target reached",
        reason=reason,
        observed_ns=0,
    )


class Clock:
    """What `Progress` takes for the monotonic clock."""

    def __init__(self) -> None:
        self.now_ns = 100 * NS_PER_S

    def __call__(self) -> int:
        return self.now_ns

    def go(self, seconds: float) -> None:
        self.now_ns += int(seconds * NS_PER_S)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "monotonic_ns", clock)
    return clock


@pytest.fixture
def progress(clock, tmp_path) -> Iterator[Progress]:
    plan = resolve(small_request(tmp_path, steps=500, seed=3))
    with open_folder(plan, ()) as folder:
        yield Progress(plan, folder)


def lines(progress: Progress, name: str) -> list[dict]:
    return [json.loads(line) for line in (progress._folder.path / name).read_text().splitlines()]


def test_it_begins_with_what_the_plan_says(progress):
    state = progress.state
    assert (state.task, state.mode, state.simulated, state.max_steps) == ("create", "local-only", True, 500)
    assert (state.cycle_ms, state.episode_steps, state.replay_capacity) == (45.0, 44, 1024)


def test_steps_and_episodes_are_counted_and_written(progress, clock):
    for index in range(3):
        progress.add(step(index))
    clock.go(2.0)
    assert (progress.state.index, progress.state.episode_return) == (3, -3.0)
    progress.add(end(3, -3.0))
    progress.add(step(0, reward=-2.0))
    assert (progress.state.index, progress.state.episode_return) == (1, -2.0)
    progress.add(end(1, -2.0, terminated=True, reason="target reached"))
    summary = progress.summary(None)
    assert (summary["steps"], summary["episodes"], summary["successes"]) == (4, 2, 1)
    assert (summary["returns"], summary["lengths"]) == ([-3.0, -2.0], [3, 1])
    assert (summary["experience_s"], summary["wall_s"]) == (0.18, 2.0)
    written = lines(progress, "episodes.jsonl")
    assert [(line["return"], line["length"], line["steps"], line["wall_s"]) for line in written] == [
        (-3.0, 3, 3, 2.0),
        (-2.0, 1, 4, 2.0),
    ]
    assert written[1]["reason"] == "target reached"


def test_a_robot_that_was_lifted_is_no_success(progress):
    progress.add(end(1, -44.0, terminated=True, reason="wheel drop"))
    assert progress.summary(None)["successes"] == 0


def test_the_newest_policy_that_acted_is_known_with_its_age(progress, clock):
    progress.add(step(0, version=(1, 5)))
    clock.go(3.0)
    progress.add(step(1, version=(1, 5)))
    progress.add(step(2))  # a random action between has no version
    progress.profiled(Profile(SpanRing(("control",)), 1))
    assert progress.summary(None)["policy_version"] == [1, 5]
    assert progress.state.policy_age_s == 3.0


def test_events_are_warned_of_and_kept(progress):
    progress.event("device", "the port is back")
    progress.event("relod", "SIGINT: stopping the robot")
    assert list(progress.state.warnings) == ["device: the port is back", "SIGINT: stopping the robot"]
    assert [line["event"] for line in lines(progress, "metrics.jsonl")] == [
        "device: the port is back",
        "relod: SIGINT: stopping the robot",
    ]


def test_a_robot_that_may_be_moving_is_an_alarm_until_the_device_says_otherwise(progress):
    progress.event("device", f"{MAY_BE_MOVING}: the wire is gone")
    assert MAY_BE_MOVING in progress.state.alarm
    progress.event("camera", "no frames")
    assert MAY_BE_MOVING in progress.state.alarm
    progress.event("device", "the wire is back")
    assert progress.state.alarm == ""


def test_reports_of_the_processes_reach_view_and_summary(progress):
    progress.report("control", {"phase": "running", "overruns": 2.0, "rejected": 1.0, "status.battery_mah": 1900.0})
    progress.report("control", {"sensor_age_ms": 12.5})
    progress.report("device", {"stopped_cleanly": 1.0})
    progress.report("worker", {"updates": 40.0, "replay_steps": 90.0, "metric.critic_loss": 0.5})
    progress.restarted("camera")
    progress.restarted("camera")
    state, summary = progress.state, progress.summary(None)
    assert (state.phase, state.overruns, state.sensor_age_ms) == ("running", 2, 12.5)
    assert state.status == {"battery_mah": 1900.0}
    assert (state.updates, state.replay_steps, state.losses) == (40, 90, {"critic_loss": 0.5})
    assert (summary["overruns"], summary["actions_rejected"], summary["stopped_cleanly"]) == (2, 1, True)
    assert (summary["updates"], summary["restarts"]) == (40, {"camera": 2})
    progress.report("worker", {"updates": 41.0})
    assert state.losses == {"critic_loss": 0.5}  # figures stay until newer ones come


def test_a_robot_of_which_nothing_is_known_is_not_said_to_stand(progress):
    assert progress.summary(None)["stopped_cleanly"] is False


def test_the_rate_of_updates_is_that_of_the_last_seconds(progress, clock):
    for count in range(40):
        progress.report("worker", {"updates": 5.0 * count})
        clock.go(1.0)
    assert progress.state.updates_per_s == pytest.approx(5.0)
    for count in range(20):
        progress.report("worker", {"updates": 195.0 + 20 * count})
        clock.go(1.0)
    assert progress.state.updates_per_s == pytest.approx(20.0)


def test_a_worker_that_goes_back_to_its_checkpoint_makes_no_negative_rate(progress, clock):
    for updates in (100, 200, 50, 60):
        progress.report("worker", {"updates": float(updates)})
        assert progress.state.updates_per_s >= 0.0
        clock.go(1.0)
    assert (progress.state.updates, progress.state.updates_per_s) == (60, pytest.approx(10.0))


def test_shares_of_the_processor_count_from_the_first_look_and_leave_out_restarts(progress, clock):
    progress.processor({"control": 1.0, "worker": 10.0})
    clock.go(10.0)
    progress.processor({"control": 2.0, "worker": 3.0, "late": 1.0})
    assert progress.summary(None)["cpu_cores"] == {"control": 0.1}


def test_metrics_hold_figures_and_percentiles_that_were_measured(progress):
    ring = SpanRing(("control",))
    ring.writer("control").add(Stage.ACT, 1, 0, 3_000_000)
    profile = Profile(ring, 45_000_000)
    profile.drain()
    progress.report("worker", {"updates": 7.0, "metric.critic_loss": 0.25})
    progress.write_metrics(profile)
    progress.write_metrics(None)
    first, second = lines(progress, "metrics.jsonl")
    assert (first["updates"], first["metric.critic_loss"], first["act_ms"]["max"]) == (7, 0.25, 3.0)
    assert "update_ms" not in first  # nothing was measured
    assert "act_ms" not in second


def test_the_summary_with_a_profile_has_its_percentiles(progress):
    summary = progress.summary(Profile(SpanRing(("control",)), 45_000_000))
    assert {"act_ms", "cycle_lateness_ms", "sentinel_ms", "cycles", "overruns_not_shared"} <= set(summary)
    assert json.dumps(summary)
