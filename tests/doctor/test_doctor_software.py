"""Packages, torch and GPUs that are not there."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from relod.doctor import software
from relod.doctor.finding import Finding, State
from tests.doctor.machines import JETSON

GOOD = {need.name: need.least for need in (*software.PACKAGES, software.UR_RTDE, *software.EXTRAS)}


def packages(installed: Mapping[str, str], *, robot_only: bool = False, ur5: bool = False) -> dict[str, Finding]:
    found = software.check_packages(robot_only=robot_only, ur5=ur5, installed=installed.get)
    return {finding.subject: finding for finding in found}


def test_the_packages_are_those_of_the_project():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    needs = [need.requirement for need in (*software.PACKAGES, software.UR_RTDE)]
    assert needs == [line.partition(";")[0] for line in project["dependencies"]]
    extras = {need.extra: [need.requirement] for need in software.EXTRAS}
    assert extras == {name: lines for name, lines in project["optional-dependencies"].items() if name != "dev"}


def test_all_packages_are_there():
    assert {finding.state for finding in packages(GOOD).values()} == {State.OK}
    headless = {**GOOD, "opencv-python-headless": "4.10.0.84"}
    del headless["opencv-python"]
    assert packages(headless)[""].state is State.OK


def test_packages_that_are_missing_or_old_are_installed_by_one_command():
    bad = {**GOOD, "torch": "2.4.1+cu121", "numpy": "2.0rc1"}
    del bad["websockets"]
    finding = packages(bad)[""]
    assert finding.state is State.WRONG
    assert finding.found == "torch 2.4.1+cu121 is old; websockets is missing"
    assert finding.mend == "pip install 'torch>=2.5' 'websockets>=14'"


def test_a_remote_only_robot_needs_no_torch():
    without = {name: found for name, found in GOOD.items() if name != "torch"}
    assert packages(without)[""].state is State.WRONG
    assert packages(without, robot_only=True)[""].state is State.OK
    assert software.check_torch(None, robot_only=True).state is State.NOTE
    assert software.check_torch(None, robot_only=False).state is State.WRONG


def test_what_a_ur5_or_an_extra_needs():
    bare = {need.name: need.least for need in software.PACKAGES}
    assert packages(bare)["ur_rtde"].state is State.NOTE
    assert packages(bare, ur5=True)["ur_rtde"].state is State.WRONG
    assert packages(bare)["gymnasium"].state is State.ABSENT
    assert packages({**bare, "matplotlib": "3.5"})["matplotlib"].state is State.NOTE


class Torch:
    """As much of torch as is looked at; `problem` is what its CUDA says."""

    def __init__(self, cuda: str | None = None, problem: str = "", capability: str = "AVX2") -> None:
        self.__version__ = "2.9.0"
        self.version = SimpleNamespace(cuda=cuda)
        self.backends = SimpleNamespace(cpu=SimpleNamespace(get_cpu_capability=lambda: capability))
        self.cuda = SimpleNamespace(
            is_available=lambda: cuda is not None,
            device_count=lambda: 1,
            mem_get_info=lambda index: (3 << 30, 4 << 30),
            get_device_capability=lambda index: (5, 3),
            get_device_name=lambda index: "Made-up GPU",
        )
        self._problem = problem

    def get_num_threads(self) -> int:
        return 1

    def zeros(self, *_: object, **__: object) -> Torch:
        if self._problem:
            raise RuntimeError(f"{self._problem}\nCompile with TORCH_USE_CUDA_DSA")
        return self

    add_ = sum = zeros

    def item(self) -> float:
        return 8.0


DRIVER = {"/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12"}


@pytest.mark.parametrize(
    ("files", "torch", "state", "said"),
    [
        ({}, Torch(), State.ABSENT, "a learner here uses the CPU"),
        ({}, Torch("12.8", "no driver"), State.ABSENT, "a learner here uses the CPU"),
        ({}, None, State.ABSENT, "torch would say more"),
        (DRIVER, Torch(), State.NOTE, "NVIDIA driver 535.183.01, but this torch is for the CPU only"),
        (JETSON, Torch(), State.NOTE, "NVIDIA Jetson Nano Developer Kit, but this torch"),
        (DRIVER, Torch("12.1"), State.OK, "Made-up GPU, 3.0 of 4.0 GiB free"),
        (DRIVER, Torch("12.8", "CUDA driver version is insufficient"), State.WRONG, "12.8: CUDA driver version is ins"),
    ],
)
def test_the_gpu(build, files, torch, state, said):
    finding = software.check_gpu(build(files), torch)
    assert finding.state is state
    assert said in finding.found
    assert "\n" not in finding.found


def test_torch_itself():
    assert software.check_torch(Torch(), robot_only=False).state is State.OK
    slow = Torch(capability="DEFAULT")
    states = [software.check_torch(slow, robot_only=False, architecture=each).state for each in ("x86_64", "aarch64")]
    assert states == [State.NOTE, State.OK]
    broken = software.check_torch(OSError("libcudnn.so.9: cannot open shared object file"), robot_only=False)
    assert broken.state is State.WRONG
