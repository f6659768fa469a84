"""The arm's motions, tick by tick."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relod.robots.ur5.arm import ZERO, Arm, MoveJ, ServoJ, SpeedJ, StopJ, Vector6

TICK_S = 0.008
START: Vector6 = (0.1, -1.5, 1.5, -1.6, -1.5, 0.2)

joints = st.tuples(*(st.floats(-1.0, 1.0) for _ in range(6)))
accelerations = st.floats(0.5, 10.0)


def arm(lag_s: float = 0.0) -> Arm:
    return Arm(START, tick_s=TICK_S, lag_s=lag_s)


def step_until_done(subject: Arm, most: int = 2000) -> int:
    for ticks in range(most):
        if subject.motion is None and subject.target_qd == ZERO:
            return ticks
        subject.step()
    raise AssertionError(f"still under way after {most} ticks")


def apart(a: Vector6, b: Vector6) -> list[float]:
    return [y - x for x, y in zip(a, b, strict=True)]


@given(joints, joints, accelerations)
def test_the_leading_axis_changes_speed_by_the_acceleration_and_the_others_in_proportion(
    first: Vector6, second: Vector6, acceleration: float
) -> None:
    subject = arm()
    subject.begin(SpeedJ(qd=first, acceleration=acceleration))
    for _ in range(260):  # 1 rad/s at 0.5 rad/s^2
        subject.step()
    assert subject.target_qd == first
    subject.begin(SpeedJ(qd=second, acceleration=acceleration))
    change = max(map(abs, apart(first, second)))
    for tick in range(1, 60):
        subject.step()
        share = min(1.0, tick * TICK_S * acceleration / change) if change else 1.0
        expected = [a + share * d for a, d in zip(first, apart(first, second), strict=True)]
        assert subject.target_qd == pytest.approx(expected, abs=1e-9)


@given(joints, st.floats(0.05, 3.0), accelerations)
def test_a_move_arrives_exactly_and_keeps_its_speed_and_acceleration(
    goal: Vector6, speed: float, acceleration: float
) -> None:
    subject = arm()
    subject.begin(MoveJ(q=goal, speed=speed, acceleration=acceleration))
    length = max(map(abs, apart(START, goal)))
    ticks = 0
    while subject.motion is not None:
        before = subject.target_qd
        subject.step()
        ticks += 1
        assert max(map(abs, subject.target_qd)) <= speed + 1e-9
        if subject.motion is not None and subject.target_q != goal:
            assert max(map(abs, apart(before, subject.target_qd))) <= acceleration * TICK_S * (1 + 1e-9) + 1e-9
    assert subject.q == goal
    assert subject.target_qd == ZERO
    fastest_s = length / speed + speed / acceleration if length > speed**2 / acceleration else 0.0
    fastest_s = fastest_s or 2 * math.sqrt(length / acceleration)
    assert fastest_s <= ticks * TICK_S + 1e-9 <= fastest_s + 0.05


def test_a_move_is_a_straight_line() -> None:
    subject = arm()
    goal: Vector6 = (1.1, -1.0, 1.5, -2.6, -1.4, 0.2)
    subject.begin(MoveJ(q=goal, speed=1.0, acceleration=1.4))
    way = apart(START, goal)
    while subject.motion is not None:
        subject.step()
        share = (subject.q[0] - START[0]) / way[0]
        assert apart(START, subject.q) == pytest.approx([share * w for w in way], abs=1e-9)


def test_a_move_of_an_arm_that_moves_stops_it_first() -> None:
    subject = arm()
    subject.begin(SpeedJ(qd=(0.0, 0.7, 0.0, 0.0, 0.0, 0.0), acceleration=10.0))
    for _ in range(20):
        subject.step()
    subject.begin(MoveJ(q=START, speed=1.0, acceleration=1.4))
    subject.step()
    assert 0.6 < subject.target_qd[1] < 0.7
    step_until_done(subject)
    assert subject.q == START


@pytest.mark.parametrize(("acceleration", "ticks"), [(1.4, 63), (10.0, 9), (100.0, 1)])
def test_stopping_takes_as_long_as_the_acceleration_says(acceleration: float, ticks: int) -> None:
    subject = arm()
    subject.begin(SpeedJ(qd=(0.7, -0.1, 0.0, 0.0, 0.0, 0.0), acceleration=100.0))
    subject.step()
    subject.begin(StopJ(acceleration=acceleration))
    assert step_until_done(subject) == ticks


def test_a_braking_arm_keeps_its_motion_for_later() -> None:
    subject = arm()
    subject.begin(MoveJ(q=(1.1, *START[1:]), speed=0.5, acceleration=2.0))
    for _ in range(60):
        subject.step()
    for _ in range(60):
        subject.step(braking=True)
    held = subject.q
    assert subject.standing
    assert held[0] < 1.0
    subject.step()
    assert subject.target_qd[0] == pytest.approx(2.0 * TICK_S)  # it starts from rest again
    step_until_done(subject)
    assert subject.q == (1.1, *START[1:])


def test_an_arm_with_nothing_to_do_brakes_and_stands() -> None:
    subject = arm()
    subject.begin(SpeedJ(qd=(1.0, 0.0, 0.0, 0.0, 0.0, 0.0), acceleration=100.0))
    for _ in range(3):
        subject.step()
    subject.begin(None)
    assert step_until_done(subject) == 9  # 1 rad/s at 15 rad/s^2
    place = subject.q
    for _ in range(10):
        subject.step()
    assert subject.q == place
    assert subject.qd == ZERO


def test_joints_follow_with_their_lag() -> None:
    """A first-order lag is behind a ramp by its time constant, and by 1/e of a step after it."""
    subject = arm(lag_s=0.016)
    subject.begin(SpeedJ(qd=(0.5, 0.0, 0.0, 0.0, 0.0, 0.0), acceleration=1000.0))
    for _ in range(100):
        subject.step()
    # Sampled once a tick, the lag is between the time constant and a tick less.
    assert 0.008 <= (subject.target_q[0] - subject.q[0]) / 0.5 <= 0.016
    assert subject.qd[0] == pytest.approx(0.5)
    subject.begin(StopJ(acceleration=1000.0))
    step_until_done(subject)
    assert not subject.standing
    for _ in range(40):
        subject.step()
    assert subject.standing
    assert subject.q[0] == pytest.approx(subject.target_q[0], abs=1e-6)


def test_servoing_follows_a_posture() -> None:
    subject = arm()
    goal: Vector6 = (0.3, -1.5, 1.5, -1.6, -1.5, 0.2)
    subject.begin(ServoJ(q=goal, lookahead_s=0.1))
    for _ in range(13):
        subject.step()
    assert 0.1 < subject.q[0] < 0.3
    for _ in range(200):
        subject.step()
    assert subject.q == pytest.approx(goal, abs=1e-4)


def test_an_arm_is_put_down_standing() -> None:
    subject = arm(lag_s=0.016)
    subject.begin(SpeedJ(qd=(1.0,) * 6, acceleration=5.0))
    for _ in range(50):
        subject.step()
    subject.place(START)
    assert subject.standing
    subject.step()
    assert subject.q == subject.target_q == START
