"""The simulated UR controller: power, safety, programs and registers around one arm, in ticks.

Pure: no I/O and no clock. Every call brings the present in ns; what happens depends on the stamped calls only, never
on how often the controller was asked. A call takes effect at the next tick, 8 ms apart on a CB3 and 2 ms on an
e-Series. It serves the emulator, where a program uploaded over the wire moves the arm, and a world in virtual time,
which moves it by `begin`.

The arm moves only while the robot mode is RUNNING and the safety mode NORMAL. A protective stop and an open safeguard
pause program and motion; an emergency stop, a violation and a loss of power end them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator
from typing import TypeAlias

from ...runtime.clock import NS_PER_MS, NS_PER_S
from ...types import Witness
from .arm import ZERO, Arm, Motion, Vector6
from .states import SERIES, ArmSettings, Limits, MotionRecord, Registers, RobotMode, RuntimeState, SafetyMode, Sample

__all__ = ["HOME_Q", "MAX_JOINT_SPEED_RAD_S", "Controller", "Program", "ProgramError"]

HOME_Q: Vector6 = (0.0, -math.pi / 2, math.pi / 2, -math.pi / 2, -math.pi / 2, 0.0)
MAX_JOINT_SPEED_RAD_S = math.pi
SPEED_TOLERANCE = 1.05  # of the largest joint speed, before the safety system steps in
PROTECTIVE_STOP_NS = 5 * NS_PER_S  # how long a protective stop cannot be unlocked
POWER_NS = 500 * NS_PER_MS  # from a power command to its end [assumed]; a real arm takes several seconds
PROGRAM_START_NS = 50 * NS_PER_MS  # from a script's last byte to its first tick [assumed]
NOTES = 1024
MOTION_RECORDS = 65_536  # three quarters of an hour at one change per 40 ms cycle


class ProgramError(Exception):
    """Raised by a program that cannot go on; it ends the program, not the controller."""


# A program does one tick's work up to each `yield` and ends by returning.
Program: TypeAlias = Callable[["Controller"], Generator[None, None, None]]


class Controller:
    """One robot, switched on and standing at `q` when it starts; on the caller's clock, which never goes back."""

    def __init__(
        self, settings: ArmSettings, *, start_ns: int, q: Vector6 = HOME_Q, history_ns: int = NS_PER_S
    ) -> None:
        """`history_ns`: how far back `posture_at` may look."""
        series = SERIES[settings.series]
        self.version, self.tick_ns = series.version, series.tick_ns
        self.witness: Witness | None = None
        self._asked_ns: int | None = None  # when the newest numbers came that no program has read
        self.start_ns = start_ns
        self.now_ns = start_ns  # of the newest tick
        self.next_tick_ns = start_ns + self.tick_ns
        self.arm = Arm(q, tick_s=self.tick_ns / NS_PER_S, lag_s=settings.lag_ms / 1e3)
        self.limits = Limits()
        self.registers = Registers()
        self.robot_mode = RobotMode.RUNNING
        self.safety_mode = SafetyMode.NORMAL
        self.runtime_state = RuntimeState.STOPPED
        self.program_name = ""
        self.notes: deque[tuple[int, str]] = deque(maxlen=NOTES)  # (t_ns, what happened)
        self.motion_log: deque[MotionRecord] = deque(maxlen=MOTION_RECORDS)
        self._program: Generator[None, None, None] | None = None
        self._waiting: tuple[int, str, Program] | None = None  # a script on its way to being a program
        self._powering: tuple[int, RobotMode] | None = None
        self._stopped_ns = start_ns  # when the newest protective stop began
        self._watched = self._watchdog_ns = 0  # an input integer register and the longest time between writes, 0 = any
        self._fed_ns = start_ns
        self._samples: list[Sample] = []
        self._path = deque([q, q], maxlen=history_ns // self.tick_ns + 2)  # postures at ticks, the last at the next one
        self._logged = (0.0, False)  # the newest motion record: speed asked for, whether the arm moved

    # Time

    def advance(self, now_ns: int) -> list[Sample]:
        """Move to `now_ns`; a sample for each tick since the last call."""
        self._run(now_ns)
        samples, self._samples = self._samples, []
        return samples

    def posture_at(self, at_ns: int) -> Vector6:
        """Where the joints are at an instant up to the next tick; straight lines between ticks."""
        ticks_back = min(max(0.0, (self.next_tick_ns - at_ns) / self.tick_ns), len(self._path) - 1.0)
        back = math.floor(ticks_back)
        later, earlier = self._path[-1 - back], self._path[max(-2 - back, -len(self._path))]
        share = ticks_back - back
        a, b, c, d, e, f = (x + share * (y - x) for x, y in zip(later, earlier, strict=True))
        return a, b, c, d, e, f

    # Motion

    @property
    def can_move(self) -> bool:
        """Whether power, brakes and safety system let the arm move."""
        return self.robot_mode is RobotMode.RUNNING and self.safety_mode is SafetyMode.NORMAL

    @property
    def standing(self) -> bool:
        """Whether the arm stands."""
        return self.arm.standing

    def begin(self, motion: Motion | None, now_ns: int) -> bool:
        """Replace the arm's motion; None lets it brake. Returns False, and does nothing, when it must not move."""
        self._run(now_ns)
        if not self.can_move and motion is not None:
            return False
        self.arm.begin(motion)
        return True

    def place(self, q: Vector6, now_ns: int) -> None:
        """Put the arm at a posture, standing; its program, if any, ends."""
        self._run(now_ns)
        self.stop_program("the arm was put elsewhere", now_ns)
        self.arm.place(q)
        self._path[-1] = q

    # Programs

    def start_program(self, name: str, program: Program, now_ns: int) -> None:
        """Replace the running program; the new one starts 50 ms later if the robot can move then."""
        self._run(now_ns)
        self.stop_program("another was started", now_ns)
        self._waiting = (now_ns + PROGRAM_START_NS, name, program)

    def stop_program(self, reason: str, now_ns: int) -> None:
        """End the program; the arm brakes."""
        self._run(now_ns)
        self._end_program(reason, now_ns)

    def pause_program(self, now_ns: int) -> bool:
        """Hold program and motion; False when none plays."""
        self._run(now_ns)
        if self.runtime_state is not RuntimeState.PLAYING:
            return False
        self.runtime_state = RuntimeState.PAUSED
        return True

    def play(self, now_ns: int) -> bool:
        """Let a paused program go on, from where it was; False when there is none or the robot cannot move."""
        self._run(now_ns)
        if self.runtime_state is not RuntimeState.PAUSED or not self.can_move:
            return False
        self.runtime_state = RuntimeState.PLAYING
        self._fed_ns = now_ns
        return True

    def set_watchdog(self, register: int, frequency_hz: float, now_ns: int) -> None:
        """From now on the program ends when this input integer register is not written that often."""
        self._watched, self._watchdog_ns = register, round(NS_PER_S / frequency_hz)
        self._fed_ns = now_ns

    def write_int(self, register: int, value: int, now_ns: int) -> None:
        """Write an input integer register."""
        self._run(now_ns)
        self.registers.int_in[register] = value
        if register == self._watched:
            self._fed_ns = now_ns

    def write_double(self, register: int, value: float, now_ns: int) -> None:
        """Write an input double register."""
        self._run(now_ns)
        self.registers.double_in[register] = value
        self._asked_ns = now_ns

    # Power and safety

    def power_on(self, now_ns: int) -> None:
        """Power up to IDLE, brakes on."""
        self._power(RobotMode.POWER_OFF, RobotMode.POWER_ON, RobotMode.IDLE, now_ns)

    def release_brakes(self, now_ns: int) -> None:
        """From IDLE to RUNNING."""
        self._power(RobotMode.IDLE, RobotMode.IDLE, RobotMode.RUNNING, now_ns)

    def power_off(self, now_ns: int) -> None:
        """End the program and cut the arm's power."""
        self._run(now_ns)
        self._cut_power("power off", now_ns)

    def protective_stop(self, reason: str, now_ns: int) -> None:
        """Stop the arm for `reason`; its program is paused."""
        self._run(now_ns)
        self._stop_protectively(reason, now_ns)

    def may_unlock(self, now_ns: int) -> bool:
        """Whether a protective stop has lasted long enough to be unlocked."""
        return now_ns - self._stopped_ns >= PROTECTIVE_STOP_NS

    def unlock_protective_stop(self, now_ns: int) -> bool:
        """End a protective stop; the program stays paused. False when there is none, or before `may_unlock`."""
        self._run(now_ns)
        if self.safety_mode is not SafetyMode.PROTECTIVE_STOP or not self.may_unlock(now_ns):
            return False
        self._set_safety(SafetyMode.NORMAL, "unlocked", now_ns)
        return True

    def emergency_stop(self, pressed: bool, now_ns: int) -> None:
        """Press or release the robot's emergency stop. Released, it stays without power until it is switched on."""
        self._run(now_ns)
        if pressed:
            self._set_safety(SafetyMode.ROBOT_EMERGENCY_STOP, "button pressed", now_ns)
            self._cut_power("emergency stop", now_ns)
        elif self.safety_mode is SafetyMode.ROBOT_EMERGENCY_STOP:
            self._set_safety(SafetyMode.NORMAL, "button released", now_ns)

    def safeguard(self, is_open: bool, now_ns: int) -> None:
        """Open the safeguard (a door), which pauses the program, or close it, which lets it go on."""
        self._run(now_ns)
        if is_open and self.safety_mode is SafetyMode.NORMAL:
            self._set_safety(SafetyMode.SAFEGUARD_STOP, "safeguard opened", now_ns)
            self._pause()
        elif not is_open and self.safety_mode is SafetyMode.SAFEGUARD_STOP:
            self._set_safety(SafetyMode.NORMAL, "safeguard closed", now_ns)
            self.play(now_ns)

    def violate(self, reason: str, now_ns: int) -> None:
        """A safety violation: power is cut until `restart_safety`."""
        self._run(now_ns)
        self._set_safety(SafetyMode.VIOLATION, reason, now_ns)
        self._cut_power("violation", now_ns)

    def restart_safety(self, now_ns: int) -> None:
        """Start the safety system anew after a violation; the arm is without power then."""
        self._run(now_ns)
        if self.safety_mode is SafetyMode.VIOLATION:
            self._set_safety(SafetyMode.NORMAL, "restarted", now_ns)
            self._cut_power("safety system restarted", now_ns)

    def note(self, text: str, now_ns: int) -> None:
        """Remember what happened, for people."""
        self.notes.append((now_ns, text))

    # A tick

    def _run(self, now_ns: int) -> None:
        while self.next_tick_ns <= now_ns:
            self._tick(self.next_tick_ns)

    def _tick(self, now_ns: int) -> None:
        self.now_ns, self.next_tick_ns = now_ns, now_ns + self.tick_ns
        if self._powering is not None and now_ns >= self._powering[0]:
            self.robot_mode, self._powering = self._powering[1], None
        if self._waiting is not None and now_ns >= self._waiting[0]:
            self._load(now_ns)
        if self.runtime_state is RuntimeState.PLAYING and self._program is not None:
            self._step_program(self._program, now_ns)
            if self._asked_ns is not None and self.witness is not None:
                self.witness.obeyed(self._asked_ns, now_ns)
            self._asked_ns = None
        arm = self.arm
        modes = self.robot_mode, self.safety_mode, self.runtime_state
        self._samples.append(Sample(now_ns, arm.q, arm.qd, arm.target_q, arm.target_qd, arm.target_qdd, *modes))
        held = not self.can_move or self.runtime_state is RuntimeState.PAUSED
        arm.step(braking=held)
        self._path.append(arm.q)
        if arm.target_qd != ZERO and self.safety_mode is SafetyMode.NORMAL:
            self._guard(now_ns)
        self._log_motion(now_ns, 0.0 if held else arm.asked_rad_s)

    def _load(self, now_ns: int) -> None:
        assert self._waiting is not None
        _, name, program = self._waiting
        self._waiting = None
        if not self.can_move:
            self.note(f"{name} was not started: {self.robot_mode.name}, {self.safety_mode.name}", now_ns)
            return
        self.note(f"{name} started", now_ns)
        self.program_name, self.runtime_state = name, RuntimeState.PLAYING
        self._program = program(self)

    def _step_program(self, program: Generator[None, None, None], now_ns: int) -> None:
        try:
            next(program)
        except StopIteration:
            self._end_program("it came to its end", now_ns)
        except ProgramError as error:
            self._end_program(str(error), now_ns)
        if self._watchdog_ns and now_ns - self._fed_ns > self._watchdog_ns + self.tick_ns:
            self._end_program("its watchdog was not fed", now_ns)

    def _end_program(self, reason: str, now_ns: int) -> None:
        if self.runtime_state is not RuntimeState.STOPPED:
            self.note(f"{self.program_name} ended: {reason}", now_ns)
        self.runtime_state = RuntimeState.STOPPED
        self._program = self._waiting = None
        self._watchdog_ns = 0
        self.arm.begin(None)

    def _pause(self) -> None:
        """Hold the program and its motion; a motion without a program ends."""
        if self.runtime_state is RuntimeState.PLAYING:
            self.runtime_state = RuntimeState.PAUSED
        elif self._program is None:
            self.arm.begin(None)

    def _power(self, first: RobotMode, then: RobotMode, last: RobotMode, now_ns: int) -> None:
        self._run(now_ns)
        if self.robot_mode is first and self.safety_mode is SafetyMode.NORMAL:
            self.robot_mode = then
            self._powering = (now_ns + POWER_NS, last)

    def _cut_power(self, reason: str, now_ns: int) -> None:
        self._end_program(reason, now_ns)
        self.robot_mode, self._powering = RobotMode.POWER_OFF, None

    def _set_safety(self, mode: SafetyMode, reason: str, now_ns: int) -> None:
        self.safety_mode = mode
        self.note(f"safety mode {mode.name}: {reason}", now_ns)

    def _stop_protectively(self, reason: str, now_ns: int) -> None:
        if self.safety_mode is SafetyMode.NORMAL:
            self._set_safety(SafetyMode.PROTECTIVE_STOP, reason, now_ns)
            self._stopped_ns = now_ns
            self._pause()

    def _guard(self, now_ns: int) -> None:
        """Stop the arm when a joint leaves its range or is too fast. One that comes back into its range may."""
        limits, arm = self.limits, self.arm
        joints = zip(arm.target_q, arm.target_qd, limits.low, limits.high, strict=True)
        for number, (q, qd, low, high) in enumerate(joints):
            if (q > high and qd > 0) or (q < low and qd < 0):
                self._stop_protectively(f"joint {number} at its limit, {q:.3f} rad", now_ns)
            elif abs(qd) > MAX_JOINT_SPEED_RAD_S * SPEED_TOLERANCE:
                self._stop_protectively(f"joint {number} too fast, {qd:.3f} rad/s", now_ns)

    def _log_motion(self, now_ns: int, asked_rad_s: float) -> None:
        moving = not self.arm.standing
        if (asked_rad_s, moving) != self._logged:
            self._logged = asked_rad_s, moving
            self.motion_log.append(MotionRecord(now_ns, asked_rad_s, max(map(abs, self.arm.qd))))
