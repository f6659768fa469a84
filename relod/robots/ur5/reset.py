"""The way of a UR5 from any posture to the start of an episode: wait until it is well, go home, have a new target.

A generator of commands, one per cycle, that is sent the time and the newest packets: no clock, no I/O. Every wait has
a bound; where only a person can help, it ends in a `SafetyStop` that says what to do, with the arm standing.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeAlias

from ...errors import SafetyStop
from ...runtime.clock import NS_PER_S
from ...types import NO_REQUEST, Command, Reset, SensorWindow
from .arm import ZERO, Vector6
from .kinematics import ACCELERATION_RAD_S2, JOINT_NAMES, Fence
from .states import RobotMode, RuntimeState, SafetyMode
from .target import Place, request_for

__all__ = [
    "ANGLES",
    "SPEEDS",
    "STAND",
    "TARGET_ANGLES",
    "TARGET_SPEEDS",
    "ResetPlan",
    "joints",
    "reset_routine",
    "well",
]

ANGLES = tuple(f"{joint}_rad" for joint in JOINT_NAMES)
SPEEDS = tuple(f"{joint}_rad_s" for joint in JOINT_NAMES)
TARGET_ANGLES = tuple(f"{joint}_target_rad" for joint in JOINT_NAMES)
TARGET_SPEEDS = tuple(f"{joint}_target_rad_s" for joint in JOINT_NAMES)

STAND = Command(values=ZERO)

ARRIVED_RAD = 0.002  # a quarter of a pixel of the camera
STILL_RAD_S = 0.005
GAIN_PER_S = 6.0  # speed by the way left, near its end
ASK_AGAIN_NS = NS_PER_S
BRAKE_SHARE = 0.7  # of the arm's acceleration, so that delays do not carry it past

Tick: TypeAlias = tuple[int, SensorWindow]  # now in ns, newest packets
Moves: TypeAlias = Generator[Command, Tick, Tick]  # part of a reset; returns the tick it ended with


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetPlan:
    """What a reset is to reach, and within which time."""

    home: Vector6  # rad
    speed_rad_s: float  # of the joint with the longest way
    fence: Fence
    place: Place | None  # of the new target; None to leave it alone
    move_limit_s: float
    help_limit_s: float


def joints(window: SensorWindow, names: tuple[str, ...]) -> Vector6:
    """The newest values of six columns that are side by side."""
    first = window.names.index(names[0])
    a, b, c, d, e, f = window.values[-1, first : first + len(names)].tolist()
    return a, b, c, d, e, f


def well(window: SensorWindow) -> bool:
    """Whether the arm obeys: powered, no safety stop, program running."""
    return (
        window.newest("robot_mode") == RobotMode.RUNNING
        and window.newest("safety_mode") in (SafetyMode.NORMAL, SafetyMode.REDUCED)
        and window.newest("runtime_state") == RuntimeState.PLAYING
    )


def reset_routine(plan: ResetPlan) -> Reset:
    """One reset; `SafetyStop` where a person is needed and does not come."""
    request = request_for(plan.place) if plan.place is not None else NO_REQUEST
    tick = yield Command(values=ZERO, request=request)
    tick = yield from _wait_until_well(tick, plan)
    tick = yield from _go_home(tick, plan)
    if plan.place is not None:
        yield from _wait_for_target(tick, plan, request)


def _wait_until_well(tick: Tick, plan: ResetPlan) -> Moves:
    """Stand until the arm obeys."""
    give_up_ns = tick[0] + round(plan.help_limit_s * NS_PER_S)
    while not well(tick[1]):
        if tick[0] > give_up_ns:
            raise SafetyStop(
                f"the arm does not obey for {plan.help_limit_s:g} s: protective stop, no power, or its program ended",
                "look at its pendant",
            )
        tick = yield STAND
    return tick


def _wait_for_target(tick: Tick, plan: ResetPlan, request: int) -> Moves:
    """Stand until the target is painted. Asked again and again: a request is lost with the connection it came on."""
    ask_ns = tick[0] + ASK_AGAIN_NS
    give_up_ns = tick[0] + round(plan.help_limit_s * NS_PER_S)
    while tick[1].newest("target_shown") != request:
        now_ns = tick[0]
        if now_ns > give_up_ns:
            raise SafetyStop(
                f"no monitor has shown the new target for {plan.help_limit_s:g} s",
                "open the page of `relod target` on the monitor, full screen and in front; or leave the target where"
                " it is with --set task.move_target=false",
            )
        again = now_ns > ask_ns
        if again:
            ask_ns = now_ns + ASK_AGAIN_NS
        tick = yield Command(values=ZERO, request=request if again else NO_REQUEST)
    return tick


def _go_home(tick: Tick, plan: ResetPlan) -> Moves:
    """All joints straight to the home posture, the fence's rule observed."""
    give_up_ns = tick[0] + round(plan.move_limit_s * NS_PER_S)
    while True:
        now_ns, window = tick
        q, qd = joints(window, TARGET_ANGLES), joints(window, TARGET_SPEEDS)
        way = [home - at for home, at in zip(plan.home, q, strict=True)]
        length = max(map(abs, way))
        if length < ARRIVED_RAD and max(map(abs, qd)) < STILL_RAD_S:
            return tick
        if now_ns > give_up_ns:
            raise SafetyStop(
                f"a reset did not bring the arm home within {plan.move_limit_s:g} s: a joint is {length:.2f} rad off",
                "move the arm by hand to where it has free way to its home posture, then start again",
            )
        braking = math.sqrt(2 * BRAKE_SHARE * ACCELERATION_RAD_S2 * length)
        speed = min(plan.speed_rad_s, braking, GAIN_PER_S * length)
        a, b, c, d, e, f = (speed * part / length if length else 0.0 for part in way)
        tick = yield Command(values=plan.fence.limit(q, qd, (a, b, c, d, e, f)))
