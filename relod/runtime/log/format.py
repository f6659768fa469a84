"""The experience log's file format: pure, bytes in and values out. docs/experience-log.md describes it byte by byte.

A segment file is a magic with the format's version and then records. The first record is the header, which names the
task; the others are frames, steps, ends of episodes, and cuts. Nothing here holds a wall time: equal experience gives
equal bytes.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TypeAlias

import msgspec

from ...errors import StartError
from ...types import EpisodeEnd, Step, TaskSpec
from ..messages import encode

__all__ = [
    "HEADER_OFFSET",
    "DamageError",
    "EncodedFrame",
    "Kind",
    "LogPosition",
    "LogSpec",
    "Record",
    "SegmentHeader",
    "find_segments",
    "pack_cut",
    "pack_frame",
    "pack_header",
    "pack_message",
    "read_header",
    "read_record",
    "read_segment",
    "segment_name",
    "spec_difference",
    "unpack_frame",
    "unpack_stream",
]

MAGIC = b"RELODLOG"
VERSION = 1

_VERSION = struct.Struct("<I")
_HEAD = struct.Struct("<IBI")  # payload's length, kind, CRC-32 of these five bytes
_HEAD_CHECKED = struct.Struct("<IB")
_CRC = struct.Struct("<I")
_STREAM = struct.Struct("<H")
_FRAME = struct.Struct("<Hqq")  # stream, id, captured_ns
_SEGMENT_NAME = re.compile(r"segment-(\d{6,})\.relodlog")

HEADER_OFFSET = len(MAGIC) + _VERSION.size

Bytes: TypeAlias = bytes | memoryview


class DamageError(Exception):
    """Bytes at `offset` of a segment that are no record, and no beginning of one either."""

    def __init__(self, offset: int, what: str) -> None:
        super().__init__(f"damaged at byte {offset}: {what}")
        self.offset = offset


class Kind(IntEnum):
    """What a record is."""

    HEADER = 0  # the first record of each segment: a SegmentHeader
    FRAME = 1  # a camera frame that the step or end after it names
    STEP = 2
    END = 3  # an episode's true last observation
    CUT = 4  # the open episode's outcome is unknown


# -- what the header says ----------------------------------------------------------------------------------------------


class LogSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What all experience in a log has in common."""

    task: str
    robot: str
    cycle_ns: int
    k: int  # camera frames in an observation
    image_hw: tuple[int, int]  # of the frames in the log: what the agent sees
    proprio_names: tuple[str, ...]
    action_names: tuple[str, ...]
    codec: str  # raw or jpeg

    @classmethod
    def for_task(cls, spec: TaskSpec, codec: str) -> LogSpec:
        """The log of a task's experience, its frames stored by `codec`."""
        return cls(
            task=spec.name,
            robot=spec.robot,
            cycle_ns=spec.cycle_ns,
            k=spec.frames,
            image_hw=spec.image_hw,
            proprio_names=spec.proprio_names,
            action_names=spec.action_names,
            codec=codec,
        )


class SegmentHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The first record of a segment."""

    segment: int  # the number in the file's name
    env_steps: int  # environment steps in the segments before it
    spec: LogSpec


class LogPosition(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A place between two records; a checkpoint keeps one."""

    segment: int
    offset: int  # in bytes from the start of the segment
    env_steps: int  # environment steps before it


def spec_difference(logged: LogSpec, wanted: LogSpec) -> str | None:
    """The first field in which two specs differ, in words, or None."""
    for name in LogSpec.__struct_fields__:
        there, here = getattr(logged, name), getattr(wanted, name)
        if there != here:
            return f"{name} is {there!r} in the log and {here!r} here"
    return None


def segment_name(number: int) -> str:
    """The file name of a segment."""
    return f"segment-{number:06}.relodlog"


def find_segments(folder: Path) -> dict[int, Path]:
    """The segments in a folder by number, in order; none when there is no such folder. Other files are passed over."""
    if not folder.is_dir():
        return {}
    matches = ((_SEGMENT_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def read_segment(path: Path, limit_bytes: int = -1) -> bytes:
    """What is in the file now, at most the first `limit_bytes`; `StartError` when it cannot be read.

    Not mapped: a map of a file that its writer cuts back is a bus error away.
    """
    try:
        with path.open("rb") as file:
            return file.read(limit_bytes)
    except OSError as error:
        raise StartError(f"{path} cannot be read: {error.strerror}", "check the file and its rights") from error


# -- records -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """A whole record whose checksums are right."""

    kind: Kind
    payload: memoryview
    end: int  # offset of the byte after it


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedFrame:
    """A camera frame as it lies in the log."""

    captured_ns: int
    data: Bytes  # what the log's codec made of the agent's image


def pack_header(header: SegmentHeader) -> bytes:
    """A segment's first bytes."""
    return MAGIC + _VERSION.pack(VERSION) + _pack(Kind.HEADER, msgspec.msgpack.encode(header))


def pack_frame(stream: int, frame_id: int, frame: EncodedFrame) -> bytes:
    """A FRAME record."""
    return _pack(Kind.FRAME, _FRAME.pack(stream, frame_id, frame.captured_ns), frame.data)


def pack_message(stream: int, message: Step | EpisodeEnd) -> bytes:
    """A STEP or END record."""
    kind = Kind.STEP if isinstance(message, Step) else Kind.END
    return _pack(kind, _STREAM.pack(stream), encode(message))


def pack_cut(stream: int) -> bytes:
    """A CUT record."""
    return _pack(Kind.CUT, _STREAM.pack(stream))


def _pack(kind: Kind, start: bytes, rest: Bytes = b"") -> bytes:
    checked = _HEAD_CHECKED.pack(len(start) + len(rest), kind)
    head = checked + _CRC.pack(zlib.crc32(checked))
    return b"".join((head, _CRC.pack(zlib.crc32(rest, zlib.crc32(start))), start, rest))


def read_record(data: Bytes, at: int) -> Record | None:
    """The record at offset `at` of a segment, or None where the bytes end before it is whole.

    The head has a checksum of its own, so that a wrong length is not taken for a record that is still being written.

    Raises:
        DamageError: there is something else.
    """
    start = at + _HEAD.size + _CRC.size
    if start > len(data):
        return None
    length, kind, head_crc = _HEAD.unpack_from(data, at)
    if zlib.crc32(data[at : at + _HEAD_CHECKED.size]) != head_crc:
        if not bytes(data[at:]).strip(b"\0"):  # what some file systems leave of an unsynced tail after a power cut
            return None
        raise DamageError(at, "a record's head has a wrong checksum")
    end = start + length
    if end > len(data):
        return None
    payload = memoryview(data)[start:end]
    if zlib.crc32(payload) != _CRC.unpack_from(data, start - _CRC.size)[0]:
        raise DamageError(at, "a record has a wrong checksum")
    if kind not in _KINDS:
        raise DamageError(at, f"a record is of the unknown kind {kind}")
    return Record(_KINDS[kind], payload, end)


_KINDS = {int(kind): kind for kind in Kind}


def read_header(data: Bytes) -> tuple[SegmentHeader, int] | None:
    """A segment's header and the offset of the record after it, or None where the bytes end before it is whole.

    Raises:
        DamageError: there is something else.
    """
    start = bytes(data[: len(MAGIC)])
    if start != MAGIC[: len(start)]:
        raise DamageError(0, "this is no segment of an experience log")
    if len(data) < HEADER_OFFSET:
        return None
    (version,) = _VERSION.unpack_from(data, len(MAGIC))
    if version != VERSION:
        raise DamageError(len(MAGIC), f"its format has version {version}, and {VERSION} is known")
    record = read_record(data, HEADER_OFFSET)
    if record is None:
        return None
    try:
        if record.kind is not Kind.HEADER:
            raise DamageError(HEADER_OFFSET, "the first record is no header")
        header = msgspec.msgpack.decode(record.payload, type=SegmentHeader)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamageError(HEADER_OFFSET, f"the header cannot be read: {error}") from error
    return header, record.end


def unpack_stream(payload: memoryview) -> tuple[int, memoryview]:
    """The stream of a STEP, END or CUT, and the rest of it; `struct.error` when it is too short."""
    return _STREAM.unpack_from(payload)[0], payload[_STREAM.size :]


def unpack_frame(payload: memoryview) -> tuple[int, int, EncodedFrame]:
    """Stream, id and contents of a FRAME; `struct.error` when it is too short."""
    stream, frame_id, captured_ns = _FRAME.unpack_from(payload)
    return stream, frame_id, EncodedFrame(captured_ns=captured_ns, data=payload[_FRAME.size :])
