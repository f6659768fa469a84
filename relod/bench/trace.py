"""Spans as a trace that chrome://tracing and ui.perfetto.dev open: a row for each process, a slice for each span.

The format is the JSON array of "complete" events of Google's Trace Event Format: `ts` and `dur` in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import SettingsError
from ..runtime.spans import Stage
from ..runtime.timing import Spans
from .report import RunTiming

__all__ = ["trace_events", "write_trace"]

# Who stamps a stage, and in which of its rows it is shown: slices of one row may lie within each other, not across.
ROWS: dict[Stage, tuple[str, str]] = {
    Stage.LATENESS: ("control", "cycle"),
    Stage.OBSERVE: ("control", "cycle"),
    Stage.DECIDE: ("control", "cycle"),
    Stage.INFERENCE: ("control", "inference"),
    Stage.SWAP: ("control", "policy"),
    Stage.SENSOR_AGE: ("control", "newest packet"),
    Stage.FRAME_AGE: ("control", "newest frame"),
    Stage.FRAME_ARRIVAL: ("camera", "frames"),
    Stage.ACT: ("device", "deadline to wire"),
    Stage.WRITE: ("device", "write"),
    Stage.SENTINEL: ("sentinel", "lateness"),
    Stage.SENSED: ("robot", "packets"),
    Stage.MOVED: ("robot", "commands"),
    Stage.ENCODE: ("parent", "encode"),
    Stage.POLICY_AGE: ("parent", "policy in use"),
    Stage.SEND: ("link", "questions"),
    Stage.UPLINK: ("link", "questions"),
    Stage.DOWNLINK: ("link", "questions"),
    Stage.DECODE: ("learner", "questions"),
    Stage.QUEUE: ("learner", "questions"),
    Stage.DELIVER: ("link", "records"),
    Stage.STORED: ("learner", "steps"),
    Stage.UPDATE: ("worker", "updates"),
}
REMOTE_INFERENCE = ("learner", "questions")
PROCESSES = tuple(dict.fromkeys(process for process, _ in ROWS.values()))
PLACES = tuple(dict.fromkeys(ROWS.values()))


def trace_events(robot: Spans, learner: Spans | None = None, *, offset_ns: int = 0) -> Iterator[dict[str, Any]]:
    """Events of all spans, times from the first one on.

    Args:
        learner: spans of the learner's run, in its own clock.
        offset_ns: that clock minus the robot's.
    """
    for pid, process in enumerate(PROCESSES):
        yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": process}}
        yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
    for process, row in PLACES:
        yield {"ph": "M", "name": "thread_name", **_ids((process, row)), "args": {"name": row}}
    sources = [(robot, 0)] if learner is None else [(robot, 0), (learner, offset_ns)]
    first_ns = min((spans.first_ns - shift for spans, shift in sources if spans), default=0)
    asked = set(robot.of(Stage.UPLINK)["index"].tolist())  # questions that the learner answered
    for spans, shift in sources:
        for stage in Stage:
            for index, start_ns, end_ns in spans.of(stage)[["index", "start_ns", "end_ns"]].tolist():
                elsewhere = stage is Stage.INFERENCE and index in asked
                yield {
                    "ph": "X",
                    "name": stage.name.lower(),
                    **_ids(REMOTE_INFERENCE if elsewhere else ROWS[stage]),
                    "ts": (start_ns - shift - first_ns) / 1e3,
                    "dur": max(0, end_ns - start_ns) / 1e3,
                    "args": {"index": index},
                }


def _ids(place: tuple[str, str]) -> dict[str, int]:
    return {"pid": PROCESSES.index(place[0]), "tid": PLACES.index(place)}


def write_trace(run: RunTiming, path: Path) -> int:
    """Write a run's trace; returns the number of spans. `SettingsError` when the file cannot be written."""
    events = list(trace_events(run.robot, run.learner, offset_ns=run.offset_ns))
    try:
        with path.open("w") as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
            file.write(",\n".join(map(json.dumps, events)))
            file.write("\n]}\n")
    except OSError as error:
        raise SettingsError(f"--trace {path} cannot be written: {error.strerror}", "give another file") from error
    return sum(event["ph"] == "X" for event in events)
