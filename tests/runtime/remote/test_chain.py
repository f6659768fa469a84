"""The chain of a robot's records: what it says, and what it notices."""

from __future__ import annotations

import errno
import hashlib
import struct
from pathlib import Path

import pytest

from relod.errors import SafetyStop, StartError
from relod.runtime.log.format import EncodedFrame
from relod.runtime.messages import encode
from relod.runtime.remote.chain import ChainWriter, RecordDigest, read_chain
from relod.runtime.rundir import Appender
from relod.types import EpisodeEnd, Step
from tests.runtime.logs import episodes, frames_of, make_step

ENTRY_BYTES = 48


def write_chain(path: Path, messages: list[Step | EpisodeEnd]) -> None:
    writer = ChainWriter(path)
    for message in messages:
        writer.add(message, frames_of(0, message))
    writer.close()


def some_messages() -> list[Step | EpisodeEnd]:
    return [message for _, message in episodes([2, 3]) if message is not None]


def test_an_entry_is_what_its_description_says(tmp_path: Path) -> None:
    messages = some_messages()
    write_chain(tmp_path / "chain", messages)

    def digest(*parts: bytes) -> bytes:
        return hashlib.blake2b(b"".join(parts), digest_size=16).digest()

    chain, data = bytes(16), b""
    for message in messages:
        frames = [frames_of(0, message)[frame_id] for frame_id in message.frame_ids]
        contents = digest(
            encode(message), *(digest(struct.pack("<q", each.captured_ns), bytes(each.data)) for each in frames)
        )
        entry = struct.pack("<QQ", message.episode, getattr(message, "index", getattr(message, "length", 0))) + contents
        chain = digest(chain, entry)
        data += entry + chain
    assert (tmp_path / "chain").read_bytes() == data


def test_reads_what_was_written(tmp_path: Path) -> None:
    messages = some_messages()
    write_chain(tmp_path / "chain", messages)
    entries = read_chain(tmp_path / "chain")
    assert [entry.position for entry in entries] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)]
    digest = RecordDigest()
    assert [entry.digest for entry in entries] == [digest(each, frames_of(0, each)) for each in messages]


def test_every_part_of_a_record_counts() -> None:
    step = make_step(first_frame=1)
    frames = frames_of(0, step)
    stamp = {**frames, 2: EncodedFrame(captured_ns=201, data=frames[2].data)}
    pixel = {**frames, 2: EncodedFrame(captured_ns=200, data=bytes(frames[2].data)[:-1] + b"!")}
    swapped = {1: frames[2], 2: frames[1]}
    other = make_step(first_frame=1, last=True)
    digests = {RecordDigest()(step, each) for each in (frames, stamp, pixel, swapped)} | {RecordDigest()(other, frames)}
    assert len(digests) == 5


def test_a_frame_that_is_replaced_is_hashed_again() -> None:
    step, digest = make_step(first_frame=1), RecordDigest()
    frames = frames_of(0, step)
    before = digest(step, frames)
    assert digest(step, frames) == before
    assert digest(step, {**frames, 1: EncodedFrame(captured_ns=100, data=b"other")}) != before


def test_each_frame_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    true_hash = hashlib.blake2b

    class Counting:
        def __init__(self, *, digest_size: int) -> None:
            self.inner, self.bytes = true_hash(digest_size=digest_size), 0

        def update(self, data: bytes) -> None:
            hashed.append(len(data))
            self.inner.update(data)

        def digest(self) -> bytes:
            return self.inner.digest()

    monkeypatch.setattr("relod.runtime.remote.chain.hashlib.blake2b", Counting)
    frames = {i: EncodedFrame(captured_ns=i, data=bytes(10_000)) for i in range(1, 12)}
    digest = RecordDigest()
    for index in range(10):
        digest(make_step(0, index, first_frame=index + 1), frames)
    assert hashed.count(10_000) == len(frames)


@pytest.mark.parametrize("tail", [b"\x01" * 47, bytes(20), bytes(ENTRY_BYTES), bytes(3 * ENTRY_BYTES + 5)])
def test_a_torn_tail_is_passed_over(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "chain"
    write_chain(path, some_messages())
    whole = read_chain(path)
    path.write_bytes(path.read_bytes() + tail)
    assert read_chain(path) == whole


def test_any_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "chain"
    write_chain(path, some_messages())
    data = path.read_bytes()
    for at in range(0, len(data), 5):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        with pytest.raises(StartError, match=f"is damaged at entry {at // ENTRY_BYTES + 1}"):
            read_chain(path)


def test_a_missing_entry_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "chain"
    write_chain(path, some_messages())
    data = path.read_bytes()
    path.write_bytes(data[:ENTRY_BYTES] + data[2 * ENTRY_BYTES :])
    with pytest.raises(StartError, match="is damaged at entry 2"):
        read_chain(path)


def test_no_chain_is_written_twice(tmp_path: Path) -> None:
    write_chain(tmp_path / "chain", [])
    with pytest.raises(StartError, match="cannot be written"):
        ChainWriter(tmp_path / "chain")


def test_no_chain_to_read(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="cannot be read"):
        read_chain(tmp_path / "chain")


def test_a_disk_that_is_full_stops_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(appender: Appender, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = ChainWriter(tmp_path / "chain")
    monkeypatch.setattr(Appender, "append", refuse)
    step = make_step()
    with pytest.raises(SafetyStop, match="the disk is full"):
        writer.add(step, frames_of(0, step))
    writer.add(step, frames_of(0, step))
    writer.close()
    assert read_chain(tmp_path / "chain") == []
