"""The experience log of a run, written: segment files in `RUN/log/`, appended to as experience is accepted.

What a call of `append`, `close_episode` or `cut` has returned for is in the kernel: it survives the death of this
process, kill -9 included. Full segments are synced to the disk, and so is everything at `sync`: that survives a power
cut. The format is in `format.py`, reading in `reader.py`.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

from ...errors import SafetyStop, StartError
from ...types import EpisodeEnd, Image, Step
from ..rundir import Appender, disk_errors, sync_folder
from .codec import make_codec
from .format import (
    EncodedFrame,
    LogPosition,
    LogSpec,
    SegmentHeader,
    find_segments,
    pack_cut,
    pack_frame,
    pack_header,
    pack_message,
    segment_name,
)
from .resume import cut_back

__all__ = ["SEGMENT_BYTES", "LogWriter"]

SEGMENT_BYTES = 64 << 20  # 40 s of raw 160x120 at 30 Hz

Frames: TypeAlias = Mapping[int, Image | EncodedFrame]  # by id; an `Image` in raw logs only, its stamp is unknown: 0


class _OpenSegment:
    """The segment that is being written."""

    def __init__(self, file: Appender, number: int) -> None:
        self.file, self.number = file, number
        self.has_records = False  # beside the header
        self.frames: dict[tuple[int, int], int] = {}  # captured_ns of the frames it holds, by stream and id

    @classmethod
    def create(cls, folder: Path, header: SegmentHeader) -> _OpenSegment:
        file = Appender(folder / segment_name(header.segment), new=True)
        try:
            file.append(pack_header(header))
        except OSError:
            file.close()
            file.path.unlink(missing_ok=True)
            raise
        return cls(file, header.segment)

    @property
    def size_bytes(self) -> int:
        return self.file.size_bytes

    def append(self, data: bytes) -> None:
        """Write all of it or, with an `OSError`, nothing."""
        self.file.append(data)
        self.has_records = True

    def sync_and_close(self) -> None:
        try:
            self.file.sync()
        finally:
            self.file.close()


@dataclass(frozen=True, slots=True)
class _FullSegment:
    path: Path
    size_bytes: int
    env_steps: int  # environment steps up to its end


class LogWriter:
    """The one writer of a log; a context manager. `create` begins a log, `resume` goes on with one.

    The first write that fails takes back what it wrote in part and raises `SafetyStop`; later calls do nothing.
    """

    def __init__(
        self,
        folder: Path,
        spec: LogSpec,
        open_segment: _OpenSegment,
        full: deque[_FullSegment],
        *,
        env_steps: int,
        segment_bytes: int,
        limit_bytes: int | None,
    ) -> None:
        self.spec = spec
        self.env_steps = env_steps  # environment steps in the log, deleted segments included
        self.failed = False  # a write failed; later ones do nothing
        self._folder, self._open, self._full = folder, open_segment, full
        self._full_bytes = sum(segment.size_bytes for segment in full)
        self._segment_bytes, self._limit_bytes = segment_bytes, limit_bytes
        self._codec = make_codec(spec.codec, image_hw=spec.image_hw)
        self._needed_from = 0
        self._syncer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="log-sync")
        self._syncing: Future[None] | None = None  # the newest full segment's way to the disk

    @classmethod
    def create(
        cls, folder: Path, spec: LogSpec, *, segment_bytes: int = SEGMENT_BYTES, limit_bytes: int | None = None
    ) -> LogWriter:
        """Begin a log in `folder`, which is made if need be.

        Args:
            segment_bytes: a segment ends before it grows beyond this, unless its first step alone does.
            limit_bytes: above this the oldest segments are deleted, as far as `keep_from` allows; None = never.

        Raises:
            StartError: the folder holds a log, or cannot be written.
        """
        if find_segments(folder):
            raise StartError(f"{folder} holds an experience log already", "resume it, or choose another folder")
        with disk_errors(folder, StartError):
            folder.mkdir(parents=True, exist_ok=True)
            segment = _OpenSegment.create(folder, SegmentHeader(segment=1, env_steps=0, spec=spec))
        return cls(folder, spec, segment, deque(), env_steps=0, segment_bytes=segment_bytes, limit_bytes=limit_bytes)

    @classmethod
    def resume(
        cls,
        folder: Path,
        spec: LogSpec,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        limit_bytes: int | None = None,
        position: LogPosition | None = None,
    ) -> LogWriter:
        """Go on with the log in `folder`: at `position`, deleting what lies after it, or at the last whole record.

        Given the same calls and sizes, it writes the same bytes as a writer that was never interrupted.

        Raises:
            StartError: no log, another spec, damage before the position, or a position that the log does not have;
                nothing was changed. Or a file cannot be read or written.
        """
        surveys = cut_back(folder, spec, position)
        if not surveys:
            return cls.create(folder, spec, segment_bytes=segment_bytes, limit_bytes=limit_bytes)
        last = surveys[-1]
        full = deque(_FullSegment(survey.path, survey.end, survey.env_steps) for survey in surveys[:-1])
        with disk_errors(last.path, StartError):
            segment = _OpenSegment(Appender(last.path), last.header.segment)
        segment.has_records, segment.frames = last.has_records, last.frames
        return cls(
            folder,
            spec,
            segment,
            full,
            env_steps=last.env_steps,
            segment_bytes=segment_bytes,
            limit_bytes=limit_bytes,
        )

    # -- writing -------------------------------------------------------------------------------------------------------

    def append(self, step: Step, frames: Frames, stream: int = 0) -> None:
        """Add a step of a robot, after those of the frames it names that the segment does not hold yet.

        Raises:
            SafetyStop: the first time that the log cannot be written.
            ValueError: a frame it names is neither in `frames` nor in the segment, or not of the log's size.
        """
        self._add(stream, step, frames)

    def close_episode(self, end: EpisodeEnd, frames: Frames, stream: int = 0) -> None:
        """Add the end of the robot's episode; raises as `append` does."""
        self._add(stream, end, frames)

    def cut(self, stream: int = 0) -> None:
        """Say that what the robot's open episode came to is unknown; raises `SafetyStop` as `append` does."""
        if not self.failed:
            self._write([pack_cut(stream)])

    def sync(self) -> None:
        """Wait until everything is on the disk; `SafetyStop` when that fails for the first time."""
        if self.failed:
            return
        with self._guarded():
            self._finish_syncing()
            self._open.file.sync()
            sync_folder(self._folder)

    def close(self) -> None:
        """Sync and close; call it once. Raises `SafetyStop` as `sync` does."""
        try:
            self.sync()
        finally:
            self._syncer.shutdown()
            self._open.file.close()

    def keep_from(self, env_step: int) -> None:
        """Allow the size limit to delete segments all of whose steps are older than the run's step `env_step`.

        Steps count from 0. Until the first call everything is kept.
        """
        self._needed_from = env_step
        self._delete_oldest()

    @property
    def position(self) -> LogPosition:
        """The end of what was written."""
        return LogPosition(segment=self._open.number, offset=self._open.size_bytes, env_steps=self.env_steps)

    @property
    def size_bytes(self) -> int:
        """Size of all segments in the folder."""
        return self._full_bytes + self._open.size_bytes

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, stream: int, message: Step | EpisodeEnd, frames: Frames) -> None:
        if self.failed:
            return
        last = pack_message(stream, message)
        records, stamps = self._new_frames(stream, message.frame_ids, frames)
        if self._open.size_bytes + sum(map(len, records)) + len(last) > self._segment_bytes and self._open.has_records:
            self._roll()
            records, stamps = self._new_frames(stream, message.frame_ids, frames)
        self._write([*records, last])
        self._open.frames |= stamps
        self.env_steps += isinstance(message, Step)

    def _new_frames(
        self, stream: int, frame_ids: tuple[int, ...], frames: Frames
    ) -> tuple[list[bytes], dict[tuple[int, int], int]]:
        """Records and stamps of the named frames that the open segment does not hold.

        A camera that is started again may count from 1 again: an id with another stamp is another frame.
        """
        records: list[bytes] = []
        stamps: dict[tuple[int, int], int] = {}
        for frame_id in frame_ids:
            key, given = (stream, frame_id), frames.get(frame_id)
            held_ns = stamps.get(key, self._open.frames.get(key))
            if given is None and held_ns is None:
                raise ValueError(f"frame {frame_id} is neither given nor in the segment")
            if given is None:
                continue
            frame = given if isinstance(given, EncodedFrame) else self._bare(given)
            if frame.captured_ns != held_ns:
                records.append(pack_frame(stream, frame_id, frame))
                stamps[key] = frame.captured_ns
        return records, stamps

    def _bare(self, image: Image) -> EncodedFrame:
        if self.spec.codec != "raw":  # encoded here, its pixels would not be those that the replay got
            raise ValueError(f"a {self.spec.codec} log takes frames that are encoded already")
        return EncodedFrame(captured_ns=0, data=self._codec.encode(image))

    def _write(self, records: list[bytes]) -> None:
        with self._guarded():
            self._open.append(b"".join(records))
        if self._limit_bytes is not None and self.size_bytes > self._limit_bytes:
            self._delete_oldest()

    def _roll(self) -> None:
        """Go on in a new segment. The full one is synced in another thread: 64 MiB may take a card seconds."""
        full = self._open
        with self._guarded():
            self._finish_syncing()
            header = SegmentHeader(segment=full.number + 1, env_steps=self.env_steps, spec=self.spec)
            self._open = _OpenSegment.create(self._folder, header)
            self._syncing = self._syncer.submit(full.sync_and_close)
        self._full.append(_FullSegment(full.file.path, full.size_bytes, self.env_steps))
        self._full_bytes += full.size_bytes

    def _finish_syncing(self) -> None:
        if self._syncing is not None:
            syncing, self._syncing = self._syncing, None
            syncing.result()

    def _delete_oldest(self) -> None:
        """Delete segments, oldest first, until the log is within its limit or the next one is still needed."""
        if self.failed or self._limit_bytes is None:
            return
        while self._full and self.size_bytes > self._limit_bytes and self._full[0].env_steps <= self._needed_from:
            oldest = self._full.popleft()
            with self._guarded():
                oldest.path.unlink(missing_ok=True)
            self._full_bytes -= oldest.size_bytes

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            with disk_errors(self._open.file.path):
                yield
        except SafetyStop:
            self.failed = True
            raise
