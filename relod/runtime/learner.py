"""The learner side on one host: transition -> replay -> update -> policy.

Experience goes into the shared replay as it comes; the update worker, or in virtual time this process itself, draws
from it. The robot side is told policies through a `PolicyBox`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from ..algos.agent import policy_size
from ..robots.vision import make_shrink
from ..types import EpisodeEnd, Frame, Image, Step
from .acting import BoxActor
from .clock import Clock
from .plan import Plan
from .policy import PolicyBox, PolicyWriter
from .replay import ReplayLayout, ReplaySampler, ReplayTable, ReplayWriter
from .spans import SpanRing
from .worker import LearnerLoop, NewsSender, WorkerJob, WorkerStatus, newest_checkpoint, write_checkpoint

__all__ = ["LearnerSide"]

FRAMES_KEPT = 256  # 8.5 s of camera: far more than the episode stream can be behind
STATUS_BYTES = 1 << 16


class LearnerSide:
    """Owns replay and policy box; `add_frame` and `add` take in experience, in order."""

    def __init__(self, plan: Plan, folder: Path, spans: SpanRing | None) -> None:
        spec, settings = plan.task.spec, plan.settings
        self.needs = plan.algorithm.needs(spec, settings.agent)
        self._plan, self._checkpoints, self._spans = plan, folder / "checkpoints", spans
        layout = ReplayLayout.for_task(spec, capacity=settings.replay.capacity, lookahead=self.needs.n_step)
        self._table = ReplayTable(layout)
        self._writer = ReplayWriter(self._table)
        self._box = PolicyBox(policy_size(plan.algorithm.build_actor(spec, settings.agent)))
        self._shrink = make_shrink(spec.image_hw)
        self._frames: dict[int, Image] = {}
        self._send: Callable[[bytes], object] = lambda news: None
        self._link: socket.socket | None = None
        self._epoch = 0
        self.dropped = 0  # steps and ends of episodes without their frames

    # -- experience ----------------------------------------------------------------------------------------------------

    def add_frame(self, frame: Frame) -> None:
        """Keep a camera frame, at the agent's size, for the steps that will name it."""
        self._frames[frame.id] = self._shrink(frame.image)
        while len(self._frames) > FRAMES_KEPT:
            del self._frames[next(iter(self._frames))]

    def add(self, message: Step | EpisodeEnd) -> None:
        """The next step or end of an episode; one whose frames were lost is left out, and the episode cut there."""
        if any(frame_id not in self._frames for frame_id in message.frame_ids):
            self.dropped += 1
            self._send(self._writer.abandon())
        elif isinstance(message, Step):
            self._send(self._writer.append(message, self._frames))
        else:
            self._send(self._writer.close_episode(message, self._frames))

    # -- acting --------------------------------------------------------------------------------------------------------

    def actor(self, record_to: Path | None = None) -> BoxActor:
        """Builds an actor that follows this learner's policies."""
        plan = self._plan
        return BoxActor(
            algorithm=plan.algorithm_target,
            spec=plan.task.spec,
            settings=plan.settings.agent,
            box=self._box,
            seed=plan.settings.run.seed,
            record_to=record_to,
        )

    # -- learning in a worker process ----------------------------------------------------------------------------------

    def worker_job(self) -> WorkerJob:
        """The job of the next worker: with a new link, and one epoch above the last one's."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._close_link()
        self._link = ours
        sender = NewsSender(ours)
        self._send = sender.send
        self._epoch += 1
        sender.send(self._writer.reissue())
        plan = self._plan
        return WorkerJob(
            algorithm=plan.algorithm_target,
            spec=plan.task.spec,
            settings=plan.settings.learner,
            agent=plan.settings.agent,
            seed=plan.settings.run.seed,
            epoch=self._epoch,
            replay=self._table,
            box=self._box,
            link=theirs,
            checkpoints=self._checkpoints,
            resume=newest_checkpoint(self._checkpoints),
            spans=self._spans,
        )

    def poll(self) -> dict[str, float | str]:
        """What the worker has said since the last call, newest values; and give it what it had no room for."""
        values: dict[str, float | str] = {}
        if self._link is None:
            return values
        try:
            self._send(b"")
            while data := self._link.recv(STATUS_BYTES):
                values |= _report(msgspec.msgpack.decode(data, type=WorkerStatus)) | {"dropped": float(self.dropped)}
        except BlockingIOError:
            pass
        except OSError:  # the worker died; its successor gets the whole table
            self._close_link()
        return values

    def finish(self) -> None:
        """No more experience: the worker writes its last checkpoint and ends; it can still be polled."""
        if self._link is not None:
            try:
                self._link.shutdown(socket.SHUT_WR)
            except OSError:
                self._close_link()
        self._send = lambda news: None

    def _close_link(self) -> None:
        if self._link is not None:
            self._link.close()
        self._link, self._send = None, lambda news: None

    # -- learning inline, in virtual time ------------------------------------------------------------------------------

    def inline(self, clock: Clock) -> LearnerLoop:
        """The learner in this process; its updates are deterministic for a seed and a thread count."""
        plan = self._plan
        torch.set_num_threads(plan.settings.learner.threads or 1)
        sampler = ReplaySampler(self._table)
        self._send = sampler.apply
        return LearnerLoop(
            plan.algorithm.build_learner(
                plan.task.spec, plan.settings.agent, seed=plan.settings.run.seed, device=torch.device("cpu")
            ),
            sampler,
            self.needs,
            epoch=1,
            seed=plan.settings.run.seed,
            publish=PolicyWriter(self._box).publish,
            publish_every_s=plan.settings.learner.publish_every_s,
            clock=clock,
        )

    def save(self, loop: LearnerLoop) -> None:
        """Write a checkpoint of the inline learner."""
        write_checkpoint(self._checkpoints, loop.checkpoint())


def _report(status: WorkerStatus) -> dict[str, float | str]:
    return {
        "epoch": float(status.epoch),
        "updates": float(status.updates),
        "updates_per_s": status.updates_per_s,
        "replay_steps": float(status.replay_steps),
        "published": float(status.published),
        "checkpoint_updates": float(status.checkpoint_updates),
        **{f"metric.{name}": value for name, value in status.metrics.items()},
    }
