"""The picture of `relod bench latency`: where the time from the senses to the motion goes in each mode, and how often.

Above, each mode's way by the medians of its stages, seen from the moment the observation is complete: what lies left of
it has already happened when the policy is asked, what lies right must fit into the cycle. Below, how many cycles took
longer than a time. The picture needs matplotlib: relod[plots].
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import StartError
from ..runtime.experiments import one_of
from ..runtime.plot import COLOURS, FORMATS
from ..runtime.timing import Samples, percentiles
from .latencyrow import ModeRow
from .stagetable import short_ms

__all__ = ["Segment", "check_plot", "segments", "write_plot"]

# Hues for where it happens: the robot's body grey, its host blue, the link orange and red, the learner's host green.
BEFORE = {"sensor_delay": ("sensor true > received", "#bdbdbd"), "sensor_wait": ("received > observed", "#9ecae1")}
WITHIN = {
    "uplink": ("uplink", "#e69f00"),
    "decode": ("decode", "#cc79a7"),
    "queue": ("queue", "#f0e442"),
    "inference": ("inference", "#009e73"),
    "downlink": ("downlink", "#d55e00"),
}
REST, OWN = "observed_to_wire", ("hand-over, limits, write", "#2b6cb0")
AFTER = {"wire_delay": ("wire > robot", "#8c8c8c"), "actuator_delay": ("robot > moved", "#525252")}
LEAST_MS = 0.1  # of the axis of times


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stage's part of a mode's way; times in ms, 0 is when the observation is complete."""

    label: str
    colour: str
    start: float
    p50: float
    p99: float


def check_plot(path: Path) -> None:
    """`SettingsError` for an ending that is none of a picture's, `StartError` without matplotlib."""
    one_of(path.suffix, FORMATS, "ending of --plot")
    if importlib.util.find_spec("matplotlib") is None:
        raise StartError("matplotlib is not installed", "pip install relod[plots]")


def segments(samples: Samples) -> list[Segment]:
    """The way from the newest packet's being true to the motion, without the stages that the mode does not have.

    What is left of observed > wire when all that has a stage of its own is taken off is this host's own part.
    """
    before = _known(samples, BEFORE)
    within = _known(samples, WITHIN)
    whole = percentiles(samples.get(REST, ()))
    if whole is not None:
        left = {name: max(0.0, whole[name] - sum(each[name] for *_, each in within)) for name in ("p50", "p99")}
        within.append((*OWN, {"p50": left["p50"], "p99": max(left["p50"], left["p99"])}))
    found, at = [], -sum(each["p50"] for *_, each in before)
    for label, colour, each in before + within + _known(samples, AFTER):
        found.append(Segment(label=label, colour=colour, start=at, p50=each["p50"], p99=each["p99"]))
        at += each["p50"]
    return found


def _known(samples: Samples, stages: Mapping[str, tuple[str, str]]) -> list[tuple[str, str, dict[str, float]]]:
    told = ((label, colour, percentiles(samples.get(name, ()))) for name, (label, colour) in stages.items())
    return [(label, colour, each) for label, colour, each in told if each is not None]


def write_plot(rows: Sequence[ModeRow], title: str, out: Path) -> None:
    """Draw the modes that have samples. `StartError` when the file cannot be written."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.samples]
    # As in `runtime/plot.py`: letters as text and no random ids, so that the file is small and tells no two stories.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "relod", "text.parse_math": False}):
        figure = Figure(figsize=(9.0, 4.6 + 1.1 * len(rows)), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        seconds = min(row.measured_s for row in rows)
        figure.suptitle(
            f"relod bench latency: {title}\n{seconds:.0f} s of cycles in each mode",
            x=0.01,
            horizontalalignment="left",
            fontsize="medium",
        )
        way, tail = figure.subplots(2, 1, height_ratios=(0.6 + len(rows), 3.2))
        _draw_way(way, rows)
        _draw_tail(tail, rows)
        for axes in (way, tail):
            axes.spines[["top", "right"]].set_visible(False)
        try:
            figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
        except OSError as error:
            raise StartError(f"{out} cannot be written: {error.strerror}", "name another file with --plot") from error


def _draw_way(axes: Any, rows: Sequence[ModeRow]) -> None:
    labelled: set[str] = set()
    ends = [row.cycle_ms or 0.0 for row in rows]
    for y, row in enumerate(rows):
        ways = segments(row.samples)
        for number, each in enumerate(ways):
            label = None if each.label in labelled else each.label
            labelled.add(each.label)
            axes.barh(y, each.p50, left=each.start, height=0.36, color=each.colour, label=label)
            # Each stage's own spread, from where it begins by the medians, in a lane of its own.
            lane = y + 0.23 + 0.045 * number
            axes.plot([each.start, each.start + each.p99], [lane, lane], color=each.colour, linewidth=1.6)
            axes.plot([each.start + each.p99] * 2, [lane - 0.016, lane + 0.016], color=each.colour, linewidth=1.6)
        whole = percentiles(row.samples.get("sensor_to_motion", ()))
        if whole is not None and ways:
            text = f"sensor true > moved: {short_ms(whole['p50'])} ms (median), {short_ms(whole['p99'])} ms (p99)"
            axes.annotate(text, (ways[0].start, y - 0.21), va="bottom", fontsize="small")
        ends += [ways[0].start, *(each.start + each.p99 for each in ways)] if ways else []
    _draw_budget(axes, rows)
    room = 0.03 * (max(ends) - min(ends)) or 1.0
    axes.set_xlim(min(ends) - room, max(ends) + room)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row.mode for row in rows])
    axes.set_ylim(len(rows) - 0.3, -0.5)
    axes.set_xlabel("ms before and after the observation is complete; bars: medians, lines below them: to the p99")
    axes.set_title("from the newest sensor values to the motion: where the time goes", loc="left", fontsize="medium")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    handles, labels = axes.get_legend_handles_labels()
    order = [label for label, _ in (*BEFORE.values(), *WITHIN.values(), OWN, *AFTER.values())]
    pairs = sorted(zip(handles, labels, strict=True), key=lambda pair: order.index(pair[1]))
    _legend(axes, [handle for handle, _ in pairs])


def _draw_tail(axes: Any, rows: Sequence[ModeRow]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    least = 1.0
    for number, row in enumerate(rows):
        values = np.sort(row.samples.get("deadline_to_wire", np.zeros(0)))
        if not len(values):
            continue
        longer = 1 - np.arange(len(values)) / len(values)  # the share of cycles at least as long as each
        least = min(least, float(longer[-1]))
        axes.step(
            np.maximum(values, LEAST_MS),
            longer,
            where="pre",
            color=COLOURS[number],
            linewidth=1.8,
            label=_tail_text(row),
        )
    _draw_budget(axes, rows)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(0.7 * least, 1.3)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())  # matplotlib's own labels need what `parse_math` leaves out
    axes.set_xlabel("deadline > command on the robot's wire, ms")
    axes.set_ylabel("share of cycles that took longer")
    axes.set_title("how often a command comes how late", loc="left", fontsize="medium")
    axes.grid(alpha=0.25)
    _legend(axes, axes.get_legend_handles_labels()[0])


def _legend(axes: Any, handles: Sequence[Any]) -> None:
    if handles:
        axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small", frameon=False)


def _tail_text(row: ModeRow) -> str:
    rate = row.figures["updates_per_s"]
    learned = f"{rate:.3g} updates/s" if rate else "no update"
    missed = f"{row.figures['late_actions'] or 0} late actions, {row.figures['overruns'] or 0} overruns"
    return f"{row.mode}\n{missed}\n{learned}"


def _draw_budget(axes: Any, rows: Sequence[ModeRow]) -> None:
    """What a command must not take longer than: one cycle."""
    for cycle_ms in {row.cycle_ms for row in rows if row.cycle_ms}:
        axes.axvline(cycle_ms, color="black", linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            f"one cycle,\n{cycle_ms:g} ms",
            (cycle_ms, 1.0),
            xytext=(3, 0),
            textcoords="offset points",
            xycoords=axes.get_xaxis_transform(),
            va="top",
            fontsize="small",
        )
