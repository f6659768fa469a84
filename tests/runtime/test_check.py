"""Commissioning and the benchmark's arithmetic; whole processes on the simulated robot are marked slow."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from relod.config import SafetySettings
from relod.errors import EXIT_OK, EXIT_SAFETY, StartError
from relod.robots.create2 import oi
from relod.robots.create2.commission import Create2Commissioning
from relod.robots.create2.driver import SENSOR_COLUMNS, Create2Settings
from relod.robots.create2.plant import WheelRecord
from relod.robots.faultserver import ask
from relod.runtime import check
from relod.runtime.check import CheckResult, StopResult, _as_asked, run_check
from relod.runtime.clock import NS_PER_MS
from relod.runtime.trial import Death, DeviceTrial, TrialPlan
from relod.types import SensorWindow

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # for spawned processes as well
stopping = importlib.import_module("stopping")


def record(t_ms: int, asked: float, speed: float) -> WheelRecord:
    return WheelRecord(t_ms * NS_PER_MS, asked, asked, speed, speed)


@pytest.mark.parametrize(
    ("log", "stopped_ms", "told_ms"),
    [
        ([], 0, 0),
        ([record(10, 150, 0), record(30, 150, 5), record(110, 0, 150), record(340, 0, 0)], 240, 10),
        ([record(10, 150, 0), record(30, 150, 5), record(60, 0, 150), record(90, 0, 0)], 0, 0),  # stood before
        ([record(10, 150, 5), record(110, 0, 150), record(300, 0, 0), record(400, 50, 0)], None, None),  # starts again
        ([record(10, 150, 5), record(110, 0, 150)], None, 10),
        ([record(10, 150, 5)], None, None),
    ],
)
def test_time_to_stop(log: list[WheelRecord], stopped_ms: float | None, told_ms: float | None) -> None:
    assert stopping.time_to_stop_ms(log, 100 * NS_PER_MS) == stopped_ms
    assert stopping.time_to_told_ms(log, 100 * NS_PER_MS) == told_ms


def packets(rows: list[dict[str, float]]) -> SensorWindow:
    values = np.array([[row.get(name, 0.0) for name in SENSOR_COLUMNS] for row in rows])
    count = len(rows)
    return SensorWindow(
        names=SENSOR_COLUMNS,
        seq=np.arange(count, dtype=np.int64),
        arrived_ns=np.arange(count, dtype=np.int64) * 15 * NS_PER_MS,
        values=values.reshape(count, len(SENSOR_COLUMNS)),
    )


def test_speeds_from_encoders_that_wrap() -> None:
    counts = [(32766, -3), (-32767, -6), (-32764, -9)]
    window = packets([{"encoder_left_counts": a, "encoder_right_counts": b} for a, b in counts])
    left, right = Create2Commissioning().speeds(window)
    assert left == pytest.approx(6 * oi.MM_PER_COUNT / 0.030)
    assert right == pytest.approx(-6 * oi.MM_PER_COUNT / 0.030)
    assert np.isnan(Create2Commissioning().speeds(packets([{}]))).all()


def test_rows_for_people() -> None:
    window = packets([{"oi_mode": 2.0, "bumps_wheel_drops": 9.0, "battery_charge_mah": 2100.0}])
    robot = Create2Commissioning()
    rows = robot.rows(window)
    assert ("oi mode", "SAFE", "") in rows
    assert ("bumps wheel drops", "bump right, wheel drop left", "") in rows
    assert ("battery charge", "2100", "mAh") in rows
    assert ("requested left", "0", "mm/s") in rows
    assert robot.summary(window) == "battery 2100 mAh, mode SAFE, not on a charger"


@pytest.mark.parametrize(
    ("measured", "passed"),
    [
        ((114.0, 0.0), True),
        ((95.0, 5.0), True),
        ((-114.0, 0.0), False),  # the wrong way
        ((0.0, 114.0), False),  # the other wheel
        ((80.0, 0.0), False),
        ((114.0, 30.0), False),
        ((float("nan"), 0.0), False),
    ],
)
def test_motion_as_asked(measured: tuple[float, float], passed: bool) -> None:
    assert _as_asked((114.0, 0.0), measured) is passed


def test_result_as_json() -> None:
    result = CheckResult(robot="/dev/ttyUSB0")
    assert (result.passed, result.exit_code) == (True, EXIT_OK)
    result.stops.append(StopResult(death="x", stopped_ms=None, allowed_ms=400.0, passed=False))
    result.failures.append("x")
    assert result.exit_code == EXIT_SAFETY
    assert result.to_dict()["stops"] == [{"death": "x", "stopped_ms": None, "allowed_ms": 400.0, "passed": False}]
    assert result.to_dict()["passed"] is False


# Whole processes.


@pytest.fixture
def plan(tmp_path: Path) -> Iterator[TrialPlan]:
    with stopping.emulated_robot(tmp_path, "ideal", 0):
        yield TrialPlan(
            driver="relod.robots.create2.driver:Create2Driver",
            address=str(tmp_path / "port"),
            settings=Create2Settings(),
            safety=SafetySettings(),
            robot=Create2Commissioning(),
            log_path=tmp_path / "device.log",
        )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MOTION_S", 0.8)
    monkeypatch.setattr(check, "SPIN_UP_S", 0.35)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_commissioning_passes_on_the_simulated_robot(plan: TrialPlan) -> None:
    text = io.StringIO()
    result = run_check(plan, None, console=Console(file=text, width=120), confirm=lambda question: True)
    assert result.passed, text.getvalue()
    assert result.packets_per_s == pytest.approx(66.7, abs=5.0)
    assert [motion.passed for motion in result.motions] == [True] * 4
    assert {stop.death for stop in result.stops} == {death.value for death in Death}
    assert "battery" in text.getvalue()


@pytest.mark.slow
def test_nothing_moves_without_consent(plan: TrialPlan, tmp_path: Path) -> None:
    result = run_check(plan, None, console=Console(file=io.StringIO()), confirm=lambda question: False)
    assert result.passed
    assert not result.moved
    assert not ask(tmp_path / "control", "wheel_log")["records"]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_blocked_wheel_fails(plan: TrialPlan, tmp_path: Path) -> None:
    ask(tmp_path / "control", "force", packet=43, value=100)
    result = run_check(plan, None, console=Console(file=io.StringIO()), confirm=lambda question: True)
    assert result.exit_code == EXIT_SAFETY
    assert "left wheel forward" in result.failures[0]
    assert not result.stops  # not tried with a robot that does not do as it is told


@pytest.mark.slow
@pytest.mark.parametrize("death", [Death.DEVICE_KILLED, Death.CONTROL_KILLED, Death.PARENT_GONE, Death.COMMANDS_STOP])
def test_every_death_stops_the_wheels(plan: TrialPlan, tmp_path: Path, death: Death) -> None:
    with DeviceTrial(plan) as trial:
        trial.drive(plan.robot.cruise, 0.7, plan.robot.take_control)
        trial.die(death, plan.robot.cruise)
        records = [WheelRecord(**line) for line in ask(tmp_path / "control", "wheel_log")["records"]]
    stopped_ms = stopping.time_to_stop_ms(records, trial.died_ns)
    timeout_ms = plan.safety.command_timeout_ms if death.by_timeout else 0.0
    assert stopped_ms is not None
    assert 100 < stopped_ms < 300 + timeout_ms


@pytest.mark.slow
def test_a_pulled_cable_is_opened_again_by_the_process(plan: TrialPlan, tmp_path: Path) -> None:
    with DeviceTrial(plan) as trial:
        trial.drive(plan.robot.cruise, 0.5)
        ask(tmp_path / "control", "hang_up", seconds=0.3)
        trial.drive(plan.robot.cruise, 1.5)
        assert any("ROBOT MAY BE MOVING" in event for event in trial.events)
        assert any("is back" in event for event in trial.events)
        assert trial.sensors.window(1).newest("connection_epoch") == 2
        assert ask(tmp_path / "control", "state")["requested_left_mm_s"] == 150


@pytest.mark.slow
def test_a_second_device_process_finds_the_port_busy(plan: TrialPlan) -> None:
    with DeviceTrial(plan), pytest.raises(StartError, match="busy"), DeviceTrial(plan):
        pass
