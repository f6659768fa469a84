"""The latency profiler: drains the span ring, keeps percentiles per stage, and says which overruns were the machine's.

An overrun counts as shared when the sentinel, which does nothing, was held up in the same moment by at least a
quarter of a cycle: then no code of ours could have kept the deadline.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy.typing as npt

from .clock import NS_PER_MS
from .spans import Histogram, SpanRing, Stage

__all__ = ["Profile"]

_REMEMBERED_STALLS = 4096


class Profile:
    """Percentiles of every stage, from spans drained about once a second.

    `keep(writer, spans)` is handed every drained block, for the run folder.
    """

    def __init__(
        self, spans: SpanRing, cycle_ns: int, keep: Callable[[str, npt.NDArray[Any]], None] = lambda name, rows: None
    ) -> None:
        self.histograms = {stage: Histogram() for stage in Stage}
        self.cycles = 0
        self.overruns = 0  # cycles whose command came after the next deadline
        self.unshared_overruns = 0  # of these, those in which the sentinel was on time
        self._spans, self._cycle_ns, self._keep = spans, cycle_ns, keep
        self._deadlines: dict[int, int] = {}
        self._late: deque[tuple[int, int]] = deque()  # (deadline, end) of overruns not yet judged
        self._stalls: deque[tuple[int, int]] = deque(maxlen=_REMEMBERED_STALLS)
        self._sentinel_ns = 0

    def drain(self, *, final: bool = False) -> None:
        """Take in what the processes have stamped since the last call."""
        for name in self._spans.writers:
            rows = self._spans.drain(name)
            if not len(rows):
                continue
            self._keep(name, rows)
            for stage in Stage:
                found = rows[rows["stage"] == stage]
                if len(found):
                    self.histograms[stage].add_ms((found["end_ns"] - found["start_ns"]) / NS_PER_MS)
            if name == "control":
                self._find_overruns(rows)
            if name == "sentinel":
                self._find_stalls(rows)
        self._judge(final)

    def summary(self) -> dict[str, dict[str, float]]:
        """`p50 p90 p99 p999 max` in ms, by the names used in `--json`."""
        names = {
            "cycle_lateness_ms": Stage.LATENESS,
            "act_ms": Stage.ACT,
            "decide_ms": Stage.DECIDE,
            "sensor_age_ms": Stage.SENSOR_AGE,
            "frame_age_ms": Stage.FRAME_AGE,
            "sentinel_ms": Stage.SENTINEL,
            "update_ms": Stage.UPDATE,
        }
        return {name: self.histograms[stage].summary_ms() for name, stage in names.items()}

    def _find_overruns(self, rows: npt.NDArray[Any]) -> None:
        for row in rows[rows["stage"] == Stage.LATENESS]:
            self._deadlines[int(row["index"])] = int(row["start_ns"])
        for row in rows[rows["stage"] == Stage.DECIDE]:
            deadline_ns = self._deadlines.pop(int(row["index"]), None)
            if deadline_ns is None:
                continue
            self.cycles += 1
            if int(row["end_ns"]) - deadline_ns > self._cycle_ns:
                self.overruns += 1
                self._late.append((deadline_ns, int(row["end_ns"])))

    def _find_stalls(self, rows: npt.NDArray[Any]) -> None:
        self._sentinel_ns = int(rows["end_ns"][-1])
        held_up = rows[rows["end_ns"] - rows["start_ns"] > self._cycle_ns // 4]
        self._stalls.extend(zip(held_up["start_ns"].tolist(), held_up["end_ns"].tolist(), strict=True))

    def _judge(self, final: bool) -> None:
        """Compare overruns with the sentinel's stalls once its spans reach past them."""
        while self._late and (final or self._late[0][1] < self._sentinel_ns):
            start_ns, end_ns = self._late.popleft()
            if not any(begin <= end_ns and end >= start_ns for begin, end in self._stalls):
                self.unshared_overruns += 1
