"""The script that RTDE clients upload, as a program of the simulated controller.

A client sends URScript text; this reads only which program it is and which registers it uses. The control script of
ur_rtde is played from its documented handshake: the command in input integer register 0 and its arguments in the
double registers; ready (1) and done (2) in output integer register 0, results in register 1, the progress of a
movement that nobody waits for in register 2. Other programs end at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator
from enum import IntEnum

from .arm import JOINTS, MoveJ, ServoJ, SpeedJ, StopJ, Vector6
from .controller import Controller, Program, ProgramError
from .outputs import tcp_pose

__all__ = ["CONTROL_SCRIPT", "READY", "Instruction", "read_script", "split_scripts"]

CONTROL_SCRIPT = "rtde_control"
SCRIPT_LIMIT_BYTES = 1 << 20

READY, DONE = 1, 2
NOTHING = 0  # the client has seen that its command is done


class Instruction(IntEnum):
    """Commands of the control script that the emulator knows; others end the program."""

    MOVE_J = 1
    SPEED_J = 9
    SERVO_J = 11
    SPEED_STOP = 15
    SERVO_STOP = 16
    STEP_TIME = 26
    PROTECTIVE_STOP = 31
    STOP_J = 34
    SET_WATCHDOG = 35
    JOINTS_WITHIN_LIMITS = 37
    TOOL_POSE = 43
    FORWARD_KINEMATICS = 44
    IS_STEADY = 47
    FLANGE_POSE = 58
    STOP_SCRIPT = 255


# Read at every tick and never acknowledged as done: the client sends the next without waiting.
STREAMED = frozenset({Instruction.SPEED_J, Instruction.SERVO_J, Instruction.STEP_TIME, Instruction.FLANGE_POSE})

_PROGRAM = re.compile(r"^\s*def\s+(\w+)\s*\(")
_END = re.compile(rb"^end[ \t]*\r?\n", re.MULTILINE)
_OFFSET = re.compile(r"reg_offset_int = # int register offset\s*\n(\d+)")


def split_scripts(data: bytes) -> tuple[list[str], bytes]:
    """Cut what a client sent into programs and single lines; returns them and what is not complete yet.

    Raises:
        ValueError: too much without an end.
    """
    scripts = []
    while data:
        if data.lstrip().startswith((b"def ", b"sec ")):
            found = _END.search(data)
            end = found.end() if found else 0
        else:
            end = data.find(b"\n") + 1
        if not end:
            break
        script, data = data[:end].decode("utf-8", "replace"), data[end:]
        if script.strip():
            scripts.append(script)
    if len(data) > SCRIPT_LIMIT_BYTES:
        raise ValueError(f"a script without an end after {len(data)} bytes")
    return scripts, data


def read_script(text: str) -> tuple[str, Program]:
    """A script's name, and the program that plays it."""
    found = _PROGRAM.match(text)
    name = found[1] if found else text.strip()[:40]
    if name != CONTROL_SCRIPT:
        return name, _unknown_program
    offset = _OFFSET.search(text)
    first_register = int(offset[1]) if offset else 0
    return name, lambda controller: _ControlScript(controller, first_register).run()


def _unknown_program(_: Controller) -> Generator[None, None, None]:
    yield
    raise ProgramError("this emulator plays the control script of ur_rtde only")


class _ControlScript:
    """One run of the control script; `first_register` is 0 or 24."""

    def __init__(self, controller: Controller, first_register: int) -> None:
        self._controller, self._arm = controller, controller.arm
        self._registers, self._first = controller.registers, first_register
        self._operations = 0  # movements that nobody waited for
        self._changes = 0  # of the progress register
        self._in_background = False  # such a movement is under way

    def run(self) -> Generator[None, None, None]:
        """Serve one command after the other; each `yield` ends a tick."""
        executed = False
        self._tell_progress(running=False)
        self._tell(0, READY)
        yield
        while True:
            if self._in_background and self._arm.motion is None:
                self._leave_background()
            command = self._registers.int_in[self._first]
            if command == NOTHING:
                executed = False
                self._tell(0, READY)
            elif command in STREAMED:
                self._stream(Instruction(command))
                self._tell(0, READY)
            elif not executed:
                if command == Instruction.STOP_SCRIPT:
                    return
                yield from self._execute(command)
                self._tell(0, DONE)
                executed = True
            yield

    def _stream(self, command: Instruction) -> None:
        match command:
            case Instruction.SPEED_J:
                self._claim(SpeedJ)
                self._arm.begin(SpeedJ(qd=self._joints(0), acceleration=self._positive(6)))
            case Instruction.SERVO_J:
                self._claim(ServoJ)
                self._arm.begin(ServoJ(q=self._joints(0), lookahead_s=self._positive(9)))
            case Instruction.STEP_TIME:
                self._answer([self._controller.tick_ns / 1e9])
            case Instruction.FLANGE_POSE:
                self._answer(tcp_pose(self._arm.q))

    def _execute(self, command: int) -> Generator[None, None, None]:
        """Play a command to its end, for as many ticks as it takes."""
        arm, controller = self._arm, self._controller
        match command:
            case Instruction.MOVE_J:
                self._leave_background()
                self._claim()
                arm.begin(MoveJ(q=self._joints(0), speed=self._positive(6), acceleration=self._positive(7)))
                yield from self._wait_or_leave()
            case Instruction.STOP_J:
                self._leave_background()
                arm.begin(StopJ(acceleration=self._positive(0)))
                yield from self._wait_or_leave()
            case Instruction.SPEED_STOP | Instruction.SERVO_STOP:
                arm.begin(StopJ(acceleration=self._positive(0)))
                yield from self._wait()
            case Instruction.PROTECTIVE_STOP:
                controller.protective_stop("the script asked for it", controller.now_ns)
                yield
            case Instruction.SET_WATCHDOG:
                controller.set_watchdog(self._first, self._positive(0), controller.now_ns)
            case Instruction.JOINTS_WITHIN_LIMITS:
                self._tell(1, controller.limits.allow(self._joints(0)))
            case Instruction.TOOL_POSE:
                self._answer(tcp_pose(arm.q))
            case Instruction.FORWARD_KINEMATICS:
                self._answer(tcp_pose(self._joints(0)))
            case Instruction.IS_STEADY:
                self._tell(1, arm.standing)
            case _:
                raise ProgramError(f"command {command} is not emulated")

    def _claim(self, *same: type) -> None:
        """URScript lets one thread at a time move the arm; a second ends the program."""
        if self._arm.motion is not None and not isinstance(self._arm.motion, same):
            raise ProgramError("another thread already moves the robot")

    def _wait_or_leave(self) -> Generator[None, None, None]:
        if self._registers.int_in[self._first + 1] == 1:
            self._in_background = True
            self._operations = (self._operations + 1) % 128
            self._tell_progress(running=True)
        else:
            yield from self._wait()

    def _leave_background(self) -> None:
        if self._in_background:
            self._in_background = False
            self._arm.begin(None)
            self._tell_progress(running=False)

    def _wait(self) -> Generator[None, None, None]:
        while self._arm.motion is not None:
            yield

    def _tell_progress(self, *, running: bool) -> None:
        """Bits 0 to 14 progress, 15 running, 16 to 22 changes of the register, 24 to 30 number of the operation."""
        self._changes = (self._changes + 1) % 128
        self._tell(2, (self._operations << 24) | (self._changes << 16) | (running << 15))

    def _tell(self, register: int, value: int) -> None:
        self._registers.int_out[self._first + register] = int(value)

    def _answer(self, values: list[float] | Vector6) -> None:
        self._registers.double_out[self._first : self._first + len(values)] = values

    def _joints(self, register: int) -> Vector6:
        first = self._first + register
        a, b, c, d, e, f = values = self._registers.double_in[first : first + JOINTS]
        if not all(map(math.isfinite, values)):
            raise ProgramError(f"joints cannot be {values}")
        return a, b, c, d, e, f

    def _positive(self, register: int) -> float:
        """A speed, an acceleration, a time or a frequency."""
        value = self._registers.double_in[self._first + register]
        if not 0 < value < math.inf:
            raise ProgramError(f"an argument must be positive and finite, not {value}")
        return value
