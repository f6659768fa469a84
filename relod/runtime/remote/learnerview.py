"""The learner's live view: all its robots on one terminal screen; a line every ten seconds where there is none.

`render` is a pure function of the state and the space, as in `view.py`, and everything goes to stderr.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.segment import Segment

from ..screen import (
    BAD,
    DIM,
    GOOD,
    WARN,
    Line,
    Lines,
    Screen,
    View,
    choose_view,
    clock_text,
    fact_line,
    framed,
    learner_lines,
    returns_chart,
    styled,
    warning_lines,
)
from ..view import TREND_EPISODES
from ..viewstate import WARNINGS_KEPT

__all__ = ["LearnerState", "RobotRow", "open_learner_view", "render", "summary_line"]

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


def open_learner_view(console: Console | None = None) -> View[LearnerState]:
    """The view of a learner that suits the console."""
    return choose_view(console, draw=render, say=_texts, line=lambda state: f"relod: {summary_line(state)}")


def _texts(state: LearnerState) -> Iterator[str]:
    return (f"relod: {text}" for text in state.warnings)


# -- the screen ------------------------------------------------------------------------------------------------------


def render(state: LearnerState, width: int, height: int) -> Screen:
    """The state on at most `width` x `height` characters; robots beyond that are cut, then chart and figures."""
    head = [_banner(state, width), *framed("learner", _learner(state), width, _progress(state)[: width - 6])]
    chart = framed("return per episode", returns_chart(state.returns, width - 4), width, f"{state.episodes} episodes")
    tail = warning_lines(state.warnings, WARNINGS_SHOWN)
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
    about = [fact_line([(state.algorithm, state.preset), ("folder", state.folder)])] if state.algorithm else []
    return learner_lines(
        [
            ("updates", f"{state.updates:,}"),
            ("per s", f"{state.updates_per_s:.1f}"),
            ("policy", f"{epoch}.{count}"),
            ("steps per s", f"{state.ingest_steps_per_s:.1f}"),
        ],
        about=about,
        replay_steps=state.replay_steps,
        replay_capacity=state.replay_capacity,
        losses=state.losses,
    )


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
