"""The robot's own proof of what it sent: `RUN/steps.chain`, a digest for each record and one that chains them.

The file holds entries of 48 bytes, one per step or end of an episode, in order, and nothing else:

    u64 episode   u64 index (an end: its length)   16 bytes digest   16 bytes chain

Numbers are little-endian. All digests are BLAKE2b with 16 bytes. A frame's is that of its stamp (i64) and its encoded
bytes; a record's is that of `messages.encode` followed by the digests of the frames it names, in order; the chain's is
that of the former chain (zeros at first) followed by episode, index and digest of this entry.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import SafetyStop, StartError
from ...types import EpisodeEnd, Step
from ..log.format import EncodedFrame
from ..messages import Position, encode, position
from ..rundir import Appender, disk_errors

__all__ = ["CHAIN_NAME", "ChainEntry", "ChainWriter", "RecordDigest", "read_chain"]

CHAIN_NAME = "steps.chain"  # in the robot's run folder
DIGEST_BYTES = 16

_ENTRY = struct.Struct("<QQ16s16s")
_LINK = struct.Struct("<QQ16s")  # what of an entry goes into its chain
_STAMP = struct.Struct("<q")
_FIRST = bytes(DIGEST_BYTES)


@dataclass(frozen=True, slots=True)
class ChainEntry:
    """A record that the robot took for sending."""

    position: Position
    digest: bytes

    @classmethod
    def of(cls, message: Step | EpisodeEnd, digest: bytes) -> ChainEntry:
        """The entry of a record with this digest."""
        return cls(position(message), digest)


class RecordDigest:
    """Digests of the records of one robot, in order; each frame is hashed once, as long as it is one object."""

    def __init__(self) -> None:
        self._frames: dict[int, tuple[EncodedFrame, bytes]] = {}  # those that the record before named

    def __call__(self, message: Step | EpisodeEnd, frames: Mapping[int, EncodedFrame]) -> bytes:
        """The digest of a record; `KeyError` when a frame it names is not in `frames`."""
        known, self._frames = self._frames, {}
        for frame_id in message.frame_ids:
            frame = frames[frame_id]
            before = known.get(frame_id)
            self._frames[frame_id] = before if before and before[0] is frame else (frame, _frame_digest(frame))
        digests = (self._frames[frame_id][1] for frame_id in message.frame_ids)
        return _hash(encode(message), *digests)


class ChainWriter:
    """Begins and writes the file; `StartError` when it exists or cannot be made.

    What `add` returned for is in the kernel. The first write that fails raises `SafetyStop`; later calls do nothing.
    """

    def __init__(self, path: Path) -> None:
        with disk_errors(path, StartError):
            self._file = Appender(path, new=True)
        self.failed = False
        self._digest = RecordDigest()
        self._chain = _FIRST

    def add(self, message: Step | EpisodeEnd, frames: Mapping[int, EncodedFrame]) -> None:
        """Add the run's next record, which names frames that are in `frames`."""
        if self.failed:
            return
        entry = ChainEntry.of(message, self._digest(message, frames))
        link = _LINK.pack(*entry.position, entry.digest)
        self._chain = _hash(self._chain, link)
        try:
            with disk_errors(self._file.path):
                self._file.append(link + self._chain)
        except SafetyStop:
            self.failed = True
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_chain(path: Path) -> list[ChainEntry]:
    """The entries of a chain; what a crash left of one at the very end is passed over.

    Raises:
        StartError: there is no such file, or it was changed.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StartError(f"{path} cannot be read: {error.strerror}", "give the folder of a robot's run") from error
    data = data[: len(data) // _ENTRY.size * _ENTRY.size]
    entries: list[ChainEntry] = []
    chain = _FIRST
    for number, (episode, index, digest, linked) in enumerate(_ENTRY.iter_unpack(data)):
        chain = _hash(chain, _LINK.pack(episode, index, digest))
        if chain != linked:
            if not data[number * _ENTRY.size :].strip(b"\0"):  # what a power cut may leave of an unsynced tail
                break
            raise StartError(f"{path} is damaged at entry {number + 1}", "nothing can be said about this run")
        entries.append(ChainEntry((episode, index), digest))
    return entries


def _frame_digest(frame: EncodedFrame) -> bytes:
    return _hash(_STAMP.pack(frame.captured_ns), frame.data)


def _hash(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()
