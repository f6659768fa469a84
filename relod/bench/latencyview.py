"""What `relod bench latency` shows on stderr: the modes side by side in a table of their stages.

On a terminal the table is drawn while the modes run; elsewhere there is a line now and then, and the table at the end.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..runtime.clock import NS_PER_S
from ..runtime.timing import AGREEMENT, percentiles
from .latencyrow import ModeRow
from .stagetable import COLUMNS, Fact, format_stages, pair_ms, short_ms

__all__ = ["HEAD", "BenchView", "format_row", "format_table"]

REFRESH_NS = NS_PER_S // 2
LINE_EVERY_NS = 5 * NS_PER_S

WIDTHS = (4, 11, 12, 11, 6, 6, 7, 8)  # of the cells behind the mode


def _line(mode: str, cells: Sequence[str]) -> str:
    return f"{mode:<13}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))


HEAD = (
    _line("ms, p50/p99", ("", "round trip", "act to wire", "lateness", "over-", "late", "policy", "updates")),
    _line("", ("s", "", "", "", "runs", "acts", "age, s", "per s")),
)


class BenchView:
    """Shows the rows; a context manager.

    Args:
        title: what is measured, and where.
    """

    def __init__(self, rows: Sequence[ModeRow], title: str, console: Console | None = None) -> None:
        self._rows, self._title = rows, title
        self._console = console or Console(stderr=True)
        drawn = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop") if drawn else None
        self._next_ns = 0

    def show(self, row: ModeRow, now_ns: int) -> None:
        """The row in progress has news; call it as often as you like."""
        if now_ns < self._next_ns:
            return
        if self._live is not None:
            self._next_ns = now_ns + REFRESH_NS
            self._draw()
        else:
            self._next_ns = now_ns + LINE_EVERY_NS
            self._print(format_row(row))

    def done(self, row: ModeRow) -> None:
        """The row is complete."""
        if self._live is not None:
            self._draw()
        else:
            self._next_ns = 0
            self._print(format_row(row))
        if row.error:
            self._print(f"relod: {row.mode}: {row.error}")

    def say(self, text: str) -> None:
        """A paragraph, when all is shown."""
        self._print("\n" + textwrap.fill(text, COLUMNS))

    def _draw(self) -> None:
        assert self._live is not None
        text = Text(format_table(self._rows, self._title), no_wrap=True, overflow="crop")
        self._live.update(text, refresh=True)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> BenchView:
        if self._live is not None:
            self._live.start()
            self._draw()
        else:
            self._print(self._title)
            for line in HEAD:
                self._print(line)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif error is None:
            self._print("\n" + format_table(self._rows, self._title))


def format_table(rows: Sequence[ModeRow], title: str) -> str:
    """All that is known of the modes, in lines of at most 79 characters; the least important last."""
    table = format_stages({row.mode: row.samples for row in rows}, _facts(rows))
    return f"{title[:COLUMNS]}\n{table}"


def _facts(rows: Sequence[ModeRow]) -> list[Fact]:
    def fact(title: str, tell: Callable[[ModeRow], str]) -> Fact:
        return title, [tell(row) for row in rows]

    def figure(title: str, name: str, tell: Callable[[Any], str]) -> Fact:
        return fact(title, lambda row: "" if row.figures[name] is None else tell(row.figures[name]))

    used = [row.figures["cpu_cores"] or {} for row in rows]
    most = {name: max(each.get(name, 0.0) for each in used) for name in {name for each in used for name in each}}
    return [
        fact("measured, s", _state),
        fact("overruns (not shared)", _overruns),
        figure("late actions", "late_actions", str),
        fact("share of cycle left", lambda row: "" if row.cycle_left is None else f"{100 * row.cycle_left:.0f} %"),
        fact("policy's lag, updates", _lag),
        figure("updates per s", "updates_per_s", _digits),
        figure("uplink, kB/s", "uplink_bytes_per_s", lambda value: _digits(value / 1000)),
        figure("downlink, kB/s", "downlink_bytes_per_s", lambda value: _digits(value / 1000)),
        fact("link emulated up, ms", lambda row: _injected(row, "up")),
        fact("link emulated down, ms", lambda row: _injected(row, "down")),
        fact("learner's clock, ms", _clock),
        fact("stamps disagree, ms", lambda row: _pair_or_nothing(row.samples.get(AGREEMENT, ()))),
        fact("cores", lambda row: f"{sum(row.figures['cpu_cores'].values()):.2f}" if row.figures["cpu_cores"] else ""),
        *(
            (f"  {name}", [f"{each[name]:.2f}" if name in each else "" for each in used])
            for name in sorted(most, key=lambda name: (-most[name], name))
        ),
    ]


def _state(row: ModeRow) -> str:
    return "failed" if row.error else f"{row.measured_s:.0f}" if row.measured_s else row.phase


def _overruns(row: ModeRow) -> str:
    overruns, unshared = row.figures["overruns"], row.figures["overruns_not_shared"]
    return "" if overruns is None else str(overruns) if unshared is None else f"{overruns} ({unshared})"


def _lag(row: ModeRow) -> str:
    lag = percentiles(row.policy_lag)
    return f"{lag['p50']:.0f}/{lag['p99']:.0f}" if lag else ""


def _injected(row: ModeRow, way: str) -> str:
    found = row.link and row.link[way]["one_way_ms"]
    return f"{short_ms(found['p50'])}/{short_ms(found['p99'])}" if found and found["max"] else ""


def _clock(row: ModeRow) -> str:
    offset, uncertainty = row.figures["clock_offset_ms"], row.figures["clock_uncertainty_ms"]
    return "" if offset is None or uncertainty is None else f"{offset:.3g}±{uncertainty:.2g}"


def _pair_or_nothing(samples: Any) -> str:
    return pair_ms(samples) if len(samples) else ""


def format_row(row: ModeRow) -> str:
    """A mode's figures in a line of at most `COLUMNS` characters, under `HEAD`."""
    figures = row.figures
    if figures["act_ms"] is None or row.error:
        return f"{row.mode:<13}{row.error or row.phase}"[:COLUMNS]
    policy_age, rate = figures["policy_age_ms"], figures["updates_per_s"]
    return _line(
        row.mode,
        (
            f"{row.measured_s:.0f}" if row.measured_s else "",
            _pair(figures["rtt_ms"]),
            _pair(figures["act_ms"]),
            _pair(figures["cycle_lateness_ms"]),
            _count(figures["overruns"]),
            _count(figures["late_actions"]),
            _digits(policy_age["p50"] / 1000) if policy_age else "",
            _digits(rate) if rate is not None else "",
        ),
    )


def _pair(found: dict[str, float] | None) -> str:
    return f"{_digits(found['p50'])}/{_digits(found['p99'])}" if found else ""


def _digits(value: float) -> str:
    """About three digits."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _count(value: int | None) -> str:
    return "" if value is None else str(value)
