"""The contracts: what travels between the rooms of the house, and what each room must offer.

Images are `(H, W, 3) uint8` in OpenCV's BGR order. Stamps are int nanoseconds of the robot host's monotonic clock.
Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "Action",
    "Actor",
    "Command",
    "Driver",
    "EpisodeEnd",
    "Frame",
    "Image",
    "Limits",
    "Observation",
    "Outcome",
    "Reset",
    "SensorWindow",
    "Step",
    "Task",
    "TaskSpec",
    "Witness",
]

Image: TypeAlias = npt.NDArray[np.uint8]
FloatArray: TypeAlias = npt.NDArray[np.float32]

NO_REQUEST = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One camera image."""

    id: int  # counts the camera's frames from 1, without gaps in what a reader may ask for
    captured_ns: int  # middle of the exposure, as well as the source can tell
    arrived_ns: int  # when this host had it
    image: Image  # (H, W, 3) uint8, BGR


@dataclass(frozen=True, slots=True, kw_only=True)
class SensorWindow:
    """The newest sensor packets of a robot, oldest first."""

    names: tuple[str, ...]
    seq: npt.NDArray[np.int64]  # (M,)
    arrived_ns: npt.NDArray[np.int64]  # (M,)
    values: npt.NDArray[np.float64]  # (M, len(names))

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """Values of one sensor over the window, `(M,)`."""
        return self.values[:, self.names.index(name)]

    def newest(self, name: str) -> float:
        """The newest value of one sensor."""
        return float(self.values[-1, self.names.index(name)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What the robot is to do until the next command; units are the robot's own (`command_names`)."""

    values: tuple[float, ...]
    request: int = NO_REQUEST  # a one-off demand beside the motion, by the robot's own enum (mode, dock)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What an actor sees at one deadline."""

    frame_ids: tuple[int, ...]  # (k,) oldest first
    images: tuple[Image, ...]  # (k,) of (H, W, 3) uint8 at the agent's size, oldest first
    proprio: FloatArray  # (P,) float32
    now_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """An actor's answer."""

    values: FloatArray  # (A,) float32 in [-1, 1]
    policy_version: tuple[int, int] = (0, 0)  # (learner epoch, update count); (0, 0) before any policy
    extras: FloatArray = field(default_factory=lambda: np.zeros(0, np.float32))  # (E,) for the algorithm


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the task makes of the newest sensors and camera image."""

    reward: float
    terminated: bool = False
    truncated: bool = False
    success: bool = False  # the goal was reached
    reason: str = ""  # why the episode ended, in words for people; empty while it goes on


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One transition's first half and its outcome; the next observation is the next step's, or the `EpisodeEnd`'s."""

    episode: int
    index: int  # 0 for the first step of an episode
    frame_ids: tuple[int, ...]
    proprio: FloatArray  # (P,) float32
    action: FloatArray  # (A,) float32 in [-1, 1]
    reward: float
    terminated: bool
    truncated: bool
    extras: FloatArray  # (E,) float32
    policy_version: tuple[int, int]
    observed_ns: int  # deadline at which the observation was taken
    acted_ns: int  # when the command left the cycle


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeEnd:
    """The true last observation of an episode, so that no step ever borrows one from the next episode."""

    episode: int
    length: int
    frame_ids: tuple[int, ...]
    proprio: FloatArray
    return_: float
    terminated: bool
    success: bool
    reason: str
    observed_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """Everything about a task that another host or an algorithm must know; names carry units."""

    name: str
    robot: str
    cycle_ns: int
    frames: int  # k, camera frames in an observation
    camera_hw: tuple[int, int]  # camera's full resolution
    camera_fps: float
    image_hw: tuple[int, int]  # what the agent sees
    proprio_names: tuple[str, ...]
    action_names: tuple[str, ...]
    max_steps: int  # time limit of an episode
    sensor_window: int  # M, packets in a window

    @property
    def proprio_dim(self) -> int:
        return len(self.proprio_names)

    @property
    def action_dim(self) -> int:
        return len(self.action_names)


# A reset is a generator: it yields commands, one per cycle, and is sent (now_ns, newest window) until it returns.
Reset: TypeAlias = Generator[Command, tuple[int, SensorWindow], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a command's values may be, each `(n,)`, in the command's own units."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    max_slew: tuple[float, ...] | None = None  # largest change per cycle; None = any


class Task(Protocol):
    """A task: pure functions of sensor windows and camera images, plus a reset."""

    spec: TaskSpec
    action_history: int  # previous actions in the observation
    limits: Limits  # of every command in an episode
    reset_limits: Limits  # of every command in a reset

    def proprioception(self, window: SensorWindow, previous_actions: FloatArray) -> FloatArray:
        """Vector part of the observation, `(P,) float32`; `previous_actions` is `(n, A)`, oldest first."""
        ...

    def judge(self, window: SensorWindow, image: Image, index: int) -> Outcome:
        """Outcome of step `index`, seen in the newest packets and the newest full-size image."""
        ...

    def command(self, action: FloatArray, window: SensorWindow) -> Command:
        """The robot's command for an action in [-1, 1], by where the robot is.

        Asked in every cycle of an episode, also for an action that stays because its successor is late.
        """
        ...

    def stop(self) -> Command:
        """The command that makes the robot stand."""
        ...

    def reset(self, rng: np.random.Generator) -> Reset:
        """The way from any state to the start of an episode."""
        ...

    def status(self, window: SensorWindow) -> Mapping[str, float | str]:
        """What the live view shows of the robot, for example the battery."""
        ...


class Actor(Protocol):
    """Answers observations. Exploration noise comes from the generator it was built with."""

    def act(self, observation: Observation) -> Action | None:
        """The action for `observation`, or None when it will come later (`Cycle.answer`); must not block."""
        ...


class Witness(Protocol):
    """Who hears what a simulated robot says of itself, by its own clock readings; its methods are quick."""

    def sensed(self, true_ns: int, sent_ns: int) -> None:
        """A packet's values were true at `true_ns` and all of it was on the wire at `sent_ns`."""
        ...

    def obeyed(self, came_ns: int, moved_ns: int) -> None:
        """A command of motion came at `came_ns`, and from `moved_ns` on, which may lie ahead, the actuators follow."""
        ...


class Driver(Protocol):
    """A robot's device: owns the port, runs on the device process's event loop, never blocks it for long."""

    sensor_names: tuple[str, ...]
    command_names: tuple[str, ...]

    async def open(self) -> None:
        """Open the device until sensor packets flow; `StartError` when it is missing, busy or silent."""
        ...

    async def run(self) -> None:
        """Serve the device until it is lost (raises `SafetyStop`) or this task is cancelled."""
        ...

    def command(self, values: tuple[float, ...]) -> None:
        """Execute a motion command; bounded in time, raises `OSError` when the wire is gone."""
        ...

    def request(self, request: int) -> None:
        """Execute a one-off request (mode change, docking)."""
        ...

    def stop(self) -> None:
        """Make the robot stand; safe to call at any time and more than once."""
        ...

    async def close(self) -> None:
        """Leave the device as it should be found: standing, streams off, port free."""
        ...


RawSettings: TypeAlias = dict[str, Any]
