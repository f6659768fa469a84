"""How well and how soon it learns: `relod robot` for several seeds, as its user runs it, and the figures of each run.

On the wall clock one run after the other, since each needs the machine; in virtual time `--jobs` at once, of one
thread each. Arguments after `--` go to `relod robot`. The run folders stay, for `relod plot`. Writes JSON with
machine, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from relod.errors import RelodError
from relod.runtime import experiments
from relod.runtime.provenance import describe

CRITERIA: Mapping[str, Callable[[dict[str, Any]], float | None]] = {
    "success_share_of_last_20": lambda figures: figures["successes_of_last_20"] / 20,
    "mean_return_of_last_10": lambda figures: figures["mean_return_of_last_10"],
    "mean_return_of_last_20": lambda figures: figures["mean_return_of_last_20"],
    "minute_of_60_percent": lambda figures: figures["minute_of_60_percent"],
}


def run_robot(seed: int, options: argparse.Namespace, extra: Sequence[str]) -> dict[str, Any]:
    """One whole run: its exit code, summary and figures."""
    command = [
        *(str(Path(sys.executable).with_name("relod")), "robot", "--json"),
        *("--clock", options.clock, "--seed", str(seed), "--minutes", str(options.minutes)),
        *("--set", f"run.folder={options.folder}"),
        *extra,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    summary = json.loads(done.stdout) if done.stdout else {}
    return {"seed": seed, "exit_code": done.returncode, "figures": figures(summary), "summary": summary}


def figures(summary: dict[str, Any]) -> dict[str, Any] | None:
    """The run's figures as `relod plot --json` gives them; None for a run that has no episode."""
    try:
        runs, _ = experiments.find_runs([Path(summary["run_dir"])])
    except (KeyError, RelodError):
        return None
    (group,) = experiments.describe(experiments.group_runs(runs))
    found: dict[str, Any] = group["runs"][0]
    return found


def criteria(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each criterion by seed, null for a run that never came to it, and the median of those that did."""
    found: dict[str, Any] = {}
    for name, value_of in CRITERIA.items():
        by_seed = {run["seed"]: None if run["figures"] is None else value_of(run["figures"]) for run in runs}
        there = [value for value in by_seed.values() if value is not None]
        found[name] = {
            "by_seed": by_seed,
            "reached_by": len(there),
            "median": statistics.median(there) if there else None,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clock", choices=("virtual", "wall"), default="virtual")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--minutes", type=float, default=60.0, help="of experience, each run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, in virtual time")
    parser.add_argument("--folder", type=Path, default=Path("out/learning"), help="where run folders are made")
    parser.add_argument("--out", type=Path, default=Path("out/learning.json"))
    parser.add_argument("extra", nargs="*", metavar="-- ARGUMENT", help="more arguments of `relod robot`")
    options = parser.parse_args()
    if options.jobs < 1 or (options.clock == "wall" and options.jobs > 1):
        parser.error("--jobs is 1 on the wall clock, and 1 or more in virtual time")
    seeds = [int(text) for text in options.seeds.split(",")]
    runs: list[dict[str, Any]] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for run in pool.map(lambda seed: run_robot(seed, options, options.extra), seeds):
            runs.append(run)
            print(json.dumps({key: run[key] for key in ("seed", "exit_code", "figures")}), flush=True)
            write(options, runs)  # what is known is kept when the rest is not waited for
    for name, value in criteria(runs).items():
        print(name, json.dumps(value))
    sys.exit(any(run["exit_code"] for run in runs))


def write(options: argparse.Namespace, runs: Sequence[dict[str, Any]]) -> None:
    document = {
        "benchmark": "learning",
        **describe(sys.argv),
        "clock": options.clock,
        "minutes": options.minutes,
        "jobs": options.jobs,
        "robot_arguments": options.extra,
        "criteria": criteria(runs),
        "runs": runs,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
