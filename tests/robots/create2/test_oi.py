"""The Open Interface codec: encoders against the specification's bytes, the decoder against damage."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relod.robots.create2 import oi


def test_group_sizes_are_the_specifications() -> None:
    sizes = {group: oi.packet_bytes(group) for group in oi.GROUPS}
    assert sizes == {0: 26, 1: 10, 2: 6, 3: 10, 4: 14, 5: 12, 6: 52, 100: 80, 101: 28, 106: 12, 107: 9}


def test_drive_direct_sends_the_right_wheel_first() -> None:
    assert oi.drive_direct(left_mm_s=-2, right_mm_s=300) == bytes((145, 1, 44, 255, 254))


@pytest.mark.parametrize("speeds", [(501, 0), (0, -501)])
def test_drive_direct_refuses_speeds_beyond_the_limit(speeds: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="beyond"):
        oi.drive_direct(*speeds)


def test_commands_are_the_specifications_bytes() -> None:
    assert oi.start() + oi.safe() + oi.full() + oi.stop() + oi.seek_dock() + oi.reset() == bytes(
        (128, 131, 132, 173, 143, 7)
    )
    assert oi.stream((29, 13)) == bytes((148, 2, 29, 13))
    assert oi.query_list((29, 13)) == bytes((149, 2, 29, 13))
    assert oi.pause_stream() + oi.resume_stream() == bytes((150, 0, 150, 1))


def test_stream_refuses_what_cannot_be_sent() -> None:
    with pytest.raises(ValueError, match="unknown packet"):
        oi.stream((7, 99))
    with pytest.raises(ValueError, match="does not fit"):
        oi.stream((100, 100, 100))


def test_stream_names_are_one_per_packet_and_carry_units() -> None:
    assert len(oi.SENSOR_NAMES) == len(oi.STREAM_IDS) == len(set(oi.SENSOR_NAMES))
    assert oi.SENSOR_NAMES[0] == "light_bump_left"
    assert oi.SENSOR_NAMES[11] == "battery_charge_mah"
    assert oi.SENSOR_NAMES[-4:] == (
        "requested_right_mm_s",
        "requested_left_mm_s",
        "encoder_left_counts",
        "encoder_right_counts",
    )


def test_every_opcode_has_a_length() -> None:
    for opcode in oi.Opcode:
        assert oi.command_bytes(bytes((opcode, 2, 2))) is not None
    assert oi.command_bytes(b"\x8c\x00") is None  # SONG: its length is the third byte
    with pytest.raises(ValueError, match="no Open Interface opcode"):
        oi.command_bytes(b"\x01")


def test_decodes_the_specifications_example() -> None:
    # Packet 29 (cliff front left signal) is 2 * 256 + 25, packet 13 (virtual wall) is 0, 163 is the checksum.
    frame = bytes((19, 5, 29, 2, 25, 13, 0, 163))
    decoder = oi.StreamDecoder((29, 13))
    assert decoder.feed(frame) == [(537, 0)]


def _range(packet_id: int) -> st.SearchStrategy[int]:
    low, high = {"B": (0, 255), "b": (-128, 127), "H": (0, 65535), "h": (-32768, 32767)}[oi.PACKETS[packet_id].code]
    return st.integers(low, high)


VALUES = st.tuples(*(_range(i) for i in oi.STREAM_IDS))
ENCODER = oi.StreamEncoder(oi.STREAM_IDS)
# Garbage rich in header bytes, so that false frames begin often.
GARBAGE = st.lists(st.sampled_from((19, ENCODER.frame_bytes - 3, 46, 0, 255, 7)), max_size=80).map(bytes)


def _cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


@settings(deadline=None, max_examples=60)
@given(st.lists(VALUES, max_size=4), GARBAGE, st.lists(st.integers(0, 10_000), max_size=12))
def test_any_split_gives_the_same_frames(frames: list[tuple[int, ...]], garbage: bytes, cuts: list[int]) -> None:
    data = garbage + b"".join(ENCODER.encode(values) for values in frames) + garbage
    whole, pieces = oi.StreamDecoder(), oi.StreamDecoder()
    expected = whole.feed(data)
    assert [values for piece in _cut(data, cuts) for values in pieces.feed(piece)] == expected
    assert (pieces.frames, pieces.checksum_errors, pieces.skipped_bytes) == (
        whole.frames,
        whole.checksum_errors,
        whole.skipped_bytes,
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(GARBAGE, VALUES), min_size=1, max_size=5))
def test_garbage_between_frames_loses_no_frame(parts: list[tuple[bytes, tuple[int, ...]]]) -> None:
    decoder = oi.StreamDecoder()
    data = b"".join(garbage + ENCODER.encode(values) for garbage, values in parts)
    # A false header just before the last frame keeps the decoder waiting until that many bytes are there.
    found = decoder.feed(data + bytes(ENCODER.frame_bytes))
    assert found == [values for _, values in parts]
    assert decoder.skipped_bytes >= sum(len(garbage) for garbage, _ in parts)


@settings(deadline=None, max_examples=60)
@given(st.lists(VALUES, min_size=2, max_size=5), st.integers(0, 10_000), st.integers(1, 255))
def test_a_damaged_byte_costs_its_frame_only(frames: list[tuple[int, ...]], at: int, flip: int) -> None:
    size = ENCODER.frame_bytes
    data = bytearray(b"".join(ENCODER.encode(values) for values in frames))
    at %= len(data)
    data[at] ^= flip
    decoder = oi.StreamDecoder()
    found = decoder.feed(bytes(data) + bytes(size))
    assert found == [values for i, values in enumerate(frames) if i != at // size]


@settings(deadline=None, max_examples=60)
@given(st.lists(VALUES, min_size=2, max_size=5), st.integers(0, 10_000), st.integers(1, 120))
def test_lost_bytes_cost_the_frames_they_touch_only(frames: list[tuple[int, ...]], at: int, count: int) -> None:
    size = ENCODER.frame_bytes
    data = b"".join(ENCODER.encode(values) for values in frames)
    at %= len(data)
    end = min(len(data), at + count)
    decoder = oi.StreamDecoder()
    found = decoder.feed(data[:at] + data[end:] + bytes(size))
    touched = range(at // size, (end - 1) // size + 1)
    untouched = [values for i, values in enumerate(frames) if i not in touched]
    # What is left around the gap may look like a frame of its own: the checksum of one byte holds in one of 256
    # cases, and no decoder could tell. It costs one more frame at most.
    assert len(found) <= len(untouched) + 1
    assert sum(values not in found for values in untouched) <= 1


@settings(deadline=None, max_examples=100)
@given(st.lists(st.one_of(GARBAGE, st.binary(max_size=200)), max_size=10))
def test_garbage_never_raises_and_is_not_kept(pieces: list[bytes]) -> None:
    decoder = oi.StreamDecoder()
    for piece in pieces:
        for values in decoder.feed(piece):
            assert ENCODER.encode(values) in b"".join(pieces)
    kept = sum(map(len, pieces)) - decoder.skipped_bytes - decoder.frames * decoder.frame_bytes
    assert 0 <= kept < decoder.frame_bytes


def test_clear_forgets_half_a_frame() -> None:
    decoder = oi.StreamDecoder()
    frame = ENCODER.encode([0] * len(oi.STREAM_IDS))
    decoder.feed(frame[:20])
    decoder.clear()
    assert decoder.feed(frame[20:]) == []
    assert decoder.feed(frame) == [(0,) * len(oi.STREAM_IDS)]


def test_the_encoder_streams_groups() -> None:
    encoder = oi.StreamEncoder((106, 7))
    frame = encoder.encode([1, 2, 3, 4, 5, 6, 9])
    assert frame[:3] == bytes((19, 15, 106))
    assert struct.unpack(">6HBB", frame[3:-1]) == (1, 2, 3, 4, 5, 6, 7, 9)
    assert sum(frame) & 0xFF == 0
