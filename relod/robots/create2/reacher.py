"""Create-Reacher: drive a Create 2 to a green paper on the arena's wall, as fast as possible, seeing only its camera.

The task of Wang, Vasan and Mahmood, "Real-Time Reinforcement Learning for Vision-Based Robotics Utilizing Local and
Remote Computers" (ICRA 2023, arXiv 2210.02317). docs/tasks/create-reacher.md is its full description, with every
difference from the published runs. Everything here is a pure function of sensors and images; the reset is next door.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from ...errors import SettingsError
from ...runtime.clock import NS_PER_MS
from ...types import Command, FloatArray, Image, Outcome, Reset, SensorWindow, TaskSpec
from ..limits import symmetric
from ..registry import TaskEntry
from ..vision import cv2
from .oi import SENSOR_NAMES, Bumps, ChargingSource, Mode
from .reset import STAND, ResetSettings, charging, reset_routine, wheels_dropped

__all__ = ["CREATE_REACHER", "CreateReacher", "ReacherSettings", "episode_steps", "target_fraction", "wall_proximity"]

CAMERA_FPS = 30.0  # the published setup's camera: a new image every 33.3 ms

# The light bumpers look at the walls through six sensors, left to right, packets 46 to 51.
WALL_SENSORS = tuple(name for name in SENSOR_NAMES if name.startswith("light_bump_"))
COMMAND_NAMES = ("left_mm_s", "right_mm_s")

# A light bumper's signal falls with the square of the distance: 4.2 is what it reads with nothing in sight, so
# 1/sqrt(raw - 4.2) is proportional to the distance. These raw values become -1 and +1, as in SenseAct.
RAW_OFFSET = 4.2
RAW_FAR = 20.0
RAW_NEAR = 4095.0

DARKEST_GRAY = 11  # pixels of the target's hue and darker than this are shadow: their hue means nothing


class ReacherSettings(ResetSettings, frozen=True):
    """Create-Reacher. Defaults are the published runs' unless docs/tasks/create-reacher.md says otherwise."""

    cycle_ms: Annotated[float, Meta(ge=15, le=1000, description="action cycle; sensor packets come every 15 ms")] = 45.0
    episode_s: Annotated[float, Meta(gt=0, le=3600, description="time limit of an episode")] = 30.0
    frames: Annotated[int, Meta(ge=1, le=16, description="newest camera images in an observation")] = 3
    camera_height: Annotated[int, Meta(ge=16, le=2160, description="of the camera's image, in pixels")] = 120
    camera_width: Annotated[int, Meta(ge=16, le=3840, description="of the camera's image, in pixels")] = 160
    image_height: Annotated[int, Meta(ge=16, le=1080, description="of the image the agent sees, in pixels")] = 120
    image_width: Annotated[int, Meta(ge=16, le=1920, description="of the image the agent sees, in pixels")] = 160
    action_history: Annotated[int, Meta(ge=1, le=16, description="previous actions in an observation")] = 1
    max_speed_mm_s: Annotated[float, Meta(ge=1, le=500, description="wheel speed of the actions -1 and 1, in mm/s")] = (
        150.0
    )
    target_fraction: Annotated[
        float, Meta(gt=0, le=1, description="part of the image the target must fill to be reached")
    ] = 0.12
    target_hsv_low: Annotated[
        tuple[int, int, int],
        Meta(description="lowest hue 0-179, saturation 0-255, value 0-255 of the target, as OpenCV counts"),
    ] = (30, 68, 0)
    target_hsv_high: Annotated[
        tuple[int, int, int],
        Meta(description="highest hue 0-179, saturation 0-255, value 0-255 of the target"),
    ] = (85, 255, 255)
    wheel_drop_packets: Annotated[
        int, Meta(ge=1, le=60, description="newest sensor packets in which a wheel drop ends the episode")
    ] = 3
    battery_capacity_mah: Annotated[
        int, Meta(ge=1, le=65535, description="of a full battery, for the display alone")
    ] = 2700

    def __post_init__(self) -> None:
        super().__post_init__()
        bounds = zip(self.target_hsv_low, self.target_hsv_high, (179, 255, 255), strict=True)
        if not all(0 <= low <= high <= most for low, high, most in bounds):
            raise SettingsError(
                f"task.target_hsv_low = {self.target_hsv_low} and task.target_hsv_high = {self.target_hsv_high}"
                " are no range of colours",
                "each number of low must be at most that of high; hue ends at 179, the others at 255",
            )
        if episode_steps(self.episode_s, self.cycle_ms) < 1:
            raise SettingsError(
                f"task.episode_s = {self.episode_s:g} is shorter than one cycle of {self.cycle_ms:g} ms",
                "raise task.episode_s",
            )


def episode_steps(episode_s: float, cycle_ms: float) -> int:
    """Whole cycles in an episode: 666 of 45 ms in 30 s."""
    return math.floor(episode_s * 1000 / cycle_ms + 1e-9)  # 0.3 s of 100 ms must be 3 in floating point too


def wall_proximity(raw: npt.NDArray[np.float64]) -> FloatArray:
    """Light bumper readings as float32 in [-1, 1], -1 far, +1 near, linear in the distance.

    Readings below 20 and above 4095 are clipped: with the published formula a reading near the offset, which the
    sensor gives when nothing is in sight, would be -7.34, far outside what the networks are scaled for.
    """
    distance = 1.0 / np.sqrt(np.maximum(1.0, raw - RAW_OFFSET))
    far, near = 1.0 / math.sqrt(RAW_FAR - RAW_OFFSET), 1.0 / math.sqrt(RAW_NEAR - RAW_OFFSET)
    return np.clip(2.0 * (far - distance) / (far - near) - 1.0, -1.0, 1.0).astype(np.float32)


def target_fraction(image: Image, hsv_low: tuple[int, int, int], hsv_high: tuple[int, int, int]) -> float:
    """Part of a BGR image `(H, W, 3) uint8` that shows the target's colour, 0 to 1.

    Counting the mask is what the published pipeline computes: it draws all contours of the mask filled together,
    by the even-odd rule, which gives back the mask itself, holes and all. 0.05 ms at 160x120, not 2 ms on noise.
    """
    mask = cv2.inRange(cv2.cvtColor(image, cv2.COLOR_BGR2HSV), hsv_low, hsv_high)
    lit = cv2.inRange(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), DARKEST_GRAY, 255)
    return cv2.countNonZero(cv2.bitwise_and(mask, lit)) / mask.size


class CreateReacher:
    """The task; see `relod.types.Task`."""

    def __init__(self, settings: ReacherSettings) -> None:
        self.settings = settings
        self.action_history = settings.action_history
        self.limits = symmetric(settings.max_speed_mm_s, len(COMMAND_NAMES))
        self.reset_limits = symmetric(settings.reset_max_speed_mm_s, len(COMMAND_NAMES))
        self.spec = TaskSpec(
            name="create-reacher",
            robot="create",
            cycle_ns=round(settings.cycle_ms * NS_PER_MS),
            frames=settings.frames,
            camera_hw=(settings.camera_height, settings.camera_width),
            camera_fps=CAMERA_FPS,
            image_hw=(settings.image_height, settings.image_width),
            proprio_names=WALL_SENSORS + _previous_names(settings.action_history),
            action_names=COMMAND_NAMES,
            max_steps=episode_steps(settings.episode_s, settings.cycle_ms),
            sensor_window=settings.wheel_drop_packets,
        )

    def proprioception(self, window: SensorWindow, previous_actions: FloatArray) -> FloatArray:
        """Six wall proximities, then the previous actions as the robot was given them, oldest first."""
        walls = wall_proximity(np.array([window.newest(name) for name in WALL_SENSORS]))
        commanded = _wheel_speeds(previous_actions, self.settings.max_speed_mm_s) / self.settings.max_speed_mm_s
        return np.concatenate([walls, commanded.ravel().astype(np.float32)])

    def judge(self, window: SensorWindow, image: Image, index: int) -> Outcome:
        """-1 for each step, until the target is reached, a wheel drops or the time is up."""
        settings = self.settings
        left = self.spec.max_steps - index  # steps of the episode from this one on
        if wheels_dropped(window):
            # Whoever is lifted earns what never arriving would have cost, even in front of the target.
            return Outcome(reward=-float(left), terminated=True, reason="wheel drop")
        fraction = target_fraction(image, settings.target_hsv_low, settings.target_hsv_high)
        if fraction >= settings.target_fraction:
            return Outcome(reward=-1.0, terminated=True, success=True, reason="target reached")
        if left <= 1:
            return Outcome(reward=-1.0, truncated=True, reason="time limit")
        return Outcome(reward=-1.0)

    def command(self, action: FloatArray, window: SensorWindow) -> Command:
        """Wheel speeds in whole mm/s, left and right; a robot is made to stand by an action that is no number."""
        if not np.isfinite(action).all():
            return STAND
        left, right = _wheel_speeds(action, self.settings.max_speed_mm_s)
        return Command(values=(float(left), float(right)))

    def stop(self) -> Command:
        """Both wheels stand."""
        return STAND

    def reset(self, rng: np.random.Generator) -> Reset:
        """Charge if need be, back off from the target and turn by a random angle; see `reset_routine`."""
        return reset_routine(self.settings, rng)

    def status(self, window: SensorWindow) -> Mapping[str, float | str]:
        """Battery, mode, contacts, and under `attention` what a person should do; empty texts where all is well."""
        charge_mah = window.newest("battery_charge_mah")
        bumps = Bumps(int(window.newest("bumps_wheel_drops")))
        charger = charging(window)
        return {
            "battery_mah": charge_mah,
            "battery_percent": round(100.0 * charge_mah / self.settings.battery_capacity_mah, 1),
            "mode": _mode_name(window.newest("oi_mode")),
            "bump": _sides(bumps, Bumps.BUMP_LEFT, Bumps.BUMP_RIGHT),
            "charging": "dock" if charger & ChargingSource.HOME_BASE else "cable" if charger else "",
            "attention": _attention(bumps, charger),
        }


def _wheel_speeds(actions: FloatArray, max_speed_mm_s: float) -> npt.NDArray[np.float64]:
    """Actions of any shape as mm/s, cut to whole numbers: the robot takes no others."""
    return np.trunc(np.clip(actions.astype(np.float64), -1.0, 1.0) * max_speed_mm_s)


def _previous_names(count: int) -> tuple[str, ...]:
    return tuple(f"{name}_{age}_ago" for age in range(count, 0, -1) for name in ("left_action", "right_action"))


def _mode_name(value: float) -> str:
    return Mode(int(value)).name.lower() if int(value) in set(Mode) else f"unknown ({value:.0f})"


def _sides(bits: Bumps, left: Bumps, right: Bumps) -> str:
    return " and ".join(name for name, bit in (("left", left), ("right", right)) if bits & bit)


def _attention(bumps: Bumps, charger: ChargingSource) -> str:
    drop = _sides(bumps, Bumps.WHEEL_DROP_LEFT, Bumps.WHEEL_DROP_RIGHT)
    if drop:
        return f"wheel drop {drop}: put the robot on the floor"
    return "unplug the charging cable" if charger & ChargingSource.INTERNAL else ""


CREATE_REACHER = TaskEntry(
    robot="create",
    settings={
        "task": "relod.robots.create2.reacher:ReacherSettings",
        "robot": "relod.robots.create2.driver:Create2Settings",
        "sim": "relod.robots.create2.world:SimSettings",
    },
    build=CreateReacher,
    driver="relod.robots.create2.driver:Create2Driver",
    commissioning="relod.robots.create2.commission:Create2Commissioning",
    emulator="relod.robots.create2.world:serve_world",
    world="relod.robots.create2.world:VirtualCreate",
    worlds="relod.robots.create2.world:WORLDS",
    sensor_names=(*SENSOR_NAMES, "connection_epoch"),
    command_names=COMMAND_NAMES,
)
