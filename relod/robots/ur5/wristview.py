"""What a camera on the UR5's tool sees of a room with a monitor in it: a ray caster for cameras that turn freely.

The room is a box of six textured sides, the monitor a textured rectangle that stands in it, upright and facing -y.
Each pixel's ray is stored once, lens distortion included; every image row has its own pose, so the rolling shutter is
exact. No shadows, and nothing of the arm: the camera is before its tool.

Frame: that of `kinematics`. Sides are counted -x, +x, -y, +y, floor, ceiling. Lengths in m.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt

from ...types import Image
from ..optics import CameraOptics, Rays
from ..scene import Atlas
from ..vision import cv2
from .kinematics import Vector3, tool_pose

__all__ = ["MONITOR_PATCH", "Room", "WristCaster"]

_Array: TypeAlias = npt.NDArray[np.float32]

MONITOR_PATCH = 6  # of the atlas; the sides before it are as counted above
_STEP_S = 1e-3  # over which the camera's speed is taken
_LEAST = np.float32(1e-6)  # for a ray along a side, which happens once in a thousand frames; it meets it far away


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """A box, and the size of what hangs and stands in it."""

    low_m: Vector3
    high_m: Vector3
    side_px: int  # width and height of a side's texture
    monitor_hw_m: tuple[float, float]  # bezel included
    monitor_hw_px: tuple[int, int]

    def atlas(self) -> Atlas:
        """An empty atlas: six sides, then the monitor."""
        return Atlas([(self.side_px, self.side_px)] * 6 + [self.monitor_hw_px])


class WristCaster:
    """What the camera sees, lens and rolling shutter included, sensor not. One per thread: it reuses its buffers."""

    def __init__(self, rays: Rays, room: Room, atlas: Atlas, optics: CameraOptics) -> None:
        self.atlas = atlas  # may be replaced by one of the same sizes at any time
        self._room, self._ahead_m = room, optics.ahead_m
        self._right, self._down = -rays.left, -rays.up
        self._row_s = rays.row_s
        self.turn_rad_s = 0.0  # how fast the camera of the newest picture turned to its right
        self._middle = np.add(room.low_m, room.high_m) / 2
        self._half = np.subtract(room.high_m, room.low_m) / 2
        height, width = rays.left.shape
        self._rays, self._spots = np.empty((2, 3, height, width), np.float32)
        self._reach = np.empty((3, height, width), np.float32)
        self._nearest, self._sums, self._map_x, self._map_y = np.empty((4, height, width), np.float32)
        self._on_x, self._on_z, self._mask = np.empty((3, height, width), np.bool_)
        self._painted: Image = np.empty((height, width, 4), np.uint8)

    def picture(self, q: Sequence[float], qd: Sequence[float], monitor_m: Vector3) -> Image:
        """The picture `(H, W, 3) uint8` for the arm's posture and speeds in the middle of the frame.

        `monitor_m` is the middle of the monitor.
        """
        camera, change = self._camera(q, qd)
        self.turn_rad_s = float(change[1] @ camera[2])
        # Lengths in half rooms: each side then is one from the middle. Axis by axis: where the camera is, and its
        # three axes, for each row.
        rows = ((camera[..., None, None] + change[..., None, None] * self._row_s) / self._half[:, None, None]).astype(
            np.float32
        )
        for ray, forward, right, down in zip(self._rays, *rows[1:], strict=True):
            np.multiply(self._right, right, out=ray)
            np.multiply(self._down, down, out=self._sums)
            np.add(ray, self._sums, out=ray)
            np.add(ray, forward, out=ray)
        self._hit_sides(rows[0])
        self._hit_monitor(rows[0], np.subtract(monitor_m, self._middle) / self._half)
        cv2.remap(self.atlas.image, self._map_x, self._map_y, cv2.INTER_LINEAR, dst=self._painted)
        return cast(Image, cv2.cvtColor(self._painted, cv2.COLOR_BGRA2BGR))

    def _camera(self, q: Sequence[float], qd: Sequence[float]) -> tuple[npt.NDArray[np.float64], ...]:
        """The camera's place from the room's middle, and its axes forward, right and down, `(4, 3)`; and their change
        per second."""
        before, after = (
            np.array(tool_pose([at + speed * step_s for at, speed in zip(q, qd, strict=True)]))
            for step_s in (-_STEP_S / 2, _STEP_S / 2)
        )
        camera, change = (before + after) / 2, (after - before) / _STEP_S
        camera[0] += self._ahead_m * camera[1] - self._middle
        change[0] += self._ahead_m * change[1]
        return camera, change

    def _hit_sides(self, origins: _Array) -> None:
        """Texture coordinates of what each ray meets of the room."""
        for ray, origin, reach in zip(self._rays, origins, self._reach, strict=True):
            np.equal(ray, np.float32(0), out=self._mask)
            np.copyto(ray, _LEAST, where=self._mask)
            np.divide(np.float32(1), ray, out=self._sums)
            np.multiply(self._sums, origin, out=reach)
            np.abs(self._sums, out=self._sums)
            np.subtract(self._sums, reach, out=reach)
        reach_x, reach_y, reach_z = self._reach
        np.less(reach_x, reach_y, out=self._on_x)
        np.minimum(reach_x, reach_y, out=self._nearest)
        np.less(reach_z, self._nearest, out=self._on_z)
        np.minimum(reach_z, self._nearest, out=self._nearest)
        for ray, origin, spot in zip(self._rays, origins, self._spots, strict=True):
            np.multiply(ray, self._nearest, out=spot)
            np.add(spot, origin, out=spot)
        self._place()

    def _place(self) -> None:
        """From spots on the room's sides, each from -1 to 1, to places in the atlas."""
        x, y, z = self._spots
        half_px, atlas = np.float32(self._room.side_px / 2), self.atlas
        np.logical_not(self._on_z, out=self._mask)
        np.logical_and(self._on_x, self._mask, out=self._on_x)
        np.copyto(self._map_x, x)
        np.copyto(self._map_x, y, where=self._on_x)
        np.copyto(self._map_y, z)
        np.copyto(self._map_y, y, where=self._on_z)
        np.multiply(self._map_x, half_px, out=self._map_x)
        np.add(self._map_x, np.float32(atlas.left - 0.5) + half_px, out=self._map_x)
        np.multiply(self._map_y, -half_px, out=self._map_y)
        # Each side's texture has its own place, one under the other: two for each axis.
        for axis, where in ((1, None), (0, self._on_x), (2, self._on_z)):
            tops = np.array(atlas.tops[2 * axis : 2 * axis + 2], np.float32) - np.float32(0.5) + half_px
            np.greater(self._rays[axis], np.float32(0), out=self._mask)
            offset = self._sums if where is None else self._nearest
            np.multiply(self._mask, tops[1] - tops[0], out=offset)
            np.add(offset, tops[0], out=offset)
            if where is not None:
                np.copyto(self._sums, offset, where=where)
        np.add(self._map_y, self._sums, out=self._map_y)

    def _hit_monitor(self, origins: _Array, monitor: npt.NDArray[np.float64]) -> None:
        """The monitor before the room: it stands nearer than the far side, and nothing is nearer than it."""
        x, y, z = monitor
        height_m, width_m = self._room.monitor_hw_m
        height_px, width_px = self._room.monitor_hw_px
        ray_x, ray_y, ray_z = self._rays
        reach, across, up = self._reach
        np.divide(np.float32(y) - origins[1], ray_y, out=reach)
        np.greater(reach, np.float32(0), out=self._mask)
        for ray, origin, middle, half, size_m, size_px, place in (
            (ray_x, origins[0], x, self._half[0], width_m, width_px, across),
            (ray_z, origins[2], z, self._half[2], -height_m, height_px, up),
        ):
            np.multiply(ray, reach, out=place)
            np.add(place, origin - np.float32(middle), out=place)
            np.multiply(place, np.float32(half / size_m * size_px), out=place)
            np.abs(place, out=self._sums)
            np.less(self._sums, np.float32(size_px / 2), out=self._on_x)
            np.logical_and(self._mask, self._on_x, out=self._mask)
        if self._mask.any():
            np.add(across, np.float32(self.atlas.left - 0.5 + width_px / 2), out=across)
            np.add(up, np.float32(self.atlas.tops[MONITOR_PATCH] - 0.5 + height_px / 2), out=up)
            np.copyto(self._map_x, across, where=self._mask)
            np.copyto(self._map_y, up, where=self._mask)
