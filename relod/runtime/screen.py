"""What the live views are made of: a screen redrawn in place on a terminal, lines elsewhere, and their parts.

A view knows nothing of what it shows: how a state is drawn, or said in a line, is handed in as pure functions. Nothing
here reads a clock, and everything goes to stderr: stdout belongs to `--json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Generic, Protocol, TypeAlias, TypeVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.style import Style

from .blocks import sparkline
from .clock import NS_PER_S

__all__ = [
    "BAD",
    "CHART",
    "DIM",
    "FRAME",
    "GOOD",
    "WARN",
    "Line",
    "Lines",
    "LiveView",
    "PlainView",
    "Screen",
    "View",
    "choose_view",
    "clock_text",
    "fact_line",
    "fill_bar",
    "framed",
    "learner_lines",
    "returns_chart",
    "styled",
    "warning_lines",
]

REFRESH_NS = NS_PER_S // 4
LINE_EVERY_NS = 10 * NS_PER_S
CHART_ROWS = 6

DIM, GOOD, WARN, BAD, CHART, FRAME = "grey62", "green3", "yellow3", "bold red3", "deep_sky_blue1", "grey42"

Line: TypeAlias = list[Segment]
Lines: TypeAlias = list[Line]

S = TypeVar("S")
S_contra = TypeVar("S_contra", contravariant=True)


# -- views -------------------------------------------------------------------------------------------------------------


class View(Protocol[S_contra]):
    """What shows a state to a person; a context manager."""

    def show(self, state: S_contra, now_ns: int) -> None:
        """Show the state if it is time to; call it as often as you like, and set no rhythm by it."""
        ...

    def __enter__(self) -> View[S_contra]: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def choose_view(
    console: Console | None,
    *,
    draw: Callable[[S, int, int], Screen],
    say: Callable[[S], Iterable[str]],
    line: Callable[[S], str],
) -> View[S]:
    """The view that suits the console: `LiveView` on a terminal that can be drawn on, else `PlainView`.

    Args:
        console: where to show it; None for stderr.
        draw: a state on so many columns and rows.
        say: what a person should read; each text is printed once.
        line: a state in one line.
    """
    console = console or Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveView(console, draw)
    return PlainView(console, say, line)


class LiveView(Generic[S]):
    """Redraws the screen in place; what others print to the terminal meanwhile appears above it."""

    def __init__(self, console: Console, draw: Callable[[S, int, int], Screen]) -> None:
        self._console, self._draw_state = console, draw
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")
        self._state: S | None = None
        self._next_ns: int | None = None

    def show(self, state: S, now_ns: int) -> None:
        """Draw at most every 250 ms."""
        self._state = state
        if self._next_ns is None or now_ns >= self._next_ns:
            self._next_ns = now_ns + REFRESH_NS
            self._draw()

    def _draw(self) -> None:
        if self._state is not None:
            width, height = self._console.size
            # One row less than there is: filling the last row makes some terminals scroll.
            self._live.update(self._draw_state(self._state, width, height - 1), refresh=True)

    def __enter__(self) -> LiveView[S]:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._draw()  # what stays on the screen is how the run ended
        self._live.stop()


class PlainView(Generic[S]):
    """One line every ten seconds, and each warning once: for logs and pipes."""

    def __init__(self, console: Console, say: Callable[[S], Iterable[str]], line: Callable[[S], str]) -> None:
        self._console, self._say, self._line = console, say, line
        self._next_ns: int | None = None
        self._said: set[str] = set()

    def show(self, state: S, now_ns: int) -> None:
        """Print texts that are new, and a line when ten seconds have passed."""
        for text in self._say(state):
            if text not in self._said:
                self._said.add(text)
                self._print(text)
        if self._next_ns is None or now_ns >= self._next_ns:
            self._next_ns = now_ns + LINE_EVERY_NS
            self._print(self._line(state))

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> PlainView[S]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


# -- parts of a screen -------------------------------------------------------------------------------------------------


class Screen:
    """Ready lines. Laid out here and not by rich's panels and tables, which take three times as long for it."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines:
            yield from line
            yield Segment.line()


def styled(text: str, style: str = "") -> Segment:
    """A piece of text in a style of rich's."""
    return Segment(text, Style.parse(style))  # rich remembers parsed styles


def framed(title: str, lines: Lines, width: int, note: str = "") -> Lines:
    """The lines in a frame of `width` characters, with a title above and a note below."""
    side, inner = styled("│", FRAME), width - 4
    top = f" {title} "
    bottom = f" {note} " if note else ""
    return [
        [styled("╭─", FRAME), styled(top, "bold"), styled("─" * (width - len(top) - 3) + "╮", FRAME)],
        *([side, styled(" "), *Segment.adjust_line_length(line, inner), styled(" "), side] for line in lines),
        [styled("╰" + "─" * (width - len(bottom) - 3), FRAME), styled(bottom, DIM), styled("─╯", FRAME)],
    ]


def returns_chart(returns: Sequence[float], width: int) -> Lines:
    """Returns per episode as a chart of `width` columns."""
    if not returns:
        return [[styled("no episode has ended yet", DIM)]]
    labels = [f"{max(returns):.0f}", *[""] * (CHART_ROWS - 2), f"{min(returns):.0f}"]
    label_width = max(map(len, labels))
    chart = sparkline(returns, max(8, width - label_width - 1), CHART_ROWS)
    return [
        [styled(f"{label:>{label_width}} ", DIM), styled(blocks, CHART)]
        for label, blocks in zip(labels, chart, strict=True)
    ]


def learner_lines(
    facts: Sequence[tuple[str, str]],
    *,
    about: Sequence[Line] = (),
    replay_steps: int,
    replay_capacity: int,
    losses: Mapping[str, float],
) -> Lines:
    """How learning goes: figures, what else there is to say about it, how full the replay is, losses."""
    lines = [fact_line(facts), *about]
    if replay_capacity:
        fill = fill_bar(replay_steps / replay_capacity, 20)
        lines.append([styled("replay ", DIM), *fill, styled(f" {replay_steps:,} of {replay_capacity:,}")])
    if losses:
        lines.append(fact_line([(name, f"{value:.3g}") for name, value in losses.items()]))
    return lines


def warning_lines(warnings: Iterable[str], count: int) -> Lines:
    """The newest `count` warnings."""
    return [[styled(f" ! {text}", WARN)] for text in list(warnings)[-count:]]


def fact_line(facts: Sequence[tuple[str, str]]) -> Line:
    """Names and values in a row."""
    return [
        part
        for number, (name, value) in enumerate(facts)
        for part in (styled(("   " if number else "") + f"{name} ", DIM), styled(value))
    ]


def fill_bar(fraction: float, cells: int) -> Line:
    """How full something is."""
    filled = round(min(1.0, max(0.0, fraction)) * cells)
    return [styled("━" * filled, CHART), styled("━" * (cells - filled), "grey30")]


def clock_text(seconds: float) -> str:
    """Hours, minutes, seconds."""
    minutes, whole = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{whole:02}"
