"""The simulated Create 2: wheels, walls, light bumpers, battery, and how late everything is. Pure, in its own time.

World frame: origin at the middle of the arena, x along its long side, y to the left of x; heading 0 looks along +x.
Time is cut into substeps of 5 ms on a grid that starts at `start_ns`. A command acts on substeps that begin at or
after the moment it takes effect, so the trajectory depends on what was commanded when, never on how often or how
late `advance` was called. The physics is plain Python floats and `math`: the same on every machine of one libm.

Numbers marked [assumed] were never measured on a robot and are settings where they matter.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from msgspec import Meta

from ...config import Section
from ...seeds import random_stream
from .oi import MAX_SPEED_MM_S, MM_PER_COUNT, Bumps

__all__ = ["ARENA_LENGTH_M", "ARENA_WIDTH_M", "DOCK_POSE", "PRESETS", "Plant", "PlantSettings", "Pose", "WheelRecord"]

ARENA_LENGTH_M = 1.10  # along x, between the walls
ARENA_WIDTH_M = 0.70  # along y
BODY_RADIUS_M = 0.3485 / 2
WHEEL_BASE_M = 0.235

SUBSTEP_NS = 5_000_000
SUBSTEPS_PER_TICK = 3  # the robot's own 15 ms
HISTORY = 128  # substeps kept for the camera: 0.64 s, four times the longest delay of the harsh preset's camera
WHEEL_RECORDS = 65_536  # of the wheel log: three quarters of an hour at one change per 45 ms cycle

_DT_S = SUBSTEP_NS / 1e9
_TICK_S = SUBSTEPS_PER_TICK * _DT_S
_HALF_X_M, _HALF_Y_M = ARENA_LENGTH_M / 2, ARENA_WIDTH_M / 2
_FREE_X_M, _FREE_Y_M = _HALF_X_M - BODY_RADIUS_M, _HALF_Y_M - BODY_RADIUS_M  # where the centre can be

# A wheel asked to stand that is slower than this stands [assumed]: a third of the least speed the robot can set,
# and too slow for its encoders to show a count in 45 ms.
STICTION_M_S = 0.010
BUMPER_TRAVEL_M = 0.002  # from touching to the switch [assumed]
BUMPER_HALF_ANGLE_RAD = math.radians(95)
BUMPER_OVERLAP_RAD = 0.25  # a hit within this bearing of straight ahead closes both switches [assumed]

# Six infrared beams at these bearings, left to right [assumed; the Create 3's are at 0, ±25, ±50 and ±75 degrees].
_BEAMS = tuple((math.cos(math.radians(b)), math.sin(math.radians(b))) for b in (65, 38, 13, -13, -38, -65))
_BEAM_ORIGIN_M = 0.97 * BODY_RADIUS_M - 0.006  # where a beam's distance counts from, along it [assumed]
LIGHT_AMBIENT = 4.2  # signal = 4.2 + K / distance², the law by which SenseAct turns the signal into a distance
LIGHT_MAX = 4095

IDLE_CURRENT_A = 0.28  # [assumed]
DRIVE_CURRENT_A_PER_M_S = 0.9  # for each wheel [assumed]
CHARGE_CURRENT_A = 1.2  # [assumed]

DOCK_REACH_M = 0.02  # how exactly the robot must stand for the contacts to touch
DOCK_REACH_RAD = math.radians(12)


class PlantSettings(Section, frozen=True):
    """The simulated robot: dynamics, noise, delays, battery. Defaults are the `nominal` preset."""

    command_latency_ms: Annotated[
        float, Meta(ge=0, le=100, description="from the end of a command on the wire to the robot's tick")
    ] = 1.5
    command_tick_ms: Annotated[
        float, Meta(ge=0, le=100, description="the robot's tick, of which a command waits a random part")
    ] = 15.0
    sensor_latency_min_ms: Annotated[
        float, Meta(ge=0, le=100, description="least time from a sensor reading to its last byte at the host")
    ] = 4.0
    sensor_latency_max_ms: Annotated[float, Meta(ge=0, le=100, description="most such time")] = 8.0
    wheel_tau_ms: Annotated[float, Meta(ge=0, le=1000, description="time constant of a wheel's speed")] = 60.0
    wheel_tau_spread: Annotated[
        float, Meta(ge=0, le=0.9, description="how far the seed may move that time constant, as a fraction")
    ] = 0.3
    wheel_acceleration_m_s2: Annotated[float, Meta(gt=0, description="most a wheel accelerates")] = 1.0
    wheel_quantum_mm_s: Annotated[
        float, Meta(ge=0, le=100, description="steps in which the robot sets wheel speeds; 0 = none")
    ] = 28.5
    wheel_bias: Annotated[
        float, Meta(ge=0, le=0.2, description="standard deviation of a wheel's lasting gain error")
    ] = 0.012
    wheel_slip: Annotated[float, Meta(ge=0, le=0.5, description="standard deviation of its slip in each tick")] = 0.015
    wall_drag: Annotated[float, Meta(ge=0, le=1, description="part of the sliding speed that a wall takes")] = 0.35
    light_gain_m2: Annotated[float, Meta(gt=0, description="K of the light bumpers' signal 4.2 + K/d²")] = 0.40
    light_noise: Annotated[float, Meta(ge=0, le=1, description="their noise as a fraction of the signal")] = 0.03
    light_noise_counts: Annotated[float, Meta(ge=0, le=100, description="their noise in counts")] = 2.0
    battery_capacity_mah: Annotated[float, Meta(gt=0, le=65535, description="of a full battery")] = 2696.0
    battery_charge_mah: Annotated[float, Meta(ge=0, le=65535, description="charge at the start")] = 2500.0
    charge_speedup: Annotated[float, Meta(gt=0, description="how many times faster than real it charges")] = 1.0
    sleep_s: Annotated[float, Meta(gt=0, description="time without commands after which PASSIVE falls asleep")] = 300.0
    dock_sleep_s: Annotated[float, Meta(gt=0, description="the same on the home base")] = 60.0


PRESETS: dict[str, dict[str, Any]] = {
    "ideal": {
        "command_latency_ms": 0.0,
        "command_tick_ms": 0.0,
        "sensor_latency_min_ms": 0.0,
        "sensor_latency_max_ms": 0.0,
        "wheel_tau_spread": 0.0,
        "wheel_quantum_mm_s": 0.0,
        "wheel_bias": 0.0,
        "wheel_slip": 0.0,
        "light_noise": 0.0,
        "light_noise_counts": 0.0,
    },
    "nominal": {},
    "harsh": {
        "command_latency_ms": 6.0,
        "sensor_latency_max_ms": 20.0,  # the 16 ms latency timer of a USB serial adapter left at its default
        "wheel_tau_ms": 80.0,
        "wheel_bias": 0.03,
        "wheel_slip": 0.04,
        "wall_drag": 0.6,
        "light_noise": 0.08,
        "light_noise_counts": 5.0,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pose:
    """Where the robot is and how it moves; the heading is not wrapped."""

    x_m: float
    y_m: float
    heading_rad: float
    speed_m_s: float = 0.0
    turn_rad_s: float = 0.0


DOCK_POSE = Pose(x_m=-_FREE_X_M, y_m=0.0, heading_rad=math.pi)  # docked: nose at the middle of the -x wall


class WheelRecord(NamedTuple):
    """One line of the wheel log: a new request, or the moment the wheels began to turn or came to stand."""

    t_ns: int
    requested_left_mm_s: float
    requested_right_mm_s: float
    left_mm_s: float
    right_mm_s: float


class _Draws:
    """Random numbers drawn a thousand at a time, for a call of NumPy's generator costs more than a substep."""

    def __init__(self, draw: Callable[[int], Any], together: int) -> None:
        self._draw, self._together = draw, together
        self._values: list[float] = []
        self._at = 0

    def take(self) -> list[float]:
        """The next `together` numbers."""
        if self._at == len(self._values):
            self._values = self._draw(self._together * 256).tolist()
            self._at = 0
        self._at += self._together
        return self._values[self._at - self._together : self._at]


class Plant:
    """Robot and arena. `seed` fixes every random number; `pose` is random where it is not given."""

    def __init__(self, settings: PlantSettings, seed: int, *, start_ns: int = 0, pose: Pose | None = None) -> None:
        self.settings = settings
        self.start_ns = start_ns
        self.dock_present = True
        self.charging = False  # the firmware decides: power flows only in PASSIVE
        self.battery_mah = min(settings.battery_charge_mah, settings.battery_capacity_mah)
        self.requested_left_mm_s = self.requested_right_mm_s = 0.0
        self.rolled_left_m = self.rolled_right_m = 0.0  # what the encoders see
        self.wheel_log: deque[WheelRecord] = deque(maxlen=WHEEL_RECORDS)
        self._substep_index = 0
        self._commands: deque[tuple[int, float, float]] = deque()  # (effective_ns, left, right) in m/s
        self.commands = 0  # of motion, so far
        self.effective_ns = start_ns  # from when on the wheels follow the newest of them
        self._target_left = self._target_right = 0.0
        self._left = self._right = 0.0  # speeds at the wheels' rims in m/s
        self._draw_world(seed)
        self._history: deque[tuple[float, float, float, float, float]] = deque(maxlen=HISTORY)
        pose = pose or self._random_pose(seed)
        self._x, self._y, self._heading = _clamp(pose.x_m, _FREE_X_M), _clamp(pose.y_m, _FREE_Y_M), pose.heading_rad
        self._speed = self._turn = 0.0
        self._history.append((self._x, self._y, self._heading, 0.0, 0.0))

    def _draw_world(self, seed: int) -> None:
        s = self.settings
        wheels = random_stream(seed, "plant.wheels")
        bias = 1.0 + s.wheel_bias * wheels.standard_normal(2)
        self._bias_left, self._bias_right = float(bias[0]), float(bias[1])
        self._grip_left, self._grip_right = self._bias_left, self._bias_right
        tau_s = s.wheel_tau_ms / 1e3 * (1.0 + s.wheel_tau_spread * float(wheels.uniform(-1.0, 1.0)))
        self._response = _DT_S / (tau_s + _DT_S)  # implicit Euler: stable for every time constant
        self._most_change = s.wheel_acceleration_m_s2 * _DT_S
        self._slips = _Draws(random_stream(seed, "plant.slip").standard_normal, 2)
        self._light_noise = _Draws(random_stream(seed, "plant.light").standard_normal, len(_BEAMS))
        self._command_waits = _Draws(random_stream(seed, "plant.command").random, 1)
        self._sensor_waits = _Draws(random_stream(seed, "plant.sensor").random, 1)

    def _random_pose(self, seed: int) -> Pose:
        u, v, w = random_stream(seed, "plant.start").uniform(-1.0, 1.0, 3).tolist()
        margin_m = 0.01
        return Pose(x_m=u * (_FREE_X_M - margin_m), y_m=v * (_FREE_Y_M - margin_m), heading_rad=w * math.pi)

    @property
    def now_ns(self) -> int:
        """Plant time: the grid point up to which everything has happened."""
        return self.start_ns + self._substep_index * SUBSTEP_NS

    @property
    def pose(self) -> Pose:
        """The pose at `now_ns`."""
        return Pose(x_m=self._x, y_m=self._y, heading_rad=self._heading, speed_m_s=self._speed, turn_rad_s=self._turn)

    @property
    def left_mm_s(self) -> float:
        """Speed of the left wheel's rim; over ground it may slip."""
        return self._left * 1e3

    @property
    def right_mm_s(self) -> float:
        """Speed of the right wheel's rim."""
        return self._right * 1e3

    @property
    def standing(self) -> bool:
        """Whether both wheels stand and nothing they were told makes them turn again."""
        return not (self._left or self._right or self._target_left or self._target_right or self._commands)

    def command(self, at_ns: int, left_mm_s: float, right_mm_s: float) -> None:
        """Ask for wheel speeds with a command that was on the wire until `at_ns`; clamped to ±500 mm/s."""
        left, right = _clamp(left_mm_s, MAX_SPEED_MM_S), _clamp(right_mm_s, MAX_SPEED_MM_S)
        s = self.settings
        delay_ms = s.command_latency_ms + s.command_tick_ms * self._command_waits.take()[0]
        self.commands += 1
        self.effective_ns = max(self.effective_ns, at_ns + int(delay_ms * 1e6))
        self._commands.append((self.effective_ns, self._quantised(left), self._quantised(right)))
        if left != self.requested_left_mm_s or right != self.requested_right_mm_s:
            self.requested_left_mm_s, self.requested_right_mm_s = left, right
            self._log(at_ns)

    def _quantised(self, mm_s: float) -> float:
        quantum = self.settings.wheel_quantum_mm_s
        return (round(mm_s / quantum) * quantum if quantum else mm_s) / 1e3

    def sensor_delay_ns(self) -> int:
        """Draw the time from the next sensor reading to its last byte at the host."""
        s = self.settings
        span_ms = max(0.0, s.sensor_latency_max_ms - s.sensor_latency_min_ms)
        return int((s.sensor_latency_min_ms + span_ms * self._sensor_waits.take()[0]) * 1e6)

    def place(self, pose: Pose) -> None:
        """Put the robot somewhere else, standing, its commands forgotten. Earlier poses stay what they were."""
        self._x, self._y = _clamp(pose.x_m, _FREE_X_M), _clamp(pose.y_m, _FREE_Y_M)
        self._heading = pose.heading_rad
        self._left = self._right = self._target_left = self._target_right = self._speed = self._turn = 0.0
        self.requested_left_mm_s = self.requested_right_mm_s = 0.0
        self._commands.clear()
        self._history[-1] = (self._x, self._y, self._heading, 0.0, 0.0)
        self._log(self.now_ns)

    def pose_at(self, t_ns: int) -> Pose:
        """The pose at `t_ns`: the last grid point carried on at its speed, so later substeps never change it.

        Times before the history (0.64 s) give its oldest pose, times ahead of the plant one substep at most.
        """
        index, past_ns = divmod(t_ns - self.start_ns, SUBSTEP_NS)
        age = self._substep_index - index
        if age < 0:
            age, past_ns = 0, SUBSTEP_NS
        elif age >= len(self._history):
            age, past_ns = len(self._history) - 1, 0
        x, y, heading, speed, turn = self._history[-1 - age]
        ahead_s = past_ns / 1e9
        return Pose(
            x_m=x + speed * ahead_s * math.cos(heading),
            y_m=y + speed * ahead_s * math.sin(heading),
            heading_rad=heading + turn * ahead_s,
            speed_m_s=speed,
            turn_rad_s=turn,
        )

    def advance(self, now_ns: int) -> None:
        """Run every substep that ends at or before `now_ns`; earlier times do nothing."""
        for _ in range((now_ns - self.start_ns) // SUBSTEP_NS - self._substep_index):
            self._substep()

    def _substep(self) -> None:
        if self._commands:
            self._take_commands()
        if self._substep_index % SUBSTEPS_PER_TICK == 0:
            self._tick()
        self._substep_index += 1
        left = self._respond(self._left, self._target_left)
        right = self._respond(self._right, self._target_right)
        was_standing = not (self._left or self._right)
        self._left, self._right = left, right
        if left or right:
            self._move(left, right)
        else:
            self._speed = self._turn = 0.0
        self._history.append((self._x, self._y, self._heading, self._speed, self._turn))
        if was_standing == bool(left or right):
            self._log(self.now_ns)

    def _take_commands(self) -> None:
        now_ns, commands = self.now_ns, self._commands
        while commands and commands[0][0] <= now_ns:
            _, self._target_left, self._target_right = commands.popleft()

    def _tick(self) -> None:
        """What changes once per 15 ms: slip and charge."""
        s = self.settings
        slip = self._slips.take()
        self._grip_left = self._bias_left + s.wheel_slip * slip[0]
        self._grip_right = self._bias_right + s.wheel_slip * slip[1]
        change_mah = self.battery_current_a * _TICK_S * (s.charge_speedup if self.charging else 1.0) / 3.6
        self.battery_mah = min(s.battery_capacity_mah, max(0.0, self.battery_mah + change_mah))

    @property
    def battery_current_a(self) -> float:
        """Current into the battery; negative while the robot draws."""
        if self.charging:
            return CHARGE_CURRENT_A
        return -(IDLE_CURRENT_A + DRIVE_CURRENT_A_PER_M_S * (abs(self._left) + abs(self._right)))

    def _respond(self, speed: float, target: float) -> float:
        """A wheel's next speed: first order, limited in acceleration."""
        if speed == target:
            return speed
        if target == 0.0 and -STICTION_M_S < speed < STICTION_M_S:
            return 0.0
        change, most = (target - speed) * self._response, self._most_change
        return speed + (most if change > most else -most if change < -most else change)

    def _move(self, left: float, right: float) -> None:
        self.rolled_left_m += left * _DT_S
        self.rolled_right_m += right * _DT_S
        left *= self._grip_left
        right *= self._grip_right
        speed = (left + right) / 2
        turn = (right - left) / WHEEL_BASE_M
        middle = self._heading + turn * _DT_S / 2
        x = self._x + speed * _DT_S * math.cos(middle)
        y = self._y + speed * _DT_S * math.sin(middle)
        if -_FREE_X_M <= x <= _FREE_X_M and -_FREE_Y_M <= y <= _FREE_Y_M:
            self._x, self._y = x, y
        else:
            speed, turn = self._slide(x, y, speed, turn)
        self._speed, self._turn = speed, turn
        self._heading += turn * _DT_S

    def _slide(self, x: float, y: float, speed: float, turn: float) -> tuple[float, float]:
        """Meet a wall: no penetration, friction along it and, half as strong, against turning."""
        keep = 1.0 - self.settings.wall_drag
        hit_x, hit_y = abs(x) > _FREE_X_M, abs(y) > _FREE_Y_M
        if hit_x:
            y = self._y + (y - self._y) * keep
        if hit_y:
            x = self._x + (x - self._x) * keep
        x, y = _clamp(x, _FREE_X_M), _clamp(y, _FREE_Y_M)
        moved_m_s = math.hypot(x - self._x, y - self._y) / _DT_S
        self._x, self._y = x, y
        return math.copysign(moved_m_s, speed), turn * (1.0 - self.settings.wall_drag / 2)

    def bumps(self) -> int:
        """The bumper's bits of packet 7: a wall within the bumper's travel, in front."""
        bits = 0
        gap_x, gap_y = _FREE_X_M - abs(self._x), _FREE_Y_M - abs(self._y)
        if gap_x < BUMPER_TRAVEL_M:
            bits |= self._bumper_bits(0.0 if self._x > 0 else math.pi)
        if gap_y < BUMPER_TRAVEL_M:
            bits |= self._bumper_bits(math.copysign(math.pi / 2, self._y))
        return bits

    def _bumper_bits(self, direction_rad: float) -> int:
        bearing = _wrapped(direction_rad - self._heading)
        if abs(bearing) > BUMPER_HALF_ANGLE_RAD:
            return 0
        left = Bumps.BUMP_LEFT.value if bearing > -BUMPER_OVERLAP_RAD else 0
        return left | (Bumps.BUMP_RIGHT.value if bearing < BUMPER_OVERLAP_RAD else 0)

    def light_bumps(self) -> list[int]:
        """Read the six light bumpers, left to right, with fresh noise.

        About 5 across the arena, 40 at 10 cm, 1500 to 3200 touching.
        """
        s, x, y = self.settings, self._x, self._y
        cos_h, sin_h = math.cos(self._heading), math.sin(self._heading)
        signals: list[int] = []
        for (cos_b, sin_b), noise in zip(_BEAMS, self._light_noise.take(), strict=True):
            c, n = cos_h * cos_b - sin_h * sin_b, sin_h * cos_b + cos_h * sin_b
            to_x = (_HALF_X_M - x) / c if c > 1e-9 else (_HALF_X_M + x) / -c if c < -1e-9 else math.inf
            to_y = (_HALF_Y_M - y) / n if n > 1e-9 else (_HALF_Y_M + y) / -n if n < -1e-9 else math.inf
            distance_m, incidence = (to_x, abs(c)) if to_x < to_y else (to_y, abs(n))
            depth_m = distance_m - _BEAM_ORIGIN_M  # positive: the body keeps the centre a radius from the walls
            signal = LIGHT_AMBIENT + s.light_gain_m2 * (0.35 + 0.65 * incidence) / (depth_m * depth_m)
            signal += (s.light_noise * signal + s.light_noise_counts) * noise
            signals.append(0 if signal < 0.0 else LIGHT_MAX if signal > LIGHT_MAX else int(signal))
        return signals

    def encoder_counts(self) -> tuple[int, int]:
        """Counts of the left and right wheel since the start, not wrapped."""
        return int(self.rolled_left_m * 1e3 / MM_PER_COUNT), int(self.rolled_right_m * 1e3 / MM_PER_COUNT)

    @property
    def on_dock(self) -> bool:
        """Whether the robot stands on the home base so that the contacts touch."""
        return (
            self._x < DOCK_POSE.x_m + DOCK_REACH_M
            and self.dock_present
            and math.hypot(self._x - DOCK_POSE.x_m, self._y - DOCK_POSE.y_m) < DOCK_REACH_M
            and abs(_wrapped(self._heading - DOCK_POSE.heading_rad)) < DOCK_REACH_RAD
        )

    def _log(self, t_ns: int) -> None:
        self.wheel_log.append(
            WheelRecord(t_ns, self.requested_left_mm_s, self.requested_right_mm_s, self.left_mm_s, self.right_mm_s)
        )


def _clamp(value: float, most: float) -> float:
    return max(-most, min(most, value))


def _wrapped(angle_rad: float) -> float:
    """The same angle in [-pi, pi)."""
    return (angle_rad + math.pi) % (2 * math.pi) - math.pi
