"""The main job on the wall clock: does the cycle keep its deadlines while the worker updates back to back?

Runs `relod robot` as its user does, as a whole process, and reports the percentiles it prints, beside the sentinel's
from the same run. Writes JSON with machine, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from relod.runtime.provenance import describe

CYCLE_S = 0.045


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="of wall-clock cycles, resets included, roughly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/realtime.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(Path(sys.executable).with_name("relod")),
            *("robot", "--json", "--seed", str(arguments.seed), "--minutes", str(arguments.minutes)),
            # From the first minute on, and without a cap: the worker is never idle.
            *("--set", "agent.init_steps=200", "--set", "agent.max_updates_per_step=1000"),
            *("--set", f"run.folder={folder}"),
        ]
        usage_before = os.times()
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        usage = os.times()
    run = json.loads(done.stdout)
    cpu_s = usage.children_user + usage.children_system - usage_before.children_user - usage_before.children_system
    lateness, sentinel, act = run["cycle_lateness_ms"], run["sentinel_ms"], run["act_ms"]
    result = {
        "benchmark": "realtime",
        **describe(sys.argv),
        "cycles": run["cycles"],
        "updates": run["updates"],
        "updates_per_s": run["updates"] / run["wall_s"],
        "cpu_cores_used": cpu_s / run["wall_s"],
        "lateness_p99_over_sentinel_p99": lateness["p99"] / max(sentinel["p99"], 1e-9),
        "lateness_p99_allowed_ms": max(2.0, 2 * sentinel["p99"]),
        "act_p99_ms": act["p99"],
        "overruns": run["overruns"],
        "overruns_not_shared": run["overruns_not_shared"],
        "run": run,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2))
    shown = {key: value for key, value in result.items() if not isinstance(value, dict | list)}
    print(json.dumps(shown | {"lateness_ms": lateness, "act_ms": act, "sentinel_ms": sentinel}, indent=2))


if __name__ == "__main__":
    main()
