"""A run on the wall clock whose learner is on this host: the learner's side in this process, its worker as a child."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..types import EpisodeEnd, Step
from .checkpoint import Checkpoint
from .host import ChildSpec, Events, Opening, Result, RobotHost
from .learner import LearnerSide
from .messages import Asked
from .plan import Plan, Start
from .progress import Progress
from .rundir import RunFolder
from .session import check_steps_left, finish
from .spans import SpanRing

__all__ = ["run_wall"]


def run_wall(
    plan: Plan, folder: RunFolder, learner: LearnerSide, spans: SpanRing, checkpoint: Checkpoint | None
) -> Result:
    """Run on the wall clock with an update worker on this host."""
    progress = Progress(plan, folder, spans.writer("parent"))
    start = _resume(plan, folder, learner, progress, checkpoint) if plan.resume is not None else Start()
    record_to = folder.path / "policies" if plan.settings.run.record else None
    learning = _LocalLearning(learner, start, record_to, plan.settings.run.seed)
    host = RobotHost(plan=plan, folder=folder, learning=learning, spans=spans, start=start, progress=progress)
    return finish(folder, host.run(), host.progress)


class _LocalLearning:
    """`host.Learning` on this host: the learner's side in this process, its worker as a child."""

    def __init__(self, learner: LearnerSide, start: Start, record_to: Path | None, seed: int) -> None:
        self._learner, self._start, self._record_to, self._seed = learner, start, record_to, seed
        self.add_frame = learner.add_frame
        self._events: Events | None = None  # from the opening on

    def add(self, message: Step | EpisodeEnd) -> None:
        self._learner.add(message)
        if isinstance(message, EpisodeEnd):
            self._hold()

    async def open(self, events: Events) -> Opening:
        self._events = events
        self._hold()
        build = self._learner.actor(self._start, self._record_to)
        return Opening(build_actor=build, seed=self._seed, between_episodes=self._learner.needs.between_episodes)

    def children(self) -> list[ChildSpec]:
        job = self._learner.worker_job
        return [ChildSpec(name="worker", target="relod.runtime.worker:run_worker_process", job=job)]

    def ask(self, question: Asked) -> None:
        raise NotImplementedError("the actor is in the control process")

    def poll(self) -> dict[str, dict[str, float | str]]:
        learned = self._learner.poll()
        self._hold()
        return {"worker": learned} if learned else {}

    def _hold(self) -> None:
        """Robots wait while their policy is updated, if the algorithm is of that kind."""
        if self._events is not None:
            self._events.hold(self._learner.hold())

    async def finish(self) -> None:
        self._learner.finish()

    def summary(self) -> dict[str, Any]:
        return {}


def _resume(
    plan: Plan, folder: RunFolder, learner: LearnerSide, progress: Progress, checkpoint: Checkpoint | None
) -> Start:
    """Fill the replay from the log and go on with the books: the log is the record, the folder's lines follow it."""
    assert plan.resume is not None
    steps = learner.experience.log.env_steps
    check_steps_left(plan, steps)
    lines = folder.episodes()
    ends = learner.restore(checkpoint)
    folder.go_on(plan.settings)
    progress.restore(lines, steps, lines[-1].wall_s if lines else 0.0)
    known = lines[-1].episode if lines else -1
    for end in ends:  # the log had it, the folder not yet
        if end.episode > known:
            progress.add(end)
    newest = learner.experience.newest_frame_id
    next_episode = max([known, *(end.episode for end in ends), learner.experience.newest_episode]) + 1
    learned = "the learner begins anew: there is no checkpoint"
    if checkpoint is not None:
        learned = f"its learner at update {checkpoint.counters['updates']}"
    print(
        f"relod: going on with {folder.path} at step {steps}, {len(progress.lengths)} episodes done; {learned}",
        file=sys.stderr,
    )
    return Start(step=steps, episode=next_episode, frame_id=newest, session=plan.resume.session)
