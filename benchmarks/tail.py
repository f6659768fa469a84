"""The tail of the cycle's lateness with and without `--realtime`, the worker at full load in both.

Short whole runs of `relod robot`, alternately without and with it, so that both see the same machine; each has the
sentinel's lateness beside its own. `--busy N` adds N processes of normal priority that never sleep. `--ticker` compares
ways to schedule a bare ticker within one process instead: normal, with a timer slack of 1 ns, and SCHED_FIFO.
Writes JSON with raw samples.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from relod.runtime.clock import NS_PER_MS, NS_PER_S, monotonic_ns
from relod.runtime.provenance import describe
from relod.runtime.spans import Stage

PERCENTS = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9, "max": 100.0}
STAGES = {"lateness_ms": Stage.LATENESS, "act_ms": Stage.ACT, "sentinel_ms": Stage.SENTINEL}
# From the first minute on, and without a cap: the worker is never idle.
FULL_LOAD = ("--set", "agent.init_steps=200", "--set", "agent.max_updates_per_step=1000")

Samples = dict[str, list[float]]

TICK_NS = 5 * NS_PER_MS
WORK_NS = 300_000
TICKS = 400
PR_SET_TIMERSLACK = 29  # linux/prctl.h
USUAL_SLACK_NS = 50_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="of runs, or of rounds of the ticker")
    parser.add_argument("--steps", type=int, default=600, help="environment steps of each run")
    parser.add_argument("--busy", type=int, default=0, help="processes of normal priority that never sleep")
    parser.add_argument("--ticker", action="store_true", help="a bare ticker instead of whole runs")
    parser.add_argument("--out", type=Path, default=Path("out/tail.json"))
    arguments = parser.parse_args()
    with busy(arguments.busy):
        compare = tickers if arguments.ticker else whole_runs
        runs = compare(arguments.pairs, arguments.steps)
    summary = {way: summarise([run["samples"] for run in runs if run["way"] == way]) for way in way_names(runs)}
    result = {"benchmark": "tail", **describe(sys.argv), "load_average": os.getloadavg(), "summary": summary}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result | {"runs": runs}))
    print(json.dumps(result, indent=2))


def way_names(runs: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(run["way"] for run in runs))


def summarise(samples: list[Samples]) -> dict[str, Any]:
    """Percentiles of all runs together, and of the p99 of each, which says how far runs differ."""
    summary: dict[str, Any] = {}
    for name in samples[0]:
        values = np.concatenate([run[name] for run in samples])
        percentiles = {key: round(float(np.percentile(values, percent)), 3) for key, percent in PERCENTS.items()}
        each = [round(float(np.percentile(run[name], 99)), 3) for run in samples]
        summary[name] = {"count": len(values), **percentiles, "p99_of_each_run": each}
    return summary


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """That many processes that take all the time they get."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_spin, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def _spin() -> None:
    while True:
        pass


# -- whole runs --------------------------------------------------------------------------------------------------------


def whole_runs(pairs: int, steps: int) -> list[dict[str, Any]]:
    """Alternately, the first of a pair in turn."""
    ways = {"normal": "--no-realtime", "realtime": "--realtime"}
    runs = []
    for pair in range(pairs):
        for way in list(ways) if pair % 2 == 0 else reversed(ways):
            runs.append({"way": way, **one_run(steps, pair, ways[way])})
            p99 = {name: round(float(np.percentile(v, 99)), 3) for name, v in runs[-1]["samples"].items()}
            print(f"pair {pair + 1} of {pairs}, {way}: p99 {p99}", file=sys.stderr)
    return runs


def one_run(steps: int, seed: int, option: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "relod", "robot", "--json", option, "--seed", str(seed), "--steps", str(steps)),
            *(*FULL_LOAD, "--set", f"run.folder={folder}"),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        document = json.loads(done.stdout)
        run_dir = Path(document["run_dir"])
        header = json.loads((run_dir / "spans.json").read_text())
        spans = np.fromfile(run_dir / "spans.bin", np.dtype([tuple(entry) for entry in header["dtype"]]))
    kept = ("updates", "cycles", "overruns", "overruns_not_shared", "cpu_cores", "realtime", "wall_s")
    return {"samples": {name: milliseconds(spans, stage) for name, stage in STAGES.items()}} | {
        key: document[key] for key in kept
    }


def milliseconds(spans: Any, stage: Stage) -> list[float]:
    rows = spans[spans["stage"] == int(stage)]
    found: list[float] = np.round((rows["end_ns"] - rows["start_ns"]) / NS_PER_MS, 4).tolist()
    return found


# -- a bare ticker -----------------------------------------------------------------------------------------------------


def tickers(rounds: int, _: int) -> list[dict[str, Any]]:
    """Every way once a round, in this process; a tick works for 0.3 ms, as a cycle does."""
    runs = []
    for _round in range(rounds):
        for way, take in WAYS.items():
            take()
            runs.append({"way": way, "samples": {"lateness_ms": tick()}})
    WAYS["normal"]()
    return runs


def tick() -> list[float]:
    """Lateness of each tick in ms, on a timerfd as the cycle's deadlines are."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.timerfd_create(1, 0)  # CLOCK_MONOTONIC
    late = []
    deadline_ns = monotonic_ns() + TICK_NS
    for _ in range(TICKS):
        spec = struct.pack("@llll", 0, 0, deadline_ns // NS_PER_S, deadline_ns % NS_PER_S)
        libc.timerfd_settime(fd, 1, spec, None)
        os.read(fd, 8)
        late.append((monotonic_ns() - deadline_ns) / NS_PER_MS)
        until_ns = monotonic_ns() + WORK_NS
        while monotonic_ns() < until_ns:
            pass
        while deadline_ns < monotonic_ns():
            deadline_ns += TICK_NS
    os.close(fd)
    return late


def _normal() -> None:
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, USUAL_SLACK_NS)


def _no_slack() -> None:
    _normal()
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1)


def _fifo() -> None:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(44))


WAYS: dict[str, Callable[[], None]] = {"normal": _normal, "slack of 1 ns": _no_slack, "SCHED_FIFO": _fifo}


if __name__ == "__main__":
    main()
