"""The learning curve."""

import sys

import numpy as np
import pytest

from relod.runtime.curve import bootstrap_interval, read_episodes, running_mean, write_curve

LINE = '{"experience_s": %g, "wall_s": 1, "steps": 2, "episode": 0, "return": %g, "reason": "%s", "length": 5}\n'


def test_a_running_mean_looks_back_only():
    assert running_mean(np.array([1.0, 2.0, 3.0, 4.0]), 2).tolist() == [1.0, 1.5, 2.5, 3.5]
    assert running_mean(np.zeros(0), 2).tolist() == []


def test_the_interval_of_the_mean_is_about_two_standard_errors():
    rows = np.arange(10.0)[:, None]
    (low,), (high,) = bootstrap_interval(rows)
    assert low == pytest.approx(4.5 - 1.78, abs=0.15)
    assert high == pytest.approx(4.5 + 1.78, abs=0.15)
    assert bootstrap_interval(rows) == (low, high)


def test_rows_are_drawn_whole():
    rows = np.stack([np.arange(5.0), -np.arange(5.0)], axis=1)
    low, high = bootstrap_interval(rows)
    assert low[0] == pytest.approx(-high[1])
    assert high[0] == pytest.approx(-low[1])


def test_the_interval_of_equal_rows_is_a_point():
    low, high = bootstrap_interval(np.array([[3.0, 4.0]] * 3))
    assert low == pytest.approx([3.0, 4.0])
    assert high == pytest.approx([3.0, 4.0])


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "episodes.jsonl"
    path.write_text(LINE % (30, -666, "time limit") + LINE % (34, -93, "target reached") + '{"experience_s": 4')
    assert [(e.experience_s, e.return_, e.reason) for e in read_episodes(path)] == [
        (30, -666, "time limit"),
        (34, -93, "target reached"),
    ]


def test_no_episodes_no_curve(tmp_path):
    (tmp_path / "episodes.jsonl").write_text("")
    assert write_curve(tmp_path, "t") == "no learning curve: no episode was finished"
    assert not (tmp_path / "learning-curve.png").exists()


def test_without_matplotlib_a_line_says_so(tmp_path, monkeypatch):
    (tmp_path / "episodes.jsonl").write_text(LINE % (30, -666, "time limit"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert write_curve(tmp_path, "t").endswith("(pip install relod[plots])")


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    reasons = ["time limit", "target reached", "wheel drop", ""]
    lines = [LINE % (30 * i, -666 + 4 * i, reasons[i % 4]) for i in range(100)]
    (tmp_path / "episodes.jsonl").write_text("".join(lines))
    assert write_curve(tmp_path, "create-local-only-s0") == f"learning curve: {tmp_path / 'learning-curve.png'}"
    assert (tmp_path / "learning-curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_disk_that_refuses_the_picture_costs_only_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "episodes.jsonl").write_text(LINE % (30, -666, "time limit"))
    (tmp_path / "learning-curve.png").mkdir()
    assert "cannot be written: Is a directory" in write_curve(tmp_path, "t")
