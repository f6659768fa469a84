"""relod's own commands as children: run to their end, or ended with us however we end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

from ..errors import EXIT_OK, EXIT_SIGTERM, EXIT_START

__all__ = ["RELOD", "Ended", "end", "run_relod", "signals_held", "terminable"]

RELOD = (sys.executable, "-m", "relod")
END_LIMIT_S = 75.0  # a robot may drain for 30 s, a worker may finish for 30 s


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a command ended."""

    exit_code: int
    document: dict[str, Any] | None  # the JSON that it printed
    complaint: str  # its last line for people, where that was not shown

    @property
    def good(self) -> bool:
        return self.exit_code == EXIT_OK and self.document is not None


def run_relod(arguments: Sequence[str], *, shown: bool = False) -> Ended:
    """Run a relod command to its end; with `shown` what it says to people is theirs to read.

    However this call ends, the command ends before it, as with Ctrl-C, or killed with all of its session.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, signals_held() as release:
        process = subprocess.Popen(
            [*RELOD, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=None if shown else err,
            start_new_session=True,
        )
        try:
            release()
            code = process.wait()
        finally:
            end(process)
        return Ended(exit_code=code if code >= 0 else EXIT_START, document=_document(out), complaint=_last_line(err))


def end(process: subprocess.Popen[Any]) -> None:
    """End a command that leads a session, as Ctrl-C does; what is left after the limit is killed."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_LIMIT_S)
    finally:
        if process.poll() is None:  # not waited for yet, so its number is still its own
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def signals_held() -> Iterator[Callable[[], None]]:
    """Let SIGINT and SIGTERM wait until what is yielded is called, or the block ends.

    A signal in the middle of `Popen` would leave a child that nobody knows. Only for the main thread; elsewhere no
    signal is handled anyway.
    """
    came: list[int] = []
    before: dict[int, Any] = {}

    def release() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()
        while came:
            signal.raise_signal(came.pop(0))

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda received, frame: came.append(received))
    try:
        yield release
    finally:
        release()


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM unwind this process, so that what it started ends with it."""

    def unwind(number: int, frame: FrameType | None) -> None:
        sys.exit(EXIT_SIGTERM)

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _document(out: IO[bytes]) -> dict[str, Any] | None:
    out.seek(0)
    with contextlib.suppress(ValueError):
        found = json.loads(out.read())
        return found if isinstance(found, dict) else None
    return None


def _last_line(err: IO[bytes]) -> str:
    err.seek(0)
    lines = [line for line in err.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("relod: ") if lines else "it said nothing"
