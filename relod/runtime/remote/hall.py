"""A learner's run, once a robot has said what the task is: what stands behind the server. `server.Hall` to it.

It says who may join, takes in what robots send, and answers observations for robots that have no policy themselves.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch
from torch import nn

from ...algos.agent import TorchActor, bind_policy
from ...algos.inference import Plans
from ...errors import RelodError, SettingsError
from ...packages import distribution, full_name
from ...seeds import random_stream
from ...types import EpisodeEnd, FloatArray, Image, Observation, Step, TaskSpec
from ..acting import warm_up
from ..checkpoint import Checkpoint
from ..clock import NS_PER_S, monotonic_ns
from ..learner import LearnerSide
from ..log.format import EncodedFrame
from ..log.reader import LogRecord
from ..plan import LearnerPlan, Start
from ..policy import NO_POLICY, PolicyBox, PolicyReader
from ..rundir import RunFolder
from ..spans import SpanRing
from ..view import TREND_EPISODES
from .serversession import Acted, Admission
from .streams import BOOK, StreamBook
from .wire import Join, Observe, Precision, Welcome

__all__ = ["LearnerRun", "PolicyDesk", "RobotBook"]


@dataclass(slots=True, kw_only=True)
class RobotBook:
    """What a learner has seen of a robot, by its name, in this session."""

    run: str  # of the robot, newest
    acts: str
    joins: int = 0
    steps: int = 0
    ends: int = 0  # of episodes
    returns: deque[float] = field(default_factory=lambda: deque(maxlen=TREND_EPISODES))
    policy_version: tuple[int, int] = (0, 0)  # that acted in its newest step
    policy_seen_ns: int = 0  # when its first step came


class LearnerRun:
    """Log, replay, policies and books of a run that many robots feed; `restore` one that goes on, and `close` it.

    Args:
        learner_id: of the run, the same after it was resumed.

    Raises:
        StartError: the log or the book of streams cannot be used.
    """

    def __init__(
        self,
        plan: LearnerPlan,
        folder: RunFolder,
        *,
        learner_id: str,
    ) -> None:
        self.plan, self.folder, self.learner_id = plan, folder, learner_id
        self.robots: dict[str, RobotBook] = {}
        self.episodes = 0
        self.successes = 0
        self.returns: list[float] = []  # of all episodes, in the order in which they ended
        self.first_ns = self.last_ns = 0  # when the session's first and newest step came
        self._started_ns = monotonic_ns()
        self._session = plan.resume.session if plan.resume is not None else 0
        self.spans = SpanRing(("learner", "worker"))
        self._book = StreamBook(folder.path / BOOK)
        try:
            self.learner = LearnerSide(plan, folder.path, self.spans)
        except RelodError:
            self._book.close()
            raise
        self.experience = self.learner.experience
        self.begun_at = self.env_steps  # environment steps when the session began
        self.policies = PolicyDesk(plan, self.learner.box)
        self._actors: dict[int, TorchActor] = {}  # by stream
        self._package = distribution(plan.algorithm_target)
        self._segment = self.experience.log.position.segment

    def close(self) -> None:
        """Close the files."""
        try:
            self.learner.close()
        finally:
            self._book.close()

    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Fill the replay from the log and go on with the books: the log is the record, the others follow it.

        Open episodes stay open: their robots go on in them.

        Raises:
            StartError: episodes.jsonl is damaged, or the folder cannot be written.
        """
        experience, book = self.experience, self._book
        lines = self.folder.episodes()
        told = Counter((line.steps, line.episode, line.length, line.return_) for line in lines)
        untold: list[tuple[int, EpisodeEnd, str]] = []

        def see(record: LogRecord) -> None:
            message = record.message
            book.reserve(record.stream)
            if not isinstance(message, EpisodeEnd):
                return
            key = (record.env_steps, message.episode, message.length, message.return_)
            told[key] -= 1
            if told[key] < 0:
                untold.append((record.env_steps, message, book.name(record.stream)))

        read_from = 0  # a log that lost its tail in a power cut has less than the book says
        if book.noted_steps <= experience.log.env_steps:
            experience.positions.update(book.positions)
            read_from = max(0, book.noted_steps - 1)
        experience.refill(self.learner.refill_from, read_from=read_from, see=see)
        self.learner.adopt(checkpoint)
        self.folder.go_on(self.plan.settings)
        self._started_ns -= int((lines[-1].wall_s if lines else 0.0) * NS_PER_S)
        for line in lines:
            self._count(line.return_, line.success)
        for steps, end, robot in untold:
            self._end_episode(end, steps, robot)

    # -- what the server asks for --------------------------------------------------------------------------------------

    def admit(self, join: Join) -> Admission:
        """Let a robot in, or raise `SettingsError` with what does not fit."""
        self._check(join)
        stream = self._book.stream(join.robot, join.run)
        for other, (name, run) in self._book.robots.items():
            if name == join.robot and run != join.run:  # a run that was replaced will not come back
                self._close_stream(other)
        robot = self.robots.setdefault(join.robot, RobotBook(run=join.run, acts=join.acts))
        robot.run, robot.acts, robot.joins = join.run, join.acts, robot.joins + 1
        if join.acts == "learner" and stream not in self._actors:
            self._actors[stream] = self.policies.actor(Start(session=self._session).stream(f"actor-{stream}"))
        settings = self.plan.settings
        return Admission(
            stream=stream,
            robot=join.robot,
            run=join.run,
            acts=join.acts,
            spec=self.plan.spec,
            codec=settings.log.codec,
            welcome=Welcome(
                learner=self.learner_id,
                run_dir=str(self.folder.path),
                algorithm=self.plan.algorithm_name,
                preset=self.plan.preset,
                agent=msgspec.to_builtins(settings.agent),
                seed=settings.run.seed + stream,  # no two robots explore alike
                position=self.experience.positions.get(stream),
                env_steps=self.env_steps,
                policy_size=self.learner.box.size,
                policy_layout=self.learner.policy_layout,
                package=self._package,
                has_policy=self.policies.version != NO_POLICY,
                precision=self.precision,
                proof=b"",
            ),
        )

    def _check(self, join: Join) -> None:
        task = self.plan.task_name
        for name in TaskSpec.__dataclass_fields__:
            ours, theirs = getattr(self.plan.spec, name), getattr(join.task, name)
            if ours != theirs:
                raise SettingsError(
                    f"robot {join.robot} has another task: its {name} is {theirs!r}, and this learner's is {ours!r}",
                    f"a learner serves one task, and this one {task}; start another for the other",
                )
        codec = self.plan.settings.log.codec
        if join.codec != codec:
            raise SettingsError(
                f"robot {join.robot} sends {join.codec} images, and this learner's log holds {codec}",
                f"use --image-codec {codec}",
            )
        if join.algorithm not in ("", self.plan.algorithm_name):
            raise SettingsError(
                f"robot {join.robot} acts with {join.algorithm}, and this learner teaches {self.plan.algorithm_name}",
                f"leave out --algo, or use --algo {self.plan.algorithm_name}, on the robot",
            )

    def record(self, admission: Admission, message: Step | EpisodeEnd, frames: Mapping[int, EncodedFrame]) -> None:
        """Take in a record, which is in the log when this returns.

        Raises:
            SafetyStop: log or run folder cannot be written.
            ValueError: a frame cannot be decoded, or the policy it names was never made.
        """
        came_ns = monotonic_ns()
        if isinstance(message, Step):
            self._check_version(message.policy_version)
        self.experience.add_record(admission.stream, message, frames)
        robot = self.robots[admission.robot]
        if isinstance(message, Step):
            self.learner.stored(came_ns)
            self.last_ns = monotonic_ns()
            self.first_ns = self.first_ns or self.last_ns
            robot.steps += 1
            if message.policy_version != robot.policy_version:
                robot.policy_version, robot.policy_seen_ns = message.policy_version, self.last_ns
        else:
            robot.ends += 1
            robot.returns.append(message.return_)
            self._end_episode(message, self.env_steps, admission.robot)
        segment = self.experience.log.position.segment
        if segment != self._segment:
            self._segment = segment
            self._note()

    def _check_version(self, version: tuple[int, int]) -> None:
        """Epochs in the log say from where a resumed learner goes on: one that was made up would stay for ever."""
        newest = max(self.policies.version[0], self.learner.epoch, 1)
        if version[0] > newest:
            raise ValueError(f"a step by a policy of epoch {version[0]}, and the newest is {newest}")

    def act(self, admission: Admission, images: tuple[Image, ...], head: Observe, proprio: FloatArray) -> Acted:
        """The answer to an observation."""
        actor = self._actors[admission.stream]
        actor.steps_done = self.env_steps  # the random actions of the beginning are shared by all robots
        observation = Observation(frame_ids=head.frame_ids, images=images, proprio=proprio, now_ns=head.now_ns)
        asked_ns = monotonic_ns()
        action = actor.act(observation)
        return Acted(action.values, action.extras, action.policy_version, asked_ns, monotonic_ns())

    def left(self, admission: Admission) -> None:
        """A robot's connection is over; the robot may come back."""
        self._note()

    # -- and its owner -------------------------------------------------------------------------------------------------

    def close_episodes(self) -> None:
        """No robot of this run will come back: what its open episodes came to is not known."""
        for stream in sorted(self.experience.open):
            self._close_stream(stream)
        self._note()

    @property
    def precision(self) -> Precision:
        """In which policies travel: as the settings say, unless the algorithm needs all of it."""
        needed: Precision = self.learner.needs.precision
        return needed if needed == "float32" else self.plan.settings.server.precision

    @property
    def env_steps(self) -> int:
        """Environment steps of the run, of all robots."""
        return self.experience.log.env_steps

    @property
    def experience_s(self) -> float:
        """Time spent in episodes, of all robots together."""
        return self.env_steps * self.plan.spec.cycle_ns / NS_PER_S

    @property
    def wall_s(self) -> float:
        """Time since the run's beginning, up to the last episode of earlier sessions."""
        return (monotonic_ns() - self._started_ns) / NS_PER_S

    @property
    def ingest_steps_per_s(self) -> float:
        """Steps per second, from this session's first to its newest."""
        steps = self.env_steps - self.begun_at
        return (steps - 1) * NS_PER_S / (self.last_ns - self.first_ns) if self.last_ns > self.first_ns else 0.0

    def _close_stream(self, stream: int) -> None:
        if stream in self.experience.open:
            self.experience.cut(stream)
        self.experience.release(stream)
        self._actors.pop(stream, None)

    def _end_episode(self, end: EpisodeEnd, steps: int, robot: str) -> None:
        self._count(end.return_, end.success)
        experience_s = steps * self.plan.spec.cycle_ns / NS_PER_S
        self.folder.episode(end, experience_s=experience_s, wall_s=self.wall_s, steps=steps, robot=robot)

    def _count(self, return_: float, success: bool) -> None:
        self.episodes += 1
        self.successes += success
        self.returns.append(return_)

    def _note(self) -> None:
        self._book.note(self.experience.positions, self.env_steps)


@dataclass(frozen=True, slots=True)
class _Bound:
    """A buffer of the policy box, as values and as the network that they are."""

    flat: FloatArray
    module: nn.Module


class PolicyDesk:
    """The policies of a box: copied for robots that act themselves, and run here for those that do not.

    Its actors answer on the loop. An inference keeps it from its other work for a millisecond or two; a hand-over to a
    thread made each answer 0.4 ms later, for both threads want the interpreter.
    """

    def __init__(self, plan: LearnerPlan, box: PolicyBox) -> None:
        self._plan = plan
        self._needs = plan.algorithm.needs(plan.spec, plan.settings.agent)
        self._plans = Plans(self._needs.window.out_hw)
        torch.set_num_threads(1)  # one image at a time: more threads only wake each other up

        def bound(flat: FloatArray) -> _Bound:
            return _Bound(flat, bind_policy(plan.algorithm.build_actor(plan.spec, plan.settings.agent), flat))

        self._reader = PolicyReader(box, bound)
        self.actor_name = full_name(self.module, "forward")  # of what is asked for actions
        self._taken = (0, 0)  # version
        self._warm = False

    @property
    def module(self) -> nn.Module:
        """The network of the newest policy that was taken."""
        return self._reader.module.module

    @property
    def version(self) -> tuple[int, int]:
        """Of the newest policy that was taken."""
        return self._reader.version

    async def take(self) -> tuple[FloatArray, tuple[int, int]] | None:
        """Act by the newest policy from now on: a copy and its version, or None when it was taken before.

        To be called by one task: the copy is made in a thread, and the box holds the policy until the next call.
        """
        self._reader.poll()
        if self.version == self._taken:
            return None
        self._taken = version = self.version
        if self._warm:
            self._plans.follow(self.module, version)  # now, and not when the next question is there
        return await asyncio.to_thread(self._reader.module.flat.copy), version

    def actor(self, stream: str) -> TorchActor:
        """An actor with exploration noise of its own, from the random stream of that name."""
        if not self._warm:
            self._warm = True
            warm_up(self._actor(np.random.default_rng(), deterministic=True), self._plan.spec)
        return self._actor(random_stream(self._plan.settings.run.seed, stream))

    def _actor(self, rng: np.random.Generator, *, deterministic: bool = False) -> TorchActor:
        return TorchActor(self, self._plan.spec, self._needs, rng, deterministic=deterministic, plans=self._plans)
