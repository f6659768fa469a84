"""`relod log export`: an experience log as NumPy files, PNG pictures or MP4 videos, for other programs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import msgspec
import numpy as np

from ...errors import SettingsError, StartError
from ...robots.vision import cv2
from ...types import EpisodeEnd, Step
from ..clock import NS_PER_S
from ..rundir import disk_errors
from ..video import Video
from .format import LogSpec
from .reader import LogReader, find_log
from .walk import LogRecord, StoredFrames

__all__ = ["FrameFiles", "export_log"]


class FrameFiles(StrEnum):
    """What becomes of the frames."""

    PNG = "png"  # a folder per episode, a file per frame, named by its id
    MP4 = "mp4"  # a video per episode: the newest frame of each observation, at the task's rate
    NONE = "none"


def export_log(run: Path, out: Path, *, frames: str = "none", episodes: str | None = None) -> dict[str, Any]:
    """Write `NAME.npz` per episode, its frames as `frames` says, and `index.json`, which is returned as well.

    An episode that is cut becomes one file for each stretch of steps that follow one another.

    Args:
        run: folder of a run or of its log.
        frames: a name of `FrameFiles`.
        episodes: `A:B`, only the episodes numbered A up to and without B; either may be left out.

    Raises:
        SettingsError: `out` has something in it, or a word that means nothing.
        StartError: no log in `run`, or `out` cannot be written.
    """
    wanted = None if episodes is None else _parse_episodes(episodes)
    kinds = [kind.value for kind in FrameFiles]
    if frames not in kinds:
        raise SettingsError(f"--frames {frames} is not known", f"give one of {', '.join(kinds)}")
    folder = find_log(run)
    reader = LogReader(folder)
    with disk_errors(out, StartError):
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise SettingsError(f"{out} is not empty", "give --out a new folder")
    exporter = _Exporter(reader.spec, out, FrameFiles(frames), wanted)
    for record in reader.iterate():
        exporter.add(record)
    exporter.finish()
    index = {
        "log": str(folder),
        "spec": msgspec.to_builtins(reader.spec),
        "frames": frames,
        "episodes": [msgspec.to_builtins(entry) for entry in exporter.entries],
        "damage": reader.damage,
        "torn_bytes": reader.torn_bytes,
    }
    with disk_errors(out / "index.json", StartError):
        (out / "index.json").write_bytes(msgspec.json.format(msgspec.json.encode(index), indent=2) + b"\n")
    return index


def _parse_episodes(text: str) -> range:
    first, colon, stop = text.partition(":")
    try:
        episodes = range(int(first or 0), int(stop) if stop else sys.maxsize)
    except ValueError:
        episodes = range(0)
    if not colon or not episodes or episodes.start < 0:
        raise SettingsError(f"--episodes {text} is no range", "give A:B, for example 10:20, with A below B")
    return episodes


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    """An episode in the index."""

    name: str  # of its files
    stream: int
    episode: int
    first_index: int  # 0 unless the beginning is not in the log or was cut off
    steps: int
    first_env_step: int
    complete: bool  # its end is known; what follows is None otherwise
    return_: float | None = msgspec.field(name="return")
    terminated: bool | None
    success: bool | None
    reason: str | None


class _Sink(Protocol):
    """Takes the frames of an episode's observations."""

    def add(self, frame_ids: tuple[int, ...], frames: StoredFrames) -> None: ...

    def close(self) -> None: ...


class _Nothing:
    def add(self, frame_ids: tuple[int, ...], frames: StoredFrames) -> None:
        pass

    def close(self) -> None:
        pass


class _Pictures:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written: set[int] = set()
        with disk_errors(folder, StartError):
            folder.mkdir()

    def add(self, frame_ids: tuple[int, ...], frames: StoredFrames) -> None:
        for frame_id in set(frame_ids) - self._written:
            path = self._folder / f"{frame_id:09}.png"
            with disk_errors(path, StartError):
                path.write_bytes(cv2.imencode(".png", frames[frame_id])[1].tobytes())
            self._written.add(frame_id)

    def close(self) -> None:
        pass


class _Video:
    def __init__(self, path: Path, spec: LogSpec) -> None:
        self._video = Video(path, spec.image_hw, NS_PER_S / spec.cycle_ns)

    def add(self, frame_ids: tuple[int, ...], frames: StoredFrames) -> None:
        self._video.add(frames[frame_ids[-1]])

    def close(self) -> None:
        self._video.close()


class _Stretch:
    """Steps of one episode that follow one another."""

    def __init__(self, record: LogRecord, step: Step, name: str, sink: _Sink) -> None:
        self.name, self.stream, self._sink = name, record.stream, sink
        self.first_env_step = record.env_steps - 1
        self.steps: list[Step] = []
        self._captured_ns: list[tuple[int, ...]] = []
        self.add(record, step)

    def add(self, record: LogRecord, step: Step) -> None:
        self.steps.append(step)
        self._captured_ns.append(record.frames.captured_ns(step.frame_ids))
        self._sink.add(step.frame_ids, record.frames)

    def continues_with(self, step: Step) -> bool:
        return (step.episode, step.index) == (self.steps[-1].episode, self.steps[-1].index + 1)

    def save(self, out: Path, last: LogRecord | None) -> _Entry:
        """Write the arrays; `last` holds the episode's end where that is known."""
        arrays, end = self._arrays(), None
        if last is not None and isinstance(last.message, EpisodeEnd):
            end = last.message
            arrays |= _last_observation(end, last.frames)
            self._sink.add(end.frame_ids, last.frames)
        self._sink.close()
        path = out / f"{self.name}.npz"
        with disk_errors(path, StartError):
            np.savez(path, **arrays)
        return _Entry(
            name=self.name,
            stream=self.stream,
            episode=self.steps[0].episode,
            first_index=self.steps[0].index,
            steps=len(self.steps),
            first_env_step=self.first_env_step,
            complete=end is not None,
            return_=None if end is None else end.return_,
            terminated=None if end is None else end.terminated,
            success=None if end is None else end.success,
            reason=None if end is None else end.reason,
        )

    def _arrays(self) -> dict[str, Any]:
        names = [name for name in Step.__dataclass_fields__ if name != "episode"]
        arrays = {name: np.array([getattr(step, name) for step in self.steps]) for name in names}
        return {**arrays, "frame_captured_ns": np.array(self._captured_ns)}


def _last_observation(end: EpisodeEnd, frames: StoredFrames) -> dict[str, Any]:
    return {
        "last_frame_ids": np.array(end.frame_ids),
        "last_frame_captured_ns": np.array(frames.captured_ns(end.frame_ids)),
        "last_proprio": end.proprio,
        "last_observed_ns": np.array(end.observed_ns),
    }


MakeSink: TypeAlias = Callable[[str], _Sink]


class _Exporter:
    """Sorts records into episodes."""

    def __init__(self, spec: LogSpec, out: Path, frames: FrameFiles, episodes: range | None) -> None:
        self.entries: list[_Entry] = []
        self._out, self._episodes = out, episodes
        self._open: dict[int, _Stretch] = {}  # by stream
        self._names: dict[str, int] = {}  # how often each was used
        sinks: dict[FrameFiles, MakeSink] = {
            FrameFiles.PNG: lambda name: _Pictures(out / name),
            FrameFiles.MP4: lambda name: _Video(out / f"{name}.mp4", spec),
            FrameFiles.NONE: lambda name: _Nothing(),
        }
        self._make_sink = sinks[frames]

    def add(self, record: LogRecord) -> None:
        """The next record."""
        message, stretch = record.message, self._open.get(record.stream)
        if isinstance(message, Step):
            if stretch is not None and stretch.continues_with(message):
                stretch.add(record, message)
                return
            self._save(record.stream, None)
            if self._episodes is None or message.episode in self._episodes:
                name = self._name(record.stream, message.episode)
                self._open[record.stream] = _Stretch(record, message, name, self._make_sink(name))
        elif message is not None and stretch is not None and stretch.steps[0].episode == message.episode:
            self._save(record.stream, record)
        else:
            self._save(record.stream, None)

    def finish(self) -> None:
        """No more records: save what has no end."""
        for stream in sorted(self._open):
            self._save(stream, None)

    def _save(self, stream: int, last: LogRecord | None) -> None:
        stretch = self._open.pop(stream, None)
        if stretch is not None:
            self.entries.append(stretch.save(self._out, last))

    def _name(self, stream: int, episode: int) -> str:
        name = f"stream-{stream}-episode-{episode:06}"
        self._names[name] = self._names.get(name, 0) + 1
        return name if self._names[name] == 1 else f"{name}-{self._names[name]}"
