"""What `relod bench latency` shows on stderr: the modes side by side on a terminal, else a line now and then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..runtime.clock import NS_PER_S

__all__ = ["HEAD", "BenchView", "Row", "format_row"]

REFRESH_NS = NS_PER_S // 2
LINE_EVERY_NS = 5 * NS_PER_S
COLUMNS = 79  # a terminal has at least 80

WIDTHS = (4, 11, 12, 11, 6, 6, 7, 8)  # of the cells behind the mode


def _line(mode: str, cells: Sequence[str]) -> str:
    return f"{mode:<13}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))


HEAD = (
    _line("ms, p50/p99", ("", "round trip", "act to wire", "lateness", "over-", "late", "policy", "updates")),
    _line("", ("s", "", "", "", "runs", "acts", "age, s", "per s")),
)


class Row(Protocol):
    """What is shown of a mode."""

    mode: str
    phase: str  # what it is about before there are figures
    measured_s: float
    figures: dict[str, Any]
    error: str


class BenchView:
    """Shows the rows; a context manager."""

    def __init__(self, rows: Sequence[Row], console: Console | None = None) -> None:
        self._rows = rows
        self._console = console or Console(stderr=True)
        drawn = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = Live(console=self._console, auto_refresh=False) if drawn else None
        self._next_ns = 0

    def show(self, row: Row, now_ns: int) -> None:
        """The row in progress has news; call it as often as you like."""
        if now_ns < self._next_ns:
            return
        if self._live is not None:
            self._next_ns = now_ns + REFRESH_NS
            self._draw()
        else:
            self._next_ns = now_ns + LINE_EVERY_NS
            self._print(format_row(row))

    def done(self, row: Row) -> None:
        """The row is complete."""
        if self._live is not None:
            self._draw()
        else:
            self._next_ns = 0
            self._print(format_row(row))
        if row.error:
            self._print(f"relod: {row.mode}: {row.error}")

    def _draw(self) -> None:
        assert self._live is not None
        lines = [*HEAD, *map(format_row, self._rows)]
        self._live.update(Text("\n".join(lines), no_wrap=True, overflow="crop"), refresh=True)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> BenchView:
        if self._live is not None:
            self._live.start()
            self._draw()
        else:
            for line in HEAD:
                self._print(line)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


def format_row(row: Row) -> str:
    """A mode's figures in a line of at most `COLUMNS` characters, under `HEAD`."""
    figures = row.figures
    if figures["act_ms"] is None:
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
            _short(policy_age["p50"] / 1000) if policy_age else "",
            _short(rate) if rate is not None else "",
        ),
    )


def _pair(percentiles: Mapping[str, float] | None) -> str:
    return f"{_short(percentiles['p50'])}/{_short(percentiles['p99'])}" if percentiles else ""


def _short(value: float) -> str:
    """About three digits."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _count(value: int | None) -> str:
    return "" if value is None else str(value)
