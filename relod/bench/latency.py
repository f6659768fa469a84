"""`relod bench latency`: one mode after the other, for real, as its user would run it; their figures side by side.

It starts whole commands and reads what they write: the run folder while they run, the JSON document at their end. What
is measured is what every run measures of itself; only processor time is added here.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EXIT_OK, EXIT_SIGINT, EXIT_START, SettingsError, StartError
from ..robots import registry
from ..runtime import provenance
from ..runtime.clock import NS_PER_S, monotonic_ns, sleep_s
from ..runtime.modes import MODES
from ..runtime.remote.linkprofile import profile_named
from ..runtime.request import one_of
from .children import terminable
from .commands import Command, Failed, free_port, processor_s
from .form import check_writable
from .latencyadvice import ModeFacts, advise
from .latencyplot import check_plot, write_plot
from .latencyrow import DOCUMENTED, Lines, ModeRow, Stretch, told
from .latencyview import BenchView

__all__ = ["LatencyRequest", "run_latency"]

POLL_S = 0.25
LOOK_EVERY_S = 1.0  # at the spans: a run writes them once a second
LOOK_SHARE = 0.02  # of a core, at most: what looks must not be what is seen
START_LIMIT_S = 180.0  # from nothing to the first step: two imports of torch on a busy small machine, and a reset
UPDATE_LIMIT_S = 15.0  # from the first step to the first update; a rollout may last minutes
# A run of seconds has no time for random actions. A policy comes with the first update, so not from the first step on.
LOAD = ("agent.init_steps=50",)
IMAGE = ("image_height", "image_width")  # settings of tasks, which presets change where robot and learner are one host
LEARNERS = ("agent", "server")  # sections of settings that only a learner has


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRequest:
    """What the user asked for.

    Raises:
        SettingsError: what is no mode, task, link or time, or a file that cannot be written.
        StartError: a picture is wanted, and there is no matplotlib.
    """

    task: str = "create"
    modes: tuple[str, ...] = tuple(MODES)
    link: str | None = None  # a link profile, for the modes that have a link
    seconds: float = 20.0  # of cycles in each mode; starting and ending come on top
    seed: int = 0
    learner: str | None = None  # one that runs already; else each mode that needs one gets its own
    token_file: Path | None = None
    robot: str | None = None  # these three are handed to `relod robot`
    camera: str | None = None
    allow_mixed: bool = False
    assignments: tuple[str, ...] = ()  # settings, handed to whichever end has them
    plot: Path | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        registry.task(self.task)
        for mode in self.modes:
            one_of(mode, tuple(MODES), "mode")
        if not self.modes or len(set(self.modes)) != len(self.modes):
            raise SettingsError(f"--modes {','.join(self.modes)!r}", f"name each once: {', '.join(MODES)}")
        if self.link is not None:
            profile_named(self.link)
        if not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise SettingsError(f"--seconds {self.seconds:g}", "give the time to measure each mode for, for example 20")
        if self.plot is not None:
            check_plot(self.plot)
            check_writable(self.plot, "--plot")
        check_writable(self.out)


def run_latency(request: LatencyRequest, arguments: Sequence[str] = ()) -> tuple[dict[str, Any], int]:
    """Run the modes; returns the JSON document and the exit code, which is not 0 only when every mode failed.

    Ends what it started also when it is interrupted. `StartError` when a file cannot be written after all.
    """
    rows = [ModeRow(mode=mode) for mode in request.modes]
    made_by = provenance.describe(["relod", *arguments])
    title = _title(request, made_by)
    with tempfile.TemporaryDirectory(prefix="relod-bench-") as folder, terminable(), BenchView(rows, title) as view:
        for row in rows:
            row.phase = "starting"
            try:
                _run_mode(request, row, Path(folder) / row.mode, view)
            except Failed as failure:
                row.error, row.exit_code = str(failure), failure.exit_code
            view.done(row)
    advice = advise([_facts(row) for row in rows], link=request.link, learner=request.learner)
    view.say(advice)
    document = {
        "benchmark": "latency",
        **made_by,
        "task": request.task,
        "robot": request.robot,
        "camera": request.camera,
        "link": request.link,
        "learner": request.learner,
        "seconds": request.seconds,
        "seed": request.seed,
        "advice": advice,
        "modes": {row.mode: row.to_dict() for row in rows},
    }
    if request.out is not None:
        _write(request.out, document)
    if request.plot is not None and any(row.samples for row in rows):
        write_plot(rows, title, request.plot)
    codes = [row.exit_code or EXIT_OK for row in rows]
    return document, codes[0] if all(row.error for row in rows) else EXIT_OK


def _run_mode(request: LatencyRequest, row: ModeRow, folder: Path, view: BenchView) -> None:
    with contextlib.ExitStack() as stack:
        learner, url, learners_runs = None, request.learner, None
        remote = not MODES[row.mode].place.learns_here
        if remote and url is None:
            address, learners_runs = f"127.0.0.1:{free_port()}", folder / "learner"
            learner, url = Command(_learner_arguments(request, address, folder), learners_runs), f"ws://{address}"
            stack.callback(learner.close)
        robot = Command(_robot_arguments(request, row.mode, url if remote else None, folder), folder / "robot")
        stack.callback(robot.close)
        commands = {"robot": robot, "learner": learner}
        stretch, end_ns = _measure(request, row, commands, (folder / "robot", learners_runs), view)
        row.phase = "ending"
        view.show(row, monotonic_ns())
        row.exit_code = robot.end()
        if learner is not None:
            learner.close()  # first, so that all spans are written
        stretch.read(row, end_ns)
        document = robot.document()
        if row.exit_code not in (EXIT_OK, EXIT_SIGINT) or document is None:
            raise Failed(robot.complaint(), row.exit_code or EXIT_START)
        row.exit_code = EXIT_OK
        row.figures |= {name: told(document[name]) for name in DOCUMENTED if name in document}
        row.link = document.get("relay")


def _measure(
    request: LatencyRequest,
    row: ModeRow,
    commands: dict[str, Command | None],
    runs: tuple[Path, Path | None],
    view: BenchView,
) -> tuple[Stretch, int]:
    """Follow the run until it has cycled long enough; returns the measured stretch, and its end in ns."""
    lines, stretch = Lines(runs[0]), None
    began_ns, stepped_ns, from_ns, look_ns = monotonic_ns(), 0, 0, 0
    before: dict[str, float] = {}
    while stretch is None or row.measured_s < request.seconds:
        for command in filter(None, commands.values()):
            command.check()
        lines.read()
        now_ns = monotonic_ns()
        if not stepped_ns and lines.with_steps:
            stepped_ns = now_ns
        if stretch is None and stepped_ns:
            row.phase = "awaiting an update"
            if lines.updating or now_ns - stepped_ns >= UPDATE_LIMIT_S * NS_PER_S:
                row.phase, row.measured_from = "measuring", "first update" if lines.updating else "first step"
                stretch, from_ns, before = Stretch(*runs, now_ns), now_ns, processor_s(commands)
        if stretch is not None:
            row.measured_s = (now_ns - from_ns) / NS_PER_S
            row.figures |= lines.figures()
            if now_ns >= look_ns and row.measured_s > 0:
                row.figures["cpu_cores"] = _cores(before, processor_s(commands), row.measured_s)
                stretch.read(row, now_ns)
                look_ns = now_ns + max(int(LOOK_EVERY_S * NS_PER_S), int((monotonic_ns() - now_ns) / LOOK_SHARE))
        elif not stepped_ns and now_ns - began_ns > START_LIMIT_S * NS_PER_S:
            robot = commands["robot"]
            assert robot is not None
            raise Failed(f"no step in {START_LIMIT_S:g} s: {robot.complaint()}", EXIT_START)
        view.show(row, now_ns)
        sleep_s(POLL_S)
    end_ns = monotonic_ns()
    row.measured_s = (end_ns - from_ns) / NS_PER_S
    row.figures["cpu_cores"] = _cores(before, processor_s(commands), row.measured_s)
    return stretch, end_ns


def _cores(before: dict[str, float], now: dict[str, float], seconds: float) -> dict[str, float]:
    """Processor time of each process, in cores."""
    return {name: round((now[name] - before.get(name, 0.0)) / seconds, 3) for name in sorted(now)}


# -- the commands ------------------------------------------------------------------------------------------------------


def _robot_arguments(request: LatencyRequest, mode: str, url: str | None, folder: Path) -> list[str]:
    found = ["robot", "--json", "--task", request.task, "--mode", mode, "--seed", str(request.seed)]
    if request.robot is not None:
        found += ["--robot", request.robot]
    if request.camera is not None:
        found += ["--camera", request.camera]
    if request.allow_mixed:
        found.append("--allow-mixed")
    assignments = [*LOAD, *_image_size(request.task), *request.assignments]
    if url is not None:
        assignments = [each for each in assignments if _section(each) not in LEARNERS]
        found += ["--learner", url, "--name", "bench", *_token(request)]
        if request.link is not None:
            found += ["--link", request.link]
    return [*found, *_settings([*assignments, f"run.folder={folder / 'robot'}", "run.metrics_every_s=1"])]


def _learner_arguments(request: LatencyRequest, address: str, folder: Path) -> list[str]:
    robots_own = {*registry.task(request.task).settings, "link", "camera", "run"}
    assignments = [each for each in (*LOAD, *request.assignments) if _section(each) not in robots_own]
    found = ["learner", "--json", "--listen", address, "--seed", str(request.seed), *_token(request)]
    return [*found, *_settings([*assignments, f"run.folder={folder / 'learner'}"])]


def _image_size(task: str) -> list[str]:
    """The task's own size of images, said outright, so that it is the same in every mode."""
    defaults = registry.task(task).sections()["task"]()
    return [f"task.{name}={getattr(defaults, name)}" for name in IMAGE if hasattr(defaults, name)]


def _section(assignment: str) -> str:
    return assignment.strip().partition(".")[0]


def _token(request: LatencyRequest) -> list[str]:
    return ["--token-file", str(request.token_file)] if request.token_file is not None else []


def _settings(assignments: Sequence[str]) -> list[str]:
    return [word for each in assignments for word in ("--set", each)]


# -- what is made of it ------------------------------------------------------------------------------------------------


def _title(request: LatencyRequest, made_by: dict[str, Any]) -> str:
    link = f", link {request.link}" if request.link else ""
    learner = f", learner {request.learner}" if request.learner else ""
    return f"{request.task}{link}{learner}; {made_by['cores']} cores of {made_by['cpu']}, {made_by['host']}"


def _facts(row: ModeRow) -> ModeFacts:
    figures = row.figures
    overruns, unshared = figures["overruns"] or 0, figures["overruns_not_shared"] or 0
    answer, age, sentinel = figures["answer_ms"], figures["policy_age_ms"], figures["sentinel_ms"]
    return ModeFacts(
        mode=row.mode,
        cycle_ms=row.cycle_ms,
        overruns=unshared,
        shared_overruns=max(0, overruns - unshared),
        late_actions=figures["late_actions"] or 0,
        steps=figures["steps"] or 0,
        cycle_left=row.cycle_left,
        updates_per_s=figures["updates_per_s"],
        policy_age_ms=age and age["p50"],
        answer_ms=answer and (answer["p50"], answer["p99"]),
        sentinel_ms=sentinel and sentinel["p99"],
        error=row.error,
    )


def _write(path: Path, document: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(document, allow_nan=False) + "\n")
    except OSError as error:
        raise StartError(f"{path} cannot be written: {error.strerror}", "name another file with --out") from error
