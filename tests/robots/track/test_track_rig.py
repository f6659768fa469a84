"""The rig's firmware: how it follows commands, where it ends, when it stands by itself."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relod.robots.track.rig import COMMAND, HIGH_MM, HOME_MM, LOW_MM, STATE, TICK_NS, Rig
from relod.runtime.clock import NS_PER_MS, NS_PER_S

KEEP_NS = 100 * NS_PER_MS  # between two commands


def make(lag_ms: float = 57.7) -> Rig:
    return Rig(lag_ms=lag_ms, history_ns=NS_PER_S, start_ns=0)


def drive(rig: Rig, speed: tuple[float, float, float], from_ns: int, duration_ns: int) -> list[tuple[float, ...]]:
    """Command `speed` again and again; the states of the time."""
    states = []
    for at_ns in range(from_ns, from_ns + duration_ns, KEEP_NS):
        rig.receive(COMMAND.pack(*speed), at_ns)
        states += rig.advance(min(at_ns + KEEP_NS, from_ns + duration_ns))
    return [STATE.unpack(data) for _, data in states]


def test_it_sends_a_state_every_10_ms_from_home():
    states = make().advance(NS_PER_S)
    assert [sent_ns for sent_ns, _ in states] == [TICK_NS * n for n in range(1, 101)]
    assert {STATE.unpack(data) for _, data in states} == {(*HOME_MM, 0.0, 0.0, 0.0)}


def test_its_speed_gets_half_way_to_the_command_in_40_ms():
    rig = make()
    drive(rig, (100.0, -60.0, 0.0), 0, 40 * NS_PER_MS)
    assert rig.speed_mm_s == pytest.approx((50.0, -30.0, 0.0), rel=0.01)


def test_it_travels_as_fast_as_it_is_told_to():
    states = drive(make(), (0.0, 0.0, -50.0), 0, NS_PER_S)
    assert states[-1][2] == pytest.approx(HOME_MM[2] - 50.0 * (1 - 0.0577), abs=1.0)  # the lag costs one time constant
    assert states[-1][3:] == (0.0, 0.0, -50.0)


@pytest.mark.parametrize(("speed", "end"), [(-1e9, LOW_MM), (1e9, HIGH_MM)])
def test_it_ends_where_its_axes_end_and_at_its_highest_speed(speed, end):
    rig = make()
    states = drive(rig, (speed,) * 3, 0, 2 * NS_PER_S)
    assert states[-1][:3] == pytest.approx(end)
    assert {abs(asked) for asked in states[-1][3:]} == {200.0}
    assert drive(rig, (-math.copysign(200.0, speed),) * 3, 2 * NS_PER_S, NS_PER_S)[-1][:3] != pytest.approx(end)


def test_it_stands_200_ms_after_the_last_command():
    rig = make()
    rig.receive(COMMAND.pack(100.0, 0.0, 0.0), 0)
    states = [(sent_ns, STATE.unpack(data)) for sent_ns, data in rig.advance(NS_PER_S)]
    assert max(sent_ns for sent_ns, state in states if any(state[3:])) == 200 * NS_PER_MS
    assert states[-1][1][0] == pytest.approx(states[-2][1][0], abs=1e-3)


def test_a_command_that_is_no_number_makes_that_axis_stand():
    states = drive(make(), (math.nan, math.inf, 30.0), 0, 300 * NS_PER_MS)
    assert states[-1][3:] == (0.0, 0.0, 30.0)


@given(
    commands=st.lists(st.tuples(st.integers(0, 500), st.floats(-300, 300, width=32)), max_size=6),
    asked_at=st.lists(st.integers(0, 600), max_size=20),
)
def test_what_it_does_does_not_depend_on_how_often_it_is_asked(commands, asked_at):
    def states(times_ms: list[int]) -> list[tuple[int, bytes]]:
        rig, found = make(), []
        for at_ms, speed in sorted([*((t, None) for t in times_ms), *commands], key=lambda event: event[0]):
            if speed is None:
                found += rig.advance(at_ms * NS_PER_MS)
            else:
                rig.receive(COMMAND.pack(speed, -speed, speed / 2), at_ms * NS_PER_MS)
        return found + rig.advance(700 * NS_PER_MS)

    assert states(asked_at) == states([])


def test_poses_between_ticks_lie_on_the_way_and_the_past_is_bounded():
    rig = make()
    states = drive(rig, (80.0, 0.0, 0.0), 0, 500 * NS_PER_MS)
    before, after = states[30][0], states[31][0]  # sent at 310 and 320 ms
    assert rig.pose_at(315 * NS_PER_MS)[0] == pytest.approx((before + after) / 2, abs=1e-4)
    assert rig.pose_at(320 * NS_PER_MS)[0] == pytest.approx(after, abs=1e-4)
    assert rig.pose_at(505 * NS_PER_MS)[0] > states[-1][0]  # what it does until the next tick is settled
    drive(rig, (-80.0, 0.0, 0.0), 500 * NS_PER_MS, 3 * NS_PER_S)
    assert rig.pose_at(0) == rig.pose_at(NS_PER_S)  # forgotten: the oldest known is given
