"""The run folder: settings, what the run was, metrics, episodes and spans, in files people can read years later.

    <root>/<UTC time>-<name>/
        settings.toml    the resolved settings; `--config` reads them back
        run.json         versions, host, command line, SIMULATED or the hardware's addresses; the summary at the end
        metrics.jsonl    a JSON object per line, each with experience_s, wall_s and steps
        episodes.jsonl   the same, one line per episode
        view.npz         what the live view showed last; docs/make_picture.py draws it
        spans.bin        raw span records; spans.json says their dtype and the stages' numbers
        log/             the experience log, see docs/experience-log.md
        checkpoints/     what the learner goes on from, see `relod.runtime.checkpoint`
        tape.bin         in virtual time, the actor's answers, see `relod.runtime.tape`
        lock             held by the process that writes here
    <root>/latest        a link to the newest

A folder belongs to one run, which may be resumed in it. Writes go to the kernel at once and are not synced: a crash of
relod loses nothing, a power cut may lose the last seconds. The first write that fails ends the run with one
`SafetyStop`; what is written after it, on the way out, is dropped without another.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ..config import Settings, to_toml
from ..errors import SafetyStop, StartError
from ..types import EpisodeEnd
from .clock import utc_seconds
from .spans import SPAN, Stage
from .tensorboard import EventWriter

__all__ = [
    "Appender",
    "EpisodeLine",
    "RunFolder",
    "disk_errors",
    "is_locked",
    "read_run",
    "sync_folder",
    "write_atomic",
]

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SPANS_LIMIT_BYTES = 256 << 20  # about two and a half hours of a 45 ms cycle with its 5 ms sentinel
NAMES_TRIED = 1000

JsonValue = Any  # whatever msgspec turns into JSON, and numpy's numbers


@contextlib.contextmanager
def disk_errors(path: Path, kind: type[SafetyStop] | type[StartError] = SafetyStop) -> Iterator[None]:
    """Turn the system's refusal to write `path` into an error of `kind` that names it."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise kind(f"the disk is full: {path}", "free some space, or set run.folder to another disk") from error
        raise kind(f"{path} cannot be written: {error.strerror}", "check the disk and run.folder") from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that is at any moment either what it was or complete: aside, fsync, rename. Raises `OSError`."""
    aside = path.with_name(f".{path.name}.part")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync_folder(path.parent)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Put on the disk which files are in the folder. Raises `OSError`."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Appender:
    """Appends whole records to a file: one that does not fit is taken back, so no file ends in half a record.

    Every method raises `OSError`; so does making one with `new` where there is such a file already.
    """

    def __init__(self, path: Path, *, new: bool = False) -> None:
        self.path = path
        exclusive = os.O_EXCL if new else 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | exclusive | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self.size_bytes = os.fstat(self._fd).st_size

    def append(self, data: bytes) -> None:
        """Write all of it, or nothing."""
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.size_bytes)
            raise
        self.size_bytes += len(data)

    def cut(self, size_bytes: int) -> None:
        """Drop what lies beyond; a file that is shorter stays as it is."""
        self.size_bytes = min(self.size_bytes, size_bytes)
        os.ftruncate(self._fd, self.size_bytes)

    def sync(self) -> None:
        """Wait until it is on the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class EpisodeLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line of episodes.jsonl."""

    experience_s: float
    wall_s: float
    steps: int  # of the run, at the episode's end
    episode: int
    length: int
    return_: float = msgspec.field(name="return")
    success: bool
    reason: str


def read_run(path: Path) -> dict[str, JsonValue]:
    """The content of a folder's run.json; `StartError` when it is no run folder."""
    try:
        content = msgspec.json.decode((path / "run.json").read_bytes())
    except OSError as error:
        raise StartError(f"{path} is no run folder: run.json: {error.strerror}", "give a folder under runs/") from error
    except msgspec.DecodeError as error:
        raise StartError(f"{path / 'run.json'} is damaged: {error}", "this run cannot be resumed") from error
    if not isinstance(content, dict):
        raise StartError(f"{path / 'run.json'} is damaged: it holds no object", "this run cannot be resumed")
    return content


class RunFolder:
    """One run's folder, open for writing; a context manager. `create` makes it."""

    def __init__(self, path: Path, run: dict[str, JsonValue], *, events: EventWriter | None = None) -> None:
        self.path = path
        self.spans_dropped = 0  # beyond the size limit, or after a failure
        self.failed = False  # a write failed; later ones do nothing
        self._lock = _lock(path)
        self._run = run
        self._events = events
        self._metrics = Appender(path / "metrics.jsonl")
        self._episodes = Appender(path / "episodes.jsonl")
        self._spans = Appender(path / "spans.bin")

    @classmethod
    def create(cls, name: str, settings: Settings, run: Mapping[str, JsonValue]) -> RunFolder:
        """Make a new folder under `settings.run.folder`.

        Args:
            name: what the run is, for example `create-local-only-s0`; the UTC time is put before it.
            run: the content of run.json, see `relod.runtime.provenance.describe`.

        Raises:
            StartError: the folder cannot be made or written.
            SettingsError: run.tensorboard is set and TensorBoard is not installed.
        """
        root = Path(settings.run.folder)
        started_s = utc_seconds()
        content = {**run, "started_utc": _utc(started_s)}
        with disk_errors(root, StartError):
            path = _make_folder(root, f"{datetime.fromtimestamp(started_s, UTC):%Y-%m-%dT%H-%M-%SZ}-{name}")
        events = EventWriter(path / "tensorboard") if settings.run.tensorboard else None
        with disk_errors(path, StartError):
            write_atomic(path / "settings.toml", to_toml(settings).encode())
            write_atomic(path / "run.json", _pretty(content))
            write_atomic(path / "spans.json", _pretty(_spans_header()))
            folder = cls(path, content, events=events)
            _point_latest(root, path)
        return folder

    @classmethod
    def reopen(cls, path: Path, settings: Settings, session: Mapping[str, JsonValue]) -> RunFolder:
        """Open a run's folder to go on in it. What is in it stays as it is until `go_on`.

        Args:
            session: what run.json will say of this session.

        Raises:
            StartError: no run folder, not writable, or another process writes there.
        """
        run = read_run(path)
        run["sessions"] = [*run.get("sessions", []), {**session, "started_utc": _utc(utc_seconds())}]
        run.pop("summary", None)
        run.pop("finished_utc", None)
        events = EventWriter(path / "tensorboard") if settings.run.tensorboard else None
        with disk_errors(path, StartError):
            return cls(path, run, events=events)

    def go_on(self, settings: Settings, sizes: Mapping[str, int] | None = None) -> None:
        """Begin the session of a folder that was opened again, once nothing can refuse it any more.

        Args:
            sizes: bytes to keep of metrics.jsonl and episodes.jsonl; None keeps all whole lines.

        Raises:
            StartError: not writable.
        """
        with disk_errors(self.path, StartError):
            for appender in (self._metrics, self._episodes):
                whole = appender.path.read_bytes().rfind(b"\n") + 1
                appender.cut(whole if sizes is None else sizes[appender.path.name])
            self._spans.cut(self._spans.size_bytes // SPAN.itemsize * SPAN.itemsize)
            write_atomic(self.path / "settings.toml", to_toml(settings).encode())
            write_atomic(self.path / "run.json", _pretty(self._run))
            _point_latest(self.path.parent, self.path)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the files of lines so far, for `go_on`."""
        return {appender.path.name: appender.size_bytes for appender in (self._metrics, self._episodes)}

    def episodes(self) -> list[EpisodeLine]:
        """The episodes so far; `StartError` when a line cannot be read."""
        decoder = msgspec.json.Decoder(EpisodeLine)
        lines = self._episodes.path.read_bytes().splitlines()
        try:
            return [decoder.decode(line) for line in lines]
        except msgspec.DecodeError as error:
            raise StartError(f"{self._episodes.path} is damaged: {error}", "remove the line, or mend it") from error

    def metrics(self, *, experience_s: float, wall_s: float, steps: int, values: Mapping[str, JsonValue]) -> None:
        """Append a line of figures.

        `experience_s` counts episodes only, without resets and charging; `wall_s` counts everything.
        """
        self._append_line(self._metrics, _stamped(experience_s, wall_s, steps, values))
        if self._events is not None and not self.failed:
            with self._guarded(self.path / "tensorboard"):
                self._events.add(_scalars(values), steps, utc_seconds())

    def episode(self, end: EpisodeEnd, *, experience_s: float, wall_s: float, steps: int, robot: str = "") -> None:
        """Append a line for an episode that ended; `robot` is whose it was, where there are several."""
        values = {
            "episode": end.episode,
            "length": end.length,
            "return": end.return_,
            "terminated": end.terminated,
            "success": end.success,
            "reason": end.reason,
            **({"robot": robot} if robot else {}),
        }
        self._append_line(self._episodes, _stamped(experience_s, wall_s, steps, values))
        if self._events is not None and not self.failed:
            with self._guarded(self.path / "tensorboard"):
                self._events.add({"episode/return": end.return_, "episode/length": end.length}, steps, utc_seconds())

    def spans(self, records: npt.NDArray[Any]) -> None:
        """Append drained spans; beyond the size limit they are counted instead."""
        data = np.ascontiguousarray(records, SPAN).tobytes()
        if self.failed or self._spans.size_bytes + len(data) > SPANS_LIMIT_BYTES:
            self.spans_dropped += len(records)
            return
        with self._guarded(self._spans.path):
            self._spans.append(data)

    def update_run(self, values: Mapping[str, JsonValue]) -> None:
        """Add to run.json what became known after the start."""
        self._run |= values
        if not self.failed:
            with self._guarded(self.path / "run.json"):
                write_atomic(self.path / "run.json", _pretty(self._run))

    def finish(self, summary: Mapping[str, JsonValue]) -> None:
        """Complete run.json with the run's summary."""
        self.update_run(
            {"finished_utc": _utc(utc_seconds()), "spans_dropped": self.spans_dropped, "summary": dict(summary)}
        )

    def close(self) -> None:
        """Close the files; the folder stays as it is."""
        for appender in (self._metrics, self._episodes, self._spans):
            appender.close()
        os.close(self._lock)
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append_line(self, appender: Appender, record: Mapping[str, JsonValue]) -> None:
        if not self.failed:
            with self._guarded(appender.path):
                appender.append(_encode(record) + b"\n")

    @contextlib.contextmanager
    def _guarded(self, path: Path) -> Iterator[None]:
        try:
            with disk_errors(path):
                yield
        except SafetyStop:
            self.failed = True
            raise


def is_locked(path: Path) -> bool:
    """Whether some relod writes to this run folder now."""
    try:
        os.close(_lock(path))
    except (StartError, OSError):
        return True
    return False


def _lock(path: Path) -> int:
    """Hold the folder's lock; it falls with the process, however that ends."""
    fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise StartError(f"another relod writes to {path}", "end it first, or wait until it has ended") from None
    return fd


def _make_folder(root: Path, name: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for number in range(1, NAMES_TRIED):
        path = root / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise StartError(f"{root / name} and {NAMES_TRIED - 2} variants of it exist", "set run.folder to another place")


def _point_latest(root: Path, path: Path) -> None:
    """Make <root>/latest a link to the run, unless something that is no link has that name."""
    latest, aside = root / "latest", root / f".latest-{path.name}"
    if latest.exists() and not latest.is_symlink():
        return
    aside.symlink_to(path.name, target_is_directory=True)
    aside.replace(latest)


def _spans_header() -> dict[str, JsonValue]:
    return {
        "file": "spans.bin",
        "read_with": "numpy.fromfile('spans.bin', numpy.dtype([tuple(field) for field in header['dtype']]))",
        "dtype": [list(field) for field in SPAN.descr],
        "record_bytes": SPAN.itemsize,
        "clock": "CLOCK_MONOTONIC of the robot host, in nanoseconds",
        "stages": {stage.name.lower(): int(stage) for stage in Stage},
        "limit_bytes": SPANS_LIMIT_BYTES,
    }


def _stamped(experience_s: float, wall_s: float, steps: int, values: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    return {"experience_s": round(experience_s, 3), "wall_s": round(wall_s, 3), "steps": steps, **values}


def _scalars(values: Mapping[str, JsonValue]) -> dict[str, float]:
    """The numbers among the values; those of a nested table as `name/inner`."""
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            numbers |= {f"{name}/{inner}": number for inner, number in _scalars(value).items()}
        elif isinstance(value, int | float | np.integer | np.floating):
            numbers[name] = float(value)
    return numbers


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _builtin(value: object) -> object:
    """What msgspec does not know: numpy's numbers and arrays, paths."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} cannot be written as JSON")


_encode = msgspec.json.Encoder(enc_hook=_builtin, order="deterministic").encode


def _pretty(value: Mapping[str, JsonValue]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value, enc_hook=_builtin), indent=2) + b"\n"
