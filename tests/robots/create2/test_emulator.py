"""The emulator in real time, against real serial clients; each fault once."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serial

from relod.errors import StartError
from relod.robots.create2 import oi
from relod.robots.create2.emulator import EmulatorOptions, EmulatorReady, serve
from relod.robots.create2.firmware import Firmware
from relod.robots.create2.oi import Bumps, ChargingSource, Mode
from relod.robots.create2.plant import DOCK_POSE, Plant, PlantSettings, Pose
from relod.robots.faultserver import ask
from relod.robots.simcamera import SimFrame
from relod.runtime.clock import monotonic_ns, sleep_s

CONTROL = oi.start() + oi.safe() + oi.stream(oi.STREAM_IDS)
BACK_OF_ARENA = Pose(x_m=-0.3, y_m=0.0, heading_rad=0.0)


class FakeCamera:
    """Frames every 10 ms that show nothing."""

    def __init__(self) -> None:
        self.next_available_ns = monotonic_ns()

    def due(self, now_ns: int) -> list[SimFrame]:
        frames = []
        while self.next_available_ns <= now_ns:
            stamp_ns, self.next_available_ns = self.next_available_ns, self.next_available_ns + 10_000_000
            image = np.zeros((1, 1, 3), np.uint8)
            frames.append(SimFrame(captured_ns=stamp_ns, available_ns=stamp_ns, image=image))
        return frames


@dataclass
class Emulator:
    """An emulator in a thread, its port opened by pyserial."""

    control: str
    connection: serial.Serial
    decoder: oi.StreamDecoder = field(default_factory=oi.StreamDecoder)

    def ask(self, op: str, **fields: object) -> dict[str, Any]:
        return ask(self.control, op, **fields)

    def read_frames(self) -> list[dict[str, int]]:
        data = self.connection.read(max(1, self.connection.in_waiting))
        return [dict(zip(oi.SENSOR_NAMES, values, strict=True)) for values in self.decoder.feed(data)]

    def wait_for(self, good: Callable[[dict[str, int]], bool], limit_s: float = 1.5) -> dict[str, int]:
        """The first stream frame that is `good`."""
        deadline_ns = monotonic_ns() + int(limit_s * 1e9)
        newest: dict[str, int] = {}
        while monotonic_ns() < deadline_ns:
            for newest in self.read_frames():
                if good(newest):
                    return newest
        raise AssertionError(f"no such frame in {limit_s} s; the newest was {newest}")

    def wait_for_state(self, name: str, value: object, limit_s: float = 1.5) -> None:
        deadline_ns = monotonic_ns() + int(limit_s * 1e9)
        while (state := self.ask("state"))[name] != value:
            assert monotonic_ns() < deadline_ns, state
            sleep_s(0.005)


@contextmanager
def _served(
    folder: Path, *, camera: FakeCamera | None = None, publish: Callable[[SimFrame], None] | None = None
) -> Iterator[EmulatorReady]:
    """`serve` on an event loop of its own thread."""
    ready: list[EmulatorReady] = []
    started = threading.Event()
    handles: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def run() -> None:
        stop = asyncio.Event()
        handles.append((asyncio.get_running_loop(), stop))
        plant = Plant(PlantSettings(), 0, start_ns=monotonic_ns(), pose=BACK_OF_ARENA)
        options = EmulatorOptions(
            symlink=folder / "robot", control=folder / "control", wheel_log=folder / "wheels.jsonl"
        )

        def on_ready(news: EmulatorReady) -> None:
            ready.append(news)
            started.set()

        await serve(Firmware(plant), options, on_ready=on_ready, stop=stop, camera=camera, publish=publish)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert started.wait(5)
    try:
        yield ready[0]
    finally:
        loop, stop = handles[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join(5)
        assert not thread.is_alive()


@pytest.fixture
def emulator(tmp_path: Path) -> Iterator[Emulator]:
    with _served(tmp_path) as ready, serial.Serial(ready.port, 115_200, timeout=0.05) as connection:
        assert ready.control is not None
        yield Emulator(ready.control, connection)
        with suppress(serial.SerialException):
            connection.write(oi.stop())  # so that the end need not wait for the wheels
            sleep_s(0.02)


def test_the_stream_flows_in_real_time(emulator: Emulator) -> None:
    emulator.connection.write(CONTROL)
    emulator.wait_for(lambda sensors: sensors["oi_mode"] == Mode.SAFE)
    begin_ns, count = monotonic_ns(), 0
    while count < 40:
        count += len(emulator.read_frames())
    # 40 periods are 0.6 s; the first frame may be 8 ms late, the last any time on a busy machine.
    assert 0.55 < (monotonic_ns() - begin_ns) / 1e9 < 1.5
    assert (emulator.decoder.checksum_errors, emulator.decoder.skipped_bytes) == (0, 0)
    emulator.connection.write(oi.drive_direct(120, 60))
    sensors = emulator.wait_for(lambda sensors: sensors["requested_left_mm_s"] == 120)
    assert sensors["requested_right_mm_s"] == 60
    emulator.wait_for(lambda sensors: sensors["encoder_left_counts"] > 30)
    emulator.connection.write(oi.drive_direct(0, 0))
    emulator.wait_for_state("standing", True)


def test_a_query_is_answered_at_line_speed(emulator: Emulator) -> None:
    emulator.connection.timeout = 1
    emulator.connection.write(oi.start())
    begin_ns = monotonic_ns()
    emulator.connection.write(bytes((142, 100)))
    assert len(emulator.connection.read(80)) == 80
    assert 0.0068 < (monotonic_ns() - begin_ns) / 1e9 < 0.5


def test_the_port_can_be_closed_and_opened_again(emulator: Emulator) -> None:
    emulator.connection.write(CONTROL)
    emulator.wait_for(lambda _: True)
    emulator.connection.close()
    sleep_s(0.1)
    emulator.connection.open()
    emulator.decoder.clear()
    emulator.wait_for(lambda sensors: sensors["oi_mode"] == Mode.SAFE)


def test_the_wrong_line_speed_is_garbage(emulator: Emulator) -> None:
    emulator.connection.write(CONTROL)
    emulator.wait_for(lambda _: True)
    emulator.connection.baudrate = 57_600
    sleep_s(0.05)
    emulator.connection.reset_input_buffer()
    emulator.decoder.clear()
    sleep_s(0.15)
    assert emulator.read_frames() == []
    assert emulator.decoder.skipped_bytes > 100
    emulator.connection.baudrate = 115_200
    emulator.wait_for(lambda _: True)


def test_opening_the_port_wakes_a_sleeping_robot(emulator: Emulator) -> None:
    emulator.connection.write(oi.start() + bytes((oi.Opcode.POWER,)))
    emulator.wait_for_state("asleep", True)
    emulator.connection.close()
    emulator.connection.open()
    emulator.wait_for_state("asleep", False)
    emulator.connection.write(CONTROL)
    emulator.wait_for(lambda sensors: sensors["oi_mode"] == Mode.SAFE)


# Faults


def test_hazards(emulator: Emulator) -> None:
    emulator.connection.write(CONTROL + oi.drive_direct(50, 50))
    emulator.wait_for(lambda sensors: sensors["requested_left_mm_s"] == 50)
    emulator.ask("bump", left=True)
    sensors = emulator.wait_for(lambda sensors: sensors["bumps_wheel_drops"] == Bumps.BUMP_LEFT)
    assert sensors["oi_mode"] == Mode.SAFE
    emulator.ask("bump")
    emulator.ask("cliff", front_right=True)
    sensors = emulator.wait_for(lambda sensors: sensors["oi_mode"] == Mode.PASSIVE)
    assert (sensors["cliff_front_right"], sensors["requested_left_mm_s"]) == (1, 0)
    emulator.ask("cliff")
    emulator.connection.write(oi.safe())
    emulator.wait_for(lambda sensors: sensors["oi_mode"] == Mode.SAFE)
    emulator.ask("wheel_drop", left=True, right=True)
    sensors = emulator.wait_for(lambda sensors: sensors["oi_mode"] == Mode.PASSIVE)
    assert sensors["bumps_wheel_drops"] == Bumps.WHEEL_DROP_LEFT | Bumps.WHEEL_DROP_RIGHT
    emulator.ask("wheel_drop")
    emulator.ask("charger", plugged=True)
    emulator.wait_for(lambda sensors: sensors["charging_sources"] == ChargingSource.INTERNAL)
    emulator.ask("charger", plugged=False)


def test_battery_dock_and_place(emulator: Emulator) -> None:
    emulator.connection.write(CONTROL)
    emulator.ask("battery", charge_mah=1100)
    emulator.wait_for(lambda sensors: sensors["battery_charge_mah"] in (1099, 1100))
    emulator.ask("place", x_m=DOCK_POSE.x_m, y_m=DOCK_POSE.y_m, heading_rad=DOCK_POSE.heading_rad)
    emulator.wait_for(lambda sensors: sensors["charging_sources"] == ChargingSource.HOME_BASE)
    emulator.ask("dock", present=False)
    emulator.wait_for(lambda sensors: sensors["charging_sources"] == 0)


def test_forced_packets(emulator: Emulator) -> None:
    emulator.connection.write(CONTROL)
    emulator.ask("force", packet=35, value=2)
    emulator.ask("force", packet=51, value=4095)
    emulator.wait_for(lambda sensors: sensors["light_bump_right"] == 4095)
    emulator.ask("force", packet=51, value=None)
    emulator.wait_for(lambda sensors: sensors["light_bump_right"] < 4095)


@pytest.mark.parametrize("fault", ["stall", "freeze"])
def test_the_stream_stops_and_comes_back(emulator: Emulator, fault: str) -> None:
    emulator.connection.write(CONTROL)
    emulator.wait_for(lambda _: True)
    emulator.ask(fault, seconds=0.5)
    sleep_s(0.05)
    emulator.connection.reset_input_buffer()
    emulator.decoder.clear()
    sleep_s(0.15)
    assert emulator.connection.in_waiting == 0
    emulator.connection.write(oi.drive_direct(60, 60))
    sensors = emulator.wait_for(lambda _: True)
    heard = {"stall": 60, "freeze": 0}[fault]
    assert sensors["requested_left_mm_s"] == heard


def test_lost_and_damaged_bytes_cost_few_frames(emulator: Emulator) -> None:
    emulator.connection.write(CONTROL)
    emulator.wait_for(lambda _: True)
    emulator.ask("drop", count=30)
    emulator.ask("corrupt", count=10)
    for _ in range(8):
        emulator.wait_for(lambda _: True)
    assert emulator.decoder.skipped_bytes > 0
    assert emulator.decoder.frames >= 9


def _use_for(connection: serial.Serial, duration_s: float) -> None:
    deadline_ns = monotonic_ns() + int(duration_s * 1e9)
    while monotonic_ns() < deadline_ns:
        connection.read(100)
        connection.write(oi.safe())


def test_a_pulled_cable_comes_back_under_the_same_name(emulator: Emulator) -> None:
    emulator.connection.write(CONTROL)
    emulator.wait_for(lambda _: True)
    emulator.ask("hang_up", seconds=0.2)
    with pytest.raises(serial.SerialException):
        _use_for(emulator.connection, 0.15)
    emulator.connection.close()
    with pytest.raises(ValueError, match="already pulled"):
        emulator.ask("hang_up", seconds=0.2)
    deadline_ns = monotonic_ns() + 1_000_000_000
    while not os.path.exists(str(emulator.connection.port)):
        assert monotonic_ns() < deadline_ns
        sleep_s(0.01)
    emulator.connection.open()
    emulator.decoder.clear()
    emulator.wait_for(lambda sensors: sensors["oi_mode"] == Mode.SAFE)  # the robot went on


def test_wake(emulator: Emulator) -> None:
    emulator.connection.write(oi.start() + bytes((oi.Opcode.POWER,)))
    emulator.wait_for_state("asleep", True)
    emulator.ask("wake")
    assert emulator.ask("state")["asleep"] is False


def test_nonsense_on_the_control_socket_is_refused(emulator: Emulator) -> None:
    with pytest.raises(ValueError, match="explode"):
        emulator.ask("explode")
    with pytest.raises(ValueError, match="seconds"):
        emulator.ask("stall", seconds=-1)
    with pytest.raises(ValueError, match="unknown field `x`"):
        emulator.ask("battery", charge_mah=1, x=2)
    with pytest.raises(ValueError, match="cannot be 999"):
        emulator.ask("force", packet=7, value=999)
    assert emulator.ask("state")["mode"] == "OFF"


# Beginning and end


def test_it_ends_when_the_wheels_stand_and_leaves_the_log(tmp_path: Path) -> None:
    with _served(tmp_path) as ready, serial.Serial(ready.port, 115_200) as connection:
        connection.write(oi.start() + oi.safe() + oi.drive_direct(100, 100))
        sleep_s(0.2)
        connection.write(oi.drive_direct(0, 0))
        sleep_s(0.02)
    records = [json.loads(line) for line in (tmp_path / "wheels.jsonl").read_text().splitlines()]
    assert [record["requested_left_mm_s"] for record in records] == [100, 100, 0, 0]
    assert records[-1]["left_mm_s"] == records[-1]["right_mm_s"] == 0
    stood_ms = (records[-1]["t_ns"] - records[-2]["t_ns"]) / 1e6
    assert 50 < stood_ms < 500
    assert not (tmp_path / "robot").is_symlink()
    assert not (tmp_path / "control").exists()


def test_wheels_nobody_stops_delay_the_end_by_a_second(tmp_path: Path) -> None:
    with _served(tmp_path) as ready, serial.Serial(ready.port, 115_200) as connection:
        connection.write(oi.start() + oi.full() + oi.drive_direct(50, -50))
        sleep_s(0.1)
        begin_ns = monotonic_ns()
    assert 0.9 < (monotonic_ns() - begin_ns) / 1e9 < 3
    last = json.loads((tmp_path / "wheels.jsonl").read_text().splitlines()[-1])
    assert last["left_mm_s"] != 0


def test_camera_frames_are_published_when_they_are_due(tmp_path: Path) -> None:
    late_ms: list[float] = []
    camera = FakeCamera()
    with _served(
        tmp_path,
        camera=camera,
        publish=lambda frame: late_ms.append((monotonic_ns() - frame.available_ns) / 1e6),
    ):
        sleep_s(0.4)
    assert 35 <= len(late_ms) <= 100
    assert sorted(late_ms)[len(late_ms) // 2] < 10


def test_a_socket_that_cannot_be_is_one_clear_error(tmp_path: Path) -> None:
    async def run() -> None:
        options = EmulatorOptions(control=tmp_path / "missing" / "control")
        firmware = Firmware(Plant(PlantSettings(), 0, start_ns=monotonic_ns()))
        await serve(firmware, options, on_ready=print, stop=asyncio.Event())

    with pytest.raises(StartError, match="no control socket"):
        asyncio.run(run())


SERVER = """
import asyncio, sys
from pathlib import Path
from relod.robots.create2.emulator import EmulatorOptions, serve
from relod.robots.create2.firmware import Firmware
from relod.robots.create2.plant import Plant, PlantSettings
from relod.runtime.clock import monotonic_ns

async def main(folder):
    stop = asyncio.Event()
    asyncio.get_running_loop().add_reader(0, stop.set)
    firmware = Firmware(Plant(PlantSettings(), 0, start_ns=monotonic_ns()))
    options = EmulatorOptions(symlink=folder / "robot", control=folder / "control")
    await serve(firmware, options, on_ready=lambda ready: print(ready.port, flush=True), stop=stop)

asyncio.run(main(Path(sys.argv[1])))
"""


@pytest.mark.slow
def test_the_unmodified_pycreate2_drives_it(tmp_path: Path) -> None:
    import pycreate2

    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None
    with server.stdin, server.stdout:
        port, control = server.stdout.readline().strip(), str(tmp_path / "control")
        bot = pycreate2.Create2(port)
        bot.start()
        assert bot.get_sensors().open_interface_mode == Mode.PASSIVE
        bot.safe()
        bot.drive_direct(100, 40)  # right, left
        sleep_s(0.3)
        sensors = bot.get_sensors()
        assert (sensors.velocity_right, sensors.velocity_left) == (100, 40)
        assert sensors.encoder_counts_right > sensors.encoder_counts_left > 0
        assert sensors.battery_capacity == 2696
        bot.drive_pwm(-100, 100)
        bot.led(4, 255, 255)
        bot.digit_led_ascii("relo")
        bot.createSong(1, (60, 16, 62, 16))
        bot.playSong(1)
        assert bot.get_sensors().song_playing
        bot.drive_stop()
        assert ask(control, "state")["standing"]
        bot.full()
        assert bot.get_sensors().open_interface_mode == Mode.FULL
        bot.power()
        assert ask(control, "state")["asleep"]
        ask(control, "wake")
        bot.start()
        assert bot.reset().startswith(b"bl-start")
        assert ask(control, "state")["mode"] == "OFF"
        assert ask(control, "state")["unknown_bytes"] == 0
        del bot  # says STOP and closes, two seconds later
        server.stdin.write("stop\n")
        server.stdin.flush()
        assert server.wait(5) == 0
