"""The live view: one run on one terminal screen, four times a second; a line every ten seconds where there is none.

`render` is a pure function of the state and the space. Nothing here reads a clock or talks to another process, and
everything goes to stderr: stdout belongs to `--json`.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.segment import Segment

from .blocks import half_blocks
from .screen import (
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
    fill_bar,
    framed,
    learner_lines,
    returns_chart,
    styled,
    warning_lines,
)
from .viewstate import RunState

__all__ = ["open_view", "render", "summary_line"]

IMAGE_CELLS = (48, 18)  # columns and rows; with two pixels a cell, 48 x 36 of a 4:3 picture
WIDE_COLUMNS = 104  # from here on there is room for picture and figures side by side
TREND_EPISODES = 20

WARNINGS_SHOWN = 3
UNITS = {"mah": "mAh", "percent": "%", "mv": "mV", "ma": "mA", "c": "°C", "ms": "ms", "s": "s"}  # ends of names


def open_view(console: Console | None = None) -> View[RunState]:
    """The view of a run that suits the console."""
    return choose_view(console, draw=render, say=_texts, line=summary_line)


def _texts(state: RunState) -> Iterator[str]:
    return (f"warning: {text}" for text in (state.alarm, *state.warnings) if text)


# -- the screen ------------------------------------------------------------------------------------------------------


def render(state: RunState, width: int, height: int) -> Screen:
    """The state on at most `width` x `height` characters; what there is no room for is cut from picture and figures."""
    head = [_banner(state, width), *_episode_box(state, width), _status_line(state)]
    tail = warning_lines(state.warnings, WARNINGS_SHOWN)
    if width >= WIDE_COLUMNS:
        left_width = IMAGE_CELLS[0] + 4
        body = _beside(_camera_box(state), _figures(state, width - left_width))
    else:
        body = _figures(state, width)
    lines = [*head, *body[: max(0, height - len(head) - len(tail))], *tail]
    return Screen([Segment.adjust_line_length(line, width) for line in lines[:height]])


def _beside(left: Lines, right: Lines) -> Lines:
    """Two blocks side by side, the left one's lines all of the length of its first."""
    empty = [styled(" " * Segment.get_line_length(left[0]))]
    return [
        [*(left[row] if row < len(left) else empty), *(right[row] if row < len(right) else [])]
        for row in range(max(len(left), len(right)))
    ]


def _banner(state: RunState, width: int) -> Line:
    if state.alarm:
        text, style = f" {state.alarm}", "bold white on red3 blink"
    elif state.simulated:
        text, style = " SIMULATED   no hardware is driven", "bold black on cyan3"
    else:
        text, style = f" REAL ROBOT   {state.robot}   camera {state.camera}", "bold white on red3"
    right = f"{state.task} · {state.mode} "
    return [styled(text + right.rjust(max(0, width - len(text))), style)]


def _camera_box(state: RunState) -> Lines:
    columns, rows = IMAGE_CELLS
    if state.image is None:
        return framed("camera", [[styled("no picture yet", DIM)], *[[]] * (rows - 1)], columns + 4)
    return framed("camera", half_blocks(state.image, columns, rows), columns + 4, f"age {state.frame_age_ms:.0f} ms")


def _figures(state: RunState, width: int) -> Lines:
    return [
        *framed("return per episode", _returns(state, width - 4), width, f"{state.episodes} episodes"),
        *framed("timing", _timing(state), width, _timing_note(state)),
        *(framed("link", _link(state), width, str(state.link.get("learner", ""))) if state.link else []),
        *framed("learner", _learner(state), width),
    ]


def _returns(state: RunState, width: int) -> Lines:
    chart = returns_chart(state.returns, width)
    return [*chart, _trend(state)] if state.returns else chart


def _trend(state: RunState) -> Line:
    recent, before = state.returns[-TREND_EPISODES:], state.returns[-2 * TREND_EPISODES : -TREND_EPISODES]
    mean = sum(recent) / len(recent)
    line = [styled(f"last {len(recent)}: ", DIM), styled(f"{mean:.1f}", "bold")]
    if before:
        change = mean - sum(before) / len(before)
        arrow, style = ("▲", GOOD) if change > 0 else ("▼", WARN) if change < 0 else ("=", DIM)
        line.append(styled(f"  {arrow} {abs(change):.1f}", style))
    reached = state.successes[-TREND_EPISODES:]
    if reached:
        line += [
            styled("   reached ", DIM),
            styled(f"{sum(reached)} of {len(reached)}", GOOD if any(reached) else ""),
        ]
    return [*line, styled("   best ", DIM), styled(f"{max(state.returns):.0f}")]


def _timing(state: RunState) -> Lines:
    columns = ("p50", "p99", "max")
    lines = [[styled(f"{'ms':<12}" + "".join(f"{column:>9}" for column in columns), DIM)]]
    for name, percentiles in (("lateness", state.lateness), ("act", state.act)):
        summary = percentiles.summary_ms()
        values = [summary[column] for column in columns]
        lines.append([styled(f"{name:<12}", DIM), *(styled(f"{v:9.2f}", _urgency(v, state.cycle_ms)) for v in values)])
    lines.append([styled("overruns    ", DIM), styled(f"{state.overruns:>9,}", WARN if state.overruns else GOOD)])
    return lines


def _timing_note(state: RunState) -> str:
    return f"cycle {state.cycle_ms:g} ms" + (" · real-time" if state.realtime else "")


def _urgency(value_ms: float, limit_ms: float) -> str:
    """The colour of a duration by how much of its limit it takes; a limit of 0 is none."""
    return "" if not limit_ms or value_ms <= limit_ms / 2 else WARN if value_ms <= limit_ms else BAD


def _link(state: RunState) -> Lines:
    link = state.link
    up = link["state"] == "up"
    told = f"up, {link['reconnects']:g} reconnects" if up else f"{link['state']} for {link['down_s']:.1f} s"
    waiting = ("backlog", f"{link['backlog']:g} steps, {float(link['backlog_bytes']) / 1e6:.1f} MB")
    sends, receives = (float(link[f"{name}_bytes_per_s"]) / 1e6 for name in ("uplink", "downlink"))
    return [
        [styled(told, GOOD if up else BAD), styled("   "), *fact_line([waiting])],
        fact_line(
            [
                ("round trip p50", f"{link['rtt_ms.p50']:.1f}"),
                ("p99", f"{link['rtt_ms.p99']:.1f} ms"),
                ("± clock", f"{link['clock_uncertainty_ms']:.1f} ms"),
            ]
        ),
        fact_line(
            [
                ("up", f"{link['up_ms']:.1f} ms, {sends:.2f} MB/s"),
                ("down", f"{link['down_ms']:.1f} ms, {receives:.2f} MB/s"),
            ]
        ),
    ]


def _learner(state: RunState) -> Lines:
    epoch, count = state.policy_version
    return learner_lines(
        [
            ("updates", f"{state.updates:,}"),
            ("per s", f"{state.updates_per_s:.1f}"),
            ("policy", f"{epoch}.{count}"),
            ("age", f"{state.policy_age_s:.1f} s"),
        ],
        replay_steps=state.replay_steps,
        replay_capacity=state.replay_capacity,
        losses=state.losses,
    )


def _episode_box(state: RunState, width: int) -> Lines:
    if state.hold and state.phase in ("holding", "waiting"):
        held = [styled("waiting   ", "bold"), styled(state.hold, WARN)]
        return framed(f"episode {state.episodes + 1}", [held], width)
    line = [styled(f"{state.phase:<10}", "bold")]
    if state.episode_steps:
        line += fill_bar(state.index / state.episode_steps, max(10, min(60, width - 50)))
        line += [styled(f" {state.index} of {state.episode_steps}   "), styled("return ", DIM)]
        line.append(styled(f"{state.episode_return:.0f}"))
    steps = f"{state.steps:,} of {state.max_steps:,} steps" if state.max_steps else f"{state.steps:,} steps"
    limit = f" of {state.max_minutes:g}" if state.max_minutes else ""
    note = f"{steps} · {state.experience_s / 60:.1f}{limit} min of experience · {clock_text(state.elapsed_s)} in all"
    return framed(f"episode {state.episodes + 1}", [line], width, note[: width - 6])


def _status_line(state: RunState) -> Line:
    attention = state.status.get("attention")
    facts = [_fact(name, value) for name, value in state.status.items() if name != "attention" and value != ""]
    line = [styled(" "), *fact_line([*facts, ("sensor age", f"{state.sensor_age_ms:.0f} ms")])]
    return [styled(f" {attention} ", "bold black on yellow3"), *line] if attention else line


def _fact(name: str, value: float | str) -> tuple[str, str]:
    """A status value as people write it: `battery_mah`, 2210.0 becomes `battery`, `2210 mAh`."""
    text = value if isinstance(value, str) else f"{value:g}"
    words, _, unit = name.rpartition("_")
    return (words.replace("_", " "), f"{text} {UNITS[unit]}") if unit in UNITS else (name.replace("_", " "), text)


# -- one line --------------------------------------------------------------------------------------------------------


def summary_line(state: RunState) -> str:
    """The state in one line, for logs."""
    recent = state.returns[-TREND_EPISODES:]
    reached = sum(state.successes[-TREND_EPISODES:])
    parts = [
        "SIMULATED" if state.simulated else f"REAL ROBOT {state.robot}",
        clock_text(state.elapsed_s),
        state.phase,
        f"{state.steps} steps",
        f"{state.episodes} episodes",
    ]
    if recent:
        parts.append(f"return {sum(recent) / len(recent):.1f} and {reached} reached in the last {len(recent)}")
    if state.updates:
        parts.append(f"{state.updates} updates")
    if state.link and state.link["state"] != "up":
        parts.append(f"link {state.link['state']}, backlog {state.link['backlog']:g}")
    if state.hold:
        parts.append(state.hold)
    parts.append(f"lateness p99 {state.lateness.summary_ms()['p99']:.1f} ms")
    parts.append(f"{state.overruns} overruns")
    if state.realtime:
        parts.append("real-time")
    if attention := state.status.get("attention"):
        parts.append(str(attention))
    return " | ".join(parts)
