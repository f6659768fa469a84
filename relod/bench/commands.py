"""Whole relod commands as children of a benchmark: started as their user would, ended as Ctrl-C does, gone after.

Each runs in a session of its own, so that nothing that it starts is left behind either.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import EXIT_START

__all__ = ["Command", "Failed", "free_port", "processor_s"]

RELOD = (sys.executable, "-m", "relod")
END_LIMIT_S = 75.0  # a robot may drain for 30 s, a worker may finish for 30 s


class Failed(Exception):
    """A command that did not do its work; the text is a line for people."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class Command:
    """A relod command in a session of its own, its output in files of `folder`."""

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        folder.mkdir(parents=True)
        self._out, self._err = folder / "stdout", folder / "stderr"
        self._name = f"relod {arguments[0]}"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [*RELOD, *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )

    def check(self) -> None:
        """`Failed` when it is no longer running."""
        if (code := self.process.poll()) is not None:
            raise Failed(self.complaint(), code if code > 0 else EXIT_START)

    def end(self) -> int:
        """Ask it to end, as Ctrl-C does, and wait; what is left after the limit is killed. Returns the exit code."""
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGINT)
            return self.process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise Failed(f"{self._name} did not end within {END_LIMIT_S:g} s of Ctrl-C", EXIT_START) from None
        finally:
            if self.process.poll() is None:  # not waited for yet, so its number is still its own
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def close(self) -> None:
        """End it, however."""
        with contextlib.suppress(Failed):
            self.end()

    def document(self) -> dict[str, Any] | None:
        """The JSON that it printed at its end; None when there is none."""
        with contextlib.suppress(ValueError):
            found = json.loads(self._out.read_bytes())
            return found if isinstance(found, dict) else None
        return None

    def complaint(self) -> str:
        """Its last line for people."""
        lines = [line for line in self._err.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].removeprefix("relod: ") if lines else f"{self._name} said nothing"


def processor_s(commands: Mapping[str, Command | None]) -> dict[str, float]:
    """Seconds of processor time of the commands' processes so far, by name; a command's own goes by its key."""
    leaders = {command.process.pid: name for name, command in commands.items() if command is not None}
    used: dict[str, float] = defaultdict(float)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it is gone
            head, _, rest = stat.read_text(errors="replace").rpartition(") ")
            pid, _, name = head.partition(" (")
            fields = rest.split()  # proc(5), from the third on: state ppid pgrp session ... utime stime
            if int(fields[3]) in leaders and (int(pid) in leaders or name.startswith("relod-")):
                own = leaders.get(int(pid), name.removeprefix("relod-"))
                used[own] += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


def free_port() -> int:
    """A port of the loopback that nobody has just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
