"""The experience log, read: while it is written, after a crash, and around damage. The format is in `format.py`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import StartError
from ...types import Step
from .codec import make_codec
from .format import (
    HEADER_OFFSET,
    DamageError,
    LogPosition,
    LogSpec,
    SegmentHeader,
    find_segments,
    read_header,
    read_segment,
    segment_name,
    spec_difference,
)
from .walk import LogRecord, Walk

__all__ = ["LogReader", "LogRecord", "LogSummary", "find_log"]

HEADER_LIMIT_BYTES = 1 << 16  # a header is a few hundred bytes


def find_log(run: Path) -> Path:
    """The log's folder of a run's folder, or that folder itself; `StartError` when neither holds a log."""
    if not run.is_dir():
        raise StartError(f"there is no folder {run}", "give the folder of a run, for example runs/latest")
    for folder in (run / "log", run):
        if find_segments(folder):
            return folder
    raise StartError(f"{run} holds no experience log", "give the folder of a run that has one")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSummary:
    """What a log holds."""

    segments: int
    size_bytes: int
    codec: str
    task: str
    first_env_step: int  # those before it were deleted, to keep the size limit
    last_env_step: int
    steps: int
    frames: int
    streams: int
    episodes: int
    successes: int
    cuts: int
    policies: tuple[tuple[int, int], tuple[int, int]] | None  # lowest and highest (epoch, updates) that acted
    return_min: float | None  # of the episodes with an end
    return_median: float | None
    return_max: float | None
    torn_bytes: int  # after the last whole record
    damage: list[str]


class LogReader:
    """Reads a log; another process may be writing it. `damage` and `torn_bytes` tell what the last iteration met.

    Raises:
        StartError: no log in `folder`, none that can be read, or one of another spec than the one given.
    """

    def __init__(self, folder: Path, spec: LogSpec | None = None) -> None:
        self.damage: list[str] = []  # one line each
        self.torn_bytes = 0  # of a record that is not whole, at the end of the newest segment
        self._folder = folder
        self.spec = self._first_spec()
        if spec is not None and (difference := spec_difference(self.spec, spec)):
            raise StartError(f"{folder} holds other experience: {difference}", "give the log of the same task")
        self._codec = make_codec(self.spec.codec, image_hw=self.spec.image_hw)

    def iterate(self, from_env_steps: int = 0, until: LogPosition | None = None) -> Iterator[LogRecord]:
        """Steps, ends and cuts in the order in which they were written, up to what is there now or `until`.

        Starts with the first record of the segment that holds the run's step `from_env_steps`, counted from 0. A torn
        end of the newest segment is left out. Where anything else is not whole, the rest of its segment is left out,
        each open episode gets a cut, and `damage` a line.
        """
        self.damage, self.torn_bytes = [], 0
        newest = max(find_segments(self._folder), default=0)
        first, last = self._segment_of(from_env_steps), newest if until is None else min(newest, until.segment)
        walk = Walk(self._codec, self.damage, env_steps=0 if first == 1 else None)
        for number in range(first, last + 1):
            try:
                data = self._read(number)
                if until is not None and number == until.segment:
                    data = data[: until.offset]
                end = 0
                if (begun := self._header(number, data)) is not None:
                    header, start = begun
                    yield from walk.begin(header)
                    end = yield from walk.records(data, start)
                if number < newest and (end < len(data) or not end):
                    raise DamageError(end, "the file ends within a record")
                self.torn_bytes = len(data) - end
            except DamageError as error:
                yield from walk.lose(number, error)
        walk.finish()

    def summary(self) -> LogSummary:
        """Read all of the log and sum it up."""
        segments = find_segments(self._folder)
        size_bytes = sum(path.stat().st_size for path in segments.values())
        steps = frames = cuts = successes = 0
        first_step: int | None = None
        last_step = 0
        versions: list[tuple[int, int]] = []
        returns: list[float] = []
        newest_ids: dict[int, tuple[int, ...]] = {}  # by stream, those the record before it named
        for record in self.iterate():
            message, last_step = record.message, record.env_steps
            if message is None:
                cuts += 1
                continue
            frames += len(set(message.frame_ids).difference(newest_ids.get(record.stream, ())))
            newest_ids[record.stream] = message.frame_ids
            if isinstance(message, Step):
                steps += 1
                first_step = last_step - 1 if first_step is None else first_step
                versions = [min([*versions[:1], message.policy_version]), max([*versions[1:], message.policy_version])]
            else:
                returns.append(message.return_)
                successes += message.success
        return LogSummary(
            segments=len(segments),
            size_bytes=size_bytes,
            codec=self.spec.codec,
            task=self.spec.task,
            first_env_step=first_step or 0,
            last_env_step=last_step,
            steps=steps,
            frames=frames,
            streams=len(newest_ids),
            episodes=len(returns),
            successes=successes,
            cuts=cuts,
            policies=(versions[0], versions[1]) if versions else None,
            return_min=min(returns, default=None),
            return_median=statistics.median(returns) if returns else None,
            return_max=max(returns, default=None),
            torn_bytes=self.torn_bytes,
            damage=list(self.damage),
        )

    def _first_spec(self) -> LogSpec:
        numbers = find_segments(self._folder)
        if not numbers:
            raise StartError(f"{self._folder} holds no experience log", "give the folder of a run that has one")
        troubles: list[str] = []
        for number in numbers:
            try:
                begun = read_header(self._read(number, HEADER_LIMIT_BYTES))
            except DamageError as error:
                troubles.append(f"{segment_name(number)} is {error}")
                continue
            if begun is not None:
                return begun[0].spec
            troubles.append(f"{segment_name(number)} has no whole header")
        raise StartError(f"{self._folder} holds no log that can be read: {troubles[0]}", "it may be no log at all")

    def _segment_of(self, env_step: int) -> int:
        """The number of the newest segment that begins at or before the step; the oldest one's if none does."""
        numbers = list(find_segments(self._folder))
        for number in reversed(numbers[1:]):
            try:
                begun = self._header(number, self._read(number, HEADER_LIMIT_BYTES))
            except DamageError:
                continue
            if begun is not None and begun[0].env_steps <= env_step:
                return number
        return min(numbers, default=1)

    def _read(self, number: int, limit_bytes: int = -1) -> bytes:
        path = self._folder / segment_name(number)
        if not path.exists():
            raise DamageError(0, "the file is missing")
        return read_segment(path, limit_bytes)

    def _header(self, number: int, data: bytes) -> tuple[SegmentHeader, int] | None:
        begun = read_header(data)
        if begun is not None and begun[0].segment != number:
            raise DamageError(HEADER_OFFSET, f"the header says that it is segment {begun[0].segment}")
        if begun is not None and (difference := spec_difference(begun[0].spec, self.spec)):
            raise DamageError(HEADER_OFFSET, f"the header differs from the first one: {difference}")
        return begun
