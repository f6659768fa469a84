"""A learner without processes for tests: its plan, its robots' records, and a log small enough to look into."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from relod.algos.sac import SAC
from relod.config import LearnerSettings, LogSettings, ReplaySettings, RunSettings, ServerSettings, Settings
from relod.runtime.log.format import EncodedFrame
from relod.runtime.plan import LearnerPlan, Resume
from relod.runtime.remote.wire import PROTOCOL, Join
from relod.types import EpisodeEnd, Step, TaskSpec
from tests.runtime.smallrun import AGENT, HW, SPEC

RUN, OTHER_RUN = "a" * 32, "b" * 32


def make_plan(
    folder: Path, *, robots: int = 2, capacity: int = 512, codec: str = "raw", **fields: object
) -> LearnerPlan:
    settings = Settings(
        run=RunSettings(folder=str(folder)),
        replay=ReplaySettings(capacity=capacity),
        log=LogSettings(codec=codec, segment_mib=1.0),
        learner=LearnerSettings(threads=1),
        server=ServerSettings(max_robots=robots),
        agent=AGENT,
    )
    plan = LearnerPlan(
        task_name=SPEC.name,
        spec=SPEC,
        algorithm_name="sac",
        algorithm_target="relod.algos.sac:SAC",
        algorithm=SAC,
        preset="sac-lite",
        preset_reason="for a test",
        settings=settings,
        robots=robots,
    )
    return replace(plan, **fields)


def resumed(plan: LearnerPlan, folder: Path, session: int = 2) -> LearnerPlan:
    return replace(plan, resume=Resume(folder=folder, session=session))


def make_join(
    robot: str = "x", run: str = RUN, *, task: TaskSpec = SPEC, acts: str = "robot", **fields: object
) -> Join:
    values = {
        "protocol": PROTOCOL,
        "relod": "test",
        "robot": robot,
        "run": run,
        "acts": acts,
        "task": task,
        "codec": "raw",
        "algorithm": "sac" if acts == "robot" else "",
        "presets": {},
        "nonce": bytes(16),
        "proof": b"",
    }
    return Join(**{**values, **fields})


def picture(stream: int, frame_id: int) -> np.ndarray:
    image = np.zeros((*HW, 3), np.uint8)
    image[...] = (stream + 1, frame_id % 256, frame_id // 256)
    return image


class RobotTape:
    """A robot's records in order, each with the frames it names, a new frame every step."""

    def __init__(self, stream: int = 0) -> None:
        self._stream, self._frame, self._episode, self._index = stream, 0, 0, 0

    def step(self, reward: float = -1.0, **fields: object) -> tuple[Step, dict[int, EncodedFrame]]:
        self._frame += 1
        step = Step(
            episode=self._episode,
            index=self._index,
            frame_ids=(self._frame, self._frame + 1),
            proprio=np.array([self._index], np.float32),
            action=np.array([self._index / 1000], np.float32),
            reward=reward,
            terminated=False,
            truncated=False,
            extras=np.zeros(0, np.float32),
            policy_version=(1, self._episode),
            observed_ns=0,
            acted_ns=0,
        )
        self._index += 1
        step = replace(step, **fields)
        return step, self.frames(step)

    def end(self) -> tuple[EpisodeEnd, dict[int, EncodedFrame]]:
        self._frame += 1
        end = EpisodeEnd(
            episode=self._episode,
            length=self._index,
            frame_ids=(self._frame, self._frame + 1),
            proprio=np.array([self._index], np.float32),
            return_=-float(self._index),
            terminated=False,
            success=False,
            reason="time limit",
            observed_ns=0,
        )
        self._frame += 3
        self._episode, self._index = self._episode + 1, 0
        return end, self.frames(end)

    def lose(self) -> None:
        """A step that never comes."""
        self._frame, self._index = self._frame + 1, self._index + 1

    def restart_episode(self) -> None:
        """The next step is the first of another episode."""
        self._episode, self._index, self._frame = self._episode + 1, 0, self._frame + 3

    def frames(self, message: Step | EpisodeEnd) -> dict[int, EncodedFrame]:
        return {
            frame_id: EncodedFrame(captured_ns=100 * frame_id, data=picture(self._stream, frame_id).tobytes())
            for frame_id in message.frame_ids
        }
