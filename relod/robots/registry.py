"""Tasks and algorithms by name. Names lead to "module:attribute" texts, imported only when they are chosen.

Other packages add theirs through the entry point groups `relod.tasks` and `relod.algorithms`; the names built in
here win. A name with a colon is taken as "module:attribute" itself. Names come from the command line and from
settings of this host only, never from the wire.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from ..config import Section
from ..errors import SettingsError
from ..loading import load_attribute
from ..packages import calling, full_name
from ..types import RawSettings, Task
from .checked import check_task

__all__ = ["ALGORITHMS", "TASKS", "TaskEntry", "algorithm", "load_attribute", "names", "target", "task"]

TASKS = {
    "create": "relod.robots.create2.reacher:CREATE_REACHER",
    "track": "relod.robots.track.task:TRACK",
    "ur5": "relod.robots.ur5.visual_reacher:UR5_VISUAL_REACHER",
    "ur5-min-time": "relod.robots.ur5.visual_reacher:UR5_MIN_TIME",
}
ALGORITHMS = {"ppo": "relod.algos.ppo:PPO", "sac": "relod.algos.sac:SAC"}

GYMNASIUM = "gym:"  # before the name of any environment that Gymnasium knows

KINDS = {"task": (TASKS, "relod.tasks"), "algorithm": (ALGORITHMS, "relod.algorithms")}  # kind -> built in, group


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEntry:
    """What a task's name stands for: the task, its robot, and both of the robot's worlds."""

    robot: str  # the robot's name
    settings: Mapping[str, str]  # section (task, robot, sim) -> "module:attribute" of its type
    build: Callable[[Any], Task]  # the `task` section -> the task
    driver: str  # "module:attribute" of the device's driver
    emulator: str  # "module:attribute" of the simulated world in real time, behind the robot's wire protocol
    world: str  # "module:attribute" of the simulated world in virtual time
    commissioning: str  # "module:attribute" of what commissioning knows about the robot
    worlds: str  # "module:attribute" of a mapping: name of a world -> tree of settings that makes it
    sensor_names: tuple[str, ...]
    command_names: tuple[str, ...]
    presets: Mapping[str, RawSettings] = field(default_factory=dict)  # by an agent's preset: what suits the task better
    profiles: Mapping[str, RawSettings] = field(default_factory=dict)  # the task's own, by name

    def sections(self) -> dict[str, type[Section]]:
        """The settings' types by section, as `config.load` wants them."""
        found = {
            section: load_attribute(target, f"the {section} settings") for section, target in self.settings.items()
        }
        for section, kind in found.items():
            if not (isinstance(kind, type) and issubclass(kind, Section)):
                raise SettingsError(f"{self.settings[section]!r} is not a section of settings but {kind!r}")
        if missing := sorted({"task", "robot", "sim"} - found.keys()):
            raise SettingsError(f"the task's settings lack the section {missing[0]!r}", "name a type for each section")
        return found

    def make_task(self, settings: Any) -> Task:
        """The task with its section's settings, checked; `SettingsError` says what it lacks."""
        with calling(full_name(self.build), SettingsError):
            made = self.build(settings)
        return check_task(made, self.command_names)


def task(name: str) -> TaskEntry:
    """The task called `name`; `SettingsError` when there is none or it cannot be imported."""
    if name.startswith(GYMNASIUM):
        make = load_attribute("relod.robots.gymtask.task:entry", f"task {name!r}")
        made: TaskEntry = make(name.removeprefix(GYMNASIUM))
        return made
    entry = load_attribute(target("task", name), f"task {name!r}")
    if not isinstance(entry, TaskEntry):
        raise SettingsError(f"task {name!r} is {entry!r}", "a task is registered as a relod.robots.registry.TaskEntry")
    return entry


def algorithm(name: str) -> Any:
    """The algorithm called `name`, checked; `SettingsError` as for `task`."""
    path = target("algorithm", name)
    find = load_attribute("relod.algos.checked:find_algorithm", "algorithms")  # here, for a robot may have no torch
    return find(path, f"algorithm {name!r}")


def names(kind: str) -> dict[str, str]:
    """All known names of a kind (`task` or `algorithm`) and where they lead, for lists and help."""
    built_in, group = KINDS[kind]
    return {**{point.name: point.value for point in entry_points(group=group)}, **built_in}


def target(kind: str, name: str) -> str:
    """The "module:attribute" a name stands for, nothing imported; `SettingsError` with the names there are."""
    built_in, _ = KINDS[kind]
    if name in built_in:  # before the entry points, whose lookup reads the metadata of every installed package
        return built_in[name]
    if ":" in name:
        return name
    known = names(kind)
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    listed = f"known: {', '.join(sorted(known))}"
    raise SettingsError(f"unknown {kind} {name!r}", f"did you mean {close[0]}? {listed}" if close else listed)
