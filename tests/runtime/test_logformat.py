"""The bytes of the experience log: any cut gives the whole records before it, any flipped byte is noticed."""

from __future__ import annotations

import struct
import zlib

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relod.runtime.log.codec import make_codec
from relod.runtime.log.format import (
    HEADER_OFFSET,
    DamageError,
    EncodedFrame,
    Kind,
    SegmentHeader,
    pack_cut,
    pack_frame,
    pack_header,
    pack_message,
    read_header,
    read_record,
    unpack_frame,
    unpack_stream,
)
from relod.runtime.messages import decode, encode
from tests.runtime.logs import SPEC, make_end, make_step

HEADER = SegmentHeader(segment=3, env_steps=41, spec=SPEC)
streams = st.integers(0, 65535)
stamps = st.integers(-(2**63), 2**63 - 1)
records = st.one_of(
    st.builds(
        pack_frame,
        streams,
        stamps,
        st.builds(EncodedFrame, captured_ns=stamps, data=st.binary(max_size=80)),
    ),
    st.builds(pack_message, streams, st.builds(make_step, st.integers(0, 2**40), st.integers(0, 500))),
    st.builds(pack_message, streams, st.builds(make_end, st.integers(0, 2**40), st.integers(0, 500))),
    st.builds(pack_cut, streams),
)


def ends_of(data: bytes) -> list[int]:
    """Where whole records end, up to where the bytes end within one."""
    ends, at = [], 0
    while (record := read_record(data, at)) is not None:
        at = record.end
        ends.append(at)
    return ends


def all_ends(parts: list[bytes]) -> list[int]:
    return [sum(map(len, parts[: n + 1])) for n in range(len(parts))]


@given(parts=st.lists(records, max_size=6), data=st.data())
def test_a_cut_anywhere_leaves_exactly_the_whole_records_before_it(parts, data):
    whole = b"".join(parts)
    cut = data.draw(st.integers(0, len(whole)))
    assert ends_of(whole[:cut]) == [end for end in all_ends(parts) if end <= cut]


@given(parts=st.lists(records, min_size=1, max_size=6), data=st.data())
def test_a_flipped_byte_is_noticed_in_its_record(parts, data):
    damaged = bytearray(b"".join(parts))
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(DamageError) as caught:
        ends_of(bytes(damaged))
    starts = [0, *all_ends(parts)]
    assert caught.value.offset == max(start for start in starts if start <= at)


@given(cut=st.integers(0, len(pack_header(HEADER)) - 1))
def test_a_header_that_is_not_whole_is_none(cut):
    assert read_header(pack_header(HEADER)[:cut]) is None


@given(at=st.integers(0, len(pack_header(HEADER)) - 1), flip=st.integers(1, 255))
def test_a_flipped_byte_in_a_header_is_noticed(at, flip):
    damaged = bytearray(pack_header(HEADER))
    damaged[at] ^= flip
    with pytest.raises(DamageError):
        read_header(bytes(damaged))


def test_a_header_comes_back_and_ends_where_the_records_begin():
    data = pack_header(HEADER)
    assert read_header(data + pack_cut(0)) == (HEADER, len(data))


@given(stream=streams, frame_id=stamps, frame=st.builds(EncodedFrame, captured_ns=stamps, data=st.binary(max_size=80)))
def test_frames_come_back(stream, frame_id, frame):
    record = read_record(pack_frame(stream, frame_id, frame), 0)
    assert record is not None
    assert record.kind is Kind.FRAME
    assert unpack_frame(record.payload) == (stream, frame_id, frame)


@given(stream=streams, message=st.sampled_from([make_step(3, 4), make_end(3, 5)]))
def test_messages_come_back(stream, message):
    record = read_record(pack_message(stream, message), 0)
    assert record is not None
    assert record.kind is (Kind.END if message.__class__.__name__ == "EpisodeEnd" else Kind.STEP)
    read_stream, rest = unpack_stream(record.payload)
    assert read_stream == stream
    assert encode(decode(bytes(rest))) == encode(message)


def test_a_record_is_laid_out_as_the_documentation_says():
    frame = EncodedFrame(captured_ns=9, data=b"pixels")
    payload = struct.pack("<Hqq", 2, 5, 9) + b"pixels"
    head = struct.pack("<IB", len(payload), 1)
    sums = struct.pack("<II", zlib.crc32(head), zlib.crc32(payload))
    assert pack_frame(2, 5, frame) == head + sums + payload
    assert pack_header(HEADER)[:HEADER_OFFSET] == b"RELODLOG" + struct.pack("<I", 1)
    body = msgspec.msgpack.decode(pack_header(HEADER)[HEADER_OFFSET + 13 :])
    assert body["segment"] == 3
    assert body["spec"]["image_hw"] == [2, 3]


def sealed(kind: int, payload: bytes) -> bytes:
    head = struct.pack("<IB", len(payload), kind)
    return head + struct.pack("<II", zlib.crc32(head), zlib.crc32(payload)) + payload


def header_of(payload: bytes) -> bytes:
    return b"RELODLOG" + struct.pack("<I", 1) + sealed(0, payload)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"PNG and so on", "no segment of an experience log"),
        (b"RELODLOG" + struct.pack("<I", 2), "its format has version 2, and 1 is known"),
        (b"RELODLOG" + struct.pack("<I", 1) + sealed(4, b"\0\0"), "the first record is no header"),
        (header_of(b"\xc1"), "the header cannot be read"),
        (header_of(msgspec.msgpack.encode({"segment": 1})), "missing required field"),
        (header_of(msgspec.msgpack.encode({**msgspec.to_builtins(HEADER), "more": 1})), "unknown field"),
    ],
)
def test_what_is_no_header_is_said(data, said):
    with pytest.raises(DamageError, match=said):
        read_header(data)


def test_an_unknown_kind_is_damage():
    with pytest.raises(DamageError, match="unknown kind 9"):
        read_record(sealed(9, b""), 0)


# -- codecs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["raw", "jpeg"])
def test_an_image_comes_back_in_its_size(name):
    codec = make_codec(name, image_hw=(16, 24))
    image = np.full((16, 24, 3), (10, 90, 200), np.uint8)
    back = codec.decode(codec.encode(image))
    assert back.shape == image.shape
    assert np.abs(back.astype(int) - image).max() <= (0 if name == "raw" else 4)


def test_quality_costs_bytes():
    image = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    low, high = (len(make_codec("jpeg", quality, image_hw=(16, 24)).encode(image)) for quality in (20, 95))
    assert low < high


@pytest.mark.parametrize("name", ["raw", "jpeg"])
@pytest.mark.parametrize("data", [b"", b"no image", bytes(7)])
def test_bytes_that_are_no_image_are_a_value_error(name, data):
    with pytest.raises(ValueError, match=f"{len(data)} bytes are no"):
        make_codec(name, image_hw=(16, 24)).decode(data)


@pytest.mark.parametrize("name", ["raw", "jpeg"])
def test_an_image_of_another_size_is_a_value_error(name):
    other = make_codec(name, image_hw=(8, 8))
    codec = make_codec(name, image_hw=(16, 24))
    with pytest.raises(ValueError, match="uint8"):
        codec.encode(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"192 bytes are no image|a JPEG is 8x8, not 16x24"):
        codec.decode(other.encode(np.zeros((8, 8, 3), np.uint8)))


def test_a_jpeg_that_would_take_gigabytes_is_not_decoded(monkeypatch):
    codec = make_codec("jpeg", image_hw=(16, 24))
    data = bytearray(codec.encode(np.zeros((16, 24, 3), np.uint8)))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    monkeypatch.setattr("cv2.imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="a JPEG is 65535x65535"):
        codec.decode(bytes(data))
    for other in (b"", b"\xff\xd8", b"\xff\xd8\xff\xff\xff", b"\x89PNG" + bytes(40)):
        with pytest.raises(ValueError, match="bytes are no JPEG"):
            codec.decode(other)


def test_an_unknown_codec_is_a_value_error():
    with pytest.raises(ValueError, match="unknown codec 'png': raw or jpeg"):
        make_codec("png", image_hw=(2, 3))
