"""The firmware: what a client can say to it, what it does by itself, and determinism."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relod.robots.create2 import oi
from relod.robots.create2.firmware import BOOT_TEXT, Firmware, StreamFrame
from relod.robots.create2.oi import Bumps, ChargingSource, Mode, Opcode
from relod.robots.create2.plant import DOCK_POSE, PRESETS, Plant, PlantSettings, Pose

MS = 1_000_000
S = 1_000 * MS
MIDDLE = Pose(x_m=0.0, y_m=0.0, heading_rad=0.0)
STREAM = oi.start() + oi.safe() + oi.stream(oi.STREAM_IDS)


@dataclass
class Robot:
    """A firmware, its present and the decoded stream."""

    preset: str = "ideal"
    seed: int = 0
    pose: Pose | None = MIDDLE
    changes: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plant = Plant(PlantSettings(**PRESETS[self.preset] | self.changes), self.seed, pose=self.pose)
        self.firmware = Firmware(plant)
        self.plant = plant
        self.now_ns = 0
        self.decoder = oi.StreamDecoder()

    def say(self, *commands: bytes) -> bytes:
        return self.firmware.receive(b"".join(commands), self.now_ns)

    def wait(self, duration_ns: int) -> list[StreamFrame]:
        self.now_ns += duration_ns
        return self.firmware.advance(self.now_ns)

    def newest(self) -> dict[str, int]:
        """Sensors after two more ticks, by name."""
        frames = self.wait(30 * MS)
        values = [value for frame in frames for value in self.decoder.feed(frame.data)]
        return dict(zip(oi.SENSOR_NAMES, values[-1], strict=True))

    def sensor(self, packet_id: int) -> int:
        data = self.say(bytes((Opcode.SENSORS, packet_id)))
        return int(struct.unpack(">" + oi.PACKETS[packet_id].code, data)[0])


# Modes


def test_off_hears_only_start_and_reset() -> None:
    robot = Robot()
    assert robot.say(oi.safe(), oi.drive_direct(100, 100), bytes((Opcode.SENSORS, 35))) == b""
    assert robot.firmware.mode is Mode.OFF
    assert robot.say(oi.reset()) == BOOT_TEXT
    robot.say(oi.start())
    assert robot.firmware.mode is Mode.PASSIVE


def test_actuators_need_safe_or_full() -> None:
    robot = Robot()
    robot.say(oi.start(), oi.drive_direct(100, 100))
    assert robot.plant.requested_left_mm_s == 0
    for take_control in (oi.safe(), oi.full(), bytes((Opcode.CONTROL,))):
        robot.say(take_control, oi.drive_direct(100, 50))
        assert (robot.plant.requested_left_mm_s, robot.plant.requested_right_mm_s) == (100, 50)


@pytest.mark.parametrize(
    ("command", "mode"),
    [
        (oi.start(), Mode.PASSIVE),
        (oi.safe(), Mode.SAFE),
        (oi.full(), Mode.FULL),
        (oi.stop(), Mode.OFF),
        (oi.reset(), Mode.OFF),
        (oi.seek_dock(), Mode.PASSIVE),
        (bytes((Opcode.POWER,)), Mode.PASSIVE),
        (bytes((Opcode.CLEAN,)), Mode.PASSIVE),
    ],
)
def test_every_mode_command_stops_the_wheels(command: bytes, mode: Mode) -> None:
    robot = Robot()
    robot.plant.dock_present = True
    robot.say(oi.start(), oi.full(), oi.drive_direct(200, 200))
    robot.wait(300 * MS)
    robot.say(command)
    assert robot.firmware.mode is mode
    assert robot.plant.requested_left_mm_s == 0


def test_stop_ends_the_stream() -> None:
    robot = Robot()
    robot.say(STREAM, oi.stop())
    assert robot.wait(1 * S) == []


# Bytes


def test_a_command_waits_for_its_missing_bytes() -> None:
    robot = Robot()
    robot.say(oi.start(), oi.safe())
    drive = oi.drive_direct(120, 120)
    for byte in drive[:-1]:
        robot.say(bytes((byte,)))
        robot.wait(1 * S)
    assert robot.plant.requested_left_mm_s == 0
    robot.say(drive[-1:])
    assert robot.plant.requested_left_mm_s == 120


def test_unknown_opcodes_are_skipped() -> None:
    robot = Robot()
    robot.say(b"\x00\xff", oi.start(), b"\x55", oi.safe())
    assert robot.firmware.mode is Mode.SAFE
    assert robot.firmware.unknown_bytes == 3


@settings(deadline=None, max_examples=50)
@given(st.lists(st.binary(max_size=40), max_size=12))
def test_no_bytes_break_it(pieces: list[bytes]) -> None:
    robot = Robot()
    robot.say(oi.start(), oi.safe())
    for piece in pieces:
        robot.say(piece)
        robot.wait(20 * MS)
    assert abs(robot.plant.requested_left_mm_s) <= 500


def test_drive_direct_clamps_what_the_wire_can_carry() -> None:
    robot = Robot()
    robot.say(oi.start(), oi.safe(), struct.pack(">Bhh", Opcode.DRIVE_DIRECT, 32767, -32768))
    assert (robot.plant.requested_right_mm_s, robot.plant.requested_left_mm_s) == (500, -500)


@pytest.mark.parametrize(
    ("velocity", "radius", "left", "right"),
    [
        (100, 32767, 100, 100),
        (100, -32768, 100, 100),
        (100, 1, -100, 100),
        (100, -1, 100, -100),
        (100, 235, 50, 150),
        (-100, -235, -150, -50),
    ],
)
def test_drive_turns_about_its_radius(velocity: int, radius: int, left: float, right: float) -> None:
    robot = Robot()
    robot.say(oi.start(), oi.safe(), struct.pack(">Bhh", Opcode.DRIVE, velocity, radius))
    assert (robot.plant.requested_left_mm_s, robot.plant.requested_right_mm_s) == (left, right)
    assert (robot.sensor(39), robot.sensor(40)) == (velocity, radius)


def test_drive_pwm_is_a_share_of_full_speed() -> None:
    robot = Robot()
    robot.say(oi.start(), oi.safe(), struct.pack(">Bhh", Opcode.DRIVE_PWM, 255, -51))
    assert robot.plant.requested_right_mm_s == 500
    assert robot.plant.requested_left_mm_s == pytest.approx(-100)


def test_lights_digits_and_songs_are_accepted() -> None:
    robot = Robot()
    song = bytes((Opcode.SONG, 2, 2, 60, 32, 62, 32))  # two notes of half a second
    robot.say(oi.start(), oi.safe(), bytes((Opcode.LEDS, 4, 0, 255)), b"\xa4RELO", song, bytes((Opcode.PLAY, 2)))
    assert (robot.sensor(36), robot.sensor(37)) == (2, 1)
    robot.wait(1100 * MS)
    assert robot.sensor(37) == 0
    assert robot.firmware.unknown_bytes == 0


# Sensors


def test_packet_100_is_every_packet() -> None:
    robot = Robot()
    data = robot.say(oi.start(), oi.safe(), bytes((Opcode.SENSORS, 100)))
    assert len(data) == 80
    values = struct.unpack(">" + "".join(oi.PACKETS[i].code for i in oi.GROUPS[100]), data)
    by_id = dict(zip(oi.GROUPS[100], values, strict=True))
    assert by_id[35] == Mode.SAFE
    assert by_id[25] == 2500
    assert by_id[26] == 2696


def test_query_list_answers_in_its_order_and_skips_what_is_unknown() -> None:
    robot = Robot()
    assert robot.say(oi.start(), oi.query_list((35, 26))) == struct.pack(">BH", 1, 2696)
    assert robot.say(bytes((Opcode.QUERY_LIST, 2, 99, 35))) == b"\x01"


def test_distance_and_angle_count_from_the_last_request() -> None:
    robot = Robot()
    robot.say(oi.start(), oi.safe(), oi.drive_direct(100, 100))
    robot.wait(1 * S)
    robot.say(oi.drive_direct(0, 0))
    robot.wait(1 * S)
    moved_mm = robot.plant.pose.x_m * 1e3
    assert robot.sensor(19) == int(moved_mm)
    assert robot.sensor(19) == 0
    robot.say(oi.drive_direct(-100, 100))
    robot.wait(1 * S)
    assert robot.sensor(20) == pytest.approx(robot.plant.pose.heading_rad * 57.2958, abs=1.0)
    assert robot.sensor(20) == 0


def test_encoders_wrap_at_sixteen_bits() -> None:
    robot = Robot()
    robot.say(STREAM)
    robot.plant.rolled_left_m = 32770 * oi.MM_PER_COUNT / 1e3 + 1e-6
    assert robot.newest()["encoder_left_counts"] == 32770 - 65536


def test_the_stream_comes_every_15_ms_with_two_stamps() -> None:
    robot = Robot("nominal")
    robot.say(STREAM)
    frames = robot.wait(1 * S)
    sampled = [frame.sampled_ns for frame in frames]
    assert sampled == list(range(15 * MS, sampled[-1] + 1, 15 * MS))
    delays_ms = [(frame.available_ns - frame.sampled_ns) / MS for frame in frames]
    assert 4 <= min(delays_ms) < 4.5 < 7.5 < max(delays_ms) <= 8
    assert len(robot.decoder.feed(b"".join(frame.data for frame in frames))) == len(frames)


def test_frames_are_handed_out_when_they_are_available() -> None:
    robot = Robot("nominal")
    robot.say(STREAM)
    for _ in range(100):
        due_ns = robot.firmware.next_frame_ns
        assert due_ns is not None
        assert robot.firmware.advance(due_ns - 1) == []
        (frame,) = robot.firmware.advance(due_ns)
        assert frame.available_ns == due_ns


def test_late_frames_do_not_overtake_each_other() -> None:
    robot = Robot("harsh")
    robot.say(STREAM)
    stamps = [frame.available_ns for frame in robot.wait(5 * S)]
    assert stamps == sorted(stamps)


def test_an_ideal_frame_is_available_at_once() -> None:
    robot = Robot()
    robot.say(STREAM)
    assert [frame.available_ns for frame in robot.wait(45 * MS)] == [15 * MS, 30 * MS, 45 * MS]


def test_the_stream_pauses_and_resumes() -> None:
    robot = Robot()
    robot.say(STREAM, oi.pause_stream())
    assert robot.wait(60 * MS) == []
    assert robot.firmware.next_frame_ns is None
    robot.say(oi.resume_stream())
    assert len(robot.wait(60 * MS)) == 4


def test_the_stream_shows_requests_and_mode() -> None:
    robot = Robot()
    robot.say(STREAM, oi.drive_direct(left_mm_s=-40, right_mm_s=90))
    sensors = robot.newest()
    assert (sensors["requested_left_mm_s"], sensors["requested_right_mm_s"]) == (-40, 90)
    assert sensors["oi_mode"] == Mode.SAFE
    assert sensors["battery_charge_mah"] == 2499  # 2500 less what two ticks drew


# Safety


def test_a_cliff_ends_safe_only_while_driving_forward() -> None:
    robot = Robot()
    robot.say(STREAM)
    robot.firmware.faults.cliff = (False, True, False, False)
    robot.say(oi.drive_direct(-100, -100))
    assert robot.newest()["oi_mode"] == Mode.SAFE
    assert robot.newest()["cliff_front_left"] == 1
    robot.say(oi.drive_direct(100, 100))
    sensors = robot.newest()
    assert sensors["oi_mode"] == Mode.PASSIVE
    assert sensors["requested_left_mm_s"] == 0
    robot.wait(1 * S)
    assert robot.plant.standing
    assert robot.firmware.notes[-1][1] == "left SAFE: cliff"


def test_a_cliff_ends_safe_in_a_tight_backward_turn() -> None:
    robot = Robot()
    robot.say(STREAM, oi.drive_direct(-100, 0))
    robot.firmware.faults.cliff = (True, False, False, False)
    assert robot.newest()["oi_mode"] == Mode.PASSIVE


@pytest.mark.parametrize("hazard", ["wheel_drop", "internal_charger"])
def test_wheel_drop_and_charger_end_safe(hazard: str) -> None:
    robot = Robot()
    robot.say(STREAM, oi.drive_direct(100, 100))
    setattr(robot.firmware.faults, hazard, Bumps.WHEEL_DROP_LEFT if hazard == "wheel_drop" else True)
    sensors = robot.newest()
    assert sensors["oi_mode"] == Mode.PASSIVE
    assert sensors["bumps_wheel_drops"] == (Bumps.WHEEL_DROP_LEFT if hazard == "wheel_drop" else 0)
    assert sensors["charging_sources"] == (ChargingSource.INTERNAL if hazard == "internal_charger" else 0)
    robot.wait(1 * S)
    assert robot.plant.standing


def test_a_bump_ends_nothing() -> None:
    robot = Robot()
    robot.say(STREAM, oi.drive_direct(100, 100))
    robot.firmware.faults.bump = Bumps.BUMP_RIGHT
    sensors = robot.newest()
    assert (sensors["oi_mode"], sensors["bumps_wheel_drops"]) == (Mode.SAFE, Bumps.BUMP_RIGHT)
    assert sensors["requested_left_mm_s"] == 100


def test_full_ignores_hazards() -> None:
    robot = Robot()
    robot.say(oi.start(), oi.full(), oi.drive_direct(100, 100))
    robot.firmware.faults.wheel_drop = Bumps.WHEEL_DROP_RIGHT
    robot.firmware.faults.cliff = (True, True, True, True)
    robot.wait(1 * S)
    assert robot.firmware.mode is Mode.FULL
    assert robot.plant.left_mm_s > 90


# Faults


def test_forced_packets_are_reported_until_released() -> None:
    robot = Robot()
    robot.say(STREAM)
    robot.firmware.faults.force(46, 4000)
    assert robot.newest()["light_bump_left"] == 4000
    assert robot.sensor(46) == 4000
    robot.firmware.faults.force(46, None)
    assert robot.newest()["light_bump_left"] < 100


@pytest.mark.parametrize(("packet", "value"), [(7, 256), (41, 40_000), (100, 0)])
def test_a_packet_cannot_be_forced_beyond_itself(packet: int, value: int) -> None:
    with pytest.raises(ValueError, match="packet"):
        Robot().firmware.faults.force(packet, value)


def test_a_silent_robot_goes_on() -> None:
    robot = Robot()
    robot.say(STREAM, oi.drive_direct(100, 100))
    robot.firmware.faults.silent_until_ns = 1 * S
    assert robot.wait(999 * MS) == []
    assert robot.plant.pose.x_m > 0.05
    assert len(robot.wait(46 * MS)) == 3


def test_a_frozen_robot_drives_on_and_hears_nothing() -> None:
    robot = Robot()
    robot.say(STREAM, oi.drive_direct(100, 100))
    robot.wait(30 * MS)
    robot.firmware.faults.frozen_until_ns = 1 * S
    robot.firmware.faults.wheel_drop = Bumps.WHEEL_DROP_LEFT
    robot.say(oi.drive_direct(0, 0))
    assert robot.wait(900 * MS) == []
    assert robot.plant.left_mm_s > 90
    assert robot.firmware.ignored_bytes == 5
    robot.wait(200 * MS)
    assert robot.firmware.mode is Mode.PASSIVE


# Home base, battery, sleep


@pytest.mark.parametrize("seed", range(4))
def test_seek_dock_drives_home_and_charges(seed: int) -> None:
    robot = Robot("nominal", seed=seed, pose=None)
    robot.say(STREAM, oi.seek_dock())
    while not robot.firmware.charging:
        robot.wait(45 * MS)
        assert robot.now_ns < 25 * S
    robot.wait(1 * S)
    assert robot.plant.standing
    assert robot.firmware.docking is None
    before_mah = robot.plant.battery_mah
    sensors = robot.newest()
    assert sensors["charging_sources"] == ChargingSource.HOME_BASE
    assert sensors["oi_mode"] == Mode.PASSIVE
    assert robot.sensor(21) == 2
    robot.wait(10 * S)
    assert robot.plant.battery_mah > before_mah + 3


def test_safe_on_the_home_base_drives_away_without_charging() -> None:
    robot = Robot(pose=DOCK_POSE)
    robot.say(STREAM)
    assert robot.newest()["charging_sources"] == ChargingSource.HOME_BASE
    assert robot.sensor(21) == 4
    assert not robot.firmware.charging
    robot.say(oi.drive_direct(-250, -250))
    robot.wait(750 * MS)
    assert robot.newest()["charging_sources"] == 0
    assert robot.firmware.mode is Mode.SAFE


def test_without_a_home_base_it_searches_on() -> None:
    robot = Robot()
    robot.plant.dock_present = False
    robot.say(oi.start(), oi.seek_dock())
    robot.wait(20 * S)
    assert robot.firmware.docking is not None
    assert robot.plant.left_mm_s != 0
    robot.say(oi.start())
    robot.wait(1 * S)
    assert robot.plant.standing


def test_passive_falls_asleep_and_wakes_into_off() -> None:
    robot = Robot(changes={"sleep_s": 2.0})
    robot.say(oi.start(), oi.stream((7,)))
    robot.wait(1900 * MS)
    assert not robot.firmware.asleep
    frames = robot.wait(1 * S)
    assert robot.firmware.asleep
    assert len(frames) < 10
    robot.say(oi.start())
    assert robot.firmware.ignored_bytes == 1
    robot.firmware.wake(robot.now_ns)
    assert not robot.firmware.asleep
    robot.say(oi.start(), oi.safe())
    assert robot.firmware.mode is Mode.SAFE


def test_safe_never_sleeps() -> None:
    robot = Robot(changes={"sleep_s": 2.0, "dock_sleep_s": 1.0})
    robot.say(oi.start(), oi.safe())
    robot.wait(5 * S)
    assert not robot.firmware.asleep


def test_on_the_home_base_it_sleeps_sooner_and_goes_on_charging() -> None:
    robot = Robot(pose=DOCK_POSE, changes={"sleep_s": 100.0, "dock_sleep_s": 2.0})
    robot.say(oi.start())
    robot.wait(3 * S)
    assert robot.firmware.asleep
    before_mah = robot.plant.battery_mah
    robot.wait(3 * S)
    assert robot.plant.battery_mah > before_mah


def test_an_empty_battery_ends_everything() -> None:
    robot = Robot(changes={"battery_charge_mah": 0.1})
    robot.say(STREAM, oi.drive_direct(200, -200))
    robot.wait(3 * S)
    assert (robot.firmware.mode, robot.firmware.asleep) == (Mode.OFF, True)
    assert robot.plant.standing
    robot.firmware.wake(robot.now_ns)
    assert robot.firmware.asleep


def test_power_down_sleeps_at_once() -> None:
    robot = Robot()
    robot.say(STREAM, bytes((Opcode.POWER,)), oi.safe())
    assert robot.firmware.asleep
    assert robot.firmware.mode is Mode.PASSIVE


# Determinism


INPUTS = st.lists(
    st.tuples(
        st.integers(0, 600 * MS),
        st.sampled_from(
            (
                STREAM,
                oi.drive_direct(150, -80),
                oi.drive_direct(0, 0),
                oi.drive_direct(300, 300)[:3],
                oi.start(),
                oi.safe(),
                oi.seek_dock(),
                oi.pause_stream(),
                bytes((Opcode.SENSORS, 106)),
            )
        ),
    ),
    max_size=12,
).map(lambda inputs: sorted(inputs, key=lambda pair: pair[0]))


@settings(deadline=None, max_examples=30)
@given(INPUTS, st.lists(st.integers(0, 700 * MS), max_size=15))
def test_stamped_bytes_decide_every_frame(inputs: list[tuple[int, bytes]], polls: list[int]) -> None:
    def run(times_ns: list[int]) -> tuple[list[StreamFrame], bytes]:
        firmware = Firmware(Plant(PlantSettings(), 5))
        firmware.receive(STREAM, 0)
        frames, replies, waiting = [], b"", list(inputs)
        for now_ns in [*sorted(times_ns), 700 * MS]:
            while waiting and waiting[0][0] <= now_ns:
                t_ns, data = waiting.pop(0)
                replies += firmware.receive(data, t_ns)
            frames += firmware.advance(now_ns)
        return frames, replies

    assert run(polls) == run([])
