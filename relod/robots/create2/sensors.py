"""What the simulated Create 2 reports: the value of every sensor packet, and the faults that may be put into it."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from . import oi
from .oi import Mode
from .plant import DOCK_POSE, WHEEL_BASE_M, Plant

__all__ = ["Faults", "RobotState", "Sensors"]

LIGHT_BUMPER_COUNTS = 200  # signal at which packet 45 calls an obstacle [assumed]
DOCK_BEAM_M = 0.6  # reach of the home base's infrared beams [assumed]


@dataclass(slots=True, kw_only=True)
class Faults:
    """What is wrong with the robot; set at any time, seen from the next tick on."""

    wheel_drop: int = 0  # oi.Bumps bits
    bump: int = 0  # oi.Bumps bits, beside those of real contacts
    cliff: tuple[bool, bool, bool, bool] = (False, False, False, False)  # left, front left, front right, right
    internal_charger: bool = False
    forced: dict[int, int] = field(default_factory=dict)  # packet id to the value reported
    silent_until_ns: int = 0  # sends nothing, goes on otherwise
    frozen_until_ns: int = 0  # hears, sends and decides nothing: the wheels turn on

    def force(self, packet_id: int, value: int | None) -> None:
        """Report `value` as packet `packet_id`, None to report the truth again.

        Raises:
            ValueError: there is no such packet, or it cannot hold the value.
        """
        if packet_id not in oi.PACKETS:
            raise ValueError(f"there is no single packet {packet_id}")
        if value is None:
            self.forced.pop(packet_id, None)
            return
        try:
            struct.pack(">" + oi.PACKETS[packet_id].code, value)
        except struct.error as error:
            raise ValueError(f"packet {packet_id} ({oi.PACKETS[packet_id].name}) cannot be {value}: {error}") from None
        self.forced[packet_id] = value


@dataclass(slots=True, kw_only=True)
class RobotState:
    """What packets say about the firmware itself; the firmware writes it."""

    mode: Mode = Mode.OFF
    drive: tuple[int, int] = (0, 0)  # velocity in mm/s and radius in mm of the last DRIVE
    song: int = 0
    song_until_ns: int = 0
    stream_packets: int = 0


class Sensors:
    """Packet values of one robot. Bumper and light bumpers are read once per tick, as the robot does."""

    def __init__(self, plant: Plant, faults: Faults, state: RobotState) -> None:
        self.plant, self.faults, self.state = plant, faults, state
        self._light = [0] * 6
        self._bumps = 0
        self._reported_m = [0.0, 0.0]  # rolled by each wheel when distance and angle were last reported
        self.readers = self._make_readers()

    def sample(self) -> None:
        """Read the sensors that are read once per tick."""
        self._light = self.plant.light_bumps()
        self._bumps = self.plant.bumps()

    def packets(self, ids: Sequence[int]) -> bytes:
        """Bare values of the packets, groups among them; unknown ids are skipped."""
        singles = oi.members([i for i in ids if i in oi.PACKETS or i in oi.GROUPS])
        values = [self.faults.forced.get(i, self.readers[i]()) for i in singles]
        return struct.pack(">" + "".join(oi.PACKETS[i].code for i in singles), *values)

    @property
    def charging(self) -> bool:
        """Whether current flows into the battery: SAFE and FULL never charge."""
        return self.state.mode <= Mode.PASSIVE and (self.plant.on_dock or self.faults.internal_charger)

    def _make_readers(self) -> dict[int, Callable[[], int]]:
        """How each packet's value is found; packets of parts that a Create 2 lacks read 0."""
        plant, state = self.plant, self.state
        return {
            **dict.fromkeys(oi.PACKETS, lambda: 0),
            **{9 + i: partial(self._cliff, i) for i in range(4)},
            **{28 + i: partial(self._cliff_signal, i) for i in range(4)},
            **{46 + i: partial(self._light_signal, i) for i in range(6)},
            7: lambda: self._bumps | self.faults.bump | self.faults.wheel_drop,
            8: lambda: int(self._light[5] > LIGHT_BUMPER_COUNTS),
            17: self._infrared,
            19: self._distance_mm,
            20: self._angle_deg,
            21: self._charging_state,
            22: lambda: int(13_200 + 3_600 * plant.battery_mah / plant.settings.battery_capacity_mah),
            23: lambda: int(plant.battery_current_a * 1e3),
            24: lambda: 28,
            25: lambda: int(plant.battery_mah),
            26: lambda: int(plant.settings.battery_capacity_mah),
            27: lambda: min(1023, self._light[5]),
            34: self._charging_sources,
            35: lambda: int(state.mode),
            36: lambda: state.song,
            37: lambda: int(plant.now_ns < state.song_until_ns),
            38: lambda: state.stream_packets,
            39: lambda: state.drive[0],
            40: lambda: state.drive[1],
            41: lambda: int(plant.requested_right_mm_s),
            42: lambda: int(plant.requested_left_mm_s),
            43: lambda: _int16(plant.encoder_counts()[0]),
            44: lambda: _int16(plant.encoder_counts()[1]),
            45: lambda: sum(1 << i for i in range(6) if self._light[i] > LIGHT_BUMPER_COUNTS),
            52: self._infrared,
            53: self._infrared,
            54: lambda: int(abs(plant.left_mm_s) * 0.6),
            55: lambda: int(abs(plant.right_mm_s) * 0.6),
            58: lambda: int(plant.left_mm_s > 0 and plant.right_mm_s > 0),
        }

    def _cliff(self, index: int) -> int:
        return int(self.faults.cliff[index])

    def _cliff_signal(self, index: int) -> int:
        return 50 if self.faults.cliff[index] else 2700

    def _light_signal(self, index: int) -> int:
        return self._light[index]

    def _infrared(self) -> int:
        """172 = both buoys and the force field, wherever the home base is near."""
        pose = self.plant.pose
        near = math.hypot(pose.x_m - DOCK_POSE.x_m, pose.y_m - DOCK_POSE.y_m) < DOCK_BEAM_M
        return 172 if self.plant.dock_present and near else 0

    def _distance_mm(self) -> int:
        """Millimetres since the last request, by the encoders."""
        left_m = self.plant.rolled_left_m - self._reported_m[0]
        right_m = self.plant.rolled_right_m - self._reported_m[1]
        whole_mm = int((left_m + right_m) / 2 * 1e3)
        self._reported_m[0] += whole_mm / 1e3
        self._reported_m[1] += whole_mm / 1e3
        return max(-32768, min(32767, whole_mm))

    def _angle_deg(self) -> int:
        """Degrees turned to the left since the last request, by the encoders."""
        left_m = self.plant.rolled_left_m - self._reported_m[0]
        right_m = self.plant.rolled_right_m - self._reported_m[1]
        whole_deg = int(math.degrees((right_m - left_m) / WHEEL_BASE_M))
        arc_m = math.radians(whole_deg) * WHEEL_BASE_M / 2
        self._reported_m[0] -= arc_m
        self._reported_m[1] += arc_m
        return max(-32768, min(32767, whole_deg))

    def _charging_sources(self) -> int:
        internal = oi.ChargingSource.INTERNAL.value if self.faults.internal_charger else 0
        return internal | (oi.ChargingSource.HOME_BASE.value if self.plant.on_dock else 0)

    def _charging_state(self) -> int:
        """0 not charging, 2 full charging, 3 trickle charging, 4 waiting for a mode that charges."""
        if self.charging:
            return 2 if self.plant.battery_mah < self.plant.settings.battery_capacity_mah - 5 else 3
        return 4 if self._charging_sources() else 0


def _int16(count: int) -> int:
    """The count as the robot's 16-bit register shows it."""
    return (count + 32768) % 65536 - 32768
