"""A learner small enough for tests: its task, its replay, and the loop around it under virtual time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from relod.algos.agent import flatten_policy
from relod.algos.sac import SAC, SacLearner, SacSettings
from relod.config import LearnerSettings
from relod.runtime.clock import VirtualClock
from relod.runtime.replay import ReplayLayout, ReplayTable, ReplayWriter
from relod.runtime.sources import open_source
from relod.runtime.updates import LearnerLoop
from relod.types import FloatArray, Step, TaskSpec

torch.set_num_threads(1)  # networks of this size are slower on two

HW = (20, 24)
SPEC = TaskSpec(
    name="small",
    robot="none",
    cycle_ns=45_000_000,
    frames=2,
    camera_hw=HW,
    camera_fps=20.0,
    image_hw=HW,
    proprio_names=("p",),
    action_names=("a",),
    max_steps=100,
    sensor_window=1,
)
AGENT = SacSettings(
    conv_channels=4,
    conv_strides=(2, 1),
    hidden=(16,),
    shift_px=1,
    batch_size=8,
    init_steps=20,
    max_updates_per_step=0.5,
    actor_every=1,
)


def make_table() -> ReplayTable:
    return ReplayTable(ReplayLayout.for_task(SPEC, capacity=512, lookahead=AGENT.n_step))


def make_learner(seed: int = 0) -> SacLearner:
    return SAC.build_learner(SPEC, AGENT, seed=seed, device=torch.device("cpu"))


def write_steps(writer: ReplayWriter, first: int, count: int, reward: float = -1.0) -> bytes:
    rng = np.random.default_rng(first)
    news = b""
    for number in range(first, first + count):
        step = Step(
            episode=0,
            index=number,
            frame_ids=(number, number + 1),
            proprio=rng.standard_normal(1).astype(np.float32),
            action=rng.uniform(-1, 1, 1).astype(np.float32),
            reward=reward,
            terminated=False,
            truncated=False,
            extras=np.zeros(0, np.float32),
            policy_version=(0, 0),
            observed_ns=0,
            acted_ns=0,
        )
        images = {frame: np.full((*HW, 3), frame % 256, np.uint8) for frame in step.frame_ids}
        news += writer.append(step, images)
    return news


class Run:
    """A loop under virtual time, with what it published and said."""

    def __init__(self, seed: int = 0, epoch: int = 1, **loop: Any) -> None:
        table = make_table()
        self.writer = ReplayWriter(table)
        self.clock = VirtualClock()
        self.published: list[tuple[int, int]] = []
        self.policies: list[FloatArray] = []
        self.said: list[str] = []
        limits = {name: loop.pop(name) for name in ("update_every_steps", "max_updates_per_s") if name in loop}
        self.loop = LearnerLoop(
            make_learner(seed),
            open_source(table, SAC.needs(SPEC, AGENT), LearnerSettings(**limits)),
            epoch=epoch,
            seed=seed,
            publish=self._publish,
            publish_every_s=1.0,
            clock=self.clock,
            say=self.said.append,
            **loop,
        )

    def _publish(self, flat: FloatArray, version: tuple[int, int]) -> None:
        self.published.append(version)
        self.policies.append(flat.copy())

    def steps(self, count: int, reward: float = -1.0) -> int:
        done = 0
        for _ in range(count):
            self.pass_step(reward)
            done += self.loop.run_updates()
        return done

    def pass_step(self, reward: float = -1.0) -> None:
        """A step without updates."""
        self.loop.memory.apply(write_steps(self.writer, self.writer.env_steps, 1, reward))
        self.clock.advance_to(self.clock.now_ns() + SPEC.cycle_ns)

    def weights(self) -> FloatArray:
        return flatten_policy(self.loop.learner.policy())
