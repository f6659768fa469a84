"""The dashboard's answers, and what they do to the controller."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from relod.robots.ur5.controller import Controller
from relod.robots.ur5.dashboard import Dashboard
from relod.robots.ur5.states import ArmSettings, RobotMode, RuntimeState, SafetyMode
from relod.runtime.clock import NS_PER_S


def idle(_: Controller) -> Generator[None, None, None]:
    while True:
        yield


class Desk:
    """A controller and its dashboard."""

    def __init__(self) -> None:
        self.controller = Controller(ArmSettings(), start_ns=0)
        self.dashboard = Dashboard(self.controller)
        self.now_ns = 0

    def say(self, line: str, after_s: float = 0.0) -> str:
        self.now_ns += int(after_s * NS_PER_S)
        return self.dashboard.answer(line, self.now_ns)


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("PolyscopeVersion", "URSoftware 3.15.8.106339 (Jan 01 2024)"),
        ("version", "3.15.8.106339"),
        ("robotmode", "Robotmode: RUNNING"),
        (" RobotMode \r", "Robotmode: RUNNING"),
        ("safetymode", "Safetymode: NORMAL"),
        ("safetystatus", "Safetystatus: NORMAL"),
        ("programState", "STOPPED <unnamed>"),
        ("running", "Program running: false"),
        ("stop", "Stopped"),
        ("play", "Failed to execute: play"),
        ("pause", "Failed to execute: pause"),
        ("load reach.urp", "File not found: reach.urp"),
        ("addToLog hello", "Added log message"),
        ("close safety popup", "closing safety popup"),
        ("quit", "Disconnected"),
        ("", "could not understand: ''"),
        ("make tea", "could not understand: 'make tea'"),
    ],
)
def test_answers(desk: Desk, line: str, answer: str) -> None:
    assert desk.say(line) == answer


def test_power_and_brakes(desk: Desk) -> None:
    assert desk.say("power off") == "Powering off"
    assert desk.say("robotmode") == "Robotmode: POWER_OFF"
    assert desk.say("power on") == "Powering on"
    desk.controller.advance(NS_PER_S)
    assert desk.say("robotmode", 1.0) == "Robotmode: IDLE"
    assert desk.say("brake release") == "Brake releasing"
    desk.controller.advance(2 * NS_PER_S)
    assert desk.controller.robot_mode is RobotMode.RUNNING


def test_a_program_is_paused_played_and_stopped(desk: Desk) -> None:
    desk.controller.start_program("idle", idle, 0)
    desk.controller.advance(NS_PER_S)
    assert desk.say("programState", 1.0) == "PLAYING idle"
    assert desk.say("running") == "Program running: true"
    assert desk.say("pause") == "Pausing program"
    assert desk.say("running") == "Program running: false"
    assert desk.say("play") == "Starting program"
    assert desk.say("stop") == "Stopped"
    assert desk.controller.runtime_state is RuntimeState.STOPPED


def test_a_protective_stop_is_unlocked_after_five_seconds(desk: Desk) -> None:
    assert "not in protective stop" in desk.say("unlock protective stop")
    desk.controller.protective_stop("test", 0)
    assert desk.say("unlock protective stop", 4.9).startswith("Cannot unlock protective stop until 5s")
    assert desk.say("unlock protective stop", 0.1) == "Protective stop releasing"
    assert desk.controller.safety_mode is SafetyMode.NORMAL


def test_the_safety_system_is_restarted(desk: Desk) -> None:
    desk.controller.violate("test", 0)
    assert desk.say("restart safety") == "Restarting safety"
    assert desk.say("safetymode") == "Safetymode: NORMAL"
    assert desk.say("robotmode") == "Robotmode: POWER_OFF"


def test_remote_control_can_be_taken_away(desk: Desk) -> None:
    assert desk.say("is in remote control") == "true"
    desk.dashboard.remote_control = False
    assert desk.say("is in remote control") == "false"
