"""The task `track`: observation, reward, limits and resets; and that both its worlds are the same to it."""

from __future__ import annotations

import importlib
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from relod.config import load
from relod.errors import SafetyStop, SettingsError
from relod.robots import registry
from relod.robots.track.rig import HIGH_MM, HOME_MM, LOW_MM, SENSOR_COLUMNS
from relod.robots.track.task import START_HIGH_MM, START_LOW_MM, TRACK, Track, TrackSettings, disc_mask, image_weights
from relod.robots.track.world import WORLDS, VirtualTrack
from relod.runtime.clock import NS_PER_MS, NS_PER_S
from relod.types import Command, SensorWindow

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
track = importlib.import_module("track")

TASK = Track(TrackSettings())
SIM = load(TRACK.sections()).sim
STILL = (0.0, 0.0, 0.0)


def window(pose: tuple[float, ...] = HOME_MM, asked: tuple[float, ...] = STILL) -> SensorWindow:
    values = np.array([[*pose, *asked, 1.0]])
    return SensorWindow(names=SENSOR_COLUMNS, seq=np.array([1]), arrived_ns=np.array([1]), values=values)


def picture(right: float, down: float, radius: float, gray: int = 120) -> np.ndarray:
    """A disc on gray, its middle and radius in half widths of the picture."""
    y, x = np.mgrid[:48, :64]
    image = np.full((48, 64, 3), gray, np.uint8)
    image[((x - 31.5) / 32 - right) ** 2 + ((y - 23.5) / 32 - down) ** 2 < radius**2] = (40, 30, 220)
    return image


def test_its_parts_are_registered_and_fit_together():
    entry = registry.task("track")
    assert entry is TRACK
    for target in (entry.driver, entry.emulator, entry.world, entry.commissioning):
        assert callable(registry.load_attribute(target, "a part of the task"))
    driver = registry.load_attribute(entry.driver, "the driver")
    assert (driver.sensor_names, driver.command_names) == (entry.sensor_names, entry.command_names)
    for name in ("ideal", "nominal", "harsh"):
        assert load(entry.sections(), presets=[WORLDS[name]]).sim.camera.fps == TASK.spec.camera_fps


def test_observation_is_the_pose_and_the_previous_actions_oldest_first():
    actions = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, -2.0, 0.9]], np.float32)
    seen = TASK.proprioception(window((50.0, -25.0, 80.0)), actions)
    assert seen.dtype == np.float32
    assert seen == pytest.approx([0.5, -0.25, -0.2, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, -1.0, 0.9])
    assert len(seen) == TASK.spec.proprio_dim == len(set(TASK.spec.proprio_names))
    assert TASK.spec.proprio_names[3] == "x_action_3_ago"


def test_reward_is_the_weighted_disc_less_the_effort():
    image = picture(0.2, -0.1, 0.3)
    red = (image == (40, 30, 220)).all(axis=2)
    weights = image_weights(48, 64)
    outcome = TASK.judge(window(asked=(200.0, -100.0, 0.0)), image, 0)
    assert outcome.reward == pytest.approx(10 * weights[red].sum() / (48 * 64) - 0.05 * 0.5, abs=1e-5)
    assert (outcome.terminated, outcome.truncated) == (False, False)


def test_nearer_the_middle_and_larger_is_better_and_nothing_seen_is_worth_nothing():
    rewards = [
        TASK.judge(window(), picture(*place), 0).reward
        for place in ((3.0, 0.0, 0.1), (0.9, 0.6, 0.12), (0.5, 0.3, 0.12), (0.0, 0.0, 0.12), (0.0, 0.0, 0.34))
    ]
    assert rewards[0] == 0.0
    assert rewards == sorted(rewards)
    assert rewards[-1] == pytest.approx(1.0, abs=0.1)  # a whole episode there would be worth about 100


def test_an_episode_is_truncated_by_its_time_limit_only():
    assert not TASK.judge(window(), picture(0, 0, 0.3), 98).truncated
    last = TASK.judge(window(), picture(0, 0, 0.3), 99)
    assert (last.truncated, last.terminated, last.reason) == (True, False, "time limit")


@pytest.mark.parametrize("world", list(WORLDS))
def test_the_disc_is_told_from_the_plane_in_every_world(world):
    scene = VirtualTrack(load(TRACK.sections(), presets=[WORLDS[world]]).sim, 3, TASK.spec, 0).scene
    for _ in range(30):
        scene.new_episode()
        (x_mm, y_mm), depth_mm = scene.disc_mm, HOME_MM[2]
        y, x = np.mgrid[:48, :64]
        true = ((x - 31.5) / 32 - x_mm / depth_mm) ** 2 + ((y - 23.5) / 32 - y_mm / depth_mm) ** 2 < 0.12**2
        seen = disc_mask(scene.render(0))
        assert true.sum() > 20
        assert (seen != true).sum() <= 1


def test_commands_are_clipped_and_an_action_that_is_no_number_stands():
    assert TASK.command(np.array([0.5, -3.0, 0.0], np.float32), window()).values == (100.0, -200.0, 0.0)
    assert TASK.command(np.array([0.5, np.nan, 0.0], np.float32), window()) == TASK.stop() == Command(values=STILL)
    slow = Track(TrackSettings(max_speed_mm_s=50.0))
    assert (
        slow.command(np.ones(3, np.float32), window()).values
        == slow.limits.high
        == slow.reset_limits.high
        == (50.0,) * 3
    )


def test_faster_than_the_rig_is_refused():
    with pytest.raises(SettingsError, match=r"max_speed_mm_s"):
        load(TRACK.sections(), assignments=["task.max_speed_mm_s=201"])


def reset_from(pose: tuple[float, float, float], seed: int) -> tuple[float, tuple[float, ...]]:
    """Seconds and final pose of a reset in the simulated world, the disc's middle in sight from there."""
    world, now_ns = VirtualTrack(SIM, seed, TASK.spec, 0), 0
    sent = np.sign(np.subtract(pose, HOME_MM)) * 200.0
    values: tuple[float, ...] = tuple(sent.tolist())
    routine, began_ns = None, 0
    while True:
        now_ns += TASK.spec.cycle_ns
        packets, _ = world.advance(now_ns)
        seen = packets[-1][1]
        if routine is None and (np.abs(seen[:3] - pose) < 1.0).all():
            routine, began_ns = TASK.reset(np.random.default_rng(seed)), now_ns
            values = next(routine).values
        elif routine is not None:
            try:
                values = routine.send((now_ns, window(tuple(seen[:3])))).values
            except StopIteration:
                return (now_ns - began_ns) / NS_PER_S, tuple(seen[:3])
        assert max(map(abs, values)) <= TASK.reset_limits.high[0]
        world.execute(Command(values=values), now_ns + 2 * NS_PER_MS)


@pytest.mark.parametrize("pose", [HOME_MM, LOW_MM, HIGH_MM, (80.0, -55.0, 35.0), (-80.0, 55.0, 130.0)])
def test_a_reset_reaches_a_random_start_soon(pose):
    ends = [reset_from(pose, seed) for seed in range(5)]
    assert max(duration_s for duration_s, _ in ends) < 1.0
    places = np.array([place for _, place in ends])
    assert (places >= np.subtract(START_LOW_MM, 6)).all()
    assert (places <= np.add(START_HIGH_MM, 6)).all()
    assert np.ptp(places, axis=0).min() > 5.0


def test_a_rig_that_does_not_move_ends_the_run():
    routine = TASK.reset(np.random.default_rng(0))
    next(routine)
    routine.send((0, window(LOW_MM)))
    routine.send((3 * NS_PER_S, window(LOW_MM)))
    with pytest.raises(SafetyStop, match=r"a reset did not reach its start within 3 s: \d+ mm are left"):
        routine.send((3 * NS_PER_S + 1, window(LOW_MM)))


def test_a_scripted_controller_solves_it_and_random_actions_do_not():
    assert statistics.mean(track.returns(track.approach, episodes=6, seed=1)) > 80
    assert statistics.mean(track.returns(track.random_actions(1, hold=5), episodes=6, seed=1)) < 15
