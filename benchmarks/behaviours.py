"""What Create-Reacher gives without learning: random actions, random actions held, and a script that sees the target.

These are the lines a learning curve is read against. Runs whole episodes of the task in virtual time with its default
settings, resets included, a new world for each seed; every behaviour meets the same worlds.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from virtual_episodes import virtual_episodes

from relod.config import Settings, load
from relod.robots import registry
from relod.robots.vision import cv2
from relod.runtime.clock import NS_PER_S, monotonic_ns
from relod.runtime.curve import bootstrap_interval
from relod.runtime.provenance import describe
from relod.runtime.request import world_settings
from relod.seeds import random_stream
from relod.types import Action, Actor, Observation

# The script. Looks of the arena are drawn so that at most 0.5 % of a picture without the target has its colour; from
# the far wall the target fills about 2.5 %.
SEEN_FRACTION = 0.005
AIM_GAIN = 1.2  # difference of the wheels for a target at the picture's edge, of full speed
# Wheels of the search, of full speed. Measured over 32 episodes: mean return -123 at 0.6, -103 at 0.8, -90 at 1.0.
TURN = 1.0
TURN_STEPS = 130  # 5.9 s, where a whole turn takes 5; with nothing found the place is wrong
WANDER_STEPS = 20


class Uniform:
    """Actions uniform in [-1, 1], each held for `hold` cycles."""

    def __init__(self, rng: np.random.Generator, hold: int) -> None:
        self._rng, self._hold, self._left = rng, hold, 0
        self._values = np.zeros(2, np.float32)

    def act(self, observation: Observation) -> Action:
        if self._left == 0:
            self._left = self._hold
            self._values = self._rng.uniform(-1.0, 1.0, 2).astype(np.float32)
        self._left -= 1
        return Action(values=self._values.copy())


class Script:
    """Turns on the spot until the target is in the newest image, then drives at it; no memory but the last side."""

    def __init__(self, hsv_low: tuple[int, int, int], hsv_high: tuple[int, int, int]) -> None:
        self._low, self._high = hsv_low, hsv_high
        self._side = 1.0  # where the target was seen last: 1 right, -1 left
        self._searched = 0

    def act(self, observation: Observation) -> Action:
        bearing = self._bearing(observation)
        if bearing is None:
            return self._search()
        self._searched, self._side = 0, 1.0 if bearing > 0 else -1.0
        steer = AIM_GAIN * bearing
        return _wheels(1.0 + min(0.0, steer), 1.0 - max(0.0, steer))

    def _bearing(self, observation: Observation) -> float | None:
        """Where the target's middle is: -1 at the left edge of the picture, 1 at the right; None if not in it."""
        image = observation.images[-1]
        mask = cv2.inRange(cv2.cvtColor(image, cv2.COLOR_BGR2HSV), self._low, self._high)
        columns = np.count_nonzero(mask, axis=0)
        if columns.sum() < SEEN_FRACTION * mask.size:
            return None
        width = mask.shape[1]
        return float((columns * np.arange(width)).sum() / columns.sum() * 2 / (width - 1) - 1)

    def _search(self) -> Action:
        self._searched += 1
        if self._searched % (TURN_STEPS + WANDER_STEPS) > TURN_STEPS:
            return _wheels(1.0, 1.0)
        return _wheels(TURN * self._side, -TURN * self._side)


def _wheels(left: float, right: float) -> Action:
    return Action(values=np.clip(np.array([left, right], np.float32), -1.0, 1.0))


HOLDS = (15, 25, 40, 60)  # cycles; SAC's own warm-up holds for the last


def behaviours(settings: Settings) -> dict[str, Callable[[int], Actor]]:
    """Each behaviour by name; built from a seed."""

    def uniform(hold: int, seed: int) -> Actor:
        return Uniform(random_stream(seed, "actor"), hold)

    return {
        "uniform": functools.partial(uniform, 1),
        **{f"held for {hold} cycles": functools.partial(uniform, hold) for hold in HOLDS},
        "scripted search": lambda seed: Script(settings.task.target_hsv_low, settings.task.target_hsv_high),
    }


def sample(settings: Settings, entry: registry.TaskEntry, actor: Actor, seed: int, count: int) -> list[dict[str, Any]]:
    """The first `count` episodes of a run, as plain values."""
    return [
        {"seed": seed, "return": end.return_, "length": end.length, "success": end.success}
        for end in itertools.islice(virtual_episodes(entry, settings, seed, lambda world: actor), count)
    ]


def measure(ends: list[dict[str, Any]], cycle_s: float) -> dict[str, Any]:
    """The figures of one behaviour; an episode without success counts with its whole length."""
    returns = np.array([end["return"] for end in ends])
    low, high = bootstrap_interval(returns[:, None])
    times_s = [end["length"] * cycle_s for end in ends]
    successful_s = [end["length"] * cycle_s for end in ends if end["success"]]
    return {
        "episodes": len(ends),
        "successes": len(successful_s),
        "mean_return": round(float(returns.mean()), 1),
        "mean_return_95": [round(float(low[0]), 1), round(float(high[0]), 1)],
        "median_time_s": round(statistics.median(times_s), 3),
        "median_time_of_successes_s": round(statistics.median(successful_s), 3) if successful_s else None,
        "samples": ends,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=40, help="of each behaviour, shared among the seeds")
    parser.add_argument("--seeds", default="0,1,2,3,4,5,6,7", help="of the worlds")
    parser.add_argument("--world", default="nominal", help="ideal, nominal or harsh")
    parser.add_argument("--out", type=Path, default=Path("out/behaviours.json"))
    arguments = parser.parse_args()
    seeds = [int(text) for text in arguments.seeds.split(",")]
    entry = registry.task("create")
    settings = load(entry.sections(), presets=[world_settings(entry, arguments.world)])
    cycle_s = entry.build(settings.task).spec.cycle_ns / NS_PER_S
    started_ns = monotonic_ns()
    results = {}
    for name, build in behaviours(settings).items():
        ends: list[dict[str, Any]] = []
        for index, seed in enumerate(seeds):
            count = arguments.episodes * (index + 1) // len(seeds) - arguments.episodes * index // len(seeds)
            ends += sample(settings, entry, build(seed), seed, count)
        results[name] = measure(ends, cycle_s)
        shown = {key: value for key, value in results[name].items() if key != "samples"}
        print(name, json.dumps(shown), flush=True)
    document = {
        "benchmark": "behaviours",
        **describe(sys.argv),
        "world": arguments.world,
        "cycle_s": cycle_s,
        "wall_s": (monotonic_ns() - started_ns) / NS_PER_S,
        "behaviours": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
