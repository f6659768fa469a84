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

__all__ = ["RELOD", "Ended", "end", "last_line", "parse_document", "run_relod", "spawn", "terminable"]

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
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = spawn(arguments, out, None if shown else err)
        try:
            code = process.wait()
        finally:
            end(process)
        out.seek(0)
        err.seek(0)
        return Ended(
            exit_code=code if code >= 0 else EXIT_START,
            document=parse_document(out.read()),
            complaint=last_line(err.read()) or "it said nothing",
        )


def spawn(arguments: Sequence[str], out: IO[bytes], err: IO[bytes] | None) -> subprocess.Popen[bytes]:
    """Start a command that leads a session of its own. A signal meanwhile is raised when it has been ended again."""
    with _signals_held() as release:
        process = subprocess.Popen(
            [*RELOD, *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        try:
            release()
        except BaseException:
            end(process)
            raise
    return process


def end(process: subprocess.Popen[Any]) -> bool:
    """End a command that leads a session, as Ctrl-C does; False where it did not within the limit, and was killed."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(END_LIMIT_S)
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.poll() is None:  # not waited for yet, so its number is still its own
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return True


@contextlib.contextmanager
def _signals_held() -> Iterator[Callable[[], None]]:
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


def parse_document(printed: bytes) -> dict[str, Any] | None:
    """The JSON that a command printed at its end; None when there is none."""
    with contextlib.suppress(ValueError):
        found = json.loads(printed)
        return found if isinstance(found, dict) else None
    return None


def last_line(told: bytes) -> str:
    """Of what a command told people; empty where it said nothing."""
    lines = [line for line in told.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("relod: ") if lines else ""
