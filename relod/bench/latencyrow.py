"""What `relod bench latency` knows of a mode: the figures a run tells of itself, and what its spans show.

What counts is the measured stretch: from the learner's first update on, as nothing competes with the cycle before, or
from `latency.UPDATE_LIMIT_S` after the first step, should there be none by then.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import StartError
from ..runtime.clock import NS_PER_MS
from ..runtime.spans import Stage
from ..runtime.timing import AGREEMENT, Samples, Spans, percentiles, policy_lag, stage_samples, summarise

__all__ = ["DOCUMENTED", "FIGURES", "Lines", "ModeRow", "Stretch", "told"]

DOCUMENTED = (
    *("rtt_ms", "answer_ms", "act_ms", "cycle_lateness_ms", "sentinel_ms", "overruns", "overruns_not_shared"),
    *("late_actions", "policy_age_ms", "steps", "clock_offset_ms", "clock_uncertainty_ms"),
)
OF_LINK = ("clock_offset_ms", "clock_uncertainty_ms")
RATES = {"updates_per_s": "updates", "uplink_bytes_per_s": "link.uplink_bytes"} | {
    "downlink_bytes_per_s": "link.downlink_bytes"
}
FIGURES = (*DOCUMENTED, *RATES, "cpu_cores")
MS_DIGITS = 4  # of raw samples: 0.1 us


@dataclass(slots=True, kw_only=True)
class ModeRow:
    """One mode: what is known of it so far. Figures are None until a run tells them, or where there is no link."""

    mode: str
    phase: str = ""  # what it is about before there are figures
    measured_s: float = 0.0
    measured_from: str = ""  # "first update", or "first step" where there was no update
    figures: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(FIGURES))
    samples: Samples = field(default_factory=dict)
    policy_lag: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))  # versions
    cycle_ms: float | None = None
    link: dict[str, Any] | None = None  # what an emulated link did, of `emulation.Relay.figures`
    exit_code: int | None = None  # of the robot's command; 0 when it ended as it was told to
    error: str = ""

    @property
    def cycle_left(self) -> float | None:
        """The share of the cycle that is left at the 99th percentile of deadline > wire; negative when none is."""
        act = percentiles(self.samples.get("deadline_to_wire", ()))
        return None if act is None or not self.cycle_ms else round(1 - act["p99"] / self.cycle_ms, 2) + 0.0

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        stages = {name: values for name, values in self.samples.items() if name != AGREEMENT}
        return {
            **self.figures,
            "measured_s": round(self.measured_s, 2),
            "measured_from": self.measured_from,
            "cycle_ms": self.cycle_ms,
            "cycle_left": self.cycle_left,
            "stages": summarise(stages),
            "policy_lag": percentiles(self.policy_lag),
            "agreement_ms": percentiles(self.samples.get(AGREEMENT, ())),
            "link": self.link,
            "exit_code": self.exit_code,
            "error": self.error,
            "samples_ms": {name: np.round(values, MS_DIGITS).tolist() for name, values in self.samples.items()},
        }


class Stretch:
    """The spans of a run from `start_ns` on, read anew from its folder each time.

    Args:
        robot, learner: the folders in which the commands make their runs; None for a learner that is not on this host.
        start_ns: of this host's clock, which both commands have.
    """

    def __init__(self, robot: Path, learner: Path | None, start_ns: int) -> None:
        self._robot, self._learner, self._start_ns = robot / "latest", learner and learner / "latest", start_ns

    def read(self, row: ModeRow, end_ns: int) -> None:
        """Put what ended in it, up to `end_ns`, into the row."""
        robot = self._spans(self._robot, end_ns)
        learner = self._spans(self._learner, end_ns) if self._learner is not None else None
        row.samples = stage_samples(robot, learner)
        if len((learner or robot).of(Stage.UPDATE)):
            row.policy_lag = policy_lag(robot, learner)
        deadlines_ns = robot.of(Stage.LATENESS)["start_ns"]
        if len(deadlines_ns) > 1:
            row.cycle_ms = round(float(np.median(np.diff(deadlines_ns))) / NS_PER_MS, 3)

    def _spans(self, folder: Path, end_ns: int) -> Spans:
        try:
            return Spans.read(folder).within(self._start_ns, end_ns)
        except StartError:  # nothing is written yet
            return Spans.none()


class Lines:
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

    @property
    def updating(self) -> bool:
        """The learner has made an update."""
        return bool(self.with_steps and self.with_steps[-1].get("updates"))

    def figures(self) -> dict[str, Any]:
        """The newest figures, and rates since the first."""
        newest = self.with_steps[-1]
        found = {name: told(newest[name]) for name in DOCUMENTED if name in newest}
        for name in ("rtt_ms", "answer_ms"):
            prefix = f"link.{name}."
            found[name] = told({key[len(prefix) :]: newest[key] for key in newest if key.startswith(prefix)})
        found |= {name: newest[f"link.{name}"] for name in OF_LINK if f"link.{name}" in newest}
        return found | {name: _rate(self.with_steps, key) for name, key in RATES.items()}


def told(figure: Any) -> Any:
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
