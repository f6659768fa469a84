"""What commissioning knows about the Create 2: its motions, its encoders, and how to listen to its stream."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from ...runtime.clock import NS_PER_S, monotonic_ns
from ...types import SensorWindow
from . import oi
from .driver import COMMAND_NAMES, SENSOR_COLUMNS, Request

__all__ = ["Create2Commissioning"]

TRY_MM_S = 114.0  # four of the robot's speed steps of 28.5 mm/s, so that what it does is what it was asked
CRUISE_MM_S = 150.0  # the task's fastest
READ_BYTES = 4096
UNITS = {"mm_s": "mm/s", "mah": "mAh", "mv": "mV", "ma": "mA", "c": "°C"}

_COUNTS = tuple(SENSOR_COLUMNS.index(name) for name in ("encoder_left_counts", "encoder_right_counts"))
_ASKED = tuple(SENSOR_COLUMNS.index(name) for name in ("requested_left_mm_s", "requested_right_mm_s"))
_PACKETS = {packet.full_name: packet for packet in oi.PACKETS.values()}


class Create2Commissioning:
    """`runtime.trial.Commissioning` of a Create 2."""

    sensor_names: tuple[str, ...] = SENSOR_COLUMNS
    command_names: tuple[str, ...] = COMMAND_NAMES
    # With its wheels in the air the robot reports wheel drops, and would leave SAFE at once.
    take_control = int(Request.FULL)
    question = "Are its wheels off the floor, and can you reach its power switch?"
    motions: tuple[tuple[str, tuple[float, ...]], ...] = (
        ("left wheel forward", (TRY_MM_S, 0.0)),
        ("left wheel backward", (-TRY_MM_S, 0.0)),
        ("right wheel forward", (0.0, TRY_MM_S)),
        ("right wheel backward", (0.0, -TRY_MM_S)),
    )
    cruise: tuple[float, ...] = (CRUISE_MM_S, CRUISE_MM_S)

    def rows(self, window: SensorWindow) -> list[tuple[str, str, str]]:
        """The newest packet, `oi_mode` and the bumper's bits in words."""
        rows = []
        for name in window.names:
            value = int(window.newest(name))
            packet = _PACKETS.get(name)
            shown, unit = (packet.name, packet.unit) if packet is not None else (name, "")
            rows.append((shown.replace("_", " "), _in_words(name, value), UNITS.get(unit, unit)))
        return rows

    def summary(self, window: SensorWindow) -> str:
        """Battery, mode and charger."""
        mode = oi.Mode(int(window.newest("oi_mode"))).name
        charger = "on a charger" if window.newest("charging_sources") else "not on a charger"
        return f"battery {window.newest('battery_charge_mah'):.0f} mAh, mode {mode}, {charger}"

    def speeds(self, window: SensorWindow) -> tuple[float, ...]:
        """Left and right in mm/s; not-a-number when there are fewer than two packets."""
        if len(window.seq) < 2:
            return float("nan"), float("nan")
        duration_s = int(window.arrived_ns[-1] - window.arrived_ns[0]) / NS_PER_S
        counts = np.diff(window.values[:, _COUNTS], axis=0)
        travelled = ((counts + 0x8000) % 0x10000 - 0x8000).sum(axis=0)  # the counters wrap at 16 bits
        left, right = (travelled * oi.MM_PER_COUNT / duration_s).tolist()
        return left, right

    def moved(self, before: Sequence[float], after: Sequence[float]) -> bool:
        """Whether an encoder counted or a speed is asked for."""
        return any(after[i] != before[i] for i in _COUNTS) or any(after[i] for i in _ASKED)

    def listen(self, address: str) -> StreamListener:
        """The robot's stream, read beside the device process."""
        return StreamListener(address)


class StreamListener:
    """Reads the stream from a descriptor of its own; what it reads, the device process does not get."""

    def __init__(self, address: str) -> None:
        self._fd = os.open(address, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
        self._decoder = oi.StreamDecoder(oi.STREAM_IDS)

    def packets(self) -> list[tuple[int, Sequence[float]]]:
        """Packets since the last call, stamped now; empty when the port is gone."""
        try:
            data = os.read(self._fd, READ_BYTES)
        except OSError:
            return []
        arrived_ns = monotonic_ns()
        return [(arrived_ns, values) for values in self._decoder.feed(data)]

    def close(self) -> None:
        """Let the port go."""
        os.close(self._fd)


def _in_words(name: str, value: int) -> str:
    if name == "oi_mode":
        return oi.Mode(value).name
    if name == "bumps_wheel_drops":
        bits = [bit.name.lower().replace("_", " ") for bit in oi.Bumps(value) if bit.name]
        return ", ".join(bits) or "none"
    return str(value)
