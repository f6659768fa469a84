"""The files of an outbox: records that its memory has no room for, each written once and read back once, in order.

    outbox-000001.spool, outbox-000002.spool, ...

A file holds the records of an experience log's segment, without its header: frames before the first record that names
them, steps and ends of episodes, each with its checksums. No file needs another one. A file is deleted when it is read
back; at the end of a run those that are left hold what was not delivered, and `read_spool` reads them.
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import msgspec

from ...errors import SafetyStop
from ...types import EpisodeEnd, Step
from ..log.format import (
    DamageError,
    EncodedFrame,
    Kind,
    pack_frame,
    pack_message,
    read_record,
    unpack_frame,
    unpack_stream,
)
from ..messages import decode_record
from ..rundir import Appender, disk_errors

__all__ = ["Spool", "find_spool", "read_spool"]

_NAME = re.compile(r"outbox-(\d{6,})\.spool")
STREAM = 0  # of the only robot

Stored: TypeAlias = tuple[Step | EpisodeEnd, dict[int, EncodedFrame]]  # a record, and the frames it names by id


class Spool:
    """Records on disk, first in, first out; `folder` is made when the first one comes."""

    def __init__(self, folder: Path, *, limit_bytes: int, segment_bytes: int) -> None:
        self.records = 0
        self.size_bytes = 0
        self.trouble = ""  # why the disk refused the newest record; empty where it did not
        self._folder, self._limit_bytes, self._segment_bytes = folder, limit_bytes, segment_bytes
        self._files: deque[_File] = deque()  # only the last one is written
        self._number = 0

    def put(self, message: Step | EpisodeEnd, frames: Mapping[int, EncodedFrame]) -> bool:
        """Append a record; False when it would go beyond the limit, or when the disk refuses: see `trouble`."""
        file = self._files[-1] if self._files else None
        data = _pack(message, frames, file.stamps if file else {})
        if file is None or (file.records and file.size_bytes + len(data) > self._segment_bytes):
            file, data = None, _pack(message, frames, {})
        if self.size_bytes + len(data) > self._limit_bytes:
            return False
        try:
            with disk_errors(self._folder):
                file = file or self._begin()
                file.append(data, frames)
        except SafetyStop as error:
            self.trouble = error.message
            return False
        self.trouble = ""
        self.records += 1
        self.size_bytes += len(data)
        return True

    @property
    def oldest_bytes(self) -> int:
        """Size of what `take` reads next."""
        return self._files[0].size_bytes if self._files else 0

    def take(self) -> list[Stored]:
        """The records of the oldest file, which is deleted.

        Raises:
            SafetyStop: it is not there any more as it was written: something on this host is broken.
        """
        file = self._files.popleft()
        file.close()
        self.records -= file.records
        self.size_bytes -= file.size_bytes
        try:
            stored = list(_read(file.path))
            file.path.unlink()
        except (OSError, DamageError) as error:
            raise SafetyStop(f"{file.path} cannot be read back: {error}", "check the disk") from error
        if len(stored) != file.records:
            raise SafetyStop(f"{file.path} holds {len(stored)} records of {file.records}", "check the disk")
        return stored

    def keep(self, before: Iterable[Stored], after: Iterable[Stored]) -> None:
        """Close, leaving in the folder what is there, with these records before and after it.

        Raises:
            SafetyStop: the disk does not take them.
        """
        for file in self._files:
            file.close()
            if not file.records:
                file.path.unlink(missing_ok=True)
        for number, records in ((0, list(before)), (self._number + 1, list(after))):
            if records:
                with disk_errors(self._folder), contextlib.closing(self._create(number)) as file:
                    for message, frames in records:
                        file.append(_pack(message, frames, file.stamps), frames)

    def _begin(self) -> _File:
        file = self._create(self._number + 1)
        self._number += 1
        if self._files:
            self._files[-1].close()
        self._files.append(file)
        return file

    def _create(self, number: int) -> _File:
        self._folder.mkdir(parents=True, exist_ok=True)
        return _File(self._folder / f"outbox-{number:06}.spool")


class _File:
    """One file, open for appending; every method but `close` raises `OSError`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = 0
        self.stamps: dict[int, int] = {}  # captured_ns of the frames in it, by id; of two with one id, of the later
        self._file = Appender(path, new=True)
        self._closed = False

    @property
    def size_bytes(self) -> int:
        return self._file.size_bytes

    def append(self, data: bytes, frames: Mapping[int, EncodedFrame]) -> None:
        """Write what `_pack` made of a record and these frames, or nothing."""
        self._file.append(data)
        self.stamps |= {frame_id: frame.captured_ns for frame_id, frame in frames.items()}
        self.records += 1

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._file.close()


def find_spool(folder: Path) -> list[Path]:
    """The files of an outbox in a folder, in order; none when there is no such folder."""
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def read_spool(folder: Path) -> Iterator[Stored]:
    """What a run that is over did not deliver, in order; `OSError`, or `DamageError` where a file is not whole."""
    for path in find_spool(folder):
        yield from _read(path)


def _pack(message: Step | EpisodeEnd, frames: Mapping[int, EncodedFrame], stamps: Mapping[int, int]) -> bytes:
    """A record after those of its frames that a file with these stamps lacks."""
    new = [pack_frame(STREAM, i, frame) for i, frame in frames.items() if stamps.get(i) != frame.captured_ns]
    return b"".join([*new, pack_message(STREAM, message)])


def _read(path: Path) -> Iterator[Stored]:
    data, at = path.read_bytes(), 0
    frames: dict[int, EncodedFrame] = {}
    while (record := read_record(data, at)) is not None:
        try:
            if record.kind is Kind.FRAME:
                _, frame_id, frame = unpack_frame(record.payload)
                # Copied, so that no frame keeps all of its file in memory.
                frames[frame_id] = EncodedFrame(captured_ns=frame.captured_ns, data=bytes(frame.data))
            else:
                message = decode_record(unpack_stream(record.payload)[1])
                yield message, {frame_id: frames[frame_id] for frame_id in message.frame_ids}
        except (KeyError, struct.error, msgspec.DecodeError) as error:
            raise DamageError(at, f"a record cannot be read: {error}") from error
        at = record.end
    if at < len(data):
        raise DamageError(at, "the file ends within a record")
