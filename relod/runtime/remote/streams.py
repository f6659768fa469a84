"""A learner's book of its streams, `streams.jsonl` in its run folder: which robot's run is which stream of the log.

It also notes where each stream's newest record is, whenever the log begins a new segment and whenever a robot leaves.
So a learner that starts again knows every stream's place without reading a log of many gigabytes, and also where the
size limit has deleted a silent stream's last record.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from ...errors import StartError
from ..messages import Position
from ..rundir import Appender, disk_errors

__all__ = ["BOOK", "StreamBook"]

BOOK = "streams.jsonl"  # within a run's folder
MAX_STREAMS = 1 << 16  # what the log's format has room for


class _Stream(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="stream"):
    stream: int
    robot: str
    run: str  # of the robot's run


class _Note(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="note"):
    """Where streams stand; those that are not in it stand where an earlier note says."""

    env_steps: int  # in the log: no record before this step is newer than the notes say
    positions: dict[int, Position]


_encode = msgspec.json.Encoder().encode
_decoder: msgspec.json.Decoder[_Stream | _Note] = msgspec.json.Decoder(_Stream | _Note)


class StreamBook:
    """The book, open for writing. A last line that is not whole is dropped.

    Raises:
        StartError: the file cannot be read or written, or a line of it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.robots: dict[int, tuple[str, str]] = {}  # name and run of the robot, by stream
        self.positions: dict[int, Position] = {}  # as noted
        self.noted_steps = 0  # environment steps in the log at the newest note
        with disk_errors(path, StartError):
            self._file = Appender(path)
            data = path.read_bytes()
            self._file.cut(data.rfind(b"\n") + 1)
        for number, line in enumerate(data[: self._file.size_bytes].splitlines(), start=1):
            try:
                self._take(_decoder.decode(line))
            except msgspec.DecodeError as error:
                self._file.close()
                raise StartError(f"{path} is damaged in line {number}: {error}", "this run cannot go on") from error

    def stream(self, robot: str, run: str) -> int:
        """The stream of a robot's run, which is a new one the first time.

        Raises:
            StartError: the log has no room for another stream.
            SafetyStop: the book cannot be written.
        """
        for stream, known in self.robots.items():
            if known == (robot, run):
                return stream
        stream = max([-1, *self.robots, *self.positions]) + 1
        if stream >= MAX_STREAMS:
            raise StartError(f"the log has its {MAX_STREAMS} streams, one for each run of a robot", "begin a new run")
        self._add(_Stream(stream=stream, robot=robot, run=run))
        with disk_errors(self._file.path):
            self._file.sync()  # the log may outlive a power cut, and says only numbers
        return stream

    def reserve(self, stream: int) -> None:
        """Never give out the number of a stream that the log has, though its line here was lost."""
        self.positions.setdefault(stream, (-1, -1))

    def name(self, stream: int) -> str:
        """Name of a stream's robot; empty where its line was lost."""
        return self.robots.get(stream, ("", ""))[0]

    def note(self, positions: Mapping[int, Position], env_steps: int) -> None:
        """Note where all streams stand in a log of `env_steps` steps; `SafetyStop` when that cannot be written."""
        changed = {stream: place for stream, place in positions.items() if self.positions.get(stream) != place}
        if changed:
            self._add(_Note(env_steps=env_steps, positions=changed))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, line: _Stream | _Note) -> None:
        with disk_errors(self._file.path):
            self._file.append(_encode(line) + b"\n")
        self._take(line)

    def _take(self, line: _Stream | _Note) -> None:
        if isinstance(line, _Stream):
            self.robots[line.stream] = (line.robot, line.run)
        else:
            self.positions |= line.positions
            self.noted_steps = line.env_steps
