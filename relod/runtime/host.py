"""The robot host's parent process: starts the children, takes in what they say, keeps the run folder and the view.

It wires nothing: which actor acts and where experience goes is decided in `modes.py` and handed in. It is never on
the path from senses to motors, so whatever takes milliseconds may happen here.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import tempfile
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import uvloop

from ..errors import EXIT_OK, RelodError, SafetyStop
from ..types import EpisodeEnd, Frame, Step
from .camera import CameraJob
from .clock import NS_PER_S, monotonic_ns
from .control import BEGIN, HOLD, ActorHost, ControlJob
from .device import CommandRing, DeviceJob
from .messages import MAX_MESSAGE_BYTES, Answered, Asked, CycleRecord, decode, encode
from .plan import Plan, Start
from .processes import Child, Supervisor, signals_to
from .profile import Profile
from .progress import Progress
from .recording import Recorder
from .rundir import RunFolder
from .scheduling import described
from .screen import View
from .sentinel import SentinelJob
from .shared import FrameRing, SensorRing
from .spans import SpanRing
from .view import open_view
from .viewstate import RunState
from .world import NEW_EPISODE, WorldJob

__all__ = ["ChildSpec", "Events", "Learning", "Opening", "Result", "RobotHost"]

T = TypeVar("T")

VIEW_PERIOD_S = 0.25
# Children report once a second, a worker after the update in which that second ended.
SILENCE_LIMITS_S = {"control": 20.0, "device": 3.0, "worker": 30.0}
FRAMES_IN_RING = 128  # 4.3 s at 30 frames/s: longer than this process may be held up, by a disk for example
WORKER_STOP_LIMIT_S = 30.0  # it finishes its update and writes a checkpoint, at the lowest priority


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """A further child of a mode, for example the update worker."""

    name: str
    target: str
    job: Callable[[], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What the control process is made with."""

    build_actor: Callable[[], ActorHost]
    seed: int  # of its random streams; among the robots of one learner each has another
    between_episodes: bool = False  # newer policies are taken between episodes only, whatever the settings say


class Events(Protocol):
    """What a `Learning` may tell the robot's host; every call on the loop."""

    def hold(self, reason: str) -> None:
        """Begin no episode for this reason; an empty one lifts it."""
        ...

    def answer(self, answer: Answered) -> None:
        """An action for the control process."""
        ...

    def event(self, name: str, text: str) -> None:
        """Something a person should read."""
        ...

    def end(self, error: RelodError | None) -> None:
        """End the run: in good order, or with this error."""
        ...


class Learning(Protocol):
    """Where experience goes and actions come from: a replay and a worker on this host, or a link to another."""

    async def open(self, events: Events) -> Opening:
        """Be ready for experience; `RelodError` when it cannot be."""
        ...

    def children(self) -> Sequence[ChildSpec]:
        """The processes it needs."""
        ...

    def add_frame(self, frame: Frame) -> None:
        """A camera frame, before any step that names it."""
        ...

    def add(self, message: Step | EpisodeEnd) -> None:
        """The next step or end of an episode."""
        ...

    def ask(self, question: Asked) -> None:
        """The control process wants an action from elsewhere; it comes by `Events.answer`.

        The step that has led to the question is added behind it.
        """
        ...

    def poll(self) -> Mapping[str, dict[str, float | str]]:
        """Figures since the last call, by who they are about, as `Progress.report` takes them."""
        ...

    async def finish(self) -> None:
        """No more experience will come: hand over what is left. The robot stands."""
        ...

    def summary(self) -> dict[str, Any]:
        """What it adds to the run's JSON document."""
        ...


@dataclass(slots=True, kw_only=True)
class Result:
    """How a run ended."""

    summary: dict[str, Any]
    exit_code: int
    error: RelodError | None = None


@dataclass(slots=True, kw_only=True)
class _Shared:
    """Memory and sockets between the processes of one run."""

    sensors: SensorRing
    frames: FrameRing
    commands: CommandRing
    spans: SpanRing
    stream: socket.socket  # our end
    stream_theirs: socket.socket
    frames_signal: Any = field(default=None)


class RobotHost:
    """One run on one robot host."""

    def __init__(
        self,
        *,
        plan: Plan,
        folder: RunFolder,
        learning: Learning,
        spans: SpanRing,
        start: Start,
        progress: Progress,
    ) -> None:
        self._start_at = start
        self._plan, self._folder, self._learning = plan, folder, learning
        self._extra: Sequence[ChildSpec] = ()
        self._hold = ""
        spec = plan.task.spec
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        frames = FrameRing(*spec.camera_hw, capacity=FRAMES_IN_RING, last_id=start.frame_id)
        self._shared = _Shared(
            sensors=SensorRing(plan.entry.sensor_names),
            frames=frames,
            commands=CommandRing(len(plan.entry.command_names)),
            spans=spans,
            stream=ours,
            stream_theirs=theirs,
            frames_signal=frames.add_signal(),
        )
        self.progress = progress
        self._profile = Profile(spans, spec.cycle_ns, lambda name, rows: folder.spans(rows))
        self._recorder = Recorder(folder.path) if plan.settings.run.record else None
        self._supervisor = Supervisor(
            log_path=folder.path / "children.log",
            max_restarts=plan.settings.safety.max_restarts,
            on_event=lambda name, text: self._guarded(lambda: self.progress.event(name, text)),
            on_report=self._heard,
            on_restart=self.progress.restarted,
            on_done=self._done,
        )
        self._silent_s = dict.fromkeys(SILENCE_LIMITS_S, 0.0)  # since a child reported last
        self._silence_limits_s = SILENCE_LIMITS_S | {"control": plan.settings.safety.stall_limit_s}
        self._taken_id = start.frame_id
        self._asked = False  # the message taken last was a question
        self._running = False  # every child is ready
        self._ended = asyncio.Event()
        self._hurry = asyncio.Event()
        self._signalled: signal.Signals | None = None
        self._error: RelodError | None = None
        self._defect: Exception | None = None

    def run(self) -> Result:
        """Run until the steps are done, a signal, or a failure; the robot stands when this returns."""
        try:
            uvloop.run(self._run())
        finally:
            self._supervisor.close()  # whatever went wrong: a child that lives would keep this process from ending
            self._shared.stream.close()
            self._shared.stream_theirs.close()
        if self._defect is not None:
            raise self._defect
        summary = self.progress.summary(self._profile) | self._learning.summary()
        code = EXIT_OK
        if self._error is not None:
            code = self._error.exit_code
        elif self._signalled is not None:
            code = 128 + self._signalled
        summary |= {"exit_code": code, "error": str(self._error) if self._error else ""}
        return Result(summary=summary, exit_code=code, error=self._error)

    async def _run(self) -> None:
        with signals_to(self._on_signal), tempfile.TemporaryDirectory(prefix="relod-") as sockets, open_view() as view:
            books = asyncio.create_task(self._keep_books(view), name="books")
            try:
                await self._start(Path(sockets))
                await self._serve(books)
            except _Interrupted:
                pass
            except RelodError as error:
                self._error = self._error or error
            finally:
                await self._stop()
                books.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await books
                view.show(self.progress.state, monotonic_ns())

    # -- start ---------------------------------------------------------------------------------------------------------

    async def _start(self, sockets: Path) -> None:
        """Everything that takes long starts at once; what needs an address waits for it."""
        plan, shared, supervisor = self._plan, self._shared, self._supervisor
        self.progress.phase("connecting")
        opening = await self._unless_ended(self._learning.open(self))
        self._extra = self._learning.children()
        self.progress.phase("starting")
        children = [
            supervisor.start(
                "control",
                "relod.runtime.control:run_control",
                lambda: ControlJob(
                    build_task=plan.task_builder,
                    build_actor=opening.build_actor,
                    safety=plan.settings.safety,
                    seed=opening.seed,
                    start=self._start_at,
                    max_steps=plan.max_steps,
                    sensors=shared.sensors,
                    frames=shared.frames,
                    commands=shared.commands,
                    spans=shared.spans,
                    stream=shared.stream_theirs,
                    record=plan.settings.run.record,
                    codec=plan.settings.log.codec,
                    jpeg_quality=plan.settings.log.jpeg_quality,
                    policy_sync="episode" if opening.between_episodes else plan.settings.link.policy_sync,
                    realtime=plan.settings.run.realtime,
                ),
            ),
            supervisor.start(
                "sentinel",
                "relod.runtime.sentinel:run_sentinel",
                lambda: SentinelJob(spans=shared.spans, realtime=plan.settings.run.realtime),
                restart=True,
            ),
            *(supervisor.start(extra.name, extra.target, extra.job, restart=True) for extra in self._extra),
        ]
        shared.stream_theirs.close()
        address, source = await self._start_world(sockets)
        children += [self._start_device(address), self._start_camera(source)]
        await self._all_ready(children)
        self._account()
        self._folder.update_run({"realtime": self.progress.realtime})
        self._running = True
        supervisor.tell("control", HOLD + self._hold)
        supervisor.tell("control", BEGIN)

    async def _start_world(self, sockets: Path) -> tuple[str, str]:
        """The robot's address and the camera's source, simulated where no hardware was named."""
        plan = self._plan
        if plan.robot is not None and plan.camera is not None:
            return plan.robot, plan.camera
        child = self._supervisor.start(
            "world",
            "relod.runtime.world:run_world",
            lambda: WorldJob(
                serve=plan.entry.emulator,
                settings=plan.settings.sim,
                seed=plan.settings.run.seed,
                spec=plan.task.spec,
                folder=sockets,
                wheel_log=self._folder.path / "wheels.jsonl",
                spans=self._shared.spans,
            ),
        )
        where = await self._ready(child)
        self._folder.update_run({"world_control": where["control"], "world_port": where["port"]})
        return plan.robot or where["port"], plan.camera or f"sim:{where['frames']}"

    def _start_device(self, address: str) -> Child:
        plan, shared = self._plan, self._shared
        return self._supervisor.start(
            "device",
            "relod.runtime.device:run_device",
            lambda: DeviceJob(
                driver=plan.entry.driver,
                address=address,
                settings=plan.settings.robot,
                sensors=shared.sensors,
                commands=shared.commands,
                spans=shared.spans,
                safety=plan.settings.safety,
                realtime=plan.settings.run.realtime,
            ),
            restart=True,
        )

    def _start_camera(self, source: str) -> Child:
        return self._supervisor.start(
            "camera",
            "relod.runtime.camera:run_camera_process",
            lambda: CameraJob(source=source, settings=self._plan.settings.camera, frames=self._shared.frames),
            restart=True,
        )

    async def _all_ready(self, children: Sequence[Child]) -> None:
        """Wait for all at once, so that the first failure is told without waiting for the slow ones."""
        waiting = [asyncio.create_task(self._ready(child), name=f"ready-{child.name}") for child in children]
        try:
            await asyncio.gather(*waiting)
        finally:
            for task in waiting:
                task.cancel()

    async def _ready(self, child: Child) -> dict[str, str]:
        """Wait for the child."""
        return await self._unless_ended(self._supervisor.wait_ready(child))

    async def _unless_ended(self, coming: Coroutine[Any, Any, T]) -> T:
        """Wait for it, or for whatever ends the run."""
        waiting = asyncio.create_task(coming)
        ended = asyncio.create_task(self._ended.wait(), name="ended")
        try:
            await asyncio.wait([waiting, ended], return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise _Interrupted("interrupted while starting")
            return waiting.result()
        finally:
            waiting.cancel()
            ended.cancel()

    # -- run -----------------------------------------------------------------------------------------------------------

    async def _serve(self, books: asyncio.Task[None]) -> None:
        """Until the control process has closed its stream, a signal came, or a child is lost for good."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._shared.stream.fileno(), self._guarded, self._take_messages)
        loop.add_reader(self._shared.frames_signal.fileno(), self._guarded, self._take_frames)
        try:
            async with self._supervisor.watching() as watch:
                failed = asyncio.create_task(self._supervisor.failed.wait(), name="failed")
                ended = asyncio.create_task(self._ended.wait(), name="ended")
                await asyncio.wait([failed, ended, books, watch], return_when=asyncio.FIRST_COMPLETED)
                failed.cancel()
                ended.cancel()
                if books.done():
                    books.result()  # it only ends by a defect
                if watch.done():
                    watch.result()
        finally:
            loop.remove_reader(self._shared.frames_signal.fileno())
        if self._supervisor.failure is not None:
            raise self._supervisor.failure

    async def _keep_books(self, view: View[RunState]) -> None:
        """Profile, learner and view once per view period, metrics every few seconds."""
        next_metrics_ns = monotonic_ns()
        period_ns = int(self._plan.settings.run.metrics_every_s * NS_PER_S)
        while True:
            self._guarded(self._close_period)
            if monotonic_ns() >= next_metrics_ns:
                next_metrics_ns = monotonic_ns() + period_ns
                self._guarded(lambda: self.progress.write_metrics(self._profile))
                if self._running:
                    self._account()
            view.show(self.progress.state, monotonic_ns())
            await asyncio.sleep(VIEW_PERIOD_S)
            if self._running and not self._ended.is_set():
                await self._watch_silence()

    def _heard(self, name: str, values: dict[str, float | str]) -> None:
        self._silent_s[name] = 0.0
        self._guarded(lambda: self.progress.report(name, values))

    async def _watch_silence(self) -> None:
        """Say where a child hangs that should report about once a second. Without the control process no run goes on.

        Silence is counted here and not by the clock, so that a parent that was stopped for a while accuses nobody.
        """
        for name, limit_s in self._silence_limits_s.items():
            before_s, self._silent_s[name] = self._silent_s[name], self._silent_s[name] + VIEW_PERIOD_S
            child = self._supervisor.children.get(name)
            if not before_s < limit_s <= self._silent_s[name] or child is None or not child.alive or child.failure:
                continue  # one that has said why it ends is about to
            place = await self._supervisor.place(name)
            told = f"nothing heard of the {name} process for {limit_s:g} s: it hangs{' in ' if place else ''}{place}"
            if name == "control":
                self.end(SafetyStop(f"{told}; the robot was stopped", "its stack is in the run's children.log"))
            elif place and self._silent_s[name] > 0:  # it may have come back meanwhile
                self.event(name, f"{told}; its stack is in the run's children.log")

    def _account(self) -> None:
        """What the children take of the processor, and how they are scheduled."""
        self.progress.processor(self._supervisor.cpu_seconds())
        self.progress.scheduled(described(self._supervisor.pids()))

    def _close_period(self) -> None:
        self._profile.drain()
        for name, values in self._learning.poll().items():
            self._heard(name, values)
        self.progress.profiled(self._profile)

    def _guarded(self, take: Callable[[], object]) -> None:
        """What goes wrong in a callback ends the run as it would in a task."""
        try:
            take()
        except RelodError as error:
            self._error = self._error or error
            self._ended.set()
        except Exception as error:
            self._defect = self._defect or error
            self._ended.set()

    def _take_frames(self) -> None:
        self._shared.frames_signal.clear()
        ring = self._shared.frames
        newest_id = ring.newest_id
        for frame_id in range(max(self._taken_id, newest_id - ring.capacity) + 1, newest_id + 1):
            frame = ring.get(frame_id)
            if frame is None:
                self.progress.frames_lost += 1
                continue
            self._learning.add_frame(frame)
            if self._recorder is not None:
                self._recorder.add_frame(frame)
            self.progress.frame(frame)
        self._taken_id = max(self._taken_id, newest_id)

    def _take_messages(self) -> bool:
        """The messages that wait, up to a question; False when that is all.

        The call after a question takes nothing: what is sent leaves when a turn of the loop ends, and the turn after
        this one is the link's.
        """
        if self._asked:
            self._asked = False
            return True
        while True:
            try:
                data = self._shared.stream.recv(MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return False
            if not data:
                asyncio.get_running_loop().remove_reader(self._shared.stream.fileno())
                return False  # the control process has ended, well or not: the supervisor tells which
            if self._recorder is not None:
                self._recorder.add_message(data)
            message = decode(data)
            if isinstance(message, CycleRecord):
                continue
            self._take_frames()  # every frame the message names was in the ring before it was sent
            if isinstance(message, Asked):
                self._learning.ask(message)
                self._asked = True
                return True
            self._learning.add(message)
            self.progress.add(message)
            if isinstance(message, EpisodeEnd):
                self._supervisor.tell("world", NEW_EPISODE)

    def _done(self, name: str) -> None:
        if name == "control":
            self._ended.set()

    # -- what the learner's side tells ---------------------------------------------------------------------------------

    def hold(self, reason: str) -> None:
        """Begin no episode for this reason; an empty one lifts it."""
        if reason != self._hold:
            self._hold = reason
            self.progress.held(reason)
            if self._running:
                self._supervisor.tell("control", HOLD + reason)

    def answer(self, answer: Answered) -> None:
        """Hand an action to the control process, unless that is behind: the next one will be newer."""
        with contextlib.suppress(OSError):
            self._shared.stream.send(encode(answer))

    def event(self, name: str, text: str) -> None:
        """Something a person should read."""
        self._guarded(lambda: self.progress.event(name, text))

    def end(self, error: RelodError | None) -> None:
        """End the run: in good order, or with this error."""
        self._error = self._error or error
        self._ended.set()

    # -- end -----------------------------------------------------------------------------------------------------------

    async def _stop(self) -> None:
        """The robot first, then everything else; the world last, for its log shows how the wheels stood."""
        self.progress.phase("stopping")
        if self._running:
            self._account()
        stop = self._supervisor.stop
        device = self._supervisor.children.get("device")
        await asyncio.gather(stop("control"), stop("device"))
        with contextlib.suppress(RelodError, OSError):
            while self._take_messages():
                pass
        if device is not None:
            self._supervisor.listen(device)
        await self._finish_learning()
        await asyncio.gather(
            stop("camera"),
            stop("sentinel"),
            *(stop(extra.name, limit_s=WORKER_STOP_LIMIT_S) for extra in self._extra),
        )
        await stop("world")
        self._profile.drain(final=True)
        self._guarded(self._close_period)
        if self._recorder is not None:
            self._recorder.close()

    async def _finish_learning(self) -> None:
        """Hand over what is left, unless a second signal says that there is no time."""
        finishing = asyncio.create_task(self._learning.finish(), name="finish")
        hurry = asyncio.create_task(self._hurry.wait(), name="hurry")
        await asyncio.wait([finishing, hurry], return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not finishing.done():
            finishing.cancel()
        try:
            await finishing
        except asyncio.CancelledError:
            pass
        except RelodError as error:
            self._error = self._error or error

    def _on_signal(self, number: signal.Signals) -> None:
        if self._signalled is not None:  # asked twice: do not wait for anybody; the guard sees the robot stopped
            self._supervisor.kill_all()
            self._hurry.set()
        self._signalled = self._signalled or number
        self.progress.event("relod", f"{number.name}: stopping the robot")
        self._ended.set()


class _Interrupted(RelodError):
    """A signal came during the start."""
