"""`relod log info` and `relod log verify`: what is in a log, whether it is whole, and whether it makes sense."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import StartError
from ...types import EpisodeEnd, Step
from .format import LogSpec, find_segments, segment_name
from .reader import LogReader, find_log
from .walk import LogRecord

__all__ = ["LogReport", "check_log", "describe_log", "verify_log"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogReport:
    """What a check of a log found."""

    segments: int
    steps: int
    episodes: int
    torn_bytes: int  # of a record at the very end that is not whole: usual while, or after, it was being written
    faults: list[str]


def describe_log(run: Path) -> dict[str, Any]:
    """The summary of a run's log; `StartError` when it has none that can be read."""
    return asdict(LogReader(find_log(run)).summary())


def check_log(run: Path) -> tuple[dict[str, Any], list[str]]:
    """The report on a run's log, and the faults in it; `StartError` when it has none that can be read."""
    report = verify_log(find_log(run))
    return asdict(report), report.faults


def verify_log(folder: Path) -> LogReport:
    """Read everything: checksums, frames, the order of steps, and what the ends of episodes say about their steps.

    Raises:
        StartError: no log in `folder`, or none that can be read.
    """
    reader = LogReader(folder)
    segments = find_segments(folder)
    checks: dict[int, _StreamCheck] = {}
    faults: list[str] = []
    steps = episodes = 0
    for record in reader.iterate():
        steps += isinstance(record.message, Step)
        episodes += isinstance(record.message, EpisodeEnd)
        if record.stream not in checks:
            checks[record.stream] = _StreamCheck(reader.spec, mid_episode=min(segments) > 1)
        where = f"{segment_name(record.position.segment)}, record ending at byte {record.position.offset}"
        faults += [f"{where}: stream {record.stream}: {fault}" for fault in checks[record.stream].faults_of(record)]
    return LogReport(
        segments=len(segments),
        steps=steps,
        episodes=episodes,
        torn_bytes=reader.torn_bytes,
        faults=[*reader.damage, *faults],
    )


class _StreamCheck:
    """One robot's records, in order."""

    def __init__(self, spec: LogSpec, *, mid_episode: bool) -> None:
        self._spec = spec
        self._mid_episode = mid_episode  # what comes next may belong to an episode whose beginning is not known
        self._last: Step | None = None  # of the open episode
        self._return: float | None = None  # of the open episode so far; None when its beginning is not known
        self._decoded: tuple[int, ...] = ()  # frames that the record before named

    def faults_of(self, record: LogRecord) -> Iterator[str]:
        message = record.message
        if message is None:
            self._last, self._mid_episode = None, True
            return
        yield from self._observation(record, message)
        if isinstance(message, Step):
            yield from self._step(message)
        else:
            yield from self._end(message)

    def _observation(self, record: LogRecord, message: Step | EpisodeEnd) -> Iterator[str]:
        for name, size, due in (
            ("frames", len(message.frame_ids), self._spec.k),
            ("proprio", len(message.proprio), len(self._spec.proprio_names)),
            ("action", len(message.action) if isinstance(message, Step) else None, len(self._spec.action_names)),
        ):
            if size not in (due, None):
                yield f"{name} has {size} entries and should have {due}"
        for frame_id in set(message.frame_ids).difference(self._decoded):
            try:
                record.frames[frame_id]
            except StartError as error:
                yield error.message
        self._decoded = message.frame_ids

    def _step(self, step: Step) -> Iterator[str]:
        last = self._last
        if last is None or step.episode != last.episode:
            if last is not None:
                yield f"episode {last.episode} has no end"
            if step.index != 0 and not self._mid_episode:
                yield f"episode {step.episode} begins with index {step.index}"
            self._return = 0.0 if step.index == 0 else None
        elif step.index != last.index + 1:
            yield f"index {step.index} of episode {step.episode} follows index {last.index}"
            self._return = None
        if self._return is not None:
            self._return += step.reward
        self._last, self._mid_episode = step, False

    def _end(self, end: EpisodeEnd) -> Iterator[str]:
        last, total = self._last, self._return
        if last is None and not self._mid_episode:
            yield f"an end of episode {end.episode} without its steps"
        if last is not None and end.episode != last.episode:
            yield f"the end of episode {end.episode} follows a step of episode {last.episode}"
        elif last is not None:
            if end.length != last.index + 1:
                yield f"episode {end.episode} has {last.index + 1} steps, and its end says {end.length}"
            if total is not None and not math.isclose(total, end.return_, rel_tol=1e-9, abs_tol=1e-9):
                yield f"episode {end.episode} has return {total}, and its end says {end.return_}"
            if end.terminated != last.terminated:
                yield f"episode {end.episode}: the last step and the end differ in `terminated`"
        self._last, self._mid_episode = None, False
