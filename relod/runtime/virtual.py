"""The virtual driver: the whole run in one process on a virtual clock, deterministic, as fast as the machine.

The same cycle, task, actor, replay and learner as on the wall clock; the world answers in virtual time, and updates
happen where the schedule says, between two cycles. Same seed, same run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..robots.checked import CheckedWorld
from ..robots.simcamera import SimFrame
from ..types import Command, Frame, SensorWindow, TaskSpec
from .clock import NS_PER_MS, VirtualClock
from .cycle import Cycle, Inputs, Phase, Tick

__all__ = ["WRITE_NS", "Senses", "VirtualRun", "World"]

WRITE_NS = 2 * NS_PER_MS  # deadline to the command's last byte on the wire; about the median on the wall clock


class World(Protocol):
    """A robot and its camera in virtual time."""

    def advance(self, now_ns: int) -> tuple[list[tuple[int, npt.NDArray[Any]]], list[SimFrame]]:
        """Packets `(arrived_ns, values)` and camera frames that arrived since the last call."""
        ...

    def execute(self, command: Command, now_ns: int) -> None:
        """The robot gets a command at `now_ns`."""
        ...

    def begin_episode(self) -> None:
        """A reset begins."""
        ...


class Senses:
    """What the rings hold on the wall clock."""

    def __init__(self, spec: TaskSpec, sensor_names: tuple[str, ...]) -> None:
        self.sensor_names = sensor_names
        self.packets: deque[tuple[int, int, npt.NDArray[Any]]] = deque(maxlen=spec.sensor_window)
        self.frames: deque[Frame] = deque(maxlen=spec.frames)
        self.packet_seq = 0
        self.frame_id = 0

    def take(self, packets: list[tuple[int, npt.NDArray[Any]]], frames: list[SimFrame]) -> list[Frame]:
        """Add what arrived; returns the new frames."""
        for arrived_ns, values in packets:
            self.packet_seq += 1
            self.packets.append((self.packet_seq, arrived_ns, values))
        new = []
        for frame in frames:
            self.frame_id += 1
            new.append(
                Frame(
                    id=self.frame_id,
                    captured_ns=frame.captured_ns,
                    arrived_ns=frame.available_ns,
                    image=frame.image,
                )
            )
        self.frames.extend(new)
        return new

    def inputs(self) -> Inputs:
        """What a cycle is given."""
        count = len(self.packets)
        window = SensorWindow(
            names=self.sensor_names,
            seq=np.array([seq for seq, _, _ in self.packets], np.int64),
            arrived_ns=np.array([arrived_ns for _, arrived_ns, _ in self.packets], np.int64),
            values=np.array([values for _, _, values in self.packets], np.float64).reshape(
                count, len(self.sensor_names)
            ),
        )
        return Inputs(window=window, frames=tuple(self.frames))


class VirtualRun:
    """Runs cycles until the run is over.

    Args:
        on_frames: called with the frames that arrived before each cycle.
        on_tick: called after each cycle, in the place of the slack; updates and policy swaps happen there.
    """

    def __init__(
        self,
        *,
        cycle: Cycle,
        world: World,
        spec: TaskSpec,
        sensor_names: tuple[str, ...],
        on_frames: Callable[[list[Frame]], None],
        on_tick: Callable[[int, Inputs, Tick], None],
    ) -> None:
        self.clock = VirtualClock()
        self._cycle, self._spec = cycle, spec
        self._world = CheckedWorld(world, len(sensor_names))
        self._on_frames, self._on_tick = on_frames, on_tick
        self._senses = Senses(spec, sensor_names)
        self._deadline_ns = self.clock.now_ns()

    def ticks(self) -> Iterator[Tick]:
        """One cycle after another; ends with the run."""
        while True:
            self._deadline_ns += self._spec.cycle_ns
            self.clock.advance_to(self._deadline_ns)
            new = self._senses.take(*self._world.advance(self._deadline_ns))
            if new:
                self._on_frames(new)
            inputs = self._senses.inputs()
            tick = self._cycle.tick(self._deadline_ns, inputs)
            self._world.execute(tick.command, self._deadline_ns + WRITE_NS)
            if tick.end is not None:
                self._world.begin_episode()
            self._on_tick(self._deadline_ns, inputs, tick)
            yield tick
            if tick.phase is Phase.OVER:
                return
