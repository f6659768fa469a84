"""The control script's handshake in virtual time, register by register."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relod.robots.ur5.arm import Vector6
from relod.robots.ur5.controller import HOME_Q, Controller
from relod.robots.ur5.script import DONE, NOTHING, READY, Instruction, read_script, split_scripts
from relod.robots.ur5.states import ArmSettings, Limits, RuntimeState, SafetyMode
from relod.runtime.clock import NS_PER_MS

CONTROL = """def rtde_control():
    global reg_offset_int = # int register offset
{offset}
    while True:
        sync()
    end
end
"""
TURNED: Vector6 = (0.2, *HOME_Q[1:])


class Script:
    """A controller that plays the control script, and the registers as a client writes them."""

    def __init__(self, offset: int = 0) -> None:
        self.controller = Controller(ArmSettings(lag_ms=0.0), start_ns=0)
        self.offset = offset
        self.controller.start_program(*read_script(CONTROL.format(offset=offset)), 0)
        self.step(10)

    @property
    def now_ns(self) -> int:
        return self.controller.now_ns

    @property
    def state(self) -> int:
        return self.controller.registers.int_out[self.offset]

    @property
    def result(self) -> int:
        return self.controller.registers.int_out[self.offset + 1]

    @property
    def progress(self) -> int:
        return self.controller.registers.int_out[self.offset + 2]

    @property
    def playing(self) -> bool:
        return self.controller.runtime_state is RuntimeState.PLAYING

    @property
    def last_words(self) -> str:
        return self.controller.notes[-1][1]

    def step(self, ticks: int = 1) -> None:
        self.controller.advance(self.now_ns + ticks * self.controller.tick_ns)

    def send(self, command: int, *arguments: float, option: int = 0) -> None:
        for i, value in enumerate(arguments):
            self.controller.write_double(self.offset + i, value, self.now_ns)
        self.controller.write_int(self.offset + 1, option, self.now_ns)
        self.controller.write_int(self.offset, command, self.now_ns)

    def call(self, command: int, *arguments: float, option: int = 0, most: int = 1000) -> int:
        """Send a command, wait until it is done and say so; returns the ticks it took."""
        self.send(command, *arguments, option=option)
        ticks = 0
        while self.state != DONE and self.playing:
            assert ticks < most, f"command {command} is not done after {most} ticks"
            self.step()
            ticks += 1
        self.send(NOTHING)
        self.step()
        return ticks


@pytest.fixture
def script() -> Script:
    return Script()


def test_it_says_that_it_is_ready(script: Script) -> None:
    assert (script.playing, script.state) == (True, READY)


def test_a_command_is_done_when_it_is_played_to_its_end(script: Script) -> None:
    script.send(Instruction.MOVE_J, *TURNED, 1.0, 2.0)
    script.step(10)
    assert script.state == READY
    script.step(200)
    assert (script.state, script.controller.arm.q) == (DONE, TURNED)
    script.send(NOTHING)
    script.step()
    assert script.state == READY


def test_a_command_is_played_once_until_it_is_acknowledged(script: Script) -> None:
    script.send(Instruction.MOVE_J, *TURNED, 1.0, 2.0, option=1)
    script.step(200)
    assert (script.state, script.progress >> 24) == (DONE, 1)


def test_speeds_are_taken_over_at_every_tick_until_a_stop(script: Script) -> None:
    script.send(Instruction.SPEED_J, 0.5, 0, 0, 0, 0, 0, 10.0, 0.0)
    script.step(20)
    assert script.controller.arm.target_qd[0] == pytest.approx(0.5)
    assert script.state == READY  # the client does not wait
    script.controller.write_double(0, -0.5, script.now_ns)
    script.step(20)
    assert script.controller.arm.target_qd[0] == pytest.approx(-0.5)
    ticks = script.call(Instruction.SPEED_STOP, 5.0)
    assert script.controller.arm.standing
    assert ticks == pytest.approx(0.5 / 5.0 / 0.008, abs=2)


def test_servoing_and_its_stop(script: Script) -> None:
    script.send(Instruction.SERVO_J, *TURNED, 0.0, 0.0, 0.002, 0.1, 300.0)
    script.step(200)
    assert script.controller.arm.q == pytest.approx(TURNED, abs=1e-4)
    script.call(Instruction.SERVO_STOP, 10.0)
    assert script.controller.arm.standing


def test_a_move_in_the_background_reports_its_progress(script: Script) -> None:
    script.call(Instruction.MOVE_J, *TURNED, 1.0, 2.0, option=1, most=5)
    first = script.progress
    assert first & (1 << 15)
    script.step(200)
    assert script.controller.arm.q == TURNED
    assert not script.progress & (1 << 15)
    assert script.progress >> 24 == first >> 24 == 1
    script.call(Instruction.MOVE_J, *HOME_Q, 1.0, 2.0, option=1, most=5)
    assert script.progress >> 24 == 2


def test_a_stop_ends_a_move_in_the_background(script: Script) -> None:
    script.call(Instruction.MOVE_J, *TURNED, 1.0, 2.0, option=1)
    script.step(20)
    script.call(Instruction.STOP_J, 5.0)
    assert script.controller.arm.standing
    assert 0 < script.controller.arm.q[0] < 0.2
    assert not script.progress & (1 << 15)


def test_questions_are_answered_in_the_registers(script: Script) -> None:
    answers = script.controller.registers.double_out
    script.call(Instruction.IS_STEADY)
    assert script.result == 1
    script.controller.limits = Limits(low=(-1.9,) * 6, high=(1.9,) * 6)
    for q, within in ((HOME_Q, 1), ((3.0, *HOME_Q[1:]), 0)):
        script.call(Instruction.JOINTS_WITHIN_LIMITS, *q)
        assert script.result == within
    script.call(Instruction.TOOL_POSE)
    here = answers[:6]
    script.call(Instruction.FORWARD_KINEMATICS, *TURNED)
    assert answers[:6] != here
    assert answers[2] == pytest.approx(here[2])  # turning the base keeps the height
    script.send(Instruction.STEP_TIME)
    script.step()
    assert answers[0] == 0.008


def test_a_watchdog_set_by_the_script_watches_its_own_register() -> None:
    script = Script(offset=24)
    script.call(Instruction.SET_WATCHDOG, 10.0)
    for _ in range(50):
        script.controller.write_int(24, NOTHING, script.now_ns)
        script.step(10)
    assert script.playing
    for _ in range(3):
        script.controller.write_int(0, NOTHING, script.now_ns)
        script.step(10)
    assert not script.playing


def test_registers_of_the_upper_range() -> None:
    script = Script(offset=24)
    script.send(Instruction.SPEED_J, 0.5, 0, 0, 0, 0, 0, 10.0, 0.0)
    script.step(20)
    assert script.controller.arm.target_qd[0] == pytest.approx(0.5)


def test_the_script_ends_when_it_is_told_to(script: Script) -> None:
    script.send(Instruction.STOP_SCRIPT)
    script.step()
    assert not script.playing


def test_a_protective_stop_can_be_asked_for(script: Script) -> None:
    script.send(Instruction.PROTECTIVE_STOP)
    script.step(2)
    assert script.controller.safety_mode is SafetyMode.PROTECTIVE_STOP


# What ends the program


def test_two_threads_that_move_the_arm_are_an_error(script: Script) -> None:
    script.send(Instruction.SPEED_J, 0.5, 0, 0, 0, 0, 0, 10.0, 0.0)
    script.step(5)
    script.send(Instruction.MOVE_J, *TURNED, 1.0, 2.0)
    script.step(2)
    assert not script.playing
    assert "another thread already moves the robot" in script.last_words
    script.step(50)
    assert script.controller.arm.standing


def test_speeds_during_a_move_in_the_background_are_an_error(script: Script) -> None:
    script.call(Instruction.MOVE_J, *TURNED, 0.1, 2.0, option=1)
    script.send(Instruction.SPEED_J, 0.5, 0, 0, 0, 0, 0, 10.0, 0.0)
    script.step(2)
    assert not script.playing


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        (46, (0.0,) * 6, "command 46 is not emulated"),
        (Instruction.SPEED_J, (math.nan, 0, 0, 0, 0, 0, 1.0, 0.0), "joints cannot be"),
        (Instruction.SPEED_J, (0, 0, 0, 0, 0, 0, 0.0, 0.0), "must be positive and finite, not 0.0"),
        (Instruction.MOVE_J, (*HOME_Q, math.inf, 1.0), "must be positive and finite, not inf"),
        (Instruction.SET_WATCHDOG, (-1.0,), "must be positive and finite, not -1.0"),
    ],
)
def test_what_cannot_be_played_ends_the_program(
    script: Script, command: int, arguments: tuple[float, ...], words: str
) -> None:
    script.send(command, *arguments)
    script.step(2)
    assert not script.playing
    assert words in script.last_words


def test_other_programs_end_at_once() -> None:
    controller = Controller(ArmSettings(), start_ns=0)
    controller.start_program(*read_script("movej([0,0,0,0,0,0])\n"), 0)
    controller.advance(200 * NS_PER_MS)
    assert controller.runtime_state is RuntimeState.STOPPED
    assert controller.notes[-1][1].startswith("movej([0,0,0,0,0,0]) ended: this emulator plays the control script")


# Cutting the stream


@given(st.lists(st.sampled_from([CONTROL, "stopj(1)\n", "sec a():\n  x = 1\nend\n", "\n"])), st.lists(st.integers(0)))
def test_scripts_survive_any_cut_of_the_stream(sent: list[str], cuts: list[int]) -> None:
    stream = "".join(sent).encode()
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    rest, received = b"", []
    for start, end in itertools.pairwise(edges):
        scripts, rest = split_scripts(rest + stream[start:end])
        received += scripts
    assert [text.strip() for text in received] == [text.strip() for text in sent if text.strip()]
    assert not rest.strip()


def test_a_script_has_a_longest_length() -> None:
    with pytest.raises(ValueError, match="without an end"):
        split_scripts(b"def endless():\n" + b"  sync()\n" * 200_000)
