"""The experience log, written: what was returned for is there, and a resumed log is the one never interrupted."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relod.errors import SafetyStop, StartError
from relod.runtime.log.codec import make_codec
from relod.runtime.log.format import EncodedFrame, LogPosition, LogSpec, SegmentHeader, find_segments, read_header
from relod.runtime.log.reader import LogReader
from relod.runtime.log.writer import LogWriter
from tests.fakes import SPEC as TASK_SPEC
from tests.runtime.logs import (
    HW,
    SPEC,
    episodes,
    files,
    frames_of,
    interleaved,
    make_end,
    make_step,
    plain,
    read_folder,
    write,
)

SMALL = 1200  # bytes: a header and about eight steps
CALLS = interleaved(episodes((5, 1, 8, 3, 9)), episodes((4, 4, 11, 2), stream=7))


@pytest.fixture(autouse=True, scope="module")
def synced():
    """The descriptors that were synced; a busy disk would take most of the time of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        fds: list[int] = []
        patch.setattr(os, "fsync", fds.append)
        yield fds


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "log"


def written(folder: Path, calls=CALLS, segment_bytes: int = SMALL) -> Path:
    with LogWriter.create(folder, SPEC, segment_bytes=segment_bytes) as writer:
        write(writer, calls)
    return folder


def headers(folder: Path) -> list[SegmentHeader]:
    begun = [read_header(data) for data in files(folder).values()]
    return [header for header, _ in filter(None, begun)]


def fail_writes(monkeypatch, *, after_bytes: int = 1) -> None:
    """From now on every write stores a byte and then fails."""
    system_write, left = os.write, [after_bytes]

    def failing(fd: int, data: bytes) -> int:
        if left:
            return system_write(fd, bytes(data[: left.pop()]))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", failing)


# -- what is written ---------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_in_its_order(folder):
    written(folder)
    assert read_folder(folder) == plain(CALLS)
    assert len(find_segments(folder)) > 3


def test_a_spec_is_made_of_a_task():
    spec = LogSpec.for_task(TASK_SPEC, "jpeg")
    assert (spec.task, spec.k, spec.image_hw, spec.codec) == ("fake", 2, (4, 6), "jpeg")
    assert spec.proprio_names == TASK_SPEC.proprio_names


def test_a_frame_is_stored_once_in_a_segment(folder):
    calls = episodes((20,))
    written(folder, calls, segment_bytes=1 << 20)
    (data,) = files(folder).values()
    assert data.count(bytes((0, 5, 0)) * (HW[0] * HW[1])) == 1


def test_every_segment_stands_alone(folder):
    written(folder)
    for number in list(find_segments(folder))[:-1]:
        (folder / f"segment-{number:06}.relodlog").unlink()
        assert LogReader(folder).summary().damage == []


def test_segments_keep_their_size(folder):
    written(folder)
    assert all(len(data) <= SMALL for data in files(folder).values())


def test_a_step_larger_than_a_segment_has_one_to_itself(folder):
    calls = episodes((3,))
    written(folder, calls, segment_bytes=1)
    assert len(find_segments(folder)) == len(calls)
    assert read_folder(folder) == plain(calls)


def test_equal_experience_gives_equal_bytes(tmp_path):
    assert files(written(tmp_path / "a")) == files(written(tmp_path / "b"))


def test_the_same_id_with_another_stamp_is_another_frame(folder):
    first, second = make_step(index=0), make_step(index=1)
    with LogWriter.create(folder, SPEC) as writer:
        writer.append(first, frames_of(0, first))
        writer.cut()
        again = {
            frame_id: EncodedFrame(captured_ns=7, data=np.full((*HW, 3), 9, np.uint8).tobytes())
            for frame_id in second.frame_ids
        }
        writer.append(second, again)
    *_, last = LogReader(folder).iterate()
    assert all((image == 9).all() for image in last.frames.values())
    assert last.frames.captured_ns(second.frame_ids) == (7, 7)


def test_a_raw_log_takes_bare_images(folder):
    step = make_step()
    images = {frame_id: np.full((*HW, 3), frame_id, np.uint8) for frame_id in step.frame_ids}
    with LogWriter.create(folder, SPEC) as writer:
        writer.append(step, images)
    (record,) = LogReader(folder).iterate()
    assert {frame_id: image[0, 0, 0] for frame_id, image in record.frames.items()} == {1: 1, 2: 2}


@pytest.mark.parametrize(
    ("frames", "codec", "said"),
    [
        ({1: np.zeros((*HW, 3), np.uint8)}, "raw", "frame 2 is neither given nor in the segment"),
        ({n: np.zeros((9, 9, 3), np.uint8) for n in (1, 2)}, "raw", r"\(9, 9, 3\) uint8, not \(2, 3, 3\)"),
        ({n: np.zeros((*HW, 3), np.uint8) for n in (1, 2)}, "jpeg", "encoded already"),
    ],
)
def test_a_step_without_its_frames_is_refused_and_leaves_nothing(folder, frames, codec, said):
    spec = msgspec.structs.replace(SPEC, codec=codec)
    with LogWriter.create(folder, spec) as writer:
        before = writer.position
        with pytest.raises(ValueError, match=said):
            writer.append(make_step(), frames)
        assert writer.position == before


def test_jpeg_gives_the_pixels_that_its_bytes_decode_to(folder):
    hw = (16, 24)
    spec = msgspec.structs.replace(SPEC, codec="jpeg", image_hw=hw)
    codec = make_codec("jpeg", 70, image_hw=hw)
    rng = np.random.default_rng(0)
    step = make_step()
    encoded = {n: codec.encode(rng.integers(0, 255, (*hw, 3), dtype=np.uint8)) for n in step.frame_ids}
    with LogWriter.create(folder, spec) as writer:
        writer.append(step, {n: EncodedFrame(captured_ns=n, data=data) for n, data in encoded.items()})
    (record,) = LogReader(folder).iterate()
    for n, data in encoded.items():
        assert np.array_equal(record.frames[n], codec.decode(data))


def test_positions_count_steps_and_bytes(folder):
    with LogWriter.create(folder, SPEC) as writer:
        write(writer, episodes((2,)))
        assert writer.env_steps == 2
        assert writer.position == LogPosition(segment=1, offset=writer.size_bytes, env_steps=2)
        *_, last = LogReader(folder).iterate()
        assert last.position == writer.position


def test_a_folder_with_a_log_is_not_written_over(folder):
    written(folder)
    with pytest.raises(StartError, match="holds an experience log already"):
        LogWriter.create(folder, SPEC)


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_nothing_is_deleted_until_it_is_said_what_is_needed(folder):
    with LogWriter.create(folder, SPEC, segment_bytes=SMALL, limit_bytes=3 * SMALL) as writer:
        write(writer, CALLS)
        assert min(find_segments(folder)) == 1
        assert writer.size_bytes > 3 * SMALL
        writer.keep_from(writer.env_steps)
        assert writer.size_bytes <= 3 * SMALL
        assert writer.size_bytes == sum(map(len, files(folder).values()))


@given(needed=st.integers(0, 60))
@settings(max_examples=20, deadline=None)
def test_only_whole_segments_that_are_not_needed_are_deleted(needed):
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        with LogWriter.create(folder, SPEC, segment_bytes=SMALL, limit_bytes=1) as writer:
            writer.keep_from(needed)
            write(writer, CALLS)
            total = writer.env_steps
        records = list(LogReader(folder).iterate(from_env_steps=min(needed, total - 1)))
        steps = [record.env_steps - 1 for record in records if record.kind.name == "STEP"]
        assert steps[0] <= needed or total <= needed
        assert steps == list(range(steps[0], total))
        starts = [header.env_steps for header in headers(folder)]
        assert starts[0] <= needed
        assert all(start > needed for start in starts[1:])  # or the segment before it would have gone


def test_a_bounded_log_goes_on_where_it_was(folder):
    with LogWriter.create(folder, SPEC, segment_bytes=SMALL, limit_bytes=2 * SMALL) as writer:
        writer.keep_from(1000)
        write(writer, CALLS)
        position = writer.position
    with LogWriter.resume(folder, SPEC, segment_bytes=SMALL, limit_bytes=2 * SMALL, position=position) as writer:
        assert writer.position == position
    summary = LogReader(folder).summary()
    assert summary.first_env_step > 0
    assert summary.damage == []


# -- failures of the disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after_bytes", [1, 40])
def test_a_full_disk_ends_the_run_once_and_leaves_whole_records(folder, monkeypatch, after_bytes):
    calls = episodes((3,))
    writer = LogWriter.create(folder, SPEC)
    write(writer, calls)
    before = writer.position
    with monkeypatch.context() as patched:
        fail_writes(patched, after_bytes=after_bytes)
        with pytest.raises(SafetyStop, match=r"the disk is full: .*segment-000001"):
            writer.append(make_step(1), frames_of(0, make_step(1)))
    assert writer.failed
    write(writer, episodes((4,)))
    writer.cut()
    writer.sync()
    writer.keep_from(5)
    writer.close()
    assert writer.position == before
    assert files(folder)["segment-000001.relodlog"][before.offset :] == b""
    assert read_folder(folder) == plain(calls)


def test_a_limit_on_the_size_of_files_cuts_no_record_in_two(folder):
    calls = episodes((3,))
    writer = LogWriter.create(folder, SPEC)
    write(writer, calls)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (writer.size_bytes + 50, hard))
    try:
        with pytest.raises(SafetyStop, match="the disk is full"):
            write(writer, episodes((9, 9)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.close()
    assert writer.position.offset == (folder / "segment-000001.relodlog").stat().st_size
    assert read_folder(folder) == plain(calls)


def test_a_segment_that_cannot_be_begun_leaves_no_file(folder, monkeypatch):
    writer = LogWriter.create(folder, SPEC, segment_bytes=1)
    step = make_step()
    writer.append(step, frames_of(0, step))
    before = writer.position
    with monkeypatch.context() as patched:
        fail_writes(patched)
        with pytest.raises(SafetyStop, match="the disk is full"):
            writer.append(step, frames_of(0, step))
    writer.close()
    assert list(find_segments(folder)) == [1]
    assert writer.position == before


def test_full_segments_are_synced_and_so_is_everything_when_asked(folder, synced):
    synced.clear()
    with LogWriter.create(folder, SPEC, segment_bytes=1) as writer:
        write(writer, episodes((2,)))
        writer.sync()
        assert len(synced) == 2 + 2  # two full segments, the open one and the folder
    assert len(synced) == 2 + 2 + 2


def test_a_failed_sync_of_a_full_segment_is_told(folder, monkeypatch):
    writer = LogWriter.create(folder, SPEC, segment_bytes=1)

    def failing(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing)
        write(writer, episodes((1,)))  # the second segment is begun, and the first one's sync fails
        with pytest.raises(SafetyStop, match="Input/output error"):
            writer.sync()
    assert writer.failed
    writer.close()


def test_a_folder_that_cannot_be_made_is_a_start_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match="cannot be written"):
        LogWriter.create(tmp_path / "file" / "log", SPEC)


KILLED = """
import os, signal, sys
from pathlib import Path
from relod.runtime.log.writer import LogWriter
from tests.runtime.logs import SPEC, episodes, write
writer = LogWriter.create(Path(sys.argv[1]), SPEC, segment_bytes=1200)
write(writer, episodes((9, 4)))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_returned_for_survives_kill_9(folder):
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert read_folder(folder) == plain(episodes((9, 4)))


# -- going on ----------------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_resumed_log_is_the_one_never_interrupted(data):
    at = data.draw(st.integers(0, len(CALLS)), label="position")
    beyond = data.draw(st.integers(at, len(CALLS)), label="written before the end")
    with tempfile.TemporaryDirectory() as root:
        whole, broken = Path(root, "whole"), Path(root, "broken")
        written(whole)
        with LogWriter.create(broken, SPEC, segment_bytes=SMALL) as writer:
            write(writer, CALLS[:at])
            position = writer.position
            write(writer, CALLS[at:beyond])
        with LogWriter.resume(broken, SPEC, segment_bytes=SMALL, position=position) as writer:
            assert writer.position == position
            write(writer, CALLS[at:])
        assert files(broken) == files(whole)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_torn_log_goes_on_after_its_last_whole_record(data):
    with tempfile.TemporaryDirectory() as root:
        whole, broken = Path(root, "whole"), Path(root, "broken")
        written(whole)
        written(broken)
        newest = max(find_segments(broken).values())
        size = newest.stat().st_size
        os.truncate(newest, data.draw(st.integers(0, size), label="cut at"))
        there = len(read_folder(broken))
        with LogWriter.resume(broken, SPEC, segment_bytes=SMALL) as writer:
            assert there == len(read_folder(broken))
            write(writer, CALLS[there:])
        assert read_folder(broken) == plain(CALLS)
        assert all(files(broken)[name] == content for name, content in files(whole).items())


def test_zeros_at_the_end_are_what_a_power_cut_leaves(folder):
    written(folder)
    newest = max(find_segments(folder).values())
    before = newest.read_bytes()
    newest.write_bytes(before + bytes(5000))
    assert read_folder(folder) == plain(CALLS)
    LogWriter.resume(folder, SPEC).close()
    assert newest.read_bytes() == before


def test_an_empty_first_segment_is_begun_again(folder):
    folder.mkdir()
    (folder / "segment-000001.relodlog").touch()
    with LogWriter.resume(folder, SPEC, segment_bytes=SMALL) as writer:
        write(writer, CALLS)
    assert read_folder(folder) == plain(CALLS)


def refused(folder: Path, said: str, spec: LogSpec = SPEC, position: LogPosition | None = None) -> None:
    """Resuming says why it does not, and changes nothing."""
    before = files(folder) if folder.exists() else {}
    with pytest.raises(StartError, match=said):
        LogWriter.resume(folder, spec, segment_bytes=SMALL, position=position)
    assert (files(folder) if folder.exists() else {}) == before


def test_there_must_be_a_log_to_resume(folder):
    refused(folder, "holds no experience log")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("task", "other", "task is 'fake' in the log and 'other' here"),
        ("image_hw", (4, 6), r"image_hw is \(2, 3\) in the log and \(4, 6\) here"),
        ("codec", "jpeg", "codec is 'raw' in the log and 'jpeg' here"),
        ("proprio_names", ("x",), "proprio_names is"),
    ],
)
def test_another_spec_is_refused_by_its_field(folder, field, value, said):
    written(folder)
    spec = msgspec.structs.replace(SPEC, **{field: value})
    refused(folder, said, spec)
    with pytest.raises(StartError, match=said):
        LogReader(folder, spec)


def test_a_missing_segment_is_refused(folder):
    written(folder)
    (folder / "segment-000002.relodlog").unlink()
    refused(folder, r"segment-000002\.relodlog is missing")


def test_a_segment_put_in_the_place_of_another_is_refused(folder):
    written(folder)
    (folder / "segment-000002.relodlog").write_bytes((folder / "segment-000003.relodlog").read_bytes())
    refused(folder, "says that it is segment 3")


def test_a_segment_of_another_log_is_refused(folder, tmp_path):
    written(folder)
    other = written(tmp_path / "other", episodes((2,) * 30))
    (folder / "segment-000002.relodlog").write_bytes((other / "segment-000002.relodlog").read_bytes())
    refused(folder, r"segment-000002\.relodlog begins at step \d+, and the segments before it end at \d+")


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_damage_before_the_position_is_refused(data):
    with tempfile.TemporaryDirectory() as root:
        folder = written(Path(root))
        with LogWriter.resume(folder, SPEC) as writer:
            position = writer.position
        path = folder / data.draw(st.sampled_from(sorted(files(folder))))
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        refused(folder, path.name, position=position)


def test_damage_in_the_newest_segment_is_no_torn_tail(folder):
    written(folder)
    newest = max(find_segments(folder).values())
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    refused(folder, r"is damaged at byte \d+: a record has a wrong checksum")


@pytest.mark.parametrize(
    ("segment", "offset", "env_steps", "said"),
    [
        (99, 0, 0, r"has no segment-000099\.relodlog"),
        (1, 10**6, 5, "before the position 1000000"),
        (1, -1, 5, "is damaged: byte"),
        (1, 0, 99, "steps up to byte"),
    ],
)
def test_a_position_that_the_log_does_not_have_is_refused(folder, segment, offset, env_steps, said):
    with LogWriter.create(folder, SPEC) as writer:
        write(writer, CALLS[:10])
        end = writer.position.offset
    offset = offset if offset > 0 else end + offset
    refused(folder, said, position=LogPosition(segment=segment, offset=offset, env_steps=env_steps))


def test_a_headless_rest_of_a_bounded_log_is_refused(folder):
    folder.mkdir()
    (folder / "segment-000009.relodlog").touch()
    refused(folder, "no whole header")


def test_ends_and_cuts_come_back(folder):
    calls = [(0, make_step()), (0, None), (3, make_step()), (3, make_end()), (0, None)]
    written(folder, calls)
    assert read_folder(folder) == plain(calls)
