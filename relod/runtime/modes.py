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

from .. import __version__
from ..config import Section, Settings, describe, flatten, load, to_dict
from ..errors import SettingsError, StartError
from ..robots import registry
from ..robots.registry import TaskEntry
from .plan import Plan, Resume
from .rundir import read_run

__all__ = ["Request", "describe_modes", "describe_settings", "run_check", "run_emulator", "run_robot"]

CLOCKS = ("wall", "virtual")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked of `relod robot`, unresolved; None where nothing was said."""

    task: str | None
    mode: str | None
    algorithm: str | None
    preset: str | None
    profile: str | None
    robot: str | None
    camera: str | None
    allow_mixed: bool
    world: str | None
    clock: str | None
    resume: Path | None
    config: Path | None
    environment: Mapping[str, str]
    assignments: tuple[str, ...]
    overrides: Mapping[str, Any]
    arguments: tuple[str, ...]


DEFAULTS = {"task": "create", "mode": "local-only", "algorithm": "sac", "world": "nominal", "clock": "wall"}

# Settings that a resumed run may change: what they say holds for one session, not for what was learned from.
MAY_CHANGE = ("run.steps", "run.minutes", "run.metrics_every_s", "run.tensorboard", "learner.", "safety.", "camera.")


def run_robot(request: Request) -> Any:
    """Run `relod robot`; returns a `host.Result`."""
    plan = resolve(request)
    return MODES[plan.mode].run(plan, request.arguments)


# -- modes -----------------------------------------------------------------------------------------------------------


def local_only(plan: Plan, arguments: tuple[str, ...]) -> Any:
    """Actor in the control process, replay in this process, updates in a worker on this host."""
    from .experience import check_room
    from .learner import LearnerSide
    from .session import announce, find_checkpoint, new_spans, open_folder, run_wall
    from .virtualsession import run_virtual

    announce(plan)
    check_room(plan)
    checkpoint = find_checkpoint(plan)
    if plan.clock == "virtual":
        return run_virtual(plan, arguments, checkpoint)
    spans = new_spans()
    with open_folder(plan, arguments) as folder, LearnerSide(plan, folder.path, spans) as learner:
        return run_wall(plan, folder, learner, spans, checkpoint)


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
    before = _before(request) if request.resume is not None else None
    names = {name: _chosen(request, name, before) for name in (*DEFAULTS, "preset")}
    _one_of(names["mode"], tuple(MODES), "mode")
    _one_of(names["clock"], CLOCKS, "clock")
    robot, camera = _hardware(request, names["clock"], before)
    entry = registry.task(names["task"])
    algorithm = registry.algorithm(names["algorithm"])
    preset, reason = _preset(names["preset"], algorithm.presets)
    sections = {**entry.sections(), "agent": algorithm.settings_type}
    if before is None:
        trees = [
            world_settings(entry, names["world"]),
            algorithm.presets[preset],
            entry.presets.get(preset, {}),
        ]
        if request.profile is not None:
            trees.append(algorithm.profiles[_one_of(request.profile, tuple(algorithm.profiles), "profile")])
        settings = _load(request, sections, presets=trees, file=request.config)
    else:
        settings, reason = _resumed_settings(request, sections, before.folder), before.run["preset_reason"]
    if names["clock"] == "virtual" and settings.run.record:
        raise SettingsError(
            "a run in virtual time is not recorded: its seed repeats it", "leave out --record, or use --clock wall"
        )
    return Plan(
        task_name=names["task"],
        entry=entry,
        task=entry.build(settings.task),
        mode=names["mode"],
        algorithm_name=names["algorithm"],
        algorithm_target=registry.target("algorithm", names["algorithm"]),
        algorithm=algorithm,
        preset=preset,
        preset_reason=reason,
        settings=settings,
        robot=robot,
        camera=camera,
        world=names["world"],
        clock=names["clock"],
        resume=before.resume if before is not None else None,
    )


def _load(request: Request, sections: Mapping[str, type[Section]], **sources: Any) -> Settings:
    return load(
        sections,
        environment=request.environment,
        assignments=request.assignments,
        overrides=request.overrides,
        **sources,
    )


# -- going on with a run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Before:
    """The run that goes on."""

    run: Mapping[str, Any]  # its run.json
    resume: Resume

    @property
    def folder(self) -> Path:
        return self.resume.folder


def _before(request: Request) -> _Before:
    """The run to resume; `StartError` when it is none, `SettingsError` when it cannot be resumed."""
    assert request.resume is not None
    folder = request.resume.resolve()
    run = read_run(folder)
    if request.config is not None:
        raise SettingsError(f"--config {request.config} with --resume", "a resumed run keeps its settings")
    if request.profile is not None:
        raise SettingsError(f"--profile {request.profile} with --resume", "a resumed run keeps its settings")
    missing = [name for name in (*DEFAULTS, "preset", "preset_reason", "robot", "camera") if name not in run]
    if missing or not (folder / "log").is_dir():
        what = f"its run.json says no {missing[0]}" if missing else "it has no experience log"
        raise StartError(f"{folder} cannot be resumed: {what}", "only runs of this version of relod can")
    if (made := run.get("relod")) != __version__:
        print(f"relod: {folder} was made by relod {made}, and this is {__version__}", file=sys.stderr)
    return _Before(run=run, resume=Resume(folder=folder, session=len(run.get("sessions", [])) + 1))


def _chosen(request: Request, name: str, before: _Before | None) -> Any:
    """A name as asked for, as the resumed run has it, or the default; never two different ones."""
    asked = getattr(request, name)
    if before is None:
        return DEFAULTS.get(name) if asked is None else asked
    if asked is not None and asked != before.run[name]:
        raise SettingsError(
            f"--{name} {asked} differs from the run's {before.run[name]}", "a resumed run keeps it; leave it out"
        )
    return before.run[name]


def _resumed_settings(request: Request, sections: Mapping[str, type[Section]], folder: Path) -> Settings:
    """The run's own settings, with what one session may change."""
    own = load(sections, file=folder / "settings.toml")
    settings = _load(request, sections, file=folder / "settings.toml")
    old, new = (dict(flatten(to_dict(found))) for found in (own, settings))
    for name, value in new.items():
        if value != old[name] and not name.startswith(MAY_CHANGE):
            raise SettingsError(
                f"{name} = {value!r} differs from the run's {old[name]!r}",
                f"a resumed run may change only {', '.join(part.rstrip('.') for part in MAY_CHANGE)}",
            )
    if settings.run.record:
        raise SettingsError(
            f"{folder} is a recorded run: it cannot go on, for a recording has no gaps", "make a new run"
        )
    return settings


def _hardware(request: Request, clock: str, before: _Before | None) -> tuple[str | None, str | None]:
    """Robot and camera as named, None for simulated; never a mixture unless it was asked for."""
    robot = request.robot
    camera = None if request.camera == "sim" else request.camera
    if before is not None and (robot is None, camera is None) != (
        before.run["robot"] is None,
        before.run["camera"] is None,
    ):
        raise SettingsError(
            f"the run's world is: {before.run['device']}; it cannot go on in another",
            "leave out --robot and --camera"
            if before.run["robot"] is None
            else f"hardware is named each time: --robot {before.run['robot']} --camera {before.run['camera'] or 'sim'}",
        )
    if clock == "virtual" and (robot or camera):
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
