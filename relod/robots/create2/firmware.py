"""The simulated Create 2's firmware: command bytes in, replies and stream frames out, over a `Plant`.

Pure: no I/O and no clock. Every call brings the present in ns; what comes out depends on the seed and on the stamped
bytes that went in, bit by bit, and not on how often it was called. It serves the pseudo-terminal emulator in wall
time and a single-process run in virtual time alike.
"""

from __future__ import annotations

import struct
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from . import oi
from .docking import Docking
from .oi import Mode, Opcode
from .plant import BODY_RADIUS_M, WHEEL_BASE_M, Plant, Pose, WheelRecord
from .sensors import Faults, RobotState, Sensors

__all__ = ["Faults", "Firmware", "StreamFrame"]

NOTE_LIMIT = 256

BOOT_TEXT = (
    b"bl-start\r\nSTR730\r\nbootloader id: #x47175347 4C636FFF\r\nbootloader info rev: #xF000\r\n"
    b"bootloader rev: #x0001\r\n2007-05-14-1715-L   \r\nRoomba by iRobot!\r\nstr730\r\n2012-03-22-1549-L \r\n"
    b"battery-current-zero 257\r\n\r\nr3_robot/tags/release-3.8.2:5873 CLEAN\r\n"
)

MODE_AFTER = {
    Opcode.RESET: Mode.OFF,
    Opcode.STOP: Mode.OFF,
    Opcode.START: Mode.PASSIVE,
    Opcode.POWER: Mode.PASSIVE,
    Opcode.SPOT: Mode.PASSIVE,
    Opcode.CLEAN: Mode.PASSIVE,
    Opcode.MAX: Mode.PASSIVE,
    Opcode.SEEK_DOCK: Mode.PASSIVE,
    Opcode.CONTROL: Mode.SAFE,
    Opcode.SAFE: Mode.SAFE,
    Opcode.FULL: Mode.FULL,
}

_TWO_SHORTS = struct.Struct(">hh")


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamFrame:
    """One stream frame: the robot's state at `sampled_ns`, the last byte at the host at `available_ns`."""

    sampled_ns: int
    available_ns: int
    data: bytes


class Firmware:
    """One robot. Calls bring times that never go back; a time already passed counts as the present."""

    def __init__(self, plant: Plant) -> None:
        self.plant = plant
        self.state = RobotState()
        self.asleep = False
        self.baud_rate = 115_200
        self.faults = Faults()
        self.docking: Docking | None = None
        self.commands: Counter[Opcode] = Counter()
        self.unknown_bytes = 0  # received where an opcode was due
        self.ignored_bytes = 0  # received while asleep or frozen
        self.notes: deque[tuple[int, str]] = deque(maxlen=NOTE_LIMIT)  # (t_ns, what happened by itself)
        self._input = bytearray()
        self._tick_ns = plant.start_ns  # of the last tick
        self._last_command_ns = plant.start_ns
        self._pending: deque[StreamFrame] = deque()
        self._frame_delay_ns = 0  # of the next frame
        self._available_ns = plant.start_ns  # of the last frame: none overtakes another
        self._song_s: dict[int, float] = {}
        self._sensors = Sensors(plant, self.faults, self.state)
        self._set_stream(())

    @property
    def mode(self) -> Mode:
        """The Open Interface mode."""
        return self.state.mode

    @property
    def wheel_log(self) -> deque[WheelRecord]:
        """Requests, and when the wheels began to turn and stood."""
        return self.plant.wheel_log

    @property
    def charging(self) -> bool:
        """Whether current flows into the battery."""
        return self._sensors.charging

    @property
    def streaming(self) -> bool:
        """Whether a frame is made at each tick."""
        return self._streaming

    @property
    def next_frame_ns(self) -> int | None:
        """When the next frame will be available; None while no stream runs."""
        if self._pending:
            return self._pending[0].available_ns
        return self._tick_ns + oi.STREAM_PERIOD_NS + self._frame_delay_ns if self._streaming else None

    def receive(self, data: bytes, now_ns: int) -> bytes:
        """Take bytes whose last was on the wire at `now_ns`; returns the replies to queries.

        A command waits for its missing bytes as long as it takes; an unknown opcode is skipped.
        """
        self._advance_to(now_ns)
        if self.asleep or now_ns < self.faults.frozen_until_ns:
            self.ignored_bytes += len(data)
            return b""
        self._input += data
        replies = []
        while self._input:
            try:
                size = oi.command_bytes(self._input)
            except ValueError:
                self.unknown_bytes += 1
                del self._input[0]
                continue
            if size is None or len(self._input) < size:
                break
            opcode, arguments = Opcode(self._input[0]), bytes(self._input[1:size])
            del self._input[:size]
            self.commands[opcode] += 1
            replies.append(self._execute(opcode, arguments, now_ns))
            if self.asleep:
                self._input.clear()
        return b"" if now_ns < self.faults.silent_until_ns else b"".join(replies)

    def advance(self, now_ns: int) -> list[StreamFrame]:
        """Move to `now_ns`; returns the frames that became available up to then, oldest first."""
        self._advance_to(now_ns)
        frames = []
        while self._pending and self._pending[0].available_ns <= now_ns:
            frames.append(self._pending.popleft())
        return frames

    def wake(self, now_ns: int) -> None:
        """A pulse on the BRC line: wakes a sleeping robot that has charge, into OFF; starts the sleep timer anew."""
        self._advance_to(now_ns)
        self._last_command_ns = now_ns
        if self.asleep and self.plant.battery_mah > 0:
            self.asleep = False
            self._enter(Mode.OFF, now_ns)
            self._note(now_ns, "woken")

    def place(self, pose: Pose, now_ns: int) -> None:
        """Pick the robot up and put it down elsewhere, standing."""
        self._advance_to(now_ns)
        self.plant.place(pose)

    # Commands

    def _execute(self, opcode: Opcode, data: bytes, now_ns: int) -> bytes:
        if self.mode is Mode.OFF and opcode not in (Opcode.START, Opcode.RESET):
            return b""
        self._last_command_ns = now_ns
        if opcode in MODE_AFTER:
            return self._change_mode(opcode, now_ns)
        match opcode:
            case Opcode.BAUD if data[0] < len(oi.BAUD_RATES):
                self.baud_rate = oi.BAUD_RATES[data[0]]
            case Opcode.SENSORS:
                return self._sensors.packets(data)
            case Opcode.QUERY_LIST:
                return self._sensors.packets(data[1:])
            case Opcode.STREAM:
                self._set_stream(data[1:])
            case Opcode.PAUSE_RESUME_STREAM:
                self._streaming = bool(data[0]) and bool(self._stream.ids)
            case Opcode.SONG:
                self._song_s[data[0]] = sum(data[3::2]) / 64
            case _ if self.mode >= Mode.SAFE:
                self._actuate(opcode, data, now_ns)
        return b""

    def _change_mode(self, opcode: Opcode, now_ns: int) -> bytes:
        self._enter(MODE_AFTER[opcode], now_ns)
        if opcode is Opcode.SEEK_DOCK:
            self.docking = Docking()
        elif opcode is Opcode.POWER:
            self._fall_asleep(now_ns, "told to power down")
        elif opcode in (Opcode.STOP, Opcode.RESET):
            self._set_stream(())
        return BOOT_TEXT if opcode is Opcode.RESET else b""

    def _enter(self, mode: Mode, now_ns: int) -> None:
        self.state.mode = mode
        self.docking = None
        self.plant.command(now_ns, 0.0, 0.0)

    def _actuate(self, opcode: Opcode, data: bytes, now_ns: int) -> None:
        match opcode:
            case Opcode.DRIVE_DIRECT:
                right, left = _TWO_SHORTS.unpack(data)
                self.plant.command(now_ns, left, right)
            case Opcode.DRIVE_PWM:
                right, left = _TWO_SHORTS.unpack(data)
                mm_s_per_step = oi.MAX_SPEED_MM_S / 255
                self.plant.command(now_ns, left * mm_s_per_step, right * mm_s_per_step)
            case Opcode.DRIVE:
                velocity, radius = _TWO_SHORTS.unpack(data)
                self.state.drive = (velocity, radius)
                self.plant.command(now_ns, *_arc(velocity, radius))
            case Opcode.PLAY:
                self.state.song = data[0]
                self.state.song_until_ns = now_ns + int(self._song_s.get(data[0], 0.0) * 1e9)
            case _:  # brushes, lights, digits, buttons: accepted, nothing here feels them
                pass

    def _set_stream(self, ids: Sequence[int]) -> None:
        known = [i for i in ids if i in oi.PACKETS or i in oi.GROUPS]
        self._stream = oi.StreamEncoder(known)
        self._stream_readers = [self._sensors.readers[i] for i in self._stream.members]
        self.state.stream_packets = len(known)
        self._streaming = bool(known)
        self._frame_delay_ns = self.plant.sensor_delay_ns() if known else 0

    # Time

    def _advance_to(self, now_ns: int) -> None:
        while (tick_ns := self._tick_ns + oi.STREAM_PERIOD_NS) <= now_ns:
            self.plant.advance(tick_ns)
            self._tick_ns = tick_ns
            self._sensors.sample()
            if tick_ns >= self.faults.frozen_until_ns:
                self._decide(tick_ns)
                if self._streaming:
                    self._send_frame(tick_ns)
        self.plant.advance(now_ns)

    def _decide(self, now_ns: int) -> None:
        """What the robot does by itself in each tick."""
        if self.mode is Mode.SAFE and (hazard := self._hazard()):
            self._enter(Mode.PASSIVE, now_ns)
            self._note(now_ns, f"left SAFE: {hazard}")
        if self.docking is not None:
            self._dock(self.docking, now_ns)
        self.plant.charging = self.charging
        if self.asleep:
            return
        settings = self.plant.settings
        patience_s = settings.dock_sleep_s if self.charging else settings.sleep_s
        idle_s = (now_ns - self._last_command_ns) / 1e9
        if self.mode is Mode.PASSIVE and self.docking is None and idle_s >= patience_s:
            self._fall_asleep(now_ns, f"{patience_s:g} s without a command")
        elif self.plant.battery_mah <= 0:
            self._enter(Mode.OFF, now_ns)
            self._fall_asleep(now_ns, "battery empty")

    def _dock(self, docking: Docking, now_ns: int) -> None:
        wheels = docking.wheels(self.plant)
        if wheels is None:
            self.docking = None
            self._last_command_ns = now_ns
            self._note(now_ns, "docked")
        if wheels != (self.plant.requested_left_mm_s, self.plant.requested_right_mm_s):
            self.plant.command(now_ns, *(wheels or (0.0, 0.0)))

    def _hazard(self) -> str:
        """Why SAFE has to end; empty while it need not."""
        if self.faults.wheel_drop:
            return "wheel drop"
        if self.faults.internal_charger:
            return "charger plugged in"
        left, right = self.plant.requested_left_mm_s, self.plant.requested_right_mm_s
        # The specification: moving forward, or backward in a turn tighter than the robot's own radius.
        tight = WHEEL_BASE_M / 2 * abs(left + right) < BODY_RADIUS_M * abs(left - right)
        return "cliff" if any(self.faults.cliff) and (left + right > 0 or (left + right < 0 and tight)) else ""

    def _fall_asleep(self, now_ns: int, reason: str) -> None:
        self.asleep = True
        self._set_stream(())
        self._note(now_ns, f"asleep: {reason}")

    def _send_frame(self, now_ns: int) -> None:
        values = [read() for read in self._stream_readers]
        available_ns = self._available_ns = max(self._available_ns, now_ns + self._frame_delay_ns)
        self._frame_delay_ns = self.plant.sensor_delay_ns()
        if now_ns < self.faults.silent_until_ns:
            return
        if self.faults.forced:
            forced = self.faults.forced
            values = [forced.get(i, value) for i, value in zip(self._stream.members, values, strict=True)]
        self._pending.append(
            StreamFrame(sampled_ns=now_ns, available_ns=available_ns, data=self._stream.encode(values))
        )

    def _note(self, now_ns: int, text: str) -> None:
        self.notes.append((now_ns, text))


def _arc(velocity_mm_s: int, radius_mm: int) -> tuple[float, float]:
    """Wheel speeds (left, right) in mm/s of DRIVE; a positive radius turns left, ±1 on the spot."""
    velocity = max(-oi.MAX_SPEED_MM_S, min(oi.MAX_SPEED_MM_S, velocity_mm_s))
    if radius_mm in (-32768, 32767, 0):
        return velocity, velocity
    if radius_mm in (-1, 1):
        return -radius_mm * velocity, radius_mm * velocity
    half_base_mm = WHEEL_BASE_M * 1e3 / 2
    return velocity * (radius_mm - half_base_mm) / radius_mm, velocity * (radius_mm + half_base_mm) / radius_mm
