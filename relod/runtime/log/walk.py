"""One pass over the records of an experience log, and around damage; what `LogReader` iterates with. Reads no file."""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass

import msgspec

from ...errors import StartError
from ...types import EpisodeEnd, Image, Step
from ..messages import decode_record
from .codec import Codec
from .format import (
    DamageError,
    EncodedFrame,
    Kind,
    LogPosition,
    Record,
    SegmentHeader,
    read_record,
    segment_name,
    unpack_frame,
    unpack_stream,
)

__all__ = ["LogRecord", "StoredFrames", "Walk"]


class StoredFrames(Mapping[int, Image]):
    """The frames that a record names, by id, `(H, W, 3) uint8`, perhaps read-only; decoded each time one is asked for.

    Asking raises `StartError` when a frame's checksum is right and yet it is no image of the log's size.
    """

    def __init__(self, codec: Codec, frames: Mapping[int, EncodedFrame]) -> None:
        self._codec, self.encoded = codec, frames

    def __getitem__(self, frame_id: int) -> Image:
        try:
            return self._codec.decode(self.encoded[frame_id].data)
        except ValueError as error:
            raise StartError(
                f"frame {frame_id} of the log cannot be decoded: {error}", "its writer is at fault"
            ) from error

    def captured_ns(self, frame_ids: tuple[int, ...]) -> tuple[int, ...]:
        """When these frames were captured, 0 where that is not known."""
        return tuple(self.encoded[frame_id].captured_ns for frame_id in frame_ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self.encoded)

    def __len__(self) -> int:
        return len(self.encoded)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRecord:
    """A step, the end of an episode, or a cut."""

    kind: Kind  # STEP, END or CUT
    stream: int  # the robot
    message: Step | EpisodeEnd | None  # None for a cut
    frames: StoredFrames  # those the message names
    position: LogPosition  # after it
    env_steps: int  # environment steps of the run up to and with it


class Walk:
    """Where an iteration stands."""

    def __init__(self, codec: Codec, damage: list[str], *, env_steps: int | None) -> None:
        self._codec, self._damage = codec, damage
        self._env_steps = env_steps  # None: before the first header of a log whose beginning was deleted
        self._segment = 0
        self._open: set[int] = set()  # streams with an open episode
        self._lost: list[str] = []  # damage since the last header; the next one tells how many steps it cost
        self._frames: dict[tuple[int, int], EncodedFrame] = {}  # of the segment, by stream and id

    def begin(self, header: SegmentHeader) -> Iterator[LogRecord]:
        """A segment's header."""
        missing = 0 if self._env_steps is None else header.env_steps - self._env_steps
        if self._lost:
            *others, last = self._lost
            self._damage += [*others, f"{last}; {missing} steps lost"]
            self._lost.clear()
        elif missing:
            name = segment_name(header.segment)
            self._damage.append(f"{name} begins at step {header.env_steps}; {missing} steps before it are missing")
            yield from self._cut_all(0)
        self._segment, self._env_steps = header.segment, header.env_steps
        self._frames.clear()

    def records(self, data: bytes, at: int) -> Generator[LogRecord, None, int]:
        """The records of a segment from offset `at` on; returns the offset at which the whole ones end."""
        while (record := read_record(data, at)) is not None:
            try:
                yield from self._record(record, at)
            except (struct.error, msgspec.DecodeError) as error:
                raise DamageError(at, f"a record cannot be read: {error}") from error
            at = record.end
        return at

    def lose(self, number: int, error: DamageError) -> Iterator[LogRecord]:
        """The rest of a segment is damaged."""
        self._lost.append(f"{segment_name(number)} is {error}")
        self._segment = number
        yield from self._cut_all(error.offset)

    def finish(self) -> None:
        """There is no further segment."""
        self._damage += self._lost

    def _record(self, record: Record, at: int) -> Iterator[LogRecord]:
        match record.kind:
            case Kind.HEADER:
                raise DamageError(at, "a second header")
            case Kind.FRAME:
                stream, frame_id, frame = unpack_frame(record.payload)
                self._frames[stream, frame_id] = frame
            case Kind.CUT:
                stream, _ = unpack_stream(record.payload)
                self._open.discard(stream)
                yield self._cut(stream, record.end)
            case Kind.STEP | Kind.END:
                yield from self._message(record, at)

    def _message(self, record: Record, at: int) -> Iterator[LogRecord]:
        stream, rest = unpack_stream(record.payload)
        message = decode_record(rest)
        if isinstance(message, Step) != (record.kind is Kind.STEP):
            raise DamageError(at, f"a {record.kind.name} record holds something else")
        if isinstance(message, Step):
            self._env_steps = (self._env_steps or 0) + 1
        named = {frame_id: self._frames.get((stream, frame_id)) for frame_id in message.frame_ids}
        frames = {frame_id: frame for frame_id, frame in named.items() if frame is not None}
        if len(frames) < len(named):
            name, absent = segment_name(self._segment), sorted(named.keys() - frames.keys())
            self._damage.append(
                f"{name}: the {record.kind.name} at byte {at} names frame {absent[0]}, which is missing"
            )
            if stream in self._open:
                self._open.discard(stream)
                yield self._cut(stream, record.end)
            return
        if record.kind is Kind.STEP:
            self._open.add(stream)
        else:
            self._open.discard(stream)
        yield LogRecord(
            kind=record.kind,
            stream=stream,
            message=message,
            frames=StoredFrames(self._codec, frames),
            position=self._position(record.end),
            env_steps=self._env_steps or 0,
        )

    def _cut_all(self, offset: int) -> Iterator[LogRecord]:
        streams, self._open = sorted(self._open), set()
        for stream in streams:
            yield self._cut(stream, offset)

    def _cut(self, stream: int, offset: int) -> LogRecord:
        return LogRecord(
            kind=Kind.CUT,
            stream=stream,
            message=None,
            frames=StoredFrames(self._codec, {}),
            position=self._position(offset),
            env_steps=self._env_steps or 0,
        )

    def _position(self, offset: int) -> LogPosition:
        return LogPosition(segment=self._segment, offset=offset, env_steps=self._env_steps or 0)
