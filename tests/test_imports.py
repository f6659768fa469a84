"""What importing costs: the robot's path loads no torch, and help loads nothing heavy at all."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "cv2", "numpy", "matplotlib", "uvloop")
ROBOT_PATH = (
    "relod.cli",
    "relod.config",
    "relod.robots.registry",
    "relod.robots.create2.driver",
    "relod.robots.create2.reacher",
    "relod.robots.create2.world",
    "relod.robots.track.driver",
    "relod.robots.track.task",
    "relod.robots.track.world",
    "relod.runtime.camera",
    "relod.runtime.control",
    "relod.runtime.cycle",
    "relod.runtime.device",
    "relod.runtime.guardian",
    "relod.runtime.log.check",
    "relod.runtime.log.export",
    "relod.runtime.log.writer",
    "relod.runtime.messages",
    "relod.runtime.modes",
    "relod.runtime.plan",
    "relod.runtime.channel",
    "relod.runtime.processes",
    "relod.runtime.sentinel",
    "relod.runtime.shared",
    "relod.runtime.spans",
    "relod.runtime.virtual",
    "relod.runtime.world",
)


def loaded_by(code: str, names: tuple[str, ...]) -> set[str]:
    """Which of `names` a new interpreter has loaded after `code`."""
    script = f"{code}\nimport sys\nprint(*[name for name in {names!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    return set(done.stderr.split())


@pytest.mark.slow
def test_the_robots_path_imports_no_torch():
    code = "\n".join(f"import {name}" for name in ROBOT_PATH)
    assert loaded_by(code, ("torch", "matplotlib")) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        *("", "robot", "replay", "check", "modes", "settings", "plot", "doctor"),
        *("log", "log export", "emulate", "emulate create", "emulate track"),
        *("bench", "bench update", "bench all"),
    ],
)
def test_help_loads_nothing_heavy(command):
    arguments = [*command.split(), "--help"]
    code = f"from relod import cli\nassert cli.run({arguments!r}) == 0"
    assert loaded_by(code, HEAVY) == set()


@pytest.mark.slow
def test_the_doctor_starts_where_everything_is_missing():
    assert loaded_by("import relod.doctor.examination", (*HEAVY, "msgspec", "websockets", "serial")) == set()


@pytest.mark.slow
def test_the_version_loads_nothing_heavy():
    assert loaded_by("from relod import cli\nassert cli.run(['--version']) == 0", HEAVY) == set()


@pytest.mark.slow
def test_the_command_sets_one_blas_thread_before_numpy_is_loaded():
    code = "import relod.__main__, sys, os\nassert 'numpy' not in sys.modules\nassert os.environ['OMP_NUM_THREADS']"
    assert loaded_by(code, ("torch",)) == set()
