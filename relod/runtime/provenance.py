"""What a run was made with: versions, commit, host, processor. For run.json and the benchmarks' records."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["describe"]

PACKAGES = ("torch", "numpy", "opencv-python", "opencv-python-headless", "pycreate2", "uvloop", "msgspec")
GIT_LIMIT_S = 5.0


def describe(argv: Sequence[str]) -> dict[str, object]:
    """The machine and the code, as plain values; nothing is imported for it. Takes some 10 ms: git is asked."""
    return {
        "relod": _version("relod"),
        "commit": _commit(Path(__file__).resolve().parent),
        "argv": list(argv),
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """The commit of the checkout that `folder` is tracked in, with `+changes` if it has any; None outside of one."""
    try:
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")  # an installed package in somebody's checkout is not
        return _git(folder, "rev-parse", "HEAD") + ("+changes" if _git(folder, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=GIT_LIMIT_S
    ).stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.machine()
