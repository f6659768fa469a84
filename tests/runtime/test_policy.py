"""The policy box: whole policies, newest wins, a held one is never written, a dead writer blocks nobody."""

from __future__ import annotations

import multiprocessing
import os
import signal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relod.runtime.policy import NO_POLICY, PolicyBox, PolicyReader, PolicyWriter

SIZE = 1000


def filled(value: float) -> np.ndarray:
    return np.full(SIZE, value, np.float32)


def make_reader(box: PolicyBox) -> PolicyReader[np.ndarray]:
    return PolicyReader(box, lambda flat: flat)


def test_policies_arrive_whole_and_the_newest_wins():
    box = PolicyBox(SIZE)
    writer, reader = PolicyWriter(box), make_reader(box)
    assert reader.version == NO_POLICY
    assert not reader.poll()
    for number in range(1, 6):
        writer.publish(filled(number), (1, number))
    assert reader.poll()
    assert reader.version == (1, 5)
    assert (reader.module == 5).all()
    assert not reader.poll()


def test_a_reader_that_starts_late_takes_what_is_there():
    box = PolicyBox(SIZE)
    PolicyWriter(box).publish(filled(3), (1, 3))
    reader = make_reader(box)
    assert reader.version == (1, 3)
    assert (reader.module == 3).all()


def test_versions_compare_by_epoch_first_and_never_fall():
    box = PolicyBox(SIZE)
    writer, reader = PolicyWriter(box), make_reader(box)
    assert writer.publish(filled(1), (1, 500))
    assert not writer.publish(filled(2), (1, 500))
    assert not writer.publish(filled(2), (1, 20))
    assert writer.publish(filled(3), (2, 20))
    assert not writer.publish(filled(4), (1, 900))
    assert reader.poll()
    assert reader.version == (2, 20)
    assert (reader.module == 3).all()


def test_a_policy_of_another_size_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        PolicyWriter(PolicyBox(SIZE)).publish(np.zeros(3, np.float32), (1, 1))


class Interleaved:
    """A ring whose every use lets the other side go on for a while."""

    def __init__(self, ring, meanwhile):
        self._ring, self._meanwhile = ring, meanwhile

    def __getattr__(self, name):
        self._meanwhile()
        return getattr(self._ring, name)


@settings(max_examples=50, deadline=None)
@given(delays=st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_whatever_the_writer_does_in_between_a_held_policy_stays_whole(delays):
    box = PolicyBox(4)
    writer, reader = PolicyWriter(box), make_reader(box)
    plan, count = iter(delays), 0

    def write():
        nonlocal count
        for _ in range(next(plan, 0)):
            count += 1
            writer.publish(np.full(4, count, np.float32), (1, count))

    seen = box.latest, box.held
    reader._box = type("Box", (), {"latest": Interleaved(seen[0], write), "held": Interleaved(seen[1], write)})()
    for _ in range(5):
        reader.poll()
        if reader.version != NO_POLICY:
            assert (reader.module == reader.version[1]).all()
        held = reader.module.copy()
        for _ in range(4):
            count += 1
            writer.publish(np.full(4, count, np.float32), (1, count))
        if reader.version != NO_POLICY:
            assert np.array_equal(reader.module, held)


@settings(max_examples=50, deadline=None)
@given(polls=st.lists(st.booleans(), min_size=1, max_size=60))
def test_whatever_the_reader_does_while_a_policy_is_written_its_own_stays_whole(polls):
    box = PolicyBox(4)
    reader, plan = make_reader(box), iter(polls)

    class Slow(PolicyWriter):
        def _free_buffer(self):
            target = super()._free_buffer()
            if next(plan, False):
                reader.poll()  # the writer has chosen its buffer, and not begun to fill it
            box.buffers[target][:2] = -1
            if next(plan, False):
                reader.poll()
            assert (reader.module == reader.version[1]).all()
            return target

    writer = Slow(box)
    for number in range(1, 30):
        writer.publish(np.full(4, number, np.float32), (1, number))
        if next(plan, False):
            reader.poll()


def test_a_writer_that_stopped_halfway_blocks_nobody():
    box = PolicyBox(SIZE)
    writer, reader = PolicyWriter(box), make_reader(box)
    writer.publish(filled(1), (1, 1))
    reader.poll()
    box.buffers[writer._free_buffer()][: SIZE // 2] = 2  # and dies here, half of the policy written
    assert not reader.poll()
    assert (reader.module == 1).all()
    PolicyWriter(box).publish(filled(3), (2, 0))
    assert reader.poll()
    assert reader.version == (2, 0)
    assert (reader.module == 3).all()


def publish_for_ever(box: PolicyBox, epoch: int) -> None:
    writer, updates = PolicyWriter(box), 0
    while True:
        updates += 1
        writer.publish(filled(updates), (epoch, updates))


@pytest.mark.slow
def test_killed_writers_leave_whole_policies_behind():
    context = multiprocessing.get_context("spawn")
    box = PolicyBox(SIZE)
    reader = make_reader(box)
    for epoch in (1, 2, 3):
        child = context.Process(target=publish_for_ever, args=(box, epoch), daemon=True)
        child.start()
        taken = 0
        while taken < 200:
            if reader.poll() and reader.version[0] == epoch:
                taken += 1
            assert reader.version == NO_POLICY or (reader.module == reader.version[1]).all()
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        reader.poll()
        assert (reader.module == reader.version[1]).all()
