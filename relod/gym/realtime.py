"""A task in real time behind Gymnasium's interface, simulated or on a robot.

The robot is driven by the same processes as in a run, in a process of their own beside the caller's. It does not wait
for the caller: an action that comes late finds the robot still doing the former one, and one that stays away for longer
ends the episode with the robot standing. Between episodes the robot waits for `reset`.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import gymnasium
import numpy as np

from ..errors import RelodError, StartError
from ..robots.vision import make_shrink
from ..runtime.clock import NS_PER_S
from ..runtime.host import ChildSpec, Events, Opening, RobotHost
from ..runtime.messages import Answered, Asked
from ..runtime.plan import Plan, Start
from ..runtime.progress import Progress
from ..runtime.remote.asking import AskingHost
from ..runtime.request import Request, hardware, task_settings
from ..runtime.session import new_spans, open_folder
from ..types import EpisodeEnd, FloatArray, Frame, Image, Step
from .spaces import RENDER_MODES, action_space, observation_space, observe, to_rgb

__all__ = ["RealTimeEnv"]

FRAMES_KEPT = 64
END_LIMIT_S = 30.0
RESET_CYCLES = 2.5  # within an episode there is an observation every cycle, and a reset takes longer
WAITING = "waiting for reset()"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What the driving process is given."""

    task: str
    images: bool
    world: str
    settings: tuple[str, ...]
    robot: str | None
    camera: str | None
    allow_mixed: bool
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _News:
    """What it tells when it is asked: an observation that wants an action, or the end of an episode."""

    observation: Any
    image: Image | None  # the newest, for `render`
    reward: float = 0.0
    late: int = 0  # observations before it that the caller was not told of
    terminated: bool = False
    truncated: bool = False
    success: bool = False
    reason: str = ""  # of the episode's end; empty while it goes on


class RealTimeEnv(gymnasium.Env[Any, Any]):
    """A task by name, on the wall clock.

    Args:
        task, images, world, settings: as `virtual.VirtualEnv` has them.
        robot, camera, allow_mixed: hardware, as `relod robot` has it; simulated where it is not named.
    """

    def __init__(
        self,
        task: str,
        *,
        images: bool = True,
        world: str = "nominal",
        settings: Sequence[str] = (),
        robot: str | None = None,
        camera: str | None = None,
        allow_mixed: bool = False,
        render_mode: str | None = None,
    ) -> None:
        entry, loaded = task_settings(task, world, None, {}, tuple(settings))
        self._spec = entry.make_task(loaded.task).spec
        self.metadata = {"render_modes": RENDER_MODES, "render_fps": round(NS_PER_S / self._spec.cycle_ns)}
        self.render_mode = render_mode
        self.action_space = action_space(self._spec)
        self.observation_space = observation_space(self._spec, images)
        self._job = _Job(
            task=task,
            images=images,
            world=world,
            settings=tuple(settings),
            robot=robot,
            camera=camera,
            allow_mixed=allow_mixed,
            seed=0,
        )
        self._process: Any = None
        self._wire: Connection
        self._running = False  # an episode
        self._picture: Image | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Let the robot go to the start of an episode, and wait until it is there.

        The first seed is that of the simulated world and of the resets; real time does not repeat itself.
        """
        super().reset(seed=seed)
        if self._process is None:
            self._start(int(self.np_random.integers(2**31)))
        self._send("reset")
        return self._take().observation, {}

    def step(self, action: FloatArray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Answer the observation and wait for the next.

        `info["late"]` counts observations that came while the caller thought: the action was taken for the newest of
        them, and the rewards of the steps in between are added.
        """
        if self._process is None or not self._running:
            raise gymnasium.error.ResetNeeded("call reset() first")
        values = np.asarray(action, np.float32)
        if values.shape != (self._spec.action_dim,):
            raise ValueError(f"an action of shape {values.shape}, where {(self._spec.action_dim,)} is expected")
        self._send(values.tobytes())
        news = self._take()
        info = {"success": news.success, "reason": news.reason, "late": news.late}
        return news.observation, news.reward, news.terminated, news.truncated, info

    def render(self) -> Image | None:
        """The newest camera picture, `(H, W, 3) uint8` RGB."""
        return None if self.render_mode is None or self._picture is None else to_rgb(self._picture)

    def close(self) -> None:
        """Let the robot stand, and end what drives it."""
        if self._process is not None:
            self._wire.close()
            self._process.join(END_LIMIT_S)
            self._process.kill()
            self._process = None
        self._running = False

    # How.

    def _start(self, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._wire, theirs = context.Pipe()
        self._process = context.Process(target=_drive, args=(theirs, replace(self._job, seed=seed)), name="relod-gym")
        self._process.start()
        theirs.close()

    def _send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # what it has said last tells why
            self._wire.send(message)

    def _take(self) -> _News:
        """The next news. `RelodError`: why the robot is not driven any more."""
        try:
            news = self._wire.recv()
        except EOFError:
            news = StartError("the process that drives the robot is gone", "see why with `relod robot`")
        if isinstance(news, RelodError):
            self.close()
            raise news
        assert isinstance(news, _News)
        self._running = not news.reason
        self._picture = news.image
        return news


# -- the driving process -----------------------------------------------------------------------------------------------


def _drive(wire: Connection, job: _Job) -> None:
    """Its body: a robot's host whose actions come from the caller."""
    with open(os.devnull, "wb") as nowhere:  # the caller's terminal is the caller's
        os.dup2(nowhere.fileno(), 2)
    try:
        with tempfile.TemporaryDirectory(prefix="relod-gym-") as folder:
            plan = _plan(job, folder)
            with open_folder(plan, ()) as opened:
                learning = _Caller(wire, plan, job.images)
                progress = Progress(plan, opened)
                host = RobotHost(
                    plan=plan, folder=opened, learning=learning, spans=new_spans(), start=Start(), progress=progress
                )
                error = host.run().error
    except RelodError as caught:
        error = caught
    with contextlib.suppress(OSError):
        wire.send(error or StartError("the environment was closed"))


def _plan(job: _Job, folder: str) -> Plan:
    asked = Request(robot=job.robot, camera=job.camera, allow_mixed=job.allow_mixed, environment={}, overrides={})
    robot, camera = hardware(asked, "wall", None)
    settings = (*job.settings, f"run.folder={folder}", f"run.seed={job.seed}")
    entry, loaded = task_settings(job.task, job.world, None, {}, settings)
    return Plan(
        task_name=job.task,
        entry=entry,
        task=entry.make_task(loaded.task),
        mode="gymnasium",
        algorithm_name="",
        algorithm_target="",
        algorithm=None,
        preset="",
        preset_reason="",
        settings=loaded,
        robot=robot,
        camera=camera,
        world=job.world,
        clock="wall",
    )


class _Caller:
    """`host.Learning` whose actions come over a pipe; one word of the caller's gets one answer, so nothing piles up."""

    def __init__(self, wire: Connection, plan: Plan, with_images: bool) -> None:
        self._wire, self._with_images = wire, with_images
        self._seed, self._cycle_ns = plan.settings.run.seed, plan.task.spec.cycle_ns
        self._shrink = make_shrink(plan.task.spec.image_hw)
        self._images: dict[int, Image] = {}
        self._newest: Image | None = None
        self._question: Asked | None = None  # whose step is still to come
        self._step: Step | None = None  # whose reward belongs to the next news
        self._asked_ns = 0  # of the newest observation
        self._untold: _News | None = None  # what the caller will be answered next
        self._listening = False  # the caller waits
        self._leaving = False  # the caller has begun anew in the middle of an episode
        self._running = False  # an episode
        self._events: Events

    async def open(self, events: Events) -> Opening:
        self._events = events
        events.hold(WAITING)
        asyncio.get_running_loop().add_reader(self._wire.fileno(), self._hear)
        return Opening(build_actor=AskingHost, seed=self._seed)

    def children(self) -> Sequence[ChildSpec]:
        return ()

    def add_frame(self, frame: Frame) -> None:
        self._newest = frame.image.copy()
        self._images[frame.id] = self._shrink(self._newest)
        while len(self._images) > FRAMES_KEPT:
            del self._images[next(iter(self._images))]

    def add(self, message: Step | EpisodeEnd) -> None:
        if isinstance(message, Step):
            self._step = message
            if self._question is not None:
                question, self._question = self._question, None
                self._tell_question(question)
            return
        self._running = False
        if self._leaving:
            self._leaving, self._step = False, None
            return
        self._events.hold(WAITING)
        self._tell(
            message.frame_ids,
            message.proprio,
            terminated=message.terminated,
            truncated=not message.terminated,
            success=message.success,
            reason=message.reason or "over",
        )

    def ask(self, question: Asked) -> None:
        gap_ns, self._asked_ns = question.now_ns - self._asked_ns, question.now_ns
        self._running = True
        if gap_ns > RESET_CYCLES * self._cycle_ns:  # an episode in which nothing was done ends without a word
            self._leaving = False
        if self._leaving:
            return
        if question.index > 0:  # the step that led to it comes right behind, and with it the reward
            self._question = question
        else:
            self._tell_question(question)

    def poll(self) -> Mapping[str, dict[str, float | str]]:
        return {}

    async def finish(self) -> None:
        asyncio.get_running_loop().remove_reader(self._wire.fileno())

    def summary(self) -> dict[str, Any]:
        return {}

    def _tell_question(self, question: Asked) -> None:
        self._tell(question.frame_ids, np.frombuffer(question.proprio, np.float32))

    def _tell(self, frame_ids: tuple[int, ...], vector: FloatArray, **end: Any) -> None:
        """News for the caller, now or when it asks; what it was not told of before is added up."""
        before, step = self._untold, self._step
        self._step = None
        self._untold = _News(
            observation=observe(tuple(self._images[i] for i in frame_ids), vector, self._with_images),
            image=self._newest,
            reward=(step.reward if step is not None else 0.0) + (before.reward if before is not None else 0.0),
            late=before.late + 1 if before is not None else 0,
            **end,
        )
        self._answer()

    def _answer(self) -> None:
        if self._listening and self._untold is not None:
            news, self._untold, self._listening = self._untold, None, False
            with contextlib.suppress(OSError):
                self._wire.send(news)

    def _hear(self) -> None:
        """What the caller says: begin, or an action. Its end ends the run."""
        try:
            message = self._wire.recv()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._wire.fileno())
            self._events.end(None)
            return
        self._listening = True
        if message == "reset":
            self._leaving = self._running
            self._untold = self._question = None
            self._events.hold("")
            return
        if self._untold is not None and self._untold.reason:
            self._answer()  # the episode is over
        else:
            self._events.answer(Answered(asked_ns=self._asked_ns, action=message, extras=b"", policy_version=(0, 0)))
