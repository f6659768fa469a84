"""A simulated camera's lens and sensor: where each pixel looks, and what becomes of the light on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from ..config import Section
from ..seeds import random_stream
from ..types import Image
from .vision import cv2

__all__ = ["CameraOptics", "Finish", "Rays"]

_Array: TypeAlias = npt.NDArray[np.float32]

_FLICKERS = 1024  # frames after which noise and flicker repeat
_NOISE_SHIFT_PX = 64  # how far the window into the noise moves from frame to frame


class CameraOptics(Section, frozen=True):
    """Lens, mounting and sensor of a simulated camera."""

    hfov_deg: Annotated[float, Meta(gt=10, lt=120, description="horizontal field of view")] = 70.0
    pitch_deg: Annotated[float, Meta(ge=-45, le=45, description="of the optical axis, up is positive")] = -4.0
    height_m: Annotated[float, Meta(gt=0, le=2, description="of the camera above the floor")] = 0.115
    ahead_m: Annotated[float, Meta(ge=-1, le=1, description="of the camera before the robot's centre")] = 0.12
    k1: Annotated[float, Meta(ge=-0.3, le=0.3, description="radial distortion; negative is barrel")] = -0.08
    readout_ms: Annotated[float, Meta(ge=0, le=100, description="first to last row")] = 22.0
    exposure_ms: Annotated[float, Meta(ge=0, le=100, description="of one row")] = 12.0
    softness: Annotated[float, Meta(ge=0, le=0.3, description="share of light that falls on the next pixel")] = 0.13
    vignette: Annotated[float, Meta(ge=0, le=1, description="loss of light in the corners")] = 0.18
    noise: Annotated[float, Meta(ge=0, le=30, description="standard deviation, in levels of 255")] = 3.2
    flicker: Annotated[float, Meta(ge=0, le=0.2, description="standard deviation of the exposure, relative")] = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Rays:
    """Where each pixel looks, as a point one unit ahead of the camera: `(1, left, up)` in the robot's frame."""

    left: _Array  # (H, W)
    up: _Array  # (H, W)
    radius: _Array  # (H, W) distance from the optical centre, 1 in the corner
    row_s: npt.NDArray[np.float64]  # (H, 1) when a row is exposed, relative to the middle of the frame

    @classmethod
    def through_lens(cls, height: int, width: int, optics: CameraOptics) -> Rays:
        """The rays of an image `height` x `width` px."""
        focal_px = (width / 2) / math.tan(math.radians(optics.hfov_deg) / 2)
        right, down = np.meshgrid(
            (np.arange(width) + 0.5 - width / 2) / focal_px, (np.arange(height) + 0.5 - height / 2) / focal_px
        )
        radius_sq = right**2 + down**2
        undistort = 1 - optics.k1 * radius_sq  # the inverse of the distortion, to first order
        right, down = right * undistort, down * undistort
        cos, sin = math.cos(math.radians(optics.pitch_deg)), math.sin(math.radians(optics.pitch_deg))
        ahead = cos + down * sin
        return cls(
            left=(-right / ahead).astype(np.float32),
            up=((sin - down * cos) / ahead).astype(np.float32),
            radius=np.sqrt(radius_sq / radius_sq.max()).astype(np.float32),
            row_s=((np.arange(height) + 0.5) / height - 0.5)[:, None] * (optics.readout_ms / 1000),
        )


class Finish:
    """What lens and sensor do to a picture: softness, motion blur, vignette, exposure, noise.

    Noise and flicker of frame `index` depend on the seed and the index only.
    """

    def __init__(self, rays: Rays, optics: CameraOptics, seed: int) -> None:
        height, width = rays.left.shape
        self._px_per_rad = width / math.radians(optics.hfov_deg)
        self._exposure_s = optics.exposure_ms / 1000
        self._soft = np.array([optics.softness, 1 - 2 * optics.softness, optics.softness], np.float32)
        self._kernels: dict[int, _Array] = {}
        shade = 255 * (1 - optics.vignette * rays.radius**2)
        self._vignette: Image = np.repeat(shade[..., None], 3, axis=2).astype(np.uint8)
        rng = random_stream(seed, "camera.noise")
        self._shape = (height, width)
        noise = np.rint(rng.normal(0, optics.noise, (height + _NOISE_SHIFT_PX, width + _NOISE_SHIFT_PX, 3)))
        # Two saturating additions of bytes take a third of one cv2.addWeighted.
        self._brighter: Image = noise.clip(0, 255).astype(np.uint8)
        self._darker: Image = (-noise).clip(0, 255).astype(np.uint8)
        self._windows = rng.integers(0, _NOISE_SHIFT_PX + 1, (_FLICKERS, 2)).tolist()
        self._gains = (1 + optics.flicker * _wander(rng.standard_normal(_FLICKERS))).tolist()

    def apply(self, image: Image, turn_rad_s: float, index: int) -> Image:
        """The picture `(H, W, 3) uint8` as the sensor delivers it; blur is that of turning at `turn_rad_s`."""
        blur_px = abs(turn_rad_s) * self._exposure_s * self._px_per_rad
        soft = cast(Image, cv2.sepFilter2D(image, -1, self._kernel(blur_px), self._soft))
        cv2.multiply(soft, self._vignette, dst=soft, scale=self._gains[index % _FLICKERS] / 255)
        height, width = self._shape
        row, column = self._windows[index % _FLICKERS]
        window = (slice(row, row + height), slice(column, column + width))
        cv2.add(soft, self._brighter[window], dst=soft)
        cv2.subtract(soft, self._darker[window], dst=soft)
        return soft

    def _kernel(self, blur_px: float) -> _Array:
        """Softness along a row together with a box of `blur_px`, to an eighth of a pixel."""
        eighths = round(8 * blur_px)
        if eighths not in self._kernels:
            reach = math.ceil(max(0.0, eighths / 16 - 0.5))
            offsets = np.arange(-reach, reach + 1)
            box = (eighths / 16 + 0.5 - np.abs(offsets)).clip(0, 1) if reach else np.ones(1)
            self._kernels[eighths] = np.convolve(box / box.sum(), self._soft).astype(np.float32)
        return self._kernels[eighths]


def _wander(steps: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A slow random walk about 0 with variance 1, correlated over some 20 frames, as auto-exposure is."""
    keep, values, value = 0.95, np.empty_like(steps), 0.0
    for i, step in enumerate(steps.tolist()):
        value = keep * value + math.sqrt(1 - keep**2) * step
        values[i] = value
    return values
