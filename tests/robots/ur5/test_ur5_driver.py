"""The driver with the real ur_rtde against a simulated controller in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import math
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relod.errors import RelodError, SafetyStop, StartError
from relod.robots.ur5 import driver as module
from relod.robots.ur5 import pendant
from relod.robots.ur5.driver import StopBudget, UR5Driver
from relod.robots.ur5.interface import COMMAND_NAMES, SENSOR_COLUMNS, RobotSettings
from relod.robots.ur5.pendant import Condition, Pendant, trouble
from relod.robots.ur5.target import NO_TARGET, Place, request_for
from relod.robots.ur5.targetpage import TargetServer
from relod.runtime.clock import NS_PER_MS, NS_PER_S, monotonic_ns
from tests.robots.ur5.emulated import Emulated, emulated

HAS_LIBRARY = importlib.util.find_spec("rtde_control") is not None
needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="ur_rtde has no wheel for this platform")

GO = (0.3, 0.0, 0.0, 0.0, 0.0, 0.0)
STAND = (0.0,) * 6
STOP_LIMIT_MS = 300.0


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulated]:
    """One for all tests that leave it as they found it."""
    with emulated(tmp_path_factory.mktemp("ur5")) as one:
        yield one


@pytest.fixture
def own_controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulated]:
    """For a test that ruins it."""
    with emulated(tmp_path_factory.mktemp("ur5")) as one:
        yield one


class Driven:
    """A driver and what it published and said."""

    def __init__(self, address: str, **settings: Any) -> None:
        self.packets: list[tuple[float, ...]] = []
        self.events: list[str] = []
        self.driver = UR5Driver(
            address,
            RobotSettings(**{"target": "none", **settings}),
            lambda arrived_ns, values: self.packets.append(tuple(values)),
            self.events.append,
        )

    def newest(self, name: str) -> float:
        return self.packets[-1][SENSOR_COLUMNS.index(name)]

    async def go(self, duration_s: float = 0.4) -> None:
        end_ns = monotonic_ns() + int(duration_s * NS_PER_S)
        while monotonic_ns() < end_ns:
            self.driver.command(GO)
            await asyncio.sleep(0.04)

    async def until_lost(self) -> SafetyStop:
        """Go on until the driver says that it cannot."""
        going = asyncio.create_task(self.keep_going())
        try:
            async with asyncio.timeout(10.0):
                await self.driver.run()
        except SafetyStop as loss:
            return loss
        finally:
            going.cancel()
        raise AssertionError("run ended")

    async def keep_going(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                self.driver.command(GO)
            await asyncio.sleep(0.04)

    async def reopen(self) -> float:
        """As the device process does; how long it took, in s."""
        begin_ns = monotonic_ns()
        while True:
            try:
                await self.driver.open()
            except StartError:
                assert monotonic_ns() - begin_ns < 10 * NS_PER_S
                await asyncio.sleep(0.1)
            else:
                return (monotonic_ns() - begin_ns) / NS_PER_S


@contextlib.asynccontextmanager
async def driven(address: str, **settings: Any) -> AsyncIterator[Driven]:
    it = Driven(address, **settings)
    await it.driver.open()
    try:
        yield it
    finally:
        await it.driver.close()


def on(controller: Emulated, body: Callable[[Driven], Awaitable[None]], **settings: Any) -> None:
    async def main() -> None:
        async with driven(controller.host, **settings) as it:
            await body(it)

    asyncio.run(main())


def abandon(it: Driven) -> subprocess.Popen[bytes]:
    """What the death of the driver's process does to its client, which is returned."""
    client = it.driver._client
    assert client is not None
    asyncio.get_running_loop().remove_reader(client._wire)
    client._wire.close()
    it.driver._client = None
    return client._process


def stopped_after_ms(controller: Emulated, from_ns: int) -> float:
    """By the controller's own log: from then until the arm stood for good."""
    records = controller.do("motion_log")["records"]
    assert records[-1]["asked_rad_s"] == 0
    assert records[-1]["speed_rad_s"] < 0.01, "the arm moves"
    return float((records[-1]["t_ns"] - from_ns) / NS_PER_MS)


# Driving.


@needs_library
def test_it_drives_and_tells(controller: Emulated) -> None:
    async def body(it: Driven) -> None:
        await it.go(0.1)
        before = it.newest("base_rad")
        await it.go(0.9)
        assert it.newest("base_rad_s") == pytest.approx(GO[0], abs=0.01)
        assert it.newest("base_target_rad_s") == pytest.approx(GO[0], abs=1e-6)
        assert it.newest("base_rad") - before > 0.1
        asked_ns = monotonic_ns()
        it.driver.stop()
        assert not it.driver.stands(asked_ns)
        await asyncio.sleep(0.3)
        assert it.driver.stands(asked_ns)
        times = [packet[SENSOR_COLUMNS.index("controller_s")] for packet in it.packets]
        assert all(after > before for before, after in itertools.pairwise(times))
        assert len(times) > 0.8 * (times[-1] - times[0]) / 0.008
        assert it.newest("connection_epoch") == 1
        assert it.newest("target_shown") == NO_TARGET
        assert it.driver.counters()["mode"] == "NORMAL"

    on(controller, body)
    assert controller.state()["runtime_state"] == "STOPPED", "no program is left behind"


@needs_library
def test_an_e_series_is_driven_too_in_remote_control(tmp_path: Path) -> None:
    async def body(it: Driven) -> None:
        await it.go(0.5)
        assert it.newest("base_rad_s") == pytest.approx(GO[0], abs=0.01)
        times = [packet[SENSOR_COLUMNS.index("controller_s")] for packet in it.packets]
        assert min(after - before for before, after in itertools.pairwise(times)) > 0.007, "at 125 Hz"

    with emulated(tmp_path, "e") as controller:
        on(controller, body)
        controller.do("remote_control", on=False)
        assert "local control" in failure(controller.host).message


@needs_library
def test_nothing_is_published_before_commands_are_obeyed(controller: Emulated) -> None:
    """Who sees a packet may ask for something at once, and must not be overheard."""

    async def main() -> None:
        it = Driven(controller.host)
        await it.driver.open()
        try:
            assert it.packets == []
            await asyncio.sleep(0.1)
            assert it.packets
        finally:
            await it.driver.close()

    asyncio.run(main())


@needs_library
def test_closing_is_quick(controller: Emulated) -> None:
    async def body(it: Driven) -> None:
        begin_ns = monotonic_ns()
        await it.driver.close()
        assert monotonic_ns() - begin_ns < 400 * NS_PER_MS

    on(controller, body)


def test_columns() -> None:
    assert SENSOR_COLUMNS[-1] == "connection_epoch"
    assert len(set(SENSOR_COLUMNS)) == len(SENSOR_COLUMNS)
    assert set(COMMAND_NAMES) < set(SENSOR_COLUMNS)


class Recorder:
    """Stands for the process with ur_rtde in it."""

    def __init__(self) -> None:
        self.orders: list[tuple[float, ...]] = []

    def order(self, speeds: list[float]) -> None:
        self.orders.append(tuple(speeds))


@given(st.tuples(*[st.floats(width=64)] * 6))
def test_nothing_but_possible_speeds_reaches_the_library(values: tuple[float, ...]) -> None:
    it, recorder = Driven("127.0.0.1"), Recorder()
    it.driver._client = recorder  # type: ignore[assignment]
    it.driver.command(values)
    (sent,) = recorder.orders
    if all(map(math.isfinite, values)):
        assert sent == tuple(min(max(value, -math.pi), math.pi) for value in values)
    else:
        assert sent == STAND
        assert it.driver.counters()["rejected_commands"] == 1


def test_a_driver_that_is_not_open_refuses_to_move() -> None:
    it = Driven("127.0.0.1")
    with pytest.raises(OSError, match="not open"):
        it.driver.command(GO)
    it.driver.stop()


# The target.


@needs_library
def test_a_request_moves_the_target(controller: Emulated) -> None:
    request = request_for(Place(30.0, 40.0))

    async def main() -> None:
        async with (
            TargetServer("127.0.0.1", 0, paint=lambda show: None) as server,
            driven(controller.host, target=f"127.0.0.1:{server.port}") as it,
        ):
            it.driver.request(request)
            async with asyncio.timeout(2.0):
                while not it.packets or it.newest("target_shown") != request:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            it.driver.request(1 << 30)
            assert it.events == [f"request {1 << 30} is none for the target"]

    asyncio.run(main())


@needs_library
def test_a_missing_target_page_is_one_line(controller: Emulated) -> None:
    async def main() -> None:
        with pytest.raises(StartError, match=f"no target page at {controller.host}:8770"):
            await Driven(controller.host, target="").driver.open()

    asyncio.run(main())


# Losses: each ends `run`, is over soon after the controller is back, and leaves an arm that stands.


async def lose(it: Driven, controller: Emulated, cause: Callable[[], object]) -> str:
    await it.go(0.2)
    asyncio.get_running_loop().call_later(0.05, cause)
    loss = await it.until_lost()
    epoch = it.newest("connection_epoch")
    assert await it.reopen() < 2.5
    it.driver.stop()
    await asyncio.sleep(0.15)
    assert it.newest("connection_epoch") > epoch
    assert abs(it.newest("base_rad_s")) < 0.01, "what was ordered before is forgotten"
    await it.go(0.3)
    assert it.newest("base_rad_s") > 0.1
    return loss.message


@needs_library
@pytest.mark.parametrize(
    ("op", "values", "said"),
    [
        ("drop", {}, "lost"),
        ("kill_program", {}, "control script ended"),
        pytest.param("drop", {"servers": ["rtde"]}, "lost", marks=pytest.mark.slow),
        pytest.param("stall", {"seconds": 0.5}, "silent", marks=pytest.mark.slow),
        pytest.param("hang_up", {"seconds": 0.5}, "lost", marks=pytest.mark.slow),
    ],
)
def test_a_lost_controller_is_connected_again(controller: Emulated, op: str, values: dict[str, Any], said: str) -> None:
    async def body(it: Driven) -> None:
        assert said in await lose(it, controller, lambda: controller.do(op, **values))

    on(controller, body)


@needs_library
@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGSEGV, "SIGSEGV"),
        pytest.param(signal.SIGKILL, "SIGKILL", marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, "hangs", marks=pytest.mark.slow),
    ],
)
def test_a_lost_client_process_is_replaced(controller: Emulated, number: signal.Signals, said: str) -> None:
    async def body(it: Driven) -> None:
        assert it.driver._client is not None
        client_pid = it.driver._client.pid
        assert said in await lose(it, controller, lambda: os.kill(client_pid, number))

    on(controller, body)


@needs_library
@pytest.mark.slow
def test_thirty_drops_are_thirty_recoveries(controller: Emulated) -> None:
    async def body(it: Driven) -> None:
        for _ in range(30):
            await it.go(0.1)
            asyncio.get_running_loop().call_later(0.02, controller.do, "drop")
            await it.until_lost()
            assert await it.reopen() < 1.0

    on(controller, body)


# Stops.


@needs_library
@pytest.mark.parametrize("death", ["client killed", "driver gone", "commands stop"])
def test_the_arm_stops_whoever_dies(controller: Emulated, death: str) -> None:
    async def body(it: Driven) -> None:
        await it.go(0.5)
        assert it.driver._client is not None
        from_ns = monotonic_ns()
        match death:
            case "client killed":
                os.kill(it.driver._client.pid, signal.SIGKILL)
            case "driver gone":
                orphan = abandon(it)
                assert orphan.wait(1.0) == 0
            case _:
                pass
        await asyncio.sleep(0.6)
        stopped_ms = stopped_after_ms(controller, from_ns)
        assert stopped_ms < STOP_LIMIT_MS

    on(controller, body)


@needs_library
def test_who_comes_right_after_a_killed_driver_waits_for_its_client(controller: Emulated) -> None:
    """A device process that is killed is started again at once; its client still makes the arm stand."""

    async def body(it: Driven) -> None:
        await it.go(0.3)
        orphan = abandon(it)
        async with driven(controller.host) as successor:
            await successor.go(0.2)
            assert successor.newest("base_rad_s") > 0.1
        assert orphan.wait(1.0) == 0

    on(controller, body)


# Safety.


@needs_library
def test_a_protective_stop_too_many_ends_the_run(own_controller: Emulated) -> None:
    async def body(it: Driven) -> None:
        asyncio.get_running_loop().call_later(0.1, own_controller.do, "protective_stop")
        loss = await it.until_lost()
        assert loss.message == f"{own_controller.host}: 1 protective stops within 600 s, 0 are borne"
        assert it.driver.reopen_limit_s == 0
        it.driver.connection_epoch = 0
        with pytest.raises(StartError, match=r"in a protective stop; look at why, .* unlock"):
            await it.driver.open()

    on(own_controller, body, protective_stops=0)


@needs_library
@pytest.mark.slow
def test_a_protective_stop_is_sat_out(own_controller: Emulated) -> None:
    async def body(it: Driven) -> None:
        message = await lose(it, own_controller, lambda: own_controller.do("protective_stop"))
        assert message.endswith("protective stop")
        assert it.events == ["protective stop 1 of 10 within 600 s; to be unlocked in 5 s"]
        assert len(it.packets) > 600, "sensors flow meanwhile"

    on(own_controller, body)


@needs_library
@pytest.mark.parametrize(
    ("op", "values", "said", "at_start"),
    [
        ("emergency_stop", {"pressed": True}, "ROBOT_EMERGENCY_STOP", "emergency stop .* is pressed; release it"),
        ("safeguard", {"open": True}, "SAFEGUARD_STOP", "safeguard .* is open; close it"),
        ("violation", {}, "VIOLATION", "safety mode .* is VIOLATION; clear it on the pendant"),
    ],
)
def test_what_only_a_person_can_mend_ends_the_run(
    own_controller: Emulated, op: str, values: dict[str, Any], said: str, at_start: str
) -> None:
    async def body(it: Driven) -> None:
        await it.go()
        asyncio.get_running_loop().call_later(0.05, lambda: own_controller.do(op, **values))
        assert said in (await it.until_lost()).message
        assert it.driver.reopen_limit_s == 0
        assert own_controller.state()["standing"]
        with pytest.raises(StartError, match=at_start):
            await it.driver.open()

    on(own_controller, body)


@needs_library
def test_who_pauses_the_program_ends_the_run(own_controller: Emulated) -> None:
    async def pause() -> None:
        async with Pendant.open(own_controller.host) as it:
            assert await it.ask("pause") == "Pausing program"

    async def body(it: Driven) -> None:
        await it.go()
        pausing = asyncio.create_task(pause())
        assert (await it.until_lost()).message.endswith("paused on the pendant")
        await pausing
        assert it.driver.reopen_limit_s == 0

    on(own_controller, body)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=60), st.integers(0, 5))
def test_the_budget_counts_stops_of_the_window_only(gaps_s: list[int], limit: int) -> None:
    budget = StopBudget(limit, 600 * NS_PER_S)
    now_ns, times_ns = 0, []
    for gap_s in gaps_s:
        now_ns += gap_s * NS_PER_S
        times_ns.append(now_ns)
        within = sum(now_ns - then_ns <= 600 * NS_PER_S for then_ns in times_ns)
        assert budget.spend(now_ns) == within
        assert budget.overdrawn == (within > limit)


# Starts that cannot be.


def failure(address: str, **settings: Any) -> RelodError:
    async def main() -> None:
        await Driven(address, **settings).driver.open()

    with pytest.raises(RelodError) as caught:
        asyncio.run(main())
    return caught.value


@needs_library
def test_registers_in_use_are_one_line(controller: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IN_USE_LIMIT_S", 0.1)
    controller.do("claim", names=["input_int_register_0"])
    try:
        error = failure(controller.host)
    finally:
        controller.do("claim", names=[])
    assert isinstance(error, StartError)
    assert "another program controls the robot" in error.message
    assert "EtherNet/IP" in error.hint


@needs_library
def test_a_wrong_address_is_one_line() -> None:
    error = failure("127.0.0.254")
    assert error.message == "no UR controller at 127.0.0.254: port 29999 cannot be reached (Connection refused)"
    assert failure("no.such.host.invalid").message.startswith("no UR controller at no.such.host.invalid: ")


@needs_library
def test_a_controller_that_only_accepts_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """ur_rtde waits for ever, and nothing else runs in its process meanwhile."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 30004)):
            async with dashboard(monkeypatch, GREETING, WELL):
                begin_ns = monotonic_ns()
                with pytest.raises(StartError, match=r"did not obey within 0\.3 s"):
                    await Driven("127.0.0.1", answer_limit_s=0.3).driver.open()
                assert monotonic_ns() - begin_ns < 1.5 * NS_PER_S

    asyncio.run(main())


def test_a_platform_without_the_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = failure("127.0.0.1")
    assert isinstance(error, StartError)
    assert "is not installed" in error.message
    assert "CPython 3.11 and 3.12 on x86-64 Linux" in error.hint


# What the dashboard says.


GREETING = b"Connected: Universal Robots Dashboard Server\n"
WELL = {"robotmode": "Robotmode: RUNNING", "safetymode": "Safetymode: NORMAL"}


@pytest.mark.parametrize(
    ("robot_mode", "safety_mode", "remote", "said"),
    [
        ("POWER_OFF", "NORMAL", True, "not switched on .*; switch it on"),
        ("IDLE", "NORMAL", True, "brakes .* are on; release them"),
        ("BACKDRIVE", "REDUCED", True, "robot mode BACKDRIVE"),
        ("RUNNING", "NORMAL", False, "local control; switch the pendant to Remote Control"),
        ("RUNNING", "PROTECTIVE_STOP", True, "protective stop; look at why"),
        ("POWER_OFF", "ROBOT_EMERGENCY_STOP", True, "emergency stop .* is pressed; release it"),
        ("RUNNING", "SAFEGUARD_STOP", True, "safeguard .* is open; close it"),
        ("RUNNING", "FAULT", True, "safety mode .* is FAULT"),
    ],
)
def test_every_condition_has_its_line(robot_mode: str, safety_mode: str, remote: bool, said: str) -> None:
    condition = Condition(robot_mode=robot_mode, safety_mode=safety_mode, remote_control=remote)
    error = trouble("arm", condition)
    assert error is not None
    assert "\n" not in str(error)
    with pytest.raises(StartError, match=said):
        raise error


@pytest.mark.parametrize("safety_mode", ["NORMAL", "REDUCED"])
def test_a_robot_that_can_move_is_no_trouble(safety_mode: str) -> None:
    assert trouble("arm", Condition(robot_mode="RUNNING", safety_mode=safety_mode, remote_control=True)) is None


@contextlib.asynccontextmanager
async def dashboard(monkeypatch: pytest.MonkeyPatch, greeting: bytes, answers: dict[str, str]) -> AsyncIterator[None]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                writer.write(answers.get(line.decode().strip(), "could not understand").encode() + b"\n")
        writer.transport.abort()
        gone.set()

    gone = asyncio.Event()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    monkeypatch.setattr(pendant, "DASHBOARD_PORT", server.sockets[0].getsockname()[1])
    monkeypatch.setattr(pendant, "ANSWER_LIMIT_S", 0.1)
    async with server:
        yield
        await gone.wait()


def test_a_controller_without_remote_control_is_not_in_local_control(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CB3 does not know the question."""

    async def main() -> None:
        async with dashboard(monkeypatch, GREETING, WELL), Pendant.open("127.0.0.1") as it:
            assert trouble("arm", await it.condition()) is None
            assert not await it.unlock()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("greeting", "said"), [(b"SSH-2.0-OpenSSH\n", "is no UR controller"), (b"", "does not answer")]
)
def test_who_is_no_controller_is_told(monkeypatch: pytest.MonkeyPatch, greeting: bytes, said: str) -> None:
    async def main() -> None:
        async with dashboard(monkeypatch, greeting, {}):
            with pytest.raises(StartError, match=said):
                async with Pendant.open("127.0.0.1"):
                    pass

    asyncio.run(main())
