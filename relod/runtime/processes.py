"""Child processes: how one starts and ends, and the supervisor in the parent.

Children are spawned, never forked. Each holds one end of a socket pair to the parent: messages go both ways, and
its end of file is how either side learns at once that the other is gone, however it died. Children ignore Ctrl-C,
which the terminal sends to all of them; the parent alone decides what it means.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import EXIT_BUG, PackageError, RelodError, StartError, error_with_code
from ..loading import load_attribute
from .channel import MAX_ERROR_CHARS, Channel, Event, Failed, Finish, Ready, Report, Tell, readable
from .clock import NS_PER_S, cpu_seconds_of_tree, monotonic_ns
from .scheduling import name_process
from .stack import find_place, write_stack_when_asked
from .tasks import TaskGroup

__all__ = ["Child", "Supervisor", "child_main", "signals_to"]

START_LIMIT_S = 60.0  # importing torch on a busy two-core machine has taken 8 s
STOP_LIMIT_S = 5.0
KILL_LIMIT_S = 2.0


def child_main(target: str, name: str, channel: Channel, log_path: str, job: Any) -> None:
    """Entry of every child: run `target(channel, job)` and report how it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    name_process(name)
    _redirect_output(log_path)
    write_stack_when_asked()
    try:
        load_attribute(target, name)(channel, job)
    except RelodError as error:
        if error.__cause__ is not None:
            traceback.print_exc()
        channel.send(Failed(error.exit_code, error.message, error.hint, again=isinstance(error, PackageError)))
        sys.exit(error.exit_code)
    except Exception as error:
        traceback.print_exc()
        told = repr(error)[:MAX_ERROR_CHARS]
        channel.send(Failed(EXIT_BUG, f"{name} process: {told}", f"details are in {log_path}", again=True))
        sys.exit(EXIT_BUG)


def _redirect_output(log_path: str) -> None:
    """Children print into the run's log: SDKs write to stdout, which belongs to the parent's JSON and live view."""
    fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


@dataclass(slots=True, kw_only=True)
class Child:
    """One child as the parent sees it."""

    name: str
    target: str
    job: Callable[[], Any]  # made anew at each start, so that a restart gets fresh ends of its sockets
    restart: bool  # whether a death may be mended by starting it again
    process: multiprocessing.process.BaseProcess | None = None
    channel: Channel | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    info: dict[str, str] = field(default_factory=dict)
    failure: RelodError | None = None
    may_mend: bool = False  # the failure may be mended by another start
    starts: int = 0
    stopping: bool = False

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.is_alive()


@contextlib.contextmanager
def signals_to(handle: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Hand SIGINT, SIGTERM and SIGHUP to `handle` on the running loop."""
    loop = asyncio.get_running_loop()
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in handled:
        loop.add_signal_handler(number, handle, number)
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)


class Supervisor:
    """Starts the children, listens to them, restarts those that may be, and ends them in order.

    `on_event(name, text)` and `on_report(name, values)` are called on the loop, `on_restart(name)` after a restart,
    `on_done(name)` when one that may not be restarted has ended with exit code 0 unasked: its work is done. When such a
    child dies in another way, or one dies too often, `failed` is set.
    """

    def __init__(
        self,
        *,
        log_path: Path,
        max_restarts: int,
        on_event: Callable[[str, str], None],
        on_report: Callable[[str, dict[str, float | str]], None],
        on_restart: Callable[[str], None] = lambda name: None,
        on_done: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.children: dict[str, Child] = {}
        self.failure: RelodError | None = None
        self.failed = asyncio.Event()
        self._log_path = log_path
        self._max_restarts = max_restarts
        self._on_event, self._on_report = on_event, on_report
        self._on_restart, self._on_done = on_restart, on_done
        self._context = multiprocessing.get_context("spawn")

    def start(self, name: str, target: str, job: Callable[[], Any], *, restart: bool = False) -> Child:
        """Spawn a child that runs `target(channel, job())`."""
        child = Child(name=name, target=target, job=job, restart=restart)
        self.children[name] = child
        self._spawn(child)
        return child

    def _spawn(self, child: Child) -> None:
        ours, theirs = Channel.pair()
        child.channel, child.ready, child.failure = ours, asyncio.Event(), None
        child.starts += 1
        child.process = self._context.Process(
            target=child_main,
            args=(child.target, child.name, theirs, str(self._log_path), child.job()),
            name=f"relod-{child.name}",
            daemon=False,
        )
        child.process.start()
        theirs.close()

    async def wait_ready(self, child: Child, limit_s: float = START_LIMIT_S) -> dict[str, str]:
        """Wait until the child reports ready; raises its own error, or `StartError` when it stays silent."""
        assert child.channel is not None
        deadline_ns = monotonic_ns() + int(limit_s * NS_PER_S)
        while not child.ready.is_set():
            if child.failure is not None:
                raise child.failure
            if not child.alive and not self.listen(child):
                raise child.failure or StartError(f"at its start {_how_it_died(child)}", f"see {self._log_path}")
            if monotonic_ns() > deadline_ns:
                raise StartError(
                    f"the {child.name} process was not ready after {limit_s:.0f} s", f"see {self._log_path}"
                )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await readable(child.channel)
            self.listen(child)
        return child.info

    def listen(self, child: Child) -> bool:
        """Take in what the child has said; False once it has closed its end, or was reaped."""
        if child.channel is None or child.channel.fileno() < 0:
            return False
        try:
            messages = child.channel.pending()
        except EOFError:
            return False
        for message in messages:
            match message:
                case Ready(info):
                    child.info = info
                    child.ready.set()
                case Failed(code, text, hint, again):
                    child.failure, child.may_mend = error_with_code(code, text, hint), again
                case Event(text):
                    self._on_event(child.name, text)
                case Report(values):
                    self._on_report(child.name, values)
                case Finish() | Tell():
                    pass
        return True

    async def watch(self) -> None:
        """Listen to all children until cancelled; restart or give up as each child's policy says."""
        async with TaskGroup() as group:
            for child in self.children.values():
                group.create_task(self._watch_child(child), name=f"watch-{child.name}")

    async def _watch_child(self, child: Child) -> None:
        while True:
            assert child.channel is not None
            if self.listen(child):
                await readable(child.channel)
                continue
            await self._reap(child)
            assert child.process is not None
            if child.stopping:
                return
            if child.process.exitcode == 0 and not child.restart:  # else it was told to end by somebody else
                self._on_done(child.name)
                return
            if child.restart and child.starts <= self._max_restarts and (child.failure is None or child.may_mend):
                self._on_event(child.name, f"{_how_it_died(child)}; starting it again")
                self._spawn(child)
                self._on_restart(child.name)
                continue
            self._give_up(child)
            return

    def _give_up(self, child: Child) -> None:
        if self.failure is None:
            self.failure = child.failure or error_with_code(
                4, f"{_how_it_died(child)}; the run was ended", f"see {self._log_path}"
            )
        self.failed.set()

    async def _reap(self, child: Child) -> None:
        process = child.process
        assert process is not None
        for limit_s, act in ((KILL_LIMIT_S, process.kill), (KILL_LIMIT_S, lambda: None)):
            if await _ended(process, limit_s):
                break
            act()
        if child.channel is not None:
            child.channel.close()

    def tell(self, name: str, text: str) -> None:
        """Let a child know, if it is there."""
        child = self.children.get(name)
        if child is not None and child.alive and child.channel is not None:
            child.channel.send(Tell(text))

    async def stop(self, name: str, reason: str = "the run is over", limit_s: float = STOP_LIMIT_S) -> None:
        """End one child in good order: ask, then SIGTERM, then SIGKILL."""
        child = self.children.get(name)
        if child is None or child.process is None:
            return
        child.stopping = True
        if child.channel is not None and child.channel.fileno() >= 0:
            child.channel.send(Finish(reason))
        for wait_s, act in ((limit_s, child.process.terminate), (KILL_LIMIT_S, child.process.kill)):
            if await _ended(child.process, wait_s):
                return
            act()
        await _ended(child.process, KILL_LIMIT_S)

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[asyncio.Task[None]]:
        """`watch` in the background for the length of the block."""
        task = asyncio.create_task(self.watch(), name="watch-children")
        try:
            yield task
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def place(self, name: str) -> str:
        """Where in its code a child is that does not answer; "" where it cannot be told."""
        child = self.children.get(name)
        if child is None or not child.alive or child.process is None or child.process.pid is None:
            return ""
        return await find_place(child.process.pid, self._log_path)

    def pids(self) -> dict[str, int]:
        """Process ids of the living children."""
        return {
            name: child.process.pid
            for name, child in self.children.items()
            if child.process is not None and child.process.pid is not None and child.alive
        }

    def cpu_seconds(self) -> dict[str, float]:
        """Processor time of every living child since it started, in seconds."""
        return {name: cpu_seconds_of_tree(pid) for name, pid in self.pids().items()}

    def kill_all(self) -> None:
        """Last resort on the way out: no child may outlive the parent's own orderly end."""
        for child in self.children.values():
            if child.alive and child.process is not None:
                child.process.kill()

    def close(self) -> None:
        """After `stop`: kill what is left and let go of the channels."""
        self.kill_all()
        for child in self.children.values():
            if child.channel is not None:
                child.channel.close()


def _how_it_died(child: Child) -> str:
    code = child.process.exitcode if child.process is not None else None
    if code is not None and code < 0:
        return f"the {child.name} process was killed by {signal.Signals(-code).name}"
    if child.failure is not None:
        return f"the {child.name} process ended: {child.failure.message}"
    return f"the {child.name} process ended with exit code {code}"


async def _ended(process: multiprocessing.process.BaseProcess, limit_s: float) -> bool:
    """Whether the process ends within the limit."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            await readable(_Descriptor(process.sentinel))
            while process.is_alive():  # noqa: ASYNC110  its descriptors close a moment before it can be reaped
                await asyncio.sleep(0.002)
    return not process.is_alive()


@dataclass(frozen=True, slots=True)
class _Descriptor:
    """A bare descriptor with the `fileno()` that `readable` asks for."""

    fd: int

    def fileno(self) -> int:
        return self.fd
