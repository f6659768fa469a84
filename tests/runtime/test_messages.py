"""The experience stream as bytes: what goes in comes out, and garbage raises msgspec's errors only."""

from __future__ import annotations

from dataclasses import fields

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from relod.runtime.messages import MAX_MESSAGE_BYTES, CycleRecord, decode, encode
from relod.types import EpisodeEnd, Step

floats = st.floats(allow_nan=False)
stamps = st.integers(0, 2**63 - 1)
counts = st.integers(0, 2**40)
ids = st.lists(counts, max_size=4).map(tuple)
vectors = hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32))
versions = st.tuples(counts, counts)
steps = st.builds(
    Step,
    episode=counts,
    index=counts,
    frame_ids=ids,
    proprio=vectors,
    action=vectors,
    reward=floats,
    terminated=st.booleans(),
    truncated=st.booleans(),
    extras=vectors,
    policy_version=versions,
    observed_ns=stamps,
    acted_ns=stamps,
)
ends = st.builds(
    EpisodeEnd,
    episode=counts,
    length=counts,
    frame_ids=ids,
    proprio=vectors,
    return_=floats,
    terminated=st.booleans(),
    reason=st.text(max_size=30),
    observed_ns=stamps,
)
records = st.builds(
    CycleRecord,
    now_ns=stamps,
    sensor_seq=ids,
    sensor_arrived_ns=ids,
    sensor_values=st.binary(max_size=64),
    frames=st.lists(st.tuples(counts, stamps, stamps), max_size=4).map(tuple),
    policy_version=versions,
    command=st.lists(floats, max_size=4).map(tuple),
    request=counts,
    phase=st.sampled_from(["holding", "running"]),
)


def assert_same(left: object, right: object) -> None:
    assert type(left) is type(right)
    for field in fields(left):  # type: ignore[arg-type]
        one, other = getattr(left, field.name), getattr(right, field.name)
        if isinstance(one, np.ndarray):
            assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
        else:
            assert one == other


@given(message=steps | ends)
def test_experience_comes_back_bit_for_bit(message):
    assert_same(message, decode(encode(message)))


@given(record=records)
def test_records_of_cycles_come_back(record):
    assert decode(encode(record)) == record


@given(data=st.binary(max_size=200))
def test_garbage_raises_msgspecs_errors_only(data):
    with pytest.raises((msgspec.ValidationError, msgspec.DecodeError)):
        decode(data)


@given(message=steps | ends, data=st.data())
def test_damaged_messages_raise_msgspecs_errors_or_give_a_message(message, data):
    damaged = bytearray(encode(message))
    position = data.draw(st.integers(0, len(damaged) - 1))
    damaged[position] ^= data.draw(st.integers(1, 255))
    try:
        decoded = decode(bytes(damaged))
    except (msgspec.ValidationError, msgspec.DecodeError):
        return
    assert isinstance(decoded, Step | EpisodeEnd | CycleRecord)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_vector_that_is_no_whole_number_of_floats_is_refused(cut):
    end = ["end", 0, 1, [1], b"\0" * (4 + cut), 0.0, False, False, "", 0]
    with pytest.raises(msgspec.ValidationError, match="float32"):
        decode(msgspec.msgpack.encode(end))


def test_a_text_that_is_not_utf_8_is_refused():
    good = encode(
        EpisodeEnd(
            episode=0,
            length=1,
            frame_ids=(),
            proprio=np.zeros(0, np.float32),
            return_=0.0,
            terminated=False,
            success=False,
            reason="reason",
            observed_ns=0,
        )
    )
    with pytest.raises(msgspec.DecodeError, match="utf-8"):
        decode(good.replace(b"reason", b"reas\xffn"))


def test_endless_nesting_is_refused():
    with pytest.raises((msgspec.ValidationError, msgspec.DecodeError)):
        decode(b"\x9a\xa3end" + b"\x91" * 100_000)
    with pytest.raises((msgspec.ValidationError, msgspec.DecodeError)):
        decode(b"\x9f\xa3end\x00\x01\x90\xc4\x00\xca\x00\x00\x00\x00\xc2\xa0\x00" + b"\x91" * 100_000)


def test_a_usual_message_is_far_below_the_limit():
    record = CycleRecord(
        now_ns=2**62,
        sensor_seq=tuple(range(60)),
        sensor_arrived_ns=(2**62,) * 60,
        sensor_values=bytes(60 * 40 * 8),
        frames=((2**40, 2**62, 2**62),) * 16,
        policy_version=(1, 2**40),
        command=(0.0,) * 6,
        request=0,
        phase="resetting",
    )
    assert len(encode(record)) < MAX_MESSAGE_BYTES / 2
