"""Create-Reacher by hand: each rule of the task, and its reset against a scripted robot."""

import contextlib
import math
import time
from dataclasses import dataclass, field
from itertools import pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relod.config import load
from relod.errors import SafetyStop, SettingsError
from relod.robots.create2.driver import Request
from relod.robots.create2.oi import Bumps, Mode
from relod.robots.create2.reacher import (
    CREATE_REACHER,
    WALL_SENSORS,
    CreateReacher,
    ReacherSettings,
    episode_steps,
    target_fraction,
    wall_proximity,
)
from relod.types import Command, SensorWindow

CYCLE_NS = 45_000_000
GREEN_BGR = (60, 200, 60)
LOW, HIGH = (30, 68, 0), (85, 255, 255)


def make_window(packets: int = 3, **newest: float) -> SensorWindow:
    """A calm robot in SAFE mode; `newest` changes the last packet."""
    names = CREATE_REACHER.sensor_names
    values = np.zeros((packets, len(names)))
    values[:, names.index("oi_mode")] = Mode.SAFE
    values[:, names.index("battery_charge_mah")] = 2500
    for name, value in newest.items():
        values[-1, names.index(name)] = value
    return SensorWindow(names=names, seq=np.arange(packets), arrived_ns=np.arange(packets), values=values)


def make_image(filled: int, total_hw: tuple[int, int] = (120, 160)) -> np.ndarray:
    """An image whose first `filled` pixels are the target's colour."""
    image = np.full((*total_hw, 3), 120, np.uint8)
    image.reshape(-1, 3)[:filled] = GREEN_BGR
    return image


@pytest.fixture
def task() -> CreateReacher:
    return CreateReacher(ReacherSettings())


# -- numbers of the task -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("episode_s", "cycle_ms", "steps"),
    [(30, 45, 666), (15, 45, 333), (0.3, 100, 3), (0.045, 45, 1), (0.7, 10, 70), (30, 44.999, 666)],
)
def test_an_episode_has_the_whole_cycles_of_its_time(episode_s, cycle_ms, steps):
    assert episode_steps(episode_s, cycle_ms) == steps


def test_the_published_setup_is_the_default(task):
    spec = task.spec
    assert (spec.cycle_ns, spec.frames, spec.image_hw, spec.max_steps) == (CYCLE_NS, 3, (120, 160), 666)
    assert (spec.proprio_dim, spec.action_dim, spec.sensor_window) == (8, 2, 3)
    assert task.limits.high == (150.0, 150.0)
    assert task.settings.target_fraction == 0.12


def test_settings_reach_the_task():
    settings = load({"task": ReacherSettings}, assignments=["task.cycle_ms=60", "task.target_hsv_low=[40, 70, 10]"])
    assert CREATE_REACHER.build(settings.task).spec.cycle_ns == 60_000_000
    assert settings.task.target_hsv_low == (40, 70, 10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"target_hsv_low": (90, 0, 0)},
        {"target_hsv_high": (180, 255, 255)},
        {"battery_low_mah": 2000},
        {"back_off_min_s": 3.0},
        {"undock_mm_s": 400.0},
        {"episode_s": 0.04},
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong):
    with pytest.raises(SettingsError, match=r"task\."):
        ReacherSettings(**wrong)


# -- observation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (20, -1.0),
        (4095, 1.0),
        (0, -1.0),  # the published formula gives -7.34 here
        (5.2, -1.0),
        (65535, 1.0),
        (104.2, 0.284866),  # s = 0.1 between 0.251577 and 0.015635
    ],
)
def test_wall_proximity(raw, expected):
    assert wall_proximity(np.array([float(raw)]))[0] == pytest.approx(expected, abs=1e-4)


@given(st.lists(st.floats(0, 65535), min_size=2, max_size=6))
def test_wall_proximity_grows_with_the_reading_and_stays_in_range(raw):
    proximity = wall_proximity(np.sort(np.array(raw)))
    assert proximity.dtype == np.float32
    assert (np.abs(proximity) <= 1).all()
    assert (np.diff(proximity) >= 0).all()


def test_the_observation_has_six_walls_left_to_right_then_the_previous_action(task):
    window = make_window(light_bump_left=4095, light_bump_right=20, light_bump_center_right=104.2)
    proprio = task.proprioception(window, np.array([[0.5, -1.0]], np.float32))
    assert WALL_SENSORS[0] == "light_bump_left"
    assert len(WALL_SENSORS) == 6
    assert proprio == pytest.approx([1, -1, -1, 0.284866, -1, -1, 0.5, -1], abs=1e-4)
    assert proprio.dtype == np.float32


def test_only_the_newest_packet_counts_for_the_walls(task):
    window = make_window()
    window.values[0, window.names.index("light_bump_left")] = 4095
    assert task.proprioception(window, np.zeros((1, 2), np.float32))[0] == -1


def test_previous_actions_are_what_the_robot_was_given_oldest_first():
    task = CreateReacher(ReacherSettings(action_history=2))
    previous = np.array([[0.1, 0.1], [0.005, -0.99]], np.float32)  # 15, 15; 0.75 -> 0, -148.5 -> -148 mm/s
    assert task.proprioception(make_window(), previous)[6:] == pytest.approx([0.1, 0.1, 0, -148 / 150])
    assert task.spec.proprio_names[6:] == (
        "left_action_2_ago",
        "right_action_2_ago",
        "left_action_1_ago",
        "right_action_1_ago",
    )
    assert task.spec.proprio_dim == 10


# -- action ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "wheels"),
    [
        ((0, 0), (0, 0)),
        ((1, -1), (150, -150)),
        ((0.999, -0.999), (149, -149)),
        ((0.006, -0.006), (0, 0)),
        ((2, -7), (150, -150)),
        ((math.nan, 0.5), (0, 0)),
        ((math.inf, 0.5), (0, 0)),
    ],
)
def test_actions_become_whole_speeds_cut_towards_zero(task, action, wheels):
    assert task.command(np.array(action, np.float32), make_window()).values == wheels


# -- reward and end ----------------------------------------------------------------------------------------------------


def test_each_step_costs_one(task):
    outcome = task.judge(make_window(), make_image(0), 0)
    assert (outcome.reward, outcome.terminated, outcome.truncated) == (-1.0, False, False)


def test_the_target_is_reached_at_exactly_its_fraction(task):
    enough = math.ceil(0.12 * 120 * 160)
    assert not task.judge(make_window(), make_image(enough - 1), 5).terminated
    outcome = task.judge(make_window(), make_image(enough), 5)
    assert (outcome.reward, outcome.terminated, outcome.reason) == (-1.0, True, "target reached")


def test_the_camera_may_be_of_any_size(task):
    assert task.judge(make_window(), make_image(math.ceil(0.12 * 480 * 640), (480, 640)), 0).terminated


def test_the_last_step_is_cut_off_and_not_terminal(task):
    assert not task.judge(make_window(), make_image(0), 664).truncated
    outcome = task.judge(make_window(), make_image(0), 665)
    assert (outcome.reward, outcome.terminated, outcome.truncated) == (-1.0, False, True)
    assert outcome.reason == "time limit"


def test_reaching_the_target_on_the_last_step_is_reaching_it(task):
    outcome = task.judge(make_window(), make_image(19200), 665)
    assert (outcome.terminated, outcome.truncated) == (True, False)


@pytest.mark.parametrize("bit", [Bumps.WHEEL_DROP_LEFT, Bumps.WHEEL_DROP_RIGHT])
@pytest.mark.parametrize(("index", "reward"), [(0, -666.0), (100, -566.0), (665, -1.0)])
def test_a_wheel_drop_costs_the_rest_of_the_episode(task, bit, index, reward):
    outcome = task.judge(make_window(bumps_wheel_drops=int(bit)), make_image(19200), index)
    assert (outcome.reward, outcome.terminated, outcome.reason) == (reward, True, "wheel drop")


def test_a_wheel_drop_counts_in_any_packet_of_the_window(task):
    window = make_window()
    window.values[0, window.names.index("bumps_wheel_drops")] = int(Bumps.WHEEL_DROP_LEFT)
    assert task.judge(window, make_image(0), 0).terminated


def test_a_bump_ends_nothing(task):
    both = int(Bumps.BUMP_LEFT | Bumps.BUMP_RIGHT)
    assert not task.judge(make_window(bumps_wheel_drops=both), make_image(0), 0).terminated


# -- target ------------------------------------------------------------------------------------------------------------


def published_fraction(image: np.ndarray) -> float:
    """The published pipeline, contours and all."""
    mask = cv2.inRange(cv2.cvtColor(image, cv2.COLOR_BGR2HSV), LOW, HIGH)
    gray = cv2.cvtColor(cv2.bitwise_and(image, image, mask=mask), cv2.COLOR_BGR2GRAY)
    _, binary = cv2.threshold(gray, 10, 255, cv2.THRESH_BINARY)
    contours, _ = cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    filled = np.zeros_like(binary)
    cv2.drawContours(filled, contours, -1, 255, thickness=-1)
    return float((filled == 255).sum()) / filled.size


def test_holes_in_the_target_stay_holes():
    image = np.full((40, 60, 3), 120, np.uint8)
    cv2.rectangle(image, (5, 5), (44, 34), GREEN_BGR, thickness=-1)  # 40 x 30
    cv2.rectangle(image, (15, 10), (24, 19), (120, 120, 120), thickness=-1)  # a hole of 10 x 10
    cv2.rectangle(image, (18, 13), (20, 15), GREEN_BGR, thickness=-1)  # an island of 3 x 3 in it
    assert target_fraction(image, LOW, HIGH) == (1200 - 100 + 9) / 2400
    assert target_fraction(image, LOW, HIGH) == published_fraction(image)


def test_shadow_of_the_targets_hue_is_not_the_target():
    image = np.zeros((10, 10, 3), np.uint8)
    image[:] = (0, 17, 0)  # gray 10
    assert target_fraction(image, LOW, HIGH) == 0
    image[:] = (0, 18, 0)  # gray 11
    assert target_fraction(image, LOW, HIGH) == 1


@given(seed=st.integers(0, 2**32 - 1), scale=st.integers(1, 5), green=st.floats(0, 1))
def test_counting_the_mask_is_filling_its_contours(seed, scale, green):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 24, 2)
    small = rng.integers(0, 256, (height, width, 3), np.uint8)
    small[rng.random((height, width)) < green] = GREEN_BGR
    image = np.ascontiguousarray(small.repeat(scale, 0).repeat(scale, 1))
    assert target_fraction(image, LOW, HIGH) == published_fraction(image)


def test_the_target_is_found_fast_enough_for_the_cycle():
    image = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    durations_ms = []
    for _ in range(50):
        start = time.perf_counter()
        target_fraction(image, LOW, HIGH)
        durations_ms.append((time.perf_counter() - start) * 1000)
    assert min(durations_ms) < 0.5  # 0.06 on the machine this was written on; the cycle has 45


# -- status ------------------------------------------------------------------------------------------------------------


def test_status_of_a_calm_robot(task):
    assert task.status(make_window()) == {
        "battery_mah": 2500.0,
        "battery_percent": 92.6,
        "mode": "safe",
        "bump": "",
        "charging": "",
        "attention": "",
    }


def test_status_says_what_a_person_should_do(task):
    dropped = int(Bumps.WHEEL_DROP_LEFT | Bumps.BUMP_RIGHT)
    status = task.status(make_window(bumps_wheel_drops=dropped, charging_sources=2, oi_mode=9))
    assert status["attention"] == "wheel drop left: put the robot on the floor"
    assert (status["bump"], status["charging"], status["mode"]) == ("right", "dock", "unknown (9)")
    assert task.status(make_window(charging_sources=1))["attention"] == "unplug the charging cable"


# -- reset -------------------------------------------------------------------------------------------------------------


@dataclass
class Robot:
    """A Create 2 reduced to what a reset can notice; `script` may change it at each cycle."""

    mode: Mode = Mode.PASSIVE
    battery_mah: float = 2500.0
    charger: int = 0
    drops: int = 0
    docks_after: int = 1  # demands to dock that are needed until it is on the dock
    charge_per_cycle_mah: float = 1.0
    refuses_safe: int = 0  # how many times
    script: object = None
    log: list[tuple[int, Command]] = field(default_factory=list)

    def obey(self, now_ns: int, command: Command) -> None:
        self.log.append((now_ns, command))
        match command.request:
            case Request.SAFE if self.refuses_safe > 0:
                self.refuses_safe -= 1
            case Request.SAFE if not self.drops and not self.charger & 1:
                self.mode = Mode.SAFE
            case Request.FULL:
                self.mode = Mode.FULL
            case Request.SEEK_DOCK:
                self.mode = Mode.PASSIVE
                self.docks_after -= 1
                if self.docks_after == 0:
                    self.charger |= 2
        if self.mode in (Mode.SAFE, Mode.FULL) and min(command.values) < -200:
            self.charger &= ~2
        if self.charger and self.mode is Mode.PASSIVE:
            self.battery_mah += self.charge_per_cycle_mah

    def window(self) -> SensorWindow:
        return make_window(
            oi_mode=self.mode,
            battery_charge_mah=self.battery_mah,
            charging_sources=self.charger,
            bumps_wheel_drops=self.drops,
        )

    def reset(self, settings: ReacherSettings | None = None, seed: int = 0, limit_s: float = 20000) -> float:
        """Run one reset; returns its duration in seconds."""
        reset = CreateReacher(settings or ReacherSettings()).reset(np.random.default_rng(seed))
        now_ns = 1_000_000_000_000
        start_ns = now_ns
        command = next(reset)
        while now_ns - start_ns < limit_s * 1e9:
            self.obey(now_ns, command)
            now_ns += CYCLE_NS
            if self.script is not None:
                self.script(self, (now_ns - start_ns) / 1e9)
            try:
                command = reset.send((now_ns, self.window()))
            except StopIteration:
                return (now_ns - start_ns) / 1e9
        raise AssertionError("the reset does not end")

    @property
    def requests(self) -> list[int]:
        return [command.request for _, command in self.log if command.request]

    def moves(self) -> list[tuple[tuple[float, ...], float]]:
        """Runs of equal non-zero wheel speeds and how long each lasted, in seconds."""
        runs: list[tuple[tuple[float, ...], float]] = []
        previous: tuple[float, ...] | None = None
        for _, command in self.log:
            if any(command.values):
                if command.values == previous:
                    runs[-1] = (command.values, runs[-1][1] + CYCLE_NS / 1e9)
                else:
                    runs.append((command.values, CYCLE_NS / 1e9))
            previous = command.values
        return runs


def test_a_reset_backs_off_turns_and_ends_in_safe_mode():
    robot = Robot()
    duration_s = robot.reset()
    (back, back_s), (turn, turn_s) = robot.moves()
    assert back == (-150.0, -150.0)
    assert turn in ((150.0, -150.0), (-150.0, 150.0))
    assert 1.0 <= back_s <= 2.045
    assert 1.0 <= turn_s <= 3.045
    assert duration_s == pytest.approx(back_s + turn_s + 0.1 * 4, abs=0.3)
    assert robot.requests == [Request.SAFE]
    assert robot.mode is Mode.SAFE
    assert robot.log[0][1] == robot.log[-1][1] == Command(values=(0.0, 0.0))


def test_each_move_is_followed_by_a_tenth_of_a_second_of_standing():
    robot = Robot()
    robot.reset()
    speeds = [command.values for _, command in robot.log]
    for move, _ in robot.moves():
        last = len(speeds) - 1 - speeds[::-1].index(move)
        assert speeds[last + 1 : last + 4] == [(0.0, 0.0)] * 3


def test_a_reset_depends_on_its_generator_alone():
    first, second, third = Robot(), Robot(), Robot()
    first.reset(seed=1)
    second.reset(seed=1)
    third.reset(seed=2)
    assert first.log == second.log
    assert first.log != third.log


def test_both_directions_and_the_whole_ranges_are_drawn():
    moves = []
    for seed in range(60):
        robot = Robot()
        robot.reset(seed=seed)
        moves.append(robot.moves())
    left = sum(turn[0][0] < 0 for _, turn in moves)
    assert 18 < left < 42
    assert min(back[1] for back, _ in moves) < 1.2
    assert max(back[1] for back, _ in moves) > 1.8
    assert max(turn[1] for _, turn in moves) > 2.7


def test_every_speed_of_a_reset_is_within_its_declared_limits():
    settings = ReacherSettings()
    robot = Robot(battery_mah=900, refuses_safe=2)
    robot.reset(settings)
    bound = CreateReacher(settings).reset_limits.high[0]
    assert all(abs(speed) <= bound for _, command in robot.log for speed in command.values)


def test_a_low_battery_is_charged_on_the_dock_first():
    robot = Robot(battery_mah=1200, docks_after=1)
    duration_s = robot.reset()
    assert robot.battery_mah >= 1850
    assert duration_s > 650 * 0.045
    undock, *_ = robot.moves()
    assert undock[0] == (-250.0, -250.0)
    assert undock[1] == pytest.approx(0.75, abs=0.05)
    assert robot.charger == 0


def test_docking_is_demanded_again_every_ten_seconds_from_safe_mode():
    robot = Robot(battery_mah=1000, docks_after=3)
    robot.reset()
    assert robot.requests[:6] == [Request.SAFE, Request.SEEK_DOCK] * 3
    docks = [now_ns for now_ns, command in robot.log if command.request == Request.SEEK_DOCK]
    assert all(10 <= (later - earlier) / 1e9 <= 10.5 for earlier, later in pairwise(docks))


def test_one_milliampere_hour_more_is_enough_to_go_on():
    robot = Robot(battery_mah=1201)
    robot.reset()
    assert Request.SEEK_DOCK not in robot.requests


def test_a_dock_that_is_not_found_ends_the_run_with_the_battery_and_what_to_do():
    robot = Robot(battery_mah=1000, docks_after=10**9)
    with pytest.raises(SafetyStop, match=r"no dock found within 180 s; the battery holds 1000 mAh; put the robot on"):
        robot.reset()
    assert not any(robot.log[-1][1].values)


def test_losing_the_dock_starts_the_search_anew():
    def lose_contact(robot: Robot, elapsed_s: float) -> None:
        if robot.charger and elapsed_s > 100 and robot.docks_after == 0:
            robot.charger, robot.docks_after = 0, 3

    robot = Robot(battery_mah=1000, docks_after=1, charge_per_cycle_mah=0.1, script=lose_contact)
    robot.reset(ReacherSettings(docking_limit_s=60))
    assert robot.battery_mah >= 1850


def test_a_battery_that_does_not_fill_ends_the_run():
    robot = Robot(battery_mah=1000, charge_per_cycle_mah=0.0)
    with pytest.raises(SafetyStop, match=r"charging took longer than 900 s; the battery holds 1000 mAh; check"):
        robot.reset(ReacherSettings(charging_limit_s=900))


def test_safe_mode_is_recovered_by_backing_off_in_full_mode():
    robot = Robot(refuses_safe=3)  # the first demand, and that of two attempts
    robot.reset()
    assert robot.requests == [Request.SAFE, *[Request.FULL, Request.SAFE] * 3]
    assert robot.mode is Mode.SAFE
    assert robot.moves()[-1][0] == (-50.0, -50.0)


def test_a_robot_that_never_gets_back_to_safe_mode_ends_the_run():
    def cliff(robot: Robot, elapsed_s: float) -> None:
        robot.mode = Mode.PASSIVE

    with pytest.raises(SafetyStop, match=r"refused SAFE mode 5 times .*put the robot back on the floor"):
        Robot(script=cliff).reset()


@pytest.mark.parametrize("at_s", [0.05, 1.0, 2.5])
def test_a_lifted_robot_stands_until_it_is_put_down(at_s):
    def lift(robot: Robot, elapsed_s: float) -> None:
        robot.drops = int(Bumps.WHEEL_DROP_LEFT) if at_s <= elapsed_s < at_s + 30 else 0
        if robot.drops:
            robot.mode = Mode.PASSIVE

    robot = Robot(script=lift)
    assert robot.reset() > 30
    assert robot.mode is Mode.SAFE
    start_ns = robot.log[0][0]
    lifted = [c for now_ns, c in robot.log if at_s + 0.7 < (now_ns - start_ns) / 1e9 < at_s + 29.9]
    assert lifted
    assert not any(any(command.values) for command in lifted)


def test_a_robot_that_stays_lifted_ends_the_run():
    robot = Robot(drops=int(Bumps.WHEEL_DROP_LEFT))
    with pytest.raises(SafetyStop, match=r"a wheel drop lasted 120 s; the robot stands; put the robot back on the"):
        robot.reset()


def test_a_plugged_cable_is_waited_for_and_then_ends_the_run():
    with pytest.raises(SafetyStop, match="unplug the cable"):
        Robot(charger=1).reset()

    def unplug(robot: Robot, elapsed_s: float) -> None:
        robot.charger = 1 if elapsed_s < 20 else 0

    robot = Robot(charger=1, script=unplug)
    assert robot.reset() > 20


def test_sensors_that_stop_for_a_while_do_not_upset_a_reset():
    """A docked robot may fall asleep; the cycle then stands still, and the reset is sent a later time."""
    reset = CreateReacher(ReacherSettings()).reset(np.random.default_rng(0))
    next(reset)
    commands = 0
    with contextlib.suppress(StopIteration):
        for commands in range(100):
            reset.send((10**12 + commands * 60 * 10**9, make_window()))
    assert 0 < commands < 20
