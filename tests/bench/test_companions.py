"""The companions of `relod bench latency`: their parts, and each for real in its shortest form."""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading

import numpy as np
import pytest

from relod.bench import children
from relod.bench.children import run_relod
from relod.bench.control import late_ms, ratio_to_sentinel
from relod.bench.linkecho import Hall, create_spec
from relod.bench.transport import experience_bytes, new_frames
from relod.errors import EXIT_OK, StartError
from relod.runtime.spans import SPAN, Stage
from relod.runtime.timing import Spans
from tests.commands import relod

PERCENTILES = ["p50", "p90", "p99", "p999", "max"]


# -- parts -------------------------------------------------------------------------------------------------------------


def test_new_frames_come_as_a_camera_brings_them():
    frames = [each for each, _ in zip(new_frames(), range(100), strict=False)]
    assert set(frames) == {1, 2}
    assert sum(frames) == 135


def test_the_transports_learner_lets_robots_in():
    join = type("Join", (), {"robot": "a", "run": "0" * 32, "acts": "learner", "task": create_spec(), "codec": "raw"})
    assert Hall().admit(join).welcome.policy_size == 1


def test_each_frame_is_sent_once_so_experience_takes_less_than_whole_stacks():
    told = experience_bytes()
    assert 57_600 < told["frame_bytes"] < 57_700
    assert 2.0 < told["whole_stacks_bytes_per_s"] / told["relod_bytes_per_s"] < 2.5


def spans_of(each: list[tuple[int, int]]) -> Spans:
    """The same times for every stage that is looked at."""
    stages = (Stage.LATENESS, Stage.SENTINEL, Stage.ACT)
    rows = np.zeros(len(stages) * len(each), SPAN)
    for row, (stage, (start_ns, end_ns)) in zip(rows, itertools.product(stages, each), strict=True):
        row["stage"], row["start_ns"], row["end_ns"] = stage, start_ns, end_ns
    return Spans(rows)


def test_lateness_counts_from_the_first_update_on():
    each = [(n * 1000, n * 1000 + n * 1_000_000) for n in range(20)]
    found = late_ms(spans_of(each), from_ns=5_000)
    assert found["loop"] == found["act"] == found["sentinel"] == [float(n) for n in range(5, 20)]
    with pytest.raises(StartError, match="only 1 samples of sentinel after the first update; "):
        late_ms(spans_of(each), from_ns=19_000)


def test_a_loop_is_compared_with_the_sentinel_of_the_same_moments():
    sentinel = [1.0] * 100 + [10.0] * 100  # the machine was slow in the second half
    loop = [2.0] * 20 + [20.0] * 20
    found = ratio_to_sentinel(loop, sentinel, "sentinel-load")
    assert found == {"to": "sentinel-load", "median": 2.0, "p10": 2.0, "p90": 2.0, "p99": 2.0}


# -- children ----------------------------------------------------------------------------------------------------------

CHILD = """
import json, os, signal, sys, time
print("relod: starting", file=sys.stderr, flush=True)
if sys.argv[1] == "fail":
    print("relod: no luck", file=sys.stderr)
    sys.exit(3)
if sys.argv[1] == "wait":
    open(sys.argv[2], "w").write(str(os.getpid()))
    if sys.argv[3:]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(60)
print(json.dumps({"a": 1}))
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    monkeypatch.setattr(children, "RELOD", (sys.executable, "-I", "-S", str(script)))
    monkeypatch.setattr(children, "END_LIMIT_S", 0.2)


def test_a_commands_document_and_complaint_are_told(child):
    good, bad = run_relod(["say"]), run_relod(["fail"])
    assert (good.good, good.document) == (True, {"a": 1})
    assert (bad.good, bad.exit_code, bad.document, bad.complaint) == (False, 3, None, "no luck")


@pytest.mark.parametrize("stubborn", [[], ["stubborn"]])
def test_a_command_ends_with_its_caller(child, tmp_path, stubborn):
    told = tmp_path / "pid"

    def interrupt() -> None:
        while not (told.exists() and told.read_text()):
            pass
        os.kill(os.getpid(), 2)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_relod(["wait", str(told), *stubborn])
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)


# -- for real ----------------------------------------------------------------------------------------------------------

SMALL = ("--set", "agent.batch_size=8", "--set", "agent.hidden=[16]")  # a first update, however busy the machine is
REAL = {
    "transport": (["--rounds", "2", "--exchanges", "10"], {"relod", "websockets", "tcp-blocking", "pickle-stacks"}),
    "replay": (["--rounds", "1", "--steps", "600"], {"queue", "memcpy", "shared-1-thread", "shared-2-threads", "add"}),
    "update": (["--rounds", "1", "--batch-size", "8", "--threads", "1"], {"relod-8", "straightforward-8", "sac-lite"}),
    "control": (
        ["--seconds", "5", "--task", "track", *SMALL],
        {"sentinel-idle", "loop-idle", "sentinel-load", "loop-load"},
    ),
    "link": (["--rounds", "1"], {"notice-reset", "reconnect-reset", "drain-silence", "greeting"}),
}
BASELINES = {"transport": "websockets", "replay": "shared-1-thread", "update": "relod-8", "link": "greeting"}


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", REAL)
def test_each_measures_something(name, tmp_path):
    options, series = REAL[name]
    out = tmp_path / "document.json"
    done = relod(tmp_path, "bench", name, *options, "--json", "--out", str(out), limit_s=170)
    assert done.returncode == EXIT_OK, done.stderr
    document = json.loads(done.stdout)
    assert json.loads(out.read_text()) == document
    assert document["benchmark"] == name
    assert series <= document["samples"].keys()
    for each in series:
        assert document["samples"][each]["values"], each
        assert list(document["percentiles"][each]) == PERCENTILES
    assert document["ratios"]
    if name in BASELINES:
        assert {found["to"] for found in document["ratios"].values()} == {BASELINES[name]}
    assert "Traceback" not in done.stderr
    assert f"{name}: " in done.stderr
    if name == "replay":
        assert document["bytes_per_step"] == pytest.approx(84_000, rel=0.01)
        assert document["add_steps_per_s"] > 0
    if name == "update":
        assert max(document["largest_relative_difference"]["cpu"].values()) < 1e-4
        assert document["policy"]["values"] == 1_158_820
    if name == "control":
        assert document["runs"]["idle"]["updates"] == 1 < document["runs"]["load"]["updates"]
    if name == "link":
        assert document["audit_exit_code"] == 0
        assert document["records"]["acked"] == document["records"]["sent"] > 0
