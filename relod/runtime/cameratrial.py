"""What a camera delivers, seen by looking through it for two seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import CameraSettings
from ..robots.camera import CameraReader, parse_source
from .clock import NS_PER_MS, NS_PER_S, monotonic_ns

__all__ = ["CameraPlan", "CameraResult", "try_camera"]

CAMERA_S = 2.0
CAMERA_READ_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CameraPlan:
    """The camera to look through, and the size the task wants."""

    source: str
    settings: CameraSettings
    height: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CameraResult:
    """What the camera does."""

    source: str
    width: int
    height: int
    fps: float
    age_p50_ms: float  # capture to arrival here, as well as the source tells
    age_max_ms: float
    wanted_fps: float

    def __str__(self) -> str:
        return (
            f"{self.width}x{self.height}, {self.fps:g} frames/s, age {self.age_p50_ms:g} ms (most {self.age_max_ms:g})"
        )

    @property
    def failure(self) -> str:
        """What is wrong with it, in words; empty when nothing is."""
        if self.fps >= self.wanted_fps / 2:
            return ""
        return f"the camera delivers {self.fps:g} frames/s where {self.wanted_fps:g} were asked for"


def try_camera(plan: CameraPlan) -> CameraResult:
    """Look through the camera for a while; `StartError` when it cannot be had, `SettingsError` when it is none."""
    ages_ms: list[float] = []
    shape = (0, 0, 3)
    source = parse_source(plan.source)
    with CameraReader(source, plan.settings, height=plan.height, width=plan.width) as reader:
        begin_ns = monotonic_ns()
        while monotonic_ns() - begin_ns < CAMERA_S * NS_PER_S:
            capture = reader.read(CAMERA_READ_S)
            if capture is not None:
                ages_ms.append((capture.arrived_ns - capture.captured_ns) / NS_PER_MS)
                shape = capture.image.shape
        duration_s = (monotonic_ns() - begin_ns) / NS_PER_S
    ages_ms.sort()
    return CameraResult(
        source=str(source),
        width=shape[1],
        height=shape[0],
        fps=round(len(ages_ms) / duration_s, 1),
        age_p50_ms=round(ages_ms[len(ages_ms) // 2], 1) if ages_ms else math.inf,
        age_max_ms=round(ages_ms[-1], 1) if ages_ms else math.inf,
        wanted_fps=plan.settings.fps,
    )
