"""Going on with an experience log: check what is there, and cut it back to where it is to go on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ...errors import StartError
from ..rundir import disk_errors
from .format import (
    DamageError,
    Kind,
    LogPosition,
    LogSpec,
    SegmentHeader,
    find_segments,
    read_header,
    read_record,
    read_segment,
    segment_name,
    spec_difference,
    unpack_frame,
)

__all__ = ["Survey", "cut_back"]

_SEE = "`relod log verify` tells all that is wrong with the log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """A sound segment, as far as it is kept."""

    path: Path
    header: SegmentHeader
    has_records: bool  # beside the header
    end: int  # offset after the last whole record kept
    env_steps: int  # environment steps up to there
    frames: dict[tuple[int, int], int]  # captured_ns of the frames it holds, by stream and id


def cut_back(folder: Path, spec: LogSpec, position: LogPosition | None) -> list[Survey]:
    """Remove everything after `position`, or with None only a torn tail; returns the segments that are left.

    Every record that is kept is checked first. An empty list means that not even the first header was whole.

    Raises:
        StartError: no log, experience of another kind, damage, or a position the log does not have; nothing was
            changed. Or a file cannot be read or written.
    """
    segments = find_segments(folder)
    if not segments:
        raise StartError(f"{folder} holds no experience log", "give the folder of a run that has one")
    last = max(segments) if position is None else position.segment
    if last not in segments:
        raise StartError(f"{folder} has no {segment_name(last)}, in which the checkpoint's position lies", _SEE)
    surveys: list[Survey] = []
    for number in range(min(segments), last + 1):
        if number not in segments:
            raise StartError(f"{folder / segment_name(number)} is missing", _SEE)
        survey = _survey(segments[number], number, spec, position if number == last else None, torn_ok=number == last)
        if survey is None:
            break
        if surveys and survey.header.env_steps != surveys[-1].env_steps:
            raise StartError(
                f"{survey.path} begins at step {survey.header.env_steps}, and the segments before it end at"
                f" {surveys[-1].env_steps}",
                _SEE,
            )
        surveys.append(survey)
    if not surveys and last > 1:
        raise StartError(f"{segments[last]} is all there is of the log, and it has no whole header", _SEE)
    _remove_rest(segments, surveys)
    return surveys


def _survey(path: Path, number: int, spec: LogSpec, position: LogPosition | None, *, torn_ok: bool) -> Survey | None:
    """The segment up to `position` or its end; None when the bytes end within the header and that is allowed."""
    data = read_segment(path)
    if position is not None:
        if len(data) < position.offset:
            raise StartError(f"{path} ends at byte {len(data)}, before the position {position.offset}", _SEE)
        data, torn_ok = data[: position.offset], False
    try:
        survey = _scan(path, data)
    except DamageError as error:
        raise StartError(f"{path} is {error}", _SEE) from error
    if not torn_ok and (survey is None or survey.end != len(data)):
        at = 0 if survey is None else survey.end
        raise StartError(f"{path} is damaged: byte {len(data)} is no end of the record at byte {at}", _SEE)
    if survey is None:
        return None
    if survey.header.segment != number:
        raise StartError(f"{path} says that it is segment {survey.header.segment}", _SEE)
    if difference := spec_difference(survey.header.spec, spec):
        raise StartError(f"{path} holds other experience: {difference}", "resume with the settings of the run")
    if position is not None and survey.env_steps != position.env_steps:
        raise StartError(
            f"{path} holds {survey.env_steps} steps up to byte {position.offset}, and the checkpoint says"
            f" {position.env_steps}",
            "resume from a checkpoint of the same run",
        )
    return survey


def _scan(path: Path, data: bytes) -> Survey | None:
    """All whole records of a segment; None when the bytes end within the header. Raises `DamageError`."""
    begun = read_header(data)
    if begun is None:
        return None
    header, start = begun
    at, env_steps = start, header.env_steps
    frames: dict[tuple[int, int], int] = {}
    while (record := read_record(data, at)) is not None:
        if record.kind is Kind.STEP:
            env_steps += 1
        elif record.kind is Kind.FRAME:
            stream, frame_id, frame = unpack_frame(record.payload)
            frames[stream, frame_id] = frame.captured_ns
        at = record.end
    return Survey(path=path, header=header, has_records=at > start, end=at, env_steps=env_steps, frames=frames)


def _remove_rest(segments: dict[int, Path], surveys: list[Survey]) -> None:
    """Delete the segments after the surveyed ones, the newest first, and cut the last of those."""
    kept = {survey.path for survey in surveys}
    for number in sorted(segments, reverse=True):
        if segments[number] in kept:
            break
        with disk_errors(segments[number], StartError):
            segments[number].unlink()
    if surveys:
        with disk_errors(surveys[-1].path, StartError):
            os.truncate(surveys[-1].path, surveys[-1].end)
