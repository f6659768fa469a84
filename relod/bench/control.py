"""`relod bench control`: how late the control loop is on this machine, with nothing to do and under full load.

Two runs of `relod robot`, as its user starts it, simulated robot included: in the first the update worker makes one
update and then rests, in the second it updates back to back without a cap. From the end of the first update on the
policy acts in both. The sentinel, a process that does nothing but tick, runs beside either: its lateness is the
machine's own. Raw samples come from the spans that every run keeps.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import StartError, error_with_code
from ..robots import registry
from ..runtime.spans import Stage
from ..runtime.timing import Spans
from .children import run_relod
from .form import Findings, Series, number, percentiles, positive, ratio

__all__ = ["SECONDS", "SHORT_SECONDS", "ControlRequest", "measure_control"]

SECONDS, SHORT_SECONDS = 120.0, 10.0
# A run of seconds has no time for random actions. The policy comes with the first update.
ALWAYS = ("agent.init_steps=20",)
LOADS: dict[str, tuple[str, ...]] = {
    "idle": ("learner.max_updates_per_s=0.0001",),
    "load": ("agent.max_updates_per_step=1000",),
}
STAGES = {"sentinel": Stage.SENTINEL, "loop": Stage.LATENESS, "act": Stage.ACT}  # of a series
LONGER = "the worker gets what time other programs leave: measure for longer with --seconds, or when less is going on"
SLICES = 10  # of a run, for the spread of its ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlRequest:
    """What to measure: so many seconds of experience in either run; starting, resets and ending come on top."""

    seconds: float = SECONDS
    task: str = "create"
    seed: int = 0
    assignments: tuple[str, ...] = ()  # settings of both runs

    def __post_init__(self) -> None:
        registry.task(self.task)
        positive("--seconds", self.seconds)


def measure_control(request: ControlRequest) -> Findings:
    """Lateness of the loop and of the sentinel, and the time from deadline to wire, idle and under load."""
    samples: dict[str, Series] = {}
    ratios: dict[str, dict[str, Any]] = {}
    runs: dict[str, dict[str, Any]] = {}
    for load in LOADS:
        print(f"relod: control, {load}: {request.seconds:g} s of experience", file=sys.stderr)
        runs[load], spans = _run(request, load)
        found = late_ms(spans, int(spans.of(Stage.UPDATE)["end_ns"][0]))
        samples |= {f"{name}-{load}": Series(values=values) for name, values in found.items()}
        ratios[f"loop-{load}"] = ratio_to_sentinel(found["loop"], found["sentinel"], f"sentinel-{load}")
    return Findings(
        benchmark="control",
        parameters={"seconds": request.seconds, "task": request.task, "seed": request.seed}
        | ({"set": list(request.assignments)} if request.assignments else {}),
        samples=samples,
        ratios=ratios,
        facts={"runs": runs},
        notes=[_note(load, runs[load], ratios[f"loop-{load}"]) for load in LOADS],
    )


def _run(request: ControlRequest, load: str) -> tuple[dict[str, Any], Spans]:
    """What a run printed, and its spans by stage."""
    with tempfile.TemporaryDirectory(prefix="relod-bench-") as folder:
        settings = (*ALWAYS, *LOADS[load], *request.assignments, f"run.folder={folder}")
        options = [word for each in settings for word in ("--set", each)]
        size = ("--seed", str(request.seed), "--minutes", f"{request.seconds / 60:.6f}")
        ended = run_relod(["robot", "--json", "--task", request.task, *size, *options])
        if ended.document is None or not ended.good:
            raise error_with_code(ended.exit_code, f"the run with the loop {load} failed: {ended.complaint}")
        told = ended.document
        spans = Spans.read(Path(told["run_dir"]))
    if not len(spans.of(Stage.UPDATE)):
        raise StartError(f"no update in {request.seconds:g} s", LONGER)
    told["updates_per_s"] = round(told["updates"] / told["wall_s"], 2)
    kept = ("updates", "updates_per_s", "cycles", "overruns", "overruns_not_shared", "late_actions", "steps", "wall_s")
    figures = [name for name in told if name.endswith("_ms")]
    return {name: told[name] for name in (*kept, "cpu_cores", "algorithm", "preset", *figures)}, spans


def late_ms(spans: Spans, from_ns: int) -> dict[str, list[float]]:
    """Milliseconds of every span from `from_ns` on, by series."""
    found = {}
    for name, stage in STAGES.items():
        found[name] = spans.after(from_ns).durations_ms(stage).tolist()
        if len(found[name]) < SLICES:
            raise StartError(f"only {len(found[name])} samples of {name} after the first update", LONGER)
    return found


def ratio_to_sentinel(loop: list[float], sentinel: list[float], name: str) -> dict[str, Any]:
    """Medians of slices of the run over the sentinel's in the same slice, and the 99th percentiles of all of it."""
    medians = [[float(np.median(each)) for each in np.array_split(values, SLICES)] for values in (loop, sentinel)]
    p99 = percentiles(loop)["p99"] / percentiles(sentinel)["p99"]
    return ratio(name, *medians) | {"p99": round(p99, 3)}


def _note(load: str, run: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    return (
        f"{load}: {run['overruns']} overruns in {run['cycles']:,} cycles, {number(run['updates_per_s'])} updates/s; "
        f"the loop's p99 is {number(found['p99'])} times the sentinel's"
    )
