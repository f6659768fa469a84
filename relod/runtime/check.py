"""Commissioning a robot that is free to move: sensors, camera, each motion, and how fast every death stops it.

Run before a robot learns for the first time, and after any change to cable, computer or firmware. What is measured
is this robot on this computer; nothing is assumed from documentation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console
from rich.table import Table

from ..errors import EXIT_OK, EXIT_SAFETY, StartError
from .clock import NS_PER_S
from .device import MAY_BE_MOVING
from .trial import SPIN_UP_S, Death, DeviceTrial, TrialPlan

if TYPE_CHECKING:
    from .cameratrial import CameraPlan, CameraResult

__all__ = ["CheckResult", "MotionResult", "StopResult", "run_check"]

MOTION_S = 1.6  # the second half is measured: 0.8 s, some 200 encoder counts
SPEED_TOLERANCE = 0.25  # of what was asked; wheels in the air differ by a few per cent
STILL_SPEED = 0.1  # of what was asked: what the other parts of the robot may seem to do
# After it is noticed a stop takes 17 ms to act, up to 0.3 s to stand from the fastest speed, 40 ms to be seen.
STOP_ALLOWED_MS = 400.0

STOP_ORDER = (
    Death.COMMANDS_STOP,
    Death.CONTROL_KILLED,
    Death.PARENT_GONE,
    Death.DEVICE_KILLED,
    Death.DEVICE_HANGS,
    Death.DEVICE_TERMINATED,  # last: its end is orderly, so the robot is left as it should be
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MotionResult:
    """A motion and what the encoders saw of it."""

    name: str
    asked: tuple[float, ...]
    measured: tuple[float, ...]
    passed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StopResult:
    """A death and how long the robot moved after it; None if it was not seen to stop."""

    death: str
    stopped_ms: float | None
    allowed_ms: float
    passed: bool


@dataclass(slots=True, kw_only=True)
class CheckResult:
    """Everything that was seen; `failures` says in words what must not stay so."""

    robot: str
    sensors: dict[str, float] = field(default_factory=dict)
    packets_per_s: float = 0.0
    camera: CameraResult | None = None
    moved: bool = False  # whether the user let it
    motions: list[MotionResult] = field(default_factory=list)
    stops: list[StopResult] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def exit_code(self) -> int:
        """0, or 4 when something failed."""
        return EXIT_OK if self.passed else EXIT_SAFETY

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**msgspec.to_builtins(self), "passed": self.passed}


def run_check(
    plan: TrialPlan, camera: CameraPlan | None, *, console: Console, confirm: Callable[[str], bool]
) -> CheckResult:
    """Commission the robot; prints as it goes. `camera` may be left out; `confirm` is asked before anything moves.

    Raises:
        StartError: robot or camera cannot be opened.
        SafetyStop: the device process could not say that the robot stands.
    """
    result = CheckResult(robot=plan.address)
    with DeviceTrial(plan) as trial:
        _look_at_sensors(trial, result, console)
        if camera is not None:
            _look_at_camera(camera, result, console)
        result.moved = confirm(f"The robot will move. {plan.robot.question}")
        if result.moved:
            _try_motions(trial, result, console)
    if result.moved and result.passed:
        _try_deaths(plan, result, console)
    _conclude(result, console)
    return result


def _look_at_sensors(trial: DeviceTrial, result: CheckResult, console: Console) -> None:
    robot = trial.plan.robot
    trial.stop(1.0)
    window = trial.sensors.window(trial.sensors.ring.newest_seq)
    if len(window.seq) < 2:
        raise StartError(f"{trial.plan.address} sends no sensor packets", "see the log of the device process")
    duration_s = int(window.arrived_ns[-1] - window.arrived_ns[0]) / NS_PER_S
    result.packets_per_s = round((len(window.seq) - 1) / duration_s, 1)
    result.sensors = {name: window.newest(name) for name in window.names}
    table = Table(title=f"{trial.plan.address}: {result.packets_per_s:.0f} packets/s", title_justify="left")
    table.add_column("sensor")
    table.add_column("value", justify="right")
    table.add_column("unit")
    for row in robot.rows(window):
        table.add_row(*row)
    console.print(table)
    console.print(robot.summary(window))


def _look_at_camera(plan: CameraPlan, result: CheckResult, console: Console) -> None:
    from .cameratrial import try_camera  # OpenCV is needed for cameras only

    result.camera = seen = try_camera(plan)
    console.print(f"camera {seen.source}: {seen}")
    if seen.failure:
        result.failures.append(seen.failure)


def _try_motions(trial: DeviceTrial, result: CheckResult, console: Console) -> None:
    robot = trial.plan.robot
    trial.drive(tuple(0.0 for _ in robot.command_names), 0.3, robot.take_control)
    for name, asked in robot.motions:
        measured = robot.speeds(trial.drive(asked, MOTION_S))
        trial.stop()
        motion = MotionResult(
            name=name,
            asked=asked,
            measured=tuple(float(f"{speed:.3g}") for speed in measured),
            passed=_as_asked(asked, measured),
        )
        result.motions.append(motion)
        values = ", ".join(
            f"{unit} {speed:.3g} (asked {wanted:.3g})"
            for unit, speed, wanted in zip(robot.command_names, measured, asked, strict=True)
        )
        console.print(f"{_mark(motion.passed)} {name}: {values}")
        if not motion.passed:
            result.failures.append(f"{name}: asked {asked}, encoders show {motion.measured}")


def _as_asked(asked: tuple[float, ...], measured: tuple[float, ...]) -> bool:
    """Every part that was asked to moves the right way at the right speed, every other stands."""
    fastest = max(abs(value) for value in asked)
    return all(
        abs(speed - value) <= (SPEED_TOLERANCE * abs(value) if value else STILL_SPEED * fastest)
        for value, speed in zip(asked, measured, strict=True)
    )


def _try_deaths(plan: TrialPlan, result: CheckResult, console: Console) -> None:
    cruise = plan.robot.cruise
    for death in STOP_ORDER:
        allowed_ms = STOP_ALLOWED_MS + (plan.safety.command_timeout_ms if death.by_timeout else 0.0)
        with DeviceTrial(plan) as trial:
            speeds = plan.robot.speeds(trial.drive(cruise, 2 * SPIN_UP_S, plan.robot.take_control))
            stopped_ms = trial.die(death, cruise)
        stop = StopResult(
            death=death.value,
            stopped_ms=None if stopped_ms is None else round(stopped_ms, 1),
            allowed_ms=allowed_ms,
            passed=stopped_ms is not None and stopped_ms <= allowed_ms,
        )
        if not _as_asked(cruise, speeds):
            stop = replace(stop, passed=False)
            result.failures.append(f"{death.value}: the robot was not driving before (measured {speeds})")
        result.stops.append(stop)
        shown = f"{MAY_BE_MOVING}: not seen to stop" if stopped_ms is None else f"stood after {stopped_ms:.0f} ms"
        console.print(f"{_mark(stop.passed)} {death.value}: {shown} (allowed {allowed_ms:.0f} ms)")
        if not stop.passed and _as_asked(cruise, speeds):
            result.failures.append(f"{death.value}: {shown}, allowed are {allowed_ms:.0f} ms")
        cruise = tuple(-value for value in cruise)  # to and fro: a robot may have little room


def _conclude(result: CheckResult, console: Console) -> None:
    for failure in result.failures:
        console.print(f"[bold red]failed[/]: {failure}")
    if result.passed:
        extent = "sensors, motions and stops" if result.moved else "sensors only; nothing moved"
        console.print(f"[green]passed[/] ({extent})")


def _mark(passed: bool) -> str:
    return "[green]ok[/]" if passed else "[bold red]FAILED[/]"
