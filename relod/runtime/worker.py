"""The update worker: owns the learner, samples the replay, publishes policies, writes checkpoints.

`UpdateSchedule` and `LearnerLoop` know neither processes nor sockets; under virtual time the driver calls the loop
inline, in the same process, and the run is deterministic. `run_worker` is the body of the process around them. It
yields to everything else (SCHED_IDLE), talks to its parent over one socket pair, and ends when that closes.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..algos.agent import Learner, Needs, find_algorithm, flatten_policy
from ..config import LearnerSettings, Section
from ..errors import StartError
from ..seeds import random_stream
from ..types import TaskSpec
from .channel import Channel, Ready
from .clock import NS_PER_S, Clock, WallClock
from .policy import PolicyBox, PolicyWriter
from .replay import ReplaySampler, ReplayTable
from .rundir import disk_errors, write_atomic
from .spans import SpanRing, Stage

__all__ = [
    "Checkpoint",
    "LearnerLoop",
    "NewsSender",
    "UpdateSchedule",
    "WorkerJob",
    "WorkerStatus",
    "newest_checkpoint",
    "read_checkpoint",
    "run_worker",
    "run_worker_process",
    "write_checkpoint",
]

STATUS_EVERY_S = 1.0
CHECKPOINTS_KEPT = 2  # the newest, and the one before it in case the newest is found damaged
PACKET_BYTES = 24 * 1024  # of news in one message; a whole number of records, far below a socket's buffer
WAIT_MS = 1000  # longest sleep while the schedule allows no update; news and the parent's end wake it at once

_MALLOC_TRIM_THRESHOLD, _MALLOC_MMAP_THRESHOLD = -1, -3  # mallopt(3)


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
    metrics: dict[str, float]


class UpdateSchedule:
    """A token bucket: `updates <= max_updates_per_step * (env_steps - init_steps)`. Pure."""

    def __init__(self, max_updates_per_step: float, init_steps: int) -> None:
        self._per_step = max_updates_per_step
        self._init_steps = init_steps

    def due(self, env_steps: int, updates: int) -> int:
        """How many updates may be done now."""
        earned = self._per_step * max(0, env_steps - self._init_steps)
        return max(0, int(earned + 1e-9) - updates)


class LearnerLoop:
    """Updates as the schedule allows, and policies as the clock does. No I/O of its own, no waiting.

    `publish` is called with the flat policy and its version, (epoch, update count).
    """

    def __init__(
        self,
        learner: Learner,
        sampler: ReplaySampler,
        needs: Needs,
        *,
        epoch: int,
        seed: int,
        publish: Callable[[np.ndarray, tuple[int, int]], object],
        publish_every_s: float,
        clock: Clock,
    ) -> None:
        self.learner = learner
        self.sampler = sampler
        self.updates = 0
        self.published = -1  # update count of the newest published policy
        self.rng = random_stream(seed, "replay.sample")
        self._needs = needs
        self._schedule = UpdateSchedule(needs.max_updates_per_step, needs.init_steps)
        self._epoch = epoch
        self._publish = publish
        self._publish_every_ns = int(publish_every_s * NS_PER_S)
        self._published_ns = 0
        self._clock = clock

    def due(self) -> int:
        """Updates that may be done now; none while the replay is empty."""
        return self._schedule.due(self.sampler.env_steps, self.updates) if len(self.sampler) else 0

    def run_updates(self, limit: int | None = None) -> int:
        """Do the updates that are due, at most `limit`, publishing on the way; returns how many were done."""
        count = self.due() if limit is None else min(limit, self.due())
        for _ in range(count):
            self.update()
        return count

    def update(self) -> None:
        """One update, and a policy if it is time for one."""
        needs = self._needs
        batch = self.sampler.sample(
            needs.batch_size, n_step=needs.n_step, gamma=needs.gamma, window=needs.window, rng=self.rng
        )
        self.learner.update(batch)
        self.updates += 1
        now_ns = self._clock.now_ns()
        if self.published < 0 or now_ns - self._published_ns >= self._publish_every_ns:
            self.publish_policy()

    def publish_policy(self) -> None:
        """Publish the policy as it stands, if it changed since the last time."""
        if self.published != self.updates:
            self._publish(flatten_policy(self.learner.policy()), (self._epoch, self.updates))
            self.published, self._published_ns = self.updates, self._clock.now_ns()

    def checkpoint(self) -> Checkpoint:
        """Everything needed to go on from here: learner, counts, random state."""
        counters = {
            "updates": self.updates,
            "env_steps": self.sampler.env_steps,
            "epoch": self._epoch,
            "rng": self.rng.bit_generator.state,
        }
        return Checkpoint(tensors=self.learner.state(), counters=counters)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from `checkpoint`; `SettingsError` when it belongs to other settings."""
        self.learner.load_state(checkpoint.tensors)
        self.updates = checkpoint.counters["updates"]
        self.rng.bit_generator.state = checkpoint.counters["rng"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Tensors by name, and plain counters: updates, env_steps, epoch, rng."""

    tensors: dict[str, Tensor]
    counters: dict[str, Any]


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `learner-UPDATES.safetensors`; complete or not there at all. Older ones but one are deleted.

    Raises:
        SafetyStop: the disk is full or cannot be written.
    """
    counters = msgspec.json.encode(checkpoint.counters).decode()
    path = folder / f"learner-{checkpoint.counters['updates']:09d}.safetensors"
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save(checkpoint.tensors, {"counters": counters}))
        for old in sorted(folder.glob("learner-*.safetensors"))[:-CHECKPOINTS_KEPT]:
            old.unlink()
    return path


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None."""
    return max(folder.glob("learner-*.safetensors"), default=None)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; `StartError` when it is missing or damaged. Nothing in it is executed."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            counters = msgspec.json.decode((file.metadata() or {})["counters"])
    except Exception as error:  # safetensors raises its own kinds, OSError, KeyError, RuntimeError
        raise StartError(f"checkpoint {path}: {error}", "give the path of a learner-*.safetensors file") from error
    return Checkpoint(tensors=tensors, counters=counters)


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
    checkpoints: Path
    resume: Path | None = None
    spans: SpanRing | None = None  # with a row for the writer "worker"


def run_worker_process(channel: Channel, job: WorkerJob) -> None:
    """Body of the worker process under a supervisor."""
    channel.send(Ready())
    run_worker(job)


def run_worker(job: WorkerJob) -> None:
    """Body of the worker process; returns after the last checkpoint when the link ends or on SIGTERM."""
    stop = _catch_signals()
    _yield_to_others()
    device = _choose_device(job.settings.device)
    torch.set_num_threads(job.settings.threads or os.cpu_count() or 1)
    algorithm = find_algorithm(job.algorithm)
    loop = LearnerLoop(
        algorithm.build_learner(job.spec, job.agent, seed=job.seed, device=device),
        ReplaySampler(job.replay),
        algorithm.needs(job.spec, job.agent),
        epoch=job.epoch,
        seed=job.seed,
        publish=PolicyWriter(job.box).publish,
        publish_every_s=job.settings.publish_every_s,
        clock=WallClock(),
    )
    if job.resume is not None:
        loop.resume(read_checkpoint(job.resume))
        loop.publish_policy()
    _Worker(job, loop).run(stop)


class _Worker:
    """The process's loop: news in, updates, status and checkpoints out."""

    def __init__(self, job: WorkerJob, loop: LearnerLoop) -> None:
        self._job = job
        self._loop = loop
        self._clock = WallClock()
        self._status_ns = self._checkpoint_ns = self._clock.now_ns()
        self._status_updates = loop.updates
        self._checkpoint_updates, self._written_ns = -1, 0
        self._spans = job.spans.writer("worker") if job.spans is not None else None
        job.link.setblocking(False)
        self._news = select.poll()
        self._news.register(job.link, select.POLLIN)

    def run(self, stop: Callable[[], bool]) -> None:
        """Until the link ends or `stop` says so."""
        while not stop() and self._drain():
            start_ns = self._clock.now_ns()
            if self._loop.run_updates(limit=1) == 0:
                self._news.poll(WAIT_MS)
                now_ns = self._clock.now_ns()
            else:
                now_ns = self._clock.now_ns()
                if self._spans is not None:
                    self._spans.add(Stage.UPDATE, self._loop.updates, start_ns, now_ns)
            if now_ns - self._status_ns >= STATUS_EVERY_S * NS_PER_S:
                self._send_status(now_ns)
            if now_ns - self._checkpoint_ns >= self._job.settings.checkpoint_every_s * NS_PER_S:
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
            self._loop.sampler.apply(data)

    def _write_checkpoint(self) -> None:
        self._checkpoint_ns = self._clock.now_ns()
        if self._loop.updates != self._checkpoint_updates:
            write_checkpoint(self._job.checkpoints, self._loop.checkpoint())
            self._checkpoint_updates, self._written_ns = self._loop.updates, self._clock.now_ns()

    def _send_status(self, now_ns: int) -> None:
        loop = self._loop
        elapsed_s = max(now_ns - self._status_ns, 1) / NS_PER_S
        status = WorkerStatus(
            epoch=self._job.epoch,
            updates=loop.updates,
            updates_per_s=(loop.updates - self._status_updates) / elapsed_s,
            env_steps=loop.sampler.env_steps,
            replay_steps=len(loop.sampler),
            published=loop.published,
            checkpoint_updates=self._checkpoint_updates,
            checkpoint_ns=self._written_ns,
            metrics=dict(loop.learner.metrics()),
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
    """Lowest scheduling class, before any thread starts; and keep freed memory.

    By default glibc maps large blocks one by one and returns them to the kernel, so that every update faults in new
    pages; keeping them takes the sac-lite update from 38 to 31 ms (median, one core).
    """
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:  # some sandboxes forbid the call; the next best
        os.nice(19)
    libc = ctypes.CDLL(None)
    libc.mallopt(_MALLOC_MMAP_THRESHOLD, 32 * 1024 * 1024)
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
