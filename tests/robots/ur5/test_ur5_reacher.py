"""The tasks `ur5` and `ur5-min-time`: observation, rewards, ends, commands, resets; and what a scripted servo earns."""

from __future__ import annotations

import importlib
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from relod.config import load
from relod.errors import SafetyStop, SettingsError
from relod.robots.registry import load_attribute
from relod.robots.ur5.arm import ZERO
from relod.robots.ur5.interface import SENSOR_COLUMNS
from relod.robots.ur5.kinematics import tool_position
from relod.robots.ur5.reward import DenseReward, posture_cost, target_fraction, vision_weights
from relod.robots.ur5.target import NO_TARGET, place_of
from relod.robots.ur5.visual_reacher import (
    UR5_MIN_TIME,
    UR5_VISUAL_REACHER,
    MinTimeSettings,
    VisualReacherSettings,
)
from relod.robots.ur5.world import WORLDS, VirtualUR5
from relod.runtime.clock import NS_PER_MS, NS_PER_S
from relod.types import Command, SensorWindow

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
ur5 = importlib.import_module("ur5")

ENTRIES = [UR5_VISUAL_REACHER, UR5_MIN_TIME]
HOME = VisualReacherSettings().home_rad
RED = (20, 15, 220)


def make(**values):
    return UR5_VISUAL_REACHER.build(VisualReacherSettings(**values))


def window(q=HOME, qd=ZERO, *, safety: float = 1, shown: float = 0) -> SensorWindow:
    values = np.array([[*q, *qd, *q, *qd, 1.0, 7, safety, 2, 1.0, shown, 1.0]])
    return SensorWindow(names=SENSOR_COLUMNS, seq=np.array([1]), arrived_ns=np.array([1]), values=values)


def picture(right: float = 0.0, down: float = 0.0, radius_px: float = 12.0) -> np.ndarray:
    """A red disc on white, its middle in half widths and half heights of the picture."""
    y, x = np.mgrid[:90, :160]
    image = np.full((90, 160, 3), 235, np.uint8)
    image[(x - 80 - 80 * right) ** 2 + (y - 45 - 45 * down) ** 2 < radius_px**2] = RED
    return image


@pytest.mark.parametrize("entry", ENTRIES)
def test_its_parts_fit_together(entry):
    for target in (entry.driver, entry.emulator, entry.world):
        assert callable(load_attribute(target, "a part of the task"))
    driver = load_attribute(entry.driver, "the driver")
    assert (driver.sensor_names, driver.command_names) == (entry.sensor_names, entry.command_names)
    task = entry.build(load(entry.sections()).task)
    assert len(task.spec.proprio_names) == len(set(task.spec.proprio_names)) == 15
    assert task.spec.cycle_ns == 40 * NS_PER_MS
    assert load(entry.sections(), presets=[entry.profiles["upstream"]]).task.max_speed_rad_s in (0.3, 2.0)
    for name in ("ideal", "nominal", "harsh"):
        assert load(entry.sections(), presets=[WORLDS[name]]).sim.camera.fps == task.spec.camera_fps


def test_observation_is_angles_speeds_by_the_largest_and_previous_actions():
    seen = make(action_history=2).proprioception(
        window(HOME, (0.7, -0.35, 0.0, 0.07, 0.0, 0.0)), np.array([[0.1] * 5, [-2.0] * 5], np.float32)
    )
    assert seen.dtype == np.float32
    assert seen == pytest.approx([*HOME[:5], 1.0, -0.5, 0.0, 0.1, 0.0, *[0.1] * 5, *[-1.0] * 5])


def test_the_codes_reward_by_hand():
    image = np.full((90, 160, 3), 235, np.uint8)
    image[45, 80] = image[0, 80] = image[45, 40] = RED  # worth 1/4, 0 and 1/8
    q = (1.5, -2.0, 2.0, -3.0, -1.4, 3.0)
    wanted = 800 * (0.25 + 0.125) / (160 * 90) - (0.1 + abs(math.pi - 3.0))
    assert make().judge(window(q), image, 1).reward == pytest.approx(wanted)
    assert make(alpha=400, beta=0).judge(window(q), image, 1).reward == pytest.approx(400 * 0.375 / 14400)


def test_the_picture_is_worth_at_most_four_in_the_codes_form_alone():
    large = picture(radius_px=30)
    level = (1.5, -2.0, 2.0, -math.pi, -1.5, 3.0)
    assert make().judge(window(level), large, 1).reward == pytest.approx(4.0)
    printed = make(reward="paper", beta=0.0).judge(window(level), large, 1).reward
    assert printed == pytest.approx(800 * 4 * (vision_weights(90, 160)[(large == RED).all(axis=2)]).sum() / 14400)
    assert printed > 16


def test_the_printed_posture_term_would_punish_the_reset_posture():
    start = (1.5707, -2.0, 1.9, -3.0415, -1.5707, 3.1415)
    assert posture_cost(start, "code") == pytest.approx(0.0, abs=1e-3)
    assert posture_cost(start, "paper") == pytest.approx(6.28, abs=0.01)


def test_nearer_the_middle_and_larger_is_better():
    reward = DenseReward(alpha=800, beta=1, form="code")
    seen = [(2.0, 0.0, 8), (0.9, 0.5, 8), (0.5, 0.3, 8), (0.0, 0.0, 4), (0.0, 0.0, 8), (0.0, 0.0, 9)]
    rewards = [reward(picture(right, down, radius), HOME) for right, down, radius in seen]
    assert rewards[:3] + rewards[4:] == sorted(rewards[:3] + rewards[4:])
    assert rewards[3] < rewards[4]


def test_white_dark_and_orange_are_no_target():
    for colour in ((255, 255, 255), (0, 0, 119), (51, 0, 200), (0, 90, 255)):
        assert target_fraction(np.full((90, 160, 3), colour, np.uint8)) == 0


def test_an_episode_ends_by_time_only():
    task = make()
    assert not task.judge(window(), picture(), 98).truncated
    last = task.judge(window(), picture(), 99)
    assert (last.truncated, last.terminated, last.reason) == (True, False, "time limit")


def test_minimum_time_ends_when_the_target_is_large():
    task = UR5_MIN_TIME.build(MinTimeSettings())
    assert task.spec.max_steps == 150
    small, large = (picture(radius_px=radius) for radius in (8, 8.5))
    assert target_fraction(small) < 0.015 <= target_fraction(large)
    assert (task.judge(window(), small, 5).reward, task.judge(window(), small, 5).terminated) == (-1.0, False)
    reached = task.judge(window(), large, 149)
    assert (reached.reward, reached.terminated, reached.truncated, reached.success) == (-1.0, True, False, True)
    assert task.judge(window(), small, 149).truncated


@pytest.mark.parametrize("safety", [3, 5, 7])
def test_a_stop_of_the_arm_ends_the_episode(safety):
    outcome = make().judge(window(safety=safety), picture(), 5)
    assert (outcome.truncated, outcome.terminated, outcome.reason) == (True, False, "the arm was stopped")
    assert make().status(window(safety=safety))["attention"]


def test_a_target_that_is_not_there_is_told_after_three_episodes():
    task, empty = make(), picture(right=5)
    assert not task.judge(window(), empty, 1).truncated  # it may leave the picture later on
    assert task.judge(window(), empty, 0).reason == "no target in the picture"
    assert not task.judge(window(), picture(), 0).truncated
    task.judge(window(), empty, 0)
    task.judge(window(), empty, 0)
    with pytest.raises(SafetyStop, match=r"no red target in the first picture of 3 episodes in a row"):
        task.judge(window(), empty, 0)


def test_commands_are_clipped_kept_inside_and_an_action_that_is_no_number_stands():
    task = make()
    free = task.command(np.array([1, 0, -3, 0, 0.5], np.float32), window())
    assert free.values == pytest.approx((0.7, 0, -0.7, 0, 0.35, 0))
    assert task.command(np.array([0, np.nan, 0, 0, 0], np.float32), window()) == task.stop() == Command(values=ZERO)
    edge = window((math.radians(124.4), *HOME[1:]))
    assert task.command(np.array([1, 0, 0, 0, 0.5], np.float32), edge).values == pytest.approx((0, 0, 0, 0, 0.35, 0))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("task.max_speed_rad_s=3", r"max_speed_rad_s"),
        ("task.home_rad=[1.5,-2,1.2,-3,-1.5,3.1]", r"outside the joints' limits or the tool's box"),
        ("task.box_low_m=[0.2,0.17,0.37]", r"task.box_low_m must be below task.box_high_m"),
        ("task.episode_s=0.03", r"shorter than one cycle"),
    ],
)
def test_settings_that_cannot_be_are_refused(assignment, message):
    with pytest.raises(SettingsError, match=message):
        load(UR5_VISUAL_REACHER.sections(), assignments=[assignment])


class Run:
    """A world driven by hand, one cycle after the other."""

    def __init__(self, seed: int, name: str = "nominal") -> None:
        self.task = make(camera_height=16, camera_width=16)
        self.world = VirtualUR5(
            load(UR5_VISUAL_REACHER.sections(), presets=[WORLDS[name]]).sim, seed, self.task.spec, 0
        )
        self.now_ns = 0

    def cycle(self, command: Command) -> SensorWindow:
        self.world.execute(command, self.now_ns + 2 * NS_PER_MS)
        self.now_ns += self.task.spec.cycle_ns
        packets, _ = self.world.advance(self.now_ns)
        arrived_ns, values = packets[-1]
        return SensorWindow(
            names=SENSOR_COLUMNS, seq=np.array([1]), arrived_ns=np.array([arrived_ns]), values=values[None]
        )

    def reset(self, seed: int) -> tuple[float, SensorWindow, Command]:
        """Seconds it took, the last window and the first command."""
        routine, began_ns = self.task.reset(np.random.default_rng(seed)), self.now_ns
        first = command = next(routine)
        while True:
            assert max(map(abs, command.values)) <= self.task.reset_limits.high[0]
            seen = self.cycle(command)
            assert self.task.fence.contains(self.world.scene.controller.arm.q)
            try:
                command = routine.send((self.now_ns, seen))
            except StopIteration:
                return (self.now_ns - began_ns) / NS_PER_S, seen, first


@pytest.mark.parametrize("name", ["ideal", "nominal", "harsh"])
def test_a_reset_brings_the_arm_home_from_anywhere_with_a_new_target(name):
    run, rng, shown = Run(3, name), np.random.default_rng(0), []
    for seed in range(4):
        command = run.task.stop()
        for cycle in range(40):  # somewhere else, the fence's rule observed
            seen = run.cycle(command)
            if cycle % 10 == 0:
                action = rng.choice((-1.0, 1.0), 5).astype(np.float32)
            command = run.task.command(action, seen)
        duration_s, seen, first = run.reset(seed)
        assert duration_s < 6.0
        assert [seen.newest(name) for name in SENSOR_COLUMNS[12:18]] == pytest.approx(HOME, abs=0.003)
        assert seen.newest("target_shown") == first.request != NO_TARGET
        place = place_of(first.request)
        assert 27 <= place.x <= 133
        assert 27 <= place.y <= 63
        shown.append(first.request)
    assert len(set(shown)) == 4


def test_a_reset_waits_for_the_arm_and_for_the_target_but_not_for_ever():
    routine = make(help_limit_s=10).reset(np.random.default_rng(0))
    next(routine)
    assert routine.send((0, window(safety=3))) == make().stop()
    assert routine.send((9 * NS_PER_S, window(safety=3))) == make().stop()
    with pytest.raises(SafetyStop, match=r"the arm does not obey.* for 10 s"):
        routine.send((11 * NS_PER_S, window(safety=3)))
    routine = make(help_limit_s=10).reset(np.random.default_rng(0))
    request = next(routine).request
    assert routine.send((0, window())) == make().stop()  # it is at home already
    with pytest.raises(StopIteration):
        routine.send((5 * NS_PER_S, window(shown=request)))
    routine = make(help_limit_s=10).reset(np.random.default_rng(0))
    next(routine)
    routine.send((0, window()))
    asked = [routine.send((now_ms * NS_PER_MS, window(shown=request + 1))).request for now_ms in range(0, 10_000, 40)]
    assert asked.count(request) == 9  # once a second: who has lost it is asked anew
    assert set(asked) == {NO_TARGET, request}
    with pytest.raises(SafetyStop, match=r"no monitor has shown the new target for 10 s"):
        routine.send((11 * NS_PER_S, window(shown=request + 1)))


def test_an_arm_that_does_not_come_home_ends_the_run():
    away = (1.3, *HOME[1:])
    routine = make().reset(np.random.default_rng(0))
    next(routine)
    assert routine.send((0, window(away))).values[0] > 0.3
    with pytest.raises(SafetyStop, match=r"did not bring the arm home within 20 s: a joint is 0.27 rad off"):
        routine.send((21 * NS_PER_S, window(away)))


def test_without_moving_the_target_nothing_is_asked_for():
    routine = make(move_target=False).reset(np.random.default_rng(0))
    assert next(routine).request == 0
    with pytest.raises(StopIteration):
        routine.send((0, window()))


def test_the_tool_is_at_home_in_the_box_with_room_on_all_sides():
    task = make()
    away = [tool_position(HOME)[i] - task.fence.box.low_m[i] for i in range(3)]
    assert min(away) > 0.1


@pytest.mark.slow
def test_a_scripted_servo_solves_it_and_random_actions_do_not():
    settings = load(UR5_VISUAL_REACHER.sections(), presets=[WORLDS["nominal"]])
    servo = ur5.sample(UR5_VISUAL_REACHER, settings, "servo", 1, 5)
    assert all(end["solved"] and end["reason"] == "time limit" for end in servo)
    assert statistics.mean(end["return"] for end in servo) > 230
    uniform = ur5.sample(UR5_VISUAL_REACHER, settings, "uniform", 1, 4)
    assert statistics.mean(end["return"] for end in uniform) < 40
    fast = ur5.sample(UR5_MIN_TIME, load(UR5_MIN_TIME.sections(), presets=[WORLDS["nominal"]]), "servo", 1, 4)
    assert all(end["solved"] and end["length"] < 75 for end in fast)
