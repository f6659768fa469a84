"""`relod audit ROBOT_RUN LEARNER_RUN`: whether what a robot sent is what its learner has, record by record.

The robot's chain names every record that it took for sending, with a digest; the learner's experience log holds the
records and frames themselves. See docs/audit.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from ...errors import EXIT_OK, EXIT_SAFETY, StartError
from ..log.format import find_segments
from ..log.reader import LogReader, find_log
from ..messages import Position
from ..rundir import read_run
from .chain import CHAIN_NAME, ChainEntry, RecordDigest, read_chain
from .streams import BOOK

__all__ = ["AuditReport", "Findings", "Stretch", "audit", "compare"]

SHOWN = 10  # stretches of each kind, for people


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Records that follow one another."""

    first: Position
    last: Position
    records: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Where a robot's chain and a learner's log differ."""

    sent: int  # records in the chain
    equal: int  # of those, in the log with the same contents
    missing: tuple[Stretch, ...]  # the learner has later ones
    doubled: tuple[Stretch, ...]
    out_of_order: tuple[Stretch, ...]  # after one that was sent later
    different: tuple[Stretch, ...]  # in a value, a frame or a stamp
    unknown: tuple[Stretch, ...]  # in the log, and never sent
    not_delivered: tuple[Stretch, ...]  # at the end: the learner has nothing later
    deleted: tuple[Stretch, ...]  # at the beginning, with the log's oldest segments: its size limit was reached

    @property
    def ok(self) -> bool:
        """Whether everything is there, but for what the log's size limit has deleted."""
        return not any(stretches for kind, stretches in self.kinds() if kind != "deleted")

    def kinds(self) -> Iterator[tuple[str, tuple[Stretch, ...]]]:
        """Each kind of difference by name, the worst first."""
        for kind in ("missing", "doubled", "out_of_order", "different", "unknown", "not_delivered", "deleted"):
            yield kind, getattr(self, kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """What an audit found."""

    robot: str
    run: str  # of the robot
    stream: int  # of the learner's log
    findings: Findings

    @property
    def exit_code(self) -> int:
        return EXIT_OK if self.findings.ok else EXIT_SAFETY

    def to_dict(self) -> dict[str, Any]:
        """For --json: of each kind, the number of records and the stretches as [first, last, records]."""
        findings = self.findings
        return {
            "robot": self.robot,
            "run": self.run,
            "stream": self.stream,
            "ok": findings.ok,
            "sent": findings.sent,
            "equal": findings.equal,
            **{
                kind: {
                    "records": _count(stretches),
                    "stretches": [[list(each.first), list(each.last), each.records] for each in stretches],
                }
                for kind, stretches in findings.kinds()
            },
        }

    def lines(self) -> list[str]:
        """For people."""
        findings = self.findings
        lines = [f"robot {self.robot}: {findings.equal} of {findings.sent} records sent are in the log, byte for byte"]
        for kind, stretches in findings.kinds():
            if stretches:
                lines.append(f"{kind.replace('_', ' ')}: {_count(stretches)}")
                lines += [f"  {_words(stretch)}" for stretch in stretches[:SHOWN]]
            if len(stretches) > SHOWN:
                lines.append(f"  and {len(stretches) - SHOWN} more stretches")
        return lines


def audit(robot_run: Path, learner_run: Path) -> AuditReport:
    """Compare a robot's run with its learner's; both may still be going on.

    Raises:
        StartError: a folder is not what it should be, the learner knows nothing of this run, or a file is damaged.
    """
    run = read_run(robot_run).get("link_run")
    if not isinstance(run, str):
        raise StartError(f"{robot_run} is no run over a link", "give first the robot's folder, then the learner's")
    book = _read_book(learner_run / BOOK, run)
    logged = _read_log(learner_run, book.stream)
    chain = read_chain(robot_run / CHAIN_NAME)  # after the log, so that it holds all that the log does
    begun_at = min(find_segments(find_log(learner_run)))
    findings = compare(chain, logged, noted=book.noted, deletes=begun_at > 1)
    return AuditReport(robot=book.robot, run=run, stream=book.stream, findings=findings)


def compare(
    chain: Sequence[ChainEntry], logged: Sequence[ChainEntry], *, noted: Position | None = None, deletes: bool = False
) -> Findings:
    """How a log differs from a chain; pure.

    Args:
        noted: a record that was in the log at some time.
        deletes: the beginning of the log was deleted.
    """
    numbers = {entry.position: number for number, entry in enumerate(chain)}
    seen: set[int] = set()
    doubled, out_of_order, different, unknown = [], [], [], []
    newest = -1
    for entry in logged:
        number = numbers.get(entry.position)
        if number is None:
            unknown.append(entry.position)
        elif number in seen:
            doubled.append(number)
        else:
            if number < newest:
                out_of_order.append(number)
            if entry.digest != chain[number].digest:
                different.append(number)
            seen.add(number)
            newest = max(newest, number)
    reached = max(newest, -1 if noted is None else numbers.get(noted, -1))
    oldest = (min(seen) if seen else reached + 1) if deletes else 0
    absent = [number for number in range(len(chain)) if number not in seen]

    def stretches(of: Sequence[int]) -> tuple[Stretch, ...]:
        return _stretches(chain, of)

    return Findings(
        sent=len(chain),
        equal=len(seen) - len(different),
        missing=stretches([number for number in absent if oldest <= number <= reached]),
        doubled=stretches(doubled),
        out_of_order=stretches(out_of_order),
        different=stretches(different),
        unknown=tuple(Stretch(first=position, last=position, records=1) for position in unknown),
        not_delivered=stretches([number for number in absent if number > reached]),
        deleted=stretches([number for number in absent if number < oldest]),
    )


def _stretches(chain: Sequence[ChainEntry], numbers: Sequence[int]) -> tuple[Stretch, ...]:
    breaks = [at for at, (a, b) in enumerate(pairwise(numbers), start=1) if b != a + 1]
    return tuple(
        Stretch(first=chain[numbers[start]].position, last=chain[numbers[stop - 1]].position, records=stop - start)
        for start, stop in pairwise([0, *breaks, len(numbers)])
        if stop > start
    )


# -- the learner's side ------------------------------------------------------------------------------------------------


class _BookLine(msgspec.Struct, frozen=True):
    """What an audit needs of a line of the learner's book; either kind of line."""

    stream: int = -1
    robot: str = ""
    run: str = ""
    positions: dict[int, Position] = msgspec.field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Book:
    stream: int
    robot: str
    noted: Position | None  # the newest record of the stream, when that was last noted


def _read_book(path: Path, run: str) -> _Book:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StartError(
            f"{path} cannot be read: {error.strerror}", "give first the robot's folder, then the learner's"
        ) from error
    lines: list[_BookLine] = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            lines.append(msgspec.json.decode(line, type=_BookLine))
        except msgspec.DecodeError as error:
            raise StartError(f"{path} is damaged in line {number}: {error}", "mend the line") from error
    begun = next((line for line in lines if line.run == run), None)
    if begun is None:
        raise StartError(f"{path.parent} has nothing of the robot's run {run}", "give the run of the robot's learner")
    places = [line.positions[begun.stream] for line in lines if begun.stream in line.positions]
    return _Book(begun.stream, begun.robot, max(places, default=None))


def _read_log(learner_run: Path, stream: int) -> list[ChainEntry]:
    reader = LogReader(find_log(learner_run))
    digest = RecordDigest()
    logged = [
        ChainEntry.of(record.message, digest(record.message, record.frames.encoded))
        for record in reader.iterate()
        if record.stream == stream and record.message is not None
    ]
    if reader.damage:
        raise StartError(f"the log of {learner_run} is damaged: {reader.damage[0]}", "relod log verify says more")
    return logged


def _count(stretches: Sequence[Stretch]) -> int:
    return sum(stretch.records for stretch in stretches)


def _words(stretch: Stretch) -> str:
    episode, index = stretch.first
    if stretch.records == 1:
        return f"episode {episode} index {index}"
    return f"episode {episode} index {index} to episode {stretch.last[0]} index {stretch.last[1]}"
