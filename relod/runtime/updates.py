"""When updates happen, and what happens around each: the learner's loop, without processes, sockets or files.

The update worker runs it on the wall clock. Under virtual time the driver calls it inline, in the same process, and
the run is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ..algos.agent import Learner, Needs, flatten_policy
from ..errors import SafetyStop
from ..seeds import random_stream
from ..types import FloatArray
from .checkpoint import PUBLISHED_POLICY, Checkpoint, Counters, first_not_finite
from .clock import NS_PER_MS, NS_PER_S, Clock
from .replay import ReplaySampler

__all__ = ["LearnerLoop", "UpdateSchedule"]

BURST_S = 0.1  # of the rate limit: longer than an action cycle or an update, so that neither lowers the rate
MAX_ROLLBACKS = 1  # one NaN may be bad luck; a second one means that the settings diverge

Recover = Callable[[], tuple[Learner, Checkpoint | None]]


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


class LearnerLoop:
    """Updates as the schedule allows, and policies as the clock does. No I/O of its own, no waiting.

    Losses, policies and checkpoints are looked at before they leave, never at each update, which would wait for the
    device. At the first that is not finite the learner goes back to the newest checkpoint; at the second the run ends.

    Args:
        epoch: of the policies' versions, (epoch, update count).
        publish: called with the flat policy and its version.
        publish_every_s: least time between two policies.
        recover: a freshly built learner, and the newest checkpoint if there is one. Without it, the first value that
            is not finite ends the run.
        say: called with what a person should read.

    Every method that looks may raise `SafetyStop`.
    """

    def __init__(
        self,
        learner: Learner,
        sampler: ReplaySampler,
        needs: Needs,
        *,
        epoch: int,
        seed: int,
        publish: Callable[[FloatArray, tuple[int, int]], object],
        publish_every_s: float,
        clock: Clock,
        update_every_steps: float = 0.0,
        max_updates_per_s: float = 0.0,
        recover: Recover | None = None,
        say: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.learner = learner
        self.sampler = sampler
        self.epoch = epoch
        self.updates = 0
        self.published = -1  # update count of the newest published policy
        self.rollbacks = 0
        self.rng = random_stream(seed, "replay.sample")
        self._needs = needs
        self._schedule = UpdateSchedule(
            needs.max_updates_per_step,
            needs.update_after,
            update_every_steps=update_every_steps,
            max_updates_per_s=max_updates_per_s,
        )
        self._publish, self._recover, self._say = publish, recover, say
        self._publish_every_ns = int(publish_every_s * NS_PER_S)
        self._published_ns = 0
        self._published_policy: FloatArray | None = None
        self._clock = clock

    # -- updates -------------------------------------------------------------------------------------------------------

    def due(self) -> int:
        """Updates that may be done now; none while the replay is empty."""
        if not len(self.sampler):
            return 0
        return self._schedule.due(self.sampler.env_steps, self.updates, self._clock.now_ns())

    def idle_ms(self, longest_ms: int) -> int:
        """How long to wait for news when nothing is due: until the rate limit allows an update, else `longest_ms`."""
        if not len(self.sampler):
            return longest_ms
        held_ns = self._schedule.held_ns(self.sampler.env_steps, self.updates, self._clock.now_ns())
        return longest_ms if held_ns is None else min(longest_ms, math.ceil(held_ns / NS_PER_MS))

    def run_updates(self, limit: int | None = None) -> int:
        """Do the updates that are due, at most `limit`, publishing on the way; returns how many were done."""
        count = self.due() if limit is None else min(limit, self.due())
        for _ in range(count):
            self.update()
        return count

    def update(self) -> None:
        """One update, and a policy if it is time for one."""
        needs = self._needs
        batch = self.sampler.sample(
            needs.batch_size, n_step=needs.n_step, gamma=needs.gamma, window=needs.window, rng=self.rng
        )
        self.learner.update(batch)
        self.updates += 1
        now_ns = self._clock.now_ns()
        self._schedule.spend(now_ns)
        if self.published < 0 or now_ns - self._published_ns >= self._publish_every_ns:
            self.publish_policy()

    # -- what leaves ---------------------------------------------------------------------------------------------------

    def publish_policy(self) -> None:
        """Publish the policy as it stands, if it changed since the last time."""
        if self.published == self.updates:
            return
        flat = flatten_policy(self.learner.policy())
        wrong = self._wrong_metric() or (None if np.isfinite(flat).all() else "the policy is not finite")
        if wrong is not None:
            self._go_back(wrong)  # publishes what it went back to
            return
        self._send(flat, self.updates)

    def metrics(self) -> dict[str, float]:
        """Losses and the like of the newest update; empty before the first and after going back."""
        wrong = self._wrong_metric()
        if wrong is not None:
            self._go_back(wrong)
        return dict(self.learner.metrics())

    def checkpoint(self, extra: Mapping[str, Any] | None = None) -> Checkpoint:
        """Everything needed to go on from here; `extra`, whatever JSON can hold, is the caller's own."""
        state = self.learner.state()
        name = first_not_finite(state)
        wrong = self._wrong_metric() or (None if name is None else f"{name} is not finite")
        if wrong is not None:
            self._go_back(wrong)
            state = self.learner.state()
        if self._published_policy is not None:
            state[PUBLISHED_POLICY] = torch.from_numpy(self._published_policy)
        counters = Counters(
            updates=self.updates,
            env_steps=self.sampler.env_steps,
            epoch=self.epoch,
            published=self.published,
            published_ns=self._published_ns,
            rate_ns=self._schedule.rate_ns,
            rollbacks=self.rollbacks,
            rng=dict(self.rng.bit_generator.state),
            extra=dict(extra or {}),
        )
        return Checkpoint(tensors=state, counters=counters)

    def _send(self, flat: FloatArray, updates: int) -> None:
        self._publish(flat, (self.epoch, updates))
        self._published_policy, self.published, self._published_ns = flat, updates, self._clock.now_ns()

    # -- going on, going back ------------------------------------------------------------------------------------------

    def resume(self, checkpoint: Checkpoint, *, same_clock: bool = False) -> None:
        """Go on from `checkpoint`, with the policy that was in force there.

        With `same_clock` the clock goes on where it stood, as virtual time does, and so does everything else: what
        follows equals a run that was never interrupted. Otherwise versions go on in an epoch above the checkpoint's,
        and the rate limit starts anew.

        Raises:
            SettingsError: the checkpoint belongs to other settings.
        """
        counters = checkpoint.counters
        self._load(self.learner, checkpoint)
        self.rng.bit_generator.state = counters["rng"]
        self.rollbacks = counters["rollbacks"]
        self.epoch = counters["epoch"] if same_clock else max(self.epoch, counters["epoch"] + 1)
        if PUBLISHED_POLICY in checkpoint.tensors:
            self._send(checkpoint.tensors[PUBLISHED_POLICY].numpy(), counters["published"])
        if same_clock:
            self._published_ns, self._schedule.rate_ns = counters["published_ns"], counters["rate_ns"]

    def _load(self, learner: Learner, checkpoint: Checkpoint) -> None:
        learner.load_state({name: t for name, t in checkpoint.tensors.items() if name != PUBLISHED_POLICY})
        self.learner, self.updates = learner, checkpoint.counters["updates"]

    def _wrong_metric(self) -> str | None:
        """What is not finite among the losses, said in words."""
        found = self.learner.metrics().items()
        return next((f"{name} is {value}" for name, value in found if not math.isfinite(value)), None)

    def _go_back(self, wrong: str) -> None:
        """Go back to the newest checkpoint, or to new networks, once; publish that policy in a new epoch.

        The draws from the replay go on as they are: the same batches would lead to the same place.
        """
        if self._recover is None or self.rollbacks >= MAX_ROLLBACKS:
            again = " again" if self.rollbacks else ""
            raise SafetyStop(
                f"learning diverged: {wrong}{again} at update {self.updates:,}",
                "lower the learning rates in the agent's settings; `relod settings` lists them",
            )
        told = f"{wrong} at update {self.updates:,}"
        learner, checkpoint = self._recover()
        if checkpoint is None:
            self.learner, self.updates = learner, 0
            told += ": started again with new networks, as there is no checkpoint yet"
        else:
            self._load(learner, checkpoint)
            told += f": went back to the checkpoint of update {self.updates:,}"
        self.rollbacks += 1
        self.epoch += 1  # robots refuse fewer updates within an epoch
        self.published = -1
        self._say(told)
        self.publish_policy()
