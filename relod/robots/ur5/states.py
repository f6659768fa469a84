"""What a UR controller can be in, and what the simulated one is made with."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Annotated, Literal, NamedTuple

from msgspec import Meta

from ...config import Section
from ...runtime.clock import NS_PER_MS
from .arm import Vector6

__all__ = [
    "SERIES",
    "ArmSettings",
    "Limits",
    "MotionRecord",
    "Registers",
    "RobotMode",
    "RuntimeState",
    "SafetyMode",
    "Sample",
    "Series",
]

REGISTERS = 48  # of each kind
TURN_RAD = 2 * math.pi


class RuntimeState(IntEnum):
    """What the program does. STOPPED → PLAYING ⇄ PAUSED, and back to STOPPED; the others pass by unseen."""

    STOPPING = 0
    STOPPED = 1
    PLAYING = 2
    PAUSING = 3
    PAUSED = 4
    RESUMING = 5


class RobotMode(IntEnum):
    """Power and brakes. POWER_OFF → POWER_ON → IDLE (brakes on) → RUNNING."""

    NO_CONTROLLER = -1
    DISCONNECTED = 0
    CONFIRM_SAFETY = 1
    BOOTING = 2
    POWER_OFF = 3
    POWER_ON = 4
    IDLE = 5
    BACKDRIVE = 6
    RUNNING = 7


class SafetyMode(IntEnum):
    """What the safety system allows. From NORMAL to each other, and back by what `Controller` offers."""

    NORMAL = 1
    REDUCED = 2
    PROTECTIVE_STOP = 3
    RECOVERY = 4
    SAFEGUARD_STOP = 5
    SYSTEM_EMERGENCY_STOP = 6
    ROBOT_EMERGENCY_STOP = 7
    VIOLATION = 8
    FAULT = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A generation of controllers."""

    version: tuple[int, int, int, int]  # of its software
    tick_ns: int


SERIES = {
    "cb3": Series(version=(3, 15, 8, 106339), tick_ns=8 * NS_PER_MS),
    "e": Series(version=(5, 12, 2, 1101534), tick_ns=2 * NS_PER_MS),
}


class ArmSettings(Section, frozen=True):
    """The simulated arm and its controller."""

    series: Annotated[
        Literal["cb3", "e"], Meta(description="cb3: 125 ticks a second, as the UR5 has. e: 500, e-Series")
    ] = "cb3"
    lag_ms: Annotated[
        float, Meta(ge=0, le=1000, description="time constant with which joints follow what they are asked")
    ] = 16.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Where joints may go; beyond is a protective stop."""

    low: Vector6 = (-TURN_RAD,) * 6
    high: Vector6 = (TURN_RAD,) * 6

    def allow(self, q: Vector6) -> bool:
        """Whether a posture is within."""
        return all(low <= x <= high for low, x, high in zip(self.low, q, self.high, strict=True))


@dataclass(frozen=True, slots=True)
class Registers:
    """The general purpose registers, by number."""

    int_in: list[int] = field(default_factory=lambda: [0] * REGISTERS)
    int_out: list[int] = field(default_factory=lambda: [0] * REGISTERS)
    double_in: list[float] = field(default_factory=lambda: [0.0] * REGISTERS)
    double_out: list[float] = field(default_factory=lambda: [0.0] * REGISTERS)


class Sample(NamedTuple):
    """The arm at a tick; joint vectors `(6,)` in rad, rad/s, rad/s²."""

    t_ns: int
    q: Vector6
    qd: Vector6
    target_q: Vector6
    target_qd: Vector6
    target_qdd: Vector6
    robot_mode: RobotMode
    safety_mode: SafetyMode
    runtime_state: RuntimeState


class MotionRecord(NamedTuple):
    """One line of the motion log: another speed is asked for, or the arm began to move or came to stand."""

    t_ns: int
    asked_rad_s: float  # of the fastest joint; 0 = nothing is asked for
    speed_rad_s: float  # of the fastest joint
