"""One run from plan to summary: on the wall clock through a `RobotHost`, in virtual time in this process."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from ..errors import EXIT_OK, RelodError
from ..robots.registry import load_attribute
from ..robots.vision import make_shrink
from ..seeds import random_stream
from ..types import Frame
from . import provenance
from .clock import NS_PER_S, monotonic_ns
from .curve import write_curve
from .cycle import Cycle, Inputs, Tick
from .host import ChildSpec, Result, RobotHost
from .learner import LearnerSide
from .plan import Plan
from .progress import Progress
from .rundir import RunFolder
from .spans import SpanRing
from .view import View, open_view, summary_line
from .virtual import VirtualRun, World

__all__ = ["announce", "new_spans", "open_folder", "run_virtual", "run_wall"]

SHOW_EVERY = 16  # cycles between two looks at the view in virtual time: 10 ms at full speed


def new_spans() -> SpanRing:
    """The ring of all processes of a robot host."""
    return SpanRing(("control", "device", "sentinel", "worker"))


def announce(plan: Plan) -> None:
    """Say on stderr what will run and why."""
    print(f"relod: {plan.task_name}, {plan.mode}, {plan.clock} clock: {plan.device_text}", file=sys.stderr)
    print(
        f"relod: {plan.algorithm_name} with preset {plan.preset} ({plan.preset_reason}), seed {plan.settings.run.seed}",
        file=sys.stderr,
    )


@contextlib.contextmanager
def open_folder(plan: Plan, arguments: tuple[str, ...]) -> Iterator[RunFolder]:
    """The run's folder, open for writing."""
    content = {
        **provenance.describe(["relod", *arguments]),
        "task": plan.task_name,
        "mode": plan.mode,
        "clock": plan.clock,
        "algorithm": plan.algorithm_name,
        "algorithm_target": plan.algorithm_target,
        "preset": plan.preset,
        "preset_reason": plan.preset_reason,
        "simulated": plan.simulated,
        "device": plan.device_text,
        "world": plan.world,
    }
    name = f"{plan.task_name}-{plan.mode}-s{plan.settings.run.seed}"
    with RunFolder.create(name, plan.settings, content) as folder:
        yield folder


def run_wall(plan: Plan, folder: RunFolder, learner: LearnerSide, spans: SpanRing) -> Result:
    """Run on the wall clock with an update worker on this host."""
    record_to = folder.path / "policies" if plan.settings.run.record else None
    host = RobotHost(
        plan=plan,
        folder=folder,
        build_actor=learner.actor(record_to),
        sink=learner,
        children=[ChildSpec(name="worker", target="relod.runtime.worker:run_worker_process", job=learner.worker_job)],
        spans=spans,
    )
    return finish(folder, host.run(), host.progress)


def finish(folder: RunFolder, result: Result, progress: Progress) -> Result:
    """Complete the run folder, draw the curve, say a last line."""
    try:
        folder.finish(result.summary)
    except RelodError as error:
        if result.error is None:
            result.error, result.exit_code = error, error.exit_code
            result.summary |= {"exit_code": error.exit_code, "error": str(error)}
    print(f"relod: {summary_line(progress.state)}", file=sys.stderr)
    if not folder.failed and progress.steps:
        print(f"relod: {write_curve(folder.path, folder.path.name)}", file=sys.stderr)
    print(f"relod: run folder {folder.path}", file=sys.stderr)
    return result


def run_virtual(plan: Plan, folder: RunFolder, learner: LearnerSide) -> Result:
    """Run in virtual time: plant, camera, task, agent and updates in this process, one after the other."""
    run = _VirtualSession(plan, folder, learner)
    return finish(folder, run.run(), run.progress)


class _Signalled(BaseException):
    """Ctrl-C or SIGTERM came."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Within the block SIGINT and SIGTERM raise `_Signalled`."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        raise _Signalled(number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _VirtualSession:
    """What the processes of a wall-clock run do, in the slack of the virtual driver."""

    def __init__(self, plan: Plan, folder: RunFolder, learner: LearnerSide) -> None:
        spec, settings = plan.task.spec, plan.settings
        self.progress = Progress(plan, folder)
        self._plan, self._learner = plan, learner
        self._host = learner.actor()()
        world: World = load_attribute(plan.entry.world, "the simulated world")(
            settings.sim, settings.run.seed, spec, NS_PER_S
        )
        self._cycle = Cycle(
            task=plan.task,
            actor=self._host.actor,
            safety=settings.safety,
            rng=random_stream(settings.run.seed, "reset"),
            shrink=make_shrink(spec.image_hw),
            max_steps=plan.max_steps,
        )
        self._driver = VirtualRun(
            cycle=self._cycle,
            world=world,
            spec=spec,
            sensor_names=plan.entry.sensor_names,
            on_frames=self._on_frames,
            on_tick=self._on_tick,
        )
        self._loop = learner.inline(self._driver.clock)
        self._saved_ns = monotonic_ns()

    def run(self) -> Result:
        """All cycles; Ctrl-C ends the run in order."""
        code, error = EXIT_OK, None
        with open_view() as view, _signals_raise():
            try:
                for count, _ in enumerate(self._driver.ticks()):
                    if count % SHOW_EVERY == 0:
                        self._show(view)
            except _Signalled as signalled:
                code = 128 + signalled.number
                self._take(self._cycle.interrupt("interrupted"))
            except RelodError as caught:
                code, error = caught.exit_code, caught
                self._take(self._cycle.interrupt("safety stop"))
        self.progress.report("device", {"stopped_cleanly": 1.0})  # a plant that nobody advances stands
        self._learned()
        self._learner.save(self._loop)
        self.progress.write_metrics(None)
        summary = self.progress.summary(None) | {"exit_code": code, "error": str(error) if error else ""}
        return Result(summary=summary, exit_code=code, error=error)

    def _on_frames(self, frames: list[Frame]) -> None:
        for frame in frames:
            self._learner.add_frame(frame)
        self.progress.frame(frames[-1])

    def _on_tick(self, now_ns: int, inputs: Inputs, tick: Tick) -> None:
        self._take(tick)
        self._loop.run_updates()
        self._host.poll()

    def _take(self, tick: Tick) -> None:
        for message in (tick.step, tick.end):
            if message is not None:
                self._learner.add(message)
                self.progress.add(message)
        if tick.end is not None:
            self._learned()
            self.progress.write_metrics(None)
            if monotonic_ns() - self._saved_ns > self._plan.settings.learner.checkpoint_every_s * NS_PER_S:
                self._saved_ns = monotonic_ns()
                self._learner.save(self._loop)

    def _show(self, view: View) -> None:
        state = self.progress.state
        state.phase = self._cycle.phase.value
        state.elapsed_s = self.progress.wall_s
        view.show(state, monotonic_ns())

    def _learned(self) -> None:
        loop = self._loop
        values: dict[str, float | str] = {"updates": float(loop.updates), "replay_steps": float(len(loop.sampler))}
        if loop.updates:
            values |= {f"metric.{name}": value for name, value in loop.learner.metrics().items()}
        self.progress.learned(values)
        self.progress.report("control", {"rejected": float(self._cycle.rejected)})
