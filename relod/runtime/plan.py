"""A run as it was resolved: names looked up, settings loaded, hardware or simulation decided. Plain values only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ..config import RunSettings, Settings
from ..robots.registry import TaskEntry
from ..types import Task, TaskSpec
from .clock import NS_PER_S

__all__ = ["LearnerPlan", "Plan", "Remote", "Resume", "Start", "steps_limit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """A run that goes on in its own folder."""

    folder: Path
    session: int  # 1 for the first time


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a session of a run begins; the defaults are a new run's."""

    step: int = 0  # environment steps done
    episode: int = 0  # number of the next episode
    frame_id: int = 0  # of the newest camera frame so far
    session: int = 0

    def stream(self, name: str) -> str:
        """Name of a random stream of this session: on the wall clock the past of the old one is not known."""
        return f"{name}.{self.session}" if self.session else name


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """A learner on another host, and how this one presents itself."""

    url: str  # ws:// or wss://
    name: str  # of this robot, among those of the learner
    token: bytes | None = field(default=None, repr=False)
    ca: Path | None = None  # whose certificates are trusted, for wss
    link: str | None = None  # a profile of an emulated link in between


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerPlan:
    """What a learner knows of a run: sizes and settings, no robot and no code of the task."""

    task_name: str
    spec: TaskSpec
    algorithm_name: str
    algorithm_target: str  # "module:attribute"
    algorithm: Any  # algos.agent.Algorithm
    preset: str
    preset_reason: str
    settings: Settings
    resume: Resume | None = None
    robots: int = 1  # at the same time

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint must agree in to belong to this run."""
        return {
            "task": self.task_name,
            "algorithm": self.algorithm_name,
            "preset": self.preset,
            "seed": str(self.settings.run.seed),
            **{f"agent.{name}": repr(value) for name, value in msgspec.to_builtins(self.settings.agent).items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that is decided before anything starts."""

    task_name: str
    entry: TaskEntry
    task: Task
    mode: str
    algorithm_name: str
    algorithm_target: str  # "module:attribute"
    algorithm: Any  # algos.agent.Algorithm; not named here, so that a robot without torch can have a plan
    preset: str
    preset_reason: str
    settings: Settings
    robot: str | None  # None: simulated
    camera: str | None  # None: simulated
    world: str
    clock: str
    resume: Resume | None = None
    remote: Remote | None = None

    @property
    def simulated(self) -> bool:
        """Whether no hardware moves."""
        return self.robot is None

    @property
    def device_text(self) -> str:
        """What acts and sees, for banner, JSON and records."""
        if self.robot is None and self.camera is None:
            return "SIMULATED"
        return f"robot {self.robot or 'SIMULATED'}, camera {self.camera or 'SIMULATED'}"

    @property
    def learner(self) -> LearnerPlan:
        """The learner's part, where it is on this host."""
        return LearnerPlan(
            task_name=self.task_name,
            spec=self.task.spec,
            algorithm_name=self.algorithm_name,
            algorithm_target=self.algorithm_target,
            algorithm=self.algorithm,
            preset=self.preset,
            preset_reason=self.preset_reason,
            settings=self.settings,
            resume=self.resume,
        )

    @property
    def task_builder(self) -> Callable[[], Task]:
        """Builds the task again, in another process."""
        return functools.partial(self.entry.make_task, self.settings.task)

    @property
    def cycle_s(self) -> float:
        return self.task.spec.cycle_ns / NS_PER_S

    @property
    def max_steps(self) -> int:
        """Environment steps of the run; 0 for no limit."""
        return steps_limit(self.settings.run, self.task.spec.cycle_ns)


def steps_limit(run: RunSettings, cycle_ns: int) -> int:
    """Environment steps after which a run ends, by its steps or its minutes of experience; 0 for no limit."""
    limits = [run.steps] if run.steps else []
    if run.minutes:
        limits.append(max(1, round(run.minutes * 60 * NS_PER_S / cycle_ns)))
    return min(limits, default=0)
