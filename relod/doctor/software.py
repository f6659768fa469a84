"""What is installed: relod's dependencies, OpenCV's libraries, torch, and the GPU as torch sees it."""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .. import __version__
from ..runtime.provenance import describe
from .finding import Finding, Machine, absent, note, ok, wrong

__all__ = [
    "EXTRAS",
    "PACKAGES",
    "UR_RTDE",
    "Needed",
    "check_gpu",
    "check_opencv",
    "check_packages",
    "check_system",
    "check_torch",
    "load_torch",
]

GIB = 1 << 30
CUDA_MEND = "choose torch for this machine at https://pytorch.org/get-started/locally"
JETSON_MEND = "install NVIDIA's torch for this JetPack: https://docs.nvidia.com/deeplearning/frameworks"


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """A package that relod uses, as pyproject.toml has it."""

    name: str
    least: str
    extra: str = ""
    other_names: tuple[str, ...] = ()  # packages that do as well

    @property
    def requirement(self) -> str:
        return f"{self.name}>={self.least}"


PACKAGES = (
    Needed(name="uvloop", least="0.21"),
    Needed(name="torch", least="2.5"),
    Needed(name="numpy", least="1.26"),
    Needed(name="msgpack", least="1.0.8"),
    Needed(name="websockets", least="14"),
    Needed(name="pycreate2", least="0.8"),
    Needed(name="opencv-python", least="4.9", other_names=("opencv-python-headless", "opencv-contrib-python")),
    Needed(name="typer", least="0.28"),
    Needed(name="rich", least="13.7"),
    Needed(name="msgspec", least="0.19"),
    Needed(name="safetensors", least="0.4.3"),
)
UR_RTDE = Needed(name="ur_rtde", least="1.6.1")
EXTRAS = (
    Needed(name="gymnasium", least="1.0", extra="gym"),
    Needed(name="matplotlib", least="3.8", extra="plots"),
    Needed(name="tensorboard", least="2.16", extra="tb"),
)


def check_system(machine: Machine) -> Finding:
    """Versions of relod, Python and the system, and the processor; what a report of a defect should have."""
    facts: dict[str, Any] = describe([])
    board = f"{machine.jetson}, " if machine.jetson else ""
    found = f"relod {facts['relod'] or __version__}, Python {facts['python']}, {facts['system']}, {board}{facts['cpu']}"
    if sys.platform != "linux":
        return wrong("system", f"{found}: relod needs timerfd and memfd", "use Linux", **facts)
    return ok("system", found, **facts)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_packages(
    *, robot_only: bool, ur5: bool, installed: Callable[[str], str | None] = _installed
) -> list[Finding]:
    """Each package with its version: the dependencies, ur_rtde, the extras.

    Args:
        robot_only: torch may be missing, as on a robot in remote-only.
        ur5: ur_rtde may not.
    """
    versions = {need.name: _find(need, installed) for need in PACKAGES}
    missing = [need for need in PACKAGES if versions[need.name] is None]
    old = [need for need in PACKAGES if (found := versions[need.name]) and _number(found) < _number(need.least)]
    told = ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    if robot_only and missing == [PACKAGES[1]]:
        told, missing = f"{told}; no torch, which remote-only does without", []
    bad = [need for need in PACKAGES if need in missing or need in old]
    if bad:
        words = [f"{need.name} {'is missing' if need in missing else f'{versions[need.name]} is old'}" for need in bad]
        mend = "pip install " + " ".join(f"'{need.requirement}'" for need in bad)
        first = wrong("packages", "; ".join(words), mend, versions=versions)
    else:
        first = ok("packages", told, versions=versions)
    return [first, _check_ur_rtde(ur5, installed), *(_check_extra(need, installed) for need in EXTRAS)]


def _check_ur_rtde(needed: bool, installed: Callable[[str], str | None]) -> Finding:
    found = installed(UR_RTDE.name)
    if found is not None:
        return ok("package", f"{found}, drives a UR5", UR_RTDE.name, version=found)
    if platform.machine() == "x86_64" and sys.version_info < (3, 13):
        mend = f"pip install '{UR_RTDE.requirement}'"
    else:
        mend = "wheels are for CPython 3.11 and 3.12 on x86-64 Linux: use these, or build it (Boost, CMake)"
    say = wrong if needed else note
    return say("package", "missing: a UR5 cannot be driven from here", mend, UR_RTDE.name, version=None)


def _check_extra(need: Needed, installed: Callable[[str], str | None]) -> Finding:
    found = installed(need.name)
    if found is None:
        mend = f"pip install '{need.requirement}'"
        return absent("package", f"of the extra {need.extra}, not installed", need.name, mend, version=None)
    if _number(found) < _number(need.least):
        mend = f"pip install '{need.requirement}'"
        return note("package", f"{found} is older than {need.least}", mend, need.name, version=found)
    return ok("package", found, need.name, version=found)


def _find(need: Needed, installed: Callable[[str], str | None]) -> str | None:
    return next((found for name in (need.name, *need.other_names) if (found := installed(name))), None)


def _number(text: str) -> tuple[int, ...]:
    """`2.5.1+cu121` -> (2, 5, 1); what is no release compares by its numbers up to there."""
    release = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in release.group().split(".")) if release else ()


def check_opencv() -> Finding:
    """Whether OpenCV can be imported; `StartError` with the libraries it lacks."""
    if importlib.util.find_spec("cv2") is None:
        return wrong("OpenCV", "not installed", "pip install 'opencv-python>=4.9'")
    from ..robots.vision import cv2

    return ok("OpenCV", f"{cv2.__version__}, {cv2.getNumberOfCPUs()} cores", version=cv2.__version__)


def load_torch() -> Any:
    """torch, or the exception that its import ended with: libraries that do not fit raise an OSError."""
    if importlib.util.find_spec("torch") is None:
        return None
    try:
        import torch
    except (ImportError, OSError) as error:
        return error
    return torch


def check_torch(torch: Any, *, robot_only: bool, architecture: str = platform.machine()) -> Finding:
    """What runs the networks; `torch` as `load_torch` gives it."""
    if torch is None:
        found, mend = "not installed: only remote-only works without", "pip install 'torch>=2.5'"
        return note("torch", found, mend) if robot_only else wrong("torch", found, mend)
    if isinstance(torch, Exception):
        return wrong("torch", f"cannot be imported: {torch}", "pip install --force-reinstall 'torch>=2.5'")
    capability = str(torch.backends.cpu.get_cpu_capability())
    values = {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cpu_capability": capability,
    }
    found = f"{torch.__version__}, {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU only'}"
    found += f", {torch.get_num_threads()} threads, CPU capability {capability}"
    if architecture == "x86_64" and capability == "DEFAULT":
        mend = "learn on a machine whose processor has AVX2: --mode remote-local"
        return note("torch", f"{found}: no AVX2, updates will be slow", mend, **values)
    return ok("torch", found, **values)


def check_gpu(machine: Machine, torch: Any) -> Finding:
    """The GPU that a learner would use, or why it would not."""
    name = "GPU"
    driver = _driver(machine)
    there = bool(driver) or bool(machine.jetson)
    hardware = machine.jetson or (f"NVIDIA driver {driver}" if driver else "no NVIDIA driver")
    values: dict[str, Any] = {"driver": driver or None, "jetson": machine.jetson or None}
    if torch is None or isinstance(torch, Exception):
        return absent(name, f"{hardware}; torch would say more", **values)
    choose = JETSON_MEND if machine.jetson else CUDA_MEND
    if not torch.version.cuda:
        if there:
            return note(name, f"{hardware}, but this torch is for the CPU only", choose, **values)
        return absent(name, f"{hardware}: a learner here uses the CPU", **values)
    problem = _cuda_problem(torch)
    if problem is None:
        devices = [_describe(torch, index) for index in range(torch.cuda.device_count())]
        told = "; ".join(
            f"{each['name']}, {each['free_bytes'] / GIB:.1f} of {each['total_bytes'] / GIB:.1f} GiB free"
            for each in devices
        )
        return ok(name, f"{told} ({hardware}, CUDA {torch.version.cuda})", devices=devices, **values)
    if not there:
        return absent(name, f"{hardware}: a learner here uses the CPU", **values)
    if nodes := [machine.name_of(path) for path in machine.find("/dev/nvidia[0-9]*") if not machine.may_use(path)]:
        group = "sudo usermod -aG video $USER   # then log out and in again"
        return wrong(name, f"{hardware}: no permission for {', '.join(nodes)}", group, **values)
    mend = choose if machine.jetson else f"nvidia-smi   # its CUDA version must be {torch.version.cuda} or newer"
    return wrong(name, f"{hardware}, torch for CUDA {torch.version.cuda}: {problem}", mend, **values)


def _driver(machine: Machine) -> str:
    """The kernel module's version; empty when it is not loaded."""
    found = re.search(r"Module.*?(\d+\.\d+(?:\.\d+)?)", machine.text("/proc/driver/nvidia/version"))
    return found.group(1) if found else ""


def _cuda_problem(torch: Any) -> str | None:
    """Why nothing can be computed on the GPU, by trying; None when it can."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            if torch.cuda.is_available():
                torch.zeros(8, device="cuda").add_(1).sum().item()
                return None
        except RuntimeError as error:  # torch's own, for every failure of CUDA
            return str(error).splitlines()[0]
    return str(said[0].message).splitlines()[0] if said else "CUDA is not available"


def _describe(torch: Any, index: int) -> dict[str, Any]:
    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    return {
        "name": torch.cuda.get_device_name(index),
        "capability": f"{major}.{minor}",
        "free_bytes": int(free),
        "total_bytes": int(total),
    }
