from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relod.runtime.messages import CycleRecord, encode
from relod.runtime.remote.intake import FRAMES_KEPT, Intake, check_spec
from relod.runtime.remote.wire import CarriedFrame, FrameHead, Observe, RecordHead, WireError
from relod.types import EpisodeEnd, Step
from tests.runtime.logs import make_end, make_step
from tests.runtime.remote.wirerobots import SPEC, pixels

NAN = np.array([np.nan], np.float32)
CYCLE = CycleRecord(
    now_ns=0,
    sensor_seq=(),
    sensor_arrived_ns=(),
    sensor_values=b"",
    frames=(),
    policy_version=(0, 0),
    command=(),
    request=0,
    phase="",
)


def new_intake(position: tuple[int, int] | None = None, codec: str = "raw") -> Intake:
    return Intake(SPEC, codec, position)


def give(intake: Intake, message: Step | EpisodeEnd, seq: int) -> object:
    for frame_id in message.frame_ids:
        intake.frame(FrameHead(id=frame_id, captured_ns=frame_id), memoryview(pixels(frame_id)))
    return intake.record(RecordHead(seq=seq), memoryview(encode(message)))


def test_a_record_comes_with_the_frames_it_names() -> None:
    step = make_step(0, 0, first_frame=7)
    message, frames = give(new_intake(), step, 1)
    assert encode(message) == encode(step)
    assert {frame_id: bytes(frame.data) for frame_id, frame in frames.items()} == {7: pixels(7), 8: pixels(8)}


def test_episodes_one_after_another() -> None:
    intake = new_intake()
    run = [make_step(0, 0), make_step(0, 1), make_end(0, 2), make_step(3, 0), make_step(4, 0), make_end(4, 1)]
    assert all(give(intake, message, seq) is not None for seq, message in enumerate(run, 1))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (make_step(0, 0), make_step(0, 0)),
        (make_step(0, 0), make_step(0, 2)),
        (make_step(0, 0), make_step(1, 1)),
        (make_step(0, 0), make_end(0, 2)),
        (make_step(0, 0), make_end(1, 1)),
        (make_end(0, 1), make_step(0, 2)),
        (make_end(0, 1), make_end(0, 2)),
        (make_end(0, 1), make_end(1, 0)),
        (make_end(2, 1), make_step(1, 0)),
    ],
)
def test_what_does_not_come_next(first: Step | EpisodeEnd, second: Step | EpisodeEnd) -> None:
    intake = new_intake((first.episode, 0) if isinstance(first, EpisodeEnd) else None)
    give(intake, first, 5)
    with pytest.raises(WireError, match=r"at \(\d, \d\) after \(\d, \d\)"):
        give(intake, second, 6)


@pytest.mark.parametrize("message", [make_step(0, 1), make_end(0, 1), make_end(0, 0)])
def test_a_run_begins_with_a_first_step(message: Step | EpisodeEnd) -> None:
    with pytest.raises(WireError, match="after None"):
        give(new_intake(), message, 1)


@pytest.mark.parametrize("seqs", [(0,), (1, 1), (1, 3), (2, 1)])
def test_sequence_numbers_are_consecutive(seqs: tuple[int, ...]) -> None:
    intake = new_intake()
    with pytest.raises(WireError, match=r"record \d after record \d"):  # noqa: PT012
        for index, seq in enumerate(seqs):
            give(intake, make_step(0, index), seq)


def test_what_is_in_the_log_already_is_not_taken_again() -> None:
    intake = new_intake((0, 3))
    taken = [give(intake, make_step(0, index), index + 1) is not None for index in range(1, 6)]
    assert taken == [False, False, False, True, True]


def test_even_duplicates_come_in_order() -> None:
    intake = new_intake((0, 3))
    give(intake, make_step(0, 2), 3)
    with pytest.raises(WireError):
        give(intake, make_step(0, 1), 4)


def test_a_new_connection_goes_on_after_the_log() -> None:
    assert give(new_intake((0, 3)), make_step(0, 4), 9) is not None
    assert give(new_intake((0, 3)), make_end(0, 4), 9) is not None
    assert give(new_intake((0, 3)), make_step(1, 0), 9) is not None
    for gap in (make_step(0, 5), make_end(0, 5), make_step(1, 1)):
        with pytest.raises(WireError):
            give(new_intake((0, 3)), gap, 9)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"frame_ids": (1,)}, "names 1 frames, not 2"),
        ({"proprio": np.zeros(3, np.float32)}, "proprioception of 3 values, not 2"),
        ({"proprio": np.array([0, np.inf], np.float32)}, "proprioception that is not finite"),
        ({"action": np.zeros(2, np.float32)}, "action of 2 values, not 1"),
        ({"action": NAN}, "action that is not finite"),
        ({"action": np.array([1.01], np.float32)}, r"outside \[-1, 1\]"),
        ({"extras": NAN}, "extras that is not finite"),
        ({"reward": float("nan")}, "reward that is not finite"),
        ({"reward": float("-inf")}, "reward that is not finite"),
        ({"episode": -1}, "count out of range"),
        ({"episode": 2**60}, "count out of range"),
        ({"policy_version": (-1, 0)}, "count out of range"),
        ({"acted_ns": 2**63}, "stamp out of range"),
    ],
)
def test_a_step_that_is_not_the_tasks(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(WireError, match=text):
        give(new_intake(), dataclasses.replace(make_step(), **changes), 1)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"frame_ids": (1, 2, 3)}, "names 3 frames, not 2"),
        ({"proprio": np.full(2, np.nan, np.float32)}, "proprioception that is not finite"),
        ({"return_": float("inf")}, "return that is not finite"),
        ({"length": -1}, "count out of range"),
        ({"observed_ns": 2**63}, "stamp out of range"),
    ],
)
def test_an_end_that_is_not_the_tasks(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(WireError, match=text):
        give(new_intake((0, 0)), dataclasses.replace(make_end(), **changes), 1)


@pytest.mark.parametrize("payload", [b"", b"\x00", encode(make_step())[:-1], encode(CYCLE), b"x" * 100_000])
def test_a_record_that_is_none(payload: bytes) -> None:
    with pytest.raises(WireError, match="a record"):
        new_intake().record(RecordHead(seq=1), memoryview(payload))


@given(
    st.binary(max_size=200) | st.builds(lambda at, byte: _spoiled(at, byte), st.integers(0, 200), st.binary(max_size=3))
)
def test_no_record_gets_past_that_is_not_the_tasks(payload: bytes) -> None:
    intake = new_intake()
    for frame_id in (1, 2):
        intake.frame(FrameHead(id=frame_id, captured_ns=0), memoryview(pixels(frame_id)))
    try:
        taken = intake.record(RecordHead(seq=1), memoryview(payload))
    except WireError:
        return
    assert taken is not None
    step = taken[0]
    assert isinstance(step, Step)
    assert (step.index, step.frame_ids, step.proprio.shape, step.action.shape) == (0, (1, 2), (2,), (1,))
    assert np.isfinite([*step.proprio, *step.action, *step.extras, step.reward]).all()
    assert abs(step.action[0]) <= 1.001


def _spoiled(at: int, put: bytes) -> bytes:
    data = encode(make_step())
    return data[:at] + put + data[at + len(put) :]


# -- frames ------------------------------------------------------------------------------------------------------------


def test_a_raw_frame_has_the_tasks_size() -> None:
    for size in (0, 17, 19, 36):
        with pytest.raises(WireError, match=f"frame 1 has {size} bytes, not 18"):
            new_intake().frame(FrameHead(id=1, captured_ns=0), memoryview(bytes(size)))
    new_intake(codec="jpeg").frame(FrameHead(id=1, captured_ns=0), memoryview(b"any size"))


def test_a_frame_that_was_not_sent() -> None:
    intake = new_intake()
    intake.frame(FrameHead(id=1, captured_ns=0), memoryview(pixels(1)))
    with pytest.raises(WireError, match="frame 2 was not sent"):
        intake.record(RecordHead(seq=1), memoryview(encode(make_step())))


def test_frames_that_no_later_record_can_name_are_dropped() -> None:
    intake = new_intake()
    for index in range(5):
        give(intake, make_step(0, index, first_frame=10 * index + 1), index + 1)
    assert list(intake._frames) == [41, 42]


def test_frames_that_no_record_names_take_bounded_memory() -> None:
    intake = new_intake()
    for frame_id in range(FRAMES_KEPT + 5):
        intake.frame(FrameHead(id=frame_id, captured_ns=0), memoryview(pixels(0)))
    assert list(intake._frames) == list(range(5, FRAMES_KEPT + 5))
    large = new_intake(codec="jpeg")
    for frame_id in range(10):
        large.frame(FrameHead(id=frame_id, captured_ns=0), memoryview(bytes(10_000_000)))
    assert list(large._frames) == list(range(4, 10))


def test_a_frame_that_comes_again_takes_the_place_of_the_former() -> None:
    intake = new_intake()
    for stamp in (5, 6):
        intake.frame(FrameHead(id=1, captured_ns=stamp), memoryview(pixels(stamp)))
    assert [(frame.captured_ns, bytes(frame.data)) for frame in intake._frames.values()] == [(6, pixels(6))]
    assert intake._frames_bytes == 18


# -- questions ---------------------------------------------------------------------------------------------------------


def ask(intake: Intake, payload: bytes = bytes(8), **changes: Any) -> object:
    head = {"ask": 1, "episode": 0, "index": 0, "frame_ids": (1, 2), "now_ns": 0, **changes}
    return intake.question(Observe(**head), memoryview(payload))


def ready_intake() -> Intake:
    intake = new_intake()
    for frame_id in (1, 2):
        intake.frame(FrameHead(id=frame_id, captured_ns=0), memoryview(pixels(frame_id)))
    return intake


CARRIED = CarriedFrame(id=2, captured_ns=7, size=18)


def test_a_question_may_carry_the_frames_that_were_not_sent() -> None:
    intake = new_intake()
    intake.frame(FrameHead(id=1, captured_ns=0), memoryview(pixels(1)))
    payload = np.array([1, 2], np.float32).tobytes() + pixels(2)
    frames, proprio = ask(intake, payload, frames=(CARRIED,))
    assert [(frame.captured_ns, bytes(frame.data)) for frame in frames] == [(0, pixels(1)), (7, pixels(2))]
    assert proprio.tolist() == [1, 2]
    ask(intake, ask=2)  # it is kept as one that came by itself


def test_a_question_comes_with_its_frames_in_order() -> None:
    frames, proprio = ask(ready_intake(), np.array([1, 2], np.float32).tobytes(), frame_ids=(2, 1))
    assert [bytes(frame.data) for frame in frames] == [pixels(2), pixels(1)]
    assert proprio.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"frame_ids": (1, 2, 2)}, "names 3 frames, not 2"),
        ({"frame_ids": (1, 9)}, "frame 9 was not sent"),
        ({"payload": bytes(7)}, "has 7 bytes, not 8"),
        ({"payload": bytes(9)}, "1 bytes that belong to nothing"),
        ({"frames": (CARRIED,)}, "frame 2 has 0 bytes, not 18"),
        ({"frames": (CARRIED,), "payload": bytes(8 + 17)}, "frame 2 has 17 bytes, not 18"),
        ({"frames": (CARRIED,), "payload": bytes(8 + 19)}, "1 bytes that belong to nothing"),
        ({"frames": (CarriedFrame(id=2, captured_ns=0, size=17),), "payload": bytes(8 + 17)}, "17 bytes, not 18"),
        ({"frames": (CARRIED,) * 3, "payload": bytes(8 + 54)}, "carries 3 frames"),
        ({"payload": np.array([0, np.nan], np.float32).tobytes()}, "not finite"),
        ({"ask": 0}, "question 0 after question 0"),
    ],
)
def test_a_question_that_is_not_the_tasks(changes: dict[str, Any], text: str) -> None:
    intake = ready_intake()
    ask(intake, ask=0)
    with pytest.raises(WireError, match=text):
        ask(intake, **changes)


# -- tasks -------------------------------------------------------------------------------------------------------------


def test_a_task_of_the_papers_sizes_is_possible() -> None:
    check_spec(SPEC)
    check_spec(dataclasses.replace(SPEC, image_hw=(480, 640), frames=3))


@pytest.mark.parametrize(
    "changes",
    [
        {"frames": 0},
        {"frames": 65},
        {"cycle_ns": 0},
        {"max_steps": -1},
        {"image_hw": (-2, -3)},
        {"image_hw": (1 << 40, 1 << 40)},
        {"image_hw": (2000, 2000), "frames": 3},
        {"camera_hw": (0, 5)},
        {"camera_fps": float("nan")},
        {"action_names": ()},
        {"action_names": ("a",) * 1025},
        {"proprio_names": ("p",) * 5000},
    ],
)
def test_a_task_that_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        check_spec(dataclasses.replace(SPEC, **changes))


def test_a_record_of_any_msgpack_is_an_error_at_most() -> None:
    for value in (None, 5, [], ["step"], {"type": "step"}, ["step", *range(12)]):
        with pytest.raises(WireError):
            new_intake().record(RecordHead(seq=1), memoryview(msgspec.msgpack.encode(value)))
