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

from ..algos.agent import Learner, flatten_policy
from ..errors import SafetyStop
from ..seeds import random_stream
from ..types import FloatArray
from .checkpoint import PUBLISHED_POLICY, Checkpoint, Counters, first_not_finite
from .clock import NS_PER_S, Clock
from .sources import Source

__all__ = ["LearnerLoop"]

MAX_ROLLBACKS = 1  # one NaN may be bad luck; a second one means that the settings diverge

Recover = Callable[[], tuple[Learner, Checkpoint | None]]


class LearnerLoop:
    """Updates as the schedule allows, and policies as the clock does. No I/O of its own, no waiting.

    Losses, policies and checkpoints are looked at before they leave, never at each update, which would wait for the
    device. At the first that is not finite the learner goes back to the newest checkpoint; at the second the run ends.

    Args:
        source: what it learns from, and when.
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
        source: Source,
        *,
        epoch: int,
        seed: int,
        publish: Callable[[FloatArray, tuple[int, int]], object],
        publish_every_s: float,
        clock: Clock,
        recover: Recover | None = None,
        say: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.learner = learner
        self.memory = source.memory
        self.epoch = epoch
        self.updates = 0
        self.published = -1  # update count of the newest published policy
        self.rollbacks = 0
        self.rng = random_stream(seed, "replay.sample")
        self._source = source
        self._publish, self._recover, self._say = publish, recover, say
        self._publish_every_ns = int(publish_every_s * NS_PER_S)
        self._published_ns = 0
        self._published_policy: FloatArray | None = None
        self._clock = clock

    # -- updates -------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Publish the first policy where robots need one to act, unless there is one to go on from."""
        if self._source.between_episodes and self.published < 0:
            self.publish_policy()

    def due(self) -> int:
        """Updates that may be done now."""
        return self._source.due(self.updates, (self.epoch, self.published), self._clock.now_ns())

    def idle_ms(self, longest_ms: int) -> int:
        """How long to wait for news when nothing is due."""
        return self._source.idle_ms(self.updates, self._clock.now_ns(), longest_ms)

    def run_updates(self, limit: int | None = None) -> int:
        """Do the updates that are due, at most `limit`, publishing on the way; returns how many were done."""
        count = self.due() if limit is None else min(limit, self.due())
        for _ in range(count):
            self.update()
        return count

    def update(self) -> None:
        """One update, and a policy if it is time for one."""
        self.learner.update(self._source.draw((self.epoch, self.published), self.rng))
        self.updates += 1
        now_ns = self._clock.now_ns()
        self._source.spend(now_ns)
        wanted = self._source.between_episodes or self.published < 0
        if wanted or now_ns - self._published_ns >= self._publish_every_ns:
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
            env_steps=self.memory.env_steps,
            epoch=self.epoch,
            published=self.published,
            published_ns=self._published_ns,
            rate_ns=self._source.rate_ns,
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
            self._published_ns, self._source.rate_ns = counters["published_ns"], counters["rate_ns"]
        else:
            self._source.go_on(counters["epoch"])

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
