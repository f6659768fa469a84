"""What a learner learns from, and when it may: minibatches of a replay while robots act, or whole rollouts between."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np

from ..algos.agent import Minibatches, Needs, Rollouts
from ..algos.batch import Window
from ..config import LearnerSettings
from .clock import NS_PER_MS, NS_PER_S
from .replaytable import ReplayTable
from .rollout import RolloutReader, Version
from .sampler import ReplaySampler

__all__ = ["MinibatchSource", "RolloutSource", "Source", "UpdateSchedule", "open_source"]

BURST_S = 0.1  # of the rate limit: longer than an action cycle or an update, so that neither lowers the rate


class Memory(Protocol):
    """Reads the replay's memory."""

    env_steps: int  # of the run, as its news say

    def __len__(self) -> int: ...

    def apply(self, data: bytes) -> None: ...


class Source(Protocol):
    """Gives updates what they learn from."""

    between_episodes: bool  # every update makes a policy, which is taken between episodes only
    rate_ns: int  # state of a rate limit

    @property
    def memory(self) -> Memory:
        """Where it comes from; it is told the news."""
        ...

    def due(self, updates: int, version: Version, now_ns: int) -> int:
        """How many updates may be done now, after so many, with this policy out."""
        ...

    def idle_ms(self, updates: int, now_ns: int, longest_ms: int) -> int:
        """How long nothing will be due without news."""
        ...

    def draw(self, version: Version, rng: np.random.Generator) -> Any:
        """What the next update is given."""
        ...

    def spend(self, now_ns: int) -> None:
        """An update was done."""
        ...

    def go_on(self, epoch: int) -> None:
        """The run goes on, and its newest policy under another epoch than this one, which acted before."""
        ...


class UpdateSchedule:
    """How many updates may be done now. Pure: time is handed in, and all state is the integer `rate_ns`.

    Per step, `updates <= per_step * (env_steps - update_after)`, where `per_step` is `max_updates_per_step` or one per
    `update_every_steps`, whichever is less. Per second, a token bucket that holds one token and what comes in
    `BURST_S`; `rate_ns` is when it was empty. 0 switches off either of the last two limits.
    """

    def __init__(
        self,
        max_updates_per_step: float,
        update_after: int,
        *,
        update_every_steps: float = 0.0,
        max_updates_per_s: float = 0.0,
    ) -> None:
        self.rate_ns = 0
        self._per_step = max_updates_per_step
        if update_every_steps > 0:
            self._per_step = min(max_updates_per_step, 1 / update_every_steps)
        self._update_after = update_after
        self._token_ns = max(1, round(NS_PER_S / max_updates_per_s)) if max_updates_per_s > 0 else 0
        self._full_ns = self._token_ns + int(BURST_S * NS_PER_S)  # what fills the bucket

    def due(self, env_steps: int, updates: int, now_ns: int) -> int:
        """How many updates may be done now."""
        due = self._earned(env_steps, updates)
        return min(due, (now_ns - self._empty_ns(now_ns)) // self._token_ns) if self._token_ns else due

    def spend(self, now_ns: int) -> None:
        """An update was done."""
        if self._token_ns:
            self.rate_ns = self._empty_ns(now_ns) + self._token_ns

    def held_ns(self, env_steps: int, updates: int, now_ns: int) -> int | None:
        """How long the rate limit holds back the next update; None when steps are what is missing."""
        if not self._token_ns or not self._earned(env_steps, updates):
            return None
        return max(0, self.rate_ns + self._token_ns - now_ns)

    def _earned(self, env_steps: int, updates: int) -> int:
        earned = self._per_step * max(0, env_steps - self._update_after)
        return max(0, int(earned + 1e-9) - updates)

    def _empty_ns(self, now_ns: int) -> int:
        return max(self.rate_ns, now_ns - self._full_ns)


class MinibatchSource:
    """Minibatches, as the schedule allows."""

    between_episodes = False

    def __init__(
        self, memory: ReplaySampler, needs: Minibatches, window: Window, settings: LearnerSettings | None = None
    ) -> None:
        self.memory = memory
        self._needs, self._window = needs, window
        self._schedule = UpdateSchedule(
            needs.max_updates_per_step,
            needs.update_after,
            update_every_steps=settings.update_every_steps if settings is not None else 0.0,
            max_updates_per_s=settings.max_updates_per_s if settings is not None else 0.0,
        )

    @property
    def rate_ns(self) -> int:
        return self._schedule.rate_ns

    @rate_ns.setter
    def rate_ns(self, value: int) -> None:
        self._schedule.rate_ns = value

    def due(self, updates: int, version: Version, now_ns: int) -> int:
        """None while the replay is empty."""
        return self._schedule.due(self.memory.env_steps, updates, now_ns) if len(self.memory) else 0

    def idle_ms(self, updates: int, now_ns: int, longest_ms: int) -> int:
        """Until the rate limit allows an update, or for ever: until there are more steps."""
        if not len(self.memory):
            return longest_ms
        held_ns = self._schedule.held_ns(self.memory.env_steps, updates, now_ns)
        return longest_ms if held_ns is None else min(longest_ms, math.ceil(held_ns / NS_PER_MS))

    def draw(self, version: Version, rng: np.random.Generator) -> Any:
        """A `Batch`."""
        needs = self._needs
        return self.memory.sample(needs.size, n_step=needs.n_step, gamma=needs.gamma, window=self._window, rng=rng)

    def spend(self, now_ns: int) -> None:
        self._schedule.spend(now_ns)

    def go_on(self, epoch: int) -> None:
        """Any policy's steps will do."""


class RolloutSource:
    """Rollouts of the newest policy, when they are full."""

    between_episodes = True
    rate_ns = 0

    def __init__(self, memory: RolloutReader, needs: Rollouts) -> None:
        self.memory = memory
        self._needs = needs

    def due(self, updates: int, version: Version, now_ns: int) -> int:
        """One, when whole episodes by this policy have enough steps."""
        return int(self.memory.ready(version) >= self._needs.steps)

    def idle_ms(self, updates: int, now_ns: int, longest_ms: int) -> int:
        """For ever: until there are more steps."""
        return longest_ms

    def draw(self, version: Version, rng: np.random.Generator) -> Any:
        """A `Rollout`."""
        return self.memory.take(version)

    def spend(self, now_ns: int) -> None:
        """No limit but that of robots that stand."""

    def go_on(self, epoch: int) -> None:
        self.memory.go_on(epoch)


def open_source(
    table: ReplayTable, needs: Needs, settings: LearnerSettings, *, threads: int = 1, staged: bool = False
) -> Source:
    """Of what the algorithm needs; `threads` and `staged` as `ReplaySampler` has them."""
    if isinstance(needs.memory, Rollouts):
        return RolloutSource(RolloutReader(table, needs.memory.earlier_steps), needs.memory)
    return MinibatchSource(ReplaySampler(table, threads=threads, staged=staged), needs.memory, needs.window, settings)
