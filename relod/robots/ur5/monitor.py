"""The simulated monitor with its red disc, in a room, as the camera on the UR5's tool sees it.

`Look` is everything visual that may change between runs or episodes; `MonitorRenderer` paints it and gives pictures.
Only the disc is red enough to be taken for the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import numpy as np
from msgspec import Meta

from ...types import Image
from ..optics import CameraOptics, Finish, Rays
from ..scene import Atlas, Texture, texture_noise
from ..vision import cv2
from .kinematics import Vector3
from .target import HEIGHT, RADIUS, WIDTH, Place
from .wristview import MONITOR_PATCH, Room, WristCaster

__all__ = ["MONITOR_M", "Look", "MonitorRenderer", "WristOptics"]

# A 24" monitor stands before the arm: from the reset posture its whole screen is in the picture, and the disc fills
# 0.4 % of it; from the far end of the tool's box 1.5 to 2 %.
SCREEN_HW_M = (0.299, 0.531)
BEZEL_M = 0.014
TEXEL_M = 0.0025  # of the monitor; a pixel of 160 across sees 4 mm of it
MONITOR_M: Vector3 = (-0.115, 0.92, 0.33)
MONITOR_HW_M = (SCREEN_HW_M[0] + 2 * BEZEL_M, SCREEN_HW_M[1] + 2 * BEZEL_M)
SIDE_PX = 320

ROOM = Room(
    low_m=(-1.7, -0.9, 0.0),
    high_m=(1.45, 1.55, 1.9),
    side_px=SIDE_PX,
    monitor_hw_m=MONITOR_HW_M,
    monitor_hw_px=(round(MONITOR_HW_M[0] / TEXEL_M), round(MONITOR_HW_M[1] / TEXEL_M)),
)

Colour: TypeAlias = tuple[float, float, float]

BLACK: Colour = (26.0, 25.0, 25.0)  # of bezel and foot
DISC_SUBPIXELS = 4  # bits of a pixel's fraction, for OpenCV


class WristOptics(CameraOptics, frozen=True):
    """The camera on the tool, 3 cm before its flange. The arm carries it, so `height_m` means nothing here."""

    hfov_deg: Annotated[float, Meta(gt=10, lt=120, description="horizontal field of view")] = 66.0
    pitch_deg: Annotated[
        float, Meta(ge=-45, le=45, description="of the optical axis to the tool's, up is positive")
    ] = 0
    ahead_m: Annotated[float, Meta(ge=0, le=1, description="of the camera before the tool's flange")] = 0.03
    k1: Annotated[float, Meta(ge=-0.3, le=0.3, description="radial distortion; negative is barrel")] = -0.05
    readout_ms: Annotated[float, Meta(ge=0, le=100, description="first to last row")] = 20.0
    exposure_ms: Annotated[float, Meta(ge=0, le=100, description="of one row")] = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What room and monitor look like; colours are BGR in levels of 255."""

    wall: Colour = (170.0, 175.0, 178.0)
    table: Colour = (95.0, 120.0, 140.0)
    white: Colour = (238.0, 236.0, 232.0)
    red: Colour = (14.0, 10.0, 225.0)
    gain: float = 1.0
    glare: float = 0.0  # of a lamp on the screen, in levels
    lamp_m: tuple[float, float] = (-0.1, 0.4)  # above the table
    monitor_m: Vector3 = MONITOR_M
    texture_seed: int = 0

    @classmethod
    def draw(cls, rng: np.random.Generator, level: float = 1.0) -> Look:
        """A look; `level` scales the variation, 0 gives the default look."""

        def vary(middle: float, reach: float) -> float:
            return middle + level * float(rng.uniform(-reach, reach))

        def vary3(middle: Colour, reach: Colour) -> Colour:
            return (vary(middle[0], reach[0]), vary(middle[1], reach[1]), vary(middle[2], reach[2]))

        base = cls()
        return cls(
            wall=vary3(base.wall, (25.0, 25.0, 25.0)),
            table=vary3(base.table, (25.0, 25.0, 25.0)),
            white=vary3(base.white, (8.0, 8.0, 8.0)),
            red=vary3(base.red, (8.0, 8.0, 25.0)),
            gain=vary(base.gain, 0.08),
            glare=level * float(rng.uniform(0.0, 20.0)),
            lamp_m=(vary(base.lamp_m[0], 0.4), vary(base.lamp_m[1], 0.4)),
            monitor_m=vary3(base.monitor_m, (0.02, 0.02, 0.015)),
            texture_seed=int(rng.integers(1 << 31)) if level else base.texture_seed,
        )


class MonitorRenderer:
    """The pictures of the camera on the tool. One per thread: it reuses its buffers."""

    def __init__(self, *, height: int, width: int, optics: WristOptics, seed: int) -> None:
        cv2.setNumThreads(1)  # pictures this small only lose by being shared out
        rays = Rays.through_lens(height, width, optics)
        self._caster = WristCaster(rays, ROOM, ROOM.atlas(), optics)
        self._finish = Finish(rays, optics, seed)
        self._place: Place | None = None
        self.set_look(Look())

    def set_look(self, look: Look) -> None:
        """Paint room and monitor anew: 20 ms. Another thread may go on rendering meanwhile."""
        atlas = ROOM.atlas()
        for side in range(4):
            atlas.paint(side, _wall(look, side))
        atlas.paint(4, _table(look))
        atlas.paint(5, _ceiling(look))
        self._screen = _screen(look)
        self.look = look
        self._paint_monitor(atlas)
        self._caster.atlas = atlas

    def show(self, place: Place | None) -> None:
        """Move the disc, or show a white screen; 0.2 ms."""
        self._place = place
        self._paint_monitor(self._caster.atlas)

    def render(self, q: Sequence[float], qd: Sequence[float], index: int = 0) -> Image:
        """What the camera sees, `(H, W, 3) uint8` BGR, a new array.

        Posture and speeds are the arm's in the middle of the frame; `index` counts frames and picks noise and
        flicker. Motion blurs along rows only.
        """
        picture = self._caster.picture(q, qd, self.look.monitor_m)
        return self._finish.apply(picture, self._caster.turn_rad_s, index)

    def _paint_monitor(self, atlas: Atlas) -> None:
        look, screen = self.look, self._screen.copy()
        height, width = screen.shape[:2]
        if self._place is not None:
            unit = (1 << DISC_SUBPIXELS) * width / WIDTH
            middle = (round(self._place.x * unit), round(self._place.y * unit * height / width * WIDTH / HEIGHT))
            colour = [look.gain * level for level in look.red]
            cv2.circle(screen, middle, round(RADIUS * unit), colour, -1, cv2.LINE_AA, DISC_SUBPIXELS)
        monitor_height, monitor_width = ROOM.monitor_hw_px
        top, left = (monitor_height - height) // 2, (monitor_width - width) // 2
        edges = (top, monitor_height - height - top, left, monitor_width - width - left)
        framed = cv2.copyMakeBorder(screen, *edges, cv2.BORDER_CONSTANT, value=BLACK)
        atlas.paint(MONITOR_PATCH, framed.astype(np.float32))


# --- textures --------------------------------------------------------------------------------------------------------


def _wall(look: Look, side: int) -> Texture:
    """A wall with furniture and pictures before it, in any colour, but none as strong as the disc's."""
    rng = np.random.default_rng([look.texture_seed, side])
    picture = _plain(look.wall, rng, ((3, 8.0), (12, 4.0)))
    for _ in range(12):
        hsv = [[[rng.integers(20, 165), rng.integers(110), rng.integers(40, 220)]]]
        colour = cv2.cvtColor(np.array(hsv, np.uint8), cv2.COLOR_HSV2BGR)[0, 0].tolist()
        left, bottom = int(rng.integers(SIDE_PX)), int(rng.integers(SIDE_PX // 4, SIDE_PX))
        width, height = int(rng.integers(8, SIDE_PX // 5)), int(rng.integers(15, SIDE_PX // 3))
        cv2.rectangle(picture, (left, bottom - height), (left + width, bottom), colour, -1)
    shade = np.linspace(1.08, 0.78, SIDE_PX, dtype=np.float32)[:, None, None]
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), 0.8) * shade * np.float32(look.gain), np.float32)


def _table(look: Look) -> Texture:
    """The table under the lamp, with the monitor's foot and its shadow."""
    rng = np.random.default_rng([look.texture_seed, 4])
    x = np.linspace(ROOM.low_m[0], ROOM.high_m[0], SIDE_PX, dtype=np.float32)[None, :]
    y = np.linspace(ROOM.high_m[1], ROOM.low_m[1], SIDE_PX, dtype=np.float32)[:, None]
    lamp_x, lamp_y = look.lamp_m
    foot_x, foot_y = x - look.monitor_m[0], y - look.monitor_m[1] - 0.02
    light = 0.62 + 0.5 * np.exp(-((x - lamp_x) ** 2 + (y - lamp_y) ** 2) / 0.8)
    shadow = 1 - 0.45 * np.exp(-((foot_x / 0.16) ** 2) - (foot_y / 0.09) ** 2)
    picture = _plain(look.table, rng, ((6, 9.0), (30, 6.0))) * (light * shadow)[..., None]
    picture[(np.abs(foot_x) < 0.11) & (np.abs(foot_y) < 0.05)] = BLACK
    return np.asarray(picture * np.float32(look.gain), np.float32)


def _ceiling(look: Look) -> Texture:
    rng = np.random.default_rng([look.texture_seed, 5])
    return np.asarray(_plain((205.0, 205.0, 205.0), rng, ((8, 6.0),)) * np.float32(look.gain), np.float32)


def _screen(look: Look) -> Image:
    """The white screen, a little darker in its corners, with the lamp's reflection."""
    height, width = (round(size_m / TEXEL_M) for size_m in SCREEN_HW_M)
    x, y = np.linspace(-1, 1, width)[None, :], np.linspace(-1, 1, height)[:, None]
    white = np.array(look.white) * (look.gain * (1 - 0.06 * (x * x + y * y)))[..., None]
    glare = look.glare * np.exp(-((x - 0.5) ** 2 + (y + 0.4) ** 2) / 0.15)
    levels: Image = (white + glare[..., None]).clip(0, 255).astype(np.uint8)
    return levels


def _plain(colour: Colour, rng: np.random.Generator, octaves: Sequence[tuple[int, float]]) -> Texture:
    return np.asarray(np.array(colour, np.float32) + texture_noise(rng, SIDE_PX, SIDE_PX, octaves)[..., None])
