"""The simulated controller in virtual time: ticks, safety, programs, power."""

from __future__ import annotations

import math
from collections.abc import Generator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relod.robots.ur5.arm import MoveJ, SpeedJ, StopJ, Vector6
from relod.robots.ur5.controller import HOME_Q, Controller, ProgramError
from relod.robots.ur5.states import ArmSettings, Limits, RobotMode, RuntimeState, SafetyMode, Sample
from relod.runtime.clock import NS_PER_MS, NS_PER_S

START_NS = 5 * NS_PER_S
TICK_NS = 8 * NS_PER_MS
TURNING = SpeedJ(qd=(0.5, 0.0, 0.0, 0.0, 0.0, 0.0), acceleration=10.0)


def at(ms: float) -> int:
    return START_NS + round(ms * NS_PER_MS)


def new(lag_ms: float = 0.0) -> Controller:
    return Controller(ArmSettings(lag_ms=lag_ms), start_ns=START_NS)


def turn(controller: Controller) -> Generator[None, None, None]:
    """A program that turns the base for ever."""
    while True:
        controller.arm.begin(TURNING)
        yield


def speed(controller: Controller, ms: float) -> float:
    return controller.advance(at(ms))[-1].qd[0]


def notes(controller: Controller) -> str:
    return "\n".join(text for _, text in controller.notes)


def test_it_ticks_every_8_ms_and_takes_a_motion_over_at_the_next_tick() -> None:
    controller = new()
    assert [sample.t_ns for sample in controller.advance(at(25))] == [at(8), at(16), at(24)]
    assert controller.begin(TURNING, at(25))
    samples = controller.advance(at(48))
    assert [sample.t_ns for sample in samples] == [at(32), at(40), at(48)]
    assert [sample.target_qd[0] for sample in samples] == pytest.approx([0.0, 0.08, 0.16])  # 10 rad/s^2


def test_an_e_series_ticks_every_2_ms() -> None:
    controller = Controller(ArmSettings(series="e"), start_ns=START_NS)
    assert len(controller.advance(at(100))) == 50
    assert controller.version[0] == 5


@given(st.lists(st.integers(0, 900 * NS_PER_MS), max_size=30))
def test_what_happens_does_not_depend_on_how_often_it_is_asked(asked_ns: list[int]) -> None:
    def play(asked_ns: list[int]) -> list[Sample]:
        controller = new(lag_ms=16.0)
        events = {at(100): TURNING, at(333): StopJ(acceleration=2.0), at(700): MoveJ(q=HOME_Q, speed=1, acceleration=5)}
        samples = []
        for now_ns in sorted({*events, *(START_NS + t for t in asked_ns), at(900)}):
            if now_ns in events:
                controller.begin(events[now_ns], now_ns)
            else:
                samples += controller.advance(now_ns)
                controller.posture_at(now_ns)
        return samples

    assert play(asked_ns) == play([])


def test_postures_lie_on_straight_lines_between_ticks() -> None:
    controller = new()
    controller.begin(SpeedJ(qd=(0.5, 0.0, 0.0, 0.0, 0.0, 0.0), acceleration=1000.0), START_NS)
    samples = controller.advance(at(200))
    for sample in samples:
        assert controller.posture_at(sample.t_ns) == pytest.approx(sample.q)
    assert controller.posture_at(at(44))[0] == pytest.approx((samples[4].q[0] + samples[5].q[0]) / 2)
    assert controller.posture_at(at(204))[0] == pytest.approx(samples[-1].q[0] + 0.5 * 0.004)
    assert controller.posture_at(at(9999)) == controller.posture_at(at(208))


def test_postures_older_than_its_history_are_its_oldest() -> None:
    controller = Controller(ArmSettings(), start_ns=START_NS, history_ns=40 * NS_PER_MS)
    controller.begin(TURNING, START_NS)
    controller.advance(at(800))
    assert controller.posture_at(START_NS) == controller.posture_at(at(800 - 40))
    assert controller.posture_at(at(800 - 36))[0] > controller.posture_at(START_NS)[0]


# Safety


def test_a_protective_stop_ends_a_motion_and_lasts_five_seconds() -> None:
    controller = new()
    controller.begin(TURNING, at(0))
    assert speed(controller, 400) == pytest.approx(0.5)
    controller.protective_stop("test", at(400))
    assert not controller.begin(TURNING, at(420))
    assert speed(controller, 500) == 0.0
    assert not controller.unlock_protective_stop(at(5399))
    assert controller.safety_mode is SafetyMode.PROTECTIVE_STOP
    assert controller.unlock_protective_stop(at(5400))
    assert speed(controller, 6000) == 0.0  # what was asked for before does not come back
    assert controller.begin(TURNING, at(6000))
    assert speed(controller, 6400) == pytest.approx(0.5)


def test_a_protective_stop_pauses_the_program_until_it_is_played_on() -> None:
    controller = new()
    controller.start_program("turn", turn, at(0))
    assert speed(controller, 400) == pytest.approx(0.5)
    controller.protective_stop("test", at(400))
    controller.advance(at(500))
    assert (controller.runtime_state, controller.arm.standing) == (RuntimeState.PAUSED, True)
    assert not controller.play(at(600))
    controller.unlock_protective_stop(at(5400))
    assert speed(controller, 6000) == 0.0
    assert controller.play(at(6000))
    assert speed(controller, 6400) == pytest.approx(0.5)


@pytest.mark.parametrize("joint", range(6))
@pytest.mark.parametrize("side", [-1, 1])
def test_no_joint_goes_far_beyond_its_limit(joint: int, side: int) -> None:
    controller = new()
    controller.limits = Limits(low=tuple(q - 0.3 for q in HOME_Q), high=tuple(q + 0.3 for q in HOME_Q))
    qd = [0.0] * 6
    qd[joint] = side * 1.0
    controller.begin(SpeedJ(qd=tuple(qd), acceleration=10.0), at(0))
    controller.advance(at(2000))
    assert controller.safety_mode is SafetyMode.PROTECTIVE_STOP
    # One tick until it is seen and 1 rad/s at 15 rad/s^2.
    assert 0.3 < side * (controller.arm.q[joint] - HOME_Q[joint]) < 0.3 + 0.008 + 1 / 30 + 0.005
    assert f"joint {joint} at its limit" in notes(controller)
    # It may come back.
    controller.unlock_protective_stop(at(9000))
    assert controller.begin(MoveJ(q=HOME_Q, speed=1.0, acceleration=2.0), at(9000))
    controller.advance(at(12000))
    assert controller.arm.q == HOME_Q


def test_a_joint_that_is_too_fast_is_stopped() -> None:
    controller = new()
    controller.begin(SpeedJ(qd=(0.0, 0.0, 0.0, 0.0, 3.5, 0.0), acceleration=40.0), at(0))
    controller.advance(at(500))
    assert "joint 4 too fast" in notes(controller)
    assert controller.arm.standing


def test_an_emergency_stop_ends_the_program_and_leaves_the_arm_without_power() -> None:
    controller = new()
    controller.start_program("turn", turn, at(0))
    controller.advance(at(400))
    controller.emergency_stop(True, at(400))
    assert speed(controller, 500) == 0.0
    assert controller.runtime_state is RuntimeState.STOPPED
    assert controller.robot_mode is RobotMode.POWER_OFF
    controller.power_on(at(500))  # in vain
    assert controller.advance(at(1500))[-1].robot_mode is RobotMode.POWER_OFF
    controller.emergency_stop(False, at(1500))
    assert controller.safety_mode is SafetyMode.NORMAL
    assert not controller.can_move
    controller.power_on(at(2000))
    assert controller.advance(at(2100))[-1].robot_mode is RobotMode.POWER_ON
    assert controller.advance(at(2600))[-1].robot_mode is RobotMode.IDLE
    controller.release_brakes(at(2600))
    assert controller.advance(at(3200))[-1].robot_mode is RobotMode.RUNNING
    assert controller.can_move


def test_a_safeguard_holds_the_program_while_it_is_open() -> None:
    controller = new()
    controller.start_program("turn", turn, at(0))
    controller.advance(at(400))
    controller.safeguard(True, at(400))
    assert speed(controller, 600) == 0.0
    assert controller.runtime_state is RuntimeState.PAUSED
    assert controller.safety_mode is SafetyMode.SAFEGUARD_STOP
    controller.safeguard(False, at(600))
    assert speed(controller, 1000) == pytest.approx(0.5)


def test_after_a_violation_the_safety_system_must_be_restarted() -> None:
    controller = new()
    controller.violate("test", at(100))
    controller.power_on(at(200))
    assert controller.advance(at(1000))[-1].robot_mode is RobotMode.POWER_OFF
    controller.restart_safety(at(1000))
    controller.power_on(at(1000))
    assert controller.advance(at(1600))[-1].robot_mode is RobotMode.IDLE


# Programs


def test_a_program_starts_a_little_later_and_ends_when_another_comes() -> None:
    controller = new()
    controller.start_program("turn", turn, at(0))
    assert controller.advance(at(48))[-1].runtime_state is RuntimeState.STOPPED
    assert controller.advance(at(56))[-1].runtime_state is RuntimeState.PLAYING
    controller.start_program("again", turn, at(400))
    assert controller.runtime_state is RuntimeState.STOPPED
    assert speed(controller, 444) < 0.5
    controller.advance(at(464))
    assert (controller.program_name, controller.runtime_state) == ("again", RuntimeState.PLAYING)


def test_a_program_that_has_not_started_can_be_stopped() -> None:
    controller = new()
    controller.start_program("turn", turn, at(0))
    controller.stop_program("test", at(20))
    assert {sample.runtime_state for sample in controller.advance(at(400))} == {RuntimeState.STOPPED}


def test_a_program_that_fails_ends_alone() -> None:
    def fail(controller: Controller) -> Generator[None, None, None]:
        controller.arm.begin(TURNING)
        for _ in range(30):
            yield
        raise ProgramError("no solution")

    controller = new()
    controller.start_program("fail", fail, at(0))
    assert speed(controller, 200) == pytest.approx(0.5)
    assert speed(controller, 500) == 0.0
    assert controller.runtime_state is RuntimeState.STOPPED
    assert "fail ended: no solution" in notes(controller)
    assert controller.can_move


def test_a_program_that_returns_is_over() -> None:
    def short(_: Controller) -> Generator[None, None, None]:
        yield

    controller = new()
    controller.start_program("short", short, at(0))
    controller.advance(at(100))
    assert controller.runtime_state is RuntimeState.STOPPED


def test_a_program_is_not_started_on_a_robot_that_cannot_move() -> None:
    controller = new()
    controller.power_off(at(0))
    controller.start_program("turn", turn, at(100))
    controller.advance(at(400))
    assert controller.runtime_state is RuntimeState.STOPPED
    assert "turn was not started: POWER_OFF, NORMAL" in notes(controller)


def test_a_paused_program_moves_nothing_and_goes_on() -> None:
    controller = new()
    controller.start_program("turn", turn, at(0))
    controller.advance(at(400))
    assert controller.pause_program(at(400))
    assert not controller.pause_program(at(410))
    assert speed(controller, 600) == 0.0
    assert controller.play(at(600))
    assert speed(controller, 1000) == pytest.approx(0.5)


def test_the_watchdog_ends_a_program_whose_register_nobody_writes() -> None:
    controller = new()
    controller.start_program("turn", turn, at(0))
    controller.advance(at(100))
    controller.set_watchdog(0, 10.0, at(100))
    for ms in range(120, 1000, 40):
        controller.write_int(0, 9, at(ms))
        controller.write_int(1, 9, at(ms))
    assert controller.advance(at(1000))[-1].runtime_state is RuntimeState.PLAYING
    controller.write_int(1, 9, at(1100))  # another register does not count
    samples = controller.advance(at(1400))
    ended_ns = next(s.t_ns for s in samples if s.runtime_state is RuntimeState.STOPPED)
    stood_ns = next(s.t_ns for s in samples if s.qd[0] == 0.0)
    assert at(960 + 100) < ended_ns <= at(960 + 124)
    assert stood_ns <= at(960 + 124 + 40)
    assert "watchdog" in notes(controller)


def test_a_new_program_has_no_watchdog() -> None:
    controller = new()
    controller.start_program("turn", turn, at(0))
    controller.advance(at(100))
    controller.set_watchdog(0, 10.0, at(100))
    controller.start_program("turn", turn, at(110))
    assert controller.advance(at(2000))[-1].runtime_state is RuntimeState.PLAYING


# What is left behind


def test_the_motion_log_says_when_the_arm_moved() -> None:
    controller = new()
    controller.begin(TURNING, at(100))
    controller.begin(TURNING, at(200))  # nothing new
    controller.begin(StopJ(acceleration=5.0), at(300))
    controller.advance(at(1000))
    records = list(controller.motion_log)
    assert [(r.t_ns, r.asked_rad_s, r.speed_rad_s > 0) for r in records] == [
        (at(104), 0.5, True),
        (at(304), 0.0, True),
        (records[-1].t_ns, 0.0, False),
    ]
    assert at(304 + 90) < records[-1].t_ns <= at(304 + 112)  # 0.5 rad/s at 5 rad/s^2


def test_an_arm_put_elsewhere_stands_there() -> None:
    controller = new(lag_ms=16.0)
    controller.start_program("turn", turn, at(0))
    controller.advance(at(400))
    q: Vector6 = (1.0, -1.0, 1.0, -1.0, -1.0, 0.0)
    controller.place(q, at(400))
    assert controller.posture_at(at(408)) == q
    samples = controller.advance(at(600))
    assert {sample.q for sample in samples} == {q}
    assert {sample.qd for sample in samples} == {(0.0,) * 6}
    assert controller.runtime_state is RuntimeState.STOPPED


def test_home_is_where_it_starts() -> None:
    assert new().advance(at(8))[0].q == HOME_Q
    assert math.isclose(HOME_Q[1], -math.pi / 2)
