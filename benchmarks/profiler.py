"""What the profiler itself costs: spans stamped in each cycle times the cost of a stamp, as a share of the cycle.

    python benchmarks/profiler.py --out profiler.json

Spans are counted in real runs of the simulated robots, with the learner in the same place and in the remote one. The
cost of a stamp is the difference of two loops that take turns, one of which stamps; both readings of the clock count as
the profiler's, though the cycle needs some of them itself. Draining the ring and writing it to a file happens once a
second in another process than the cycle's; it is measured over as many spans as the runs made in a second.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from relod.bench.commands import Command, free_port
from relod.runtime.clock import NS_PER_MS, NS_PER_S, monotonic_ns
from relod.runtime.profile import Profile
from relod.runtime.provenance import describe
from relod.runtime.session import new_spans
from relod.runtime.spans import SpanWriter, Stage
from relod.runtime.timing import Spans, percentiles

WANTED = 0.005  # of the cycle, at most
STAMPS = 500  # in a loop: some 1 ms, short enough that most loops are not interrupted
MODES = ("local-only", "remote-only")

# Between a cycle's deadline and its command on the wire; everything else is stamped by processes beside it.
ON_THE_WAY = {
    *(Stage.LATENESS, Stage.OBSERVE, Stage.DECIDE, Stage.SENSOR_AGE, Stage.FRAME_AGE, Stage.FRAME_ARRIVAL),
    *(Stage.INFERENCE, Stage.SWAP, Stage.ACT, Stage.WRITE, Stage.SEND, Stage.UPLINK, Stage.DECODE, Stage.QUEUE),
    *(Stage.DOWNLINK, Stage.ENCODE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="create,ur5")
    parser.add_argument("--steps", type=int, default=250, help="of each run")
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("out/profiler.json"))
    options = parser.parse_args()
    stamp_us = stamp_costs_us(options.rounds)
    runs = [count(task, mode, options.steps) for task in options.tasks.split(",") for mode in MODES]
    cost_us = float(np.median(stamp_us))
    for run in runs:
        run["share_of_cycle"] = round(run["spans_per_cycle"] * cost_us / 1000 / run["cycle_ms"], 6)
        drain_ms = drain_costs_ms(round(run["spans_per_s"]), options.rounds // 10)
        run["drain_ms"] = percentiles(drain_ms)
        run["share_of_core"] = round(run["spans_per_s"] * cost_us / 1e6 + float(np.median(drain_ms)) / 1000, 6)
    document = {
        "benchmark": "profiler",
        **describe(sys.argv),
        "stamp_us": percentiles(stamp_us),
        "wanted_share_of_cycle": WANTED,
        "runs": runs,
        "samples": {"stamp_us": [round(value, 4) for value in stamp_us]},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document) + "\n")
    print(f"a stamp: p50 {cost_us:.2f} us, p90 {np.percentile(stamp_us, 90):.2f} us")
    for run in runs:
        way = f"{run['spans_per_cycle']:.1f} spans on the way of a cycle of {run['cycle_ms']:g} ms"
        others = f"all processes' {run['spans_per_s']:.0f} spans/s and their draining"
        print(
            f"{run['task']}, {run['mode']}: {way}: {100 * run['share_of_cycle']:.3f} % of it;"
            f" {others}: {100 * run['share_of_core']:.2f} % of a core"
        )


def stamp_costs_us(rounds: int) -> list[float]:
    """The cost of one stamp in each round, by loops that take turns."""
    writer = new_spans().writer("control")
    loops = {True: stamp, False: leave}
    found = []
    for number in range(rounds):
        took = {which: loops[which](writer) for which in ((True, False) if number % 2 else (False, True))}
        found.append((took[True] - took[False]) / STAMPS / 1000)
    return found


def stamp(writer: SpanWriter) -> int:
    began_ns = monotonic_ns()
    for index in range(STAMPS):
        writer.add(Stage.DECIDE, index, monotonic_ns(), monotonic_ns())
    return monotonic_ns() - began_ns


def leave(writer: SpanWriter) -> int:
    began_ns = monotonic_ns()
    for _ in range(STAMPS):
        pass
    return monotonic_ns() - began_ns


def drain_costs_ms(spans: int, rounds: int) -> list[float]:
    """Taking one second's spans out of the ring, into the percentiles, and into a file."""
    ring = new_spans()
    writers, found = [ring.writer(name) for name in ring.writers], []
    with tempfile.TemporaryFile() as file:
        profile = Profile(ring, 45 * NS_PER_MS, lambda _, rows: file.write(rows.tobytes()) and None)
        for _ in range(rounds):
            for number in range(spans):
                now_ns = monotonic_ns()
                writers[number % len(writers)].add(Stage.UPDATE, number, now_ns, now_ns)
            began_ns = monotonic_ns()
            profile.drain()
            found.append((monotonic_ns() - began_ns) / NS_PER_MS)
    return found


def count(task: str, mode: str, steps: int) -> dict[str, Any]:
    """Spans of a whole run, for each cycle and each second."""
    with tempfile.TemporaryDirectory(prefix="relod-bench-") as name:
        folder, learner = Path(name), None
        load = ("--set", "agent.init_steps=50")
        robot = ["robot", "--json", "--task", task, "--mode", mode, "--steps", str(steps)]
        robot += ["--set", f"run.folder={folder / 'robot'}"]
        if mode == "local-only":
            robot += load
        else:
            address = f"127.0.0.1:{free_port()}"
            robot += ["--learner", f"ws://{address}"]
            to_learn = ["learner", "--listen", address, "--set", f"run.folder={folder / 'learner'}", *load]
            learner = Command(to_learn, folder / "learner")
        try:
            command = Command(robot, folder / "robot")
            try:
                code = command.process.wait()
            finally:
                command.close()
        finally:
            if learner is not None:
                learner.close()
        if code != 0:
            sys.exit(f"relod robot ended with {code}: {command.complaint()}")
        spans = Spans.read(folder / "robot" / "latest")
    counts = Counter({stage: len(spans.of(stage)) for stage in Stage})
    deadlines_ns = spans.of(Stage.LATENESS)["start_ns"]
    cycles, seconds = len(deadlines_ns), float(deadlines_ns[-1] - deadlines_ns[0]) / NS_PER_S
    return {
        "task": task,
        "mode": mode,
        "cycle_ms": round(float(np.median(np.diff(deadlines_ns))) / NS_PER_MS, 2),
        "cycles": cycles,
        "spans_per_cycle": round(sum(counts[stage] for stage in ON_THE_WAY) / cycles, 2),
        "spans_per_s": round(counts.total() / seconds, 1),
        "spans": {stage.name.lower(): number for stage, number in counts.items() if number},
    }


if __name__ == "__main__":
    main()
