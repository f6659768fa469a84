"""What commissioning knows about the UR5: its joints, its states in words, and how to listen beside the driver."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...errors import StartError
from ...runtime.clock import NS_PER_S, monotonic_ns
from ...types import SensorWindow
from .driver import state_name
from .interface import COMMAND_NAMES, SENSOR_COLUMNS
from .kinematics import JOINT_NAMES
from .listener import StateListener

__all__ = ["Bystander", "UR5Commission"]

# Small: about 8 degrees in the 1.6 s of a motion, so that no posture is far from where the arm was put.
TRY_RAD_S = 0.1
CRUISE_RAD_S = 0.3
STILL_RAD_S = 0.01
MOTIONS = 5  # the last joint only turns the tool, with whatever hangs on its cable

_SPEEDS = tuple(SENSOR_COLUMNS.index(f"{joint}_rad_s") for joint in JOINT_NAMES)
_ASKED = tuple(SENSOR_COLUMNS.index(f"{joint}_target_rad_s") for joint in JOINT_NAMES)
_ANGLES = tuple(SENSOR_COLUMNS.index(f"{joint}_rad") for joint in JOINT_NAMES)


class UR5Commission:
    """`runtime.trial.Commissioning` of a UR5 with free space around it."""

    sensor_names: tuple[str, ...] = SENSOR_COLUMNS
    command_names: tuple[str, ...] = COMMAND_NAMES
    take_control = 0  # the uploaded script is in control
    question = (
        "Each joint turns by 10 degrees, the base to and fro by 30. Is there room for that, with nobody in reach, and"
        " do you have a hand on the emergency stop?"
    )
    motions: tuple[tuple[str, tuple[float, ...]], ...] = tuple(
        (
            f"{JOINT_NAMES[joint]} {word}",
            tuple(sign * TRY_RAD_S if i == joint else 0.0 for i in range(len(JOINT_NAMES))),
        )
        for joint in range(MOTIONS)
        for word, sign in (("forward", 1.0), ("back", -1.0))
    )
    cruise: tuple[float, ...] = (CRUISE_RAD_S, *[0.0] * (len(JOINT_NAMES) - 1))

    def rows(self, window: SensorWindow) -> list[tuple[str, str, str]]:
        """The newest packet; states in words, angles in degrees."""
        return [(_shown(name), *_in_words(name, window.newest(name))) for name in window.names]

    def summary(self, window: SensorWindow) -> str:
        """Modes, the speed slider, and what does not suit a first motion."""
        modes = ", ".join(
            f"{name.replace('_', ' ')} {state_name(name, int(window.newest(name)))}"
            for name in ("robot_mode", "safety_mode")
        )
        scaling = window.newest("speed_scaling")
        slow = "" if scaling > 0.99 else f" (the pendant slows the arm down to {scaling:.0%})"
        return f"{modes}{slow}"

    def speeds(self, window: SensorWindow) -> tuple[float, ...]:
        """Joint speeds in rad/s by the joints' encoders; not-a-number when there are fewer than two packets."""
        if len(window.seq) < 2:
            return (math.nan,) * len(JOINT_NAMES)
        duration_s = int(window.arrived_ns[-1] - window.arrived_ns[0]) / NS_PER_S
        travelled = window.values[-1, _ANGLES] - window.values[0, _ANGLES]
        return tuple((travelled / duration_s).tolist())

    def moved(self, before: Sequence[float], after: Sequence[float]) -> bool:
        """Whether a joint moves, or is asked to."""
        return any(abs(after[i]) > STILL_RAD_S for i in _SPEEDS) or any(after[i] for i in _ASKED)

    def listen(self, address: str) -> Bystander:
        """The controller's packets, on a connection that never commands."""
        return Bystander(address)


class Bystander:
    """Hears the packets beside whoever drives. `StartError`: the controller does not let it."""

    def __init__(self, address: str) -> None:
        try:
            self._listener = StateListener(address)
        except (OSError, ValueError) as error:
            raise StartError(f"{address} sends no packets to a second listener: {error}") from error

    def packets(self) -> list[tuple[int, Sequence[float]]]:
        """Packets since the last call, stamped now, in the order of `SENSOR_COLUMNS`; empty when the controller is
        gone."""
        try:
            packets = self._listener.read()
        except OSError:
            return []
        arrived_ns = monotonic_ns()
        return [(arrived_ns, (*values, 0.0, 0.0)) for values in packets]  # no target and no connection of ours

    def close(self) -> None:
        """Hang up."""
        self._listener.close()


def _shown(name: str) -> str:
    if name == "controller_s":
        return "controller's time"
    return name.removesuffix("_rad_s").removesuffix("_rad").replace("_", " ")


def _in_words(name: str, value: float) -> tuple[str, str]:
    """Value and unit for people."""
    if name.endswith("_rad_s"):
        return f"{value:.3f}", "rad/s"
    if name.endswith("_rad"):
        return f"{math.degrees(value):.1f}", "°"
    if name == "controller_s":
        return f"{value:.1f}", "s"
    return (f"{value:.0%}", "") if name == "speed_scaling" else (state_name(name, int(value)), "")
