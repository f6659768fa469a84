"""The border to code that is not relod's: algorithms, tasks, drivers and worlds from anywhere.

What goes wrong there is said in one line that names it: module, class, method, and the line of the package's own file.
The adapters that put every call through `calling` are `algos.checked` and `robots.checked`, and nowhere else.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from .errors import PackageError, RelodError

__all__ = [
    "Slowness",
    "Watch",
    "calling",
    "check_methods",
    "distribution",
    "frame_place",
    "full_name",
    "ours",
    "place",
    "raised",
    "shown",
]

MEND = "mend the package; --debug and the run's children.log show the traceback"
SLOW_AGAIN_NS = 10_000_000_000  # between two lines about calls that took too long
MAX_SHOWN = 80  # characters of a value
MAX_ERROR = 300  # of an error's text


def full_name(thing: Any, method: str = "") -> str:
    """`module.Class`, of an object or a class, or `module.Class.method`."""
    kind = thing if isinstance(thing, type) or inspect.isroutine(thing) else type(thing)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return f"{name}.{method}" if method else name


def distribution(target: str) -> str:
    """`NAME VERSION` of the installed package that "module:attribute" is in; "" where none says so."""
    module = target.partition(":")[0].partition(".")[0]
    names = packages_distributions().get(module, [])
    return f"{names[0]} {version(names[0])}"[:64] if names else ""


def ours(thing: Any) -> bool:
    """Whether a module, by its name, or an object belongs to relod, whose own tests hold it to its interface."""
    module = thing if isinstance(thing, str) else type(thing).__module__
    return module.partition(".")[0] == "relod"


def shown(value: Any) -> str:
    """The value in a few words."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # its own __repr__ may be what is wrong
        text = ""
    return text if 0 < len(text) <= MAX_SHOWN else f"a {full_name(type(value))}"


def place(error: BaseException) -> str:
    """`file.py line N`, where the error was raised: in code of the package, if the traceback leads through any."""
    frames = traceback.extract_tb(error.__traceback__)
    return frame_place([(frame.filename, frame.lineno or 0, frame.name) for frame in reversed(frames)])


def frame_place(frames: Sequence[tuple[str, int, str]]) -> str:
    """The same of frames (file, line, function), the innermost first."""
    here = str(Path(__file__).parent)
    for path, line, _ in frames:
        if not path.startswith((here, "<")) and "site-packages" not in path and "/lib/python" not in path:
            return f"{Path(path).name} line {line}"
    return f"{Path(frames[0][0]).name} line {frames[0][1]}" if frames else ""


def raised(error: BaseException) -> str:
    """What was raised, and where: `ValueError: no such thing (file.py line 5)`."""
    text = " ".join(str(error).split())[:MAX_ERROR]
    at = f"{Path(error.filename or '').name} line {error.lineno}" if isinstance(error, SyntaxError) else place(error)
    return f"{type(error).__name__}{': ' if text else ''}{text}{f' ({at})' if at else ''}"


class Watch:
    """When calls into packages were made since `restart`, by the clock `now`; the default one stands still."""

    def __init__(self, now: Callable[[], int] = lambda: 0) -> None:
        self.now = now
        self.restart()

    def restart(self) -> None:
        """Forget what was."""
        self.longest_ns, self.longest = 0, ""
        self.calls: dict[str, tuple[int, int]] = {}  # beginning and end of the newest call, by who was called

    def note(self, who: str, start_ns: int, end_ns: int) -> None:
        """A call that has ended."""
        self.calls[who] = start_ns, end_ns
        if end_ns - start_ns > self.longest_ns:
            self.longest_ns, self.longest = end_ns - start_ns, who


class Slowness:
    """Counts calls that took longer than a cycle; they are told of at first and then every 10 s.

    Args:
        consequence: what becomes of the robot meanwhile, the end of the line.
    """

    def __init__(self, cycle_ns: int, consequence: str) -> None:
        self._cycle_ns, self._consequence = cycle_ns, consequence
        self._count = 0
        self._told_ns: int | None = None

    def note(self, who: str, took_ns: int, now_ns: int) -> str:
        """A call that has ended; a line for people, or ""."""
        if took_ns <= self._cycle_ns:
            return ""
        self._count += 1
        if self._told_ns is not None and now_ns - self._told_ns <= SLOW_AGAIN_NS:
            return ""
        self._told_ns = now_ns
        return (
            f"{who} took {took_ns / 1e6:.0f} ms, and a cycle has {self._cycle_ns / 1e6:g} ms (so far {self._count}"
            f" times): {self._consequence}"
        )


class calling:
    """A call into a package: whatever but a `RelodError` is raised there becomes a `kind` that names it.

    A class, for the generator of `contextlib` would cost as much as some of the calls.
    """

    __slots__ = ("_kind", "_passing", "_start_ns", "_watch", "_who")

    def __init__(
        self,
        who: str,
        kind: type[RelodError] = PackageError,
        *,
        passing: type[Exception] | None = None,
        watch: Watch | None = None,
    ) -> None:
        self._who, self._kind, self._passing, self._watch = who, kind, passing, watch

    def __enter__(self) -> None:
        if self._watch is not None:
            self._start_ns = self._watch.now()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._watch is not None:
            self._watch.note(self._who, self._start_ns, self._watch.now())
        if not isinstance(error, Exception) or isinstance(error, RelodError):
            return
        if self._passing is None or not isinstance(error, self._passing):
            raise self._kind(f"{self._who} raised {raised(error)}", MEND) from error


def check_methods(
    thing: Any, methods: Mapping[str, tuple[int, tuple[str, ...]]], kind: type[RelodError], hint: str
) -> None:
    """Raise `kind` unless `thing` has these methods.

    Args:
        methods: name -> number of positional arguments and names of the others with which it will be called.
    """
    for name, (count, keywords) in methods.items():
        method = getattr(thing, name, None)
        if not callable(method):
            raise kind(f"{full_name(thing)} has no method {name}()", hint)
        try:
            signature = inspect.signature(method)
        except (TypeError, ValueError):  # code in C tells nothing of itself
            continue
        try:
            signature.bind(*(None,) * count, **dict.fromkeys(keywords))
        except TypeError as error:
            wanted = f"{count} arguments{' and ' + ', '.join(keywords) if keywords else ''}"
            raise kind(f"{full_name(thing, name)}{signature} is called with {wanted}: {error}", hint) from error
