from __future__ import annotations

import numpy as np
import pytest

from relod.runtime.clock import VirtualClock
from relod.runtime.remote.owed import Owed, PackedPolicy, pack_policy
from relod.runtime.remote.wire import (
    POLICY_PART_BYTES,
    Ack,
    Hold,
    LearnerNews,
    PolicyPart,
    Pong,
    pack,
    unpack_from_learner,
)


def new_owed() -> Owed:
    return Owed(VirtualClock(5))


def heads(owed: Owed) -> list[object]:
    """Everything that is owed."""
    given = []
    while (message := owed.next()) is not None:
        given.append(unpack_from_learner(message)[0])
    return given


def policy(updates: int, size: int = POLICY_PART_BYTES) -> PackedPolicy:
    """In two parts of float16."""
    return pack_policy(np.full(size, updates, np.float32), (1, updates), "float16")


def test_nothing_is_owed_at_first() -> None:
    assert new_owed().next() is None


def test_the_most_urgent_comes_first() -> None:
    owed = new_owed()
    owed.offer(policy(1))
    owed.tell(Hold, pack(Hold(reason="so")))
    owed.ack(3)
    owed.pong(1, 2)
    given = heads(owed)
    assert given[:3] == [Pong(sent_ns=1, received_ns=2, replied_ns=5), Ack(seq=3), Hold(reason="so")]
    assert [type(head) for head in given[3:]] == [PolicyPart, PolicyPart]


def test_what_is_urgent_does_not_wait_for_the_rest_of_a_policy() -> None:
    owed = new_owed()
    owed.offer(policy(1))
    owed.next()
    owed.ack(1)
    assert [type(head) for head in heads(owed)] == [Ack, PolicyPart]


def test_what_must_not_overtake_the_policy_comes_after_it() -> None:
    owed = new_owed()
    owed.offer(policy(1))
    owed.tell(Hold, pack(Hold(reason="")), last=True)
    owed.ack(1)
    given = heads(owed)
    assert [type(head) for head in given] == [Ack, PolicyPart, PolicyPart, Hold]
    assert heads(owed) == []


def test_the_newer_of_two_messages_of_a_kind_is_kept_whenever_it_is_to_come() -> None:
    owed = new_owed()
    owed.tell(Hold, pack(Hold(reason="first")))
    owed.tell(Hold, pack(Hold(reason="")), last=True)
    assert heads(owed) == [Hold(reason="")]
    owed.tell(Hold, pack(Hold(reason="")), last=True)
    owed.tell(Hold, pack(Hold(reason="second")))
    assert heads(owed) == [Hold(reason="second")]


def test_acks_become_one() -> None:
    owed = new_owed()
    for seq in range(1, 5):
        owed.ack(seq)
    assert heads(owed) == [Ack(seq=4)]
    assert heads(owed) == []


def test_of_each_kind_the_newest_is_told() -> None:
    owed = new_owed()
    news = LearnerNews(updates=1, updates_per_s=0.0, replay_steps=0, env_steps=0, metrics={})
    for head in (Hold(reason="first"), news, Hold(reason="")):
        owed.tell(type(head), pack(head))
    assert heads(owed) == [Hold(reason=""), news]


def test_pings_without_end_are_not_all_answered() -> None:
    owed = new_owed()
    for stamp in range(100):
        owed.pong(stamp, stamp)
    assert [head.sent_ns for head in heads(owed)] == list(range(92, 100))


def test_a_policy_on_its_way_is_finished_and_the_newest_is_next() -> None:
    owed = new_owed()
    owed.offer(policy(1))
    owed.next()
    for updates in (2, 3, 4):
        owed.offer(policy(updates))
    assert [(head.version, head.offset) for head in heads(owed)] == [
        ((1, 1), POLICY_PART_BYTES),
        ((1, 4), 0),
        ((1, 4), POLICY_PART_BYTES),
    ]
    assert owed.policy_version == (1, 4)


def test_a_policy_of_which_nothing_was_sent_gives_way() -> None:
    owed = new_owed()
    owed.offer(policy(1))
    owed.offer(policy(2))
    assert [head.version for head in heads(owed)] == [(1, 2)] * 2


@pytest.mark.parametrize("precision", ["float16", "float32"])
@pytest.mark.parametrize("size", [1, 16_384, 100_001])
def test_parts_make_the_policy(precision: str, size: int) -> None:
    values = np.linspace(-1, 1, size, dtype=np.float32)
    packed = pack_policy(values, (2, 7), precision)
    data = b""
    for part in packed.parts:
        head, payload = unpack_from_learner(part)
        assert (head.version, head.precision, head.size, head.offset) == ((2, 7), precision, size, len(data))
        assert len(payload) <= POLICY_PART_BYTES
        data += payload
    assert np.array_equal(np.frombuffer(data, precision), values.astype(precision))


def test_half_precision_has_no_infinity() -> None:
    packed = pack_policy(np.array([1e9, -1e9], np.float32), (1, 1), "float16")
    _, payload = unpack_from_learner(packed.parts[0])
    assert np.frombuffer(payload, np.float16).tolist() == [65504, -65504]
