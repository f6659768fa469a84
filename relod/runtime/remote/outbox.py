"""What a robot has for its learner and has no ack for: in memory, and beyond its share of that in files.

The link asks for the next message whenever it can send one and hands back what the learner says. No sockets, no clock;
the only input and output are the spool's files. One thread uses it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

from ...errors import LinkLost, SafetyStop, StartError
from ...types import EpisodeEnd, Step
from ..log.format import EncodedFrame
from ..messages import Position, encode, position
from . import wire
from .spool import Spool, find_spool

__all__ = ["Outbox"]

FRAMES_KEPT = 256  # 8.5 s of camera: far more than records can be behind it
LEARNER_KEEPS_BYTES = 64 << 20  # of frames; of large ones that is fewer than FRAMES_KEPT
SEGMENT_BYTES = 4 << 20  # read back in one go: a few milliseconds
OVERHEAD_BYTES = 1024  # of a record's objects beside their bytes, an estimate

FrameKey: TypeAlias = tuple[int, int]  # id and captured_ns: a camera that is started again may count from 1 again

T = TypeVar("T")

BEFORE_ALL: Position = (-1, -1)


@dataclass(frozen=True, slots=True)
class _Record:
    seq: int
    message: Step | EpisodeEnd
    frames: dict[int, EncodedFrame]  # those it names, by id
    own_bytes: int  # without the frames

    @property
    def position(self) -> Position:
        return position(self.message)


class _Memory:
    """Counts what records in memory take; a frame that several of them name is kept, and counted, once."""

    def __init__(self) -> None:
        self.used_bytes = 0
        self._frames: dict[FrameKey, tuple[EncodedFrame, int]] = {}  # with the number of records that name it

    def cost(self, record: _Record) -> int:
        """Bytes that the record would add."""
        new = (frame for frame_id, frame in record.frames.items() if (frame_id, frame.captured_ns) not in self._frames)
        return record.own_bytes + sum(len(frame.data) for frame in new)

    def hold(self, record: _Record) -> None:
        self.used_bytes += self.cost(record)
        for frame_id, frame in record.frames.items():
            shared, users = self._frames.get((frame_id, frame.captured_ns), (frame, 0))
            self._frames[frame_id, frame.captured_ns] = shared, users + 1
            record.frames[frame_id] = shared  # not a second copy of its bytes, which came from the disk

    def release(self, record: _Record) -> None:
        for frame_id, frame in record.frames.items():
            _, users = self._frames[frame_id, frame.captured_ns]
            if users > 1:
                self._frames[frame_id, frame.captured_ns] = frame, users - 1
            else:
                del self._frames[frame_id, frame.captured_ns]
        self.used_bytes -= self.cost(record)


class Outbox:
    """Records in order, each until its ack, with the frames they name.

    Records wait in memory up to half of `memory_bytes`; further ones go to files in `folder`, up to `spool_bytes`, and
    come back in order. What the files cannot take, because they are at their limit or the disk refuses, goes into the
    other half of the memory, which is to hold the rest of an episode: `full` says that it is in use, and no further
    episode should begin. Where that does not suffice either, `add` raises `SafetyStop`: nothing is lost in silence.

    A learner may forget the frames before the first one that a record named, for ids grow, and those before the
    `frames_kept`, or 64 MiB, that it got last over a connection: such a frame is sent again before it is named.

    Args:
        folder: of the spool, made when it is needed.
        memory_bytes: for records and the frames they name; a single record may be larger.
        frames_kept: newest camera frames that a record may name; at least as many as one does.

    Raises:
        StartError: a former process left records in `folder`. They belong to its run and are not mixed into this one.
    """

    def __init__(self, folder: Path, *, memory_bytes: int, spool_bytes: int, frames_kept: int = FRAMES_KEPT) -> None:
        if find_spool(folder):
            raise StartError(f"{folder} holds records of another run that were not delivered", "choose a new folder")
        segment_bytes = min(SEGMENT_BYTES, memory_bytes // 16)
        self.sent = 0  # records sent at least once
        self.acked = 0  # records that the learner has, as far as is known here
        self.resent = 0  # times that a record was sent again
        self.duplicates = 0  # records that the learner had when a connection began, though their ack was lost
        self.dropped = 0  # records that were not taken, for a frame they name was lost
        self.backlog_max = 0
        self._added = 0
        self._lost_episode = -1  # the newest one that lacks a record
        self._share_bytes = memory_bytes // 2
        self._limit_bytes = memory_bytes - segment_bytes  # a segment that is read back fits in, too
        self._frames_kept = frames_kept
        self._recent: dict[int, EncodedFrame] = {}  # the newest camera frames, by id
        self._memory = _Memory()
        # Every record that is not acked is in one of these, the oldest first.
        self._flight: deque[_Record] = deque()  # sent over this connection
        self._waiting: deque[_Record] = deque()  # in memory
        self._spool = Spool(folder, limit_bytes=spool_bytes, segment_bytes=segment_bytes)
        self._overflow: deque[_Record] = deque()  # what the spool did not take
        self._learner_has: dict[int, int] = {}  # frames it still keeps, in the order sent: captured_ns by id
        self._acked_position = self._sent_position = BEFORE_ALL

    # -- from the robot ------------------------------------------------------------------------------------------------

    def add_frame(self, frame_id: int, frame: EncodedFrame) -> None:
        """Keep a camera frame for the records and observations that will name it."""
        _put_newest(self._recent, frame_id, frame, self._frames_kept)

    @property
    def frames(self) -> Mapping[int, EncodedFrame]:
        """The camera frames that a record may name."""
        return self._recent

    def add(self, message: Step | EpisodeEnd) -> bool:
        """Take the run's next record; False, and one more `dropped`, when a frame it names was lost.

        So is then the rest of its episode: within one, a learner takes no gaps.

        Raises:
            SafetyStop: there is no room for it.
        """
        if message.episode == self._lost_episode or not self._recent.keys() >= set(message.frame_ids):
            self._lost_episode = message.episode
            self.dropped += 1
            return False
        frames = {frame_id: self._recent[frame_id] for frame_id in message.frame_ids}
        self._place(_record(self._added + 1, message, frames))
        self._added += 1
        self.backlog_max = max(self.backlog_max, self.backlog)
        return True

    def _place(self, record: _Record) -> None:
        self._spool_overflow()
        used_bytes = self._memory.used_bytes + self._memory.cost(record)
        behind = bool(self._spool.records or self._overflow)
        if not behind and used_bytes <= self._share_bytes:
            queue = self._waiting
        elif not self._overflow and self._spool.put(record.message, record.frames):
            return
        elif used_bytes <= self._limit_bytes or not self._memory.used_bytes:
            queue = self._overflow if behind else self._waiting
        else:
            why = self._spool.trouble or "its files are at their limit"
            raise SafetyStop(
                f"{self.backlog} records wait for the learner and there is no room for the next: {why}",
                "see why the learner stays away; free some disk, or raise link.outbox_mib and link.spool_gib",
            )
        self._memory.hold(record)
        queue.append(record)

    def _spool_overflow(self) -> None:
        """Try the disk again: it, or the learner, may have made room."""
        while self._overflow and self._spool.put(self._overflow[0].message, self._overflow[0].frames):
            self._memory.release(self._overflow.popleft())

    # -- to the learner ------------------------------------------------------------------------------------------------

    def connected(self, position: Position | None) -> None:
        """Begin a connection to a learner whose newest record of this run is `position`: what comes after it is sent.

        Raises:
            LinkLost: the learner lacks records that it acked, or has some that were never sent.
        """
        there = BEFORE_ALL if position is None else position
        if there < self._acked_position:
            raise LinkLost(
                f"the learner has this run up to {_words(there)}, and acked it up to {_words(self._acked_position)}",
                "its log was cut or lost; begin another run",
            )
        if there > self._sent_position:
            raise LinkLost(
                f"the learner has this run up to {_words(there)}, and it was sent up to {_words(self._sent_position)}",
                "it mixes up two runs; begin another run",
            )
        self._waiting.extendleft(reversed(self._flight))
        self._flight.clear()
        self._learner_has.clear()
        while self._waiting and self._waiting[0].position <= there:
            self._settle(self._waiting.popleft())
            self.duplicates += 1

    def next(self) -> bytes | None:
        """The next message of this connection, or None: nothing to send before another record or ack."""
        if not self._waiting:
            self._refill()
        if not self._waiting:
            return None
        record = self._waiting[0]
        if (found := self._next_frame(record.frames)) is not None:
            frame_id, frame = found
            return wire.pack(wire.FrameHead(id=frame_id, captured_ns=frame.captured_ns), frame.data)
        self._flight.append(self._waiting.popleft())
        for frame_id in [each for each in self._learner_has if each < record.message.frame_ids[0]]:
            del self._learner_has[frame_id]
        if record.seq > self.sent:
            self.sent, self._sent_position = record.seq, record.position
        else:
            self.resent += 1
        return wire.pack(wire.RecordHead(seq=record.seq), encode(record.message))

    def frames_for(self, frame_ids: tuple[int, ...]) -> dict[int, EncodedFrame]:
        """Those of these camera frames that the learner does not have, to be sent now; `ValueError` when one was lost.

        In the order in which they must come: sending one may make the learner forget another.
        """
        lost = [frame_id for frame_id in frame_ids if frame_id not in self._recent]
        if lost:
            raise ValueError(f"frame {lost[0]} is not among the newest {self._frames_kept}")
        frames = {frame_id: self._recent[frame_id] for frame_id in frame_ids}
        lacking: dict[int, EncodedFrame] = {}
        while (found := self._next_frame(frames)) is not None:
            lacking[found[0]] = found[1]
        return lacking

    def ack(self, seq: int) -> None:
        """The learner has all records up to `seq` in its log; `ValueError` when that was never sent to it."""
        if seq > max(self.acked, self._flight[-1].seq if self._flight else 0):
            raise ValueError(f"an ack of record {seq}, which was not sent")
        while self._flight and self._flight[0].seq <= seq:
            self._settle(self._flight.popleft())

    # -- state ---------------------------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Whether the reserve is in use: begin no further episode."""
        return self._memory.used_bytes > self._share_bytes

    @property
    def empty(self) -> bool:
        """Whether everything is acked."""
        return not self.backlog

    @property
    def added(self) -> int:
        """Records that were taken; the number of the newest."""
        return self._added

    @property
    def backlog(self) -> int:
        """Records that are not acked."""
        return self._added - self.acked

    @property
    def backlog_bytes(self) -> int:
        """Bytes that they and their frames take, in memory and in files."""
        return self._memory.used_bytes + self._spool.size_bytes

    @property
    def trouble(self) -> str:
        """Why the disk refused the newest record it was given; empty where it did not."""
        return self._spool.trouble

    def close(self) -> None:
        """Close the files; what is not acked stays in them, in order, and `spool.read_spool` reads it.

        Raises:
            SafetyStop: the disk did not take what is in memory; it says how many records were lost.
        """
        before = [(record.message, record.frames) for record in (*self._flight, *self._waiting)]
        self._spool.keep(before, [(record.message, record.frames) for record in self._overflow])

    # -- inside --------------------------------------------------------------------------------------------------------

    def _settle(self, record: _Record) -> None:
        """A record that the learner has."""
        self._memory.release(record)
        self.acked, self._acked_position = record.seq, record.position

    def _refill(self) -> None:
        """Let what lies behind the memory move up, as far as there is room."""
        if not self._spool.records:
            self._waiting.extend(self._overflow)
            self._overflow.clear()
        elif not self._flight or self._memory.used_bytes + self._spool.oldest_bytes <= self._share_bytes:
            newest = self._flight[-1].seq if self._flight else self.acked
            for seq, (message, frames) in enumerate(self._spool.take(), newest + 1):
                record = _record(seq, message, frames)
                self._memory.hold(record)
                self._waiting.append(record)

    def _next_frame(self, frames: dict[int, EncodedFrame]) -> tuple[int, EncodedFrame] | None:
        """The first of these frames that the learner lacks, which it then has.

        Looked up anew for each, for every frame that goes out may push another out of the learner's memory.
        """
        for frame_id, frame in frames.items():
            if self._learner_has.get(frame_id) != frame.captured_ns:
                keeps = min(self._frames_kept, LEARNER_KEEPS_BYTES // max(1, len(frame.data)))
                _put_newest(self._learner_has, frame_id, frame.captured_ns, keeps)
                return frame_id, frame
        return None


def _record(seq: int, message: Step | EpisodeEnd, frames: dict[int, EncodedFrame]) -> _Record:
    return _Record(seq, message, frames, OVERHEAD_BYTES + len(encode(message)))


def _put_newest(kept: dict[int, T], frame_id: int, value: T, limit: int) -> None:
    """Put a frame's entry last, and drop those beyond the newest `limit`."""
    kept.pop(frame_id, None)
    kept[frame_id] = value
    while len(kept) > limit:
        del kept[next(iter(kept))]


def _words(position: Position) -> str:
    return "nothing" if position == BEFORE_ALL else f"episode {position[0]}, index {position[1]}"
