"""How long the wheels turn after a whole run is killed, in the simulated robot's own wheel log.

    python benchmarks/stopping_runs.py --deaths 30

`stopping.py` kills the device process's surroundings one by one; this one starts `relod robot` as its user does,
against a simulated Create 2 in a process of its own, and kills processes of the running command, or signals it, at
random moments of episodes and resets. The time counts from just before the first signal is sent to the first record
that shows both wheels standing for good.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from stopping import time_to_stop_ms, time_to_told_ms

from relod.robots.create2.plant import WheelRecord
from relod.runtime.clock import monotonic_ns, sleep_s
from relod.runtime.provenance import describe

RELOD = (sys.executable, "-m", "relod")
START_LIMIT_S = 60.0
SETTLE_S = 0.8  # from the death to reading the log, so that a robot that starts again is seen

# What is killed, or signalled, by name.
DEATHS: dict[str, tuple[tuple[str, ...], signal.Signals]] = {
    "parent killed": (("parent",), signal.SIGKILL),
    "control process killed": (("control",), signal.SIGKILL),
    "device process killed": (("device",), signal.SIGKILL),
    "parent and control process killed": (("parent", "control"), signal.SIGKILL),
    "Ctrl-C": (("parent",), signal.SIGINT),
    "SIGTERM": (("parent",), signal.SIGTERM),
}


def children(pid: int) -> dict[str, int]:
    """Children of a process by the names they gave themselves."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(") ")
                if int(rest.split()[1]) == pid:
                    found[name] = int(entry.name)
    return found


def steps_of(folder: Path) -> int:
    """Steps in the newest run's metrics."""
    with contextlib.suppress(OSError, IndexError, ValueError, KeyError):
        lines = (folder / "latest" / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["steps"])
    return 0


def one_death(death: str, world: str, rng: random.Random, number: int) -> dict[str, Any]:
    """Start a world and a run, let it drive for a while, kill, read the wheel log."""
    names, what = DEATHS[death]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wheels = folder / "wheels.jsonl"
        robot = subprocess.Popen(
            [*RELOD, "emulate", "create", "--world", world, "--seed", str(number), "--wheel-log", wheels],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert robot.stdout is not None
        where = json.loads(robot.stdout.readline())
        run = subprocess.Popen(
            [
                *(*RELOD, "robot", "--robot", where["port"], "--camera", where["camera_url"]),
                *("--seed", str(number), "--set", f"run.folder={folder}", "--set", "safety.max_restarts=0"),
                *("--set", "run.metrics_every_s=0.25"),
            ],
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline_ns = monotonic_ns() + int(START_LIMIT_S * 1e9)
            while steps_of(folder) < 5:
                if monotonic_ns() > deadline_ns or run.poll() is not None:
                    raise SystemExit(f"the run of death {number} did not start")
                sleep_s(0.1)
            sleep_s(rng.uniform(0.0, 4.0))
            pids = children(run.pid)
            killed_ns = monotonic_ns()
            for name in names:
                os.kill(run.pid if name == "parent" else pids[f"relod-{name}"], what)
            sleep_s(SETTLE_S)
            run.wait(30)
        finally:
            run.kill()
            robot.send_signal(signal.SIGINT)
            robot.wait(10)
        log = [WheelRecord(**json.loads(line)) for line in wheels.read_text().splitlines()]
    before = [record for record in log if record.t_ns <= killed_ns]
    moving = bool(before) and bool(before[-1].requested_left_mm_s or before[-1].requested_right_mm_s)
    return {
        "death": death,
        "told_ms": time_to_told_ms(log, killed_ns),
        "stopped_ms": time_to_stop_ms(log, killed_ns),
        "moving": moving,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deaths", type=int, default=30, help="of each kind")
    parser.add_argument("--world", default="nominal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(DEATHS), help="comma-separated")
    parser.add_argument("--out", type=Path, default=Path("out/stopping_runs.json"))
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    samples: list[dict[str, Any]] = []
    for number in range(arguments.deaths):
        for death in arguments.kinds.split(","):
            samples.append(one_death(death, arguments.world, rng, number))
            arguments.out.write_text(
                json.dumps({"benchmark": "stopping_runs", **describe(sys.argv), "samples": samples})
            )
    for death in arguments.kinds.split(","):
        found = [sample for sample in samples if sample["death"] == death]
        times = sorted(sample["stopped_ms"] for sample in found if sample["stopped_ms"] is not None)
        told = sorted(sample["told_ms"] for sample in found if sample["told_ms"] is not None)
        never = len(found) - len(times)
        print(
            f"{death}: {len(found)} ({sum(sample['moving'] for sample in found)} while moving), "
            f"told p50 {told[len(told) // 2]:.1f} max {told[-1]:.1f} ms, "
            f"stopped p50 {times[len(times) // 2]:.0f} max {times[-1]:.0f} ms, never {never}"
        )


if __name__ == "__main__":
    main()
