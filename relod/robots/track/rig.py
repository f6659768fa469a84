"""The rig's firmware and its wire protocol, pure: bytes and stamps in, bytes and poses out.

A carriage carries a camera over a plane: right, down, and along its line of sight. Ten milliseconds make a tick. At
each the rig takes over the newest command, sends its state, and moves on; its speed follows the command with a
first-order lag. Both packets have a fixed size and are little-endian float32:

    command  3 values  velocity to the right, down and away from the plane, mm/s
    state    6 values  position x, y and depth, mm; then the velocity it obeys, mm/s

The rig stands when the last command is older than 200 ms: no other watchdog is needed.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from typing import TypeAlias

from ...runtime.clock import NS_PER_MS, NS_PER_S

__all__ = [
    "COMMAND",
    "COMMAND_NAMES",
    "HIGH_MM",
    "HOME_MM",
    "LOW_MM",
    "MAX_SPEED_MM_S",
    "SENSOR_COLUMNS",
    "STAND",
    "STATE",
    "TICK_NS",
    "Rig",
    "Vector",
]

Vector: TypeAlias = tuple[float, float, float]

COMMAND = struct.Struct("<3f")
STATE = struct.Struct("<6f")
STAND = COMMAND.pack(0.0, 0.0, 0.0)

COMMAND_NAMES = ("x_mm_s", "y_mm_s", "depth_mm_s")
# What a state says, and last, as every driver adds it, how often the wire was opened.
SENSOR_COLUMNS = ("x_mm", "y_mm", "depth_mm", "asked_x_mm_s", "asked_y_mm_s", "asked_depth_mm_s", "connection_epoch")

TICK_NS = 10 * NS_PER_MS
WATCHDOG_NS = 200 * NS_PER_MS
MAX_SPEED_MM_S = 200.0  # of each axis; faster commands are cut
LOW_MM: Vector = (-80.0, -55.0, 35.0)  # where each axis ends
HIGH_MM: Vector = (80.0, 55.0, 130.0)
HOME_MM: Vector = (0.0, 0.0, 100.0)  # the plane's middle fills the picture


class Rig:
    """One rig on the caller's clock, at home when it is switched on at `start_ns`.

    What it does depends on the commands and their stamps only, never on how often it is asked.
    """

    def __init__(self, *, lag_ms: float, history_ns: int, start_ns: int) -> None:
        """`lag_ms`: time constant of the speed; `history_ns`: how far back `pose_at` may look."""
        self._gain = 1.0 - math.exp(-TICK_NS / (lag_ms * NS_PER_MS))
        self._asked: Vector = (0.0, 0.0, 0.0)
        self._asked_ns = start_ns
        self._speed: Vector = (0.0, 0.0, 0.0)
        self._path = deque([HOME_MM], maxlen=history_ns // TICK_NS + 2)  # poses at ticks, the last at the next one
        self._states: list[tuple[int, bytes]] = []
        self.next_tick_ns = start_ns + TICK_NS

    def receive(self, command: bytes, now_ns: int) -> None:
        """A command arrives. One with a value that is no number makes the rig stand."""
        self._run(now_ns)
        x, y, depth = map(_allowed, COMMAND.unpack(command))
        self._asked, self._asked_ns = (x, y, depth), now_ns

    def advance(self, now_ns: int) -> list[tuple[int, bytes]]:
        """The states `(sent_ns, packet)` since the last call."""
        self._run(now_ns)
        states, self._states = self._states, []
        return states

    def pose_at(self, at_ns: int) -> Vector:
        """Where the camera is at an instant up to the next tick; straight lines between ticks."""
        ticks_back = min(max(0.0, (self.next_tick_ns - at_ns) / TICK_NS), len(self._path) - 1.0)
        back = math.floor(ticks_back)
        later, earlier = self._path[-1 - back], self._path[max(-2 - back, -len(self._path))]
        share = ticks_back - back
        x, y, depth = (a + share * (b - a) for a, b in zip(later, earlier, strict=True))
        return x, y, depth

    @property
    def speed_mm_s(self) -> Vector:
        """How fast it moves until the next tick."""
        return self._speed

    def _run(self, now_ns: int) -> None:
        while self.next_tick_ns <= now_ns:
            self._tick()

    def _tick(self) -> None:
        at_ns, pose = self.next_tick_ns, self._path[-1]
        if at_ns - self._asked_ns > WATCHDOG_NS:
            self._asked = (0.0, 0.0, 0.0)
        self._states.append((at_ns, STATE.pack(*pose, *self._asked)))
        x, y, depth = (v + self._gain * (u - v) for v, u in zip(self._speed, self._asked, strict=True))
        self._speed = (x, y, depth)
        x, y, depth = (
            min(max(p + v * TICK_NS / NS_PER_S, low), high)
            for p, v, low, high in zip(pose, self._speed, LOW_MM, HIGH_MM, strict=True)
        )
        self._path.append((x, y, depth))
        self.next_tick_ns = at_ns + TICK_NS


def _allowed(speed_mm_s: float) -> float:
    return min(max(speed_mm_s, -MAX_SPEED_MM_S), MAX_SPEED_MM_S) if math.isfinite(speed_mm_s) else 0.0
