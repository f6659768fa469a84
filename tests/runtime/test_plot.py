"""The picture of many runs' learning curves."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from relod import cli
from relod.errors import EXIT_OK, EXIT_SETTINGS, EXIT_START, SettingsError, StartError
from relod.runtime.curve import Episode
from relod.runtime.experiments import HEAD, Group, Run
from relod.runtime.plot import GRID_POINTS, PlotOptions, Reference, long_runs, on_grid, parse_reference, write_picture
from tests.runtime.test_experiments import LOSS, WIN, make_run

PNG = b"\x89PNG"


def run_of(returns: list[float], seed: int = 0, begin_s: float = 0.0) -> Run:
    episodes = tuple(
        Episode(experience_s=begin_s + 30.0 * (i + 1), wall_s=60.0 * (i + 1), steps=10, return_=r, success=r > -50)
        for i, r in enumerate(returns)
    )
    identity = {name: name for name in HEAD}
    return Run(folder=Path(f"r{seed}"), seed=seed, finished=True, identity=identity, episodes=episodes)


def group_of(count: int, episodes: int = 30, label: str = "a") -> Group:
    rng = np.random.default_rng(0)
    return Group(label=label, runs=tuple(run_of(rng.uniform(-100, 0, episodes).tolist(), i) for i in range(count)))


# -- parts -------------------------------------------------------------------------------------------------------------


def test_a_reference_is_a_name_and_a_number():
    assert parse_reference("a = b=-398.5") == Reference(name="a = b", value=-398.5)


@pytest.mark.parametrize("text", ["", "-398", "=-398", "random", "random=", "random=x", "random=nan", "random=inf"])
def test_what_is_no_reference_is_refused(text):
    with pytest.raises(SettingsError, match="is not NAME=VALUE"):
        parse_reference(text)


def test_curves_meet_on_the_stretch_they_share():
    xs = [np.array([1.0, 3.0]), np.array([2.0, 4.0])]
    grid, values = on_grid(xs, [np.array([10.0, 30.0]), np.array([0.0, 2.0])])
    assert (len(grid), grid[0], grid[-1]) == (GRID_POINTS, 2.0, 3.0)
    assert values[:, [0, -1]].tolist() == [[20.0, 30.0], [0.0, 1.0]]


@pytest.mark.parametrize(("second", "points"), [([3.0, 5.0], 1), ([4.0, 5.0], 0)])
def test_curves_may_share_one_point_or_none(second, points):
    grid, values = on_grid([np.array([1.0, 3.0]), np.array(second)], [np.zeros(2), np.ones(2)])
    assert grid.shape == (points,)
    assert values.shape == (2, points)


def test_a_run_just_begun_does_not_end_the_mean():
    whole, half, begun = (run_of([-1.0] * count, count) for count in (10, 5, 4))
    assert long_runs([begun, whole, half], "experience") == [whole, half]
    assert long_runs([begun], "wall") == [begun]


# -- the picture -------------------------------------------------------------------------------------------------------


def test_forty_runs_of_a_thousand_episodes_are_a_small_svg(tmp_path):
    pytest.importorskip("matplotlib")
    options = PlotOptions(out=tmp_path / "a.svg", references=(Reference(name="held random", value=-398.0),))
    write_picture([group_of(10, 1000, name) for name in "abcd"], options)
    text = options.out.read_text()
    assert len(text) < 200_000
    for word in ("held random", "a (10 runs)", "d (10 runs)", "95 % bootstrap", "experience (minutes"):
        assert word in text


def test_the_same_runs_give_the_same_svg(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        write_picture([group_of(3)], PlotOptions(out=tmp_path / name))
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize("x", ["experience", "wall"])
@pytest.mark.parametrize("groups", [[group_of(1, 1)], [group_of(2, 1)], [group_of(1), group_of(2), group_of(3)]])
def test_few_runs_and_few_episodes_can_be_drawn(tmp_path, groups, x):
    pytest.importorskip("matplotlib")
    write_picture(groups, PlotOptions(out=tmp_path / "a.png", x=x, window=1))
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_the_legend_says_which_runs_make_the_mean(tmp_path):
    pytest.importorskip("matplotlib")
    group = Group(label="a", runs=(run_of([-2.0] * 9), run_of([-1.0] * 9), run_of([-1.0])))
    write_picture([group], PlotOptions(out=tmp_path / "a.svg"))
    assert "a (3 runs, mean of 2)" in (tmp_path / "a.svg").read_text()


def test_runs_that_share_no_time_are_thin_lines_only(tmp_path):
    pytest.importorskip("matplotlib")
    group = Group(label="a", runs=(run_of([-2.0] * 5), run_of([-1.0] * 5, begin_s=150.0)))
    write_picture([group], PlotOptions(out=tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="unknown --x 'steps'; known: experience, wall"):
        PlotOptions(out=tmp_path / "a.png", x="steps")
    with pytest.raises(SettingsError, match=r"unknown ending of --out '\.pdf'; known: \.png, \.svg"):
        PlotOptions(out=tmp_path / "a.pdf")


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(StartError, match="cannot be written: No such file or directory"):
        write_picture([group_of(1)], PlotOptions(out=tmp_path / "nowhere" / "a.png"))


def test_without_matplotlib_a_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(StartError, match=r"matplotlib is not installed; pip install relod\[plots\]"):
        write_picture([group_of(1)], PlotOptions(out=tmp_path / "a.png"))


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        make_run(tmp_path / "runs", [LOSS, WIN], seed=seed)
    make_run(tmp_path / "runs", [], seed=3)
    return tmp_path / "runs"


def test_the_command_draws(runs, capsys):
    pytest.importorskip("matplotlib")
    assert cli.run(["plot", "runs", "--reference", "random=-5"]) == EXIT_OK
    said = capsys.readouterr()
    assert said.out == ""
    assert "relod: left out, no episode yet: " in said.err
    assert said.err.endswith("relod: learning curves: learning-curves.png\n")
    assert Path("learning-curves.png").read_bytes().startswith(PNG)


def test_with_json_alone_no_picture_is_drawn(runs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.run(["plot", "runs", "--json"]) == EXIT_OK
    document = json.loads(capsys.readouterr().out)
    assert [run["seed"] for run in document["groups"][0]["runs"]] == [0, 1, 2]
    assert not Path("learning-curves.png").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere"], EXIT_START, "there is no folder nowhere"),
        (["runs", "--x", "steps"], EXIT_SETTINGS, "unknown --x 'steps'"),
        (["runs", "--group", "seed"], EXIT_SETTINGS, "unknown --group 'seed'"),
        (["runs", "--out", "a.pdf"], EXIT_SETTINGS, "unknown ending of --out '.pdf'"),
        (["runs", "--reference", "random"], EXIT_SETTINGS, "is not NAME=VALUE"),
        (["runs", "--window", "0"], EXIT_SETTINGS, "--window"),
        ([], EXIT_SETTINGS, "RUN"),
    ],
)
def test_mistakes_are_one_line(runs, capsys, arguments, code, said):
    assert cli.run(["plot", *arguments]) == code
    told = capsys.readouterr()
    assert told.out == ""
    assert said in told.err.splitlines()[-1]
