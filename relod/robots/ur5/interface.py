"""What a UR5's driver is given and what it gives: its settings, the columns of a packet, the names of a command."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from ...config import Section
from .kinematics import ACCELERATION_RAD_S2, JOINT_NAMES

__all__ = ["COMMAND_NAMES", "SENSOR_COLUMNS", "RobotSettings"]

COMMAND_NAMES = tuple(f"{joint}_rad_s" for joint in JOINT_NAMES)
SENSOR_COLUMNS = (
    *(f"{joint}_rad" for joint in JOINT_NAMES),
    *(f"{joint}_rad_s" for joint in JOINT_NAMES),
    *(f"{joint}_target_rad" for joint in JOINT_NAMES),
    *(f"{joint}_target_rad_s" for joint in JOINT_NAMES),
    "controller_s",  # the controller's own time
    "robot_mode",
    "safety_mode",
    "runtime_state",
    "speed_scaling",  # the pendant's speed slider, and what the safety system makes of it
    "target_shown",  # request of the target that is painted; 0 = none
    "connection_epoch",
)


class RobotSettings(Section, frozen=True):
    """How the UR5 is driven."""

    # The task's fence counts on the bounds of these two.
    acceleration_rad_s2: Annotated[
        float,
        Meta(ge=ACCELERATION_RAD_S2, le=40, description="acceleration of the leading joint towards a commanded speed"),
    ] = ACCELERATION_RAD_S2
    stop_rad_s2: Annotated[
        float, Meta(gt=0, le=40, description="deceleration of the leading joint when the arm is to stand")
    ] = 4.0
    hold_ms: Annotated[
        float, Meta(ge=20, le=100, description="age of a command at which the arm is stopped, whoever fell silent")
    ] = 100.0
    # 10 Hz stopped an arm 0.12 s after its client was killed.
    watchdog_hz: Annotated[
        float, Meta(ge=2, le=125, description="how often the controller must hear from us, or it ends the script")
    ] = 10.0
    answer_limit_s: Annotated[
        float, Meta(gt=0, le=60, description="how long the controller may take to obey after it was reached")
    ] = 8.0
    reopen_limit_s: Annotated[
        float, Meta(ge=0, le=600, description="how long a lost controller may take to come back before the run ends")
    ] = 10.0
    protective_stops: Annotated[
        int, Meta(ge=0, le=1000, description="protective stops within the window after which the run goes on")
    ] = 10
    protective_window_s: Annotated[
        float, Meta(gt=0, le=86_400, description="time over which protective stops are counted")
    ] = 600.0
    target: Annotated[
        str,
        Meta(description="HOST[:PORT] of `relod target`; empty: this host, or a simulated robot's; none: no target"),
    ] = ""
