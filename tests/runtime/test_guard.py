"""The guard as a process: what it writes to the wire, and when."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tty
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from relod.errors import StartError
from relod.runtime import guard
from relod.runtime.clock import NS_PER_MS, monotonic_ns
from relod.runtime.guardian import Guard

STOP = b"\x91\x00\x00\x00\x00"
TOLD = (guard.PADDING + STOP) * guard.ROUNDS
LIMIT_MS = 150.0


class Wire:
    """A pseudo-terminal; `heard` is all that was written to it."""

    def __init__(self) -> None:
        self.master, self.fd = os.openpty()
        tty.setraw(self.fd)
        os.set_blocking(self.master, False)
        os.set_blocking(self.fd, False)
        self.heard = b""

    async def hear(self, size: int, limit_s: float = 1.0) -> bytes:
        async with asyncio.timeout(limit_s):
            while True:
                try:
                    self.heard += os.read(self.master, 4096)
                except BlockingIOError:
                    pass
                if len(self.heard) >= size:
                    return self.heard
                await asyncio.sleep(0.005)

    async def stays_silent(self, duration_s: float) -> None:
        with pytest.raises(TimeoutError):
            await self.hear(len(self.heard) + 1, duration_s)

    def close(self) -> None:
        os.close(self.master)
        os.close(self.fd)


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.close()


def guarded(wire: Wire, body: Callable[[Guard, list[str]], Awaitable[None]]) -> None:
    async def main() -> None:
        ended: list[str] = []
        made = await Guard.start(wire_fd=wire.fd, stop=STOP, limit_ms=LIMIT_MS, on_end=lambda: ended.append("ended"))
        try:
            await body(made, ended)
        finally:
            await made.abandon()

    asyncio.run(main())


def test_a_dismissed_guard_writes_nothing(wire: Wire) -> None:
    async def body(made: Guard, ended: list[str]) -> None:
        made.beat()
        made.quiet()
        await made.dismiss()
        assert not made.alive
        await wire.stays_silent(0.05)
        assert not ended

    guarded(wire, body)


def test_an_abandoned_guard_stops_the_robot(wire: Wire) -> None:
    async def body(made: Guard, ended: list[str]) -> None:
        await made.abandon()
        assert await wire.hear(len(TOLD)) == TOLD
        assert not ended

    guarded(wire, body)


def test_missing_beats_stop_the_robot_once(wire: Wire) -> None:
    async def body(made: Guard, ended: list[str]) -> None:
        await wire.stays_silent(0.15)  # no beat yet: the robot stands
        for _ in range(6):
            made.beat()
            await asyncio.sleep(LIMIT_MS / 4000)
        assert wire.heard == b""
        assert await wire.hear(len(TOLD)) == TOLD
        await wire.stays_silent(0.15)
        assert made.stops == 1
        assert made.alive

    guarded(wire, body)


def test_a_quiet_guard_waits(wire: Wire) -> None:
    async def body(made: Guard, ended: list[str]) -> None:
        made.beat()
        made.quiet()
        await wire.stays_silent(0.2)

    guarded(wire, body)


def test_signals_of_the_group_do_not_end_it_and_its_death_is_noticed(wire: Wire) -> None:
    async def body(made: Guard, ended: list[str]) -> None:
        assert os.getsid(made.pid) != os.getsid(0)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(made.pid, number)
        await asyncio.sleep(0.05)
        assert made.alive
        os.kill(made.pid, signal.SIGKILL)
        await asyncio.wait_for(made._ended.wait(), 1.0)
        assert not made.alive
        assert ended == ["ended"]

    guarded(wire, body)


def test_a_full_wire_is_given_up_in_bounded_time() -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write_end, bytes(65536))
    begin_ns = monotonic_ns()
    assert not guard.put(write_end, STOP)
    assert 80 < (monotonic_ns() - begin_ns) / NS_PER_MS < 500
    os.close(read_end)
    os.close(write_end)


def test_a_lost_wire_is_given_up_at_once() -> None:
    wire = Wire()
    os.close(wire.master)
    assert not guard.put(wire.fd, STOP)
    os.close(wire.fd)


def test_a_guard_that_cannot_start_is_an_error(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "__file__", "/nowhere/guard.py")
    with pytest.raises(StartError, match="guard"):
        guarded(wire, lambda made, ended: asyncio.sleep(0))


def test_kill_9_of_the_process_that_holds_the_leash(wire: Wire) -> None:
    """The whole group of the killed process dies; the guard, in a session of its own, does not."""
    code = (
        "import asyncio, os, sys\n"
        "from relod.runtime.guardian import Guard\n"
        "async def main():\n"
        f"    g = await Guard.start(wire_fd={wire.fd}, stop={STOP!r}, limit_ms=1000, on_end=lambda: None)\n"
        "    g.beat(); print('up', flush=True); await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    root = Path(guard.__file__).parents[2]
    holder = subprocess.Popen(
        [sys.executable, "-c", code],
        pass_fds=(wire.fd,),
        stdout=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == b"up\n"
        killed_ns = monotonic_ns()
        os.killpg(holder.pid, signal.SIGKILL)
        asyncio.run(wire.hear(len(guard.PADDING + STOP)))
        assert (monotonic_ns() - killed_ns) / NS_PER_MS < 100
        holder.wait()
    assert wire.heard.startswith(guard.PADDING + STOP)


def test_it_imports_almost_nothing() -> None:
    tree = ast.parse(Path(guard.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert names == {"os", "select", "sys", "ctypes"}  # the last only in a real-time run
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))
