"""One run from plan to summary: its folder, what it goes on from, and the run on the wall clock."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from ..errors import RelodError, SettingsError, StartError
from . import provenance
from .checkpoint import Checkpoint, newest_readable
from .curve import write_curve
from .host import ChildSpec, Result, RobotHost
from .learner import CHECKPOINTS, LearnerSide
from .plan import Plan, Start
from .progress import Progress
from .rundir import RunFolder
from .spans import SpanRing
from .view import summary_line

__all__ = ["announce", "check_steps_left", "find_checkpoint", "finish", "new_spans", "open_folder", "run_wall"]


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


def find_checkpoint(plan: Plan) -> Checkpoint | None:
    """What a resumed run's learner goes on from; None when the run is new, or ended before its first checkpoint.

    Raises:
        StartError: no checkpoint can be read, or the newest is of another run.
    """
    if plan.resume is None:
        return None
    checkpoint, path, problems = newest_readable(plan.resume.folder / CHECKPOINTS)
    if checkpoint is None or path is None:
        return None
    for problem in problems:
        print(f"relod: {problem}; going on with {path.name}", file=sys.stderr)
    saved = checkpoint.counters["extra"].get("run", {})
    wanted = plan.identity
    for name in {**wanted, **saved}:
        if saved.get(name) != wanted.get(name):
            there, here = saved.get(name, "not known"), wanted.get(name, "not known")
            raise StartError(
                f"checkpoint {path} belongs to another run: its {name} is {there}, not {here}",
                "put back the run's own, or use the version of relod that made it",
            )
    return checkpoint


@contextlib.contextmanager
def open_folder(plan: Plan, arguments: tuple[str, ...]) -> Iterator[RunFolder]:
    """The run's folder, open for writing; that of a resumed run waits for `RunFolder.go_on`."""
    session = provenance.describe(["relod", *arguments])
    if plan.resume is not None:
        with RunFolder.reopen(plan.resume.folder, plan.settings, session) as folder:
            yield folder
        return
    content = {
        **session,
        "task": plan.task_name,
        "mode": plan.mode,
        "clock": plan.clock,
        "algorithm": plan.algorithm_name,
        "algorithm_target": plan.algorithm_target,
        "preset": plan.preset,
        "preset_reason": plan.preset_reason,
        "simulated": plan.simulated,
        "device": plan.device_text,
        "robot": plan.robot,
        "camera": plan.camera,
        "world": plan.world,
    }
    name = f"{plan.task_name}-{plan.mode}-s{plan.settings.run.seed}"
    with RunFolder.create(name, plan.settings, content) as folder:
        yield folder


def run_wall(
    plan: Plan, folder: RunFolder, learner: LearnerSide, spans: SpanRing, checkpoint: Checkpoint | None
) -> Result:
    """Run on the wall clock with an update worker on this host."""
    record_to = folder.path / "policies" if plan.settings.run.record else None
    progress = Progress(plan, folder)
    start = _resume(plan, folder, learner, progress, checkpoint) if plan.resume is not None else Start()
    host = RobotHost(
        plan=plan,
        folder=folder,
        build_actor=learner.actor(start, record_to),
        sink=learner,
        children=[ChildSpec(name="worker", target="relod.runtime.worker:run_worker_process", job=learner.worker_job)],
        spans=spans,
        start=start,
        progress=progress,
    )
    return finish(folder, host.run(), host.progress)


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


def check_steps_left(plan: Plan, steps: int) -> None:
    """`SettingsError` when a resumed run has all its steps."""
    if plan.max_steps and steps >= plan.max_steps:
        raise SettingsError(
            f"the run has {steps} of {plan.max_steps} steps already", "give more: --steps counts from its beginning"
        )


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
