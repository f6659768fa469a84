"""`relod bench latency` over a stand-in for the relod command: what it starts, reads, shows, and leaves behind."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading

import numpy as np
import pytest
from rich.console import Console

from relod import cli
from relod.bench import children, latency
from relod.bench.latency import LatencyRequest, run_latency
from relod.bench.latencyrow import FIGURES, ModeRow
from relod.bench.latencyview import HEAD, BenchView, format_row, format_table
from relod.bench.stagetable import COLUMNS
from relod.errors import EXIT_OK, EXIT_SETTINGS, EXIT_SIGTERM, EXIT_START, SettingsError, StartError
from relod.runtime.rundir import _spans_header
from relod.runtime.timing import STAGES

OTHER_KEYS = {
    *("exit_code", "error", "measured_s", "measured_from", "cycle_ms", "cycle_left", "stages", "samples_ms"),
    *("policy_lag", "agreement_ms", "link"),
}
MODES = ("local-only", "remote-local", "remote-only")

# Writes its arguments to CALLS; a robot writes metrics and spans until SIGINT, a learner spans of updates. FAULTS names
# what goes wrong: "robot:MODE" or "learner" fails at once, "stubborn" ignores SIGINT, "idle" makes no update. Its own
# numpy is not to be had under `-S`, so that spans are packed by hand.
STAND_IN = """
import json, os, signal, struct, sys, time
from pathlib import Path

def span(stage, index, start_ns, end_ns):
    with open(folder / "spans.bin", "ab") as file:
        file.write(struct.pack("<QQQQqq", 0, 0, stage, index, start_ns, end_ns))

arguments, faults = sys.argv[1:], os.environ.get("FAULTS", "").split()
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps({"pid": os.getpid(), "arguments": arguments}) + "\\n")
settings = dict(each.split("=", 1) for each in arguments if "=" in each)
mode = arguments[arguments.index("--mode") + 1] if "--mode" in arguments else ""
if arguments[0] in faults or f"robot:{mode}" in faults:
    print(f"relod: no luck with {arguments[0]} {mode}; try again", file=sys.stderr)
    sys.exit(3)
ended = []
signal.signal(signal.SIGINT, lambda *_: None if "stubborn" in faults else ended.append(1))
folder = Path(settings["run.folder"]) / "latest"
folder.mkdir(parents=True)
(folder / "spans.json").write_text(os.environ["HEADER"])
WAY = {"p50": 1.0, "p99": 2.0, "max": 3.0}
began_ns, ms = time.monotonic_ns(), 1_000_000
if arguments[0] == "robot":
    number = 0
    with open(folder / "metrics.jsonl", "w") as metrics:
        while not ended:
            line = {"steps": 10 * number, "wall_s": 0.5 * number, "overruns": 1}
            line["updates"] = 0 if "idle" in faults else max(0, number - 4)
            line |= {"act_ms": {"p50": 2.0, "p99": 7.0, "max": 9.0}}
            if mode != "local-only":
                line |= {"link.rtt_ms.p50": 0.3, "link.rtt_ms.p99": 0.9, "link.rtt_ms.max": 1.5}
                line |= {"link.uplink_bytes": 1000 * number, "link.downlink_bytes": 0}
            deadline_ns = began_ns + 20 * number * ms
            span(1, number, deadline_ns, deadline_ns + ms // 2)  # LATENESS
            span(5, number, deadline_ns - 4 * ms, deadline_ns)  # SENSOR_AGE
            span(4, number, deadline_ns, deadline_ns + 4 * ms)  # ACT
            span(22, 1, began_ns, deadline_ns + 4 * ms)  # POLICY_AGE
            if mode == "local-only":
                span(8, number, deadline_ns, deadline_ns + 7 * ms)  # UPDATE
            metrics.write(json.dumps({"wall_s": 0.0, "steps": number, "hold": ""}) + "\\n" + json.dumps(line) + "\\n")
            metrics.flush()
            number += 1
            time.sleep(0.02)
    summary = {"steps": 7, "overruns": 2, "late_actions": 3, "rtt_ms": {"p50": 0.0, "max": 0.0}}
    summary["relay"] = None if mode == "local-only" else dict.fromkeys(("up", "down"), {"one_way_ms": WAY})
    print(json.dumps(summary | {"clock_offset_ms": 0.5, "clock_uncertainty_ms": 1.25}))
number = 0
while not ended:
    number += 1
    span(8, number, began_ns + 20 * number * ms, began_ns + (20 * number + 9) * ms)
    time.sleep(0.02)
sys.exit(130)
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Runs the stand-in instead of relod; gives what was called so far."""
    script, path = tmp_path / "stand_in.py", tmp_path / "calls"
    script.write_text(STAND_IN)
    monkeypatch.setattr(children, "RELOD", (sys.executable, "-I", "-S", str(script)))
    monkeypatch.setattr(latency, "POLL_S", 0.01)
    monkeypatch.setattr(children, "END_LIMIT_S", 5.0)
    monkeypatch.setenv("CALLS", str(path))
    monkeypatch.setenv("HEADER", json.dumps(_spans_header()))

    def read() -> list[dict]:
        return [json.loads(line) for line in path.read_text().splitlines()]

    yield read
    for call in read() if path.exists() else []:
        with pytest.raises(ProcessLookupError):
            os.kill(call["pid"], 0)


# -- runs --------------------------------------------------------------------------------------------------------------


def test_every_mode_is_run_and_its_figures_are_told(calls, tmp_path):
    token = tmp_path / "token"
    request = LatencyRequest(
        link="wifi-good",
        seconds=0.3,
        seed=5,
        token_file=token,
        assignments=("agent.batch_size=8", "task.target_fraction=0.2", "replay.capacity=900"),
    )
    document, code = run_latency(request)
    assert code == EXIT_OK
    assert tuple(document["modes"]) == MODES
    for mode, row in document["modes"].items():
        assert row.keys() == {*FIGURES, *OTHER_KEYS}, mode
        assert (row["steps"], row["overruns"], row["late_actions"]) == (7, 2, 3)  # the document's, not the lines'
        assert row["act_ms"]["p99"] == 7.0
        assert row["updates_per_s"] == pytest.approx(2.0)  # one update in each line from the fourth on, 0.5 s apart
        assert row["uplink_bytes_per_s"] == (None if mode == "local-only" else pytest.approx(2000.0))
        assert row["downlink_bytes_per_s"] is None
        assert row["rtt_ms"] is None  # percentiles of nothing
        assert set(row["cpu_cores"]) == {"robot"} | ({"learner"} if mode != "local-only" else set())
        assert (row["exit_code"], row["error"]) == (0, "")
        assert row["measured_from"] == "first update"
        assert row["cycle_ms"] == 20.0
        assert row["cycle_left"] == 0.8
        assert row["stages"].keys() == {info.name for info in STAGES}
        assert row["stages"]["deadline_to_wire"] == dict.fromkeys(("p50", "p90", "p99", "p999", "max"), 4.0)
        assert row["stages"]["update"]["p50"] == (7.0 if mode == "local-only" else 9.0)  # the learner's own run says it
        assert row["stages"]["uplink"] is None
        assert set(row["samples_ms"]["lateness"]) == {0.5}
        assert len(row["samples_ms"]["lateness"]) <= 30  # of what was measured, some 15; none of before
        assert row["policy_lag"]["max"] > 3
        assert row["agreement_ms"] is None
        assert (row["link"] is None) == (mode == "local-only")
        assert (row["clock_offset_ms"], row["clock_uncertainty_ms"]) == (0.5, 1.25)
    assert document["advice"].startswith("No mode kept all deadlines")

    told = [" ".join(call["arguments"]) for call in calls()]
    robots = [each for each in told if each.startswith("robot")]
    learners = [each for each in told if each.startswith("learner")]
    assert len(robots) == 3
    assert len(learners) == 2
    for each in told:
        assert "--seed 5" in each
        assert "replay.capacity=900" in each
    local, *remote = robots
    assert "agent.batch_size=8" in local
    assert "task.target_fraction=0.2" in local
    assert "wifi-good" not in local
    assert str(token) not in local
    for robot in robots:
        assert "task.image_height=120" in robot  # or local-only would have those of its preset
    for robot in remote:
        assert "--link wifi-good" in robot
        assert "task.target_fraction=0.2" in robot
        assert "agent." not in robot
    for each in learners:
        assert "agent.batch_size=8" in each
        assert "task." not in each
    for each in (*remote, *learners):
        assert f"--token-file {token}" in each


def test_a_learner_that_runs_already_is_used(calls):
    run_latency(LatencyRequest(modes=("remote-only",), seconds=0.1, learner="ws://10.0.0.9:8765"))
    (robot,) = calls()
    assert "ws://10.0.0.9:8765" in robot["arguments"]


def test_robot_and_camera_are_handed_on(calls):
    run_latency(LatencyRequest(modes=("local-only",), seconds=0.1, robot="/dev/ttyUSB0", camera="0", allow_mixed=True))
    (robot,) = calls()
    assert "--robot /dev/ttyUSB0 --camera 0 --allow-mixed" in " ".join(robot["arguments"])


def test_without_an_update_it_counts_from_the_first_step(calls, monkeypatch):
    monkeypatch.setenv("FAULTS", "idle")
    monkeypatch.setattr(latency, "UPDATE_LIMIT_S", 0.2)
    document, _ = run_latency(LatencyRequest(modes=("local-only",), seconds=0.2))
    row = document["modes"]["local-only"]
    assert row["measured_from"] == "first step"
    assert row["updates_per_s"] is None
    assert row["stages"]["lateness"]["p50"] == 0.5


def test_what_was_found_is_written(calls, tmp_path, capsys):
    out, plot = tmp_path / "found.json", tmp_path / "found.svg"
    request = LatencyRequest(modes=MODES[:2], link="wifi-busy", seconds=0.3, out=out, plot=plot)
    document, _ = run_latency(request)
    assert json.loads(out.read_text()) == json.loads(json.dumps(document))
    picture = plot.read_text()
    assert all(text in picture for text in (*MODES[:2], "wifi-busy", document["cpu"], "one cycle", "ms"))
    told = capsys.readouterr().err
    assert "deadline &gt; command" in picture
    assert "deadline > wire" in told
    assert document["advice"].split()[:4] == told.split()[-len(document["advice"].split()) :][:4]
    assert max(len(line) for line in told.splitlines()) <= COLUMNS


def test_a_mode_that_fails_leaves_the_others_alone(calls, monkeypatch, capsys):
    monkeypatch.setenv("FAULTS", "robot:local-only")
    document, code = run_latency(LatencyRequest(modes=MODES[:2], seconds=0.1))
    assert code == EXIT_OK
    failed, other = document["modes"].values()
    assert failed["error"] == "no luck with robot local-only; try again"
    assert failed["exit_code"] == 3
    assert failed["act_ms"] is None
    assert other["error"] == ""
    assert "relod: local-only: no luck with robot local-only; try again" in capsys.readouterr().err


def test_the_first_failure_counts_when_all_fail(calls, monkeypatch):
    monkeypatch.setenv("FAULTS", "learner")
    document, code = run_latency(LatencyRequest(modes=MODES[1:], seconds=5))
    assert code == EXIT_START
    assert {row["error"] for row in document["modes"].values()} == {"no luck with learner ; try again"}


def test_what_does_not_end_is_killed(calls, monkeypatch):
    monkeypatch.setattr(children, "END_LIMIT_S", 0.1)
    monkeypatch.setenv("FAULTS", "stubborn")
    document, _ = run_latency(LatencyRequest(modes=("remote-only",), seconds=0.1))
    assert "did not end within 0.1 s of Ctrl-C" in document["modes"]["remote-only"]["error"]
    assert len(calls()) == 2  # and neither is left, as the fixture checks


def test_a_run_without_steps_is_given_up(calls, monkeypatch):
    monkeypatch.setattr(latency, "START_LIMIT_S", 0.0)
    document, _ = run_latency(LatencyRequest(modes=("local-only",), seconds=1))
    assert document["modes"]["local-only"]["error"] == "no step in 0 s: relod robot said nothing"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_nothing_behind(calls, number):
    before = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), number))
    timer.start()
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)) as raised:
            run_latency(LatencyRequest(modes=("remote-local",), seconds=60))
    finally:
        timer.cancel()
    if number == signal.SIGTERM:
        assert raised.value.code == EXIT_SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seconds", "0"], "--seconds 0;"),
        (["--seconds", "nan"], "--seconds nan;"),
        (["--modes", "local"], "unknown mode 'local'; did you mean local-only?"),
        (["--modes", "local-only,local-only"], "name each once"),
        (["--link", "wifi"], "no link profile 'wifi'"),
        (["--seconds", "inf"], "--seconds inf;"),
        (["--plot", "picture.gif"], "'.gif'; known: .png, .svg"),
        (["--plot", "/no/such/folder/picture.svg"], "--plot /no/such/folder/picture.svg: No such file"),
        (["--out", "/"], "--out /: Is a directory"),
        (["--task", "creat"], "unknown task 'creat'; did you mean create?"),
    ],
)
def test_a_mistake_is_told_in_a_line(arguments, said, capsys):
    assert cli.run(["bench", "latency", *arguments]) == EXIT_SETTINGS
    told = capsys.readouterr()
    assert said in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""


def test_no_mode_is_a_mistake():
    with pytest.raises(SettingsError):
        LatencyRequest(modes=())


def test_a_picture_needs_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StartError, match="matplotlib is not installed; pip install"):
        LatencyRequest(plot=tmp_path / "picture.svg")
    assert not (tmp_path / "picture.svg").exists()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_real_run(tmp_path, capfd):
    argv = ["bench", "latency", "--task", "track", "--modes", "remote-only", "--seconds", "2", "--json"]
    argv += ["--link", "ethernet"]
    assert cli.run(argv) == EXIT_OK
    out, err = capfd.readouterr()
    row = json.loads(out)["modes"]["remote-only"]
    assert row["error"] == ""
    assert row["steps"] > 10
    assert row["uplink_bytes_per_s"] > 1000
    assert 0 < row["rtt_ms"]["p50"] <= row["rtt_ms"]["max"]
    assert {"robot", "control", "device", "learner", "worker"} <= row["cpu_cores"].keys()
    assert row["cycle_ms"] == pytest.approx(40.0, abs=0.5)
    for name in ("uplink", "inference", "downlink", "observed_to_wire", "sensor_to_motion", "step_to_memory"):
        assert row["stages"][name]["p50"] > 0, name
    assert row["link"]["profile"] == "ethernet"
    assert row["link"]["up"]["bytes"] > 1000
    assert row["agreement_ms"]["p50"] < 100
    assert "remote-only" in err


# -- what is shown -----------------------------------------------------------------------------------------------------


def full_row() -> ModeRow:
    row = ModeRow(mode="remote-local", measured_s=119.6)
    row.figures |= {
        "rtt_ms": {"p50": 123.4, "p99": 2345.6},
        "act_ms": {"p50": 2.345, "p99": 14.26},
        "cycle_lateness_ms": {"p50": 0.125, "p99": 1234.5},
        "overruns": 12345,
        "late_actions": 1234,
        "policy_age_ms": {"p50": 123456.0},
        "updates_per_s": 1234.5,
    }
    return row


def test_a_row_stands_under_its_head():
    line = format_row(full_row())
    assert line.split()[:5] == ["remote-local", "120", "123/2346", "2.35/14.3", "0.12/1234"]
    assert line.split()[5:] == ["12345", "1234", "123", "1234"]
    assert len(line) == len(HEAD[0]) == len(HEAD[1]) < 80


@pytest.mark.parametrize(("phase", "error", "shown"), [("starting", "", "starting"), ("starting", "x" * 200, "x" * 66)])
def test_a_row_without_figures(phase, error, shown):
    assert format_row(ModeRow(mode="local-only", phase=phase, error=error)) == f"local-only   {shown}"


def tall_row(mode: str) -> ModeRow:
    row = full_row()
    row.mode = mode
    row.samples = {info.name: np.array([0.3, 123456.0]) for info in STAGES} | {"agreement": np.array([0.2])}
    row.policy_lag, row.cycle_ms = np.array([3.0, 7.0]), 45.0
    row.link = {way: {"one_way_ms": {"p50": 1.5, "p99": 60.25, "max": 99.0}} for way in ("up", "down")}
    row.figures |= {
        "overruns_not_shared": 1234,
        "uplink_bytes_per_s": 1234567.0,
        "downlink_bytes_per_s": 1234.0,
        "cpu_cores": {"robot": 0.125, "worker": 0.97},
        "clock_offset_ms": -123456.7,
        "clock_uncertainty_ms": 1.25,
    }
    return row


def test_the_table_shows_all_modes_in_80_columns():
    text = format_table([tall_row("remote-local"), tall_row("remote-only"), ModeRow(mode="local-only")], "a" * 200)
    lines = text.splitlines()
    assert max(map(len, lines)) <= COLUMNS
    told = {line[:22].strip(): line[22:].split() for line in lines[3:]}
    assert told["overruns (not shared)"][:2] == ["12345", "(1234)"]
    assert told["policy's lag, updates"] == ["3/7"] * 2
    assert told["link emulated up, ms"] == ["1.50/60.2"] * 2
    assert told["learner's clock, ms"] == ["-1.23e+05±1.2"] * 2
    assert told["stamps disagree, ms"] == ["0.20/0.20"] * 2
    assert told["cores"] == ["1.09"] * 2
    assert [line.split()[0] for line in lines[-3:]] == ["cores", "worker", "robot"]  # who uses most comes first


@pytest.mark.parametrize("terminal", [True, False])
def test_the_view_fits_into_80_columns(terminal):
    out = io.StringIO()
    rows = [tall_row("remote-local"), ModeRow(mode="remote-only", phase="starting")]
    console = Console(file=out, force_terminal=terminal, width=80, height=24, color_system=None)
    with BenchView(rows, "create", console) as view:
        view.show(rows[0], 1)
        view.show(rows[0], 2)
        view.done(rows[0])
    view.say("advice " * 40)
    text = out.getvalue()
    drawn = text.count("deadline > wire")
    assert drawn == (4 if terminal else 1)  # a start and a stop draw too; of two looks at once, one is shown
    assert len([line for line in text.splitlines() if line.startswith("remote-local ")]) == (0 if terminal else 2)
    assert max(len(line.rpartition("\x1b[2K")[2]) for line in text.splitlines()) <= 80
    assert ("starting" in text) is True
    first, *_ = text.split("\x1b[1A") if terminal else [""]
    assert first.count("\n") <= 24  # what does not fit waits for the end
