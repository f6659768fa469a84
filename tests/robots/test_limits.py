"""Limits between policy and device: nothing gets through that the robot must not be told."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relod.robots.limits import Box, apply, symmetric
from relod.types import Limits

WHEELS = symmetric(150.0, 2)
anything = st.floats(allow_nan=True, allow_infinity=True)
speeds = st.floats(-1000, 1000)


def test_a_value_within_the_bounds_is_left_alone():
    limited = apply(WHEELS, (0.0, 0.0), (149.5, -150.0))
    assert limited.values == (149.5, -150.0)
    assert not limited.clamped
    assert not limited.rejected


def test_a_value_beyond_its_bound_becomes_the_bound():
    limited = apply(WHEELS, (0.0, 0.0), (151.0, -1e9))
    assert limited.values == (150.0, -150.0)
    assert limited.clamped


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_stops_every_value_at_once(bad):
    slow = Limits(low=(-1.0, -1.0), high=(1.0, 1.0), max_slew=(0.1, 0.1))
    limited = apply(slow, (1.0, 1.0), (0.9, bad))
    assert limited.values == (0.0, 0.0)
    assert limited.rejected


def test_slew_bounds_the_change_from_the_previous_command():
    slow = Limits(low=(-150.0, -150.0), high=(150.0, 150.0), max_slew=(20.0, 200.0))
    limited = apply(slow, (100.0, 100.0), (-100.0, -100.0))
    assert limited.values == (80.0, -100.0)
    assert limited.clamped


def test_bounds_win_over_slew_when_the_previous_command_was_outside_them():
    slow = Limits(low=(-150.0,), high=(150.0,), max_slew=(20.0,))
    assert apply(slow, (-250.0,), (0.0,)).values == (-150.0,)


def test_another_number_of_values_is_a_defect():
    with pytest.raises(ValueError, match="2 values expected, not 1"):
        apply(WHEELS, (0.0, 0.0), (1.0,))


@given(requested=st.tuples(anything, anything), previous=st.tuples(speeds, speeds))
def test_whatever_is_asked_the_result_is_finite_and_within_the_bounds(requested, previous):
    limits = Limits(low=(-150.0, -20.0), high=(100.0, 0.0), max_slew=(30.0, 5.0))
    limited = apply(limits, previous, requested)
    for value, low, high in zip(limited.values, limits.low, limits.high, strict=True):
        assert low <= value <= high
    assert limited.rejected == (not all(map(math.isfinite, requested)))


@given(requested=st.tuples(speeds, speeds), previous=st.tuples(st.floats(-150, 150), st.floats(-150, 150)))
def test_slew_holds_and_applying_twice_changes_nothing(requested, previous):
    limits = Limits(low=(-150.0, -150.0), high=(150.0, 150.0), max_slew=(30.0, 30.0))
    once = apply(limits, previous, requested)
    assert all(abs(new - old) <= 30.0 + 1e-9 for new, old in zip(once.values, previous, strict=True))
    assert apply(limits, previous, once.values).values == pytest.approx(once.values)


def test_a_box_lets_a_tool_come_back_but_not_leave():
    box = Box(low_m=(0.0, 0.0, 0.1), high_m=(0.5, 0.5, 0.6))
    assert box.contains((0.0, 0.5, 0.3))
    assert not box.contains((0.0, 0.51, 0.3))
    assert box.inward((0.2, 0.52, 0.05), (0.1, 0.1, -0.1)) == (0.1, 0.0, 0.0)
    assert box.inward((0.2, 0.52, 0.05), (-0.1, -0.1, 0.1)) == (-0.1, -0.1, 0.1)


@given(st.tuples(*[st.floats(-1, 1)] * 3), st.tuples(*[st.floats(-1, 1)] * 3))
def test_a_box_never_adds_motion(position, velocity):
    kept = Box(low_m=(-0.5,) * 3, high_m=(0.5,) * 3).inward(position, velocity)
    assert all(new in (0.0, old) for new, old in zip(kept, velocity, strict=True))
