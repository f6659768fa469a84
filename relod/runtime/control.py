"""The control process: the cycle on the wall clock. Deadlines, senses, decision, command; nothing else.

Everything that may take milliseconds happens in other processes. What must happen here but not on the deadline,
swapping in a newer policy and sending the transition to the parent, follows the command, in the slack.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import uvloop

from ..config import SafetySettings
from ..errors import SafetyStop
from ..robots.vision import make_shrink
from ..seeds import random_stream
from ..types import Actor, Frame, Task
from .channel import Channel, Event, Ready, Report
from .clock import NS_PER_MS, NS_PER_S, DeadlineTimer, Ticker, monotonic_ns
from .cycle import Cycle, Inputs, Phase, Tick
from .device import CommandRing
from .messages import CycleRecord, encode
from .plan import Start
from .shared import FrameRing, SensorRing
from .spans import SpanRing, SpanWriter, Stage

__all__ = ["ActorHost", "ControlJob", "run_control"]

OUTBOX_LIMIT = 4096  # messages the parent may be behind, 90 s of steps, before the run is ended


class ActorHost(Protocol):
    """An actor and how its policy is kept up to date."""

    @property
    def actor(self) -> Actor:
        """What answers the observations."""
        ...

    @property
    def version(self) -> tuple[int, int]:
        """Version of the policy that acts now."""
        ...

    def poll(self) -> bool:
        """Swap in a newer policy if there is one; called after the command, must take well under a millisecond."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlJob:
    """What the control process is given; everything pickles into a spawned child."""

    build_task: Callable[[], Task]
    build_actor: Callable[[], ActorHost]
    safety: SafetySettings
    seed: int
    start: Start
    max_steps: int
    sensors: SensorRing
    frames: FrameRing
    commands: CommandRing
    spans: SpanRing
    stream: socket.socket  # SOCK_SEQPACKET to the parent: steps and ends of episodes
    record: bool


def run_control(channel: Channel, job: ControlJob) -> None:
    """Body of the control process."""
    uvloop.run(_Control(channel, job).run())


class _Control:
    def __init__(self, channel: Channel, job: ControlJob) -> None:
        self._channel, self._job = channel, job
        self._task = job.build_task()
        self._host = job.build_actor()
        spec = self._task.spec
        self._cycle = Cycle(
            task=self._task,
            actor=self._host.actor,
            safety=job.safety,
            rng=random_stream(job.seed, job.start.stream("reset")),
            shrink=make_shrink(spec.image_hw),
            max_steps=job.max_steps,
            first_episode=job.start.episode,
            first_step=job.start.step,
        )
        self._spans: SpanWriter = job.spans.writer("control")
        self._frames: deque[Frame] = deque(maxlen=spec.frames)
        self._outbox: deque[bytes] = deque()
        self._request_id = 0
        self._last: Tick | None = None
        self._reported_ns = 0
        job.stream.setblocking(False)

    async def run(self) -> None:
        ticker_period_ns = self._task.spec.cycle_ns
        timer = DeadlineTimer()
        self._job.commands.take_over()
        self._channel.send(Ready())
        begin = asyncio.Event()
        finished = asyncio.create_task(self._channel.finished(lambda text: begin.set()), name="finished")
        waiting = asyncio.create_task(begin.wait(), name="begin")
        await asyncio.wait([waiting, finished], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        # Start-up objects live to the end: never walk them again. Collections happen between episodes.
        gc.collect()
        gc.freeze()
        gc.disable()
        self._ticker = ticker = Ticker(ticker_period_ns, monotonic_ns() + ticker_period_ns)
        index = 0
        while not finished.done():
            deadline_ns = ticker.next(monotonic_ns())
            await timer.wait_until(deadline_ns)
            index += 1
            self._serve(index, deadline_ns)
            if self._last is not None and self._last.phase is Phase.OVER:
                break
        self._leave(index, finished.result() if finished.done() else "")
        finished.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await finished
        await self._flush()

    def _serve(self, index: int, deadline_ns: int) -> None:
        """One cycle."""
        start_ns = monotonic_ns()
        self._spans.add(Stage.LATENESS, index, deadline_ns, start_ns)
        inputs = self._sense()
        sensed_ns = monotonic_ns()
        self._spans.add(Stage.OBSERVE, index, start_ns, sensed_ns)
        try:
            version = self._host.version
            tick = self._cycle.tick(start_ns, inputs)
        except SafetyStop:
            self._command(index, deadline_ns, self._cycle.interrupt("safety stop"))
            self._drain()
            raise
        self._command(index, deadline_ns, tick)
        self._spans.add(Stage.DECIDE, index, sensed_ns, monotonic_ns())
        # From here on the robot has its command; the rest is slack.
        self._stamp_ages(index, start_ns, inputs)
        self._send(start_ns, inputs, tick, version)
        if self._host.poll():
            self._spans.add(Stage.SWAP, index, sensed_ns, monotonic_ns())
        if tick.end is not None:
            gc.collect()
        if start_ns - self._reported_ns > NS_PER_S:
            self._reported_ns = start_ns
            self._report(inputs)

    def _sense(self) -> Inputs:
        ring = self._job.frames
        newest_id = ring.newest_id
        known = self._frames[-1].id if self._frames else 0
        for frame_id in range(max(known + 1, newest_id - self._task.spec.frames + 1, 1), newest_id + 1):
            frame = ring.get(frame_id)
            if frame is not None:
                self._frames.append(frame)
        return Inputs(window=self._job.sensors.window(self._task.spec.sensor_window), frames=tuple(self._frames))

    def _command(self, index: int, deadline_ns: int, tick: Tick) -> None:
        if tick.command.request:
            self._request_id += 1
        self._job.commands.publish(
            tick=index,
            deadline_ns=deadline_ns,
            issued_ns=monotonic_ns(),
            values=tick.command.values,
            request=tick.command.request,
            request_id=self._request_id,
        )

    def _stamp_ages(self, index: int, start_ns: int, inputs: Inputs) -> None:
        if self._cycle.phase is not Phase.RUNNING:
            return
        self._spans.add(Stage.SENSOR_AGE, index, int(inputs.window.arrived_ns[-1]), start_ns)
        self._spans.add(Stage.FRAME_AGE, index, inputs.frames[-1].captured_ns, start_ns)

    def _send(self, now_ns: int, inputs: Inputs, tick: Tick, version: tuple[int, int]) -> None:
        if self._job.record:
            self._outbox.append(encode(_record(now_ns, inputs, tick, version)))
        if tick.step is not None:
            self._outbox.append(encode(tick.step))
        if tick.end is not None:
            self._outbox.append(encode(tick.end))
        if tick.event:
            self._channel.send(Event(tick.event))
        self._drain()
        self._last = tick
        if len(self._outbox) > OUTBOX_LIMIT:
            raise SafetyStop(
                f"the parent process has not taken {OUTBOX_LIMIT} messages; the robot was stopped",
                "is the disk of the run folder slow or full?",
            )

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._outbox:
                self._job.stream.send(self._outbox[0])
                self._outbox.popleft()

    async def _flush(self) -> None:
        """Hand over what is left; the parent reads until this end closes."""
        with contextlib.suppress(TimeoutError, BrokenPipeError, ConnectionResetError):
            async with asyncio.timeout(2.0):
                self._drain()
                while self._outbox:
                    await asyncio.sleep(0.01)
                    self._drain()
        self._report(None)
        self._job.stream.close()

    def _leave(self, index: int, reason: str) -> None:
        if self._cycle.phase is not Phase.OVER:
            tick = self._cycle.interrupt(reason or "interrupted")
            self._command(index + 1, monotonic_ns(), tick)
            if tick.end is not None:
                self._outbox.append(encode(tick.end))

    def _report(self, inputs: Inputs | None) -> None:
        cycle, ticker = self._cycle, self._ticker
        values: dict[str, float | str] = {
            "phase": cycle.phase.value,
            "steps": float(cycle.steps),
            "episode": float(cycle.episode),
            "index": float(cycle.index),
            "return": cycle.return_,
            "overruns": float(ticker.overruns),
            "skipped": float(ticker.skipped),
            "rejected": float(cycle.rejected),
            "torn_reads": float(self._job.sensors.ring.kept + self._job.frames.ring.kept),
        }
        if inputs is not None and len(inputs.window.seq):
            values |= {f"status.{name}": value for name, value in self._task.status(inputs.window).items()}
            values["sensor_age_ms"] = (monotonic_ns() - int(inputs.window.arrived_ns[-1])) / NS_PER_MS
        if inputs is not None and inputs.frames:
            values["frame_age_ms"] = (monotonic_ns() - inputs.frames[-1].captured_ns) / NS_PER_MS
        self._channel.send(Report(values))


def _record(now_ns: int, inputs: Inputs, tick: Tick, version: tuple[int, int]) -> CycleRecord:
    window = inputs.window
    return CycleRecord(
        now_ns=now_ns,
        sensor_seq=tuple(window.seq.tolist()),
        sensor_arrived_ns=tuple(window.arrived_ns.tolist()),
        sensor_values=np.ascontiguousarray(window.values, "<f8").tobytes(),
        frames=tuple((frame.id, frame.captured_ns, frame.arrived_ns) for frame in inputs.frames),
        policy_version=version,
        command=tick.command.values,
        request=tick.command.request,
        phase=tick.phase.value,
    )
