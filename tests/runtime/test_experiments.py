"""Run folders read back, which of them belong together, and their figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from relod.config import ReplaySettings, RunSettings, Settings
from relod.errors import SettingsError, StartError
from relod.runtime.curve import CUT_REASONS
from relod.runtime.cycle import Phase
from relod.runtime.experiments import describe, find_runs, group_runs
from relod.runtime.rundir import RunFolder
from relod.types import EpisodeEnd
from tests.fakes import SPEC, Bench, FakeTask

RECORD = {
    "task": "create",
    "mode": "local-only",
    "clock": "virtual",
    "algorithm": "sac",
    "preset": "sac-lite",
    "device": "SIMULATED",
    "world": "nominal",
}
WIN, LOSS, CUT = ("target reached", True), ("time limit", False), ("end of the run", False)


def episode(index: int, return_: float, reason: str, success: bool) -> EpisodeEnd:
    return EpisodeEnd(
        episode=index,
        length=10,
        frame_ids=(),
        proprio=None,  # type: ignore[arg-type]
        return_=return_,
        terminated=success,
        success=success,
        reason=reason,
        observed_ns=0,
    )


def make_run(
    root: Path, ends: list[tuple[str, bool]], *, seed: int = 0, replay: ReplaySettings | None = None, **record: str
) -> Path:
    """A run folder as a killed run leaves it; episodes last 1 minute, 2 by the wall, and return 0, -1, -2, ..."""
    chosen = Settings(run=RunSettings(folder=str(root), seed=seed), replay=replay or ReplaySettings())
    with RunFolder.create(f"r-s{seed}", chosen, {**RECORD, **record}) as folder:
        for index, (reason, success) in enumerate(ends):
            end = episode(index, -float(index), reason, success)
            folder.episode(end, experience_s=60.0 * (index + 1), wall_s=120.0 * (index + 1), steps=10 * (index + 1))
        return folder.path


def labels(folders: list[Path], grouping: str = "auto") -> list[str]:
    return [group.label for group in group_runs(find_runs(folders)[0], grouping)]


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_folder_of_runs_gives_each_of_them_once(tmp_path):
    paths = [make_run(tmp_path / "runs", [LOSS], seed=seed) for seed in (0, 1)]
    runs, empty = find_runs([tmp_path / "runs", tmp_path / "runs" / "latest", paths[0]])
    assert sorted(run.folder for run in runs) == sorted(paths)
    assert sorted(run.seed for run in runs) == [0, 1]
    assert empty == []


def test_a_run_without_an_episode_is_told_apart(tmp_path):
    begun, going = make_run(tmp_path, [CUT]), make_run(tmp_path, [LOSS])
    runs, empty = find_runs([begun, going])
    assert [run.folder for run in runs] == [going]
    assert empty == [begun]


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    path = make_run(tmp_path, [LOSS, WIN])
    with (path / "episodes.jsonl").open("a") as file:
        file.write('{"experience_s": 18')
    assert len(find_runs([path])[0][0].episodes) == 2


def test_a_run_is_finished_when_its_summary_is_there(tmp_path):
    path = make_run(tmp_path, [LOSS])
    assert not find_runs([path])[0][0].finished
    (path / "run.json").write_text(json.dumps({**RECORD, "summary": {}}))
    assert find_runs([path])[0][0].finished


def test_what_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(StartError, match="there is no folder"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(StartError, match=r"is no run folder and holds none: no run\.json"):
        find_runs([tmp_path])
    with pytest.raises(StartError, match="no episode was finished in"):
        find_runs([make_run(tmp_path, [])])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("run.json", "{", "is damaged"),
        ("run.json", "{}", "missing required field `task`"),
        ("settings.toml", "[run", "is damaged"),
        ("settings.toml", "[agent]", "is damaged: .* missing required field `seed`"),
        ("settings.toml", "run = 3", "is damaged: Expected `object`"),
        ("settings.toml", "[run]\nseed = 'x'", "is damaged: Expected `int`"),
        ("settings.toml", None, "settings.toml cannot be read: No such file"),
        ("episodes.jsonl", None, "episodes.jsonl cannot be read: No such file"),
    ],
)
def test_a_damaged_run_is_named(tmp_path, name, content, said):
    path = make_run(tmp_path, [LOSS])
    (path / name).unlink()
    if content is not None:
        (path / name).write_text(content)
    with pytest.raises(StartError, match=said):
        find_runs([path])


@pytest.mark.parametrize("trouble", ["frame", "packet", "epoch", "steps"])
def test_reasons_that_the_cycle_gives_are_cuts(trouble):
    bench = Bench(FakeTask(spec=replace(SPEC, max_steps=1000)), max_steps=10 if trouble == "steps" else 0)
    bench.until(Phase.RUNNING)
    bench.go(3)
    senses = {trouble: False} if trouble in ("frame", "packet") else {}
    bench.epoch += trouble == "epoch"
    tick = bench.until(Phase.OVER if trouble == "steps" else Phase.HOLDING, **senses)
    assert tick.end.reason in CUT_REASONS


# -- grouping ----------------------------------------------------------------------------------------------------------


def test_seeds_of_one_experiment_are_a_group(tmp_path):
    paths = [make_run(tmp_path, [LOSS], seed=seed) for seed in (0, 1)]
    (group,) = group_runs(find_runs(paths)[0])
    assert group.label == "sac-lite"
    assert [run.seed for run in group.runs] == [0, 1]


def test_labels_say_what_differs(tmp_path):
    a, b = make_run(tmp_path, [LOSS]), make_run(tmp_path, [LOSS], replay=ReplaySettings(capacity=512))
    assert labels([a, b]) == ["replay.capacity=100000", "replay.capacity=512"]
    c = make_run(tmp_path, [LOSS], clock="wall", world="harsh", replay=ReplaySettings(capacity=512))
    assert labels([a, c]) == ["virtual clock, nominal world", "wall clock, harsh world"]
    assert labels([a, b, c]) == [
        "virtual clock, nominal world, replay.capacity=100000",
        "virtual clock, nominal world, replay.capacity=512",
        "wall clock, harsh world",
    ]


def test_a_setting_of_another_version_is_unset(tmp_path):
    old, new = make_run(tmp_path, [LOSS]), make_run(tmp_path, [LOSS])
    with (new / "settings.toml").open("a") as file:
        file.write("\n[agent]\n" + "".join(f"x{i} = {i}\n" for i in range(6)))
    assert labels([old, new]) == [
        "agent.x0=unset, agent.x1=unset, agent.x2=unset, agent.x3=unset, 2 more",
        "agent.x0=0, agent.x1=1, agent.x2=2, agent.x3=3, 2 more",
    ]


def test_without_grouping_each_run_is_one(tmp_path):
    paths = [make_run(tmp_path, [LOSS], seed=seed) for seed in (0, 1)]
    assert labels(paths, "none") == ["sac-lite, seed 0", "sac-lite, seed 1"]
    again = make_run(tmp_path, [LOSS], seed=1)
    assert labels([*paths, again], "none")[1:] == [
        f"sac-lite, seed 1, {paths[1].name}",
        f"sac-lite, seed 1, {again.name}",
    ]


def test_an_unknown_grouping_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="unknown --group 'seed'; known: auto, none"):
        labels([make_run(tmp_path, [LOSS])], "seed")


# -- figures -----------------------------------------------------------------------------------------------------------


def figures(path: Path) -> dict[str, Any]:
    (group,) = describe(group_runs(find_runs([path])[0]))
    return group["runs"][0]


def test_figures_of_a_run(tmp_path):
    path = make_run(tmp_path, [LOSS] * 10 + [WIN] * 15 + [CUT], seed=3)
    assert figures(path) == {
        "folder": str(path),
        "seed": 3,
        "finished": False,
        "episodes": 25,
        "steps": 250,
        "experience_minutes": 25.0,
        "wall_minutes": 50.0,
        "successes_of_last_20": 15,
        "mean_return_of_last_10": -19.5,  # of -15 to -24
        "mean_return_of_last_20": -14.5,  # of -5 to -24
        "minute_of_60_percent": 22.0,  # the twelfth success
    }


def test_a_share_needs_all_twenty_episodes(tmp_path):
    assert figures(make_run(tmp_path, [WIN] * 19))["minute_of_60_percent"] is None
    assert figures(make_run(tmp_path, [WIN] * 20))["minute_of_60_percent"] == 20.0
    assert figures(make_run(tmp_path, [LOSS] * 9 + [WIN] * 11))["minute_of_60_percent"] is None


def test_means_need_their_episodes(tmp_path):
    run = figures(make_run(tmp_path, [LOSS] * 12))
    assert (run["mean_return_of_last_10"], run["mean_return_of_last_20"]) == (-6.5, None)
