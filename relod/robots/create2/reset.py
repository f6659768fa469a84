"""The way of a Create 2 from any state to the start of an episode: charge, let go of the dock, back off, turn.

A generator of commands, one per cycle, that is sent the time and the newest packets: no clock, no I/O. A duration
ends with the first cycle at or after it, so it may be longer by up to one cycle. Every wait has a bound; where only
a person can help, it ends in a `SafetyStop` that says what to do, with the robot standing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Annotated, TypeAlias

import numpy as np
from msgspec import Meta

from ...config import Section
from ...errors import SafetyStop, SettingsError
from ...runtime.clock import NS_PER_S
from ...types import NO_REQUEST, Command, Reset, SensorWindow
from .driver import Request
from .oi import Bumps, ChargingSource, Mode

__all__ = ["STAND", "ResetSettings", "charging", "reset_routine", "wheels_dropped"]

STAND = Command(values=(0.0, 0.0))

WHEEL_DROPS = Bumps.WHEEL_DROP_LEFT | Bumps.WHEEL_DROP_RIGHT

# How long a mode change, a stop and the approach of a dock are given to take effect. SenseAct's Create 2 routines
# have the same pauses: 0.1 s after a command, 0.2 s around a change between SAFE and FULL, 0.75 s before docking.
SETTLE_S = 0.1
MODE_SETTLE_S = 0.2
BEFORE_DOCKING_S = 0.75

Tick: TypeAlias = tuple[int, SensorWindow]  # now in ns, newest packets
Moves: TypeAlias = Generator[Command, Tick, Tick]  # part of a reset; returns the tick it ended with


class ResetSettings(Section, frozen=True):
    """How the robot is brought to a start, and when it charges.

    Defaults are those of the ReLoD runs of February 2022; speeds are of both wheels.
    """

    reset_max_speed_mm_s: Annotated[
        float, Meta(gt=0, le=500, description="bound of every wheel speed in a reset, in mm/s")
    ] = 250.0
    back_off_mm_s: Annotated[float, Meta(gt=0, le=500, description="speed of backing away from the target")] = 150.0
    back_off_min_s: Annotated[float, Meta(ge=0, le=30, description="shortest time of backing off")] = 1.0
    back_off_max_s: Annotated[float, Meta(ge=0, le=30, description="longest time of backing off")] = 2.0
    turn_mm_s: Annotated[float, Meta(gt=0, le=500, description="wheel speed of the turn on the spot")] = 150.0
    turn_min_s: Annotated[float, Meta(ge=0, le=30, description="shortest time of turning")] = 1.0
    turn_max_s: Annotated[float, Meta(ge=0, le=30, description="longest time of turning")] = 3.0
    undock_mm_s: Annotated[float, Meta(gt=0, le=500, description="speed of leaving the dock, backwards")] = 250.0
    undock_s: Annotated[float, Meta(ge=0, le=10, description="time of leaving the dock")] = 0.75
    recover_mm_s: Annotated[float, Meta(gt=0, le=100, description="speed of backing out of a hazard, in FULL mode")] = (
        50.0
    )
    recover_s: Annotated[float, Meta(ge=0, le=2, description="time of backing out of a hazard")] = 0.5
    recover_tries: Annotated[
        int, Meta(ge=1, le=20, description="attempts to get back to SAFE mode before the run ends")
    ] = 5
    battery_low_mah: Annotated[int, Meta(ge=0, le=65535, description="charge at which a reset begins to charge")] = 1200
    battery_full_mah: Annotated[int, Meta(ge=0, le=65535, description="charge at which charging ends")] = 1850
    redock_every_s: Annotated[
        float, Meta(ge=1, le=50, description="time between dockings; the robot falls asleep after 60 s on its dock")
    ] = 10.0
    docking_limit_s: Annotated[
        float, Meta(gt=0, le=3600, description="how long the robot may look for its dock before the run ends")
    ] = 180.0
    # 650 mAh at the 1.1 to 1.3 A of the home base take about half an hour.
    charging_limit_s: Annotated[
        float, Meta(gt=0, le=86400, description="how long charging may take before the run ends")
    ] = 7200.0
    help_limit_s: Annotated[
        float, Meta(gt=0, le=86400, description="how long the robot waits for a person before the run ends")
    ] = 120.0

    def __post_init__(self) -> None:
        for low, high in (
            ("back_off_min_s", "back_off_max_s"),
            ("turn_min_s", "turn_max_s"),
            ("battery_low_mah", "battery_full_mah"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise SettingsError(
                    f"task.{low} = {getattr(self, low)} is above task.{high} = {getattr(self, high)}",
                    f"lower {low} or raise {high}",
                )
        for speed in ("back_off_mm_s", "turn_mm_s", "undock_mm_s", "recover_mm_s"):
            if getattr(self, speed) > self.reset_max_speed_mm_s:
                raise SettingsError(
                    f"task.{speed} = {getattr(self, speed):g} is above task.reset_max_speed_mm_s ="
                    f" {self.reset_max_speed_mm_s:g}",
                    f"lower {speed} or raise reset_max_speed_mm_s",
                )


def wheels_dropped(window: SensorWindow) -> bool:
    """Whether any packet of the window says that a wheel hangs in the air."""
    return bool((window.column("bumps_wheel_drops").astype(np.int64) & WHEEL_DROPS).any())


def charging(window: SensorWindow) -> ChargingSource:
    """The chargers the robot is connected to now; 0 for none."""
    return ChargingSource(int(window.newest("charging_sources")))


def reset_routine(settings: ResetSettings, rng: np.random.Generator) -> Reset:
    """One reset; `SafetyStop` where a person is needed and does not come."""
    back_off_s = rng.uniform(settings.back_off_min_s, settings.back_off_max_s)
    turn_s = rng.uniform(settings.turn_min_s, settings.turn_max_s)
    turn_mm_s = settings.turn_mm_s * (1.0 if rng.random() < 0.5 else -1.0)

    tick = yield STAND
    tick = yield from _hold(tick, STAND, SETTLE_S)
    tick = yield from _wait_for_floor(tick, settings)
    if tick[1].newest("battery_charge_mah") <= settings.battery_low_mah:
        tick = yield from _charge(tick, settings)
    tick = yield from _wait_for_unplugging(tick, settings)
    tick = yield from _hold(tick, _ask(Request.SAFE), SETTLE_S)
    if charging(tick[1]) & ChargingSource.HOME_BASE:
        tick = yield from _drive(tick, -settings.undock_mm_s, -settings.undock_mm_s, settings.undock_s)
    tick = yield from _drive(tick, -settings.back_off_mm_s, -settings.back_off_mm_s, back_off_s)
    tick = yield from _drive(tick, turn_mm_s, -turn_mm_s, turn_s)
    yield from _recover(tick, settings)


def _ask(request: Request) -> Command:
    return Command(values=STAND.values, request=int(request))


def _hold(
    tick: Tick, command: Command, duration_s: float, until: Callable[[SensorWindow], bool] | None = None
) -> Moves:
    """Keep `command` for `duration_s`, its request only once, or until the window says so."""
    end_ns = tick[0] + round(duration_s * NS_PER_S)
    while tick[0] < end_ns and not (until is not None and until(tick[1])):
        tick = yield command
        if command.request != NO_REQUEST:
            command = Command(values=command.values)
    return tick


def _drive(tick: Tick, left_mm_s: float, right_mm_s: float, duration_s: float) -> Moves:
    """Drive, then stand; a wheel that loses the floor ends the driving at once."""
    tick = yield from _hold(tick, Command(values=(left_mm_s, right_mm_s)), duration_s, until=wheels_dropped)
    return (yield from _hold(tick, STAND, SETTLE_S))


def _wait_for_floor(tick: Tick, settings: ResetSettings) -> Moves:
    """Stand until both wheels carry the robot."""
    tick = yield from _hold(tick, STAND, settings.help_limit_s, until=lambda window: not wheels_dropped(window))
    if wheels_dropped(tick[1]):
        raise SafetyStop(
            f"a wheel drop lasted {settings.help_limit_s:g} s; the robot stands", "put the robot back on the floor"
        )
    return tick


def _wait_for_unplugging(tick: Tick, settings: ResetSettings) -> Moves:
    """Stand until the charging cable is out of the robot's side: it does not drive with it."""
    tick = yield from _hold(
        tick, STAND, settings.help_limit_s, until=lambda window: not charging(window) & ChargingSource.INTERNAL
    )
    if charging(tick[1]) & ChargingSource.INTERNAL:
        raise SafetyStop(
            f"the charging cable was plugged in for {settings.help_limit_s:g} s; the robot stands",
            "unplug the cable from the robot's side",
        )
    return tick


def _charge(tick: Tick, settings: ResetSettings) -> Moves:
    """Find the dock and stay on it until the battery is full enough.

    The demand to dock is repeated, from SAFE, because a docking may fail and because a docked robot that is left
    alone falls asleep after 60 s and takes its sensor stream with it.
    """
    began_ns = contact_ns = tick[0]
    tick = yield from _hold(tick, STAND, BEFORE_DOCKING_S)
    while True:
        tick = yield from _hold(tick, _ask(Request.SAFE), SETTLE_S)
        tick = yield from _hold(tick, _ask(Request.SEEK_DOCK), SETTLE_S)
        round_end_ns = tick[0] + round(settings.redock_every_s * NS_PER_S)
        while tick[0] < round_end_ns:
            now_ns, window = tick
            if window.newest("battery_charge_mah") >= settings.battery_full_mah:
                return tick
            if charging(window):
                contact_ns = now_ns
            _bound_charging(window, settings, docking_ns=now_ns - contact_ns, total_ns=now_ns - began_ns)
            tick = yield STAND


def _bound_charging(window: SensorWindow, settings: ResetSettings, *, docking_ns: int, total_ns: int) -> None:
    battery = f"the battery holds {window.newest('battery_charge_mah'):.0f} mAh"
    if docking_ns > settings.docking_limit_s * NS_PER_S:
        raise SafetyStop(
            f"no dock found within {settings.docking_limit_s:g} s; {battery}",
            "put the robot on its dock, plugged in and with free view, or change the battery; then start again",
        )
    if total_ns > settings.charging_limit_s * NS_PER_S:
        raise SafetyStop(
            f"charging took longer than {settings.charging_limit_s:g} s; {battery}",
            f"check the dock's power and contacts, or lower task.battery_full_mah from {settings.battery_full_mah}",
        )


def _recover(tick: Tick, settings: ResetSettings) -> Moves:
    """Back to SAFE mode, out of whatever ended it: a cliff, a wheel drop, a new connection."""
    for _ in range(settings.recover_tries):
        tick = yield from _wait_for_floor(tick, settings)
        if tick[1].newest("oi_mode") == Mode.SAFE:
            return tick
        tick = yield from _hold(tick, _ask(Request.FULL), MODE_SETTLE_S)
        tick = yield from _drive(tick, -settings.recover_mm_s, -settings.recover_mm_s, settings.recover_s)
        tick = yield from _hold(tick, _ask(Request.SAFE), MODE_SETTLE_S)
    if tick[1].newest("oi_mode") == Mode.SAFE:
        return tick
    raise SafetyStop(
        f"the robot refused SAFE mode {settings.recover_tries} times (its mode is {tick[1].newest('oi_mode'):.0f}):"
        " a cliff, a wheel drop or a charger",
        "put the robot back on the floor, away from edges, and clean its cliff sensors",
    )
