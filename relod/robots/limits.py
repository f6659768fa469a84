"""Limits between whoever decides a motion and the robot that makes it: pure functions, values in, values out.

Commands are velocities: zero stands, and is what a command that makes no sense is replaced with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..types import Limits

__all__ = ["Box", "Limited", "Limits", "apply", "symmetric"]


def symmetric(bound: float, count: int) -> Limits:
    """The same bound in both directions for each of `count` values."""
    return Limits(low=(-bound,) * count, high=(bound,) * count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limited:
    """What may be sent to the robot, and what was done to get there."""

    values: tuple[float, ...]
    clamped: bool  # a bound or the slew changed a value
    rejected: bool  # a value was not a finite number, and all of them became zero


def apply(limits: Limits, previous: tuple[float, ...], requested: tuple[float, ...]) -> Limited:
    """Bring `requested` within `limits`, coming from `previous`.

    A value that is not finite stops the robot at once, without slew: nothing is known about what was wanted.
    Where slew and bounds disagree, because `previous` was outside them, the bounds win. `ValueError` for values that
    are not one per limit.
    """
    if len(requested) != len(limits.low) or len(previous) != len(limits.low):
        raise ValueError(f"{len(limits.low)} values expected, not {len(requested)} after {len(previous)}")
    if not all(map(math.isfinite, requested)):
        return Limited(values=(0.0,) * len(requested), clamped=False, rejected=True)
    wanted = requested
    if limits.max_slew is not None:
        wanted = tuple(
            _clamp(value, before - slew, before + slew)
            for value, before, slew in zip(wanted, previous, limits.max_slew, strict=True)
        )
    values = tuple(map(_clamp, wanted, limits.low, limits.high))
    return Limited(values=values, clamped=values != requested, rejected=False)


def _clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A region the tool must not leave, one interval per axis, in metres."""

    low_m: tuple[float, ...]
    high_m: tuple[float, ...]

    def contains(self, position_m: tuple[float, ...]) -> bool:
        """Whether the position is inside; the faces belong to the box."""
        return all(low <= at <= high for low, at, high in zip(self.low_m, position_m, self.high_m, strict=True))

    def inward(self, position_m: tuple[float, ...], velocity_m_s: tuple[float, ...]) -> tuple[float, ...]:
        """The velocity without its parts that lead out of the box, or further out."""
        axes = zip(self.low_m, self.high_m, position_m, velocity_m_s, strict=True)
        return tuple(
            0.0 if (at >= high and speed > 0) or (at <= low and speed < 0) else speed for low, high, at, speed in axes
        )
