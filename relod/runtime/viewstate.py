"""What the live view shows, as plain data, and a file format for one moment of it.

The parent fills a `RunState` and hands it to the view a few times a second. A saved state is drawn again by
docs/make_picture.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from ..types import Image
from .spans import Histogram

__all__ = ["Percentiles", "RunState", "SavedPercentiles", "load_state", "save_state"]

WARNINGS_KEPT = 8


class Percentiles(Protocol):
    """A `Histogram`, or what is left of one in a file."""

    def summary_ms(self) -> dict[str, float]:
        """`p50 p90 p99 p999 max`, in milliseconds."""
        ...


@dataclass(frozen=True, slots=True)
class SavedPercentiles:
    """The percentiles of a saved state."""

    values_ms: dict[str, float]

    def summary_ms(self) -> dict[str, float]:
        """What the histogram's `summary_ms` was."""
        return self.values_ms


@dataclass(slots=True, kw_only=True)
class RunState:
    """One run as a person wants to see it; every field may be filled at any time, in any order."""

    task: str
    mode: str  # local-only, evaluate, ...
    simulated: bool
    robot: str = ""  # address of the real robot
    camera: str = ""  # source of the real camera
    folder: str = ""
    alarm: str = ""  # what must be seen first, for example ROBOT MAY BE MOVING; empty when all is well

    phase: str = "starting"
    elapsed_s: float = 0.0  # wall time
    experience_s: float = 0.0  # time in episodes
    max_minutes: float = 0.0  # of experience; 0 = no limit
    steps: int = 0
    max_steps: int = 0  # of the run; 0 = no limit

    episodes: int = 0  # finished
    index: int = 0  # step of the episode in progress
    episode_steps: int = 0  # its time limit
    episode_return: float = 0.0
    returns: list[float] = field(default_factory=list)  # of finished episodes, oldest first
    successes: list[bool] = field(default_factory=list)  # the same, whether the goal was reached

    image: Image | None = None  # newest camera image, (H, W, 3) uint8 BGR

    realtime: bool = False  # the control process has a real-time policy
    cycle_ms: float = 0.0
    lateness: Percentiles = field(default_factory=Histogram)  # deadline -> the cycle starts
    act: Percentiles = field(default_factory=Histogram)  # deadline -> its command is on the wire
    overruns: int = 0
    sensor_age_ms: float = 0.0
    frame_age_ms: float = 0.0

    updates: int = 0
    updates_per_s: float = 0.0
    policy_version: tuple[int, int] = (0, 0)
    policy_age_s: float = 0.0
    replay_steps: int = 0
    replay_capacity: int = 0
    losses: Mapping[str, float] = field(default_factory=dict)

    hold: str = ""  # why no episode may begin now
    link: Mapping[str, float | str] = field(default_factory=dict)  # to a learner elsewhere, as `link.figures` names it

    status: Mapping[str, float | str] = field(default_factory=dict)  # of the robot, by the task
    warnings: deque[str] = field(default_factory=lambda: deque(maxlen=WARNINGS_KEPT))  # oldest first


def save_state(state: RunState, path: Path) -> None:
    """Write the state as .npz: the image, and everything else as JSON. Raises `OSError`."""
    plain = {f.name: getattr(state, f.name) for f in fields(RunState) if f.name != "image"}
    plain |= {
        "warnings": list(state.warnings),
        "lateness": state.lateness.summary_ms(),
        "act": state.act.summary_ms(),
    }
    image = state.image if state.image is not None else np.zeros((0, 0, 3), np.uint8)
    with path.open("wb") as file:
        np.savez_compressed(file, plain=np.frombuffer(msgspec.json.encode(plain), np.uint8), image=image)


def load_state(path: Path) -> RunState:
    """Read what `save_state` wrote; `ValueError`, `KeyError` or `OSError` for another file."""
    with np.load(path, allow_pickle=False) as arrays:
        plain: dict[str, Any] = msgspec.json.decode(arrays["plain"].tobytes())
        image = arrays["image"] if arrays["image"].size else None
    plain["warnings"] = deque(plain["warnings"], maxlen=WARNINGS_KEPT)
    plain["policy_version"] = tuple(plain["policy_version"])
    plain["lateness"], plain["act"] = SavedPercentiles(plain["lateness"]), SavedPercentiles(plain["act"])
    return RunState(**plain, image=image)
