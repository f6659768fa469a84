"""`relod eval`: what a trained policy earns, in virtual time or on a robot, with pictures of every episode."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..algos.agent import FixedPolicy, TorchActor, bind_policy, flatten_policy, policy_from_state
from ..algos.checked import find_algorithm
from ..algos.inference import Plans
from ..errors import EXIT_OK, RelodError, SettingsError, StartError
from ..loading import load_attribute
from ..robots.vision import make_shrink
from ..seeds import random_stream
from ..types import EpisodeEnd, FloatArray, Frame, Image, Step, TaskSpec
from .acting import warm_up
from .checkpoint import CHECKPOINTS, newest_readable
from .clock import NS_PER_S
from .curve import bootstrap_interval
from .cycle import Cycle
from .host import ChildSpec, Events, Opening, Result, RobotHost
from .messages import Asked
from .plan import Plan, Start
from .progress import Progress
from .remote.wire import Challenge
from .request import Place, Request, make_plan
from .rundir import RunFolder, disk_errors, read_run
from .session import finish, new_spans, open_folder
from .video import Video, write_strip
from .virtual import VirtualRun

__all__ = ["EvalRequest", "evaluate"]

MODE = "evaluation"
PLACES = {MODE: Place(acts_here=True, learns_here=True)}
# The run's settings but for its length; nothing is learned.
SHORT = {"run.steps": 0, "run.minutes": 0.0, "run.record": False, "replay.capacity": 512}
START = Start(session=1 << 20)  # with random streams of its own: other starts than in the run, in the same world
NO_WARM_UP = 1 << 62  # steps done: the actions are the policy's own from the first one on


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRequest:
    """What the user asked of `relod eval`; None where nothing was said."""

    run: Path
    episodes: int
    stochastic: bool = False  # with the policy's own noise, as it learned
    task: str | None = None  # for a learner's run, which does not say where its task comes from
    robot: str | None = None
    camera: str | None = None
    allow_mixed: bool = False
    world: str | None = None
    clock: str | None = None
    seed: int | None = None  # the run's: the room it was learned in
    environment: Mapping[str, str] = field(default_factory=dict)
    assignments: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()


def evaluate(request: EvalRequest) -> Result:
    """Let the newest policy of a run act for some episodes.

    Raises:
        StartError: no run, no checkpoint, or the folder of the evaluation cannot be made.
        SettingsError: names or values that do not fit together, or another task than the run's.
    """
    run = read_run(request.run.resolve())
    plan = _plan(request, run)
    policy = _policy(plan, request.run.resolve())
    print(f"relod: {plan.task_name}, evaluation, {plan.clock} clock: {plan.device_text}", file=sys.stderr)
    noise = "with its noise" if request.stochastic else "without noise"
    print(f"relod: the policy of {request.run}, {noise}, {request.episodes} episodes", file=sys.stderr)
    with open_folder(plan, request.arguments) as folder:
        folder.update_run({"evaluates": str(request.run.resolve()), "stochastic": request.stochastic})
        progress = Progress(plan, folder)
        actor = FixedActor(
            algorithm=plan.algorithm_target,
            spec=plan.task.spec,
            settings=plan.settings.agent,
            policy=policy,
            seed=plan.settings.run.seed,
            deterministic=not request.stochastic,
        )
        watching = _Watching(actor, request.episodes, Album(folder.path / "episodes", plan.task.spec), progress)
        run_it = _run_virtual if plan.clock == "virtual" else _run_wall
        result = run_it(plan, folder, watching)
        result.summary |= {
            "evaluates": str(request.run.resolve()),
            "stochastic": request.stochastic,
            **_figures(watching.ends),
        }
        return finish(folder, result, progress)


def _plan(request: EvalRequest, run: Mapping[str, Any]) -> Plan:
    task = request.task or run["task"]
    if request.task is None and "spec" in run:
        raise SettingsError(f"{request.run} is a learner's run, which has no task of its own", "name it with --task")
    clock = request.clock or ("virtual" if request.robot is None else "wall")
    own: dict[str, object] = {} if request.seed is None else {"run.seed": request.seed}
    if clock == "virtual":
        own |= {"run.realtime": False}
    learner = None
    if "spec" in run:  # of a learner: its robots have sent such images
        image_hw = tuple(run["spec"]["image_hw"])
        learner = Challenge(protocol=0, relod="", nonce=bytes(16), token=False, image_hw=image_hw)
    return make_plan(
        Request(
            task=task,
            mode=MODE,
            algorithm=run["algorithm"],
            preset=run["preset"],
            robot=request.robot,
            camera=request.camera,
            allow_mixed=request.allow_mixed,
            world=request.world or run.get("world") or None,
            clock=clock,
            config=request.run / "settings.toml",
            environment=request.environment,
            assignments=request.assignments,
            overrides={**own, "run.folder": str(request.run.resolve() / "evaluations"), **SHORT},
        ),
        PLACES,
        learner,
    )


def _policy(plan: Plan, folder: Path) -> FloatArray:
    """The newest one of the run, flat."""
    found = newest_readable(folder / CHECKPOINTS)
    if found.checkpoint is None:
        raise StartError(f"{folder} has no checkpoint", "let it learn until its first, a few seconds after it began to")
    for problem in found.problems:
        print(f"relod: {problem}; evaluating {found.path}", file=sys.stderr)
    network = plan.algorithm.build_actor(plan.task.spec, plan.settings.agent)
    return flatten_policy(policy_from_state(network, found.checkpoint.tensors))


# -- acting ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedActor:
    """Builds the host of an actor whose policy stays; pickles into the control process."""

    algorithm: str  # "module:attribute"
    spec: TaskSpec
    settings: Any  # the algorithm's
    policy: FloatArray
    seed: int
    deterministic: bool

    def __call__(self) -> FixedHost:
        return FixedHost(self)


class FixedHost:
    """`control.ActorHost` of one policy."""

    version = (1, 0)

    def __init__(self, job: FixedActor) -> None:
        algorithm = find_algorithm(job.algorithm)
        module = bind_policy(algorithm.build_actor(job.spec, job.settings), job.policy.copy())
        needs = algorithm.needs(job.spec, job.settings)
        source = FixedPolicy(module=module, version=self.version)
        act = partial(TorchActor, source, job.spec, needs, plans=Plans(needs.window.out_hw))
        warm_up(act(np.random.default_rng(), deterministic=True), job.spec)
        rng = random_stream(job.seed, START.stream("actor"))
        self.actor = act(rng, deterministic=job.deterministic, steps_done=NO_WARM_UP)

    def poll(self) -> bool:
        """There never is another."""
        return False


# -- watching ----------------------------------------------------------------------------------------------------------


class Album:
    """An MP4 and a PNG of every episode, as the camera saw it, in a folder of their own."""

    def __init__(self, folder: Path, spec: TaskSpec) -> None:
        self._folder, self._spec = folder, spec
        self._frames: deque[tuple[int, Image]] = deque(maxlen=round(spec.camera_fps * 120))
        self._first = 0
        with disk_errors(folder, StartError):
            folder.mkdir()

    def add_frame(self, frame: Frame) -> None:
        """A camera frame, whether an episode runs or not."""
        self._frames.append((frame.id, frame.image.copy()))

    def begin(self, frame_id: int) -> None:
        """An episode begins with this frame."""
        self._first = frame_id

    def end(self, end: EpisodeEnd) -> None:
        """It is over: write its files."""
        images = [image for frame_id, image in self._frames if self._first <= frame_id <= end.frame_ids[-1]]
        if not images:
            return
        name = self._folder / f"episode-{end.episode:03}"
        with disk_errors(name):
            write_strip(name.with_suffix(".png"), images)
            video = Video(name.with_suffix(".mp4"), self._spec.camera_hw, self._spec.camera_fps)
            for image in images:
                video.add(image)
            video.close()
        self._frames.clear()


class _Watching:
    """`host.Learning` that learns nothing: it watches whole episodes, as many as are wanted."""

    def __init__(self, actor: FixedActor, episodes: int, album: Album, progress: Progress) -> None:
        self.ends: list[EpisodeEnd] = []
        self.actor, self.progress = actor, progress
        self._wanted, self._album = episodes, album
        self._end: Callable[[], None] = lambda: None
        self._whole = False  # the open episode was not cut by the run's end

    async def open(self, events: Events) -> Opening:
        self._end = lambda: events.end(None)
        return Opening(build_actor=self.actor, seed=self.actor.seed)

    def children(self) -> Sequence[ChildSpec]:
        return ()

    def add_frame(self, frame: Frame) -> None:
        self._album.add_frame(frame)

    def add(self, message: Step | EpisodeEnd) -> None:
        if isinstance(message, Step):
            if message.index == 0:
                self._album.begin(message.frame_ids[-1])
            self._whole = message.terminated or message.truncated
            return
        if self._whole and not self.done:
            self.ends.append(message)
            self._album.end(message)
        if self.done:
            self._end()

    @property
    def done(self) -> bool:
        """Whether all wanted episodes were seen."""
        return len(self.ends) >= self._wanted

    def ask(self, question: Asked) -> None:
        raise NotImplementedError("the actor is in the control process")

    def poll(self) -> dict[str, dict[str, float | str]]:
        return {}

    async def finish(self) -> None:
        pass

    def summary(self) -> dict[str, Any]:
        return {}


def _run_wall(plan: Plan, folder: RunFolder, watching: _Watching) -> Result:
    host = RobotHost(
        plan=plan, folder=folder, learning=watching, spans=new_spans(), start=START, progress=watching.progress
    )
    return host.run()


def _run_virtual(plan: Plan, folder: RunFolder, watching: _Watching) -> Result:
    spec, settings, progress = plan.task.spec, plan.settings, watching.progress
    world = load_attribute(plan.entry.world, "the simulated world")(settings.sim, settings.run.seed, spec, NS_PER_S)
    cycle = Cycle(
        task=plan.task,
        actor=watching.actor().actor,
        safety=settings.safety,
        rng=random_stream(settings.run.seed, START.stream("reset")),
        shrink=make_shrink(spec.image_hw),
    )

    def on_frames(frames: list[Frame]) -> None:
        for frame in frames:
            watching.add_frame(frame)
        progress.frame(frames[-1])

    run = VirtualRun(
        cycle=cycle,
        world=world,
        spec=spec,
        sensor_names=plan.entry.sensor_names,
        on_frames=on_frames,
        on_tick=lambda now_ns, inputs, tick: None,
    )
    error: RelodError | None = None
    try:
        for tick in run.ticks():
            for message in (tick.step, tick.end):
                if message is not None:
                    watching.add(message)
                    progress.add(message)
            if watching.done:
                break
    except RelodError as caught:
        error = caught
    progress.report("device", {"stopped_cleanly": 1.0})
    code = EXIT_OK if error is None else error.exit_code
    summary = progress.summary(None) | {"exit_code": code, "error": str(error) if error else ""}
    return Result(summary=summary, exit_code=code, error=error)


# -- figures -----------------------------------------------------------------------------------------------------------


def _figures(ends: Sequence[EpisodeEnd]) -> dict[str, Any]:
    """Returns and successes of the whole episodes; the mean's 95 % interval where there are several."""
    returns = [end.return_ for end in ends]
    low, high = (None, None)
    if len(returns) > 1:
        low, high = (float(end[0]) for end in bootstrap_interval(np.array(returns)[:, None]))
    return {
        "episodes": len(ends),
        "returns": returns,
        "lengths": [end.length for end in ends],
        "successes": sum(end.success for end in ends),
        "mean_return": float(np.mean(returns)) if returns else None,
        "mean_return_low": low,
        "mean_return_high": high,
    }
