"""The simulated arena of Create-Reacher: 1.10 x 0.70 m, low walls, a sheet of green paper on the +x wall.

`ArenaLook` is everything visual that may change between episodes; `ArenaRenderer` paints what the robot's camera
sees. The room round the arena is a panorama at infinity; the robot casts no shadow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ...types import Image
from ..scene import Atlas, Box, BoxCaster, CameraOptics, Finish, Rays, Texture, texture_noise
from ..vision import cv2
from .reacher import ReacherSettings

__all__ = ["ARENA", "PAPER_HW_M", "ArenaLook", "ArenaRenderer"]

ARENA = Box(half_x_m=0.55, half_y_m=0.35, wall_m=0.20, texel_m=0.003)
PAPER_HW_M = (0.15, 0.20)

# The published target colour has no least brightness, so dark noisy pixels have it too: 0.2 to 0.3 % of any picture.
_TARGET_LOW, _TARGET_HIGH = ReacherSettings().target_hsv_low, ReacherSettings().target_hsv_high
_MOST_FALSE_TARGET = 0.005  # of any picture without the paper
_LEAST_TRUE_TARGET = 0.9  # of what the default look shows of the paper
_MOST_DRAWS = 100  # three in ten are rejected, nearly all as something else has the target's colour

Colour: TypeAlias = tuple[float, float, float]
_Array: TypeAlias = npt.NDArray[np.float32]
_Length: TypeAlias = _Array | float


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaLook:
    """What the arena looks like; colours are BGR reflectances in levels of 255."""

    boards: Colour = (70.0, 120.0, 170.0)  # the walls at both ends
    cardboard: Colour = (112.0, 140.0, 165.0)  # the walls along the sides
    floor: Colour = (150.0, 155.0, 160.0)
    paper: Colour = (65.0, 155.0, 50.0)
    lamp_m: Colour = (0.0, 0.0, 1.6)  # where the lamp hangs
    ambient: float = 0.55
    gain: float = 1.0
    white_balance: Colour = (1.0, 1.0, 1.0)
    paper_y_m: float = 0.0  # centre of the paper
    paper_z_m: float = 0.09
    paper_tilt_rad: float = 0.0
    texture_seed: int = 0

    @classmethod
    def draw(cls, rng: np.random.Generator, level: float = 1.0) -> ArenaLook:
        """A look in which nothing but the paper has the target's colour, and the paper has it.

        `level` scales the variation; 0 gives the default look. Raises RuntimeError when a hundred draws in a row
        are unusable, which no level up to 1 has ever done.
        """
        if level == 0:
            return cls()
        for _ in range(_MOST_DRAWS):
            look = cls._candidate(rng, level)
            if _usable(look):
                return look
        raise RuntimeError(f"no usable look in {_MOST_DRAWS} draws at level {level}")

    @classmethod
    def _candidate(cls, rng: np.random.Generator, level: float) -> ArenaLook:
        def vary(middle: float, reach: float) -> float:
            return middle + level * float(rng.uniform(-reach, reach))

        def vary3(middle: Colour, reach: Colour) -> Colour:
            return (vary(middle[0], reach[0]), vary(middle[1], reach[1]), vary(middle[2], reach[2]))

        base = cls()
        shade = vary(1.0, 0.12)
        return cls(
            boards=_bgr(vary(14, 6), vary(138, 30), vary(170, 30)),  # hues well clear of the target's 30 to 85
            cardboard=(base.cardboard[0] * shade, base.cardboard[1] * shade, base.cardboard[2] * shade),
            floor=vary3(base.floor, (22.0, 22.0, 22.0)),
            paper=vary3(base.paper, (17.0, 20.0, 20.0)),
            lamp_m=vary3(base.lamp_m, (0.6, 0.5, 0.4)),
            ambient=vary(base.ambient, 0.1),
            gain=vary(base.gain, 0.12),
            white_balance=vary3(base.white_balance, (0.06, 0.0, 0.06)),
            paper_y_m=vary(base.paper_y_m, 0.12),
            paper_z_m=vary(base.paper_z_m, 0.01),
            paper_tilt_rad=vary(base.paper_tilt_rad, 0.05),
            texture_seed=int(rng.integers(1 << 31)),
        )


class ArenaRenderer:
    """The pictures of the robot's camera in the arena. One instance per process: it reuses its buffers."""

    def __init__(
        self, *, height: int = 120, width: int = 160, optics: CameraOptics | None = None, seed: int = 0
    ) -> None:
        cv2.setNumThreads(1)  # pictures this small only lose by being shared out
        optics = optics or CameraOptics()
        rays = Rays.through_lens(height, width, optics)
        self._caster = BoxCaster(rays, ARENA, ARENA.atlas(), optics)
        self._finish = Finish(rays, optics, seed)
        self.look = ArenaLook()
        self.set_look(self.look)

    def set_look(self, look: ArenaLook) -> None:
        """Paint the arena anew: 27 ms, or 2 ms for a look just drawn. Another thread may go on rendering meanwhile."""
        atlas = _bare_arena(look).copy()
        atlas.paint(1, _with_paper(look, _side(look, 0)))
        self.look, self._caster.atlas = look, atlas

    def _take_paper_down(self) -> None:
        self._caster.atlas = _bare_arena(self.look)

    def render(
        self,
        x_m: float,
        y_m: float,
        heading_rad: float,
        speed_m_s: float = 0.0,
        turn_rad_s: float = 0.0,
        index: int = 0,
    ) -> Image:
        """What the camera sees, `(H, W, 3) uint8` BGR, a new array.

        Pose and speeds are those of the robot's centre in the middle of the frame; `index` counts frames and picks
        noise and flicker.
        """
        picture = self._caster.picture(x_m, y_m, heading_rad, speed_m_s, turn_rad_s)
        return self._finish.apply(picture, turn_rad_s, index)


# --- may a look be used? ---------------------------------------------------------------------------------------------


def _target_fraction(image: Image) -> float:
    """Share of a picture that has the target's colour, however dark."""
    mask = cv2.inRange(cv2.cvtColor(image, cv2.COLOR_BGR2HSV), _TARGET_LOW, _TARGET_HIGH)
    return cv2.countNonZero(mask) / mask.size


@lru_cache(maxsize=1)
def _inspector() -> ArenaRenderer:
    return ArenaRenderer()


def _usable(look: ArenaLook) -> bool:
    """Whether pictures without the paper hold no target, and the paper itself is seen as one."""
    camera = _inspector()
    camera.set_look(look)
    camera._take_paper_down()
    views = [(0.0, 0.0, i * math.pi / 4) for i in range(8)]
    views += [(sx * 0.3, sy * 0.15, math.atan2(sy, sx)) for sx in (-1, 1) for sy in (-1, 1)]
    if max(_target_fraction(camera.render(*view, index=i)) for i, view in enumerate(views)) > _MOST_FALSE_TARGET:
        return False
    return _facing_fraction(look) > _LEAST_TRUE_TARGET * _best_fraction()


def _facing_fraction(look: ArenaLook) -> float:
    """Target in the picture of a robot that faces the paper from 0.45 m."""
    camera = _inspector()
    camera.set_look(look)
    return _target_fraction(camera.render(ARENA.half_x_m - 0.45, look.paper_y_m, 0.0))


@lru_cache(maxsize=1)
def _best_fraction() -> float:
    return _facing_fraction(ArenaLook())


# --- textures --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _bare_arena(look: ArenaLook) -> Atlas:
    """The atlas of the arena without its paper; kept, because a drawn look is inspected first and used next."""
    atlas = ARENA.atlas()
    atlas.paint(0, _floor(look))
    for side in range(4):
        atlas.paint(1 + side, _side(look, side))
    ARENA.paint_panorama(atlas, _room(look))
    return atlas


def _floor(look: ArenaLook) -> Texture:
    rng = np.random.default_rng([look.texture_seed, 0])
    height, width = ARENA.floor_size_hw
    x, y = _centres(width, ARENA.half_x_m)[None, :], _centres(height, ARENA.half_y_m)[:, None]
    picture = _levels(look.floor) + texture_noise(rng, height, width, ((4, 8.0), (24, 6.0), (256, 4.0)))[..., None]
    for _ in range(6):  # scuff marks
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        darker = float(rng.uniform(0.5, 0.8))
        cv2.circle(picture, centre, int(rng.integers(2, 6)), [darker * level for level in look.floor], -1)
    edge = np.minimum(ARENA.half_x_m - np.abs(x), ARENA.half_y_m - np.abs(y))
    shade = _light(look, x, y, 0.0, (0, 0, 1)) * (1 - 0.35 * np.exp(-edge / 0.03))
    return _exposed(look, picture * shade[..., None])


def _side(look: ArenaLook, side: int) -> Texture:
    rng = np.random.default_rng([look.texture_seed, 1 + side])
    height, width = ARENA.side_size_hw(side)
    boards = side % 2 == 0
    base = _levels(look.boards if boards else look.cardboard)
    grain = cv2.resize(rng.standard_normal((height, max(3, width // 40)), dtype=np.float32), (width, height)) * 7
    picture: Texture = base + (grain + texture_noise(rng, height, width, ((3, 6.0), (256, 3.0))))[..., None]
    if boards:
        for seam in (width // 3, 2 * width // 3):
            picture[:, seam] *= 0.6
    else:
        picture[int(height * 0.45) : int(height * 0.47)] *= 0.8
    return _exposed(look, picture * _side_light(look, side)[..., None])


def _side_light(look: ArenaLook, side: int) -> _Array:
    height, width = ARENA.side_size_hw(side)
    half = ARENA.half_x_m if side % 2 else ARENA.half_y_m
    along = _centres(width, half)[None, :]
    z = (ARENA.wall_m - (np.arange(height, dtype=np.float32) + 0.5) * ARENA.texel_m)[:, None]
    normal = ((-1, 0, 0), (0, -1, 0), (1, 0, 0), (0, 1, 0))[side]
    x = (ARENA.half_x_m, along, -ARENA.half_x_m, along)[side]
    y = (along, ARENA.half_y_m, along, -ARENA.half_y_m)[side]
    foot = 1 - 0.35 * np.exp(-z / 0.025)
    corner = 1 - 0.2 * np.exp(-(half - np.abs(along)) / 0.02)
    return np.asarray(_light(look, x, y, z, normal) * foot * corner, np.float32)


def _with_paper(look: ArenaLook, wall: Texture) -> Texture:
    """The +x wall with the paper on it; its edges are anti-aliased."""
    rng = np.random.default_rng([look.texture_seed, 9])
    height, width = wall.shape[:2]
    y = _centres(width, ARENA.half_y_m)[None, :] - look.paper_y_m
    z = (ARENA.wall_m - (np.arange(height, dtype=np.float32) + 0.5) * ARENA.texel_m)[:, None] - look.paper_z_m
    cos, sin = math.cos(look.paper_tilt_rad), math.sin(look.paper_tilt_rad)
    across, upwards = y * cos + z * sin, z * cos - y * sin
    inside = [
        ((size / 2 - np.abs(offset)) / ARENA.texel_m + 0.5).clip(0, 1)
        for size, offset in zip(PAPER_HW_M, (upwards, across), strict=True)
    ]
    cover = (inside[0] * inside[1])[..., None]
    paper = _levels(look.paper) + texture_noise(rng, height, width, ((6, 3.0), (256, 2.0)))[..., None]
    lit = _exposed(look, paper * _side_light(look, 0)[..., None])
    return np.asarray(wall * (1 - cover) + lit * cover, np.float32)


def _room(look: ArenaLook) -> Texture:
    """A blurred room with furniture in every colour but the target's."""
    rng = np.random.default_rng([look.texture_seed, 10])
    height, width = ARENA.panorama_hw
    picture = np.linspace(205, 150, height, dtype=np.float32)[:, None, None] * np.ones((1, width, 3), np.float32)
    for _ in range(22):
        size = (int(rng.integers(13, 94)), int(rng.integers(30, 150)))
        x, bottom = int(rng.integers(width)), height - int(rng.integers(60))
        hue = rng.uniform(0, 110)
        colour = _bgr(hue if hue < 25 else hue + 70, rng.uniform(10, 110), rng.uniform(40, 190))
        for start in (x, x - width):
            cv2.rectangle(picture, (start, bottom - size[1]), (start + size[0], bottom), colour, -1)
    padded = cv2.copyMakeBorder(picture, 0, 0, 16, 16, cv2.BORDER_WRAP)
    blurred = cv2.GaussianBlur(padded, (0, 0), 1.8)[:, 16:-16]
    return _exposed(look, blurred + texture_noise(rng, height, width, ((8, 5.0),))[..., None])


def _light(look: ArenaLook, x: _Length, y: _Length, z: _Length, normal: tuple[int, int, int]) -> _Array:
    """Brightness of a surface under the lamp and the ambient light; about 1 on the floor below the lamp."""
    dx, dy, dz = (np.float32(lamp) - part for lamp, part in zip(look.lamp_m, (x, y, z), strict=True))
    distance = np.sqrt(dx * dx + dy * dy + dz * dz)
    facing = np.maximum((dx * normal[0] + dy * normal[1] + dz * normal[2]) / distance, 0)
    return np.asarray(look.ambient + (1.15 - look.ambient) * 1.1 * facing * (1.6 / distance) ** 2, np.float32)


def _exposed(look: ArenaLook, picture: npt.NDArray[np.floating]) -> Texture:
    return np.asarray(picture * (np.float32(look.gain) * _levels(look.white_balance)), np.float32)


def _levels(colour: Colour) -> _Array:
    return np.array(colour, np.float32)


def _centres(count: int, half_m: float) -> _Array:
    return np.asarray((np.arange(count) + 0.5) * (2 * half_m / count) - half_m, np.float32)


def _bgr(hue: float, saturation: float, value: float) -> Colour:
    """A colour given in OpenCV's HSV (0-180, 0-255, 0-255)."""
    chroma = value * saturation / 255
    parts = []
    for shift in (240.0, 120.0, 0.0):  # blue, green, red
        away = abs((2 * hue - shift + 180) % 360 - 180) / 60
        parts.append(value - chroma * min(1.0, max(0.0, away - 1.0)))
    return (parts[0], parts[1], parts[2])
