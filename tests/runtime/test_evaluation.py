"""`relod eval`: what a policy earns, seen without touching its run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from relod.errors import SettingsError, StartError
from relod.robots.vision import cv2
from relod.runtime.evaluation import EvalRequest, evaluate
from relod.runtime.modes import run_robot
from tests.fakes import small_request


@pytest.fixture(scope="module", params=["sac", "ppo"])
def run(request, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    assert run_robot(small_request(root, algorithm=request.param)).exit_code == 0
    return (root / "latest").resolve()


def test_episodes_are_seen_counted_and_pictured(run):
    before = sorted(path.name for path in run.iterdir())
    result = evaluate(EvalRequest(run=run, episodes=3))
    assert result.exit_code == 0
    summary = result.summary
    assert summary["episodes"] == len(summary["returns"]) == len(summary["lengths"]) == 3
    assert summary["mean_return"] == pytest.approx(sum(summary["returns"]) / 3)
    assert summary["mean_return_low"] <= summary["mean_return"] <= summary["mean_return_high"]
    folder = Path(summary["run_dir"])
    assert folder.parent == run / "evaluations"
    assert json.loads((folder / "run.json").read_text())["evaluates"] == str(run)
    for episode, length in enumerate(summary["lengths"]):
        video = cv2.VideoCapture(str(folder / "episodes" / f"episode-{episode:03}.mp4"))
        frames = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        assert frames == pytest.approx(length * 0.045 * 30, abs=4)
        strip = cv2.imread(str(folder / "episodes" / f"episode-{episode:03}.png"))
        assert strip.shape == (120, 8 * 160, 3)
    assert [name for name in before if name != "evaluations"] == [
        path.name for path in sorted(run.iterdir()) if path.name != "evaluations"
    ]


def test_without_noise_a_seed_says_it_all(run):
    first, second = (evaluate(EvalRequest(run=run, episodes=2, seed=3)).summary for _ in range(2))
    assert (first["returns"], first["lengths"]) == (second["returns"], second["lengths"])
    assert first["run_dir"] != second["run_dir"]


@pytest.mark.slow
def test_in_real_time_the_robot_is_driven_as_in_a_run(run):
    summary = evaluate(EvalRequest(run=run, episodes=2, clock="wall")).summary
    assert (summary["episodes"], summary["exit_code"], summary["stopped_cleanly"]) == (2, 0, True)
    assert summary["updates"] == 0
    assert len(list((Path(summary["run_dir"]) / "episodes").glob("*.mp4"))) == 2


def test_a_run_without_a_checkpoint_is_one_line(run, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("run.json", "settings.toml"):
        (bare / name).write_bytes((run / name).read_bytes())
    with pytest.raises(StartError, match="has no checkpoint"):
        evaluate(EvalRequest(run=bare, episodes=1))
    with pytest.raises(StartError):
        evaluate(EvalRequest(run=tmp_path / "nothing", episodes=1))


def test_a_learners_run_needs_the_task(run, tmp_path):
    there = tmp_path / "learner"
    there.mkdir()
    about = json.loads((run / "run.json").read_text())
    (there / "run.json").write_text(json.dumps({**about, "spec": {"image_hw": [24, 32]}}))
    (there / "settings.toml").write_bytes((run / "settings.toml").read_bytes())
    with pytest.raises(SettingsError, match=r"is a learner's run.*name it with --task"):
        evaluate(EvalRequest(run=there, episodes=1))
