"""Shared memory: newest wins, nobody waits, and no torn record or image is ever returned."""

from __future__ import annotations

import gc
import multiprocessing
import os
import select

import numpy as np
import pytest
from children import RingsJob, write_frames_for_ever, write_rings
from hypothesis import given
from hypothesis import strategies as st

from relod.runtime.clock import NS_PER_S, monotonic_ns
from relod.runtime.shared import FrameRing, Memory, Ring, SensorRing, Signal

FIELDS = [("value", "<i8"), ("pair", "<f8", (2,))]


def ring(capacity: int = 4) -> Ring:
    return Ring("test", FIELDS, capacity)


def put(ring: Ring, *values: int) -> None:
    for value in values:
        ring.publish((value, (value, -value)))


def attached(ring: Ring) -> Ring:
    """Another process's view of the same memory: nothing shared but the bytes."""
    other = Ring.__new__(Ring)
    other.__setstate__({"dtype": ring.dtype.descr, "capacity": ring.capacity, "memory": ring._memory, "signals": []})
    return other


def tear(ring: Ring, slot: int) -> None:
    """Half of a record's bytes are those of another: what a copy catches while its writer writes."""
    raw = ring._raw[slot]
    raw[raw.size // 2 :] ^= 0xA5


def tear_record(ring: Ring, seq: int) -> None:
    tear(ring, 1 + seq % ring.capacity)


def tear_head(ring: Ring) -> None:
    tear(ring, 0)


def values(ring: Ring, after: int = 0) -> list[tuple[int, int]]:
    return [(seq, int(record["value"])) for seq, record in ring.since(after)]


# -- rings -------------------------------------------------------------------------------------------------------------


def test_an_empty_ring_has_nothing():
    empty = ring()
    assert (empty.newest_seq, empty.newest(), empty.get(1), values(empty)) == (0, None, None, [])
    assert (empty.retries, empty.kept) == (0, 0)


@given(
    capacity=st.integers(1, 6),
    actions=st.lists(st.one_of(st.integers(-9, 9), st.just("restart"), st.just("read")), max_size=40),
)
def test_a_ring_is_the_end_of_a_list(capacity, actions):
    writer, written = ring(capacity), []
    reader = attached(writer)
    for action in [*actions, "read"]:
        if action == "restart":
            writer = attached(writer)
            writer.take_over()
        elif action == "read":
            model = list(enumerate(written, 1))[-capacity:]
            assert values(reader) == model
            assert reader.newest_seq == len(written)
            newest = reader.newest()
            assert (newest and (newest[0], int(newest[1]["value"]))) == (model[-1] if model else None)
            for seq in range(1, len(written) + 2):
                record = reader.get(seq)
                assert (record is not None) == (len(written) - capacity < seq <= len(written))
        else:
            assert writer.publish((action, (0.0, 0.0))) == len(written) + 1
            written.append(action)
    assert reader.kept == 0


@given(st.integers(0, 30), st.integers(0, 30))
def test_since_gives_what_is_newer_and_still_there(count, after):
    full = ring(8)
    put(full, *range(1, count + 1))
    assert [seq for seq, _ in full.since(after)] == list(range(max(after + 1, count - 7), count + 1))


def test_records_keep_their_fields():
    one = ring()
    put(one, 5)
    newest = attached(one).newest()
    assert newest is not None
    assert newest[1]["pair"].tolist() == [5.0, -5.0]


def test_a_returned_record_is_a_copy():
    one = ring(1)
    put(one, 1)
    record = one.get(1)
    put(one, 2)
    assert record is not None
    assert int(record["value"]) == 1


def test_a_torn_record_is_tried_again_then_given_up_and_counted():
    writer = ring()
    put(writer, 1, 2)
    reader = attached(writer)
    tear_record(writer, 2)
    assert reader.get(2) is None
    assert (reader.retries, reader.kept) == (3, 1)
    assert values(reader) == [(1, 1)]
    put(writer, 3)
    assert values(reader) == [(1, 1), (3, 3)]


def test_a_reader_with_a_torn_head_keeps_what_it_knew():
    writer = ring()
    put(writer, 1, 2)
    reader = attached(writer)
    assert reader.newest_seq == 2
    tear_head(writer)
    assert reader.newest_seq == 2
    assert reader.kept == 1
    put(writer, 3)
    assert reader.newest_seq == 3


@pytest.mark.parametrize("torn", [tear_head, lambda ring: tear_record(ring, 3), lambda ring: None])
def test_a_writer_killed_in_mid_write_blocks_neither_readers_nor_its_successor(torn):
    first = ring()
    put(first, 1, 2, 3)
    reader = attached(first)
    assert reader.newest_seq == 3
    torn(first)
    second = attached(first)
    second.take_over()
    before = reader.newest_seq
    put(second, 40)
    newest = reader.newest()
    assert newest is not None
    assert newest[0] > before - 1
    assert (newest[0], int(newest[1]["value"])) == (4, 40)


def test_a_writer_killed_before_it_moved_the_head_is_followed_without_a_gap():
    first = ring()
    put(first, 1, 2)
    first._write(1 + 3 % first.capacity, 3, (3, (0.0, 0.0)))  # the record is there, the head still says 2
    reader, second = attached(first), attached(first)
    assert reader.newest_seq == 2
    second.take_over()
    assert second.publish((4, (0.0, 0.0))) == 4
    assert values(reader) == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_each_writer_begins_a_new_generation():
    first = ring()
    first.take_over()
    put(first, 1)
    second = attached(first)
    second.take_over()
    assert second._generation == first._generation + 1


def test_an_invalidated_slot_is_empty_and_not_torn():
    one = ring()
    put(one, 1, 2)
    one.invalidate(5)  # shares its slot with record 1
    assert (one.get(1), one.kept, values(one)) == (None, 0, [(2, 2)])


def test_every_signal_is_set_at_each_publication():
    one = ring()
    first, second = one.add_signal(), one.add_signal()
    assert (first.clear(), second.clear()) == (0, 0)
    put(one, 1, 2, 3)
    assert select.select([first], [], [], 0)[0]
    assert (first.clear(), second.clear(), first.clear()) == (3, 3, 0)


def test_memory_has_no_name_in_dev_shm():
    before = set(os.listdir("/dev/shm"))
    memory = Memory("test", 4096)
    view = memory.array(np.uint8, (16,), 4080)
    view[:] = 7
    assert memory.array(np.uint8, (4096,))[-16:].tolist() == [7] * 16
    assert not view[:0].size
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "relod" in name]


def test_rings_that_are_let_go_of_leave_no_descriptors():
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        one = ring()
        one.add_signal()
        put(one, 1)
        assert one.newest() is not None
    del one
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


# -- sensors -----------------------------------------------------------------------------------------------------------


def test_a_window_is_the_newest_packets_oldest_first():
    sensors = SensorRing(("a", "b"), capacity=8)
    assert sensors.window(3).values.shape == (0, 2)
    for number in range(1, 12):
        sensors.publish(100 * number, (number, -number))
    window = sensors.window(3)
    assert window.seq.tolist() == [9, 10, 11]
    assert window.arrived_ns.tolist() == [900, 1000, 1100]
    assert (window.column("b").tolist(), window.newest("a")) == ([-9.0, -10.0, -11.0], 11.0)
    assert len(sensors.window(99).seq) == 8


def test_a_packet_that_comes_while_the_window_is_read_does_not_make_it_longer():
    sensors = SensorRing(("a",), capacity=8)
    for number in range(5):
        sensors.publish(number, (number,))
    ring, since = sensors.ring, sensors.ring.since

    def late(seq):
        sensors.publish(5, (5,))
        return since(seq)

    ring.since = late  # type: ignore[method-assign]
    assert sensors.window(3).seq.tolist() == [4, 5, 6]


# -- frames ------------------------------------------------------------------------------------------------------------


def image_of(frames: FrameRing, value: int) -> np.ndarray:
    return np.full((frames.height, frames.width, 3), value, np.uint8)


def test_frames_come_back_by_id_while_they_are_kept():
    frames = FrameRing(4, 6, capacity=3)
    assert (frames.newest_id, frames.get(1)) == (0, None)
    for number in range(1, 6):
        assert frames.publish(10 * number, 10 * number + 1, image_of(frames, number)) == number
    assert frames.newest_id == 5
    assert [frames.get(number) is None for number in range(1, 7)] == [True, True, False, False, False, True]
    frame = frames.get(4)
    assert frame is not None
    assert (frame.id, frame.captured_ns, frame.arrived_ns) == (4, 40, 41)
    np.testing.assert_array_equal(frame.image, image_of(frames, 4))
    frames.publish(60, 61, image_of(frames, 6))
    frames.publish(70, 71, image_of(frames, 7))
    np.testing.assert_array_equal(frame.image, image_of(frames, 4))  # a copy


def test_an_image_overwritten_while_it_is_read_is_not_returned():
    frames = FrameRing(4, 6, capacity=2)
    for number in range(1, 3):
        frames.publish(number, number, image_of(frames, number))
    pixels = frames._pixels

    class Overtaken:
        """The writer laps the reader just before the pixels are copied."""

        def __getitem__(self, slot):
            frames._pixels = pixels
            for number in range(3, 5):
                frames.publish(number, number, image_of(frames, number))
            return pixels[slot]

    frames._pixels = Overtaken()  # type: ignore[assignment]
    assert frames.get(1) is None


def test_an_image_that_was_never_finished_is_never_seen():
    frames = FrameRing(4, 6, capacity=2)
    for number in range(1, 3):
        frames.publish(number, number, image_of(frames, number))
    frames.ring.invalidate(3)  # a writer about to overwrite frame 1 was killed here
    assert (frames.get(1), frames.newest_id) == (None, 2)
    frames.take_over()
    assert frames.publish(3, 3, image_of(frames, 3)) == 3


# -- between processes -------------------------------------------------------------------------------------------------


def spawned(target, job):
    process = multiprocessing.get_context("spawn").Process(target=target, args=(job,))
    process.start()
    return process


def small_job(packets: int) -> RingsJob:
    return RingsJob(sensors=SensorRing(("a", "b"), 8), frames=FrameRing(48, 64, 4), done=Signal(), packets=packets)


@pytest.mark.slow
def test_a_spawned_process_goes_on_with_both_rings():
    job = small_job(5)
    job.sensors.publish(10, (1, -1))
    frame_signal = job.frames.add_signal()
    process = spawned(write_rings, job)
    assert select.select([job.done], [], [], 20)[0]
    process.join(10)
    window = job.sensors.window(4)
    assert window.seq.tolist() == [3, 4, 5, 6]
    assert window.column("a").tolist() == [3.0, 4.0, 5.0, 6.0]
    assert (job.frames.newest_id, frame_signal.clear()) == (5, 5)
    frame = job.frames.get(5)
    assert frame is not None
    assert set(frame.image.ravel()) == {5}
    process.close()


@pytest.mark.slow
def test_no_torn_image_is_seen_of_a_writer_that_is_killed_and_replaced():
    job = small_job(0)
    seen, intact = 0, True
    for _ in range(2):
        process = spawned(write_frames_for_ever, job)
        before_id, end_ns = job.frames.newest_id, monotonic_ns() + 10 * NS_PER_S
        while job.frames.newest_id < before_id + 400 and monotonic_ns() < end_ns:
            frame = job.frames.get(job.frames.newest_id)
            if frame is not None:
                seen += 1
                intact = intact and set(frame.image.ravel()) == {frame.id % 256}
        process.kill()
        process.join(10)
        process.close()
        assert job.frames.newest_id > before_id
    assert intact
    assert seen > 10
    job.frames.take_over()
    next_id = job.frames.newest_id + 1
    assert job.frames.publish(1, 1, image_of(job.frames, 9)) == next_id
    assert job.frames.get(next_id) is not None
