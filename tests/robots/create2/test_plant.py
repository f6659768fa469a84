"""The plant: wheels, walls, light bumpers, battery, delays, and independence of polling."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relod.robots.create2 import plant as plant_module
from relod.robots.create2.oi import MM_PER_COUNT, Bumps
from relod.robots.create2.plant import (
    ARENA_LENGTH_M,
    ARENA_WIDTH_M,
    BODY_RADIUS_M,
    DOCK_POSE,
    PRESETS,
    SUBSTEP_NS,
    Plant,
    PlantSettings,
    Pose,
)

MS = 1_000_000
S = 1_000 * MS
IDEAL = PlantSettings(**PRESETS["ideal"])
MIDDLE = Pose(x_m=0.0, y_m=0.0, heading_rad=0.0)


def _ideal(pose: Pose = MIDDLE) -> Plant:
    return Plant(IDEAL, 0, pose=pose)


def test_presets_are_settings() -> None:
    assert PlantSettings(**PRESETS["nominal"]) == PlantSettings()
    assert set(PRESETS) == {"ideal", "nominal", "harsh"}
    for values in PRESETS.values():
        PlantSettings(**values)


def test_drives_straight_at_the_speed_asked_for() -> None:
    plant = _ideal(Pose(x_m=-0.3, y_m=0.0, heading_rad=0.0))
    plant.command(0, 100, 100)
    plant.advance(1 * S)
    start_m = plant.pose.x_m
    plant.advance(2 * S)
    assert plant.pose.x_m - start_m == pytest.approx(0.1, abs=1e-4)
    assert plant.pose.y_m == plant.pose.heading_rad == 0.0
    assert plant.pose.speed_m_s == pytest.approx(0.1, abs=1e-4)


def test_turns_by_the_wheel_base() -> None:
    plant = _ideal()
    plant.command(0, -100, 100)
    plant.advance(1 * S)
    before_rad = plant.pose.heading_rad
    plant.advance(2 * S)
    assert plant.pose.heading_rad - before_rad == pytest.approx(0.2 / 0.235, rel=1e-3)
    assert (plant.pose.x_m, plant.pose.y_m) == pytest.approx((0.0, 0.0), abs=1e-12)


def test_wheels_follow_with_limited_acceleration_and_lag() -> None:
    plant = _ideal()
    plant.command(0, 300, 300)
    speeds = []
    for t_ns in range(SUBSTEP_NS, 600 * MS, SUBSTEP_NS):
        plant.advance(t_ns)
        speeds.append(plant.left_mm_s)
    assert speeds[0] == pytest.approx(5.0)  # 1 m/s² for 5 ms
    assert max(b - a for a, b in pairwise(speeds)) <= 5.0 + 1e-9
    assert speeds == sorted(speeds)
    assert speeds[-1] == pytest.approx(300.0, abs=3.0)


def test_wheel_speeds_come_in_the_robots_steps() -> None:
    plant = Plant(PlantSettings(**{**PRESETS["ideal"], "wheel_quantum_mm_s": 28.5}), 0, pose=MIDDLE)
    plant.command(0, 150, 10)
    plant.advance(2 * S)
    assert plant.left_mm_s == pytest.approx(142.5, abs=0.01)
    assert plant.right_mm_s == 0.0
    assert plant.requested_left_mm_s == 150


def test_a_command_takes_effect_after_wire_and_tick() -> None:
    plant = Plant(PlantSettings(wheel_quantum_mm_s=0.0), 3, pose=MIDDLE)
    waits_ms = []
    for k in range(60):
        sent_ns = k * 2 * S
        plant.advance(sent_ns)
        plant.command(sent_ns, 100, 100)
        t_ns = sent_ns
        while plant.left_mm_s == 0.0:
            t_ns += SUBSTEP_NS
            plant.advance(t_ns)
        waits_ms.append((t_ns - sent_ns) / MS)
        plant.command(sent_ns + 1 * S, 0, 0)
    # 1.5 to 16.5 ms until it takes effect, then to the end of the substep that begins at or after that.
    assert min(waits_ms) == 10.0
    assert max(waits_ms) == 25.0


def test_an_ideal_command_acts_at_once() -> None:
    plant = _ideal()
    plant.advance(100 * MS)
    plant.command(100 * MS, 100, 100)
    plant.advance(105 * MS)
    assert plant.left_mm_s > 0


COMMANDS = st.lists(
    st.tuples(st.integers(0, 900 * MS), st.integers(-500, 500), st.integers(-500, 500)), max_size=8
).map(sorted)


@settings(deadline=None, max_examples=30)
@given(COMMANDS, st.lists(st.integers(0, 1 * S), max_size=20))
def test_the_trajectory_does_not_depend_on_polling(commands: list[tuple[int, int, int]], polls: list[int]) -> None:
    at_the_end, often = Plant(PlantSettings(), 7), Plant(PlantSettings(), 7)
    for t_ns, left, right in commands:
        at_the_end.command(t_ns, left, right)
    events = [(t, None) for t in polls] + [(t, (left, right)) for t, left, right in commands]
    for t_ns, command in sorted(events, key=lambda event: event[0]):
        often.advance(t_ns)
        if command is not None:
            often.command(t_ns, *command)
    at_the_end.advance(1 * S)
    often.advance(1 * S)
    assert often.pose == at_the_end.pose
    assert often.encoder_counts() == at_the_end.encoder_counts()
    times_ns = range(400 * MS, 1 * S, 7 * MS)
    assert [often.pose_at(t) for t in times_ns] == [at_the_end.pose_at(t) for t in times_ns]


def test_the_seed_decides_everything_random() -> None:
    def run(seed: int, start_ns: int) -> tuple[float, list[int]]:
        plant = Plant(PlantSettings(), seed, start_ns=start_ns)
        plant.command(start_ns, 120, -80)
        plant.advance(start_ns + 1 * S)
        return plant.pose.heading_rad, plant.light_bumps()

    assert run(1, 0) == run(1, 123_456_789)
    assert run(1, 0) != run(2, 0)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 1000),
    st.lists(st.tuples(st.integers(-500, 500), st.integers(-500, 500)), min_size=1, max_size=6),
)
def test_the_robot_never_leaves_the_arena(seed: int, commands: list[tuple[int, int]]) -> None:
    plant = Plant(PlantSettings(**PRESETS["harsh"]), seed)
    for k, (left, right) in enumerate(commands):
        plant.command(k * S, left, right)
        for t_ns in range(k * S, (k + 1) * S, 50 * MS):
            plant.advance(t_ns)
            assert abs(plant.pose.x_m) <= ARENA_LENGTH_M / 2 - BODY_RADIUS_M
            assert abs(plant.pose.y_m) <= ARENA_WIDTH_M / 2 - BODY_RADIUS_M
            assert all(0 <= signal <= 4095 for signal in plant.light_bumps())


@pytest.mark.parametrize(
    ("heading_deg", "bits"),
    [
        (0, Bumps.BUMP_LEFT | Bumps.BUMP_RIGHT),
        (45, Bumps.BUMP_RIGHT),  # the wall is to the right of straight ahead
        (-45, Bumps.BUMP_LEFT),
        (180, 0),
    ],
)
def test_bumper_bits_tell_the_side(heading_deg: float, bits: int) -> None:
    plant = _ideal(Pose(x_m=1.0, y_m=0.0, heading_rad=math.radians(heading_deg)))
    assert plant.bumps() == bits


def test_a_wall_stops_the_body_but_not_the_wheels() -> None:
    plant = _ideal(Pose(x_m=0.3, y_m=0.0, heading_rad=0.0))
    plant.command(0, 200, 200)
    plant.advance(3 * S)
    assert plant.pose.x_m == ARENA_LENGTH_M / 2 - BODY_RADIUS_M
    assert plant.pose.speed_m_s == 0.0
    counts, _ = plant.encoder_counts()
    assert counts * MM_PER_COUNT > 500
    assert plant.bumps() == Bumps.BUMP_LEFT | Bumps.BUMP_RIGHT


def test_sliding_along_a_wall_loses_speed() -> None:
    plant = _ideal(Pose(x_m=-0.3, y_m=1.0, heading_rad=math.radians(20)))
    plant.command(0, 200, 200)
    plant.advance(1 * S)
    along_m_s = plant.pose.speed_m_s
    assert 0.3 * 0.2 < along_m_s < 0.75 * 0.2


def test_light_bumpers_follow_the_inverse_square() -> None:
    ahead = []
    for gap_m in (0.0, 0.05, 0.1, 0.2):
        plant = _ideal(Pose(x_m=ARENA_LENGTH_M / 2 - BODY_RADIUS_M - gap_m, y_m=0.0, heading_rad=0.0))
        ahead.append(plant.light_bumps()[2])
    assert ahead == sorted(ahead, reverse=True)
    assert 1000 < ahead[0] < 4095
    # Along the beam 13 degrees off, 5 and 20 cm of gap are 6.7 and 22 cm from where its distance counts.
    assert (ahead[1] - 4.2) / (ahead[3] - 4.2) == pytest.approx((22.1 / 6.7) ** 2, rel=0.1)
    plant = _ideal(Pose(x_m=0.0, y_m=1.0, heading_rad=0.0))  # the wall on the left
    left, _, _, _, _, right = plant.light_bumps()
    assert left > 50 * right


def test_light_bumpers_are_mirror_images() -> None:
    signals = _ideal(Pose(x_m=0.1, y_m=0.0, heading_rad=0.0)).light_bumps()
    assert signals == signals[::-1]


def test_the_battery_drains_and_charges() -> None:
    plant = _ideal()
    full_mah = plant.battery_mah
    plant.advance(36 * S)
    assert plant.battery_mah == pytest.approx(full_mah - 2.8, abs=0.01)  # 0.28 A for a hundredth of an hour
    plant.charging = True
    plant.advance(72 * S)
    assert plant.battery_mah == pytest.approx(full_mah - 2.8 + 12.0, abs=0.01)


def test_pose_at_carries_the_last_substep_on() -> None:
    plant = _ideal(Pose(x_m=-0.3, y_m=0.0, heading_rad=0.0))
    plant.command(0, 100, 100)
    plant.advance(1 * S)
    early = plant.pose_at(1 * S + 3 * MS)
    plant.advance(1500 * MS)
    assert plant.pose_at(1 * S + 3 * MS) == early
    assert early.x_m - plant.pose_at(1 * S).x_m == pytest.approx(0.1 * 0.003, rel=1e-3)
    assert plant.pose_at(0) == plant.pose_at(1500 * MS - plant_module.HISTORY * SUBSTEP_NS)
    assert plant.pose_at(9 * S).x_m == pytest.approx(plant.pose.x_m + 0.1 * 0.005, rel=1e-3)


def test_place_leaves_the_past_alone() -> None:
    plant = _ideal()
    plant.command(0, 100, 100)
    plant.advance(500 * MS)
    before = plant.pose_at(490 * MS)
    plant.place(Pose(x_m=0.2, y_m=0.1, heading_rad=1.0))
    assert plant.pose_at(490 * MS) == before
    assert plant.pose_at(500 * MS) == Pose(x_m=0.2, y_m=0.1, heading_rad=1.0)
    plant.advance(1 * S)
    assert plant.pose == Pose(x_m=0.2, y_m=0.1, heading_rad=1.0)
    assert plant.standing


def test_the_wheel_log_says_when_the_wheels_stood() -> None:
    plant = _ideal()
    plant.command(0, 150, 150)
    plant.command(500 * MS, 0, 0)
    plant.advance(2 * S)
    requested, left_zero, stood = (plant.wheel_log[0], plant.wheel_log[2], plant.wheel_log[-1])
    assert (requested.t_ns, requested.requested_left_mm_s) == (0, 150)
    assert (left_zero.t_ns, left_zero.left_mm_s) == (5 * MS, 5.0)
    assert stood.left_mm_s == stood.right_mm_s == stood.requested_left_mm_s == 0.0
    assert 600 * MS < stood.t_ns < 900 * MS
    assert plant.standing


def test_dock_contacts_need_place_and_heading() -> None:
    assert _ideal(DOCK_POSE).on_dock
    assert _ideal(Pose(x_m=DOCK_POSE.x_m, y_m=0.0, heading_rad=-math.pi)).on_dock
    assert not _ideal(Pose(x_m=DOCK_POSE.x_m, y_m=0.0, heading_rad=math.pi / 2)).on_dock
    assert not _ideal(Pose(x_m=DOCK_POSE.x_m, y_m=0.05, heading_rad=math.pi)).on_dock
    plant = _ideal(DOCK_POSE)
    plant.dock_present = False
    assert not plant.on_dock
