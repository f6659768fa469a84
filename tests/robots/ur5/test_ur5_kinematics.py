"""The arm's geometry against plain matrices, and the fence: whatever is asked for, nothing leaves the workspace."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relod.robots.limits import Box
from relod.robots.ur5.arm import ZERO, Arm, SpeedJ
from relod.robots.ur5.kinematics import (
    ACCELERATION_RAD_S2,
    Fence,
    stopping_paths,
    tool_pose,
    tool_position,
    tool_positions,
    tool_rows,
)

HOME = (1.5707, -2.0, 2.17, -3.0415, -1.5707, 3.1415)
FENCE = Fence(
    low_rad=tuple(map(math.radians, (55, -120, 0, -215, -135, 50))),
    high_rad=tuple(map(math.radians, (125, -30, 135, -135, -45, 190))),
    box=Box(low_m=(-0.4, 0.17, 0.37), high_m=(0.15, 0.7, 0.63)),
    hold_s=0.12,
)
TICK_S = 0.008

angles = st.tuples(*[st.floats(-2 * math.pi, 2 * math.pi)] * 6)


def denavit_hartenberg(q):
    """The tool's 4x4 pose in the controller's frame, link by link."""
    d = (0.089159, 0, 0, 0.10915, 0.09465, 0.0823)
    a = (0, -0.425, -0.39225, 0, 0, 0)
    alpha = (math.pi / 2, 0, 0, math.pi / 2, -math.pi / 2, 0)
    pose = np.eye(4)
    for joint in range(6):
        ct, st_, ca, sa = (f(x) for x in (q[joint], alpha[joint]) for f in (math.cos, math.sin))
        pose = pose @ np.array(
            [
                [ct, -st_ * ca, st_ * sa, a[joint] * ct],
                [st_, ct * ca, -ct * sa, a[joint] * st_],
                [0, sa, ca, d[joint]],
                [0, 0, 0, 1],
            ]
        )
    return pose


@given(angles)
def test_the_tool_is_where_the_links_put_it(q):
    turned = np.diag([-1.0, -1.0, 1.0]) @ denavit_hartenberg(q)[:3]  # x and y against those of the base
    pose = tool_pose(q)
    assert pose.position == pytest.approx(turned[:, 3], abs=1e-12)
    assert pose.forward == pytest.approx(turned[:, 2], abs=1e-12)
    assert pose.right == pytest.approx(-turned[:, 0], abs=1e-12)
    assert pose.down == pytest.approx(-turned[:, 1], abs=1e-12)
    assert pose.position == tool_position(q)


@pytest.mark.parametrize(("elbow", "y", "z"), [(1.9, 0.296, 0.609), (2.17, 0.314, 0.479)])
def test_the_reset_posture_is_the_published_one(elbow, y, z):
    q = (*HOME[:2], elbow, *HOME[3:])
    assert tool_position(q) == pytest.approx((-0.109, y, z), abs=6e-4)
    assert tool_pose(HOME).forward == pytest.approx((0.0, 0.964, -0.267), abs=6e-4)


@given(angles)
def test_rows_are_how_the_tool_moves(q):
    step = 1e-6
    rows = np.array(tool_rows(q))
    for joint in range(6):
        beside = [[a + sign * step * (i == joint) for i, a in enumerate(q)] for sign in (-1, 1)]
        moved = np.subtract(tool_position(beside[1]), tool_position(beside[0])) / (2 * step)
        assert rows[:, joint] == pytest.approx(moved, abs=1e-7)


speeds = st.tuples(*[st.floats(-1, 1)] * 6)


@given(speeds, speeds, st.floats(0.01, 0.3))
def test_paths_are_what_the_arm_does(qd, goal, hold_s):
    tick_s = 1e-3
    postures = stopping_paths(HOME, qd, np.array([ZERO, goal]), ACCELERATION_RAD_S2, hold_s)[1].reshape(3, 4, 6)
    arm = Arm(HOME, tick_s=tick_s, lag_s=0.0)
    arm.target_qd = qd
    arm.begin(SpeedJ(qd=goal, acceleration=ACCELERATION_RAD_S2))
    for _ in range(round(hold_s / 3 / tick_s)):
        arm.step()
    near = {"abs": 3e-3}  # it moves in ticks
    assert postures[0, 0] == pytest.approx(arm.target_q, **near)
    arm.begin(SpeedJ(qd=ZERO, acceleration=ACCELERATION_RAD_S2))
    brake_ticks = round(max(map(abs, arm.target_qd)) / ACCELERATION_RAD_S2 / tick_s)
    for tick in range(1, brake_ticks + 2):
        arm.step()
        if tick == brake_ticks // 3:
            assert postures[0, 1] == pytest.approx(arm.target_q, **near)
    assert postures[0, 3] == pytest.approx(arm.target_q, **near)


@given(st.lists(angles, min_size=1, max_size=4))
def test_many_postures_at_once_are_the_same(postures):
    assert tool_positions(np.array(postures)) == pytest.approx(np.array([*map(tool_position, postures)]), abs=1e-12)


def outside(q) -> tuple[float, float]:
    """How far the tool is out of its box, in m, and a joint of its range, in rad; negative inside."""
    place = zip(FENCE.box.low_m, tool_position(q), FENCE.box.high_m, strict=True)
    joints = zip(FENCE.low_rad, q, FENCE.high_rad, strict=True)
    return tuple(max(max(low - at, at - high) for low, at, high in axes) for axes in (place, joints))


def drive(arm: Arm, wanted, delays, cycle_ticks: int = 5):
    """Each wish through the fence, in force some ticks after it was decided; yields every posture."""
    force = ZERO
    for wish, delay in zip(wanted, delays, strict=True):
        decided = FENCE.limit(arm.target_q, arm.target_qd, wish)
        for tick in range(cycle_ticks):
            if tick == delay:
                force = decided
            arm.begin(SpeedJ(qd=force, acceleration=ACCELERATION_RAD_S2))
            arm.step()
            yield arm.target_q
            yield arm.q


def assert_inside(postures) -> None:
    worst_m, worst_rad = map(max, zip(*map(outside, postures), strict=True))
    assert worst_m < 0
    assert worst_rad < 0


@settings(max_examples=25, deadline=None)
@given(
    corners=st.lists(st.tuples(*[st.sampled_from((-1.0, -0.3, 0.0, 1.0))] * 5), min_size=1, max_size=12),
    hold=st.integers(1, 40),
    speed=st.sampled_from((0.3, 0.7, 2.0)),
    delays=st.lists(st.integers(0, 4), min_size=7, max_size=7),
)
def test_no_sequence_of_actions_leaves_box_or_limits(corners, hold, speed, delays):
    wanted = [(*(speed * part for part in corner), 0.0) for corner in corners for _ in range(hold)]
    arm = Arm(HOME, tick_s=TICK_S, lag_s=0.016)
    late = [delays[cycle % 7] for cycle in range(len(wanted))]
    assert_inside(drive(arm, wanted, late))


def test_long_random_drives_come_to_all_faces_and_through_none():
    rng = np.random.default_rng(0)
    wishes = np.repeat(rng.choice((-0.7, 0.0, 0.7), (60, 5)), 25, axis=0)
    arm = Arm(HOME, tick_s=TICK_S, lag_s=0.016)
    postures = list(drive(arm, [(*wish, 0.0) for wish in wishes.tolist()], [2] * len(wishes)))
    places = np.array([tool_position(q) for q in postures])
    assert_inside(postures)
    assert (places.min(axis=0) < np.add(FENCE.box.low_m, 0.02)).sum() >= 2
    assert (places.max(axis=0) > np.subtract(FENCE.box.high_m, 0.02)).sum() >= 2


def test_commands_that_answers_keep_in_force_for_three_cycles_do_not_leave_either():
    rng = np.random.default_rng(1)
    wishes = np.repeat(rng.choice((-0.7, 0.7), (40, 5)), 4, axis=0)
    arm = Arm(HOME, tick_s=TICK_S, lag_s=0.016)
    assert_inside(drive(arm, [(*w, 0.0) for w in wishes.tolist()], [1] * 160, 13))


def test_what_does_no_harm_passes_unchanged():
    for wanted in ((0.3, 0.2, -0.3, 0.1, 0.3, 0.0), (-0.7, 0.5, -0.7, 0.7, -0.7, 0.0), ZERO):
        assert FENCE.limit(HOME, ZERO, wanted) == wanted


def towards(q, *velocity_m_s: float):
    """Joint speeds that move the tool like that."""
    return tuple((np.linalg.pinv(np.array(tool_rows(q))) @ velocity_m_s).tolist())


def brought_to_the_floor() -> Arm:
    """An arm that was driven down until the fence let it go no further."""
    arm = Arm((1.5, -1.6, 1.9, -3.3, -1.5, 3.1415), tick_s=TICK_S, lag_s=0.0)
    for _ in range(60):
        list(drive(arm, [towards(arm.q, 0.0, 0.0, -0.15)], [1]))
    assert tool_position(arm.q)[2] == pytest.approx(0.38, abs=0.004)
    return arm


def test_a_face_is_slid_along():
    arm = brought_to_the_floor()
    allowed = FENCE.limit(arm.target_q, arm.target_qd, towards(arm.q, 0.1, 0.0, -0.1))
    moved = np.array(tool_rows(arm.q)) @ allowed
    assert moved[0] > 0.05
    assert moved[2] > -0.02


def test_away_from_a_face_is_free():
    arm = brought_to_the_floor()
    wanted = towards(arm.q, 0.0, 0.0, 0.1)
    assert FENCE.limit(arm.target_q, arm.target_qd, wanted) == pytest.approx(wanted, abs=5e-3)


@pytest.mark.parametrize(
    "q",
    [
        (1.5707, -2.0, 1.6, -3.0415, -1.5707, 3.1415),  # too high
        (1.5707, -1.2, 2.17, -3.0415, -1.5707, 3.1415),  # too low
        (0.8, -2.0, 2.17, -3.0415, -1.5707, 3.1415),  # base beyond its limit
    ],
)
def test_an_arm_that_was_pushed_outside_is_led_back_slowly(q):
    assert not FENCE.contains(q)
    arm = Arm(q, tick_s=TICK_S, lag_s=0.0)
    fastest, before = 0.0, outside(q)
    for now in map(outside, drive(arm, [ZERO] * 600, [0] * 600)):
        assert now[0] < max(before[0], 0.0) + 1e-6
        assert now[1] < max(before[1], 0.0) + 1e-6
        fastest = max(fastest, *map(abs, arm.target_qd))
    assert FENCE.contains(arm.q)
    assert 0 < fastest < 0.4


def test_faces_belong_to_the_workspace():
    assert FENCE.contains(HOME)
    assert FENCE.contains((FENCE.low_rad[0], *HOME[1:]))
    assert not FENCE.contains((math.nextafter(FENCE.low_rad[0], 0), *HOME[1:]))
