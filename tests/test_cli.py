"""The command line as a user meets it: one line for a mistake, the exit code, JSON alone on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from relod import __version__, cli
from relod.errors import (
    EXIT_BUG,
    EXIT_LINK,
    EXIT_OK,
    EXIT_SAFETY,
    EXIT_SETTINGS,
    EXIT_SIGINT,
    EXIT_START,
    LinkLost,
    RelodError,
    SafetyStop,
    SettingsError,
    StartError,
)
from relod.runtime import modes
from tests.fakes import SMALL, SMALL_AGENTS

VIRTUAL = ("robot", "--clock", "virtual", "--steps", "3")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def told(capsys):
    """Runs a command line; gives its exit code and what it printed to stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.run(arguments)
        return code, *capsys.readouterr()

    return run


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "creat"], "unknown task 'creat'; did you mean create?"),
        (["--task", "no_such_package:TASK"], "there is no module 'no_such_package'"),
        (["--mode", "local"], "unknown mode 'local'; did you mean local-only?"),
        (["--algo", "scac"], "unknown algorithm 'scac'; did you mean sac?"),
        (["--preset", "lite"], "unknown preset 'lite'; did you mean sac-lite?"),
        (["--world", "nominl"], "unknown world 'nominl'; did you mean nominal?"),
        (["--clock", "virtul"], "unknown clock 'virtul'; did you mean virtual?"),
        (["--set", "task.cycle_m=50"], "unknown setting 'task.cycle_m'"),
        (["--set", "task.cycle_m=50"], "did you mean task.cycle_ms?"),
        (["--set", "cycle_ms=50"], "did you mean task.cycle_ms?"),
        (["--set", "task.cycle_ms"], "has no '='"),
        (["--set", "task=3"], "task is a section"),
        (["--set", "task.cycle_ms=1"], "task.cycle_ms = '1'"),
        (["--set", "task.cycle_ms=1"], ">= 15"),
        (["--set", "agent.hidden=3"], "[int, ...]"),
        (["--robot", "/dev/ttyUSB0"], "--robot /dev/ttyUSB0 without --camera"),
        (["--camera", "0"], "--allow-mixed"),
        (["--robot", "/dev/ttyUSB0", "--camera", "sim"], "--allow-mixed"),
        (["--clock", "virtual", "--robot", "/dev/ttyUSB0", "--camera", "0"], "--clock virtual has no hardware"),
        (["--clock", "virtual", "--record"], "not recorded"),
        (["--clock", "virtual", "--realtime"], "--realtime with --clock virtual, which has no deadlines"),
    ],
)
def test_a_mistake_is_answered_in_one_line_on_stderr(told, arguments, said):
    code, out, err = told("robot", *arguments)
    assert (code, out) == (EXIT_SETTINGS, "")
    assert said in err
    assert err.startswith("relod: ")
    assert err.count("\n") == 1
    assert not list(Path().iterdir())  # no run folder was made


def test_a_variable_that_names_no_setting_is_a_mistake_too(told, monkeypatch):
    monkeypatch.setenv("RELOD_RUN__SED", "3")
    code, _, err = told("robot")
    assert code == EXIT_SETTINGS
    assert "environment RELOD_RUN__SED" in err
    assert "did you mean run.seed?" in err


@pytest.mark.parametrize("text", [None, "[task\n", "[tsk]\nx = 1\n"])
def test_a_settings_file_that_cannot_be_used(told, text):
    if text is not None:
        Path("settings.toml").write_text(text)
    code, out, err = told("robot", "--config", "settings.toml")
    assert (code, out) == (EXIT_START if text is None else EXIT_SETTINGS, "")
    assert "settings.toml" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["robot", "--stps", "3"],
        ["robot", "--steps", "0"],
        ["robot", "--steps", "many"],
        ["robot", "--seed", "-1"],
        ["robot", "--minutes", "0"],
        ["robt"],
        ["replay"],
        ["check"],
        ["emulate", "crete"],
    ],
)
def test_usage_errors_exit_with_2_and_leave_stdout_empty(told, arguments):
    code, out, err = told(*arguments)
    assert (code, out) == (EXIT_SETTINGS, "")
    assert err.startswith("relod: ") or err.lstrip().startswith("Usage: ")
    assert "Traceback" not in err


def test_a_folder_without_a_recording_is_an_error_of_the_start(told):
    code, out, err = told("replay", ".")
    assert (code, out) == (EXIT_START, "")
    assert "--record" in err


def test_a_run_folder_that_cannot_be_made_is_an_error_of_the_start(told):
    Path("runs").write_text("a file, no folder")
    code, out, err = told(*VIRTUAL)
    assert (code, out) == (EXIT_START, "")
    assert "run.folder" in err


# -- how errors become exit codes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SettingsError("what", "do"), EXIT_SETTINGS),
        (StartError("what", "do"), EXIT_START),
        (SafetyStop("what", "do"), EXIT_SAFETY),
        (LinkLost("what", "do"), EXIT_LINK),
        (RelodError("what", "do"), EXIT_BUG),
        (ExceptionGroup("several", [ExceptionGroup("inner", [StartError("what", "do")])]), EXIT_START),
    ],
)
def test_errors_of_our_own_are_said_in_a_line_and_end_with_their_code(told, monkeypatch, error, code):
    def fail(request):
        raise error

    monkeypatch.setattr(modes, "run_robot", fail)
    assert told("robot") == (code, "", "relod: what; do\n")
    with pytest.raises(type(error)):
        told("robot", "--debug")


def test_ctrl_c_before_the_run_is_up_ends_with_130(told, monkeypatch):
    def interrupt(request):
        raise KeyboardInterrupt

    monkeypatch.setattr(modes, "run_robot", interrupt)
    code, out, err = told("robot")
    assert (code, out) == (EXIT_SIGINT, "")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("bug"), ExceptionGroup("several", [StartError("x"), ZeroDivisionError("bug")])]
)
def test_defects_keep_their_traceback(monkeypatch, error):
    def fail(request):
        raise error

    monkeypatch.setattr(modes, "run_robot", fail)
    with pytest.raises(type(error)):
        cli.run(["robot"])


# -- what is printed ---------------------------------------------------------------------------------------------------


def test_the_version(told):
    assert told("--version") == (EXIT_OK, f"relod {__version__}\n", "")


def test_without_a_command_the_help_is_shown(told):
    code, out, err = told()
    assert code == EXIT_SETTINGS
    assert "Commands:" in out + err


@pytest.mark.parametrize("command", ["", "robot", "replay", "check", "modes", "settings", "emulate", "emulate create"])
def test_every_command_has_help(told, command):
    code, out, err = told(*command.split(), "--help")
    assert (code, err) == (EXIT_OK, "")
    assert f"Usage: relod {command}".strip() in out


def test_modes_as_text_and_as_json(told):
    code, out, _ = told("modes", "--json")
    table = json.loads(out)["modes"]
    assert code == EXIT_OK
    _, text, _ = told("modes")
    assert [line for line in text.splitlines() if not line.startswith(" ")] == [row["mode"] for row in table]


def test_settings_as_text_and_as_json(told):
    code, out, _ = told("settings", "--json")
    rows = json.loads(out)["settings"]
    assert code == EXIT_OK
    assert {row["name"]: row["default"] for row in rows}["task.cycle_ms"] == 45.0
    _, text, _ = told("settings")
    assert "task.cycle_ms = 45.0\n    float, >= 15" in text
    assert text.count("\n") == 2 * len(rows)


@pytest.mark.slow
def test_json_is_the_only_thing_on_stdout_and_the_run_can_be_repeated_from_its_folder():
    def relod(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-m", "relod", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

    sets = [part for setting in (*SMALL, *SMALL_AGENTS["sac"]) for part in ("--set", setting)]
    done = relod("robot", "--clock", "virtual", "--steps", "60", "--seed", "4", "--json", *sets)
    document = json.loads(done.stdout)
    assert done.returncode == document["exit_code"] == EXIT_OK, done.stderr
    assert (document["steps"], document["seed"], document["simulated"], document["device"]) == (
        60,
        4,
        True,
        "SIMULATED",
    )
    assert (document["error"], document["stopped_cleanly"], document["updates"]) == ("", True, 20)
    assert done.stderr.startswith("relod: create, local-only, virtual clock: SIMULATED")
    folder = Path(document["run_dir"])
    assert json.loads((folder / "run.json").read_text())["summary"] == document
    # The saved settings, given back, are the same run.
    again = relod("robot", "--clock", "virtual", "--json", "--config", str(folder / "settings.toml"))
    assert json.loads(again.stdout)["returns"] == document["returns"]
    assert json.loads(again.stdout)["updates"] == 20


@pytest.mark.slow
def test_a_safety_stop_still_prints_the_document_and_says_why():
    command = [sys.executable, "-m", "relod", "robot", "--clock", "virtual", "--steps", "9", "--json"]
    sets = ("--set", "sim.camera.latency_ms=1000", "--set", "safety.stall_limit_s=1")
    done = subprocess.run([*command, *sets], capture_output=True, text=True, timeout=120)
    document = json.loads(done.stdout)
    assert done.returncode == document["exit_code"] == EXIT_SAFETY
    assert "no camera image for 1 s" in document["error"]
    assert done.stderr.splitlines()[-1].startswith("relod: no camera image for 1 s")
