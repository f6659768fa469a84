"""What is there: tasks and algorithms, built in and installed, and the runs of a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..config import load
from ..errors import RelodError, StartError
from ..robots import registry
from .clock import NS_PER_MS
from .curve import MEAN_EPISODES, read_episodes
from .rundir import is_locked, read_run

__all__ = ["list_algorithms", "list_runs", "list_tasks"]

Row = dict[str, Any]


def list_tasks() -> list[Row]:
    """Every known task by name: where it is, its robot, rate, images, observation and action; or what is wrong."""
    return [_row("task", name, target, _task) for name, target in sorted(registry.names("task").items())]


def list_algorithms() -> list[Row]:
    """Every known algorithm by name: where it is, its presets and what it learns from; or what is wrong."""
    return [_row("algorithm", name, target, _algorithm) for name, target in sorted(registry.names("algorithm").items())]


def _row(kind: str, name: str, target: str, describe: Callable[[str], Row]) -> Row:
    """One that cannot be imported is a row like the others: the rest must stay usable."""
    try:
        return {"name": name, "target": target, **describe(name), "error": ""}
    except RelodError as error:
        return {"name": name, "target": target, "error": error.message}


def _task(name: str) -> Row:
    entry = registry.task(name)
    spec = entry.make_task(load(entry.sections()).task).spec
    return {
        "robot": entry.robot,
        "cycle_ms": spec.cycle_ns / NS_PER_MS,
        "images": [spec.frames, *spec.image_hw, 3],
        "vector": spec.proprio_dim,
        "actions": list(spec.action_names),
        "episode_steps": spec.max_steps,
        "profiles": sorted(entry.profiles),
    }


def _algorithm(name: str) -> Row:
    algorithm = registry.algorithm(name)
    return {"presets": list(algorithm.presets), "profiles": list(algorithm.profiles)}


def list_runs(folder: Path) -> list[Row]:
    """The runs in `folder`, oldest first. `StartError`: there is no such folder.

    `state` is `running`, `ended`, or `interrupted`: killed, and able to go on.
    """
    if not folder.is_dir():
        raise StartError(f"there is no folder {folder}", "name a folder of runs")
    places = [place for place in sorted(folder.iterdir()) if (place / "run.json").exists() and not place.is_symlink()]
    return [_run(place) for place in places]


def _run(place: Path) -> Row:
    try:
        about = read_run(place)
        episodes = read_episodes(place / "episodes.jsonl") if (place / "episodes.jsonl").exists() else []
    except (RelodError, msgspec.MsgspecError) as error:
        return {"run": str(place), "state": "damaged", "error": str(error)}
    summary = about.get("summary")
    whole = [episode.return_ for episode in episodes if not episode.cut]
    return {
        "run": str(place),
        "state": "running"
        if (place / "lock").exists() and is_locked(place)
        else "interrupted"
        if summary is None
        else "ended",
        "exit_code": None if summary is None else summary.get("exit_code"),
        **{name: about.get(name) for name in ("task", "mode", "clock", "algorithm", "preset", "device", "started_utc")},
        "episodes": len(episodes),
        "steps": episodes[-1].steps if episodes else 0,
        "experience_minutes": round(episodes[-1].experience_s / 60, 2) if episodes else 0.0,
        "mean_return_of_last_20": round(float(np.mean(whole[-MEAN_EPISODES:])), 3) if whole else None,
        "error": (summary or {}).get("error", ""),
    }
