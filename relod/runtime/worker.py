"""The update worker: the process around the learner's loop. It publishes policies and writes checkpoints.

It yields to everything else (SCHED_IDLE), talks to its parent over one socket pair, and ends when that closes.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import torch

from ..algos.agent import Learner
from ..algos.checked import find_algorithm, rehearse_learner
from ..config import LearnerSettings, Section
from ..errors import StartError
from ..types import TaskSpec
from .channel import Channel, Event, Ready
from .checkpoint import Checkpoint, newest_readable, write_checkpoint
from .clock import NS_PER_S, WallClock
from .policy import PolicyBox, PolicyWriter
from .replay import ReplayTable
from .rundir import is_locked
from .sources import open_source
from .spans import SpanRing, Stage
from .updates import LearnerLoop

__all__ = ["NewsSender", "WorkerJob", "WorkerStatus", "keep_freed_memory", "run_worker", "run_worker_process"]

STATUS_EVERY_S = 1.0
PACKET_BYTES = 24 * 1024  # of news in one message; a whole number of records, far below a socket's buffer
WAIT_MS = 1000  # longest sleep while the schedule allows no update; news and the parent's end wake it at once

_MALLOC_TRIM_THRESHOLD, _MALLOC_MMAP_MAX = -1, -4  # mallopt(3)


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the worker says about itself, about once a second."""

    epoch: int
    updates: int
    updates_per_s: float
    env_steps: int
    replay_steps: int
    published: int  # update count of the newest published policy
    checkpoint_updates: int  # update count of the newest checkpoint; -1 before the first
    checkpoint_ns: int  # when that was written; 0 before the first
    rollbacks: int  # times the learner went back because a value was not finite
    metrics: dict[str, float]


class NewsSender:
    """The replay writer's end of the socket: sends news without ever waiting, in order, none lost."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._pending = bytearray()
        sock.setblocking(False)

    def send(self, news: bytes) -> None:
        """Queue news and send what fits; 24 bytes a step wait at most while the worker is busy."""
        self._pending += news
        self.flush()

    def flush(self) -> bool:
        """Send what fits; True when nothing waits. `OSError` when the worker is gone."""
        while self._pending:
            try:
                sent = self._socket.send(self._pending[:PACKET_BYTES])
            except BlockingIOError:
                return False
            del self._pending[:sent]
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJob:
    """All a worker needs; handed to the spawned process.

    `link` is one end of a SOCK_SEQPACKET pair: `ReplayNews` come in, `WorkerStatus` (msgpack) go out. Its end means
    that the worker is to write a checkpoint and finish.
    """

    algorithm: str  # "module:attribute"
    spec: TaskSpec
    settings: LearnerSettings
    agent: Section
    seed: int
    epoch: int
    replay: ReplayTable
    box: PolicyBox
    link: socket.socket
    checkpoints: Path  # folder to write to, and to go on from where it holds one
    extra: Mapping[str, Any] = field(default_factory=dict)  # the caller's own, for every checkpoint
    spans: SpanRing | None = None  # with a row for the writer "worker"


def run_worker_process(channel: Channel, job: WorkerJob) -> None:
    """Body of the worker process under a supervisor."""
    run_worker(job, lambda text: channel.send(Event(text)), lambda: channel.send(Ready()))


def run_worker(
    job: WorkerJob, say: Callable[[str], object] = lambda text: None, ready: Callable[[], object] = lambda: None
) -> None:
    """Body of the worker process; returns after the last checkpoint when the link ends or on SIGTERM.

    `say` is called with what a person should read, `ready` once the algorithm has shown that it can learn here.

    Raises:
        StartError: no such torch device, or no checkpoint can be read.
        SettingsError: the checkpoint belongs to other settings, or the algorithm cannot learn here.
        SafetyStop: the disk is full, or learning diverged a second time.
        PackageError: the algorithm failed.
    """
    stop = _catch_signals()
    algorithm = find_algorithm(job.algorithm)
    device = _choose_device(job.settings.device)
    staged = device.type == "cuda"
    if job.box.latest.newest() is None:  # nobody acts by this learner yet: it need not yield, and is waited for
        torch.set_num_threads(1)
        rehearse_learner(algorithm, job.spec, job.agent, device=device, whole_frames=staged)
    ready()
    _yield_to_others()
    keep_freed_memory()
    threads = job.settings.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)

    def build() -> Learner:
        return algorithm.build_learner(job.spec, job.agent, seed=job.seed, device=device)

    loop = LearnerLoop(
        build(),
        open_source(
            job.replay,
            algorithm.needs(job.spec, job.agent),
            job.settings,
            threads=threads,
            staged=staged,
        ),
        epoch=_next_epoch(job),
        seed=job.seed,
        publish=PolicyWriter(job.box).publish,
        publish_every_s=job.settings.publish_every_s,
        clock=WallClock(),
        recover=lambda: (build(), _find_checkpoint(job, say)),
        say=say,
    )
    checkpoint = _find_checkpoint(job, say)
    if checkpoint is not None:
        loop.resume(checkpoint)
    _Worker(job, loop).run(stop)


def _next_epoch(job: WorkerJob) -> int:
    """Above every epoch in the policy box: a worker before this one may have gone back, and so raised it, unheard."""
    latest = job.box.latest.newest()
    return job.epoch if latest is None else max(job.epoch, int(latest[1]["epoch"]) + 1)


def _find_checkpoint(job: WorkerJob, say: Callable[[str], object]) -> Checkpoint | None:
    """The newest one of the run that can be read; None when there is none."""
    checkpoint, path, problems = newest_readable(job.checkpoints)
    for problem in problems:
        say(f"{problem}; going on from {path} instead")
    return checkpoint


class _Worker:
    """The process's loop: news in, updates, status and checkpoints out."""

    def __init__(self, job: WorkerJob, loop: LearnerLoop) -> None:
        self._job = job
        self._loop = loop
        self._parent = os.getppid()
        self._clock = WallClock()
        self._status_ns = self._checkpoint_ns = self._clock.now_ns()
        self._status_updates = loop.updates
        self._checkpoint_updates, self._written_ns = -1, 0
        self._has_policy = loop.published >= 0  # in a checkpoint: what it went on from
        self._spans = job.spans.writer("worker") if job.spans is not None else None
        job.link.setblocking(False)
        self._news = select.poll()
        self._news.register(job.link, select.POLLIN)

    def run(self, stop: Callable[[], bool]) -> None:
        """Until the link ends or `stop` says so."""
        self._loop.begin()
        while not stop() and self._drain():
            start_ns = self._clock.now_ns()
            if self._loop.run_updates(limit=1) == 0:
                self._news.poll(self._loop.idle_ms(WAIT_MS))
                now_ns = self._clock.now_ns()
            else:
                now_ns = self._clock.now_ns()
                if self._spans is not None:
                    self._spans.add(Stage.UPDATE, self._loop.updates, start_ns, now_ns)
            if now_ns - self._status_ns >= STATUS_EVERY_S * NS_PER_S:
                self._send_status(now_ns)
            due = now_ns - self._checkpoint_ns >= self._job.settings.checkpoint_every_s * NS_PER_S
            # The first policy at once: a run that goes on has the policy that acted, however soon it ended.
            if due or (self._loop.published >= 0 and not self._has_policy):
                self._write_checkpoint()
        self._loop.publish_policy()
        self._write_checkpoint()
        self._send_status(self._clock.now_ns())

    def _drain(self) -> bool:
        """Take in all news; False when the parent closed its end or is gone."""
        while True:
            try:
                data = self._job.link.recv(2 * PACKET_BYTES)
            except BlockingIOError:
                return True
            except ConnectionResetError:
                return False
            if not data:
                return False
            self._loop.memory.apply(data)

    def _write_checkpoint(self) -> None:
        self._checkpoint_ns = self._clock.now_ns()
        if self._loop.updates != self._checkpoint_updates and not self._replaced():
            write_checkpoint(self._job.checkpoints, self._loop.checkpoint(self._job.extra))
            self._checkpoint_updates, self._written_ns = self._loop.updates, self._clock.now_ns()
            self._has_policy = self._loop.published >= 0

    def _replaced(self) -> bool:
        """Whether the run has gone on without this worker, whose parent was killed: its checkpoints are not wanted."""
        return os.getppid() != self._parent and is_locked(self._job.checkpoints.parent)

    def _send_status(self, now_ns: int) -> None:
        loop = self._loop
        metrics = loop.metrics()  # before the counts: it may go back
        elapsed_s = max(now_ns - self._status_ns, 1) / NS_PER_S
        status = WorkerStatus(
            epoch=loop.epoch,
            updates=loop.updates,
            updates_per_s=max(0, loop.updates - self._status_updates) / elapsed_s,
            env_steps=loop.memory.env_steps,
            replay_steps=len(loop.memory),
            published=loop.published,
            checkpoint_updates=self._checkpoint_updates,
            checkpoint_ns=self._written_ns,
            rollbacks=loop.rollbacks,
            metrics=metrics,
        )
        self._status_ns, self._status_updates = now_ns, loop.updates
        try:
            self._job.link.send(msgspec.msgpack.encode(status))
        except OSError:  # nobody reads, or nobody is there: the next one says the same with newer numbers
            pass


def _catch_signals() -> Callable[[], bool]:
    """SIGTERM ends the worker in order; Ctrl-C is the parent's to handle."""
    seen: list[int] = []

    def remember(number: int, _: FrameType | None) -> None:
        seen.append(number)

    signal.signal(signal.SIGTERM, remember)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return lambda: bool(seen)


def _yield_to_others() -> None:
    """Lowest scheduling class, for the threads that run already as for those they will start."""
    try:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
    except OSError:  # some sandboxes forbid the call; the next best
        os.nice(19)


def keep_freed_memory() -> None:
    """Keep what this process frees, for the next update.

    By default glibc maps large blocks one by one and returns them to the kernel, so that every update faults in new
    pages. Keeping them takes the update from 38 to 31 ms (sac-lite, median, one core), and with blocks above 32 MB,
    for which a threshold does not help, from 143 to 125 ms (paper, minibatch 64, two cores).
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(_MALLOC_MMAP_MAX, 0)
    libc.mallopt(_MALLOC_TRIM_THRESHOLD, 512 * 1024 * 1024)


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts when it was built without CUDA
        raise StartError(f"torch device {name!r}: {error}", "use learner.device auto or cpu") from error
    return device
