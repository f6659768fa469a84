"""`relod bench report`: what runs that have been made say about their time, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StartError
from ..runtime.clock import NS_PER_MS
from ..runtime.spans import Stage
from ..runtime.timing import AGREEMENT, STAGES, Samples, Spans, percentiles, policy_lag, stage_samples
from .stagetable import Fact, format_stages

__all__ = ["RunTiming", "compare_runs", "format_runs"]

COUNTS = {  # of the run's summary, with a title
    "cycles": "cycles",
    "overruns": "overruns",
    "overruns_not_shared": "  not shared",
    "late_actions": "late actions",
    "steps": "steps",
    "updates": "updates",
}


@dataclass(frozen=True, slots=True)
class RunTiming:
    """A run of a robot, or of a learner, and where its time went."""

    folder: Path
    run: dict[str, Any]  # run.json
    robot: Spans
    learner: Spans | None  # of the learner's own run, where it is on this host
    offset_ns: int  # the learner's clock minus the robot's

    @classmethod
    def read(cls, folder: Path) -> RunTiming:
        """`StartError` for a folder that is no run's, or of a run that has no cycle in real time."""
        try:
            run = json.loads((folder / "run.json").read_bytes())
        except (OSError, ValueError) as error:
            raise StartError(f"{folder} is no run folder: {error}", "name one, for example runs/latest") from None
        robot = Spans.read(folder)
        if not len(robot.of(Stage.LATENESS)) and not len(robot.of(Stage.UPDATE)):
            raise StartError(f"{folder} has no cycle in real time", "virtual time has no latency; name another run")
        offset_ms = run.get("summary", {}).get("clock_offset_ms") or 0.0
        return cls(folder.resolve(), run, robot, _learner_of(run), round(offset_ms * NS_PER_MS))

    @property
    def title(self) -> str:
        """A few words; not unique."""
        return f"{self.run.get('task', '?')} {self.run.get('mode', 'learner')}"

    def samples(self) -> Samples:
        """Of every stage, in ms."""
        return stage_samples(self.robot, self.learner, offset_ns=self.offset_ns)

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        samples, summary = self.samples(), self.run.get("summary", {})
        return {
            "folder": str(self.folder),
            **{key: self.run.get(key) for key in ("task", "mode", "algorithm", "preset", "host", "cpu", "commit")},
            **{key: summary.get(key) for key in COUNTS},
            "stages": {info.name: percentiles(samples[info.name]) for info in STAGES},
            "agreement_ms": percentiles(samples[AGREEMENT]),
            "policy_lag": percentiles(policy_lag(self.robot, self.learner, offset_ns=self.offset_ns)),
        }


def _learner_of(run: dict[str, Any]) -> Spans | None:
    """Spans of the run of a robot's learner, when its folder is on this host; an empty set when it is not."""
    if run.get("learner_run_dir") is None:
        return None
    folder = Path(run["learner_run_dir"])
    try:
        found = json.loads((folder / "run.json").read_bytes())
        return Spans.read(folder) if found.get("host") == run.get("host") else Spans.none()
    except (OSError, ValueError, StartError):
        return Spans.none()


def compare_runs(folders: Sequence[Path]) -> list[RunTiming]:
    """All of them; `StartError` names the first that cannot be read."""
    return [RunTiming.read(folder) for folder in folders]


def format_runs(runs: Sequence[RunTiming]) -> str:
    """The stages of several runs side by side, in lines of at most 79 characters."""
    columns = {f"{number}": run.samples() for number, run in enumerate(runs, start=1)}
    names = [f"{number}: {run.title}, {run.folder.name}" for number, run in enumerate(runs, start=1)]
    facts: list[Fact] = [("policy's lag, updates", [_lag(run) for run in runs])]
    facts += [(title, [_count(run, key) for run in runs]) for key, title in COUNTS.items()]
    return "\n".join([*names, format_stages(columns, facts)])


def _lag(run: RunTiming) -> str:
    found = percentiles(policy_lag(run.robot, run.learner, offset_ns=run.offset_ns))
    return f"{found['p50']:.0f}/{found['p99']:.0f}" if found else ""


def _count(run: RunTiming, key: str) -> str:
    value = run.run.get("summary", {}).get(key)
    return "" if value is None else str(value)
