"""What commissioning knows about a Gymnasium environment: nothing can break, and it stands or it does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...runtime.clock import monotonic_ns
from ...types import SensorWindow
from .driver import PacketReader, connect
from .simulation import Shape

__all__ = ["GymCommissioning", "make_commissioning"]


class GymCommissioning:
    """`runtime.trial.Commissioning` of an environment; `make_commissioning` says which."""

    shape: Shape
    sensor_names: tuple[str, ...]
    command_names: tuple[str, ...]
    take_control = 1  # the seed of an episode
    question = "It is a program; nothing real moves."
    motions: tuple[tuple[str, tuple[float, ...]], ...] = ()
    cruise: tuple[float, ...]

    def rows(self, window: SensorWindow) -> list[tuple[str, str, str]]:
        """The newest packet."""
        return [(name, f"{window.newest(name):.3g}", "") for name in window.names]

    def summary(self, window: SensorWindow) -> str:
        """How far the episode is."""
        return f"{window.newest('steps'):.0f} steps"

    def speeds(self, window: SensorWindow) -> tuple[float, ...]:
        """Whether it goes on; the actions cannot be seen in it."""
        return (*(0.0,) * self.shape.actions, window.newest("go"))

    def moved(self, before: Sequence[float], after: Sequence[float]) -> bool:
        """Whether a step was made between two packets."""
        return before[-2] != after[-2]

    def listen(self, address: str) -> Listener:
        """Its packets, on a connection that never commands."""
        return Listener(address, self.shape)


class Listener:
    """Hears the packets beside whoever drives."""

    def __init__(self, address: str, shape: Shape) -> None:
        self._wire = connect(address)
        self._reader = PacketReader(self._wire, shape)

    def packets(self) -> list[tuple[int, Sequence[float]]]:
        """Packets since the last call, stamped now; empty when it is gone."""
        try:
            return [(monotonic_ns(), (*values, 0.0)) for values in self._reader.read()]
        except OSError:
            return []

    def close(self) -> None:
        """Hang up."""
        self._wire.close()


def make_commissioning(shape: Shape) -> Any:
    """What commissioning knows about environments of this shape."""
    names = {
        "shape": shape,
        "sensor_names": shape.sensor_names,
        "command_names": shape.command_names,
        "cruise": (0.0,) * shape.actions + (1.0,),
    }
    return type("GymCommissioning", (GymCommissioning,), names)
