"""Charts and pictures of block characters, for the live view; pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

import numpy as np
import numpy.typing as npt
from rich.color import Color
from rich.segment import Segment
from rich.style import Style

from ..types import Image

__all__ = ["half_blocks", "sparkline"]

BLOCKS = " ▁▂▃▄▅▆▇█"
COLOUR_STEP = 8  # colours are rounded to this, so that few styles exist and all are cached


def sparkline(values: Sequence[float], columns: int, rows: int) -> list[str]:
    """A bar chart of `rows` texts of at most `columns` characters, newest value at the right; all of equal length.

    More values than columns are averaged in groups of equal size; the lowest value still has an eighth of a row.
    """
    heights = _grouped(values, columns)
    if not len(heights):
        return [""] * rows
    low, high = float(heights.min()), float(heights.max())
    scaled = (heights - low) / (high - low) if high > low else np.full(len(heights), 0.5)
    eighths = 1 + np.rint(scaled * (8 * rows - 1)).astype(int)
    return ["".join(BLOCKS[min(8, max(0, e - 8 * row))] for e in eighths) for row in reversed(range(rows))]


def _grouped(values: Sequence[float], groups: int) -> npt.NDArray[np.float64]:
    array = np.array([value for value in values if math.isfinite(value)], np.float64)
    if len(array) <= groups:
        return array
    edges = np.linspace(0, len(array), groups + 1).astype(int)
    means: npt.NDArray[np.float64] = np.add.reduceat(array, edges[:-1]) / np.diff(edges)
    return means


def half_blocks(image: Image, columns: int, rows: int) -> list[list[Segment]]:
    """A BGR image `(H, W, 3) uint8` as `rows` lines of `columns` characters, each two pixels, one above the other."""
    levels = _shrunk(image, 2 * rows, columns) // COLOUR_STEP * COLOUR_STEP
    packed = (levels[..., 2] << 16 | levels[..., 1] << 8 | levels[..., 0]).tolist()
    return [
        [
            Segment("▀" * len(list(run)), _half_block(top, bottom))
            for (top, bottom), run in groupby(zip(packed[row], packed[row + 1], strict=True))
        ]
        for row in range(0, 2 * rows, 2)
    ]


def _shrunk(image: Image, height: int, width: int) -> npt.NDArray[np.int64]:
    """Area means `(height, width, 3)`; an image smaller than that repeats its pixels."""
    sums = image.astype(np.int64)
    for axis, size in ((0, height), (1, width)):
        edges = np.arange(size + 1) * image.shape[axis] // size
        counts = np.maximum(1, np.diff(edges))  # reduceat takes one element where a group would be empty
        sums = np.add.reduceat(sums, edges[:-1], axis=axis) // np.expand_dims(counts, tuple({0, 1, 2} - {axis}))
    return sums


@lru_cache(maxsize=1 << 14)
def _half_block(top: int, bottom: int) -> Style:
    return Style(color=_colour(top), bgcolor=_colour(bottom))


def _colour(packed: int) -> Color:
    return Color.from_rgb(packed >> 16, packed >> 8 & 0xFF, packed & 0xFF)
