"""What commissioning knows about the rig: its axes, and how to listen to its states."""

from __future__ import annotations

from collections.abc import Sequence

from ...runtime.clock import NS_PER_S, monotonic_ns
from ...types import SensorWindow
from .driver import StateReader, connect, moved
from .rig import COMMAND_NAMES, SENSOR_COLUMNS

__all__ = ["TrackCommissioning"]

TRY_MM_S = 30.0  # from home no axis comes to its end


class TrackCommissioning:
    """`runtime.trial.Commissioning` of a rig that stands at home."""

    sensor_names: tuple[str, ...] = SENSOR_COLUMNS
    command_names: tuple[str, ...] = COMMAND_NAMES
    take_control = 0  # the rig needs no request to obey
    question = "Is its camera free to move by 10 cm each way, and can you reach its power switch?"
    motions: tuple[tuple[str, tuple[float, ...]], ...] = (
        ("right", (TRY_MM_S, 0.0, 0.0)),
        ("left", (-TRY_MM_S, 0.0, 0.0)),
        ("down", (0.0, TRY_MM_S, 0.0)),
        ("up", (0.0, -TRY_MM_S, 0.0)),
        ("closer", (0.0, 0.0, -TRY_MM_S)),
        ("away", (0.0, 0.0, TRY_MM_S)),
    )
    cruise: tuple[float, ...] = (TRY_MM_S, 0.0, 0.0)

    def rows(self, window: SensorWindow) -> list[tuple[str, str, str]]:
        """The newest state."""
        return [(name, f"{window.newest(name):.1f}", _unit(name)) for name in window.names]

    def summary(self, window: SensorWindow) -> str:
        """Where the camera is."""
        x, y, depth = window.values[-1, :3]
        return f"camera {x:.0f} mm right and {y:.0f} mm below the middle, {depth:.0f} mm away"

    def speeds(self, window: SensorWindow) -> tuple[float, ...]:
        """Right, down and away in mm/s; not-a-number when there are fewer than two states."""
        if len(window.seq) < 2:
            return (float("nan"),) * len(COMMAND_NAMES)
        duration_s = int(window.arrived_ns[-1] - window.arrived_ns[0]) / NS_PER_S
        travelled = window.values[-1, :3] - window.values[0, :3]
        return tuple((travelled / duration_s).tolist())

    def moved(self, before: Sequence[float], after: Sequence[float]) -> bool:
        """Whether the rig moved, or is asked to."""
        return moved(before, after)

    def listen(self, address: str) -> StateListener:
        """The rig's states, on a connection that never commands."""
        return StateListener(address)


class StateListener:
    """Reads states beside the device process."""

    def __init__(self, address: str) -> None:
        self._wire = connect(address)
        self._reader = StateReader(self._wire)

    def packets(self) -> list[tuple[int, Sequence[float]]]:
        """States since the last call, stamped now; empty when the rig is gone."""
        try:
            states = self._reader.read()
        except OSError:
            return []
        arrived_ns = monotonic_ns()
        return [(arrived_ns, values) for values in states]

    def close(self) -> None:
        """Hang up."""
        self._wire.close()


def _unit(name: str) -> str:
    return "mm/s" if name.endswith("_mm_s") else "mm" if name.endswith("_mm") else ""
