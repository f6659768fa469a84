"""Any Gymnasium environment with a continuous action and a vector for an observation, as a task: `gym:NAME`.

The environment does not wait. It makes a step per cycle, in real time at a set rate, with the newest action it has.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated

import numpy as np
from msgspec import Meta

from ...config import Section
from ...errors import SafetyStop
from ...runtime.clock import NS_PER_MS, NS_PER_S
from ...types import Command, FloatArray, Image, Limits, Outcome, RawSettings, Reset, SensorWindow, TaskSpec
from ..registry import TaskEntry
from .simulation import Shape

__all__ = ["GymSettings", "GymTask", "entry"]

RESET_LIMIT_S = 5.0
EPISODE_STEPS = 1000  # of an environment without a limit of its own
SEEDS = 2**31


class GymSettings(Section, frozen=True):
    """A Gymnasium environment."""

    cycle_ms: Annotated[float, Meta(ge=1, le=1000, description="a step of the environment")] = 40.0
    images: Annotated[bool, Meta(description="its pictures, beside the vector")] = False
    frames: Annotated[int, Meta(ge=1, le=16, description="newest pictures in an observation, if there are any")] = 3
    image_height: Annotated[int, Meta(ge=16, le=1080, description="of a picture, in pixels")] = 48
    image_width: Annotated[int, Meta(ge=16, le=1920, description="of a picture, in pixels")] = 64


# The usual settings of SAC for vectors: an update of 256 transitions after every step, from the hundredth on.
AGENT: RawSettings = {
    "batch_size": 256,
    "n_step": 1,
    "gamma": 0.99,
    "init_steps": 100,
    "update_after": 100,
    "init_hold": 1,
    "noise_cycles": 0.0,
    "max_updates_per_step": 1.0,
    "entropy_per_action": -1.0,
    "backup_entropy": True,
    "critic_tau": 0.005,
}


class GymTask:
    """The task; see `relod.types.Task`."""

    action_history = 1

    def __init__(self, name: str, settings: GymSettings) -> None:
        self._shape = shape = Shape(name)
        count = shape.actions
        self.limits = Limits(low=(*(-1.0,) * count, 0.0), high=(1.0,) * (count + 1))
        self.reset_limits = self.limits
        size = (settings.image_height, settings.image_width) if settings.images else (1, 1)
        self.spec = TaskSpec(
            name=f"gym:{name}",
            robot="gym",
            cycle_ns=round(settings.cycle_ms * NS_PER_MS),
            frames=settings.frames if settings.images else 1,
            camera_hw=size,
            camera_fps=1000 / settings.cycle_ms,
            image_hw=size,
            proprio_names=shape.observation_names,
            action_names=shape.action_names,
            max_steps=shape.max_steps or EPISODE_STEPS,
            sensor_window=1,
        )

    def proprioception(self, window: SensorWindow, previous_actions: FloatArray) -> FloatArray:
        """The environment's observation."""
        return window.values[-1, : self._shape.observations].astype(np.float32)

    def judge(self, window: SensorWindow, image: Image, index: int) -> Outcome:
        """What the environment says of its newest step."""
        if window.newest("terminated"):
            return Outcome(reward=window.newest("reward"), terminated=True, reason="terminated")
        over = bool(window.newest("truncated")) or index + 1 >= self.spec.max_steps
        return Outcome(reward=window.newest("reward"), truncated=over, reason="time limit" if over else "")

    def command(self, action: FloatArray, window: SensorWindow) -> Command:
        """The action, and the wish to go on; one that is no number makes it stand."""
        if not np.isfinite(action).all():
            return self.stop()
        return Command(values=(*np.clip(action.astype(np.float64), -1.0, 1.0).tolist(), 1.0))

    def stop(self) -> Command:
        """The environment stands."""
        return Command(values=(0.0,) * (self._shape.actions + 1))

    def reset(self, rng: np.random.Generator) -> Reset:
        """Begin an episode with a seed of the run's own; `SafetyStop` when none begins."""
        seed = 1 + int(rng.integers(SEEDS))
        now_ns, window = yield Command(values=self.stop().values, request=seed)
        give_up_ns = now_ns + round(RESET_LIMIT_S * NS_PER_S)
        while window.newest("seed") != seed or window.newest("steps"):
            if now_ns > give_up_ns:
                raise SafetyStop(f"no episode has begun for {RESET_LIMIT_S:g} s", "does another program drive it?")
            now_ns, window = yield self.stop()

    def status(self, window: SensorWindow) -> Mapping[str, float | str]:
        """Steps in the episode."""
        return {"steps": window.newest("steps")}


def make_task(name: str, settings: GymSettings) -> GymTask:
    """Builds the task, in any process."""
    return GymTask(name, settings)


def entry(name: str) -> TaskEntry:
    """The task of the environment called so. `SettingsError`: there is none that could be learned."""
    shape = Shape(name)
    made, mark = "relod.robots.gymtask.made", name.encode().hex()
    return TaskEntry(
        robot="gym",
        settings={
            "task": "relod.robots.gymtask.task:GymSettings",
            "robot": "relod.robots.gymtask.driver:GymRobotSettings",
            "sim": "relod.robots.gymtask.world:SimSettings",
        },
        build=functools.partial(make_task, name),
        driver=f"{made}:driver_{mark}",
        commissioning=f"{made}:commissioning_{mark}",
        emulator=f"{made}:emulator_{mark}",
        world=f"{made}:world_{mark}",
        worlds="relod.robots.gymtask.world:WORLDS",
        sensor_names=shape.sensor_names,
        command_names=shape.command_names,
        presets={"sac": {"agent": AGENT}, "sac-lite": {"agent": AGENT}},
    )
