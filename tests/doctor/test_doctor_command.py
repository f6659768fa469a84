"""`relod doctor` as a user starts it: whole, without packages, with a camera."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from relod import cli
from relod.errors import EXIT_OK, EXIT_SETTINGS, EXIT_START
from tests.commands import RELOD

SHIM = Path(__file__).parents[1] / "robots" / "v4l2_shim.c"
NAMES = {
    *("system", "cpu", "governor", "clock", "calendar", "timers", "real time", "memory", "shared memory"),
    *("open files", "disk", "camera", "serial", "packages", "package", "OpenCV", "torch", "GPU"),
}


def doctor(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and document."""
    done = subprocess.run(
        [*RELOD, "doctor", "--json", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout)


def find(document: dict[str, Any], name: str) -> dict[str, Any]:
    (check,) = (each for each in document["checks"] if each["name"] == name)
    return dict(check)


def test_a_token_without_a_learner_is_a_mistake(capsys):
    assert cli.run(["doctor", "--token-file", "token"]) == EXIT_SETTINGS
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "add --learner" in err


@pytest.mark.slow
def test_this_machine(tmp_path):
    code, document = doctor(tmp_path)
    assert {check["name"] for check in document["checks"]} == NAMES
    assert all(set(check) == {"name", "subject", "state", "found", "mend", "values"} for check in document["checks"])
    assert all(check["mend"] for check in document["checks"] if check["state"] == "wrong")
    assert sum(document["counts"].values()) == len(document["checks"])
    assert code == (EXIT_OK if document["passed"] else EXIT_START)
    assert document["passed"] == (document["counts"]["wrong"] == 0)
    assert find(document, "packages")["state"] == "ok"
    assert find(document, "timers")["values"]["wakeups"] > 0
    assert list(tmp_path.iterdir()) == []  # it leaves nothing


@pytest.mark.slow
def test_it_works_without_nearly_all_packages(tmp_path):
    code = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'cv2', 'websockets', 'msgspec', 'uvloop', 'serial'): sys.modules[name] = None\n"
        "from relod import cli\n"
        "sys.exit(cli.run(['doctor', '--learner', 'ws://127.0.0.1:1', '--robot', '/etc/passwd', '--camera', '0']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == EXIT_START
    assert done.stderr == ""
    assert "something is wrong" in done.stdout
    assert "msgspec cannot be" in done.stdout
    assert "neither a serial port nor a socket" in " ".join(done.stdout.split())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_camera_behind_opencv(tmp_path):
    shim, device = tmp_path / "shim.so", tmp_path / "camera.jpg"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", shim, SHIM, "-ldl"], check=True)
    assert cv2.imwrite(str(device), np.full((480, 640, 3), 120, np.uint8))
    code = (
        "import json, sys; from pathlib import Path; from relod.doctor import devices\n"
        "seen = devices.check_camera_source(sys.argv[1])\n"
        "can = devices.video_capabilities(Path(sys.argv[1]))\n"
        "print(json.dumps([seen.subject, seen.found, seen.values['fps'], can & 1]))"
    )
    environment = {**os.environ, "LD_PRELOAD": str(shim), "V4L2_SHIM": str(device)}
    command = [sys.executable, "-c", code, str(device)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=True)
    subject, found, fps, captures = json.loads(done.stdout)
    assert (subject, captures) == (str(device), 1)
    assert "160x120" in found
    assert fps > 0
