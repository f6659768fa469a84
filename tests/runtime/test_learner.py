"""The learner's side on one host: when robots have to wait for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from relod.errors import SettingsError
from relod.runtime.experience import check_room
from relod.runtime.learner import LearnerSide
from relod.runtime.modes import resolve
from relod.runtime.policy import PolicyWriter
from relod.runtime.session import open_folder
from relod.types import EpisodeEnd, Frame, Step
from tests.fakes import small_request

HW = (24, 32)


class Side:
    """A learner's side, fed episodes of its newest policy."""

    def __init__(self, learner: LearnerSide) -> None:
        self.learner = learner
        self.episodes = self.frames = 0

    def publish(self, version: tuple[int, int]) -> None:
        PolicyWriter(self.learner.box).publish(np.zeros(self.learner.box.size, np.float32), version)

    def episode(self, length: int, version: tuple[int, int]) -> None:
        for index in range(length + 1):
            for _ in range(2):
                self.frames += 1
                image = np.zeros((*HW, 3), np.uint8)
                self.learner.add_frame(Frame(id=self.frames, captured_ns=0, arrived_ns=0, image=image))
            seen = {"frame_ids": (self.frames - 1, self.frames), "proprio": np.zeros(8, np.float32), "observed_ns": 0}
            if index == length:
                end = EpisodeEnd(
                    episode=self.episodes,
                    length=length,
                    return_=0.0,
                    terminated=False,
                    success=False,
                    reason="time limit",
                    **seen,
                )
                self.learner.add(end)
            else:
                step = Step(
                    episode=self.episodes,
                    index=index,
                    action=np.zeros(2, np.float32),
                    reward=0.0,
                    terminated=False,
                    truncated=index == length - 1,
                    extras=np.zeros(3, np.float32),
                    policy_version=version,
                    acted_ns=0,
                    **seen,
                )
                self.learner.add(step)
        self.episodes += 1


@contextlib.contextmanager
def side(folder: Path, algorithm: str) -> Iterator[Side]:
    plan = resolve(small_request(folder, algorithm=algorithm))
    with open_folder(plan, ()) as opened, LearnerSide(plan.learner, opened.path, None) as learner:
        yield Side(learner)


def test_robots_never_wait_for_a_learner_of_minibatches(tmp_path):
    with side(tmp_path, "sac") as it:
        assert it.learner.hold() == ""
        it.episode(100, (1, 0))
        assert it.learner.hold() == ""


def test_robots_wait_for_the_first_policy_and_for_every_update_of_rollouts(tmp_path):
    with side(tmp_path, "ppo") as it:  # of 80 steps
        assert it.learner.hold() == "waiting for the first policy"
        it.publish((1, 0))
        assert it.learner.hold() == ""
        it.episode(50, (1, 0))
        assert it.learner.hold() == ""
        it.episode(30, (1, 0))
        assert it.learner.hold() == "the learner updates the policy"
        it.publish((1, 1))
        assert it.learner.hold() == ""
        it.episode(79, (1, 0))  # by a robot that was in the middle of it
        it.episode(79, (1, 1))
        assert it.learner.hold() == ""
        it.episode(1, (1, 1))
        assert it.learner.hold() == "the learner updates the policy"


def test_a_worker_that_starts_again_has_the_same_rollout(tmp_path):
    with side(tmp_path, "ppo") as it:
        it.publish((1, 0))
        it.episode(60, (1, 0))
        job = it.learner.worker_job()
        it.episode(20, (1, 0))
        assert it.learner.hold() == "the learner updates the policy"
        job.link.close()


def test_a_rollout_that_does_not_fit_into_the_replay_is_refused(tmp_path):
    plan = resolve(small_request(tmp_path, "replay.capacity=512", "agent.rollout_steps=500", algorithm="ppo")).learner
    with pytest.raises(SettingsError, match=r"replay.capacity = 512 has no room for the 660 steps of an update.* 704"):
        check_room(plan)
