"""The table of stages: columns are runs or modes, rows what time went into, cells percentiles and a histogram; pure.

All histograms have one logarithmic scale, so that cells compare at a glance, along rows and along columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..runtime.blocks import BLOCKS
from ..runtime.timing import STAGES, Samples, percentiles

__all__ = ["COLUMNS", "Fact", "format_stages", "histogram", "pair_ms", "short_ms"]

COLUMNS = 79  # a terminal has at least 80
TITLE = 22  # characters of a row's title
PAIR = 9  # of "p50/p99"
SIDE_BY_SIDE = 3  # columns; further ones go below
LOW_MS, DECADES = 0.1, 4  # the scale of all histograms: to 1 s
FEW_BARS, MANY_BARS = 2, 4  # in each decade: with three columns, with fewer

Fact: TypeAlias = tuple[str, Sequence[str]]  # a row's title, and its cell in each column


def format_stages(columns: Mapping[str, Samples], facts: Sequence[Fact] = ()) -> str:
    """Lines of at most 79 characters.

    Args:
        columns: samples in ms by the name of the stage, as from `timing.stage_samples`, for each column's title.
            Stages without samples in any column are left out.
        facts: further rows below, with one cell for each column; rows of empty cells are left out.
    """
    names = list(columns)
    shown = [info for info in STAGES if any(len(columns[name].get(info.name, ())) for name in names)]
    told = [(title, cells) for title, cells in facts if any(cells)]
    bars = FEW_BARS if len(names) >= SIDE_BY_SIDE else MANY_BARS
    width = 2 + PAIR + bars * DECADES
    head = f"ms, p50/p99; histograms: log from {LOW_MS:g} to {LOW_MS * 10**DECADES:g} ms, {bars} bars per decade"
    lines = [head]
    for first in range(0, len(names), SIDE_BY_SIDE):
        part = slice(first, first + SIDE_BY_SIDE)
        lines += [""] * bool(first) + [_line("", (f"{name:^{width - 1}}" for name in names[part]), width)]
        for info in shown:
            samples = (columns[name].get(info.name, np.zeros(0)) for name in names[part])
            lines.append(
                _line(info.title, (f"{pair_ms(each):>{PAIR}} {histogram(each, bars)}" for each in samples), width)
            )
        lines += [_line(title, (f"{cell:>{PAIR}}" for cell in cells[part]), width) for title, cells in told]
    return "\n".join(lines)


def _line(title: str, cells: Iterable[str], width: int) -> str:
    return (f"{title[:TITLE]:<{TITLE}}" + "".join(f" {cell[: width - 1]:<{width - 1}}" for cell in cells)).rstrip()


def pair_ms(samples: npt.ArrayLike) -> str:
    """`p50/p99` in at most 9 characters; `-` of nothing."""
    found = percentiles(samples)
    return f"{short_ms(found['p50'])}/{short_ms(found['p99'])}" if found else "-"


def short_ms(value_ms: float) -> str:
    """About three digits in at most four characters; from 10 s on in seconds or minutes, with their unit."""
    if value_ms < 9999.5:
        return f"{value_ms:.{0 if value_ms >= 99.95 else 1 if value_ms >= 9.995 else 2}f}"
    return f"{value_ms / 1000:.0f}s" if value_ms < 999_500 else f"{min(999, value_ms / 60_000):.0f}m"


def histogram(samples_ms: npt.ArrayLike, bars_per_decade: int) -> str:
    """`DECADES * bars_per_decade` characters; what is beyond the scale is in its first or last bar.

    The highest bar is full; any sample at all shows, as a tail of one in a thousand is what matters here.
    """
    bars = DECADES * bars_per_decade
    values = np.asarray(samples_ms, np.float64)
    at = np.floor(np.log10(np.maximum(values, LOW_MS) / LOW_MS) * bars_per_decade).astype(int)
    counts = np.bincount(np.clip(at, 0, bars - 1), minlength=bars)
    heights = np.ceil(8 * counts / max(1, counts.max())).astype(int)
    return "".join(BLOCKS[height] for height in heights)
