"""The learner's book of its streams."""

from __future__ import annotations

import pytest

from relod.errors import StartError
from relod.runtime.remote import streams
from relod.runtime.remote.streams import StreamBook

RUN, OTHER_RUN = "a" * 32, "b" * 32


def reopened(book):
    path = book._file.path
    book.close()
    return StreamBook(path)


@pytest.fixture
def book(tmp_path):
    return StreamBook(tmp_path / "streams.jsonl")


def test_every_run_of_every_robot_is_a_stream(book):
    assert [book.stream("x", RUN), book.stream("y", RUN), book.stream("x", OTHER_RUN)] == [0, 1, 2]
    assert book.stream("y", RUN) == 1
    again = reopened(book)
    assert again.robots == {0: ("x", RUN), 1: ("y", RUN), 2: ("x", OTHER_RUN)}
    assert again.stream("x", OTHER_RUN) == 2
    assert again.stream("z", RUN) == 3


def test_notes_say_where_streams_stand_and_later_ones_win(book):
    book.note({0: (0, 7), 1: (2, 1)}, 100)
    book.note({0: (1, 3), 1: (2, 1)}, 150)
    again = reopened(book)
    assert again.positions == {0: (1, 3), 1: (2, 1)}
    assert again.noted_steps == 150


def test_a_note_without_news_is_not_written(book):
    book.note({0: (0, 7)}, 100)
    size = book._file.size_bytes
    book.note({0: (0, 7)}, 200)
    assert book._file.size_bytes == size


def test_a_last_line_that_is_not_whole_is_dropped(book):
    book.stream("x", RUN)
    book.note({0: (0, 7)}, 100)
    book.close()
    path = book._file.path
    path.write_bytes(path.read_bytes()[:-5])
    again = StreamBook(path)
    assert (again.robots, again.positions) == ({0: ("x", RUN)}, {})
    again.note({0: (0, 9)}, 120)
    assert reopened(again).positions == {0: (0, 9)}


def test_a_damaged_line_is_told(book):
    book.stream("x", RUN)
    book.close()
    path = book._file.path
    path.write_bytes(b'{"type":"strange"}\n' + path.read_bytes())
    with pytest.raises(StartError, match=r"streams\.jsonl is damaged in line 1"):
        StreamBook(path)


def test_a_log_has_room_for_so_many_streams(book, monkeypatch):
    monkeypatch.setattr(streams, "MAX_STREAMS", 2)
    book.stream("x", RUN)
    book.stream("y", RUN)
    with pytest.raises(StartError, match="2 streams"):
        book.stream("z", RUN)
    assert book.stream("x", RUN) == 0
