"""What the control socket of the simulated UR5 understands (see `robots.faultserver`)."""

from __future__ import annotations

from typing import TypeAlias

from ..faultserver import CameraOperation, Operation, Seconds
from .arm import Vector6
from .ports import Server

__all__ = ["AnyOperation", "WireOperation"]


class ProtectiveStop(Operation, frozen=True, tag="protective_stop"):
    """Stop the arm as a collision does; for five seconds it cannot be unlocked."""


class EmergencyStop(Operation, frozen=True, tag="emergency_stop"):
    """Press the emergency stop, or release it."""

    pressed: bool


class Safeguard(Operation, frozen=True):
    """Open the safeguard (a door), or close it."""

    open: bool


class Violation(Operation, frozen=True):
    """A safety violation: no power until the safety system is restarted."""


class KillProgram(Operation, frozen=True, tag="kill_program"):
    """The running program dies of an error."""


class JointLimits(Operation, frozen=True, tag="joint_limits"):
    """Where joints may go, rad; beyond is a protective stop."""

    low: Vector6
    high: Vector6


class Place(Operation, frozen=True):
    """Put the arm at a posture, standing."""

    q: Vector6


class RemoteControl(Operation, frozen=True, tag="remote_control"):
    """Take control to the teach pendant, or leave it to others; only controllers from 5.6 have the switch."""

    on: bool


class Claim(Operation, frozen=True):
    """Another client writes these input variables; an empty list gives them back."""

    names: list[str]


class Stall(Operation, frozen=True):
    """Send no data packages for a while; everything else goes on."""

    seconds: Seconds


class Freeze(Operation, frozen=True):
    """Hear and say nothing for a while, connections open; the arm's own loop goes on."""

    seconds: Seconds


class Mute(Operation, frozen=True):
    """The dashboard does not answer, or does again."""

    on: bool


class Drop(Operation, frozen=True):
    """Cut the connections there are; new ones are welcome."""

    servers: tuple[Server, ...] = ("dashboard", "script", "rtde")


class HangUp(Operation, frozen=True, tag="hang_up"):
    """Cut the connections and close the ports for a while, as a controller that is switched off."""

    seconds: Seconds
    servers: tuple[Server, ...] = ("dashboard", "script", "rtde")


class State(Operation, frozen=True):
    """Ask for everything about the robot."""


class MotionLog(Operation, frozen=True, tag="motion_log"):
    """Ask for the motion log."""


WireOperation: TypeAlias = RemoteControl | Claim | Stall | Freeze | Mute | Drop | HangUp
AnyOperation: TypeAlias = (
    ProtectiveStop
    | EmergencyStop
    | Safeguard
    | Violation
    | KillProgram
    | JointLimits
    | Place
    | WireOperation
    | CameraOperation
    | State
    | MotionLog
)
