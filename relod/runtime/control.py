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
from typing import Literal, Protocol

import numpy as np
import uvloop

from ..config import SafetySettings
from ..errors import SafetyStop
from ..packages import Slowness, Watch
from ..seeds import random_stream
from ..types import Actor, Command, Frame, Observation, Task
from .channel import Channel, Event, Ready, Report
from .clock import NS_PER_MS, NS_PER_S, DeadlineTimer, Ticker, monotonic_ns
from .cycle import Cycle, Inputs, Phase, Tick
from .device import CommandRing
from .log.codec import make_look
from .messages import MAX_MESSAGE_BYTES, Asked, CycleRecord, decode_answer, encode
from .plan import Start
from .scheduling import enter
from .shared import FrameRing, SensorRing
from .spans import SpanRing, SpanWriter, Stage

__all__ = ["BEGIN", "HOLD", "ActorHost", "ControlJob", "run_control"]

BEGIN, HOLD = "begin", "hold:"  # what the parent tells; a reason follows the latter, or nothing
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
    stream: socket.socket  # SOCK_SEQPACKET to the parent: steps, ends of episodes, questions; answers come back
    record: bool
    codec: str  # of the images that are kept: what it loses, the agent does not see either
    jpeg_quality: int
    policy_sync: Literal["step", "episode"]  # when a newer policy may be swapped in
    realtime: bool = False


def run_control(channel: Channel, job: ControlJob) -> None:
    """Body of the control process."""
    uvloop.run(_Control(channel, job).run())


class _Control:
    def __init__(self, channel: Channel, job: ControlJob) -> None:
        self._channel, self._job = channel, job
        self._task = job.build_task()
        self._host = job.build_actor()
        spec = self._task.spec
        self._watch = Watch(monotonic_ns)
        self._failure: SafetyStop | None = None  # in an answer, between two cycles
        self._slowness = Slowness(
            spec.cycle_ns,
            f"the robot keeps its last command meanwhile, and is stopped after {job.safety.command_timeout_ms:g} ms",
        )
        self._cycle = Cycle(
            watch=self._watch,
            task=self._task,
            actor=self._host.actor,
            safety=job.safety,
            rng=random_stream(job.seed, job.start.stream("reset")),
            shrink=make_look(job.codec, job.jpeg_quality, image_hw=spec.image_hw),
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
        self._hold = ""  # why no episode may begin
        self._waiting = False  # for the answer to what the newest cycle asked; its command is not given before
        self._index = self._deadline_ns = 0  # of the newest cycle
        self._begin = asyncio.Event()
        job.stream.setblocking(False)

    async def run(self) -> None:
        ticker_period_ns = self._task.spec.cycle_ns
        timer = DeadlineTimer()
        self._job.commands.take_over()
        if self._job.realtime:
            enter("control")
        self._channel.send(Ready())
        finished = asyncio.create_task(self._channel.finished(self._told), name="finished")
        waiting = asyncio.create_task(self._begin.wait(), name="begin")
        await asyncio.wait([waiting, finished], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        # Start-up objects live to the end: never walk them again. Collections happen between episodes.
        gc.collect()
        gc.freeze()
        gc.disable()
        self._ticker = ticker = Ticker(ticker_period_ns, monotonic_ns() + ticker_period_ns)
        asyncio.get_running_loop().add_reader(self._job.stream.fileno(), self._take_answers)
        while not finished.done():
            deadline_ns = ticker.next(monotonic_ns())
            await timer.wait_until(deadline_ns)  # answers to the cycle before may come until then
            self._index, self._deadline_ns = self._index + 1, deadline_ns
            self._serve(self._index, self._deadline_ns)
            if self._last is not None and self._last.phase is Phase.OVER:
                break
        asyncio.get_running_loop().remove_reader(self._job.stream.fileno())
        self._leave(self._index, finished.result() if finished.done() else "")
        finished.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await finished
        await self._flush()

    def _told(self, text: str) -> None:
        """The parent's word: begin, or whether episodes may begin."""
        if text == BEGIN:
            self._begin.set()
        elif text.startswith(HOLD):
            self._hold = text.removeprefix(HOLD)

    def _serve(self, index: int, deadline_ns: int) -> None:
        """One cycle."""
        start_ns = monotonic_ns()
        self._spans.add(Stage.LATENESS, index, deadline_ns, start_ns)
        inputs = self._sense()
        sensed_ns = monotonic_ns()
        self._spans.add(Stage.OBSERVE, index, start_ns, sensed_ns)
        self._watch.restart()
        try:
            if self._failure is not None:
                raise self._failure
            version = self._host.version
            tick = self._cycle.tick(start_ns, inputs)
        except SafetyStop:
            self._command(index, deadline_ns, self._cycle.interrupt("safety stop").command)
            self._drain()
            raise
        if tick.asked is None or self._waiting:
            self._command(index, deadline_ns, tick.command)
        self._waiting = tick.asked is not None
        decided_ns = monotonic_ns()
        self._spans.add(Stage.DECIDE, index, sensed_ns, decided_ns)
        if slow := self._slowness.note(self._watch.longest, self._watch.longest_ns, decided_ns):
            self._channel.send(Event(slow))
        # From here on the robot has its command; the rest is slack.
        self._stamp(index, start_ns, inputs, tick)
        self._send(start_ns, inputs, tick, version)
        between = self._job.policy_sync == "step" or tick.phase is not Phase.RUNNING
        if between and self._host.poll():
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
        window = self._job.sensors.window(self._task.spec.sensor_window)
        return Inputs(window=window, frames=tuple(self._frames), hold=self._hold)

    def _take_answers(self) -> None:
        """Actions that come after their deadline; each is a command at once."""
        while True:
            try:
                data = self._job.stream.recv(MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            if not data:  # the parent is gone, as the channel tells too
                asyncio.get_running_loop().remove_reader(self._job.stream.fileno())
                return
            asked_ns, action = decode_answer(data)
            try:
                command = self._cycle.answer(action, asked_ns, monotonic_ns())
            except SafetyStop as error:  # nobody above a callback takes it: the next cycle does
                self._failure = error
                return
            if command is not None:
                self._waiting = False
                self._command(self._index, self._deadline_ns, command)

    def _command(self, index: int, deadline_ns: int, command: Command) -> None:
        if command.request:
            self._request_id += 1
        self._job.commands.publish(
            tick=index,
            deadline_ns=deadline_ns,
            issued_ns=monotonic_ns(),
            values=command.values,
            request=command.request,
            request_id=self._request_id,
        )

    def _stamp(self, index: int, start_ns: int, inputs: Inputs, tick: Tick) -> None:
        inference = self._watch.calls.get(self._cycle.actor_name)
        if inference is not None and tick.asked is None:  # else it only took the question
            self._spans.add(Stage.INFERENCE, index, *inference)
        if self._cycle.phase is not Phase.RUNNING:
            return
        newest = inputs.frames[-1]
        self._spans.add(Stage.SENSOR_AGE, index, int(inputs.window.arrived_ns[-1]), start_ns)
        self._spans.add(Stage.FRAME_AGE, index, newest.captured_ns, start_ns)
        self._spans.add(Stage.FRAME_ARRIVAL, index, newest.captured_ns, newest.arrived_ns)

    def _send(self, now_ns: int, inputs: Inputs, tick: Tick, version: tuple[int, int]) -> None:
        if tick.asked is not None:  # first: the robot waits for the answer, and for nothing else
            self._outbox.append(encode(self._question(tick.asked)))
            self._drain()
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

    def _question(self, observation: Observation) -> Asked:
        return Asked(
            episode=self._cycle.episode,
            index=self._cycle.index,
            frame_ids=observation.frame_ids,
            proprio=np.ascontiguousarray(observation.proprio, "<f4").tobytes(),
            now_ns=observation.now_ns,
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
            self._command(index + 1, monotonic_ns(), tick.command)
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
            "late": float(cycle.late),
            "torn_reads": float(self._job.sensors.ring.kept + self._job.frames.ring.kept),
        }
        if inputs is not None and len(inputs.window.seq):
            values |= {f"status.{name}": value for name, value in self._cycle.status(inputs.window).items()}
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
        hold=inputs.hold,
    )
