"""The composition root: what a mode wires to what. Nothing outside this file asks which mode it is in.

The robot side always does sensor -> observation -> action -> actuator, the learner side always transition -> replay ->
update -> policy. A mode decides who answers an observation and who learns; each is one function here.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..config import Section, Settings, describe, load
from ..errors import SettingsError
from ..robots import registry
from ..robots.registry import TaskEntry
from .plan import Plan

__all__ = ["Request", "describe_modes", "describe_settings", "run_check", "run_emulator", "run_robot"]

CLOCKS = ("wall", "virtual")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked of `relod robot`, unresolved."""

    task: str
    mode: str
    algorithm: str
    preset: str | None
    robot: str | None
    camera: str | None
    allow_mixed: bool
    world: str
    clock: str
    config: Path | None
    environment: Mapping[str, str]
    assignments: tuple[str, ...]
    overrides: Mapping[str, Any]
    arguments: tuple[str, ...]


def run_robot(request: Request) -> Any:
    """Run `relod robot`; returns a `host.Result`."""
    plan = resolve(request)
    return MODES[plan.mode].run(plan, request.arguments)


# -- modes -----------------------------------------------------------------------------------------------------------


def local_only(plan: Plan, arguments: tuple[str, ...]) -> Any:
    """Actor in the control process, replay in this process, updates in a worker on this host."""
    from .learner import LearnerSide
    from .session import announce, new_spans, open_folder, run_virtual, run_wall

    announce(plan)
    spans = new_spans()
    with open_folder(plan, arguments) as folder:
        learner = LearnerSide(plan, folder.path, spans)
        if plan.clock == "virtual":
            return run_virtual(plan, folder, learner)
        return run_wall(plan, folder, learner, spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """A row of the table of modes."""

    run: Callable[[Plan, tuple[str, ...]], Any]
    acts: str
    learns: str


MODES = {
    "local-only": Mode(
        run=local_only,
        acts="actor in the control process",
        learns="update worker on the robot's host, by shared memory",
    ),
}


def describe_modes() -> list[dict[str, str]]:
    """Who acts and who learns, by mode."""
    return [{"mode": name, "acts": mode.acts, "learns": mode.learns} for name, mode in MODES.items()]


# -- resolving -------------------------------------------------------------------------------------------------------


def resolve(request: Request) -> Plan:
    """Look up every name and load the settings; `SettingsError` for whatever does not fit together."""
    _one_of(request.mode, tuple(MODES), "mode")
    _one_of(request.clock, CLOCKS, "clock")
    robot, camera = _hardware(request)
    entry = registry.task(request.task)
    algorithm = registry.algorithm(request.algorithm)
    preset, reason = _preset(request.preset, algorithm.presets)
    settings = load(
        {**entry.sections(), "agent": algorithm.settings_type},
        presets=[world_settings(entry, request.world), algorithm.presets[preset]],
        file=request.config,
        environment=request.environment,
        assignments=request.assignments,
        overrides=request.overrides,
    )
    if request.clock == "virtual" and settings.run.record:
        raise SettingsError(
            "a run in virtual time is not recorded: its seed repeats it", "leave out --record, or use --clock wall"
        )
    return Plan(
        task_name=request.task,
        entry=entry,
        task=entry.build(settings.task),
        mode=request.mode,
        algorithm_name=request.algorithm,
        algorithm_target=registry.target("algorithm", request.algorithm),
        algorithm=algorithm,
        preset=preset,
        preset_reason=reason,
        settings=settings,
        robot=robot,
        camera=camera,
        world=request.world,
        clock=request.clock,
    )


def _hardware(request: Request) -> tuple[str | None, str | None]:
    """Robot and camera as named, None for simulated; never a mixture unless it was asked for."""
    robot = request.robot
    camera = None if request.camera == "sim" else request.camera
    if request.clock == "virtual" and (robot or camera):
        raise SettingsError(
            "--clock virtual has no hardware: it runs faster than real time", "leave out --robot and --camera"
        )
    if robot is not None and request.camera is None:
        raise SettingsError(f"--robot {robot} without --camera", "name the camera too, for example --camera 0")
    if (robot is None) != (camera is None) and not request.allow_mixed:
        told = f"robot {robot or 'SIMULATED'}, camera {camera or 'SIMULATED'}"
        raise SettingsError(
            f"hardware and simulation are mixed: {told}",
            "name both --robot and --camera, or neither; --allow-mixed if this is what you want",
        )
    if camera is not None:
        from ..robots.camera import parse_source

        parse_source(camera)
    return robot, camera


def _preset(wanted: str | None, presets: Mapping[str, Any]) -> tuple[str, str]:
    """The preset and why: what was asked for, else what the machine can do."""
    if wanted is not None:
        return _one_of(wanted, tuple(presets), "preset"), "asked for"
    import torch

    gpu, cpu = next(iter(presets)), f"{next(iter(presets))}-lite"
    if torch.cuda.is_available():
        return gpu, f"this machine has {torch.cuda.get_device_name(0)}"
    return (cpu if cpu in presets else gpu), "this machine has no CUDA device"


def world_settings(entry: TaskEntry, name: str) -> Mapping[str, Any]:
    """The tree of settings of a simulated world."""
    worlds = registry.load_attribute(entry.worlds, "the simulated worlds")
    return worlds[_one_of(name, tuple(worlds), "world")]  # type: ignore[no-any-return]


def _one_of(name: str, known: tuple[str, ...], kind: str) -> str:
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    listed = f"known: {', '.join(known)}"
    raise SettingsError(f"unknown {kind} {name!r}", f"did you mean {close[0]}? {listed}" if close else listed)


def describe_settings(task: str, algorithm: str) -> Iterator[tuple[str, Any, str]]:
    """Every setting as (name, default, description); the agent's defaults before any preset."""
    sections: dict[str, type[Section]] = {
        **registry.task(task).sections(),
        "agent": registry.algorithm(algorithm).settings_type,
    }
    for name, default, text in describe(sections):
        yield name, msgspec.to_builtins(default), text


# -- other commands --------------------------------------------------------------------------------------------------


def _task_settings(
    task: str, world: str, config: Path | None, environment: Mapping[str, str], assignments: tuple[str, ...]
) -> tuple[TaskEntry, Settings]:
    """Settings of a task without an algorithm: what belongs to one is not known here."""
    entry = registry.task(task)
    settings = load(
        entry.sections(),
        presets=[world_settings(entry, world)],
        file=config,
        environment=environment,
        assignments=assignments,
    )
    return entry, settings


def run_emulator(
    *,
    task: str,
    link: Path | None,
    control: Path | None,
    mjpeg_port: int,
    wheel_log: Path | None,
    world: str,
    seed: int,
    config: Path | None,
    environment: Mapping[str, str],
    assignments: tuple[str, ...],
) -> int:
    """A simulated robot alone, until Ctrl-C or SIGTERM; prints a JSON line that says where it is."""
    import asyncio
    import signal

    import uvloop

    entry, settings = _task_settings(task, world, config, environment, assignments)
    spec = entry.build(settings.task).spec
    serve = registry.load_attribute(entry.emulator, f"the emulator of {task!r}")

    def ready(where: Mapping[str, str]) -> None:
        print(msgspec.json.encode(where).decode(), flush=True)
        told = f"--task {task} --robot {where['port']} --camera {where['camera_url']}"
        print(f"relod: a simulated robot; drive it with your own program, or with: relod robot {told}", file=sys.stderr)

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await serve(
            settings.sim,
            seed,
            spec,
            on_ready=ready,
            stop=stop,
            new_episode=asyncio.Event(),
            link=link,
            control=control,
            mjpeg_port=mjpeg_port,
            wheel_log=wheel_log,
        )

    uvloop.run(run())
    return 0


def run_check(
    *,
    task: str,
    robot: str,
    camera: str | None,
    yes: bool,
    config: Path | None,
    environment: Mapping[str, str],
    assignments: tuple[str, ...],
    confirm: Callable[[str], bool],
) -> tuple[dict[str, Any], int]:
    """Commission the robot at `robot`; returns the JSON document and the exit code."""
    import tempfile

    from rich.console import Console

    from .check import CameraPlan
    from .check import run_check as commission
    from .trial import TrialPlan

    entry, settings = _task_settings(task, "nominal", config, environment, assignments)
    height, width = entry.build(settings.task).spec.camera_hw
    with tempfile.TemporaryDirectory(prefix="relod-check-") as folder:
        plan = TrialPlan(
            driver=entry.driver,
            address=robot,
            settings=settings.robot,
            safety=settings.safety,
            robot=registry.load_attribute(entry.commissioning, f"the commissioning of {task!r}")(),
            log_path=Path(folder) / "device.log",
        )
        seen = (
            CameraPlan(source=camera, settings=settings.camera, height=height, width=width)
            if camera is not None
            else None
        )
        result = commission(plan, seen, console=Console(stderr=True), confirm=(lambda text: True) if yes else confirm)
    return result.to_dict(), result.exit_code
