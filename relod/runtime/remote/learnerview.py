"""The learner's live view: all its robots on one terminal screen; a line every ten seconds where there is none.

`render` is a pure function of the state and the space, as in `view.py`, and everything goes to stderr.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.segment import Segment

from ..blocks import sparkline
from ..view import (
    BAD,
    CHART,
    CHART_ROWS,
    DIM,
    GOOD,
    LINE_EVERY_NS,
    REFRESH_NS,
    TREND_EPISODES,
    WARN,
    Line,
    Lines,
    Screen,
    clock_text,
    fact_line,
    fill_bar,
    framed,
    styled,
)
from ..viewstate import WARNINGS_KEPT

__all__ = ["LearnerState", "LearnerView", "RobotRow", "render", "summary_line"]

WARNINGS_SHOWN = 4
NAME_COLUMNS = 16
CHART_FROM_ROWS = 24  # below this many rows the chart gives way to the robots
STALE_POLICY_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RobotRow:
    """A robot as its learner sees it; None where nothing is known."""

    name: str
    state: str  # up, or what its link is
    acts: str  # robot or learner
    steps: int = 0
    steps_per_s: float = 0.0
    episodes: int = 0
    mean_return: float | None = None  # of its last episodes
    backlog: int = 0  # records on their way
    rtt_ms: float | None = None
    in_bytes_per_s: float = 0.0
    out_bytes_per_s: float = 0.0
    policy_age_s: float | None = None  # since the first step of the policy that acts


@dataclass(slots=True, kw_only=True)
class LearnerState:
    """A learner as a person wants to see it; every field may be filled at any time, in any order."""

    address: str  # what robots give as --learner
    phase: str = "starting"
    task: str = ""  # empty until the first robot has said
    algorithm: str = ""
    preset: str = ""
    folder: str = ""
    elapsed_s: float = 0.0
    experience_s: float = 0.0  # of all robots together
    steps: int = 0
    max_steps: int = 0  # 0 = no limit
    ingest_steps_per_s: float = 0.0
    episodes: int = 0
    returns: list[float] = field(default_factory=list)  # of all robots' episodes, oldest first
    updates: int = 0
    updates_per_s: float = 0.0
    policy_version: tuple[int, int] = (0, 0)
    replay_steps: int = 0
    replay_capacity: int = 0
    losses: Mapping[str, float] = field(default_factory=dict)
    robots: Sequence[RobotRow] = ()
    warnings: deque[str] = field(default_factory=lambda: deque(maxlen=WARNINGS_KEPT))  # oldest first


class LearnerView:
    """Shows a `LearnerState` on stderr: redrawn in place on a terminal, as lines elsewhere. A context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
        self._state: LearnerState | None = None
        self._next_ns: int | None = None
        self._warned: set[str] = set()

    def show(self, state: LearnerState, now_ns: int) -> None:
        """Show the state if it is time to; call it as often as you like."""
        self._state = state
        if self._live is None:
            for text in state.warnings:
                if text not in self._warned:
                    self._warned.add(text)
                    self._print(text)
        if self._next_ns is None or now_ns >= self._next_ns:
            self._next_ns = now_ns + (LINE_EVERY_NS if self._live is None else REFRESH_NS)
            self._draw()

    def _draw(self) -> None:
        if self._state is None:
            return
        if self._live is None:
            self._print(summary_line(self._state))
            return
        width, height = self._console.size
        # One row less than there is: filling the last row makes some terminals scroll.
        self._live.update(render(self._state, width, height - 1), refresh=True)

    def _print(self, line: str) -> None:
        self._console.print(f"relod: {line}", markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> LearnerView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._draw()  # what stays on the screen is how the run ended
            self._live.stop()


# -- the screen ------------------------------------------------------------------------------------------------------


def render(state: LearnerState, width: int, height: int) -> Screen:
    """The state on at most `width` x `height` characters; robots beyond that are cut, then chart and figures."""
    head = [_banner(state, width), *framed("learner", _learner(state), width, _progress(state)[: width - 6])]
    chart = framed("return per episode", _returns(state.returns, width - 4), width, f"{state.episodes} episodes")
    tail = [[styled(f" ! {text}", WARN)] for text in list(state.warnings)[-WARNINGS_SHOWN:]]
    if height < CHART_FROM_ROWS:
        chart = []
    room = max(1, height - len(head) - len(chart) - len(tail) - 2)
    up = sum(row.state == "up" for row in state.robots)
    robots = framed("robots", _robots(state, room), width, f"{up} of {len(state.robots)} connected")
    lines = [*head, *robots, *chart, *tail]
    return Screen([Segment.adjust_line_length(line, width) for line in lines[:height]])


def _banner(state: LearnerState, width: int) -> Line:
    text = f" LEARNER   {state.address}"
    right = f"{state.task or 'no task yet'} · {state.phase} "
    return [styled(text + right.rjust(max(0, width - len(text))), "bold black on cyan3")]


def _progress(state: LearnerState) -> str:
    steps = f"{state.steps:,} of {state.max_steps:,} steps" if state.max_steps else f"{state.steps:,} steps"
    return f"{steps} · {state.experience_s / 60:.1f} min of experience · {clock_text(state.elapsed_s)} in all"


def _learner(state: LearnerState) -> Lines:
    epoch, count = state.policy_version
    lines = [
        fact_line(
            [
                ("updates", f"{state.updates:,}"),
                ("per s", f"{state.updates_per_s:.1f}"),
                ("policy", f"{epoch}.{count}"),
                ("steps per s", f"{state.ingest_steps_per_s:.1f}"),
            ]
        )
    ]
    if state.algorithm:
        lines.append(fact_line([(state.algorithm, state.preset), ("folder", state.folder)]))
    if state.replay_capacity:
        fill = fill_bar(state.replay_steps / state.replay_capacity, 20)
        lines.append([styled("replay ", DIM), *fill, styled(f" {state.replay_steps:,} of {state.replay_capacity:,}")])
    if state.losses:
        lines.append(fact_line([(name, f"{value:.3g}") for name, value in state.losses.items()]))
    return lines


def _returns(returns: Sequence[float], width: int) -> Lines:
    if not returns:
        return [[styled("no episode has ended yet", DIM)]]
    labels = [f"{max(returns):.0f}", *[""] * (CHART_ROWS - 2), f"{min(returns):.0f}"]
    label_width = max(map(len, labels))
    chart = sparkline(returns, max(8, width - label_width - 1), CHART_ROWS)
    return [
        [styled(f"{label:>{label_width}} ", DIM), styled(blocks, CHART)]
        for label, blocks in zip(labels, chart, strict=True)
    ]


_COLUMNS = (
    *(("link", 6), ("rtt ms", 8), ("steps", 10), ("per s", 7), ("episodes", 9), ("return", 9)),
    *(("backlog", 8), ("MB/s in", 8), ("out", 7), ("policy age", 11)),
)


def _robots(state: LearnerState, room: int) -> Lines:
    """A line of titles and one for each robot, `room` in all; the last one counts those that had no room."""
    if not state.robots:
        return [[styled("none has come yet", DIM)]]
    titles = f"{'':<{NAME_COLUMNS}}" + "".join(f"{title:>{columns}}" for title, columns in _COLUMNS)
    rows = [_robot(row) for row in state.robots]
    if len(rows) > room - 1:
        shown = max(0, room - 2)
        rows = [*rows[:shown], [styled(f"and {len(rows) - shown} more", DIM)]]
    return [[styled(titles, DIM)], *rows]


def _robot(row: RobotRow) -> Line:
    name = row.name if len(row.name) <= NAME_COLUMNS else f"{row.name[: NAME_COLUMNS - 1]}…"
    values = (
        _told(row.rtt_ms, ".1f"),
        f"{row.steps:,}",
        f"{row.steps_per_s:.1f}",
        f"{row.episodes:,}",
        _told(row.mean_return, ".1f"),
        f"{row.backlog:,}",
        f"{row.in_bytes_per_s / 1e6:.2f}",
        f"{row.out_bytes_per_s / 1e6:.2f}",
    )
    age = "acts here" if row.acts == "learner" else _told(row.policy_age_s, ".1f", " s")
    stale = row.policy_age_s is not None and row.policy_age_s > STALE_POLICY_S
    (_, link_columns), *columns, (_, age_columns) = _COLUMNS
    return [
        styled(f"{name:<{NAME_COLUMNS}}"),
        styled(f"{row.state:>{link_columns}}", GOOD if row.state == "up" else BAD),
        *(styled(f"{value:>{size}}") for value, (_, size) in zip(values, columns, strict=True)),
        styled(f"{age:>{age_columns}}", WARN if stale else ""),
    ]


def _told(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


# -- one line --------------------------------------------------------------------------------------------------------


def summary_line(state: LearnerState) -> str:
    """The state in one line, for logs."""
    up = sum(row.state == "up" for row in state.robots)
    parts = [
        f"learner {state.phase}",
        clock_text(state.elapsed_s),
        f"{up} of {len(state.robots)} robots",
        f"{state.steps} steps",
        f"{state.episodes} episodes",
    ]
    if recent := state.returns[-TREND_EPISODES:]:
        parts.append(f"return {sum(recent) / len(recent):.1f} in the last {len(recent)}")
    if state.updates:
        parts.append(f"{state.updates} updates, {state.updates_per_s:.1f} per s")
    down = [f"{row.name} {row.state}" for row in state.robots if row.state != "up"]
    return " | ".join([*parts, *down])
