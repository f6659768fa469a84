"""A Gymnasium environment that makes a step per tick while it is driven, and stands otherwise. No clock, no wire.

What it says of itself at every tick, its *packet*: the observation, the newest reward, whether the episode terminated
or was truncated, the wish to go on that it followed (0 when it stood), the seed of the episode, and the steps in it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ...errors import SettingsError
from ...types import NO_REQUEST, Image
from ..vision import cv2

__all__ = ["OUTCOME", "Shape", "Simulation", "make_environment"]

OUTCOME = ("reward", "terminated", "truncated", "go", "seed", "steps")
BLANK = np.zeros((1, 1, 3), np.uint8)


def make_environment(name: str, **options: Any) -> Any:
    """The environment; `SettingsError` when there is none, or none with a continuous action and a plain observation."""
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        raise SettingsError(f"task gym:{name} needs Gymnasium", "pip install relod[gym]") from error
    try:
        env = gymnasium.make(name, **options)
    except gymnasium.error.Error as error:
        raise SettingsError(f"task gym:{name}: {error}", "`python -m gymnasium` may list what there is") from error
    except ImportError as error:
        raise SettingsError(f"task gym:{name} needs more than Gymnasium: {error}", "install what it names") from error
    box = gymnasium.spaces.Box
    action, observation = env.action_space, env.observation_space
    if not (isinstance(action, box) and action.is_bounded() and np.issubdtype(action.dtype, np.floating)):
        raise SettingsError(f"task gym:{name} has the actions {action}", "only bounded continuous ones can be learned")
    if not isinstance(observation, box) or len(observation.shape or ()) != 1:
        raise SettingsError(f"task gym:{name} has the observations {observation}", "only vectors can be learned from")
    return env


class Shape:
    """Sizes and names of an environment's packets and commands."""

    def __init__(self, name: str) -> None:
        env = make_environment(name)
        self.observations, self.actions = env.observation_space.shape[0], env.action_space.shape[0]
        self.max_steps: int | None = env.spec.max_episode_steps if env.spec is not None else None
        env.close()

    @property
    def sensor_names(self) -> tuple[str, ...]:
        """Of a packet's columns, and the driver's own."""
        return (*self.observation_names, *OUTCOME, "connection_epoch")

    @property
    def observation_names(self) -> tuple[str, ...]:
        return tuple(f"obs_{index}" for index in range(self.observations))

    @property
    def action_names(self) -> tuple[str, ...]:
        return tuple(f"action_{index}" for index in range(self.actions))

    @property
    def command_names(self) -> tuple[str, ...]:
        """The actions in [-1, 1], and whether to go on; 0 to stand."""
        return (*self.action_names, "go")

    @cached_property
    def packet(self) -> struct.Struct:
        """A packet on the wire."""
        return struct.Struct(f"<{self.observations + len(OUTCOME)}d")

    @cached_property
    def command(self) -> struct.Struct:
        """A command on the wire: its values, then a request; 0 for none."""
        return struct.Struct(f"<{self.actions + 1}dI")


class Simulation:
    """One environment. A request is the seed of an episode that is to begin.

    Args:
        picture_hw: size of the pictures; (1, 1) for none.
    """

    def __init__(self, name: str, *, picture_hw: tuple[int, int] = (1, 1)) -> None:
        self.shape = Shape(name)
        self._picture_hw = picture_hw
        pictures = picture_hw != BLANK.shape[:2]
        self._env = make_environment(name, render_mode="rgb_array") if pictures else make_environment(name)
        space = self._env.action_space
        self._low, self._range = space.low.astype(np.float64), (space.high - space.low).astype(np.float64)
        self._action = np.zeros(self.shape.actions)
        self._go = 0.0
        self._over = True
        self._outcome: list[float] = []
        self._begin(1)

    def command(self, values: Sequence[float], request: int = NO_REQUEST) -> None:
        """What to do from the next tick on; a request begins an episode at once."""
        *action, go = values
        self._action, self._go = np.array(action), go if np.isfinite(values).all() else 0.0
        if request != NO_REQUEST:
            self._begin(request)

    def stand(self) -> None:
        """Go on no more."""
        self._go = 0.0

    def tick(self) -> list[float]:
        """A step, if it is to go on and the episode is not over; the packet."""
        self._outcome[3] = 0.0
        if self._go and not self._over:
            scaled = self._low + (np.clip(self._action, -1.0, 1.0) + 1) / 2 * self._range
            observation, reward, terminated, truncated, _ = self._env.step(scaled.astype(self._env.action_space.dtype))
            self._observation = np.asarray(observation, np.float64)
            self._over = bool(terminated or truncated)
            self._outcome[:4] = float(reward), float(terminated), float(truncated), self._go
            self._outcome[-1] += 1
        return [*self._observation.tolist(), *self._outcome]

    def render(self) -> Image:
        """The picture, BGR; one black pixel where none is wanted."""
        height, width = self._picture_hw
        if (height, width) == BLANK.shape[:2]:
            return BLANK
        small: Image = cv2.resize(self._env.render(), (width, height), interpolation=cv2.INTER_AREA)
        return np.ascontiguousarray(small[..., ::-1])

    def close(self) -> None:
        """Let the environment go."""
        self._env.close()

    def _begin(self, seed: int) -> None:
        observation, _ = self._env.reset(seed=seed)
        self._observation = np.asarray(observation, np.float64)
        self._outcome = [0.0, 0.0, 0.0, 0.0, float(seed), 0.0]
        self._over = False
