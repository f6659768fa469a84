"""The driver against the simulated rig on its socket, both on one event loop; and deaths, with whole processes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relod.config import SafetySettings
from relod.errors import SafetyStop, StartError
from relod.robots.track.commission import TRY_MM_S, TrackCommissioning
from relod.robots.track.driver import StateReader, TrackDriver, TrackRobotSettings
from relod.robots.track.port import RigPort
from relod.robots.track.rig import HOME_MM, SENSOR_COLUMNS, STATE, Rig
from relod.runtime.clock import NS_PER_MS, monotonic_ns
from relod.runtime.trial import Death, DeviceTrial, TrialPlan
from relod.types import SensorWindow

QUICK = TrackRobotSettings(answer_limit_s=0.3, reopen_limit_s=1.0)


class Bench:
    """A rig on its socket, ticking, and drivers with what they published and said."""

    def __init__(self, path: Path) -> None:
        self.rig = Rig(lag_ms=20.0, history_ns=0, start_ns=monotonic_ns())
        self.path, self.packets, self.events = path, [], []
        self.silent = False

    def driver(self) -> TrackDriver:
        return TrackDriver(
            str(self.path), QUICK, lambda arrived_ns, values: self.packets.append(values), self.events.append
        )

    @contextlib.asynccontextmanager
    async def port(self) -> AsyncIterator[None]:
        async with RigPort(self.rig, self.path) as port:
            ticking = asyncio.create_task(self._tick(port))
            try:
                yield
            finally:
                ticking.cancel()

    async def _tick(self, port: RigPort) -> None:
        while True:
            await asyncio.sleep(0.005)
            for _, state in self.rig.advance(monotonic_ns()):
                if not self.silent:
                    port.send(state)

    async def until(self, what: Callable[[], bool], limit_s: float = 2.0) -> None:
        async with asyncio.timeout(limit_s):
            for pause_s in itertools.repeat(0.005):
                if what():
                    return
                await asyncio.sleep(pause_s)


def with_rig(tmp_path: Path, body: Callable[[Bench], Awaitable[None]]) -> None:
    async def run() -> None:
        bench = Bench(tmp_path / "rig.sock")
        async with bench.port():
            await body(bench)

    asyncio.run(run())


def test_it_drives_and_stops(tmp_path: Path):
    async def body(bench: Bench) -> None:
        driver = bench.driver()
        await driver.open()
        before_ns = monotonic_ns()
        driver.command((100.0, 0.0, -40.0))
        await bench.until(lambda: bench.packets[-1][0] > 5.0)
        assert not driver.stands(before_ns)
        assert bench.packets[-1][3:6] == (100.0, 0.0, -40.0)
        assert bench.packets[-1][2] < HOME_MM[2]
        driver.stop()
        stopped_ns = monotonic_ns()
        assert not driver.stands(stopped_ns)
        await bench.until(lambda: driver.stands(stopped_ns))
        assert monotonic_ns() - stopped_ns > 20 * NS_PER_MS  # not before states show it
        assert driver.counters() == {"packets": float(len(bench.packets)), "connection_epoch": 1.0}
        await driver.close()
        await driver.close()

    with_rig(tmp_path, body)


def test_packets_are_in_the_order_of_the_columns(tmp_path: Path):
    async def body(bench: Bench) -> None:
        driver = bench.driver()
        await driver.open()
        assert dict(zip(SENSOR_COLUMNS, bench.packets[0], strict=True)) == {
            **dict(zip(("x_mm", "y_mm", "depth_mm"), HOME_MM, strict=True)),
            **dict.fromkeys(("asked_x_mm_s", "asked_y_mm_s", "asked_depth_mm_s"), 0.0),
            "connection_epoch": 1,
        }
        driver.request(7)
        assert bench.events == ["request 7 is none of the rig's"]
        await driver.close()

    with_rig(tmp_path, body)


def test_a_driver_that_hangs_up_leaves_the_rig_standing_at_once(tmp_path: Path):
    async def body(bench: Bench) -> None:
        driver, watcher = bench.driver(), TrackCommissioning().listen(str(bench.path))
        await driver.open()
        driver.command((100.0, 0.0, 0.0))
        await bench.until(lambda: bench.rig.speed_mm_s[0] > 80)
        began_ns = monotonic_ns()
        await driver.close()
        await bench.until(lambda: bench.rig.speed_mm_s[0] < 80)
        assert monotonic_ns() - began_ns < 150 * NS_PER_MS  # sooner than the rig's watchdog
        assert len(watcher.packets()) > 5
        watcher.close()

    with_rig(tmp_path, body)


def test_a_second_driver_is_turned_away_and_the_first_goes_on(tmp_path: Path):
    async def body(bench: Bench) -> None:
        first, second = bench.driver(), bench.driver()
        await first.open()
        try:
            await second.open()
        except StartError as error:
            assert "does another program drive it?" in str(error)  # noqa: PT017
        else:  # a state came before it was hung up on
            with pytest.raises(SafetyStop, match="was lost"):
                await second.run()
        first.command((0.0, 100.0, 0.0))
        await bench.until(lambda: bench.rig.speed_mm_s[1] > 50)
        await first.close()
        await second.open()
        await second.close()

    with_rig(tmp_path, body)


def test_a_rig_that_is_lost_and_comes_back(tmp_path: Path):
    async def run() -> None:
        bench = Bench(tmp_path / "rig.sock")
        driver = bench.driver()
        async with bench.port():
            await driver.open()
            running = asyncio.create_task(driver.run())
            await asyncio.sleep(0.02)
            assert not running.done()
        with pytest.raises(SafetyStop, match=r"the connection to .*rig\.sock was lost"):
            await running
        driver.stop()
        with pytest.raises(OSError, match="is not open"):
            driver.command((0.0, 0.0, 0.0))
        with pytest.raises(StartError, match=r"no rig at .*rig\.sock"):
            await driver.open()
        async with bench.port():
            await driver.open()
            assert bench.packets[-1][-1] == 2
            await driver.close()

    asyncio.run(run())


def test_a_silent_rig_is_told(tmp_path: Path):
    async def body(bench: Bench) -> None:
        bench.silent = True
        with pytest.raises(StartError, match=r"sent no state within 0\.3 s"):
            await bench.driver().open()

    with_rig(tmp_path, body)


def test_a_client_that_does_not_read_misses_states_and_delays_nobody(tmp_path: Path):
    async def body(bench: Bench) -> None:
        async with RigPort(bench.rig, tmp_path / "other.sock") as port:
            _, writer = await asyncio.open_unix_connection(tmp_path / "other.sock", limit=1)
            await asyncio.sleep(0.01)
            for _ in range(100_000):
                port.send(bytes(STATE.size))
            (client,) = port._clients.values()
            assert client.transport.get_write_buffer_size() < 10_000
            writer.close()

    with_rig(tmp_path, body)


@given(st.lists(st.tuples(*[st.floats(width=32, allow_nan=False)] * 6), max_size=8), st.data())
def test_states_are_read_whole_wherever_the_stream_is_cut(states, data):
    stream = b"".join(STATE.pack(*state) for state in states)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    reader, seen = StateReader(ours), []
    with ours, theirs:
        for begin, end in itertools.pairwise([0, *cuts, len(stream)]):
            theirs.sendall(stream[begin:end])
            with contextlib.suppress(BlockingIOError):
                seen += reader.read()
        assert seen == states
        theirs.close()
        with pytest.raises(ConnectionResetError):
            reader.read()


def test_speeds_need_two_states():
    robot = TrackCommissioning()
    assert all(map(math.isnan, robot.speeds(_window([HOME_MM]))))
    assert robot.speeds(_window([HOME_MM, (1.0, -2.0, 100.0)])) == pytest.approx((100.0, -200.0, 0.0))
    assert ("depth_mm", "100.0", "mm") in robot.rows(_window([HOME_MM]))
    assert robot.summary(_window([(1.0, -2.0, 90.0)])) == "camera 1 mm right and -2 mm below the middle, 90 mm away"


def _window(poses: list[tuple[float, ...]]) -> SensorWindow:
    values = np.array([[*pose, 0.0, 0.0, 0.0, 1.0] for pose in poses])
    times = np.arange(len(poses)) * 10 * NS_PER_MS
    return SensorWindow(names=SENSOR_COLUMNS, seq=np.arange(len(poses)), arrived_ns=times, values=values)


# Whole processes.


@pytest.fixture
def plan(tmp_path: Path) -> Iterator[TrialPlan]:
    command = [sys.executable, "-m", "relod", "emulate", "track", "--world", "ideal", "--link", tmp_path / "rig.sock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as world:
        assert world.stdout is not None
        yield TrialPlan(
            driver="relod.robots.track.driver:TrackDriver",
            address=json.loads(world.stdout.readline())["port"],
            settings=TrackRobotSettings(),
            safety=SafetySettings(),
            robot=TrackCommissioning(),
            log_path=tmp_path / "device.log",
        )
        world.send_signal(signal.SIGINT)
        assert world.wait(10) == 0


@pytest.mark.slow
def test_every_death_around_the_device_process_ends_with_the_rig_standing(plan: TrialPlan):
    deaths = (Death.DEVICE_KILLED, Death.PARENT_GONE, Death.DEVICE_HANGS, Death.DEVICE_TERMINATED)
    for turn, death in enumerate(deaths):
        values = (TRY_MM_S if turn % 2 == 0 else -TRY_MM_S, 0.0, 0.0)
        with DeviceTrial(plan) as trial:
            assert trial.plan.robot.speeds(trial.drive(values, 0.8)) == pytest.approx(values, abs=6.0)
            stopped_ms = trial.die(death, values)
        assert stopped_ms is not None, death
        assert stopped_ms < (600.0 if death.by_timeout else 300.0), death
