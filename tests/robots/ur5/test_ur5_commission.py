from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from relod.config import SafetySettings
from relod.errors import StartError
from relod.robots.ur5 import commission
from relod.robots.ur5.commission import Bystander, UR5Commission
from relod.robots.ur5.interface import SENSOR_COLUMNS, RobotSettings
from relod.runtime import check
from relod.runtime.clock import NS_PER_MS, sleep_s
from relod.runtime.trial import TrialPlan
from relod.types import SensorWindow
from tests.robots.ur5.emulated import emulated

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("rtde_control") is None, reason="ur_rtde has no wheel for this platform"
)


def window(*packets: dict[str, float]) -> SensorWindow:
    return SensorWindow(
        names=SENSOR_COLUMNS,
        seq=np.arange(len(packets)),
        arrived_ns=np.arange(len(packets)) * 100 * NS_PER_MS,
        values=np.array([[packet.get(name, 0.0) for name in SENSOR_COLUMNS] for packet in packets]),
    )


def test_speeds_are_what_the_encoders_travelled() -> None:
    seen = window({"elbow_rad": 1.0}, {"elbow_rad": 1.01}, {"elbow_rad": 1.06})
    assert UR5Commission().speeds(seen) == pytest.approx((0, 0, 0.3, 0, 0, 0))
    assert all(np.isnan(UR5Commission().speeds(window({}))))


@pytest.mark.parametrize(
    ("packet", "moved"),
    [
        ({}, False),
        ({"elbow_rad_s": 0.005}, False),
        ({"elbow_rad_s": -0.02}, True),
        ({"base_target_rad_s": 0.001}, True),
    ],
)
def test_motion_is_seen(packet: dict[str, float], moved: bool) -> None:
    values = window(packet).values[0].tolist()
    assert UR5Commission().moved(values, values) is moved


def test_packets_in_words() -> None:
    seen = window({"robot_mode": 7, "safety_mode": 1, "runtime_state": 2, "speed_scaling": 0.5, "elbow_rad": np.pi / 2})
    rows = {name: (value, unit) for name, value, unit in UR5Commission().rows(seen)[:18]}
    assert rows["elbow"] == ("0.000", "rad/s")
    assert ("elbow", "90.0", "°") in UR5Commission().rows(seen)
    assert ("safety mode", "NORMAL", "") in UR5Commission().rows(seen)
    assert UR5Commission().summary(seen) == (
        "robot mode RUNNING, safety mode NORMAL (the pendant slows the arm down to 50%)"
    )


def test_each_motion_moves_one_joint() -> None:
    for name, command in UR5Commission.motions:
        (joint,) = np.flatnonzero(command)
        assert name.startswith(commission.JOINT_NAMES[joint])
    assert len(UR5Commission.motions) == 10


def test_a_listener_hears_beside_whoever_drives(tmp_path: Path) -> None:
    with emulated(tmp_path) as controller:
        listener = Bystander(controller.host)
        try:
            sleep_s(0.3)
            packets = listener.packets()
            assert len(packets) > 20
            newest = dict(zip(SENSOR_COLUMNS, packets[-1][1], strict=True))
            assert [newest[f"{joint}_rad"] for joint in commission.JOINT_NAMES] == controller.state()["q"]
            assert newest["robot_mode"] == 7
            assert newest["speed_scaling"] == 1.0
            assert controller.state()["runtime_state"] == "STOPPED"
        finally:
            listener.close()


def test_a_controller_that_is_gone_is_one_line() -> None:
    with pytest.raises(StartError, match=r"127\.0\.0\.254 sends no packets"):
        Bystander("127.0.0.254")


@needs_library
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_simulated_arm_passes_commissioning(tmp_path: Path) -> None:
    with emulated(tmp_path) as controller:
        plan = TrialPlan(
            driver="relod.robots.ur5.driver:UR5Driver",
            address=controller.host,
            settings=RobotSettings(target="none"),
            safety=SafetySettings(),
            robot=UR5Commission(),
            log_path=tmp_path / "log",
        )
        with Console(quiet=True) as console:
            result = check.run_check(plan, None, console=console, confirm=lambda question: True)
        assert result.failures == []
        assert len(result.stops) == 6
