"""Does an agent learn the task `track` in minutes of real time, and what are its returns worth?

Runs `relod robot --task track` as its user does, as a whole process, for some minutes of wall clock per seed, start
included; in a remote mode with a `relod learner` of its own, started first. Returns are compared with those of a
scripted controller that knows where the disc is, in virtual time, and of random actions. Writes JSON with machine,
versions and commit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from virtual_episodes import virtual_episodes

from relod.bench.children import RELOD
from relod.bench.loadrobot import start_learner
from relod.config import load
from relod.robots.track.rig import LOW_MM
from relod.robots.track.task import TRACK
from relod.robots.track.world import WORLDS, Scene
from relod.runtime.provenance import describe
from relod.types import Action, FloatArray, Observation

GAIN_PER_MM = 0.08  # action by distance left, and less of it the faster the rig already is
DAMPING_PER_MM_S = 0.0024
LAST_EPISODES = 10
END_LIMIT_S = 60.0  # for a last checkpoint

Controller = Callable[[Scene], FloatArray]


class Scripted:
    """An actor that knows where rig and disc are."""

    def __init__(self, scene: Scene, controller: Controller) -> None:
        self._scene, self._controller = scene, controller

    def act(self, observation: Observation) -> Action:
        return Action(values=self._controller(self._scene))


def approach(scene: Scene) -> FloatArray:
    """Straight to the disc's middle, as close as the rig goes."""
    rig = scene.rig
    left = np.array([*scene.disc_mm, LOW_MM[2]]) - rig.pose_at(rig.next_tick_ns)
    wanted = GAIN_PER_MM * left - DAMPING_PER_MM_S * np.array(rig.speed_mm_s)
    return np.clip(wanted, -1.0, 1.0).astype(np.float32)


def random_actions(seed: int, hold: int) -> Controller:
    """Uniform actions, each held for `hold` cycles."""
    rng = np.random.default_rng(seed)
    drawn: list[FloatArray] = []

    def draw(scene: Scene) -> FloatArray:
        if not drawn:
            drawn.extend([rng.uniform(-1.0, 1.0, 3).astype(np.float32)] * hold)
        return drawn.pop()

    return draw


def returns(controller: Controller, *, episodes: int, seed: int, world: str = "nominal") -> list[float]:
    """Returns of a controller in virtual time."""
    settings = load(TRACK.sections(), presets=[WORLDS[world]])
    ends = virtual_episodes(TRACK, settings, seed, lambda virtual: Scripted(virtual.scene, controller))
    return [end.return_ for end in itertools.islice(ends, episodes)]


def learn(seed: int, minutes: float, mode: str, arguments: list[str]) -> dict[str, Any]:
    """One run, ended by Ctrl-C after `minutes` of wall clock; its JSON document, and the learner's as "learner"."""
    if mode == "local-only":
        return run_robot(seed, minutes, [*arguments, "--mode", mode])
    with tempfile.TemporaryDirectory() as folder:
        learner, url = start_learner(Path(folder), [f"run.seed={seed}"])
        try:
            run = run_robot(seed, minutes, [*arguments, "--mode", mode, "--learner", url])
            learner.send_signal(signal.SIGINT)
            out, _ = learner.communicate(timeout=END_LIMIT_S)
        finally:
            learner.kill()
            learner.wait()
    learned = json.loads(out)
    return run | {"updates": learned["updates"], "learner": learned}


def run_robot(seed: int, minutes: float, arguments: list[str]) -> dict[str, Any]:
    """`relod robot --task track`, ended by Ctrl-C after `minutes`; its JSON document."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *RELOD,
            *("robot", "--task", "track", "--json", "--seed", str(seed), "--set", f"run.folder={folder}"),
            *arguments,
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        try:
            try:
                out, _ = process.communicate(timeout=minutes * 60)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                out, _ = process.communicate(timeout=END_LIMIT_S)
        finally:
            process.kill()
            process.wait()
    if process.returncode not in (0, 128 + signal.SIGINT):
        raise SystemExit(f"the run with seed {seed} ended with exit code {process.returncode}")
    run: dict[str, Any] = json.loads(out)
    return run


def last_return(run: dict[str, Any]) -> float:
    """Mean of the last whole episodes: ten of them, or five of fewer than twenty."""
    whole = [r for r, length in zip(run["returns"], run["lengths"], strict=True) if length == max(run["lengths"])]
    return statistics.mean(whole[-(LAST_EPISODES if len(whole) >= 2 * LAST_EPISODES else LAST_EPISODES // 2) :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="of wall clock per run, start included")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--mode", default="local-only", help="where the learner is; remote ones on this host")
    parser.add_argument("--episodes", type=int, default=40, help="of each scripted controller")
    parser.add_argument("--out", type=Path, default=Path("out/track.json"))
    parser.add_argument("arguments", nargs="*", help="further arguments of `relod robot`, after --")
    arguments = parser.parse_args()
    samples = {
        name: returns(controller, episodes=arguments.episodes, seed=100)
        for name, controller in (
            ("scripted", approach),
            ("stand", lambda scene: np.zeros(3, np.float32)),
            ("random", random_actions(1, hold=1)),
            ("random_held_5", random_actions(1, hold=5)),
            ("random_held_15", random_actions(1, hold=15)),
        )
    }
    scripted = statistics.mean(samples["scripted"])
    runs = [learn(seed, arguments.minutes, arguments.mode, arguments.arguments) for seed in arguments.seeds]
    learned = [last_return(run) for run in runs]
    result = {
        "benchmark": "track",
        **describe(sys.argv),
        "mode": arguments.mode,
        **{name: statistics.mean(values) for name, values in samples.items()},
        "last_return": learned,
        "last_return_over_scripted": [value / scripted for value in learned],
        "steps": [run["steps"] for run in runs],
        "updates_per_step": [run["updates"] / max(run["steps"], 1) for run in runs],
        "overruns_per_5000_cycles": [run["overruns"] * 5000 / max(run["cycles"], 1) for run in runs],
        "lateness_p99_ms": [run["cycle_lateness_ms"]["p99"] for run in runs],
        "act_p99_ms": [run["act_ms"]["p99"] for run in runs],
        "samples": samples,
        "runs": runs,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2))
    print(json.dumps({key: value for key, value in result.items() if key not in ("samples", "runs")}, indent=2))


if __name__ == "__main__":
    main()
