"""The simulated arm: six joints that follow one motion at a time, one controller tick after the other.

Pure. A motion sets what the joints are asked to do (`target_q`); where they are (`q`) follows with a first-order lag,
as an arm's servos do. Joint vectors are tuples of six, base to wrist 3, in rad and rad/s. `acceleration` is always
that of the leading axis, the joint that changes most; the others change in proportion, as URScript has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["JOINTS", "ZERO", "Arm", "Motion", "MoveJ", "ServoJ", "SpeedJ", "StopJ", "Vector6"]

Vector6: TypeAlias = tuple[float, float, float, float, float, float]

JOINTS = 6
ZERO: Vector6 = (0.0,) * 6

STILL_RAD_S = 0.01  # an arm whose joints are all slower than this stands [assumed; a real one's noise is below it]
BRAKE_RAD_S2 = 15.0  # of an arm whose program ended or was paused, or whose safety system stopped it [assumed]
SETTLED_RAD = 1e-7  # a joint this close to its target is there
SERVO_RAD_S, SERVO_RAD_S2 = math.pi, 40.0  # what a joint can do


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedJ:
    """Keep these joint speeds."""

    qd: Vector6
    acceleration: float  # rad/s^2


@dataclass(frozen=True, slots=True, kw_only=True)
class StopJ:
    """Slow down to a stand."""

    acceleration: float  # rad/s^2


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveJ:
    """Go to a posture on a straight line in joint space; an arm that moves stops first."""

    q: Vector6
    speed: float  # rad/s of the leading axis
    acceleration: float  # rad/s^2


@dataclass(frozen=True, slots=True, kw_only=True)
class ServoJ:
    """Follow a posture that is given anew all the time."""

    q: Vector6
    lookahead_s: float  # time constant of the way there


Motion: TypeAlias = SpeedJ | StopJ | MoveJ | ServoJ


class Arm:
    """Six joints, standing at `q`, advanced by `step` once a tick.

    `motion` is None when nothing is asked for; `StopJ` and `MoveJ` end by themselves.
    """

    def __init__(self, q: Vector6, *, tick_s: float, lag_s: float) -> None:
        self.target_q = self.q = q
        self.target_qd = self.qd = ZERO  # over the last tick
        self.target_qdd = ZERO
        self.motion: Motion | None = None
        self._tick_s = tick_s
        self._gain = 1.0 - math.exp(-tick_s / lag_s) if lag_s > 0 else 1.0
        self._path_speed: float | None = None  # of a MoveJ under way

    @property
    def standing(self) -> bool:
        """Whether the joints stand and are asked to."""
        return self.target_qd == ZERO and max(map(abs, self.qd)) < STILL_RAD_S

    @property
    def asked_rad_s(self) -> float:
        """The largest speed of a joint that the motion asks for; 0 for none."""
        match self.motion:
            case SpeedJ(qd=qd):
                return max(map(abs, qd))
            case MoveJ(speed=speed):
                return speed
            case ServoJ():
                return SERVO_RAD_S
        return 0.0

    def place(self, q: Vector6) -> None:
        """Put the arm at a posture, standing."""
        self.target_q = self.q = q
        self.target_qd = self.qd = self.target_qdd = ZERO
        self.motion = self._path_speed = None

    def begin(self, motion: Motion | None) -> None:
        """Replace the motion; None lets the arm brake."""
        self.motion = motion
        self._path_speed = None

    def step(self, *, braking: bool = False) -> None:
        """One tick. While `braking` the arm slows down and its motion waits."""
        motion = self.motion
        if motion is None or braking:
            self._path_speed = None
            if self.target_qd != ZERO or self.target_qdd != ZERO or self.qd != ZERO:
                self._change_speed(ZERO, BRAKE_RAD_S2)
            return
        match motion:
            case SpeedJ():
                self._change_speed(motion.qd, motion.acceleration)
            case StopJ():
                self._change_speed(ZERO, motion.acceleration)
                if self.target_qd == ZERO:
                    self.motion = None
            case MoveJ():
                self._go(motion)
            case ServoJ():
                self._servo(motion)

    def _change_speed(self, goal: Vector6, acceleration: float) -> None:
        changes = [b - a for a, b in zip(self.target_qd, goal, strict=True)]
        largest, most = max(map(abs, changes)), acceleration * self._tick_s
        if largest <= most:
            self._drive(goal)
        else:
            share = most / largest
            self._drive(_vector([a + share * c for a, c in zip(self.target_qd, changes, strict=True)]))

    def _go(self, motion: MoveJ) -> None:
        if self._path_speed is None:
            if self.target_qd != ZERO:
                self._change_speed(ZERO, motion.acceleration)
                return
            self._path_speed = 0.0
        way = [b - a for a, b in zip(self.target_q, motion.q, strict=True)]
        length = max(map(abs, way))
        if length == 0.0:
            self.motion = self._path_speed = None
            self._follow(motion.q, ZERO)
            return
        most = motion.acceleration * self._tick_s
        # The speed from which steps of `most` come to a stand after `length`.
        braking = -most / 2 + math.sqrt(most * most / 4 + 2 * motion.acceleration * length)
        speed = min(self._path_speed + most, motion.speed, braking)
        if speed * self._tick_s >= length:
            self._path_speed = 0.0
            self._follow(motion.q, _vector([w / self._tick_s for w in way]))
        else:
            self._path_speed = speed
            self._drive(_vector([speed * w / length for w in way]))

    def _servo(self, motion: ServoJ) -> None:
        most = SERVO_RAD_S2 * self._tick_s
        speeds = []
        for at, goal, old in zip(self.target_q, motion.q, self.target_qd, strict=True):
            wanted = _within((goal - at) / max(motion.lookahead_s, self._tick_s), SERVO_RAD_S)
            speeds.append(old + _within(wanted - old, most))
        self._drive(_vector(speeds))

    def _drive(self, qd: Vector6) -> None:
        """One tick at these speeds."""
        self._follow(_vector([a + v * self._tick_s for a, v in zip(self.target_q, qd, strict=True)]), qd)

    def _follow(self, target_q: Vector6, target_qd: Vector6) -> None:
        tick_s, gain = self._tick_s, self._gain
        self.target_qdd = _vector([(b - a) / tick_s for a, b in zip(self.target_qd, target_qd, strict=True)])
        self.target_q, self.target_qd = target_q, target_qd
        q = _vector([a + gain * (b - a) for a, b in zip(self.q, target_q, strict=True)])
        if target_qd == ZERO and all(abs(b - a) < SETTLED_RAD for a, b in zip(q, target_q, strict=True)):
            q = target_q
        self.qd = _vector([(b - a) / tick_s for a, b in zip(self.q, q, strict=True)])
        self.q = q


def _vector(values: Sequence[float]) -> Vector6:
    a, b, c, d, e, f = values
    return a, b, c, d, e, f


def _within(value: float, most: float) -> float:
    return min(max(value, -most), most)
