"""What the user asked for, resolved: every name looked up, settings loaded, hardware or simulation decided."""

from __future__ import annotations

import difflib
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from .. import __version__
from ..config import Section, Settings, flatten, load, to_dict
from ..errors import SettingsError, StartError
from ..robots import registry
from ..robots.registry import TaskEntry
from ..types import RawSettings
from .plan import Plan, Remote, Resume
from .remote.access import find_token
from .remote.linkprofile import profile_named
from .remote.wire import Challenge, Name
from .rundir import read_run
from .scheduling import check_permitted

__all__ = [
    "Place",
    "Request",
    "choose_preset",
    "hardware",
    "make_plan",
    "one_of",
    "resumed_settings",
    "task_settings",
    "world_settings",
]

CLOCKS = ("wall", "virtual")


class SettingSources(Protocol):
    """Where a user's settings come from, the last one winning."""

    @property
    def environment(self) -> Mapping[str, str]: ...

    @property
    def assignments(self) -> tuple[str, ...]: ...

    @property
    def overrides(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked of `relod robot`, unresolved; None where nothing was said."""

    task: str | None = None
    mode: str | None = None
    algorithm: str | None = None
    preset: str | None = None
    profile: str | None = None
    robot: str | None = None
    camera: str | None = None
    allow_mixed: bool = False
    world: str | None = None
    clock: str | None = None
    resume: Path | None = None
    learner: str | None = None
    name: str | None = None
    token_file: Path | None = None
    ca: Path | None = None
    link: str | None = None
    config: Path | None = None
    environment: Mapping[str, str]
    assignments: tuple[str, ...] = ()
    overrides: Mapping[str, Any]
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a mode's two parts are."""

    acts_here: bool
    learns_here: bool


DEFAULTS = {"task": "create", "mode": "local-only", "algorithm": "sac", "world": "nominal", "clock": "wall"}

# Settings that a resumed run may change: what they say holds for one session, not for what was learned from.
MAY_CHANGE = (
    *("run.steps", "run.minutes", "run.metrics_every_s", "run.tensorboard", "run.realtime"),
    *("learner.", "safety.", "camera."),
)


def make_plan(request: Request, places: Mapping[str, Place], learner: Challenge | None = None) -> Plan:
    """Look up every name and load the settings; `SettingsError` for whatever does not fit together.

    Args:
        places: the modes there are.
        learner: what the learner elsewhere says of itself; images are of the size that suits it and the task.
    """
    before = _before(request) if request.resume is not None else None
    names = {name: _chosen(request, name, before) for name in (*DEFAULTS, "preset")}
    place = places[one_of(names["mode"], tuple(places), "mode")]
    one_of(names["clock"], CLOCKS, "clock")
    robot, camera = hardware(request, names["clock"], before)
    entry = registry.task(names["task"])
    remote = _remote(request, names, place, entry)
    if not place.learns_here:
        names["algorithm"] = request.algorithm if place.acts_here else None  # none: what the learner teaches
    algorithm = registry.algorithm(names["algorithm"]) if place.learns_here else None
    preset, reason = names["preset"] or "", "the learner's"
    trees = [world_settings(entry, names["world"])]
    sections = dict(entry.sections())
    if algorithm is not None:
        preset, reason = choose_preset(names["preset"], algorithm.presets)
        sections["agent"] = algorithm.settings_type
        trees += [algorithm.presets[preset], entry.presets.get(preset, {})]
    if request.profile is not None:
        profiles = {**entry.profiles, **(algorithm.profiles if algorithm is not None else {})}
        trees.append(profiles[one_of(request.profile, tuple(profiles), "profile")])
    if learner is not None:
        trees += _image_sizes(learner, entry, sections["task"])
    if before is None:
        settings = _load(request, sections, presets=trees, file=request.config)
    else:
        settings = resumed_settings(request, sections, before.folder, MAY_CHANGE)
        reason = before.run["preset_reason"]
        if settings.run.record:
            raise SettingsError(
                f"{before.folder} is a recorded run: it cannot go on, for a recording has no gaps", "make a new run"
            )
    _check_recording(settings, names["clock"], place)
    _check_realtime(settings, names["clock"])
    return Plan(
        task_name=names["task"],
        entry=entry,
        task=entry.make_task(settings.task),
        mode=names["mode"],
        algorithm_name=names["algorithm"] or "",
        algorithm_target=registry.target("algorithm", names["algorithm"]) if names["algorithm"] else "",
        algorithm=algorithm,
        preset=preset,
        preset_reason=reason,
        settings=settings,
        robot=robot,
        camera=camera,
        world=names["world"],
        clock=names["clock"],
        resume=before.resume if before is not None else None,
        remote=remote,
    )


def _remote(request: Request, names: Mapping[str, Any], place: Place, entry: TaskEntry) -> Remote | None:
    """The learner elsewhere, of a mode that has one."""
    mode = names["mode"]
    if place.learns_here:
        for option in ("learner", "link", "token_file", "ca"):
            if getattr(request, option) is not None:
                raise SettingsError(
                    f"--{option.replace('_', '-')} with --mode {mode}, which learns on this host",
                    "use --mode remote-local or --mode remote-only",
                )
        return None
    if request.learner is None:
        raise SettingsError(f"--mode {mode} without --learner", "name it, for example --learner ws://192.168.1.5:8765")
    if request.resume is not None:
        raise SettingsError(
            f"--resume with --mode {mode}: the learner's run is the one that goes on",
            "resume it with `relod learner --resume RUN`, and start the robot anew",
        )
    if names["clock"] == "virtual":
        raise SettingsError(f"--clock virtual with --mode {mode}: a link has no virtual time", "use --clock wall")
    agents = {"preset": request.preset, "profile": request.profile if request.profile not in entry.profiles else None}
    for option, value in agents.items():
        if value is not None:
            raise SettingsError(
                f"--{option} {value} with --mode {mode}: the agent's settings are the learner's", "give it there"
            )
    if request.link is not None:
        profile_named(request.link)
    name = request.name or re.sub(r"[^A-Za-z0-9._-]+", "-", socket.gethostname()).strip("-.")[:64] or "robot"
    try:
        msgspec.convert(name, Name)
    except msgspec.ValidationError as error:
        hint = "letters, digits and . _ -, 64 at most, a letter or digit first"
        raise SettingsError(f"--name {name!r}", hint) from error
    if not re.match(r"^wss?://[^/]", request.learner):
        raise SettingsError(
            f"--learner {request.learner!r} is no address", "write it as ws://HOST:8765 or wss://HOST:8765"
        )
    if request.ca is not None and not request.learner.startswith("wss:"):
        raise SettingsError(f"--ca {request.ca} with {request.learner}", "certificates belong to wss://")
    return Remote(
        url=request.learner,
        name=name,
        token=find_token(request.token_file, request.environment),
        ca=request.ca,
        link=request.link,
    )


def _image_sizes(learner: Challenge, entry: TaskEntry, task_type: type[Section]) -> Iterator[RawSettings]:
    """Settings of the task for the images that a learner's networks are made for, the best last."""
    if learner.image_hw is not None:
        sizes = dict(zip(("image_height", "image_width"), learner.image_hw, strict=True))
        yield {"task": {name: size for name, size in sizes.items() if name in task_type.__struct_fields__}}
    yield {"task": entry.presets.get(learner.preset, {}).get("task", {})}


def _check_recording(settings: Settings, clock: str, place: Place) -> None:
    if settings.run.record and clock == "virtual":
        raise SettingsError(
            "a run in virtual time is not recorded: its seed repeats it", "leave out --record, or use --clock wall"
        )
    if settings.run.record and not place.learns_here:
        raise SettingsError("--record needs the learner on this host", "use --mode local-only; the learner keeps a log")


def _check_realtime(settings: Settings, clock: str) -> None:
    if not settings.run.realtime:
        return
    if clock == "virtual":
        raise SettingsError(
            "--realtime with --clock virtual, which has no deadlines", "leave it out, or use --clock wall"
        )
    check_permitted()


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


def resumed_settings(
    request: SettingSources, sections: Mapping[str, type[Section]], folder: Path, may_change: Sequence[str]
) -> Settings:
    """The settings of a run that goes on: its own, with what one session may change; `SettingsError` for more."""
    file = folder / "settings.toml"
    own = load(sections, file=file)
    settings = load(
        sections,
        file=file,
        environment=request.environment,
        assignments=request.assignments,
        overrides=request.overrides,
    )
    old, new = (dict(flatten(to_dict(found))) for found in (own, settings))
    for name, value in new.items():
        if value != old[name] and not name.startswith(tuple(may_change)):
            raise SettingsError(
                f"{name} = {value!r} differs from the run's {old[name]!r}",
                f"a resumed run may change only {', '.join(part.rstrip('.') for part in may_change)}",
            )
    return settings


def hardware(request: Request, clock: str, before: _Before | None) -> tuple[str | None, str | None]:
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


def choose_preset(wanted: str | None, presets: Mapping[str, Any]) -> tuple[str, str]:
    """The preset and why: what was asked for, else what the machine can do."""
    if wanted is not None:
        return one_of(wanted, tuple(presets), "preset"), "asked for"
    import torch

    gpu, cpu = next(iter(presets)), f"{next(iter(presets))}-lite"
    if torch.cuda.is_available():
        return gpu, f"this machine has {torch.cuda.get_device_name(0)}"
    return (cpu if cpu in presets else gpu), "this machine has no CUDA device"


def world_settings(entry: TaskEntry, name: str) -> Mapping[str, Any]:
    """The tree of settings of a simulated world."""
    worlds = registry.load_attribute(entry.worlds, "the simulated worlds")
    return worlds[one_of(name, tuple(worlds), "world")]  # type: ignore[no-any-return]


def one_of(name: str, known: tuple[str, ...], kind: str) -> str:
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    listed = f"known: {', '.join(known)}"
    raise SettingsError(f"unknown {kind} {name!r}", f"did you mean {close[0]}? {listed}" if close else listed)


def task_settings(
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
