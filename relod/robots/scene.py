"""A box of textured planes seen by a robot's camera: the ray caster the simulators share.

Each pixel's ray is stored once, with the lens distortion and the camera's pitch in it. A frame is: turn the rays,
hit the planes, write texture coordinates, one `cv2.remap`; `optics.Finish` then adds what a sensor adds. Every image
row has its own pose, so the rolling shutter is exact. No meshes, no shadows of moving things.

World frame: origin at the centre of the floor, z up, angles counter-clockwise from +x. Sides of the box are counted
counter-clockwise from +x: 0 is +x, 1 is +y, 2 is -x, 3 is -y. Lengths in m, textures are `(h, w, 3) float32` BGR.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from ..types import Image
from .optics import CameraOptics, Finish, Rays
from .vision import cv2

__all__ = ["Atlas", "Box", "BoxCaster", "CameraOptics", "Finish", "Rays", "texture_noise"]

Texture: TypeAlias = npt.NDArray[np.float32]
_Array: TypeAlias = npt.NDArray[np.float32]

_BORDER_PX = 4  # replicated round each patch: with less, bilinear lookups show black seams
_PANORAMA_EXTRA_RAD = 1.1  # of the panorama repeated at each end, so that no lookup needs a modulo
_FLAT = 1e-3  # least cosine to a side's normal, relative to the optical axis; beyond is another side anyway
_NEAREST_M = 0.01  # the camera is kept this far inside the box


class Atlas:
    """All textures in one image, so that one `cv2.remap` paints a frame.

    To change textures while another thread renders, paint a `copy` and hand it to the caster. Four channels,
    because OpenCV's bilinear remap of 160 x 120 takes 50 us with four and 132 us with three.
    """

    def __init__(self, sizes_hw: Sequence[tuple[int, int]]) -> None:
        self.sizes_hw = tuple(sizes_hw)
        tops = np.cumsum([0] + [height + 2 * _BORDER_PX for height, _ in sizes_hw])
        self.tops = tuple(int(top) + _BORDER_PX for top in tops[:-1])
        width = max(width for _, width in sizes_hw) + 2 * _BORDER_PX
        self.image: Image = np.zeros((int(tops[-1]), width, 4), np.uint8)

    def copy(self) -> Atlas:
        """An atlas of its own with the same textures."""
        atlas = Atlas(self.sizes_hw)
        np.copyto(atlas.image, self.image)
        return atlas

    @property
    def left(self) -> int:
        """Column at which every patch starts."""
        return _BORDER_PX

    def paint(self, patch: int, texture: Texture) -> None:
        """Fill patch `patch` with levels 0 to 255."""
        (height, width), top = self.sizes_hw[patch], self.tops[patch]
        levels = cv2.cvtColor(texture.clip(0, 255).astype(np.uint8), cv2.COLOR_BGR2BGRA)
        border = (_BORDER_PX,) * 4
        self.image[top - _BORDER_PX : top + height + _BORDER_PX, : width + 2 * _BORDER_PX] = cv2.copyMakeBorder(
            levels, *border, cv2.BORDER_REPLICATE
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangular arena with low walls in a larger room."""

    half_x_m: float
    half_y_m: float
    wall_m: float
    texel_m: float  # size of a texture pixel on floor and walls
    panorama_hw: tuple[int, int] = (240, 960)  # the room above the walls: all directions round
    panorama_up: tuple[float, float] = (-0.1, 1.1)  # tangents of elevation at its lower and upper edge

    def side_size_hw(self, side: int) -> tuple[int, int]:
        """Texture size of a side in px; columns run along +y (sides 0, 2) or +x (1, 3), row 0 is the top edge."""
        length_m = 2 * (self.half_x_m if side % 2 else self.half_y_m)
        return round(self.wall_m / self.texel_m), round(length_m / self.texel_m)

    @property
    def floor_size_hw(self) -> tuple[int, int]:
        """Texture size of the floor in px; columns run along +x, rows along +y."""
        return round(2 * self.half_y_m / self.texel_m), round(2 * self.half_x_m / self.texel_m)

    @property
    def panorama_extra_px(self) -> int:
        return math.ceil(self.panorama_hw[1] * _PANORAMA_EXTRA_RAD / (2 * math.pi))

    def atlas(self) -> Atlas:
        """An empty atlas: patch 0 is the floor, 1 to 4 are the sides, 5 the panorama."""
        height, width = self.panorama_hw
        sides = [self.side_size_hw(side) for side in range(4)]
        return Atlas([self.floor_size_hw, *sides, (height, width + 2 * self.panorama_extra_px)])

    def paint_panorama(self, atlas: Atlas, panorama: Texture) -> None:
        """Fill patch 5; column 0 looks along -x, columns run clockwise."""
        extra = self.panorama_extra_px
        atlas.paint(5, np.concatenate([panorama[:, -extra:], panorama, panorama[:, :extra]], axis=1))


class _Visible(NamedTuple):
    """A side of the box and the blocks of columns it may be seen in."""

    side: int
    first: int
    last: int

    def order(self) -> int:
        return self.first


class BoxCaster:
    """What a camera that moves level in a `Box` sees of it, lens and rolling shutter included, sensor not.

    All per-pixel arrays are column-major and in blocks of columns, `(W / B, B * H)`: the columns of one side of the
    box are then one contiguous piece, and what belongs to a row (`(B * H,)`) is added to long stretches. NumPy
    spends 30 ns on every stretch, however short: on row-major arrays a frame takes twice as long.
    """

    def __init__(self, rays: Rays, box: Box, atlas: Atlas, optics: CameraOptics) -> None:
        self.atlas = atlas  # may be replaced by one of the same sizes at any time
        self._box, self._ahead_m = box, optics.ahead_m
        self._scale = 1 / box.texel_m
        height, width = rays.left.shape
        self._shape = (width, height)
        self._block = math.gcd(width, 8)
        self._row_s = np.tile(rays.row_s[:, 0], self._block).astype(np.float32)
        self._half_readout_s = abs(float(rays.row_s[0, 0]))
        self._place_textures(atlas, optics)
        self._place_background(rays, optics, atlas)
        azimuth = np.arctan(rays.left.astype(np.float64))
        # Azimuth falls from the left column to the right one; bounds hold for all rows of a column.
        self._column_low = np.maximum.accumulate(-azimuth.min(axis=0)).tolist()
        self._column_high = np.maximum.accumulate(-azimuth.max(axis=0)).tolist()
        self._azimuth_max = float(np.abs(azimuth).max())
        self._left = self._blocks(rays.left)
        self._fall = self._blocks(-rays.up)
        shape = self._left.shape
        self._ray_x, self._ray_y, self._map_x, self._map_y = _aligned(4, *shape)
        self._side_x, self._side_y, self._depth = _aligned(3, *shape)
        self._scratch = _aligned(4, *shape)
        self._mask = np.empty(shape, np.bool_)
        # Arrays, as a scalar operand takes np.maximum twice as long.
        self._least, self._most = np.full(shape, _FLAT, np.float32), np.full(shape, -_FLAT, np.float32)
        self._painted: Image = np.empty((*shape, 4), np.uint8)

    def _blocks(self, picture: npt.NDArray[np.floating]) -> _Array:
        """A per-pixel table `(H, W)` in the layout of this class."""
        width, height = self._shape
        table = _aligned(width // self._block, self._block * height)
        table[:] = picture.T.reshape(table.shape)
        return table

    def _place_textures(self, atlas: Atlas, optics: CameraOptics) -> None:
        # Pixel i covers [i, i + 1), so a coordinate of remap, which means a centre, is half a pixel less.
        sizes, left = atlas.sizes_hw, atlas.left - 0.5
        floor_height, floor_width = sizes[0]
        self._floor_middle = (left + floor_width / 2, atlas.tops[0] - 0.5 + floor_height / 2)
        self._side_middle = [left + sizes[1 + side][1] / 2 for side in range(4)]
        camera_px = optics.height_m * self._scale
        self._side_eye = [
            np.float32(atlas.tops[1 + side] - 0.5 + sizes[1 + side][0] - camera_px) for side in range(4)
        ]  # texture row at the camera's height
        self._sky_middle = left + sizes[5][1] / 2

    def _place_background(self, rays: Rays, optics: CameraOptics, atlas: Atlas) -> None:
        """What lies behind the walls: the room in the upper rows, the floor in the lower ones."""
        box = self._box
        below = rays.up < 0
        horizon = int(np.count_nonzero(below.mean(axis=1) < 0.5))  # first row that sees the floor
        is_floor = (np.arange(len(rays.left)) >= horizon)[:, None]
        self._sees_floor = np.tile(is_floor[:, 0], self._block)
        rise_m = np.where(below, -optics.height_m, box.wall_m - optics.height_m)
        with np.errstate(divide="ignore"):
            limit_px = np.minimum(rise_m / rays.up, 1e3) * self._scale  # depth at which floor or room begins
        self._limit_px = self._blocks(limit_px)
        self._ground_px = self._blocks(np.where(is_floor, limit_px, 0.0))
        panorama_height, panorama_width = box.panorama_hw
        self._px_per_rad = panorama_width / (2 * math.pi)
        low, high = box.panorama_up
        share = ((rays.up - low) / (high - low)).clip(0, 1)
        sky_x = self._sky_middle - np.arctan(rays.left) * self._px_per_rad
        sky_y = atlas.tops[5] + (panorama_height - 1) * (1 - share)
        self._sky_x = self._blocks(np.where(is_floor, 0.0, sky_x))
        self._sky_y = self._blocks(np.where(is_floor, 0.0, sky_y))

    def picture(self, x_m: float, y_m: float, heading_rad: float, speed_m_s: float, turn_rad_s: float) -> Image:
        """The picture `(H, W, 3) uint8` for the robot's pose and motion in the middle of the frame."""
        self._cast(x_m, y_m, heading_rad, speed_m_s, turn_rad_s)
        # In blocks of columns: OpenCV's remap is a quarter slower on rows of less than 128 pixels.
        cv2.remap(self.atlas.image, self._map_x, self._map_y, cv2.INTER_LINEAR, dst=self._painted)
        upright = cv2.transpose(self._painted.reshape(*self._shape, 4))
        return cast(Image, cv2.cvtColor(upright, cv2.COLOR_BGRA2BGR))

    def _cast(self, x_m: float, y_m: float, heading_rad: float, speed_m_s: float, turn_rad_s: float) -> None:
        """Texture coordinates of every pixel."""
        box, ahead_m = self._box, self._ahead_m
        heading_rad = math.remainder(heading_rad, 2 * math.pi)
        cos, sin = math.cos(heading_rad), math.sin(heading_rad)
        reach_x, reach_y = box.half_x_m - _NEAREST_M, box.half_y_m - _NEAREST_M
        camera_x = min(reach_x, max(-reach_x, x_m + ahead_m * cos))
        camera_y = min(reach_y, max(-reach_y, y_m + ahead_m * sin))
        angle = self._row_s * np.float32(turn_rad_s) + np.float32(heading_rad)
        row_cos, row_sin = np.cos(angle), np.sin(angle)
        # The camera swings round the robot's centre: its sideways speed comes with the turn.
        reach_px = self._row_s * np.float32(speed_m_s * self._scale) + np.float32(ahead_m * self._scale)
        row_x = reach_px * row_cos + np.float32((camera_x - ahead_m * cos) * self._scale)
        row_y = reach_px * row_sin + np.float32((camera_y - ahead_m * sin) * self._scale)
        np.multiply(self._left, row_sin, out=self._ray_x)
        np.subtract(row_cos, self._ray_x, out=self._ray_x)
        np.multiply(self._left, row_cos, out=self._ray_y)
        np.add(self._ray_y, row_sin, out=self._ray_y)
        self._cast_background(angle, row_x, row_y)
        done = 0
        for seen in self._visible(camera_x, camera_y, heading_rad, speed_m_s, turn_rad_s):
            self._cast_side(seen, done, row_x, row_y)
            done = max(done, seen.last)
        before = np.less(self._depth, self._limit_px, out=self._mask)
        np.copyto(self._map_x, self._side_x, where=before)
        np.copyto(self._map_y, self._side_y, where=before)

    def _cast_background(self, angle: _Array, row_x: _Array, row_y: _Array) -> None:
        """Floor and room at once: each has zeros in the tables of the other."""
        middle_x, middle_y = self._floor_middle
        turned = angle * np.float32(-self._px_per_rad)
        start_x = np.where(self._sees_floor, row_x + np.float32(middle_x), turned)
        start_y = np.where(self._sees_floor, row_y + np.float32(middle_y), np.float32(0))
        np.multiply(self._ground_px, self._ray_x, out=self._map_x)
        np.add(self._map_x, start_x, out=self._map_x)
        np.add(self._map_x, self._sky_x, out=self._map_x)
        np.multiply(self._ground_px, self._ray_y, out=self._map_y)
        np.add(self._map_y, start_y, out=self._map_y)
        np.add(self._map_y, self._sky_y, out=self._map_y)

    def _visible(
        self, camera_x: float, camera_y: float, heading_rad: float, speed_m_s: float, turn_rad_s: float
    ) -> list[_Visible]:
        """The sides in view, left to right; neighbours share the blocks in which their corner may be."""
        half_x, half_y, edge = self._box.half_x_m, self._box.half_y_m, self._azimuth_max
        turned = self._half_readout_s * abs(turn_rad_s)
        moved_m = self._half_readout_s * abs(speed_m_s) + self._ahead_m * turned
        bearings, slacks = [], []
        for sign_x, sign_y in _CORNERS:
            dx, dy = sign_x * half_x - camera_x, sign_y * half_y - camera_y
            bearings.append(math.remainder(math.atan2(dy, dx) - heading_rad, 2 * math.pi))
            slacks.append(1e-3 + turned + moved_m / math.hypot(dx, dy))
        found = []
        for side in range(4):
            right = bearings[side - 1]
            left = right + (bearings[side] - right) % (2 * math.pi) + slacks[side]
            right -= slacks[side - 1]
            if right > edge:  # may come into view from the other side
                right, left = right - 2 * math.pi, left - 2 * math.pi
            if right < edge and left > -edge:
                first = bisect_left(self._column_low, -left) // self._block
                last = -(-bisect_left(self._column_high, -right) // self._block)
                found.append(_Visible(side, first, last))
        return sorted(found, key=_Visible.order)

    def _cast_side(self, seen: _Visible, done: int, row_x: _Array, row_y: _Array) -> None:
        """Draw a side into its blocks; in those that a neighbour drew before, the nearer one wins."""
        half_m = self._box.half_y_m if seen.side % 2 else self._box.half_x_m
        across, along = (row_y, row_x) if seen.side % 2 else (row_x, row_y)
        distance = np.float32((half_m if seen.side < 2 else -half_m) * self._scale) - across
        along = along + np.float32(self._side_middle[seen.side])
        own = slice(max(done, seen.first), seen.last)
        self._project(seen.side, own, distance, along, self._depth[own], self._side_x[own], self._side_y[own])
        shared = slice(seen.first, min(done, seen.last))
        if shared.start < shared.stop:
            depth, x, y = self._scratch[1:, shared]
            self._project(seen.side, shared, distance, along, depth, x, y)
            nearer = np.less(depth, self._depth[shared], out=self._mask[shared])
            np.copyto(self._depth[shared], depth, where=nearer)
            np.copyto(self._side_x[shared], x, where=nearer)
            np.copyto(self._side_y[shared], y, where=nearer)

    def _project(
        self, side: int, blocks: slice, distance: _Array, along: _Array, depth: _Array, x: _Array, y: _Array
    ) -> None:
        """Depth ahead and texture coordinates, in px, of an endless wall; far away where a ray never meets it."""
        across_ray, along_ray = (self._ray_y, self._ray_x) if side % 2 else (self._ray_x, self._ray_y)
        if side < 2:
            towards = np.maximum(across_ray[blocks], self._least[blocks], out=self._scratch[0, blocks])
        else:
            towards = np.minimum(across_ray[blocks], self._most[blocks], out=self._scratch[0, blocks])
        np.divide(distance, towards, out=depth)
        np.multiply(depth, along_ray[blocks], out=x)
        np.add(x, along, out=x)
        np.multiply(depth, self._fall[blocks], out=y)
        np.add(y, self._side_eye[side], out=y)


def _aligned(*shape: int) -> _Array:
    """An empty array on a cache line's boundary: NumPy's vector loops are 1.5 times as fast on those."""
    size_bytes = 4 * math.prod(shape)
    memory = np.empty(size_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size_bytes].view(np.float32).reshape(shape)


_CORNERS = ((1, 1), (-1, 1), (-1, -1), (1, -1))  # corner i is the left end of side i, seen from inside


def texture_noise(rng: np.random.Generator, height: int, width: int, octaves: Sequence[tuple[int, float]]) -> Texture:
    """Smooth noise `(height, width) float32`: each octave is (cells across 256 px, standard deviation)."""
    total = np.zeros((height, width), np.float32)
    for cells, amplitude in octaves:
        grid = rng.standard_normal((height * cells // 256 + 2, width * cells // 256 + 2), dtype=np.float32)
        total += np.float32(amplitude) * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    return total
