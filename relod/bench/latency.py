"""`relod bench latency`: one mode after the other, for real, as its user would run it; their figures side by side.

It starts whole commands in sessions of their own and reads what they write: the run folder while they run, the JSON
document at their end. What is measured is what every run measures of itself; only processor time is added here.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import EXIT_OK, EXIT_SIGINT, EXIT_SIGTERM, EXIT_START, SettingsError
from ..robots import registry
from ..runtime import provenance
from ..runtime.clock import NS_PER_S, monotonic_ns, sleep_s
from ..runtime.modes import MODES
from ..runtime.remote.linkprofile import profile_named
from ..runtime.request import one_of
from .latencyview import BenchView

__all__ = ["FIGURES", "LatencyRequest", "ModeRow", "run_latency"]

RELOD = (sys.executable, "-m", "relod")
POLL_S = 0.25
START_LIMIT_S = 180.0  # from nothing to the first step: two imports of torch on a busy small machine, and a reset
END_LIMIT_S = 75.0  # a robot may drain for 30 s, a worker may finish for 30 s
# A run of seconds has no time for random actions. A policy comes with the first update, so not from the first step on.
LOAD = ("agent.init_steps=50",)
IMAGE = ("image_height", "image_width")  # settings of tasks, which presets change where robot and learner are one host
LEARNERS = ("agent", "server")  # sections of settings that only a learner has

DOCUMENTED = (
    *("rtt_ms", "answer_ms", "act_ms", "cycle_lateness_ms", "sentinel_ms", "overruns", "overruns_not_shared"),
    *("late_actions", "policy_age_ms", "steps"),
)
RATES = {"updates_per_s": "updates", "uplink_bytes_per_s": "link.uplink_bytes"} | {
    "downlink_bytes_per_s": "link.downlink_bytes"
}
FIGURES = (*DOCUMENTED, *RATES, "cpu_cores")


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRequest:
    """What the user asked for; raises `SettingsError` for what is no mode, task, link or time."""

    task: str = "create"
    modes: tuple[str, ...] = tuple(MODES)
    link: str | None = None  # a link profile, for the modes that have a link
    seconds: float = 20.0  # of cycles in each mode; starting and ending come on top
    seed: int = 0
    learner: str | None = None  # one that runs already; else each mode that needs one gets its own
    token_file: Path | None = None
    assignments: tuple[str, ...] = ()  # settings, handed to whichever end has them

    def __post_init__(self) -> None:
        registry.task(self.task)
        for mode in self.modes:
            one_of(mode, tuple(MODES), "mode")
        if not self.modes or len(set(self.modes)) != len(self.modes):
            raise SettingsError(f"--modes {','.join(self.modes)!r}", f"name each once: {', '.join(MODES)}")
        if self.link is not None:
            profile_named(self.link)
        if not self.seconds > 0:
            raise SettingsError(f"--seconds {self.seconds:g}", "give the time to measure each mode for, for example 20")


@dataclass(slots=True, kw_only=True)
class ModeRow:
    """One mode: what is known of it so far. Figures are None until a run tells them, or where there is no link."""

    mode: str
    phase: str = ""
    measured_s: float = 0.0
    figures: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(FIGURES))
    exit_code: int | None = None  # of the robot's command; 0 when it ended as it was told to
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**self.figures, "exit_code": self.exit_code, "error": self.error}


def run_latency(request: LatencyRequest, arguments: Sequence[str] = ()) -> tuple[dict[str, Any], int]:
    """Run the modes; returns the JSON document and the exit code, which is not 0 only when every mode failed.

    Ends what it started also when it is interrupted.
    """
    rows = [ModeRow(mode=mode) for mode in request.modes]
    with tempfile.TemporaryDirectory(prefix="relod-bench-") as folder, _terminable(), BenchView(rows) as view:
        for row in rows:
            row.phase = "starting"
            try:
                _run_mode(request, row, Path(folder) / row.mode, view)
            except _Failed as failure:
                row.error, row.exit_code = str(failure), failure.exit_code
            view.done(row)
    document = {
        "benchmark": "latency",
        **provenance.describe(["relod", *arguments]),
        "task": request.task,
        "link": request.link,
        "seconds": request.seconds,
        "seed": request.seed,
        "modes": {row.mode: row.to_dict() for row in rows},
    }
    codes = [row.exit_code or EXIT_OK for row in rows]
    return document, codes[0] if all(row.error for row in rows) else EXIT_OK


class _Failed(Exception):
    """A mode that could not be measured; the text is a line for people."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def _run_mode(request: LatencyRequest, row: ModeRow, folder: Path, view: BenchView) -> None:
    with contextlib.ExitStack() as stack:
        learner, url = None, request.learner
        remote = not MODES[row.mode].place.learns_here
        if remote and url is None:
            address = f"127.0.0.1:{_free_port()}"
            learner, url = _Command(_learner_arguments(request, address, folder), folder / "learner"), f"ws://{address}"
            stack.callback(learner.close)
        robot = _Command(_robot_arguments(request, row.mode, url if remote else None, folder), folder / "robot")
        stack.callback(robot.close)
        used = _measure(request, row, robot, learner, _Lines(folder / "robot"), view)
        row.exit_code = robot.end()
        document = robot.document()
        if row.exit_code not in (EXIT_OK, EXIT_SIGINT) or document is None:
            raise _Failed(robot.complaint(), row.exit_code or EXIT_START)
        row.exit_code = EXIT_OK
        row.figures |= {name: _told(document[name]) for name in DOCUMENTED if name in document}
        row.figures["cpu_cores"] = used


def _measure(
    request: LatencyRequest,
    row: ModeRow,
    robot: _Command,
    learner: _Command | None,
    lines: _Lines,
    view: BenchView,
) -> dict[str, float]:
    """Follow the run until it has cycled long enough; returns the processor time of each process, in cores."""
    began_ns, first_ns = monotonic_ns(), 0
    before: dict[str, float] = {}
    while row.measured_s < request.seconds:
        for command in (robot, learner):
            if command is not None and (code := command.process.poll()) is not None:
                raise _Failed(command.complaint(), code if code > 0 else EXIT_START)
        lines.read()
        now_ns = monotonic_ns()
        if not first_ns and lines.with_steps:
            first_ns, before = now_ns, _processor_s(robot, learner)
        if first_ns:
            row.measured_s = (now_ns - first_ns) / NS_PER_S
            row.figures |= lines.figures()
        elif now_ns - began_ns > START_LIMIT_S * NS_PER_S:
            raise _Failed(f"no step in {START_LIMIT_S:g} s: {robot.complaint()}", EXIT_START)
        view.show(row, now_ns)
        sleep_s(POLL_S)
    used = _processor_s(robot, learner)
    return {name: round((used[name] - before.get(name, 0.0)) / row.measured_s, 3) for name in sorted(used)}


# -- the commands ------------------------------------------------------------------------------------------------------


def _robot_arguments(request: LatencyRequest, mode: str, url: str | None, folder: Path) -> list[str]:
    found = ["robot", "--json", "--task", request.task, "--mode", mode, "--seed", str(request.seed)]
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Command:
    """A relod command in a session of its own, its output in files of `folder`."""

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        folder.mkdir(parents=True)
        self._out, self._err = folder / "stdout", folder / "stderr"
        self._name = f"relod {arguments[0]}"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [*RELOD, *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )

    def end(self) -> int:
        """Ask it to end, as Ctrl-C does, and wait; what is left after the limit is killed. Returns the exit code."""
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGINT)
            return self.process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise _Failed(f"{self._name} did not end within {END_LIMIT_S:g} s of Ctrl-C", EXIT_START) from None
        finally:
            if self.process.poll() is None:  # not waited for yet, so its number is still its own
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def close(self) -> None:
        """End it, however."""
        with contextlib.suppress(_Failed):
            self.end()

    def document(self) -> dict[str, Any] | None:
        """The JSON that it printed at its end; None when there is none."""
        with contextlib.suppress(ValueError):
            found = json.loads(self._out.read_bytes())
            return found if isinstance(found, dict) else None
        return None

    def complaint(self) -> str:
        """Its last line for people."""
        lines = [line for line in self._err.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].removeprefix("relod: ") if lines else f"{self._name} said nothing"


def _processor_s(robot: _Command, learner: _Command | None) -> dict[str, float]:
    """Seconds of processor time of both commands' processes so far, by name."""
    leaders = {robot.process.pid: "robot"} | ({learner.process.pid: "learner"} if learner is not None else {})
    used: dict[str, float] = defaultdict(float)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it is gone
            head, _, rest = stat.read_text(errors="replace").rpartition(") ")
            pid, _, name = head.partition(" (")
            fields = rest.split()  # proc(5), from the third on: state ppid pgrp session ... utime stime
            if int(fields[3]) in leaders and (int(pid) in leaders or name.startswith("relod-")):
                own = leaders.get(int(pid), name.removeprefix("relod-"))
                used[own] += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


# -- what a run writes while it runs -----------------------------------------------------------------------------------


class _Lines:
    """The lines of a run's metrics.jsonl, as they come.

    Args:
        runs: the folder in which the run makes its own.
    """

    def __init__(self, runs: Path) -> None:
        self._path = runs / "latest" / "metrics.jsonl"
        self._read_bytes = 0
        self.with_steps: list[dict[str, Any]] = []  # lines of figures from the first step on

    def read(self) -> None:
        """Take in what is new."""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._read_bytes)
            whole = file.read().rpartition(b"\n")
            self._read_bytes += len(whole[0]) + len(whole[1])
            lines = [json.loads(line) for line in whole[0].splitlines()]
            self.with_steps += [line for line in lines if line["steps"] and "overruns" in line]

    def figures(self) -> dict[str, Any]:
        """The newest figures, and rates since the first."""
        newest = self.with_steps[-1]
        found = {name: _told(newest[name]) for name in DOCUMENTED if name in newest}
        for name in ("rtt_ms", "answer_ms"):
            prefix = f"link.{name}."
            found[name] = _told({key[len(prefix) :]: newest[key] for key in newest if key.startswith(prefix)})
        return found | {name: _rate(self.with_steps, key) for name, key in RATES.items()}


def _told(figure: Any) -> Any:
    """The figure; None for percentiles of nothing."""
    return None if isinstance(figure, dict) and not figure.get("max") else figure


def _rate(lines: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Growth of a count per second, from the last line on in which it was 0."""
    zeros = sum(not line.get(key) for line in lines)
    counted = lines[max(0, zeros - 1) :]
    if zeros == len(lines) or len(counted) < 2:
        return None
    first, last = counted[0], counted[-1]
    return round(float((last[key] - first.get(key, 0)) / (last["wall_s"] - first["wall_s"])), 2)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind this process, so that what it started ends with it."""

    def unwind(number: int, frame: FrameType | None) -> None:
        sys.exit(EXIT_SIGTERM)

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
