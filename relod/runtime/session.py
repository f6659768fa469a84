"""One run from plan to summary: its folder, what it goes on from, and the run on the wall clock."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from ..errors import RelodError, SettingsError
from . import provenance
from .curve import write_curve
from .host import Result
from .plan import Plan
from .progress import Progress
from .rundir import RunFolder
from .scheduling import PRIORITIES
from .spans import SpanRing
from .view import summary_line

__all__ = ["announce", "check_steps_left", "finish", "new_spans", "open_folder"]


def new_spans() -> SpanRing:
    """The ring of all processes of a robot host."""
    return SpanRing(("control", "device", "sentinel", "worker", "parent", "learner", "world"))


def announce(plan: Plan) -> None:
    """Say on stderr what will run and why."""
    print(f"relod: {plan.task_name}, {plan.mode}, {plan.clock} clock: {plan.device_text}", file=sys.stderr)
    if plan.settings.run.realtime:
        ranks = ", ".join(f"{name} {priority}" for name, priority in PRIORITIES.items())
        print(f"relod: real-time: SCHED_FIFO ({ranks}), memory locked", file=sys.stderr)
    seed = f"seed {plan.settings.run.seed}"
    if plan.remote is not None:
        print(f"relod: robot {plan.remote.name}, learner at {plan.remote.url}, {seed}", file=sys.stderr)
    else:
        learns = f"{plan.algorithm_name} with preset {plan.preset} ({plan.preset_reason})"
        print(f"relod: {learns}, {seed}", file=sys.stderr)


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
