"""The experience log, read: whole records only, and around damage everything that is whole."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relod.errors import StartError
from relod.runtime.log.format import (
    EncodedFrame,
    Kind,
    LogPosition,
    SegmentHeader,
    pack_frame,
    pack_header,
    pack_message,
    read_header,
    read_record,
)
from relod.runtime.log.reader import LogReader, find_log
from relod.runtime.log.writer import LogWriter
from relod.types import Step
from tests.runtime.logs import (
    HW,
    SPEC,
    episodes,
    files,
    interleaved,
    make_step,
    picture,
    plain,
    read,
    write,
)

SMALL = 1200
CALLS = interleaved(episodes((5, 1, 8, 3, 9)), episodes((4, 4, 11, 2), stream=7))


@pytest.fixture(autouse=True, scope="module")
def _no_syncs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path / "log")


def written(folder: Path, calls=CALLS) -> Path:
    with LogWriter.create(folder, SPEC, segment_bytes=SMALL) as writer:
        write(writer, calls)
    return folder


def segment(folder: Path, number: int) -> Path:
    return folder / f"segment-{number:06}.relodlog"


def flip(path: Path, at: int, bits: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bits
    path.write_bytes(content)


def record_ends(data: bytes) -> list[int]:
    """Offsets at which the steps, ends and cuts of a segment end."""
    begun = read_header(data)
    assert begun is not None
    at, ends = begun[1], []
    while (record := read_record(data, at)) is not None:
        at = record.end
        if record.kind is not Kind.FRAME:
            ends.append(at)
    return ends


def messages(records: list[tuple[int, bytes | None]]) -> list[tuple[int, bytes | None]]:
    return [record for record in records if record[1] is not None]


# -- whole logs --------------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_torn_end_is_left_out_silently(data):
    with tempfile.TemporaryDirectory() as root:
        folder = written(Path(root))
        newest = max(folder.iterdir())
        content = newest.read_bytes()
        cut = data.draw(st.integers(0, len(content)))
        newest.write_bytes(content[:cut])
        lost = sum(end > cut for end in record_ends(content))
        reader = LogReader(folder)
        assert read(reader) == plain(CALLS)[: len(CALLS) - lost]
        assert reader.damage == []
        assert 0 <= reader.torn_bytes <= cut


def test_a_log_is_read_while_it_is_written(tmp_path):
    with LogWriter.create(tmp_path / "log", SPEC, segment_bytes=SMALL) as writer:
        reader = LogReader(tmp_path / "log")
        for n, call in enumerate(CALLS):
            write(writer, [call])
            assert read(reader) == plain(CALLS[: n + 1])
            assert (reader.damage, reader.torn_bytes) == ([], 0)


def test_an_iteration_ends_at_a_position(folder):
    reader = LogReader(folder)
    everything = list(reader.iterate())
    for n, record in enumerate(everything):
        assert len(list(reader.iterate(until=record.position))) == n + 1


def test_a_position_before_everything_gives_nothing(folder):
    assert list(LogReader(folder).iterate(until=LogPosition(segment=1, offset=0, env_steps=0))) == []


@pytest.mark.parametrize("start", [0, 1, 11, 30, 46, 47, 1000])
def test_an_iteration_starts_with_the_segment_that_holds_a_step(folder, start):
    reader = LogReader(folder)
    everything = list(reader.iterate())
    part = list(reader.iterate(from_env_steps=start))
    assert [r.position for r in part] == [r.position for r in everything[-len(part) :]]
    assert part[0].position.segment == part[0].position.segment
    first_after = next((r for r in part if r.env_steps > start), None)
    expected = next((r for r in everything if r.env_steps > start), None)
    assert (first_after and first_after.position) == (expected and expected.position)
    holding = expected.position.segment if expected else everything[-1].position.segment
    assert part[0].position.segment == holding


def test_frames_are_decoded_when_asked_for(folder, monkeypatch):
    asked = []
    reader = LogReader(folder)
    record = next(reader.iterate())
    decode = reader._codec.decode
    monkeypatch.setattr(reader._codec, "decode", lambda data: asked.append(1) or decode(data))
    assert len(record.frames) == 2
    assert asked == []
    assert (record.frames[1] == picture(0, 1)).all()
    assert asked == [1]
    with pytest.raises(KeyError):
        record.frames[99]


def test_a_summary_tells_what_there_is(folder):
    summary = LogReader(folder).summary()
    assert (summary.steps, summary.first_env_step, summary.last_env_step) == (47, 0, 47)
    assert (summary.episodes, summary.successes, summary.cuts, summary.streams) == (9, 9, 0, 2)
    assert (summary.return_min, summary.return_median, summary.return_max) == (-11.0, -4.0, -1.0)
    assert summary.policies == ((1, 0), (1, 48))
    assert summary.frames == 47 + 2 * 9  # a new frame each step and end; the first step of an episode names two
    assert summary.size_bytes == sum(map(len, files(folder).values()))
    assert (summary.segments, summary.codec, summary.task) == (len(files(folder)), "raw", "fake")


def test_a_summary_of_an_empty_log(tmp_path):
    LogWriter.create(tmp_path, SPEC).close()
    summary = LogReader(tmp_path).summary()
    assert (summary.segments, summary.steps, summary.return_median, summary.policies) == (1, 0, None, None)


# -- damage ------------------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_flipped_byte_is_told_and_costs_at_most_the_rest_of_its_segment(data):
    with tempfile.TemporaryDirectory() as root:
        folder = written(Path(root))
        path = data.draw(st.sampled_from(sorted(folder.iterdir())))
        content = path.read_bytes()
        at = data.draw(st.integers(0, len(content) - 1))
        flip(path, at, data.draw(st.integers(1, 255)))
        ends = [0, *record_ends(content)]
        in_segment = len(ends) - 1
        kept_of_it = sum(end <= at for end in ends[1:])
        before = sum(len(record_ends(p.read_bytes())) for p in sorted(folder.iterdir()) if p < path)
        expected = plain(CALLS)[: before + kept_of_it] + plain(CALLS)[before + in_segment :]
        reader = LogReader(folder)
        assert messages(read(reader)) == expected
        assert len(reader.damage) == 1
        assert path.name in reader.damage[0]


def test_a_missing_segment_is_told_with_its_steps_and_cuts_open_episodes(folder):
    lost = len([r for r in LogReader(folder).iterate() if r.position.segment == 2 and r.kind is Kind.STEP])
    segment(folder, 2).unlink()
    reader = LogReader(folder)
    records = list(reader.iterate())
    assert reader.damage == [
        f"segment-000002.relodlog is damaged at byte 0: the file is missing; {lost} steps lost",
    ]
    at = next(n for n, record in enumerate(records) if record.kind is Kind.CUT)
    assert records[at - 1].position.segment == 1
    assert {record.stream for record in records if record.kind is Kind.CUT} == {0, 7}
    assert records[-1].env_steps == 47


def test_damage_in_the_newest_segment_is_told_without_a_count(folder):
    newest = max(folder.iterdir())
    flip(newest, newest.stat().st_size - 1)
    reader = LogReader(folder)
    list(reader.iterate())
    assert len(reader.damage) == 1
    assert reader.damage[0].endswith("a record has a wrong checksum")


def test_a_segment_that_ends_early_is_damaged_unless_it_is_the_newest(folder):
    content = segment(folder, 2).read_bytes()
    segment(folder, 2).write_bytes(content[:-5])
    reader = LogReader(folder)
    list(reader.iterate())
    assert "segment-000002" in reader.damage[0]
    assert "the file ends within a record; " in reader.damage[0]


def test_an_empty_segment_is_damaged_unless_it_is_the_newest(folder):
    segment(folder, 2).write_bytes(b"")
    reader = LogReader(folder)
    list(reader.iterate())
    assert "the file ends within a record; " in reader.damage[0]


def test_a_segment_in_the_place_of_another_is_damage(folder):
    segment(folder, 2).write_bytes(segment(folder, 3).read_bytes())
    reader = LogReader(folder)
    list(reader.iterate())
    assert "says that it is segment 3" in reader.damage[0]


def test_steps_that_the_headers_miss_are_told(folder, tmp_path):
    other = written(tmp_path / "other", episodes((2,) * 30))
    segment(folder, 2).write_bytes(segment(other, 2).read_bytes())
    reader = LogReader(folder)
    list(reader.iterate())
    assert reader.damage[0].startswith("segment-000002.relodlog begins at step ")


def append_bytes(folder: Path, data: bytes) -> None:
    newest = max(folder.iterdir())
    newest.write_bytes(newest.read_bytes() + data)


def test_a_step_whose_frame_is_missing_is_left_out_and_its_episode_cut(tmp_path):
    folder = written(tmp_path, episodes((3,))[:2])
    append_bytes(folder, pack_message(0, make_step(0, 2, first_frame=70)))
    reader = LogReader(folder)
    records = list(reader.iterate())
    assert [record.kind.name for record in records] == ["STEP", "STEP", "CUT"]
    assert records[-1].env_steps == 3
    assert len(reader.damage) == 1
    assert reader.damage[0].endswith("names frame 70, which is missing")


def test_a_frame_of_the_segment_before_does_not_count(tmp_path):
    folder = written(tmp_path, episodes((3,))[:2])
    header = pack_header(SegmentHeader(segment=2, env_steps=2, spec=SPEC))
    segment(folder, 2).write_bytes(header + pack_message(0, make_step(0, 2, first_frame=1)))
    reader = LogReader(folder)
    assert [record.kind.name for record in reader.iterate()] == ["STEP", "STEP", "CUT"]
    assert reader.damage[0].startswith("segment-000002.relodlog: the STEP at byte ")


def test_a_frame_of_another_size_is_a_start_error_when_asked_for(tmp_path):
    folder = written(tmp_path, [])
    frames = [pack_frame(0, n, EncodedFrame(captured_ns=0, data=b"few")) for n in (1, 2)]
    append_bytes(folder, b"".join(frames) + pack_message(0, make_step()))
    (record,) = LogReader(folder).iterate()
    with pytest.raises(StartError, match="frame 1 of the log cannot be decoded"):
        record.frames[1]


def test_a_log_of_which_nothing_can_be_read_is_refused(tmp_path):
    folder = written(tmp_path, [])
    segment(folder, 1).write_bytes(b"something else")
    with pytest.raises(StartError, match="no segment of an experience log"):
        LogReader(folder)
    segment(folder, 1).write_bytes(b"")
    with pytest.raises(StartError, match="no whole header"):
        LogReader(folder)


def test_a_log_is_found_in_a_run_and_by_a_link(tmp_path):
    written(tmp_path / "run" / "log", [])
    (tmp_path / "latest").symlink_to("run")
    assert find_log(tmp_path / "run") == tmp_path / "run" / "log"
    assert find_log(tmp_path / "latest") == tmp_path / "latest" / "log"
    assert find_log(tmp_path / "run" / "log") == tmp_path / "run" / "log"
    with pytest.raises(StartError, match="holds no experience log"):
        find_log(tmp_path)
    with pytest.raises(StartError, match="there is no folder"):
        find_log(tmp_path / "nothing")


def test_pictures_are_of_the_size_in_the_spec(folder):
    for record in LogReader(folder).iterate():
        assert all(image.shape == (*HW, 3) for image in record.frames.values())
        if isinstance(record.message, Step):
            assert record.frames.captured_ns(record.message.frame_ids) == tuple(100 * n for n in record.frames)
