"""The UR5's geometry and the rule that keeps it in its workspace: pure, posture and speeds in, speeds out.

Kinematic parameters are Universal Robots' for the CB3 UR5. Positions are in the frame of the published runs, ur_kin's:
origin in the middle of the arm's foot, z up, x and y against those of the controller's base frame, so that an arm at
the reset posture points along +y. Joint vectors are six values, base to wrist 3, in rad and rad/s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ..limits import Box
from .arm import ZERO, Vector6

__all__ = [
    "ACCELERATION_RAD_S2",
    "JOINT_NAMES",
    "Fence",
    "Pose",
    "Vector3",
    "stopping_paths",
    "tool_pose",
    "tool_position",
    "tool_positions",
    "tool_rows",
]

Vector3: TypeAlias = tuple[float, float, float]
Array: TypeAlias = npt.NDArray[np.float64]

JOINT_NAMES = ("base", "shoulder", "elbow", "wrist_1", "wrist_2", "wrist_3")
ACCELERATION_RAD_S2 = 1.4  # of the leading axis, speedj's own default and the published runs'

D1, A2, A3, D4, D5, D6 = 0.089159, -0.425, -0.39225, 0.10915, 0.09465, 0.0823  # m

HOLDS = np.array([1.0, 2.0, 3.0]) / 3  # of the longest time that a command is held: when braking may begin
BRAKING = np.array([0.0, 5.0, 8.0, 9.0])[:, None] / 18  # of the speed before, the way after each third of braking
MARGINS = np.array([0.01] * 3 + [0.01] * 6)  # m, rad: kept to each bound, for delays, and bends between the samples
RETURN_PER_S = 2.0  # speed of the way back inside, by what is left of it
RETURN_MOST = np.array([0.05] * 3 + [0.1] * 6)  # m/s, rad/s
SHARES = np.array([0.6, 0.3, 0.1])[:, None]
LEAST_ROW = 1e-3  # of the square of a row; with less, 3 cm/rad, the joints would race for nothing
SLACK = 1e-9  # of rounding, in m or rad


class Pose(NamedTuple):
    """Where the tool is and how it is turned; the three axes are unit vectors."""

    position: Vector3  # m
    forward: Vector3  # where the tool points
    right: Vector3  # at the reset posture, looking along the tool
    down: Vector3


def tool_position(q: Sequence[float]) -> Vector3:
    """The middle of the tool flange, in m; wrist 3 only turns it."""
    c1, s1, c2, s2 = math.cos(q[0]), math.sin(q[0]), math.cos(q[1]), math.sin(q[1])
    q23 = q[1] + q[2]
    q234 = q23 + q[3]
    c4, s4, c5, s5 = math.cos(q234), math.sin(q234), math.cos(q[4]), math.sin(q[4])
    reach = A2 * c2 + A3 * math.cos(q23) + D5 * s4 - D6 * c4 * s5
    side = D4 + D6 * c5
    height = D1 + A2 * s2 + A3 * math.sin(q23) - D5 * c4 - D6 * s4 * s5
    return -c1 * reach - s1 * side, -s1 * reach + c1 * side, height


def tool_pose(q: Sequence[float]) -> Pose:
    """Position and direction of the tool."""
    c1, s1 = math.cos(q[0]), math.sin(q[0])
    q234 = q[1] + q[2] + q[3]
    c4, s4, c5, s5 = math.cos(q234), math.sin(q234), math.cos(q[4]), math.sin(q[4])
    c6, s6 = math.cos(q[5]), math.sin(q[5])
    # The axes of wrist 3 before it turns; in the arm's plane, beside it, and up.
    across: Vector3 = (-c1 * c4 * c5 - s1 * s5, -s1 * c4 * c5 + c1 * s5, s4 * c5)
    along: Vector3 = (c1 * s4, s1 * s4, c4)
    forward: Vector3 = (c1 * c4 * s5 - s1 * c5, s1 * c4 * s5 + c1 * c5, -s4 * s5)
    x = _mix(c6, across, s6, along)
    y = _mix(-s6, across, c6, along)
    return Pose(tool_position(q), forward, _minus(x), _minus(y))


def tool_rows(q: Sequence[float]) -> tuple[Vector6, Vector6, Vector6]:
    """How fast the tool moves along x, y and z for each joint's speed, m/rad; wrist 3 does not move it."""
    c1, s1, c2, s2 = math.cos(q[0]), math.sin(q[0]), math.cos(q[1]), math.sin(q[1])
    q23 = q[1] + q[2]
    q234 = q23 + q[3]
    c4, s4, c5, s5 = math.cos(q234), math.sin(q234), math.cos(q[4]), math.sin(q[4])
    x, y, _ = tool_position(q)
    # Reach and height of the tool by the joints whose axes lie across the arm, in the arm's plane.
    wrist = (D5 * c4 + D6 * s4 * s5, D5 * s4 - D6 * c4 * s5)
    elbow = (wrist[0] - A3 * math.sin(q23), wrist[1] + A3 * math.cos(q23))
    shoulder = (elbow[0] - A2 * s2, elbow[1] + A2 * c2)
    reach_5, side_5, height_5 = -D6 * c4 * c5, -D6 * s5, -D6 * s4 * c5
    return (
        (-y, -c1 * shoulder[0], -c1 * elbow[0], -c1 * wrist[0], -c1 * reach_5 - s1 * side_5, 0.0),
        (x, -s1 * shoulder[0], -s1 * elbow[0], -s1 * wrist[0], -s1 * reach_5 + c1 * side_5, 0.0),
        (0.0, shoulder[1], elbow[1], wrist[1], height_5, 0.0),
    )


def tool_positions(q: Array) -> Array:
    """`tool_position` of many postures `(..., 6)`, as `(..., 3)`: 40 us for 100 of them, not 250."""
    angles = np.empty((5, *q.shape[:-1]))
    angles[0], angles[1], angles[4] = q[..., 0], q[..., 1], q[..., 4]
    np.add(q[..., 1], q[..., 2], out=angles[2])
    np.add(angles[2], q[..., 3], out=angles[3])
    (c1, c2, c23, c4, c5), (s1, s2, s23, s4, s5) = np.cos(angles), np.sin(angles)
    reach = A2 * c2 + A3 * c23 + D5 * s4 - D6 * c4 * s5
    side = D4 + D6 * c5
    positions = np.empty((*q.shape[:-1], 3))
    positions[..., 0] = -c1 * reach - s1 * side
    positions[..., 1] = c1 * side - s1 * reach
    positions[..., 2] = D1 + A2 * s2 + A3 * s23 - D5 * c4 - D6 * s4 * s5
    return positions


def stopping_paths(q: Vector6, qd: Vector6, speeds: Array, acceleration: float, hold_s: float) -> Array:
    """Where speedj leads: postures `(C, P, 6)` for each of the speeds `(C, 6)`.

    Each is held for three times up to `hold_s`; after each of them the arm brakes to a stand. The leading axis, whose
    speed changes most, does so by `acceleration`; the others change in proportion.
    """
    now = np.array(qd)
    change_s = np.maximum(np.abs(speeds - now).max(axis=1), 1e-12)[:, None, None] / acceleration
    ramp_s = np.minimum(HOLDS[:, None] * hold_s, change_s)  # (C, H, 1)
    goal = speeds[:, None]
    then = now + (goal - now) * (ramp_s / change_s)
    held = q + (now + then) / 2 * ramp_s + goal * (HOLDS[:, None] * hold_s - ramp_s)  # (C, H, 6)
    brake_s = np.abs(then).max(axis=2, keepdims=True) / acceleration
    postures: Array = held[:, :, None] + (then * brake_s)[:, :, None] * BRAKING
    return postures.reshape(len(speeds), -1, len(q))


class Fence:
    """Joint limits and a box for the tool, and which speeds do not lead out of them.

    The published runs turn a tool round that has left its box. This one looks ahead: a command is let through when
    the arm, obeying it for up to `hold_s` and braking then, stays inside. What would leave goes slower towards the
    face, and along it; when that leaves too, the arm brakes. An arm outside, because somebody pushed it, is led back.

    Commands act on the arm's target, so postures and speeds are those of the target too.

    Args:
        low_rad, high_rad: limits of the joints.
        box: where the tool may be.
        hold_s: longest time a command may stay in force, counted from the packet it was decided on.
        acceleration_rad_s2: of the leading axis.
    """

    def __init__(
        self,
        *,
        low_rad: Vector6,
        high_rad: Vector6,
        box: Box,
        hold_s: float,
        acceleration_rad_s2: float = ACCELERATION_RAD_S2,
    ) -> None:
        self.low_rad, self.high_rad, self.box = low_rad, high_rad, box
        self._hold_s, self._acceleration = hold_s, acceleration_rad_s2
        # Bounds of the tool's three coordinates and the six joints.
        self._low = np.array([*box.low_m, *low_rad]) + MARGINS
        self._high = np.array([*box.high_m, *high_rad]) - MARGINS

    def contains(self, q: Vector6) -> bool:
        """Whether an arm at rest there is inside, joints and tool; the faces belong to it."""
        within = all(low <= at <= high for low, at, high in zip(self.low_rad, q, self.high_rad, strict=True))
        return within and self.box.contains(tool_position(q))

    def limit(self, q: Vector6, qd: Vector6, wanted: Vector6) -> Vector6:
        """Speeds like `wanted` that keep the arm inside, as slow towards its faces as needed."""
        place, speeds = np.array([*tool_position(q), *q]), np.array(wanted)
        if (place < self._low).any() or (place > self._high).any():
            speeds = self._led_back(place, _rows(q), speeds)
        # Where the arm is beyond a bound, it must not get further out.
        low, high = np.minimum(self._low, place) - SLACK, np.maximum(self._high, place) + SLACK
        crossed = self._crossed(q, qd, speeds[None], low, high)[0]
        if not crossed.any():
            return _vector(speeds.tolist())
        rows = _rows(q)
        along = _slide(speeds, crossed, rows)
        for _ in range(2):  # who slides along one face may come to another
            along = _slide(along, self._crossed(q, qd, along[None], low, high)[0], rows)
        # As much of what leads to the faces as there is room for; then less and less of all.
        tries = np.vstack([along + SHARES * (speeds - along), along, SHARES * along])
        free = ~self._crossed(q, qd, tries, low, high).any(axis=1)
        return _vector(tries[free.argmax()].tolist()) if free.any() else ZERO

    def _crossed(self, q: Vector6, qd: Vector6, speeds: Array, low: Array, high: Array) -> npt.NDArray[np.bool_]:
        """Which bounds `(C, 18)` the arm would cross, first the nine lower ones, for each of the speeds `(C, 6)`.

        Braking at any time must be inside, as it is what is left to the next command when all others lead out.
        """
        postures = stopping_paths(q, qd, speeds, self._acceleration, self._hold_s)
        places = np.concatenate([tool_positions(postures), postures], axis=2)
        return np.concatenate([places.min(axis=1) < low, places.max(axis=1) > high], axis=1)

    def _led_back(self, place: Array, rows: Array, speeds: Array) -> Array:
        """The speeds, but inwards where the arm is beyond a bound."""
        beyond = place - np.clip(place, self._low, self._high)
        for axis in np.nonzero(beyond)[0]:
            inward = -np.clip(RETURN_PER_S * beyond[axis], -RETURN_MOST[axis], RETURN_MOST[axis])
            now = rows[axis] @ speeds
            if (now - inward) * beyond[axis] > 0:
                speeds = speeds + _along(rows[axis], inward - now)
        return speeds


def _rows(q: Vector6) -> Array:
    """How fast the tool's coordinates and the joints change for each joint's speed, `(9, 6)`."""
    return np.concatenate([tool_rows(q), np.eye(len(q))])


def _slide(speeds: Array, crossed: npt.NDArray[np.bool_], rows: Array) -> Array:
    """The speeds without their parts towards the crossed bounds, none above the largest of before."""
    slid = speeds
    for bound in np.nonzero(crossed)[0]:  # one after the other: what a later one brings back is seen by the next look
        row, sign = rows[bound % len(rows)], 1 if bound >= len(rows) else -1
        outward = row @ slid
        if outward * sign > 0:
            slid = slid - _along(row, outward)
    before, after = float(np.abs(speeds).max()), float(np.abs(slid).max())
    return slid * (before / after) if after > before else slid


def _along(row: Array, amount: float) -> Array:
    """The smallest change of speeds that changes their product with `row` by `amount`."""
    change: Array = row * (amount / max(LEAST_ROW, float(row @ row)))
    return change


def _mix(a: float, first: Vector3, b: float, second: Vector3) -> Vector3:
    x, y, z = (a * u + b * v for u, v in zip(first, second, strict=True))
    return x, y, z


def _minus(vector: Vector3) -> Vector3:
    x, y, z = vector
    return -x, -y, -z


def _vector(values: Sequence[float]) -> Vector6:
    a, b, c, d, e, f = values
    return a, b, c, d, e, f
