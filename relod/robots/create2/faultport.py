"""What the control socket of the simulated Create 2 understands (see `robots.faultserver`)."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from msgspec import Meta

from ..faultserver import CameraOperation, Operation, Seconds

__all__ = ["AnyOperation"]


class Battery(Operation, frozen=True):
    """Set the charge."""

    charge_mah: Annotated[float, Meta(ge=0, le=65535)]


class Dock(Operation, frozen=True):
    """Put the home base there or take it away."""

    present: bool


class Cliff(Operation, frozen=True):
    """Make the floor vanish under cliff sensors."""

    left: bool = False
    front_left: bool = False
    front_right: bool = False
    right: bool = False


class WheelDrop(Operation, frozen=True, tag="wheel_drop"):
    """Lift the robot off wheels."""

    left: bool = False
    right: bool = False


class Bump(Operation, frozen=True):
    """Press the bumper."""

    left: bool = False
    right: bool = False


class Charger(Operation, frozen=True):
    """Plug the charger into the robot's side."""

    plugged: bool


class Force(Operation, frozen=True):
    """Report a fixed value as a packet; null ends it."""

    packet: int
    value: int | None


class Stall(Operation, frozen=True):
    """Send nothing for a while; the robot goes on."""

    seconds: Seconds


class Freeze(Operation, frozen=True):
    """The firmware hangs for a while: hears and sends nothing, the wheels turn on."""

    seconds: Seconds


class Drop(Operation, frozen=True):
    """Lose the next bytes to the host."""

    count: Annotated[int, Meta(ge=0)]


class Corrupt(Operation, frozen=True):
    """Flip a bit in the next bytes to the host."""

    count: Annotated[int, Meta(ge=0)]


class HangUp(Operation, frozen=True, tag="hang_up"):
    """Pull the cable; put it back after a while. The robot goes on."""

    seconds: Seconds


class Wake(Operation, frozen=True):
    """Pulse the line that wakes a sleeping robot."""


class Place(Operation, frozen=True):
    """Carry the robot somewhere else."""

    x_m: float
    y_m: float
    heading_rad: float


class State(Operation, frozen=True):
    """Ask for everything about the robot."""


class WheelLog(Operation, frozen=True, tag="wheel_log"):
    """Ask for the wheel log."""


AnyOperation: TypeAlias = (
    Battery
    | Dock
    | Cliff
    | WheelDrop
    | Bump
    | Charger
    | Force
    | Stall
    | Freeze
    | Drop
    | Corrupt
    | HangUp
    | Wake
    | Place
    | CameraOperation
    | State
    | WheelLog
)
