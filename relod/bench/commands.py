"""Whole relod commands as children of a benchmark: started as their user would, ended as Ctrl-C does, gone after.

Each runs in a session of its own, so that nothing that it starts is left behind either.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import EXIT_START
from . import children

__all__ = ["Command", "Failed", "free_port", "processor_s"]


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
            self.process = children.spawn(arguments, out, err)

    def check(self) -> None:
        """`Failed` when it is no longer running."""
        if (code := self.process.poll()) is not None:
            raise Failed(self.complaint(), code if code > 0 else EXIT_START)

    def end(self) -> int:
        """Ask it to end, as Ctrl-C does, and wait; what is left after the limit is killed. Returns the exit code."""
        if not children.end(self.process):
            raise Failed(f"{self._name} did not end within {children.END_LIMIT_S:g} s of Ctrl-C", EXIT_START)
        return self.process.wait()

    def close(self) -> None:
        """End it, however."""
        with contextlib.suppress(Failed):
            self.end()

    def document(self) -> dict[str, Any] | None:
        """The JSON that it printed at its end; None when there is none."""
        return children.parse_document(self._out.read_bytes())

    def complaint(self) -> str:
        """Its last line for people."""
        return children.last_line(self._err.read_bytes()) or f"{self._name} said nothing"


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
