"""The driver against the simulated robot on its pseudo-terminal, both on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import itertools
import math
import os
import tty
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from relod.errors import SafetyStop, StartError
from relod.robots.create2 import driver as driver_module
from relod.robots.create2 import oi
from relod.robots.create2.driver import SENSOR_COLUMNS, Create2Driver, Create2Settings, Request
from relod.robots.create2.emulator import EmulatorOptions, EmulatorReady, serve
from relod.robots.create2.firmware import Firmware
from relod.robots.create2.plant import PRESETS, Plant, PlantSettings, Pose
from relod.robots.create2.port import open_error
from relod.robots.faultserver import ask
from relod.runtime.clock import NS_PER_S, monotonic_ns

QUICK = Create2Settings(answer_limit_s=0.3, stream_limit_s=0.15, reopen_limit_s=1.0)


@pytest.fixture(autouse=True)
def quick_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "MODE_PAUSE_S", 0.02)
    monkeypatch.setattr(driver_module, "POLL_S", 0.03)


class Rig:
    """A driver, the robot behind its port, and what the driver said."""

    def __init__(self, firmware: Firmware, control: Path, address: str, settings: Create2Settings) -> None:
        self.firmware, self.control = firmware, control
        self.packets: list[tuple[int, dict[str, float]]] = []
        self.events: list[str] = []
        self.driver = Create2Driver(address, settings, self._publish, self.events.append)

    def _publish(self, arrived_ns: int, values: object) -> None:
        assert isinstance(values, tuple)
        self.packets.append((arrived_ns, dict(zip(SENSOR_COLUMNS, values, strict=True))))

    @property
    def newest(self) -> dict[str, float]:
        return self.packets[-1][1]

    async def fault(self, op: str, **fields: object) -> None:
        await asyncio.to_thread(ask, self.control, op, **fields)

    async def until(self, what: Callable[[], bool], limit_s: float = 2.0) -> None:
        async with asyncio.timeout(limit_s):
            for pause_s in itertools.repeat(0.005):
                if what():
                    return
                await asyncio.sleep(pause_s)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[None]]:
        """The driver open, with `run` in the background."""
        await self.driver.open()
        task = asyncio.create_task(self.driver.run())
        try:
            yield task
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, SafetyStop):
                await task
            await self.driver.close()


def with_robot(
    tmp_path: Path, body: Callable[[Rig], Awaitable[None]], settings: Create2Settings = QUICK, **plant: float
) -> None:
    """Run `body` beside an emulated robot."""

    async def main() -> None:
        stop, ready = asyncio.Event(), asyncio.Event()
        knobs = PlantSettings(**{**PRESETS["ideal"], **plant})
        robot = Plant(knobs, 0, start_ns=monotonic_ns(), pose=Pose(x_m=0.0, y_m=0.0, heading_rad=0.0))
        firmware = Firmware(robot)
        options = EmulatorOptions(symlink=tmp_path / "port", control=tmp_path / "control")

        def on_ready(_: EmulatorReady) -> None:
            ready.set()

        async with asyncio.TaskGroup() as group:
            group.create_task(serve(firmware, options, on_ready=on_ready, stop=stop))
            await ready.wait()
            try:
                await body(Rig(firmware, tmp_path / "control", str(tmp_path / "port"), settings))
            finally:
                stop.set()

    asyncio.run(main())


def test_drives_and_streams(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        async with rig.running():
            assert rig.newest["oi_mode"] == oi.Mode.SAFE
            assert rig.newest["connection_epoch"] == 1
            rig.driver.command((120.9, -600.0))
            await rig.until(lambda: rig.newest["requested_left_mm_s"] == 120)
            assert rig.newest["requested_right_mm_s"] == -500
            assert not rig.driver.stands(0)
            commanded_ns = monotonic_ns()
            rig.driver.command((math.nan, 100.0))
            await rig.until(lambda: rig.driver.stands(commanded_ns))
            assert rig.firmware.plant.standing
            assert rig.driver.counters()["rejected_commands"] == 1
            gaps_ms = [(b[0] - a[0]) / 1e6 for a, b in zip(rig.packets, rig.packets[1:], strict=False)]
            assert sorted(gaps_ms)[len(gaps_ms) // 2] == pytest.approx(15.0, abs=3.0)
        await rig.until(lambda: rig.firmware.mode is oi.Mode.PASSIVE)
        assert not rig.firmware.streaming

    with_robot(tmp_path, body)


def test_requests(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        async with rig.running():
            for request, mode in ((Request.FULL, 3), (Request.PASSIVE, 1), (Request.SAFE, 2)):
                rig.driver.request(request)
                await rig.until(lambda mode=mode: rig.newest["oi_mode"] == mode)
            rig.driver.request(Request.NONE)
            rig.driver.request(99)
            assert "99" in rig.events[-1]
            rig.driver.request(Request.WAKE)
            await rig.until(lambda: "RTS" in rig.events[-1])

    with_robot(tmp_path, body)


def test_stop_takes_the_robot_out_of_docking(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        async with rig.running():
            rig.driver.request(Request.SEEK_DOCK)
            await rig.until(lambda: not rig.firmware.plant.standing)
            rig.driver.stop()
            stopped_ns = monotonic_ns()
            await rig.until(lambda: rig.driver.stands(stopped_ns))
            assert rig.newest["oi_mode"] == oi.Mode.SAFE

    with_robot(tmp_path, body)


def test_stop_leaves_a_charging_robot_on_its_dock(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        async with rig.running():
            await rig.fault("charger", plugged=True)
            await rig.until(lambda: rig.newest["charging_sources"] == 1)
            rig.driver.request(Request.SEEK_DOCK)
            await asyncio.sleep(0.05)
            rig.driver.stop()
            await asyncio.sleep(0.05)
            assert rig.newest["oi_mode"] == oi.Mode.PASSIVE

    with_robot(tmp_path, body)


@pytest.mark.parametrize("fault", ["drop", "corrupt"])
def test_damaged_bytes_cost_only_their_frames(tmp_path: Path, fault: str) -> None:
    async def body(rig: Rig) -> None:
        async with rig.running():
            count = len(rig.packets)
            await rig.fault(fault, count=60)
            await rig.until(lambda: len(rig.packets) >= count + 10)
            longest_ms = max((b[0] - a[0]) / 1e6 for a, b in zip(rig.packets, rig.packets[1:], strict=False))
            assert longest_ms < 200
            assert float(rig.driver.counters()["skipped_bytes"]) > 0
            assert all(packet["oi_mode"] == 2 for _, packet in rig.packets)

    with_robot(tmp_path, body)


def test_a_silent_robot_is_asked_again(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        async with rig.running():
            rig.firmware.receive(oi.pause_stream(), monotonic_ns())
            await asyncio.sleep(0.05)
            count = len(rig.packets)
            await rig.until(lambda: len(rig.packets) > count)
            await rig.until(lambda: any("back after" in event for event in rig.events))
            assert rig.driver.counters()["stalls"] == 1

    with_robot(tmp_path, body)


@pytest.mark.parametrize("fault", ["stall", "freeze"])
def test_a_stalled_robot_comes_back(tmp_path: Path, fault: str) -> None:
    async def body(rig: Rig) -> None:
        async with rig.running() as running:
            rig.driver.command((100.0, 100.0))
            await rig.until(lambda: rig.newest["requested_left_mm_s"] == 100)
            await rig.fault(fault, seconds=0.4)
            await asyncio.sleep(0.1)
            assert not rig.driver.stands(monotonic_ns() - NS_PER_S // 20)
            count = len(rig.packets)
            await rig.until(lambda: len(rig.packets) > count)
            assert not running.done()

    with_robot(tmp_path, body)


def test_a_robot_that_restarts_is_taken_control_of_again(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        async with rig.running():
            rig.firmware.receive(oi.reset(), monotonic_ns())
            await asyncio.sleep(0.05)
            count = len(rig.packets)
            await rig.until(lambda: len(rig.packets) > count)
            assert rig.newest["oi_mode"] == oi.Mode.SAFE

    with_robot(tmp_path, body)


def test_sleep_is_reported_and_ends_with_waking(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        async with rig.running():
            rig.driver.request(Request.PASSIVE)
            await rig.until(lambda: rig.firmware.asleep)
            await rig.until(lambda: any("power button" in event for event in rig.events))
            await rig.fault("wake")
            count = len(rig.packets)
            await rig.until(lambda: len(rig.packets) > count)

    with_robot(tmp_path, body, sleep_s=0.2)


@pytest.mark.parametrize("fault", ["wheel_drop", "cliff"])
def test_hazards_show_in_the_sensors(tmp_path: Path, fault: str) -> None:
    async def body(rig: Rig) -> None:
        async with rig.running():
            rig.driver.command((100.0, 100.0))
            await rig.until(lambda: rig.firmware.plant.left_mm_s > 50)
            await rig.fault(fault, left=True)
            await rig.until(lambda: rig.newest["oi_mode"] == oi.Mode.PASSIVE)
            seen = {"wheel_drop": "bumps_wheel_drops", "cliff": "cliff_left"}[fault]
            assert rig.newest[seen]
            await rig.until(lambda: rig.driver.stands(0))

    with_robot(tmp_path, body)


def test_a_pulled_cable_is_a_safety_stop_and_can_be_reopened(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        async with rig.running() as running:
            await rig.fault("hang_up", seconds=0.2)
            with pytest.raises(SafetyStop, match="was lost"):
                await asyncio.wait_for(running, 1.0)
            with pytest.raises(OSError, match=r".*"):
                rig.driver.command((10.0, 10.0))
            rig.driver.stop()  # harmless
            await rig.until(lambda: (tmp_path / "port").exists())
            await rig.driver.open()
            assert rig.newest["connection_epoch"] == 2

    with_robot(tmp_path, body)


def test_a_full_port_costs_5_ms_and_is_counted() -> None:
    async def main() -> None:
        master, slave = os.openpty()
        tty.setraw(slave)
        os.set_blocking(slave, False)
        port = driver_module.Port(os.ttyname(slave), lambda data: None, lambda why: None)
        await port.open(115_200)
        for size in (4096, 1, 1):  # the kernel moves what was written a moment later, which makes room again
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(slave, bytes(size))
            await asyncio.sleep(0.02)
        begin_ns = monotonic_ns()
        port.write(oi.drive_direct(0, 0))
        assert monotonic_ns() - begin_ns < 0.05 * NS_PER_S
        assert port.write_errors == 1
        port.close()
        os.close(master)
        os.close(slave)

    asyncio.run(main())


# Errors at opening.


def error_at_open(address: str, settings: Create2Settings = QUICK) -> StartError:
    async def main() -> StartError:
        driver = Create2Driver(address, settings, lambda arrived_ns, values: None, lambda text: None)
        with pytest.raises(StartError) as caught:
            await driver.open()
        return caught.value

    return asyncio.run(main())


def test_no_such_port() -> None:
    error = error_at_open("/dev/ttyNONE")
    assert error.message == "there is no port /dev/ttyNONE"
    assert "ports of this host" in error.hint


def test_not_a_serial_port(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is not a serial port" in error_at_open(str(tmp_path / "file")).message
    assert "is not a serial port" in error_at_open(str(tmp_path)).message


def test_no_permission_names_the_group(tmp_path: Path) -> None:
    error = open_error(str(tmp_path / "port"), PermissionError(errno.EACCES, "Permission denied"))
    assert "no permission" in error.message
    assert "usermod -aG dialout" in error.hint


def test_silent_port() -> None:
    master, slave = os.openpty()
    tty.setraw(slave)
    error = error_at_open(os.ttyname(slave))
    assert "nothing answers" in error.message
    assert "is the robot on" in error.hint
    os.close(master)
    os.close(slave)


def test_busy_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relod.robots.create2.port.LOCK_LIMIT_S", 0.05)
    master, slave = os.openpty()
    holder = os.open(os.ttyname(slave), os.O_RDWR | os.O_NOCTTY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    error = error_at_open(os.ttyname(slave))
    assert "is busy" in error.message
    for fd in (holder, master, slave):
        os.close(fd)


def test_wrong_baud(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        # The robot streams already, for a driver before this one.
        rig.firmware.receive(oi.start() + oi.stream(oi.STREAM_IDS), monotonic_ns())
        with pytest.raises(StartError, match=r"no valid packet within 0.3 s at 19200 baud"):
            await rig.driver.open()

    with_robot(tmp_path, body, Create2Settings(answer_limit_s=0.3, baud=19_200))


def test_a_lost_port_while_opening_is_a_start_error(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        opening = asyncio.create_task(rig.driver.open())
        await asyncio.sleep(0.02)
        await rig.fault("hang_up", seconds=0.1)
        with pytest.raises(StartError):
            await opening

    async def frozen(rig: Rig) -> None:
        await rig.fault("freeze", seconds=5.0)
        await body(rig)

    with_robot(tmp_path, frozen)
