"""Audits of whole, harmed and unfinished pairs of runs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relod.errors import StartError
from relod.runtime.log.format import EncodedFrame, LogSpec, find_segments
from relod.runtime.log.writer import LogWriter
from relod.runtime.remote.audit import Stretch, audit, compare
from relod.runtime.remote.chain import ChainEntry, ChainWriter
from relod.runtime.remote.streams import StreamBook
from relod.types import EpisodeEnd, Step
from tests.runtime.logs import SPEC, episodes, frames_of, make_step

RUN = "0123456789abcdef" * 2
STREAM = 1  # another robot joined before

Messages = list[Step | EpisodeEnd]


def some_messages() -> Messages:
    """Positions (0, 0) to (0, 4), (1, 0) to (1, 3), (2, 0) to (2, 6), the last of each an end."""
    return [message for _, message in episodes([4, 3, 6], STREAM) if message is not None]


def make_robot(folder: Path, messages: Messages, run: str = RUN) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"link_run": run}))
    chain = ChainWriter(folder / "steps.chain")
    for message in messages:
        chain.add(message, frames_of(STREAM, message))
    chain.close()
    return folder


def make_learner(
    folder: Path,
    messages: Messages,
    frames: Callable[[Step | EpisodeEnd], dict[int, EncodedFrame]] = lambda each: frames_of(STREAM, each),
    *,
    spec: LogSpec = SPEC,
    segment_bytes: int = 1 << 20,
    limit_bytes: int | None = None,
) -> Path:
    """A learner's run; another robot's records lie between those of this one."""
    folder.mkdir()
    book = StreamBook(folder / "streams.jsonl")
    book.stream("other", "f" * 32)
    assert book.stream("arm", RUN) == STREAM
    with LogWriter.create(folder / "log", spec, segment_bytes=segment_bytes, limit_bytes=limit_bytes) as log:
        for number, message in enumerate(messages):
            between = make_step(0, number, first_frame=number + 1)
            log.append(between, frames_of(0, between), 0)
            log.keep_from(log.env_steps)
            if isinstance(message, Step):
                log.append(message, frames(message), STREAM)
            else:
                log.close_episode(message, frames(message), STREAM)
            if number == len(messages) // 2:
                log.cut(STREAM)
    last = messages[-1] if messages else None
    if last is not None:
        position = (last.episode, last.index if isinstance(last, Step) else last.length)
        book.note({STREAM: position}, log.env_steps)
    book.close()
    return folder


def stretch(first: tuple[int, int], last: tuple[int, int], records: int) -> tuple[Stretch, ...]:
    return (Stretch(first=first, last=last, records=records),)


def test_everything_is_there(tmp_path: Path) -> None:
    messages = some_messages()
    report = audit(make_robot(tmp_path / "robot", messages), make_learner(tmp_path / "learner", messages))
    assert (report.robot, report.run, report.stream, report.exit_code) == ("arm", RUN, STREAM, 0)
    assert (report.findings.sent, report.findings.equal) == (len(messages), len(messages))
    assert report.lines() == ["robot arm: 16 of 16 records sent are in the log, byte for byte"]
    assert msgspec.json.decode(msgspec.json.encode(report.to_dict()))["ok"] is True


def test_a_run_without_records(tmp_path: Path) -> None:
    assert audit(make_robot(tmp_path / "robot", []), make_learner(tmp_path / "learner", [])).exit_code == 0


def test_a_record_in_the_middle_is_missing(tmp_path: Path) -> None:
    messages = some_messages()
    report = audit(
        make_robot(tmp_path / "robot", messages), make_learner(tmp_path / "learner", messages[:3] + messages[6:])
    )
    assert report.findings.missing == stretch((0, 3), (1, 0), 3)
    assert report.exit_code == 4
    assert report.lines()[1:] == ["missing: 3", "  episode 0 index 3 to episode 1 index 0"]
    assert report.to_dict()["missing"] == {"records": 3, "stretches": [[[0, 3], [1, 0], 3]]}


def test_the_end_was_not_delivered(tmp_path: Path) -> None:
    messages = some_messages()
    report = audit(make_robot(tmp_path / "robot", messages), make_learner(tmp_path / "learner", messages[:-2]))
    assert report.findings.not_delivered == stretch((2, 5), (2, 6), 2)
    assert report.findings.missing == ()
    assert report.exit_code == 4


def test_nothing_was_delivered(tmp_path: Path) -> None:
    report = audit(make_robot(tmp_path / "robot", some_messages()), make_learner(tmp_path / "learner", []))
    assert report.findings.not_delivered == stretch((0, 0), (2, 6), 16)


def test_what_the_size_limit_deleted_is_no_loss(tmp_path: Path) -> None:
    messages = some_messages()
    learner = make_learner(tmp_path / "learner", messages, segment_bytes=900, limit_bytes=3000)
    assert min(find_segments(learner / "log")) > 1
    report = audit(make_robot(tmp_path / "robot", messages), learner)
    (deleted,) = report.findings.deleted
    assert deleted.first == (0, 0)
    assert deleted.records + report.findings.equal == 16
    assert report.findings.missing == report.findings.not_delivered == ()
    assert report.exit_code == 0
    assert report.lines()[1] == f"deleted: {deleted.records}"


def test_all_of_it_may_have_been_deleted(tmp_path: Path) -> None:
    messages = some_messages()
    learner = make_learner(tmp_path / "learner", messages[:5])
    with LogWriter.resume(learner / "log", SPEC, segment_bytes=900, limit_bytes=2000) as log:
        for index in range(20):
            step = make_step(1, index, first_frame=50 + index)
            log.append(step, frames_of(0, step), 0)
            log.keep_from(log.env_steps)
    report = audit(make_robot(tmp_path / "robot", messages), learner)
    assert report.findings.deleted == stretch((0, 0), (0, 4), 5)  # up to what the learner noted
    assert report.findings.not_delivered == stretch((1, 0), (2, 6), 11)


@pytest.mark.parametrize("part", ["pixels", "stamp", "reward"])
def test_a_record_that_differs(tmp_path: Path, part: str) -> None:
    messages = some_messages()
    robot = make_robot(tmp_path / "robot", messages)

    def frames(message: Step | EpisodeEnd) -> dict[int, EncodedFrame]:
        found = frames_of(STREAM, message)
        if 3 in found and part != "reward":  # frame 3 is named by the steps (0, 1) and (0, 2)
            whole = bytes(found[3].data)
            found[3] = EncodedFrame(
                captured_ns=found[3].captured_ns + (part == "stamp"),
                data=whole[:-1] + b"!" if part == "pixels" else whole,
            )
        return found

    if part == "reward":
        messages[1:3] = [make_step(0, 1, first_frame=2, last=True), make_step(0, 2, first_frame=3, last=True)]
    report = audit(robot, make_learner(tmp_path / "learner", messages, frames))
    assert report.findings.different == stretch((0, 1), (0, 2), 2)
    assert report.findings.equal == 14
    assert report.exit_code == 4


def test_doubled_out_of_order_and_unknown(tmp_path: Path) -> None:
    messages = some_messages()
    stray = make_step(7, 0, first_frame=90)
    logged = [*messages[:4], messages[3], messages[6], messages[5], messages[4], *messages[7:], stray]
    report = audit(make_robot(tmp_path / "robot", messages), make_learner(tmp_path / "learner", logged))
    findings = report.findings
    assert findings.doubled == stretch((0, 3), (0, 3), 1)
    assert {each.first for each in findings.out_of_order} == {(1, 0), (0, 4)}
    assert findings.unknown == stretch((7, 0), (7, 0), 1)
    assert findings.missing == findings.different == findings.not_delivered == ()
    assert report.exit_code == 4


def test_many_stretches_are_summed_up_for_people(tmp_path: Path) -> None:
    messages = [make_step(0, index, first_frame=index + 1) for index in range(40)]
    report = audit(make_robot(tmp_path / "robot", messages), make_learner(tmp_path / "learner", messages[1::2]))
    lines = report.lines()
    assert lines[1] == "missing: 20"
    assert lines[-1] == "  and 10 more stretches"
    assert len(lines) == 13


@given(seed=st.integers(0, 2**32), length=st.integers(1, 40))
def test_counts_agree_with_what_was_done(seed: int, length: int) -> None:
    rng = random.Random(seed)
    chain = [ChainEntry((number // 7, number % 7), bytes([number]) * 16) for number in range(length)]
    kept = [number for number in range(length) if rng.random() < 0.8]
    changed = {number for number in kept if rng.random() < 0.1}
    logged = [
        ChainEntry(chain[number].position, b"x" * 16 if number in changed else chain[number].digest) for number in kept
    ]
    doubled = [entry for entry in logged if rng.random() < 0.1]
    deletes = rng.random() < 0.5
    findings = compare(chain, logged + doubled, deletes=deletes)
    counts = {kind: sum(each.records for each in stretches) for kind, stretches in findings.kinds()}
    first, last = (kept[0], kept[-1]) if kept else (0, -1)
    assert counts == {
        "missing": (last + 1 - (first if deletes else 0)) - len(kept),
        "doubled": len(doubled),
        "out_of_order": 0,
        "different": len(changed),
        "unknown": 0,
        "not_delivered": length - 1 - last,
        "deleted": first if deletes else 0,
    }
    assert findings.equal == len(kept) - len(changed)
    assert findings.ok == (counts["missing"] == counts["not_delivered"] == 0 and not doubled and not changed)


def no_chain(robot: Path, learner: Path) -> None:
    (robot / "steps.chain").unlink()


def local_run(robot: Path, learner: Path) -> None:
    (robot / "run.json").write_text("{}")


def no_run(robot: Path, learner: Path) -> None:
    (robot / "run.json").unlink()


def other_learner(robot: Path, learner: Path) -> None:
    (learner / "streams.jsonl").write_text('{"type":"stream","stream":0,"robot":"other","run":"' + "f" * 32 + '"}\n')


def no_book(robot: Path, learner: Path) -> None:
    (learner / "streams.jsonl").unlink()


def damaged_book(robot: Path, learner: Path) -> None:
    (learner / "streams.jsonl").write_text("nonsense\n")


def damaged_log(robot: Path, learner: Path) -> None:
    path = next((learner / "log").iterdir())
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])


def no_log(robot: Path, learner: Path) -> None:
    for path in (learner / "log").iterdir():
        path.unlink()


def changed_chain(robot: Path, learner: Path) -> None:
    data = (robot / "steps.chain").read_bytes()
    (robot / "steps.chain").write_bytes(data[:20] + b"?" + data[21:])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (no_chain, "steps.chain cannot be read"),
        (local_run, "is no run over a link"),
        (no_run, "is no run folder"),
        (other_learner, "has nothing of the robot's run 0123"),
        (no_book, "streams.jsonl cannot be read"),
        (damaged_book, "streams.jsonl is damaged in line 1"),
        (damaged_log, "the log of .* is damaged: segment-000001"),
        (no_log, "holds no experience log"),
        (changed_chain, "steps.chain is damaged at entry 1"),
    ],
)
def test_bad_input_has_its_line(tmp_path: Path, harm: Callable[[Path, Path], None], message: str) -> None:
    messages = some_messages()
    robot, learner = make_robot(tmp_path / "robot", messages), make_learner(tmp_path / "learner", messages)
    harm(robot, learner)
    with pytest.raises(StartError, match=message) as caught:
        audit(robot, learner)
    assert "\n" not in str(caught.value)


def test_torn_ends_are_those_of_a_crash(tmp_path: Path) -> None:
    messages = some_messages()
    robot, learner = make_robot(tmp_path / "robot", messages), make_learner(tmp_path / "learner", messages)
    for path in (robot / "steps.chain", learner / "streams.jsonl", next((learner / "log").iterdir())):
        with path.open("ab") as file:
            file.write(b"\x05\x00")
    assert audit(robot, learner).exit_code == 0
