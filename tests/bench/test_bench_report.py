"""`relod bench report` and its trace over run folders that were made up; `--profile` of a real run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from relod import cli
from relod.bench.report import RunTiming, compare_runs, format_runs
from relod.bench.trace import PLACES, ROWS, trace_events
from relod.errors import EXIT_SETTINGS, EXIT_START
from relod.runtime.clock import NS_PER_MS
from relod.runtime.rundir import _spans_header
from relod.runtime.spans import SPAN, Stage
from tests.commands import QUICK, relod


def make_run(folder, *spans, **run):
    """A run folder with spans (stage, index, start_ms, end_ms)."""
    rows = np.zeros(len(spans), SPAN)
    for row, (stage, index, start_ms, end_ms) in zip(rows, spans, strict=True):
        row["stage"], row["index"] = stage, index
        row["start_ns"], row["end_ns"] = int(start_ms * NS_PER_MS), int(end_ms * NS_PER_MS)
    folder.mkdir()
    (folder / "spans.json").write_text(json.dumps(_spans_header()))
    (folder / "spans.bin").write_bytes(rows.tobytes())
    (folder / "run.json").write_text(json.dumps({"task": "create", "mode": "local-only", "host": "here", **run}))
    return folder


CYCLE = (
    *((Stage.SENSOR_AGE, 1, 996, 1001), (Stage.FRAME_AGE, 1, 995, 1001), (Stage.SENTINEL, 9, 990, 991)),
    *((Stage.LATENESS, 1, 1000, 1001), (Stage.OBSERVE, 1, 1001, 1002), (Stage.ACT, 1, 1000, 1005)),
)


@pytest.fixture
def local(tmp_path):
    update = (Stage.UPDATE, 3, 1010, 1040)
    return make_run(tmp_path / "local", *CYCLE, update, summary={"overruns": 2, "updates": 3})


@pytest.fixture
def remote(tmp_path):
    """A run of a robot whose learner's clock is 5 s ahead."""
    learner = make_run(tmp_path / "learner", (Stage.UPDATE, 3, 6010, 6040), (Stage.STORED, 1, 6001, 6002))
    asked = ((Stage.UPLINK, 77, 1001, 1003), (Stage.INFERENCE, 77, 1003, 1004))
    summary = {"clock_offset_ms": 5000.0}
    return make_run(
        tmp_path / "remote", *CYCLE, *asked, mode="remote-only", learner_run_dir=str(learner), summary=summary
    )


def test_a_run_says_its_stages_and_counts(local):
    found = RunTiming.read(local).to_dict()
    assert found["stages"]["deadline_to_wire"]["p99"] == 5
    assert found["stages"]["uplink"] is None
    assert (found["overruns"], found["updates"], found["late_actions"]) == (2, 3, None)


def test_the_learners_run_is_read_where_it_is_on_this_host(remote):
    run = RunTiming.read(remote)
    assert run.offset_ns == 5000 * NS_PER_MS
    assert run.to_dict()["stages"]["step_to_learned"]["p50"] == 38
    (remote / "run.json").write_text(json.dumps(run.run | {"host": "elsewhere"}))
    assert RunTiming.read(remote).to_dict()["stages"]["update"] is None


def test_runs_stand_side_by_side_in_80_columns(local, remote):
    text = format_runs(compare_runs([local, remote, local, remote]))
    assert all(len(line) < 80 for line in text.splitlines())
    assert "1: create local-only, local" in text
    assert text.count("deadline > wire") == 2


@pytest.mark.parametrize("spoil", ["run.json", "spans.json", "empty"])
def test_what_is_no_run_in_real_time_is_named(local, spoil, capsys):
    if spoil == "empty":
        (local / "spans.bin").write_bytes(b"")
    else:
        (local / spoil).unlink()
    assert cli.run(["bench", "report", str(local)]) == EXIT_START
    assert capsys.readouterr().err.startswith(f"relod: {local}")


def test_the_trace_has_every_span_on_one_clock(remote):
    run = RunTiming.read(remote)
    events = list(trace_events(run.robot, run.learner, offset_ns=run.offset_ns))
    slices = {event["name"]: event for event in events if event["ph"] == "X"}
    assert slices["sentinel"] | {"pid": 0, "tid": 0} == {
        "ph": "X",
        "name": "sentinel",
        "pid": 0,
        "tid": 0,
        "ts": 0.0,
        "dur": 1000.0,
        "args": {"index": 9},
    }
    assert slices["update"]["ts"] == 20_000.0
    assert PLACES[slices["inference"]["tid"]][0] == "learner"
    assert set(ROWS) == set(Stage)


def test_the_trace_is_written_as_json(local, tmp_path, capsys):
    path = tmp_path / "trace.json"
    assert cli.run(["bench", "report", str(local), "--trace", str(path)]) == 0
    assert sum(event["ph"] == "X" for event in json.loads(path.read_text())["traceEvents"]) == 7
    assert cli.run(["bench", "report", str(local), "--trace", str(tmp_path / "no" / "trace.json")]) == EXIT_SETTINGS
    assert cli.run(["bench", "report", str(local), str(local), "--trace", str(path)]) == EXIT_SETTINGS
    assert "name one run" in capsys.readouterr().err


def test_virtual_time_has_no_latency(capsys):
    assert cli.run(["robot", "--profile", "--clock", "virtual"]) == EXIT_SETTINGS
    assert "virtual time has no latency" in capsys.readouterr().err


def test_a_profile_with_a_name_is_one_of_settings(capsys):
    assert cli.run(["robot", "--profile", "slow", "--steps", "1"]) == EXIT_SETTINGS
    assert "slow" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_says_at_its_end_where_the_time_went(tmp_path):
    done = relod(tmp_path, "robot", "--steps", "60", "--profile", "--json", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "SENSOR TRUE > MOVED" in done.stderr
    stages = json.loads(done.stdout)["timing"]["stages"]
    told = {name for name, values in stages.items() if values is not None}
    assert {"sensor_delay", "inference", "deadline_to_wire", "wire_delay", "sensor_to_motion", "update"} <= told
