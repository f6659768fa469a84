"""Made-up experience for the tests of the log: small episodes of small pictures, each telling what it belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from relod.runtime.log.format import EncodedFrame, LogSpec
from relod.runtime.log.reader import LogReader
from relod.runtime.log.writer import LogWriter
from relod.runtime.messages import encode
from relod.types import EpisodeEnd, Step

HW = (2, 3)
K = 2
SPEC = LogSpec(
    task="fake",
    robot="none",
    cycle_ns=40_000_000,
    k=K,
    image_hw=HW,
    proprio_names=("x", "y"),
    action_names=("speed",),
    codec="raw",
)

Call = tuple[int, Step | EpisodeEnd | None]  # (stream, what is written); None is a cut


def picture(stream: int, frame_id: int) -> np.ndarray:
    image = np.zeros((*HW, 3), np.uint8)
    image[...] = (stream, frame_id % 256, frame_id // 256)
    return image


def make_step(episode: int = 0, index: int = 0, *, last: bool = False, first_frame: int = 1) -> Step:
    return Step(
        episode=episode,
        index=index,
        frame_ids=(first_frame, first_frame + 1),
        proprio=np.array([episode, index], np.float32),
        action=np.array([index / 8], np.float32),
        reward=-1.0,
        terminated=last,
        truncated=False,
        extras=np.zeros(0, np.float32),
        policy_version=(1, 10 * episode + index),
        observed_ns=1000 * first_frame,
        acted_ns=1000 * first_frame + 1,
    )


def make_end(episode: int = 0, length: int = 1, *, terminated: bool = True, first_frame: int = 2) -> EpisodeEnd:
    return EpisodeEnd(
        episode=episode,
        length=length,
        frame_ids=(first_frame, first_frame + 1),
        proprio=np.array([episode, length], np.float32),
        return_=-float(length),
        terminated=terminated,
        success=terminated,
        reason="target reached",
        observed_ns=1000 * first_frame,
    )


def episodes(lengths: Iterable[int], stream: int = 0) -> list[Call]:
    """Whole episodes of a robot whose camera gives a new frame every step, and some between episodes."""
    calls: list[Call] = []
    frame = 1
    for episode, length in enumerate(lengths):
        for index in range(length):
            calls.append((stream, make_step(episode, index, last=index == length - 1, first_frame=frame)))
            frame += 1
        calls.append((stream, make_end(episode, length, first_frame=frame)))
        frame += 3
    return calls


def interleaved(*robots: Sequence[Call]) -> list[Call]:
    """The calls of several robots, one of each in turn."""
    longest = max(map(len, robots))
    return [robot[turn] for turn in range(longest) for robot in robots if turn < len(robot)]


def frames_of(stream: int, message: Step | EpisodeEnd) -> dict[int, EncodedFrame]:
    return {
        frame_id: EncodedFrame(captured_ns=100 * frame_id, data=picture(stream, frame_id).tobytes())
        for frame_id in message.frame_ids
    }


def write(writer: LogWriter, calls: Iterable[Call]) -> None:
    for stream, message in calls:
        if message is None:
            writer.cut(stream)
        elif isinstance(message, Step):
            writer.append(message, frames_of(stream, message), stream)
        else:
            writer.close_episode(message, frames_of(stream, message), stream)


def plain(calls: Iterable[Call]) -> list[tuple[int, bytes | None]]:
    """Comparable bit for bit."""
    return [(stream, None if message is None else encode(message)) for stream, message in calls]


def read(reader: LogReader) -> list[tuple[int, bytes | None]]:
    """Everything that a reader gives, as `plain` would; every frame is looked at."""
    records = []
    for record in reader.iterate():
        for frame_id, image in record.frames.items():
            assert np.array_equal(image, picture(record.stream, frame_id))
        assert record.message is None or set(record.frames) == set(record.message.frame_ids)
        records.append((record.stream, record.message))
    return plain(records)


def read_folder(folder: Path) -> list[tuple[int, bytes | None]]:
    return read(LogReader(folder))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
