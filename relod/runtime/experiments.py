"""Run folders read back: which of them repeat one experiment, and each one's figures. Their picture: `plot.py`.

Runs that differ in nothing but the `[run]` section of their settings (seed, length, folder) are one group: repetitions
of one experiment. What is read is what a run writes as it goes, so runs that are not over, or never will be, count too.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ..config import flatten
from ..errors import SettingsError, StartError
from .curve import MEAN_EPISODES, Episode, read_episodes

__all__ = ["HEAD", "Group", "Run", "describe", "find_runs", "group_runs", "one_of", "phrase"]

REACHED_SHARE = 0.6  # of the last episodes; the minute at which it comes says how soon a run learned
LISTED_SETTINGS = 4  # in a label; what else differs is counted
GROUPINGS = ("auto", "none")

_Array = npt.NDArray[np.float64]


class _Record(msgspec.Struct, frozen=True):
    """What run.json says about the experiment."""

    task: str
    mode: str
    clock: str
    algorithm: str
    preset: str
    device: str  # SIMULATED, or the hardware's addresses
    world: str


class _RunSection(msgspec.Struct, frozen=True):
    """What the section `run` of settings.toml says that is needed here."""

    seed: int


HEAD = _Record.__struct_fields__


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run folder, read."""

    folder: Path
    seed: int
    finished: bool  # False for runs that go on, and for those that were killed
    identity: Mapping[str, str]  # what run.json and settings.toml say, but for the section `run`; dotted names
    episodes: tuple[Episode, ...]  # at least one; without those cut by the run's end or by trouble

    @property
    def experience_minutes(self) -> _Array:
        """When each episode ended: time in episodes so far."""
        return np.array([e.experience_s for e in self.episodes], np.float64) / 60

    @property
    def wall_minutes(self) -> _Array:
        """When each episode ended: time since the run's start."""
        return np.array([e.wall_s for e in self.episodes], np.float64) / 60

    @property
    def returns(self) -> _Array:
        return np.array([e.return_ for e in self.episodes], np.float64)

    def recent_successes(self, window: int) -> _Array:
        """Successes among the last `window` episodes, after each."""
        sums = np.cumsum([0.0, *(float(e.success) for e in self.episodes)])
        ends = np.arange(1, len(sums))
        counts: _Array = sums[ends] - sums[np.maximum(0, ends - window)]
        return counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Runs of one experiment."""

    label: str
    runs: tuple[Run, ...]


# -- reading ----------------------------------------------------------------------------------------------------


def find_runs(paths: Iterable[Path]) -> tuple[list[Run], list[Path]]:
    """The runs in `paths`, each a run folder, a link to one or a folder of run folders; and those without an episode.

    Raises:
        StartError: a path is missing, is or holds no run folder, cannot be read, or no run has an episode.
    """
    runs, empty = [], []
    try:
        for folder in dict.fromkeys(folder.resolve() for path in paths for folder in _run_folders(path)):
            run = _read_run(folder)
            if run is None:
                empty.append(folder)
            else:
                runs.append(run)
    except OSError as error:
        raise StartError(f"{error.filename} cannot be read: {error.strerror}", "name other runs") from error
    if not runs:
        named = str(empty[0]) if len(empty) == 1 else f"any of {len(empty)} runs"
        raise StartError(f"no episode was finished in {named}", "wait for the first, or name other runs")
    return runs, empty


def _run_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise StartError(f"there is no folder {path}", "name a run folder, or a folder of run folders")
    if (path / "run.json").exists():
        return [path]
    inside = sorted(folder for folder in path.iterdir() if (folder / "run.json").exists())
    if not inside:
        raise StartError(
            f"{path} is no run folder and holds none: no run.json", "name a folder that `relod robot` made"
        )
    return inside


def _read_run(folder: Path) -> Run | None:
    """The run, or None when it has no episode yet."""
    try:
        whole = msgspec.json.decode((folder / "run.json").read_bytes(), type=dict[str, Any])
        record = msgspec.convert(whole, _Record)
        settings = tomllib.loads((folder / "settings.toml").read_text("utf-8"))
        seed = msgspec.convert(settings.pop("run", {}), _RunSection).seed
        episodes = tuple(e for e in read_episodes(folder / "episodes.jsonl") if not e.cut)
    except (msgspec.DecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StartError(f"run folder {folder} is damaged: {error}", "name other runs") from error
    if not episodes:
        return None
    identity = {**msgspec.structs.asdict(record), **{name: str(value) for name, value in flatten(settings)}}
    return Run(folder=folder, seed=seed, finished="summary" in whole, identity=identity, episodes=episodes)


# -- grouping ----------------------------------------------------------------------------------------------------


def group_runs(runs: Sequence[Run], grouping: str = "auto") -> list[Group]:
    """The runs by experiment, or with "none" each by itself, in the order they came; labels say what differs."""
    one_of(grouping, GROUPINGS, "--group")
    alone = grouping == "none"
    by_key: dict[Any, list[Run]] = {}
    for run in runs:
        by_key.setdefault(run.folder if alone else tuple(sorted(run.identity.items())), []).append(run)
    members = list(by_key.values())
    identities = [m[0].identity for m in members]
    labels = [_label(identity, identities) for identity in identities]
    if alone:
        labels = [f"{label}, seed {m[0].seed}" for label, m in zip(labels, members, strict=True)]
    return [
        Group(label=f"{label}, {m[0].folder.name}" if labels.count(label) > 1 else label, runs=tuple(m))
        for label, m in zip(labels, members, strict=True)
    ]


def _label(identity: Mapping[str, str], everyone: Sequence[Mapping[str, str]]) -> str:
    """What distinguishes one identity from the others.

    Settings count only against those with the same head (task, mode, ..., preset): another preset is different
    settings by itself.
    """
    head = [name for name in HEAD if _differs(name, everyone)]
    kin = [other for other in everyone if all(other[name] == identity[name] for name in HEAD)]
    names = dict.fromkeys(name for other in kin for name in other)
    settings = [f"{name}={identity.get(name, 'unset')}" for name in names if _differs(name, kin)]
    words = [phrase(name, identity[name]) for name in head] + settings[:LISTED_SETTINGS]
    if len(settings) > LISTED_SETTINGS:
        words.append(f"{len(settings) - LISTED_SETTINGS} more")
    return ", ".join(words) or phrase("preset", identity["preset"])


def phrase(name: str, value: str) -> str:
    """A fact of the head in words."""
    return f"{value} {name}" if name in ("clock", "world") else value


def one_of(value: str, known: Sequence[str], what: str) -> None:
    """`SettingsError` when the value is none of those known."""
    if value not in known:
        raise SettingsError(f"unknown {what} {value!r}", f"known: {', '.join(known)}")


def _differs(name: str, identities: Sequence[Mapping[str, str]]) -> bool:
    return len({identity.get(name) for identity in identities}) > 1


# -- figures ----------------------------------------------------------------------------------------------------


def describe(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """Each group's runs in figures; the keys are an interface. Means are null when there are fewer episodes."""
    return [{"label": group.label, "runs": [_describe_run(run) for run in group.runs]} for group in groups]


def _describe_run(run: Run) -> dict[str, Any]:
    last = run.episodes[-1]
    return {
        "folder": str(run.folder),
        "seed": run.seed,
        "finished": run.finished,
        "episodes": len(run.episodes),
        "steps": last.steps,
        "experience_minutes": round(last.experience_s / 60, 3),
        "wall_minutes": round(last.wall_s / 60, 3),
        "successes_of_last_20": int(run.recent_successes(MEAN_EPISODES)[-1]),
        "mean_return_of_last_10": _mean_of_last(run.returns, 10),
        "mean_return_of_last_20": _mean_of_last(run.returns, MEAN_EPISODES),
        "minute_of_60_percent": _minute_reached(run),
    }


def _mean_of_last(values: _Array, count: int) -> float | None:
    return round(float(values[-count:].mean()), 3) if len(values) >= count else None


def _minute_reached(run: Run) -> float | None:
    """First minute of experience at which the last 20 episodes, all 20 there, had enough successes."""
    counts = run.recent_successes(MEAN_EPISODES)
    reached = np.flatnonzero(counts[MEAN_EPISODES - 1 :] >= REACHED_SHARE * MEAN_EPISODES)
    if not len(reached):
        return None
    return round(float(run.experience_minutes[MEAN_EPISODES - 1 + reached[0]]), 3)
