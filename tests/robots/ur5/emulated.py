"""A simulated UR5 in a process of its own, as ur_rtde needs it: its constructors hold the interpreter's lock."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BODY = """
import asyncio, sys
from pathlib import Path
from relod.robots.ur5.controller import Controller
from relod.robots.ur5.emulator import EmulatorOptions, serve
from relod.robots.ur5.states import ArmSettings
from relod.runtime.clock import monotonic_ns

async def main():
    stop = asyncio.Event()
    asyncio.get_running_loop().add_reader(0, stop.set)
    options = EmulatorOptions(control=Path(sys.argv[1]))
    await serve(Controller(ArmSettings(series=sys.argv[2]), start_ns=monotonic_ns()), options,
                on_ready=lambda ready: print(ready.host, flush=True), stop=stop)

asyncio.run(main())
"""


class Emulated:
    """Where the robot is, and what can be done to it."""

    def __init__(self, host: str, control: Path) -> None:
        self.host = host
        self._control = control

    def do(self, op: str, **values: object) -> dict[str, Any]:
        """Have something happen, or ask for the `state`."""
        with socket.socket(socket.AF_UNIX) as wire:
            wire.connect(str(self._control))
            with wire.makefile("rw") as lines:
                lines.write(json.dumps({"op": op, **values}) + "\n")
                lines.flush()
                answer: dict[str, Any] = json.loads(lines.readline())
        assert "error" not in answer, answer
        return answer

    def state(self) -> dict[str, Any]:
        """Everything about the robot."""
        return self.do("state")


@contextlib.contextmanager
def emulated(folder: Path, series: str = "cb3") -> Iterator[Emulated]:
    """Run one; its control socket is in `folder`."""
    control = folder / "control.sock"
    with subprocess.Popen(
        [sys.executable, "-c", BODY, str(control), series], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            host = process.stdout.readline().strip()
            assert host, "the emulator did not start"
            yield Emulated(host, control)
        finally:
            process.stdin.close()
            try:
                process.wait(5.0)
            except subprocess.TimeoutExpired:
                process.kill()
