"""The learner side on one host: transition -> replay -> update -> policy.

Experience goes into the shared replay as it comes; the update worker, or in virtual time this process itself, draws
from it. The robot side is told policies through a `PolicyBox`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from ..algos.agent import Learner, Rollouts, policy_size
from ..algos.checked import policy_layout, rehearse_learner, rehearse_policy
from ..types import EpisodeEnd, Frame, Step
from .acting import BoxActor
from .checkpoint import CHECKPOINTS, PUBLISHED_POLICY, Checkpoint, newest_readable, write_checkpoint
from .clock import Clock, monotonic_ns
from .experience import Experience
from .log.format import LogPosition
from .plan import LearnerPlan, Start
from .policy import PolicyBox, PolicyWriter
from .rollout import RolloutReader
from .sources import open_source
from .spans import SpanRing, Stage
from .updates import LearnerLoop
from .worker import NewsSender, WorkerJob, WorkerStatus, keep_freed_memory

__all__ = ["LearnerSide"]

STATUS_BYTES = 1 << 16


class LearnerSide:
    """Owns experience and policy box; a context manager. `add_frame` and `add` take in experience, in order.

    Args:
        end: where to cut the log of a resumed run; None keeps all of it.
    """

    def __init__(
        self, plan: LearnerPlan, folder: Path, spans: SpanRing | None, *, end: LogPosition | None = None
    ) -> None:
        spec, settings = plan.spec, plan.settings
        self.needs = plan.algorithm.needs(spec, settings.agent)
        self._plan, self._checkpoints, self._spans = plan, folder / CHECKPOINTS, spans
        self._writer = spans.writer("learner") if spans is not None else None
        self.experience = Experience(plan, folder, end=end)
        policy = rehearse_policy(plan.algorithm, spec, settings.agent)
        self.policy_layout = policy_layout(policy)
        self.box = PolicyBox(policy_size(policy))
        # The same reader as the worker's tells when an update is due, for which robots have to wait.
        self._rollouts = RolloutReader(self.experience.table) if isinstance(self.needs.memory, Rollouts) else None
        self._forget_worker()
        self._link: socket.socket | None = None
        self._handed_over: socket.socket | None = None  # the newest worker's end, until it has been spawned
        self._epoch = 0

    def __enter__(self) -> LearnerSide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the log and the link to the worker."""
        self._close_link()
        self.experience.log.close()

    @property
    def epoch(self) -> int:
        """Of the newest worker's policies."""
        return self._epoch

    # -- experience ----------------------------------------------------------------------------------------------------

    def add_frame(self, frame: Frame) -> None:
        """Keep a camera frame for the steps that will name it."""
        self.experience.add_frame(frame)

    def add(self, message: Step | EpisodeEnd) -> None:
        """The next step or end of an episode, for log and replay."""
        came_ns = monotonic_ns()
        self.experience.add(message)
        if isinstance(message, Step):
            self.stored(came_ns)

    def stored(self, came_ns: int) -> None:
        """A step that came then can be learned from."""
        if self._writer is not None:
            self._writer.add(Stage.STORED, self.experience.log.env_steps, came_ns, monotonic_ns())

    def restore(self, checkpoint: Checkpoint | None) -> list[EpisodeEnd]:
        """Go on with a run on the wall clock; returns the episodes that ended in the part of the log that was read.

        The log is whole up to the last record; an episode that was open has no known outcome and is cut there.
        """
        ends = self.experience.refill(self.refill_from)
        self.experience.cut()
        self.adopt(checkpoint)
        return ends

    @property
    def refill_from(self) -> int:
        """The environment step from which on the log has what the replay keeps."""
        return max(0, self.experience.log.env_steps - self._plan.settings.replay.capacity)

    def adopt(self, checkpoint: Checkpoint | None) -> None:
        """Go on with the policy in force at the checkpoint; call it after the refill.

        That policy acts from the first cycle on: the worker may come later than that.
        """
        saved = checkpoint.counters["epoch"] if checkpoint is not None else 0
        self._epoch = max(saved, self.experience.newest_epoch)
        if checkpoint is not None and PUBLISHED_POLICY in checkpoint.tensors:
            policy = checkpoint.tensors[PUBLISHED_POLICY].numpy()
            PolicyWriter(self.box).publish(policy, (saved, checkpoint.counters["published"]))
            if self._rollouts is not None:
                self._rollouts.go_on(saved)

    def hold(self) -> str:
        """Why robots should begin no episode now; empty when they may."""
        if self._rollouts is None:
            return ""
        newest = self.box.latest.newest()
        if newest is None:
            return "waiting for the first policy"
        version = int(newest[1]["epoch"]), int(newest[1]["updates"])
        assert isinstance(self.needs.memory, Rollouts)
        return "the learner updates the policy" if self._rollouts.ready(version) >= self.needs.memory.steps else ""

    # -- acting --------------------------------------------------------------------------------------------------------

    def actor(self, start: Start, record_to: Path | None = None) -> BoxActor:
        """Builds an actor that follows this learner's policies."""
        plan = self._plan
        return BoxActor(
            algorithm=plan.algorithm_target,
            spec=plan.spec,
            settings=plan.settings.agent,
            box=self.box,
            seed=plan.settings.run.seed,
            start=start,
            record_to=record_to,
        )

    # -- learning in a worker process ----------------------------------------------------------------------------------

    def worker_job(self) -> WorkerJob:
        """The job of the next worker: with a new link, and one epoch above the last one's."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._close_link()
        self._link, self._handed_over = ours, theirs
        sender = NewsSender(ours)

        def send(news: bytes) -> None:
            self._watch(news)
            try:
                sender.send(news)
            except OSError:  # the worker died; its successor gets the whole table
                self._close_link()

        self.experience.send = send
        self._epoch += 1
        sender.send(self.experience.writer.reissue())
        plan = self._plan
        return WorkerJob(
            algorithm=plan.algorithm_target,
            spec=plan.spec,
            settings=plan.settings.learner,
            agent=plan.settings.agent,
            seed=plan.settings.run.seed,
            epoch=self._epoch,
            replay=self.experience.table,
            box=self.box,
            link=theirs,
            checkpoints=self._checkpoints,
            extra={"run": plan.identity},
            spans=self._spans,
        )

    def poll(self) -> dict[str, float | str]:
        """What the worker has said since the last call, newest values; and give it what it had no room for."""
        values: dict[str, float | str] = {}
        if self._link is None:
            return values
        self._close_handed_over()
        self.experience.send(b"")
        try:
            while self._link is not None and (data := self._link.recv(STATUS_BYTES)):
                values |= _report(msgspec.msgpack.decode(data, type=WorkerStatus)) | {
                    "dropped": float(self.experience.dropped)
                }
        except BlockingIOError:
            pass
        except OSError:  # the worker died
            self._close_link()
        return values

    def finish(self) -> None:
        """No more experience: the worker writes its last checkpoint and ends; it can still be polled."""
        if self._link is not None:
            try:
                self._link.shutdown(socket.SHUT_WR)
            except OSError:
                self._close_link()
        self._forget_worker()

    def _close_handed_over(self) -> None:
        if self._handed_over is not None:
            self._handed_over.close()
            self._handed_over = None

    def _close_link(self) -> None:
        self._close_handed_over()
        if self._link is not None:
            self._link.close()
        self._link = None
        self._forget_worker()

    def _forget_worker(self) -> None:
        self.experience.send = self._watch

    def _watch(self, news: bytes) -> None:
        if self._rollouts is not None:
            self._rollouts.apply(news)

    # -- learning inline, in virtual time ------------------------------------------------------------------------------

    def inline(self, clock: Clock, say: Callable[[str], object] = lambda text: None) -> LearnerLoop:
        """The learner in this process; its updates are deterministic for a seed and a thread count."""
        plan = self._plan
        settings, seed = plan.settings.learner, plan.settings.run.seed
        threads = settings.threads or 1
        torch.set_num_threads(threads)
        keep_freed_memory()
        source = open_source(self.experience.table, self.needs, settings, threads=threads)
        self.experience.send = source.memory.apply

        device = torch.device("cpu")
        rehearse_learner(plan.algorithm, plan.spec, plan.settings.agent, device=device, whole_frames=False)

        def build() -> Learner:
            return plan.algorithm.build_learner(  # type: ignore[no-any-return]
                plan.spec, plan.settings.agent, seed=seed, device=device
            )

        return LearnerLoop(
            build(),
            source,
            epoch=1,
            seed=seed,
            publish=PolicyWriter(self.box).publish,
            publish_every_s=settings.publish_every_s,
            clock=clock,
            recover=lambda: (build(), newest_readable(self._checkpoints).checkpoint),
            say=say,
        )

    def save(self, loop: LearnerLoop, extra: Mapping[str, Any]) -> None:
        """Write a checkpoint of the inline learner, and whatever else its run needs to go on."""
        write_checkpoint(self._checkpoints, loop.checkpoint({"run": self._plan.identity, **extra}))


def _report(status: WorkerStatus) -> dict[str, float | str]:
    return {
        "epoch": float(status.epoch),
        "updates": float(status.updates),
        "updates_per_s": status.updates_per_s,
        "replay_steps": float(status.replay_steps),
        "published": float(status.published),
        "rollbacks": float(status.rollbacks),
        "checkpoint_updates": float(status.checkpoint_updates),
        **{f"metric.{name}": value for name, value in status.metrics.items()},
    }
