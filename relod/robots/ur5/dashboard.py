"""The dashboard server's answers: one line of text to one line of text. Pure.

The texts are those that clients compare with; where no client does, they are after the manual's.
"""

from __future__ import annotations

from collections.abc import Callable

from .controller import Controller
from .states import RuntimeState, SafetyMode

__all__ = ["GREETING", "QUIT", "Dashboard"]

GREETING = "Connected: Universal Robots Dashboard Server"
QUIT = "quit"
SERIAL_NUMBER = "20205500001"
MODEL = "UR5"


class Dashboard:
    """The dashboard of one controller. `remote_control` is whether the teach pendant leaves control to others."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self.remote_control = True
        self._answers: dict[str, Callable[[int], str]] = {
            "polyscopeversion": lambda _: f"URSoftware {self._version} (Jan 01 2024)",
            "version": lambda _: self._version,
            "get serial number": lambda _: SERIAL_NUMBER,
            "get robot model": lambda _: MODEL,
            "is in remote control": lambda _: _word(self.remote_control),
            "robotmode": lambda _: f"Robotmode: {controller.robot_mode.name}",
            "safetymode": lambda _: f"Safetymode: {controller.safety_mode.name}",
            "safetystatus": lambda _: f"Safetystatus: {controller.safety_mode.name}",
            "programstate": lambda _: f"{controller.runtime_state.name} {controller.program_name or '<unnamed>'}",
            "running": lambda _: f"Program running: {_word(controller.runtime_state is RuntimeState.PLAYING)}",
            "isprogramsaved": lambda _: "true <unnamed>",
            "get loaded program": lambda _: "No program loaded",
            "play": lambda now_ns: "Starting program" if controller.play(now_ns) else "Failed to execute: play",
            "pause": lambda now_ns: (
                "Pausing program" if controller.pause_program(now_ns) else "Failed to execute: pause"
            ),
            "stop": self._stop,
            "power on": self._power_on,
            "power off": self._power_off,
            "brake release": self._release_brakes,
            "unlock protective stop": self._unlock,
            "restart safety": self._restart_safety,
            "close popup": lambda _: "closing popup",
            "close safety popup": lambda _: "closing safety popup",
            QUIT: lambda _: "Disconnected",
        }

    def answer(self, line: str, now_ns: int) -> str:
        """The answer to a command, in whatever case it is written."""
        command = line.strip()
        if (answer := self._answers.get(command.lower())) is not None:
            return answer(now_ns)
        if command.lower().startswith("popup "):
            return "showing popup"
        if command.lower().startswith("addtolog "):
            return "Added log message"
        if command.lower().startswith("load "):
            return f"File not found: {command[5:]}"
        return f"could not understand: '{command}'"

    @property
    def _version(self) -> str:
        return ".".join(map(str, self._controller.version))

    def _stop(self, now_ns: int) -> str:
        self._controller.stop_program("dashboard", now_ns)
        return "Stopped"

    def _power_on(self, now_ns: int) -> str:
        self._controller.power_on(now_ns)
        return "Powering on"

    def _power_off(self, now_ns: int) -> str:
        self._controller.power_off(now_ns)
        return "Powering off"

    def _release_brakes(self, now_ns: int) -> str:
        self._controller.release_brakes(now_ns)
        return "Brake releasing"

    def _restart_safety(self, now_ns: int) -> str:
        self._controller.restart_safety(now_ns)
        return "Restarting safety"

    def _unlock(self, now_ns: int) -> str:
        controller = self._controller
        if controller.safety_mode is not SafetyMode.PROTECTIVE_STOP:
            return "Cannot unlock protective stop. Robot is not in protective stop"
        if not controller.unlock_protective_stop(now_ns):
            return (
                "Cannot unlock protective stop until 5s after occurrence. "
                "Always inspect cause of protective stop before unlocking"
            )
        return "Protective stop releasing"


def _word(yes: bool) -> str:
    return "true" if yes else "false"
