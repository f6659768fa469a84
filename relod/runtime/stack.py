"""Where a process is that hangs. A child writes its stack when it gets SIGUSR1, also in the midst of C code; a process
that nobody watches watches its own main thread."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import re
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

from ..errors import EXIT_SAFETY
from ..packages import frame_place
from .clock import NS_PER_S, monotonic_ns

__all__ = ["EndIfStuck", "find_place", "write_stack_when_asked"]

ANSWER_S = 0.3  # to write it
FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)


def write_stack_when_asked() -> None:
    """In the child: from now on SIGUSR1 writes the stacks of all threads to stderr, its log."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)


async def find_place(pid: int, log_path: Path) -> str:
    """In the parent: `FUNCTION (FILE line N)` of the child's main thread, in code that is not relod's if there is any.

    "" where it cannot be told. What the child writes stays in its log.
    """
    before = os.stat(log_path).st_size
    try:
        os.kill(pid, signal.SIGUSR1)
    except ProcessLookupError:
        return ""
    await asyncio.sleep(ANSWER_S)
    return parse_place(_read_from(log_path, before))


def _read_from(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")


def parse_place(text: str) -> str:
    """The same of what was written; of the thread that entered `child_main`."""
    for thread in re.split(r"^(?:Current thread|Thread) .*$", text, flags=re.MULTILINE):
        frames = [(path, int(line), function) for path, line, function in FRAME.findall(thread)]
        if any(function == "child_main" for _, _, function in frames):
            return _named(frames)
    return ""


def _named(frames: list[tuple[str, int, str]]) -> str:
    at = frame_place(frames)
    inside = next((function for path, line, function in frames if at == f"{Path(path).name} line {line}"), "")
    return f"{inside}() ({at})"


class EndIfStuck:
    """Around calls of the main thread: ends the process, as a kill would, when one takes longer than `limit_s`.

    For a loop that no other process watches: while a call into a package hangs, signals are not heard either.
    """

    def __init__(self, who: str, limit_s: float, hint: str) -> None:
        self._who, self._limit_s, self._hint = who, limit_s, hint
        self._since_ns = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="stuck", daemon=True)
            self._thread.start()
        self._since_ns = monotonic_ns()

    def __exit__(self, *error: object) -> None:
        self._since_ns = 0

    def _watch(self) -> None:
        while True:
            time.sleep(self._limit_s / 4)
            since_ns = self._since_ns
            if since_ns and monotonic_ns() - since_ns > self._limit_s * NS_PER_S:
                self._end()

    def _end(self) -> NoReturn:
        stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
        place = _named([(frame.filename, frame.lineno or 0, frame.name) for frame in reversed(stack)])
        told = f"\nrelod: the {self._who} hangs in {place} for more than {self._limit_s:g} s; {self._hint}\n"
        os.write(sys.stderr.fileno(), told.encode())
        os._exit(EXIT_SAFETY)
