"""Whole commands as a user starts them, for the tests that need real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from relod.robots.faultserver import ask

RELOD = (sys.executable, "-m", "relod")
START_LIMIT_S = 60.0
# Small networks, early updates and short resets: these tests are about processes, not about learning.
QUICK_LEARNER = (
    *("--set", "agent.init_steps=20"),
    *("--set", "agent.batch_size=8"),
    *("--set", "agent.hidden=[32,32]"),
    *("--set", "agent.conv_channels=8"),
    *("--set", "replay.capacity=2000"),
    *("--set", "run.metrics_every_s=0.25"),
)
QUICK_ROBOT = (
    *("--set", "run.metrics_every_s=0.25"),
    *("--set", "task.back_off_min_s=0.2"),
    *("--set", "task.back_off_max_s=0.3"),
    *("--set", "task.turn_min_s=0.2"),
    *("--set", "task.turn_max_s=0.3"),
)
QUICK = (*QUICK_LEARNER, *QUICK_ROBOT)


class Emulator:
    """`relod emulate create` in a process of its own, as a robot would be."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.control = folder / "control.sock"
        self.wheel_log = folder / "wheels.jsonl"
        self.process = subprocess.Popen(
            [*RELOD, "emulate", "create", "--control", self.control, "--wheel-log", self.wheel_log, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        where = json.loads(self.process.stdout.readline())
        self.port, self.camera_url = where["port"], where["camera_url"]

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        return ask(self.control, op, **fields)

    def stop(self) -> list[dict[str, Any]]:
        """End it and return its wheel log."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(10)
        return [json.loads(line) for line in self.wheel_log.read_text().splitlines()]


@contextmanager
def emulator(folder: Path, *arguments: str) -> Iterator[Emulator]:
    """An emulator that is gone after the block."""
    running = Emulator(folder, *arguments)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()
        assert running.process.stdout is not None
        running.process.stdout.close()


class Command:
    """A `relod` command as a process that prints a JSON document at its end, its run folders in `folder`/runs."""

    def __init__(self, folder: Path, *arguments: str, name: str = "", prefix: Sequence[str] = ()) -> None:
        self.folder = folder / "runs"
        # Read by path: seeking in these would move the position at which the child writes.
        self._out_path, self._err_path = folder / f"stdout{name}", folder / f"stderr{name}"
        where = () if "--resume" in arguments else ("--set", f"run.folder={self.folder}")
        command = [*prefix, *RELOD, *arguments, "--json", *where]
        with self._out_path.open("w") as out, self._err_path.open("w") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err, cwd=folder)

    def wait(self, limit_s: float = 60.0) -> int:
        """Its exit code."""
        return self.process.wait(limit_s)

    def result(self) -> dict[str, Any]:
        """The JSON document it printed."""
        document = json.loads(self._out_path.read_text())
        assert isinstance(document, dict)
        return document

    def messages(self) -> str:
        return self._err_path.read_text()

    def wait_for_message(self, text: str) -> str:
        """Until it has said so; the whole line."""
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            for line in self.messages().splitlines():
                if text in line:
                    return line
            assert self.process.poll() is None, self.messages()
            assert time.monotonic() < deadline, f"never said {text!r}: {self.messages()}"
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL for it and all its children."""
        for pid in (*children(self.process.pid).values(), self.process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()

    def close(self) -> None:
        self.kill()


class Run(Command):
    """`relod robot`."""

    def __init__(self, folder: Path, *arguments: str, quick: Sequence[str] = QUICK, **options: Any) -> None:
        super().__init__(folder, "robot", *quick, *arguments, **options)

    def pid_of(self, name: str) -> int:
        """Process id of a child by its name, for example `control`."""
        deadline = time.monotonic() + START_LIMIT_S
        while (pid := children(self.process.pid).get(f"relod-{name}"[:15])) is None:
            assert time.monotonic() < deadline, f"no {name} process: {self.messages()}"
            time.sleep(0.05)
        return pid

    def wait_for_steps(self, count: int) -> None:
        """Until that many steps have been written to the metrics, so that the robot is driving."""
        deadline = time.monotonic() + START_LIMIT_S
        while self.steps() < count:
            assert self.process.poll() is None, self.messages()
            assert time.monotonic() < deadline, f"no {count} steps in {START_LIMIT_S} s: {self.messages()}"
            time.sleep(0.05)

    def wait_for_checkpoint(self) -> None:
        """Until the learner has written one; its worker gets only what time the others leave."""
        deadline = time.monotonic() + START_LIMIT_S
        while not list(self.folder.glob("latest/checkpoints/learner-*.safetensors")):
            assert self.process.poll() is None, self.messages()
            assert time.monotonic() < deadline, f"no checkpoint in {START_LIMIT_S} s: {self.messages()}"
            time.sleep(0.05)

    def steps(self) -> int:
        try:
            lines = (self.folder / "latest" / "metrics.jsonl").read_text().splitlines()
            return int(json.loads(lines[-1])["steps"])
        except (OSError, IndexError, ValueError):
            return 0


class Learner(Command):
    """`relod learner`; on a free port of the loopback unless it is told otherwise."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        listen: str = "127.0.0.1:0",
        quick: Sequence[str] = QUICK_LEARNER,
        **options: Any,
    ) -> None:
        settings = () if "--resume" in arguments else quick
        super().__init__(folder, "learner", "--listen", listen, *settings, *arguments, **options)
        self.url = self.wait_for_message("listening at").split()[-1]

    def wait_for_updates(self) -> None:
        """Until its worker has learned from something; the robots may have gone."""
        deadline = time.monotonic() + START_LIMIT_S
        while not any(json.loads(line).get("updates") for line in self._metrics()):
            assert self.process.poll() is None, self.messages()
            assert time.monotonic() < deadline, f"no update in {START_LIMIT_S} s: {self.messages()}"
            time.sleep(0.1)

    def _metrics(self) -> list[str]:
        return (self.run_folder / "metrics.jsonl").read_text().splitlines()

    @property
    def run_folder(self) -> Path:
        """Of the run it made."""
        return Path(self.wait_for_message("run folder").split()[-1])


@contextmanager
def learner(folder: Path, *arguments: str, **options: Any) -> Iterator[Learner]:
    """A learner that is gone after the block, with its worker."""
    running = Learner(folder, *arguments, **options)
    try:
        yield running
    finally:
        running.close()


def resumed(folder: Path, run: Path, **options: Any) -> AbstractContextManager[Learner]:
    """A learner that goes on with its run."""
    return learner(folder, "--resume", str(run), **options)


@contextmanager
def robot(folder: Path, *arguments: str, **options: Any) -> Iterator[Run]:
    """A run that is gone after the block, with all its children."""
    running = Run(folder, *arguments, **options)
    try:
        yield running
    finally:
        running.close()


def relod(folder: Path, *arguments: str, limit_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run([*RELOD, *arguments], capture_output=True, text=True, cwd=folder, timeout=limit_s)


def children(pid: int) -> dict[str, int]:
    """Children of a process by the name they gave themselves."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text()
                parent = int(fields.rpartition(")")[2].split()[1])
                if parent == pid:
                    found[fields[fields.index("(") + 1 : fields.rindex(")")]] = int(entry.name)
            except OSError:
                continue
    return found


def stood_after_ms(log: Sequence[dict[str, Any]], killed_ns: int) -> float:
    """From `killed_ns` until both wheels stood for good, in the emulator's own log."""
    stood_ns: int | None = killed_ns
    for record in log:
        if any(record[f"{kind}_{side}_mm_s"] for kind in ("requested",) for side in ("left", "right")) or any(
            record[f"{side}_mm_s"] for side in ("left", "right")
        ):
            stood_ns = None
        elif stood_ns is None:
            stood_ns = max(int(record["t_ns"]), killed_ns)
    assert stood_ns is not None, "the wheels still turn"
    return (stood_ns - killed_ns) / 1e6
