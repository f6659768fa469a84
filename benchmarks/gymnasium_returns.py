"""Does relod's SAC and PPO earn on Gymnasium environments what Stable-Baselines3's earn, in the same number of steps?

    pip install stable-baselines3 mujoco        # not needed by relod itself
    python benchmarks/gymnasium_returns.py --environments Pendulum-v1 --algorithms sac --steps 5000

Both learn with one thread, relod through `relod robot --task gym:NAME --clock virtual` with the agent's defaults for
such tasks, Stable-Baselines3 with its own defaults for an `MlpPolicy`. Compared is the mean return of the last whole
episodes of each run, exploration included. Writes JSON with machine, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from relod.runtime.provenance import describe

LAST = 10  # episodes
STABLE_BASELINES = """
import json, sys
import gymnasium, torch
import stable_baselines3
from stable_baselines3.common.monitor import Monitor

torch.set_num_threads(1)
name, algorithm, steps, seed = sys.argv[1], sys.argv[2].upper(), int(sys.argv[3]), int(sys.argv[4])
env = Monitor(gymnasium.make(name))
model = getattr(stable_baselines3, algorithm)("MlpPolicy", env, seed=seed, device="cpu")
model.learn(steps)
print(json.dumps({"returns": env.get_episode_rewards(), "version": stable_baselines3.__version__}))
"""


def learn_ours(name: str, algorithm: str, steps: int, seed: int, settings: list[str]) -> dict[str, Any]:
    """One run of relod."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = [word for each in (f"run.folder={folder}", "learner.threads=1", *settings) for word in ("--set", each)]
        command = [
            *(str(Path(sys.executable).with_name("relod")), "robot", "--task", f"gym:{name}", "--algo", algorithm),
            *("--clock", "virtual", "--steps", str(steps), "--seed", str(seed), "--json", *chosen),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    run: dict[str, Any] = json.loads(done.stdout)
    return {"returns": run["returns"][:-1] if steps % max(run["lengths"]) else run["returns"], "wall_s": run["wall_s"]}


def learn_theirs(name: str, algorithm: str, steps: int, seed: int) -> dict[str, Any]:
    """One run of Stable-Baselines3."""
    command = [sys.executable, "-c", STABLE_BASELINES, name, algorithm, str(steps), str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def last_return(run: dict[str, Any]) -> float:
    return statistics.mean(run["returns"][-LAST:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", nargs="+", default=["Pendulum-v1", "InvertedPendulum-v5"])
    parser.add_argument("--algorithms", nargs="+", default=["sac", "ppo"])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="settings", action="append", default=[], help="a setting of relod, A.B=C")
    parser.add_argument("--out", type=Path, default=Path("out/gymnasium_returns.json"))
    options = parser.parse_args()
    rows = []
    for name in options.environments:
        for algorithm in options.algorithms:
            ours = [learn_ours(name, algorithm, options.steps, seed, options.settings) for seed in options.seeds]
            theirs = [learn_theirs(name, algorithm, options.steps, seed) for seed in options.seeds]
            row = {
                "environment": name,
                "algorithm": algorithm,
                "steps": options.steps,
                "relod": [round(last_return(run), 1) for run in ours],
                "stable_baselines3": [round(last_return(run), 1) for run in theirs],
            }
            print(json.dumps(row))
            rows.append(row | {"runs": {"relod": ours, "stable_baselines3": theirs}})
    result = {"benchmark": "gymnasium_returns", **describe(sys.argv), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
