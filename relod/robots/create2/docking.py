"""How the simulated Create 2 drives to its home base after SEEK_DOCK.

The robot's own way, by the base's infrared beams, is not published; this one steers by the plant's true pose: to a
point in front of the base, then along its axis until the contacts touch. Speeds are multiples of the robot's
28.5 mm/s steps.
"""

from __future__ import annotations

import math
from enum import Enum

from .plant import DOCK_POSE, Plant

__all__ = ["Docking"]

TURN_MM_S = 57.0
CRUISE_MM_S = 142.5
ENTER_MM_S = 85.5
CORRECTION_MM_S = 28.5  # taken from one wheel while driving

APPROACH_M = 0.30  # of the point in front of the base
ARRIVED_M = 0.03
AIM_RAD = 0.15  # turns on the spot beyond this error; above what one turn overshoots by in 80 ms
HOLD_RAD = 0.03
MISSED_M = 0.01  # this close to the base without contact means another attempt


class Phase(Enum):
    """Stages of one attempt. Moves: APPROACH to ENTER, ENTER back to APPROACH when the contacts were missed."""

    APPROACH = "approach"  # to the point in front of the base
    ENTER = "enter"  # along the axis onto the contacts


class Docking:
    """One SEEK_DOCK. Without a base it turns on the spot for ever, as a robot that sees no beam searches on."""

    def __init__(self) -> None:
        self.phase = Phase.APPROACH

    def wheels(self, plant: Plant) -> tuple[float, float] | None:
        """Speeds of the left and right wheel in mm/s for the next tick; None once the robot has docked."""
        if plant.on_dock:
            return None
        if not plant.dock_present:
            return -TURN_MM_S, TURN_MM_S
        pose = plant.pose
        out_m, aside_m = pose.x_m - DOCK_POSE.x_m, pose.y_m - DOCK_POSE.y_m
        if self.phase is Phase.APPROACH:
            if math.hypot(out_m - APPROACH_M, aside_m) > ARRIVED_M:
                heading_rad = math.atan2(-aside_m, APPROACH_M - out_m)
                return _steer(heading_rad - pose.heading_rad, CRUISE_MM_S)
            self.phase = Phase.ENTER
        if out_m < MISSED_M:
            self.phase = Phase.APPROACH
        towards_axis_rad = max(-0.4, min(0.4, 4.0 * aside_m))
        return _steer(DOCK_POSE.heading_rad + towards_axis_rad - pose.heading_rad, ENTER_MM_S)


def _steer(error_rad: float, speed_mm_s: float) -> tuple[float, float]:
    error_rad = (error_rad + math.pi) % (2 * math.pi) - math.pi
    if abs(error_rad) > AIM_RAD:
        turn_mm_s = math.copysign(TURN_MM_S, error_rad)
        return -turn_mm_s, turn_mm_s
    left = speed_mm_s - (CORRECTION_MM_S if error_rad > HOLD_RAD else 0.0)
    right = speed_mm_s - (CORRECTION_MM_S if error_rad < -HOLD_RAD else 0.0)
    return left, right
