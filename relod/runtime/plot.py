"""Learning curves of many runs in one picture: `relod plot`. The curve of one run: `curve.py`.

Each group of runs (`experiments.py`) is a mean curve with a band over its runs, and each of them a thin line. The
picture needs matplotlib: relod[plots].
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import SettingsError, StartError
from .curve import MEAN_EPISODES, bootstrap_interval, running_mean
from .experiments import HEAD, Group, Run, one_of, phrase

__all__ = ["PlotOptions", "Reference", "parse_reference", "write_picture"]

GRID_POINTS = 100  # of a curve: forty runs in four groups are an SVG of 190 kB
LABEL_COLUMNS = 110
LEAST_LENGTH = 0.5  # of the group's longest run: a mean ends with its shortest, and one just begun says little yet
CAPTION = (
    "Thick: mean of the runs, as far as all of them go. Band: its 95 % bootstrap interval; of two runs, from one to"
    " the other. Thin: each run."
)
FORMATS = (".png", ".svg")
X_AXES = {"experience": "experience (minutes, without resets and charging)", "wall": "wall time (minutes)"}

# Okabe and Ito's colours, which differ for colour-blind readers too; then the same again in other dashes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222")
DASHES = ("-", "--", ":", "-.")
GREY = "#666666"

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A horizontal line, for example what random actions get."""

    name: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlotOptions:
    """How the picture is drawn; `SettingsError` for what cannot be."""

    out: Path
    x: str = "experience"
    window: int = MEAN_EPISODES  # episodes of the running mean
    references: tuple[Reference, ...] = ()

    def __post_init__(self) -> None:
        one_of(self.x, tuple(X_AXES), "--x")
        one_of(self.out.suffix, FORMATS, "ending of --out")


def parse_reference(text: str) -> Reference:
    """`NAME=VALUE`; `SettingsError` for anything else."""
    name, _, value = text.rpartition("=")
    try:
        number = float(value)
    except ValueError:
        number = np.nan
    if not name.strip() or not np.isfinite(number):
        raise SettingsError(f"--reference {text!r} is not NAME=VALUE", 'for example "held random=-398"')
    return Reference(name=name.strip(), value=number)


def write_picture(groups: Sequence[Group], options: PlotOptions) -> None:
    """Draw the groups' returns and successes. `StartError`: matplotlib is missing, or the file cannot be written."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise StartError("matplotlib is not installed", "pip install relod[plots]") from error
    out = options.out
    # Letters as text, not as outlines, and no random ids: a small file, and the same one for the same runs. A dollar
    # in somebody's name is no formula.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "relod", "text.parse_math": False}):
        legend_lines = sum(_legend_text(group, 0).count("\n") + 1 for group in groups)
        figure = Figure(figsize=(8.0, 5.2 + 0.2 * legend_lines), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        _draw(figure, groups, options)
        try:
            figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
        except OSError as error:
            raise StartError(f"{out} cannot be written: {error.strerror}", "name another file with --out") from error


def _draw(figure: Any, groups: Sequence[Group], options: PlotOptions) -> None:
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for number, group in enumerate(groups):
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": DASHES[number // len(COLOURS) % len(DASHES)],
        }
        _draw_group(top, bottom, group, style, options)
    for reference in options.references:
        _draw_reference(top, reference)
    figure.legend(
        loc="outside upper left",
        title=textwrap.fill(_title(groups), LABEL_COLUMNS),
        alignment="left",
        title_fontsize="medium",
        fontsize="small",
        frameon=False,
    )
    top.set_ylabel(f"return, mean of {options.window} episodes")
    bottom.set_ylabel(f"successes\nof the last {options.window}")
    bottom.set_ylim(-0.03 * options.window, 1.03 * options.window)
    bottom.set_yticks(sorted({0, options.window // 2, options.window}))
    bottom.set_xlabel(X_AXES[options.x])
    bottom.set_xlim(left=0)
    if any(len(group.runs) > 1 for group in groups):
        figure.supxlabel(CAPTION, x=0.02, horizontalalignment="left", fontsize="x-small", color=GREY)
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels([top, bottom])


def _title(groups: Sequence[Group]) -> str:
    """What all runs have in common."""
    identities = [group.runs[0].identity for group in groups]
    common = [name for name in HEAD if len({identity[name] for identity in identities}) == 1]
    return ", ".join(phrase(name, identities[0][name]) for name in common)


def _draw_group(top: Any, bottom: Any, group: Group, style: Mapping[str, str], options: PlotOptions) -> None:
    """In the upper panel each run; in both the mean and its band over the runs that are long enough."""
    if len(group.runs) > 1:
        for run in group.runs:
            x, y = _minutes(run, options.x), running_mean(run.returns, options.window)
            grid = np.linspace(x[0], x[-1], GRID_POINTS)
            top.plot(grid, np.interp(grid, x, y), linewidth=0.7, alpha=0.45, **style)
    runs = long_runs(group.runs, options.x)
    minutes = [_minutes(run, options.x) for run in runs]
    returns = [running_mean(run.returns, options.window) for run in runs]
    successes = [run.recent_successes(options.window) for run in runs]
    for axes, curves, label in ((top, returns, _legend_text(group, len(runs))), (bottom, successes, None)):
        grid, values = on_grid(minutes, curves)
        if len(values) > 1 and len(grid):
            low, high = bootstrap_interval(values) if len(values) > 2 else (values.min(axis=0), values.max(axis=0))
            axes.fill_between(grid, low, high, color=style["color"], alpha=0.15, linewidth=0)
        marker = "o" if len(grid) == 1 else None  # a line of one point is none
        axes.plot(grid, values.mean(axis=0), linewidth=2.0, label=label, marker=marker, **style)


def long_runs(runs: Sequence[Run], x: str) -> list[Run]:
    """The runs at least half as long as the longest: those a mean is taken over."""
    ends = [_minutes(run, x)[-1] for run in runs]
    return [run for run, end in zip(runs, ends, strict=True) if end >= LEAST_LENGTH * max(ends)]


def on_grid(xs: Sequence[_Array], ys: Sequence[_Array]) -> tuple[_Array, _Array]:
    """Curves `ys` over their `xs` at common points `(G,)` as `(R, G)`: from where the last begins to where one ends."""
    begin, end = max(x[0] for x in xs), min(x[-1] for x in xs)
    count = GRID_POINTS if begin < end else int(begin == end)
    grid: _Array = np.linspace(begin, end, count)
    return grid, np.array([np.interp(grid, x, y) for x, y in zip(xs, ys, strict=True)])


def _minutes(run: Run, x: str) -> _Array:
    return run.experience_minutes if x == "experience" else run.wall_minutes


def _legend_text(group: Group, averaged: int) -> str:
    count = len(group.runs)
    of = "" if averaged == count else f", mean of {averaged}"
    return textwrap.fill(f"{group.label} ({count} runs{of})" if count > 1 else group.label, LABEL_COLUMNS)


def _draw_reference(axes: Any, reference: Reference) -> None:
    axes.axhline(reference.value, color=GREY, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.annotate(
        reference.name,
        xy=(1.0, reference.value),
        xycoords=axes.get_yaxis_transform(),
        xytext=(4, 0),
        textcoords="offset points",
        verticalalignment="center",
        fontsize="small",
        color=GREY,
        annotation_clip=False,
    )
