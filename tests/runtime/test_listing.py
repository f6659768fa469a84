"""What is there: tasks, algorithms and runs, those that are broken among them."""

from __future__ import annotations

import json

import pytest

from relod.errors import StartError
from relod.robots import registry
from relod.runtime.listing import list_algorithms, list_runs, list_tasks
from relod.runtime.modes import resolve, run_robot
from relod.runtime.rundir import RunFolder
from tests.fakes import small_request


def test_tasks_and_algorithms_are_those_that_are_installed():
    tasks = {row["name"]: row for row in list_tasks()}
    assert {"create", "track", "ur5", "ur5-min-time"} <= tasks.keys()
    assert tasks["ur5"]["images"] == [3, 90, 160, 3]
    assert tasks["ur5"]["profiles"] == ["upstream"]
    assert tasks["create"]["cycle_ms"] == 45.0
    algorithms = {row["name"]: row for row in list_algorithms()}
    assert algorithms["sac"]["presets"] == ["sac", "sac-lite", "paper"]
    assert "ppo" in algorithms
    assert not any(row["error"] for row in (*tasks.values(), *algorithms.values()))


def test_one_that_is_broken_does_not_hide_the_others(monkeypatch):
    monkeypatch.setitem(registry.TASKS, "broken", "relod.robots.nothing:THERE")
    monkeypatch.setitem(registry.ALGORITHMS, "wrong", "relod.algos.sac:NOTHING")
    rows = {row["name"]: row for row in (*list_tasks(), *list_algorithms())}
    assert "relod.robots.nothing" in rows["broken"]["error"]
    assert "NOTHING" in rows["wrong"]["error"]
    assert not rows["create"]["error"]


def test_runs_and_their_states(tmp_path):
    assert run_robot(small_request(tmp_path)).exit_code == 0
    ended = (tmp_path / "latest").resolve()
    killed, damaged = tmp_path / "0-killed", tmp_path / "1-damaged"
    for place in (killed, damaged):
        place.mkdir()
    about = json.loads((ended / "run.json").read_text())
    del about["summary"]
    (killed / "run.json").write_text(json.dumps(about))
    (damaged / "run.json").write_text("{")
    rows = list_runs(tmp_path)
    assert [row["state"] for row in rows] == ["interrupted", "damaged", "ended"]
    assert rows[2]["run"] == str(ended)
    assert (rows[2]["exit_code"], rows[2]["task"], rows[2]["steps"], rows[2]["algorithm"]) == (0, "create", 150, "sac")
    assert rows[2]["mean_return_of_last_20"] == -44.0
    assert (rows[0]["episodes"], rows[0]["mean_return_of_last_20"]) == (0, None)


def test_a_run_that_is_written_to_is_running(tmp_path):
    assert run_robot(small_request(tmp_path)).exit_code == 0
    settings = small_request(tmp_path)
    with RunFolder.reopen((tmp_path / "latest").resolve(), resolve(settings).settings, {}):
        assert [row["state"] for row in list_runs(tmp_path)] == ["running"]


def test_no_folder_is_one_line(tmp_path):
    assert list_runs(tmp_path) == []
    with pytest.raises(StartError, match="there is no folder"):
        list_runs(tmp_path / "nothing")
