"""Algorithms and robots of other packages: what the documentation builds is installed as it stands there, and run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from relod.runtime.modes import MODES
from tests.commands import RELOD, learner, robot

DOCS = Path(__file__).parents[1] / "docs"
SIZES = ("agent.hidden=[16]", "agent.batch_size=8", "agent.init_steps=40", "run.metrics_every_s=0.25")
SMALL = tuple(word for size in SIZES for word in ("--set", size))


def blocks(page: Path) -> dict[str, list[str]]:
    """The page's code blocks by language."""
    found: dict[str, list[str]] = {}
    for language, text in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), re.DOTALL):
        found.setdefault(language, []).append(text)
    return found


def install(source: Path, site: Path) -> dict[str, str]:
    """An environment in which that package is installed."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, timeout=120)
    return {**os.environ, "PYTHONPATH": str(site)}


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """With the algorithm of the page."""
    source, site = tmp_path_factory.mktemp("package"), tmp_path_factory.mktemp("site")
    code = blocks(DOCS / "algos" / "write-your-own.md")
    (source / "pyproject.toml").write_text(code["toml"][0])
    (source / "relod_ddpg.py").write_text(code["python"][0])
    (source / "test_ddpg.py").write_text(code["python"][1])
    return {**install(source, site), "CONTRACT": str(source / "test_ddpg.py")}


@pytest.fixture(scope="module")
def rig(tmp_path_factory) -> dict[str, str]:
    """With the robot of the page."""
    source, site = tmp_path_factory.mktemp("rig"), tmp_path_factory.mktemp("site")
    code = blocks(DOCS / "robots" / "add-your-own.md")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "-ec", code["sh"][0]], cwd=source, env={**os.environ, "PATH": path}, check=True)
    (source / "pyproject.toml").write_text(code["toml"][0])
    (source / "test_rig.py").write_text(code["python"][0])
    return {**install(source, site), "CONTRACT": str(source / "test_rig.py")}


def relod(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RELOD, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_module_is_as_short_as_the_page_says():
    (code, _) = blocks(DOCS / "algos" / "write-your-own.md")["python"]
    lines = [line for line in code.splitlines() if line.strip() and not line.strip().startswith(('"""', "#"))]
    assert len(lines) < 110


@pytest.mark.slow
def test_an_installed_algorithm_is_listed(environment):
    listed = json.loads(relod(environment, "algos", "--json").stdout)["algorithms"]
    (row,) = [row for row in listed if row["name"] == "ddpg"]
    assert (row["target"], row["presets"], row["error"]) == ("relod_ddpg:DDPG", ["ddpg"], "")


def contract(environment: dict[str, str], *arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, *arguments]
    done = subprocess.run(
        [*command, environment["CONTRACT"]], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_installed_algorithm_passes_the_contract(environment):
    contract(environment)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_installed_robot_passes_the_contract(rig):
    contract(rig, "-k", "not commissioning")


@pytest.mark.slow
def test_an_installed_robot_is_listed_and_driven(rig, tmp_path):
    (row,) = [row for row in json.loads(relod(rig, "tasks", "--json").stdout)["tasks"] if row["name"] == "my-rig"]
    assert (row["target"], row["robot"], row["error"]) == ("my_rig.task:TRACK", "rig", "")
    sets = [word for setting in ("task.episode_steps=30", f"run.folder={tmp_path}") for word in ("--set", setting)]
    done = relod(rig, "robot", "--task", "my-rig", "--steps", "60", "--json", *sets)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stopped_cleanly"] is True


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("mode", list(MODES))
def test_an_installed_algorithm_runs_in_every_mode(environment, monkeypatch, tmp_path, mode):
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    short = ("--task", "track", "--algo", "ddpg", "--steps", "160", "--set", "task.episode_steps=40")
    with contextlib.ExitStack() as stack:
        if mode == "local-only":
            run = stack.enter_context(robot(tmp_path, *short, quick=SMALL))
        else:
            teacher = stack.enter_context(learner(tmp_path, "--algo", "ddpg", name="-learner", quick=SMALL))
            run = stack.enter_context(robot(tmp_path, *short, "--mode", mode, "--learner", teacher.url, quick=()))
        assert run.wait() == 0, run.messages()
        result = run.result()
        assert (result["steps"], result["stopped_cleanly"]) == (160, True)
        if mode == "local-only":
            assert result["algorithm"] == "ddpg"
            return
        teacher.wait_for_updates()
        teacher.process.send_signal(signal.SIGINT)
        assert teacher.wait() == 130, teacher.messages()
        assert teacher.result()["updates"] > 0
