"""Where a child is that does not answer: it writes its stack when it gets SIGUSR1, also in the midst of C code."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import re
import signal
from pathlib import Path

from ..packages import frame_place

__all__ = ["find_place", "write_stack_when_asked"]

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
            at = frame_place(frames)
            inside = next((function for path, line, function in frames if at == f"{Path(path).name} line {line}"), "")
            return f"{inside}() ({at})"
    return ""
