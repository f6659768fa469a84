"""The device process: owns the robot's port, executes the newest command, and makes the robot stand otherwise.

The robot may move only while fresh commands come. It is stopped when the newest is older than the limit, when the
process that wrote it dies, when the parent dies or says Finish, on SIGTERM, on any error of this process, and by
the guard (`guard.py`) when this process is killed or hangs. A stop is repeated until the sensors show that it
worked. This file knows no robot: a driver, named as "module:attribute", speaks to it.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import uvloop

from ..config import SafetySettings, Section
from ..errors import EXIT_SIGTERM, PackageError, RelodError, SafetyStop, StartError
from ..loading import load_attribute
from ..robots.checked import CheckedDriver
from ..types import Driver
from .channel import Channel, Event, Ready, Report
from .clock import NS_PER_MS, NS_PER_S, DeadlineTimer, Ticker, monotonic_ns
from .commands import CommandRing, Leash, WriterWatch
from .guardian import Guard
from .scheduling import enter, raise_to
from .shared import SensorRing
from .spans import SpanRing, Stage
from .tasks import TaskGroup

__all__ = ["MAY_BE_MOVING", "CommandRing", "DeviceDriver", "DeviceJob", "DriverFactory", "Leash", "run_device"]

MAY_BE_MOVING = "ROBOT MAY BE MOVING"
MAY_BE_MOVING_HINT = "go to the robot and switch it off"
TARGET = "relod.runtime.device:run_device"

CHECK_PERIOD_NS = 20 * NS_PER_MS
URGENT_CHECKS = 15  # the first 0.3 s a stop that the sensors do not confirm is repeated at every check
PATIENT_CHECKS = 50  # then once a second: the sensors are silent, or somebody is pushing the robot
# From 300 mm/s, the fastest of any reset, at the robot's 1 m/s² it takes 0.3 s to stand and 0.1 s to see it.
STAND_LIMIT_NS = 600 * NS_PER_MS
# Packets this soon after a command may still show the robot before it: 17 ms to act, 15 ms to sense, 20 ms to arrive.
REACT_NS = 100 * NS_PER_MS
REOPEN_PAUSE_S = 0.1
FIRST_PACKET_LIMIT_S = 3.0  # from the return of `open`, which should have waited for it


class DeviceDriver(Driver, Protocol):
    """A driver as the device process needs it. A command of zeros means to stand."""

    reopen_limit_s: float  # how long a lost wire may take to come back; 0 = this process must be replaced
    connection_epoch: int  # raised by each `open`; its newest value is the last sensor column, `connection_epoch`

    def guarded_wire(self) -> tuple[int, bytes] | None:
        """Descriptor and bytes with which another process can stop the robot; None if it has its own watchdog."""
        ...

    def stands(self, after_ns: int) -> bool:
        """Whether packets that arrived after `after_ns` show a robot that stands and was told to."""
        ...

    def counters(self) -> dict[str, float | str]:
        """Figures for the report; `packets` must be among them."""
        ...


class DriverFactory(Protocol):
    """What `DeviceJob.driver` names."""

    def __call__(
        self,
        address: str,
        settings: Section,
        publish: Callable[[int, Sequence[float]], object],
        on_event: Callable[[str], object],
    ) -> DeviceDriver: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceJob:
    """What the device process is given; everything pickles into a spawned child."""

    driver: str  # "module:attribute" of a DriverFactory
    address: str
    settings: Section  # the robot's own
    safety: SafetySettings
    sensors: SensorRing
    commands: CommandRing
    spans: SpanRing  # with a row for the writer "device"
    realtime: bool = False


def run_device(channel: Channel, job: DeviceJob) -> None:
    """Body of the device process.

    Raises:
        StartError: the robot could not be opened.
        SafetyStop: the wire was lost, or at the end nothing showed that the robot stands.
        SystemExit: 143 after SIGTERM.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_Device(channel, job).run())


class _Device:
    def __init__(self, channel: Channel, job: DeviceJob) -> None:
        self._channel, self._job = channel, job
        self._ring = job.commands.ring
        self._signal = job.commands.signal
        self._spans = job.spans.writer("device")
        self._leash = Leash(int(job.safety.command_timeout_ms * NS_PER_MS))
        self._guard: Guard | None = None
        self._guard_ended = asyncio.Event()
        self._rewiring = asyncio.Lock()  # only one of wire and guard is replaced at a time
        self._serving = False  # the port is open and guarded: commands are executed
        self._at_rest = True  # nothing that moves was commanded since the sensors last showed it standing
        self._told_to_move = False  # by the newest command that was executed
        self._moved_ns = self._held_ns = 0  # when it was last told to move, and to stand
        self._checks_held = 0
        self._writer = WriterWatch(self._on_writer_gone)
        self._commands = self._late = self._stops = self._write_errors = 0
        self._failure: RelodError | None = None  # of the driver, where nobody waited for its answer
        self._failed = asyncio.Event()
        job.sensors.ring.take_over()
        newest = self._ring.newest()  # what was asked before this process ran is not executed any more
        self._seen, self._request_id = (newest[0], int(newest[1]["request_id"])) if newest else (0, 0)
        factory: DriverFactory = load_attribute(job.driver, "the driver")
        driver = CheckedDriver(factory, job.sensors.names, self._fail)
        self._driver = driver.make(job.address, job.settings, job.sensors.publish, self._tell)
        self._driver.resume_epoch(self._last_epoch())

    def _last_epoch(self) -> int:
        window = self._job.sensors.window(1)
        return int(window.newest("connection_epoch")) if len(window.seq) else 0

    def _tell(self, text: str) -> None:
        self._channel.send(Event(text))

    # Life: open, serve until told to leave or something fails, make the robot stand, close.

    async def run(self) -> None:
        terminated = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminated.set)
        work = asyncio.create_task(self._work(), name="device-work")
        orders = [
            asyncio.create_task(self._channel.finished(), name="device-finish"),
            asyncio.create_task(terminated.wait(), name="device-sigterm"),
        ]
        try:
            await asyncio.wait([work, *orders], return_when=asyncio.FIRST_COMPLETED)
        finally:
            failure = work.exception() if work.done() and not work.cancelled() else None
            for task in (work, *orders):
                task.cancel()
            await asyncio.gather(work, *orders, return_exceptions=True)
            stands = await self._leave()
        if failure is not None and (stands or isinstance(failure, RelodError)):
            raise failure
        if not stands:
            if failure is not None:
                traceback.print_exception(failure)
            raise SafetyStop(f"{MAY_BE_MOVING}: no sensor shows that it stands", MAY_BE_MOVING_HINT)
        if terminated.is_set():
            raise SystemExit(EXIT_SIGTERM)

    async def _work(self) -> None:
        if self._job.realtime:
            enter("device")
        await self._open()
        await self._start_guard()
        gc.collect()
        gc.freeze()  # what exists now lives to the end; later collections stay under a millisecond
        self._begin_serving()
        asyncio.get_running_loop().add_reader(self._signal.fileno(), self._on_commands)
        self._channel.send(Ready({"address": self._job.address}))
        try:
            async with TaskGroup() as group:
                for body in (
                    self._keep_driver,
                    self._keep_guard,
                    self._keep_watch,
                    self._keep_reporting,
                    self._keep_failure,
                ):
                    group.create_task(body(), name=f"device{body.__name__}")
        except BaseExceptionGroup as failures:
            first = failures.exceptions[0]
            raise first from first.__cause__  # as it was: the group says nothing more

    async def _open(self) -> None:
        before = self._driver.published
        await self._driver.open()
        waited_ns = monotonic_ns()
        while self._driver.published == before or self._failure is not None:
            if self._failure is not None:
                raise StartError(self._failure.message, self._failure.hint)
            if monotonic_ns() - waited_ns > FIRST_PACKET_LIMIT_S * NS_PER_S:
                raise StartError(
                    f"{self._driver.name} is open, and published no sensor packet within {FIRST_PACKET_LIMIT_S:g} s",
                    "its open() must wait until packets flow",
                )
            await asyncio.sleep(CHECK_PERIOD_NS / NS_PER_S)

    def _fail(self, error: RelodError) -> None:
        """End this process, and with it the robot's motion, because of the driver."""
        self._failure = self._failure or error
        self._failed.set()

    async def _keep_failure(self) -> None:
        await self._failed.wait()
        assert self._failure is not None
        raise self._failure

    async def _leave(self) -> bool:
        """Make the robot stand and close it; whether it is known to stand."""
        self._serving = False
        asyncio.get_running_loop().remove_reader(self._signal.fileno())
        self._hold()
        self._writer.close()
        stands = await self._wait_until_it_stands()
        self._channel.send(Report({"stopped_cleanly": float(stands)}))
        if self._guard is not None and stands:
            await self._guard.dismiss()
        try:
            await self._driver.close()
        except PackageError as error:
            self._tell(error.message)
        if self._guard is not None and not stands:
            await self._guard.abandon()  # it tries once more
        return stands

    async def _wait_until_it_stands(self) -> bool:
        timer = DeadlineTimer()
        ticker = Ticker(CHECK_PERIOD_NS, monotonic_ns())
        give_up_ns = monotonic_ns() + STAND_LIMIT_NS
        while not self._stands() and monotonic_ns() < give_up_ns:
            await timer.wait_until(ticker.next(monotonic_ns()))
            if not self._driver.stands(self._held_ns):
                self._driver.stop()
        timer.close()
        return self._stands()

    # The command path.

    def _on_commands(self) -> None:
        """Runs when the control process has written: requests in their order, then the newest motion, at once."""
        self._signal.clear()
        newest = None
        for seq, record in self._ring.since(self._seen):
            self._seen, newest = seq, record
            if self._serving and int(record["request_id"]) > self._request_id:
                self._request(record)
        if newest is not None and self._serving and self._writer.follow(int(newest["writer_pid"])):
            self._execute(newest)

    def _request(self, record: npt.NDArray[np.void]) -> None:
        if monotonic_ns() - int(record["issued_ns"]) > self._leash.limit_ns:
            return  # a later record carries it too, should anybody still want it
        self._request_id = int(record["request_id"])
        self._note_motion()
        self._write(lambda: self._driver.request(int(record["request"])))

    def _execute(self, record: npt.NDArray[np.void]) -> None:
        if not self._leash.offer(int(record["issued_ns"]), monotonic_ns()):
            self._late += 1
            return
        values = tuple(record["values"].tolist())
        self._told_to_move = any(values)
        if self._told_to_move:
            self._note_motion()
        if self._write(lambda: self._driver.command(values)):
            self._commands += 1
            written_ns, tick = monotonic_ns(), int(record["tick"])
            self._spans.add(Stage.ACT, tick, int(record["deadline_ns"]), written_ns)
            self._spans.add(Stage.WRITE, tick, int(record["issued_ns"]), written_ns)

    def _note_motion(self) -> None:
        was_at_rest, self._at_rest = self._at_rest, False
        self._moved_ns = monotonic_ns()
        if was_at_rest:
            self._reassure_guard()

    def _write(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except OSError:  # the driver's `run` says what became of the wire
            self._write_errors += 1
            return False
        except PackageError as error:
            self._fail(error)
            return False
        return True

    # Stopping.

    def _hold(self) -> None:
        """From now on the robot has to stand."""
        if not self._leash.held:
            self._checks_held = 0
        self._leash.held = True
        self._held_ns = monotonic_ns()
        self._driver.stop()
        if self._guard is not None:
            self._guard.quiet()

    def _stands(self) -> bool:
        """Whether the robot is known to stand and nothing since could have moved it."""
        if not self._at_rest and self._driver.stands(self._moved_ns + REACT_NS):
            self._at_rest = True
        return self._at_rest

    def _check(self, now_ns: int) -> None:
        """Every 20 ms, whatever the sensors and the commands do."""
        if self._leash.expired(now_ns):
            self._stops += 1
            age_ms, moving = (now_ns - self._leash.issued_ns) / NS_PER_MS, not self._stands()
            self._hold()
            if moving:
                self._tell(f"no command for {age_ms:.0f} ms: robot stopped")
        elif not self._leash.held:
            self._reassure_guard()
        elif not self._driver.stands(self._held_ns):
            self._checks_held += 1
            if self._checks_held <= URGENT_CHECKS or self._checks_held % PATIENT_CHECKS == 0:
                self._driver.stop()

    def _reassure_guard(self) -> None:
        """A robot that may be moving needs this process; one that stands does not."""
        if self._guard is not None:
            (self._guard.quiet if self._stands() else self._guard.beat)()

    async def _keep_watch(self) -> None:
        timer = DeadlineTimer()
        ticker = Ticker(CHECK_PERIOD_NS, monotonic_ns() + CHECK_PERIOD_NS)
        try:
            while True:
                await timer.wait_until(ticker.next(monotonic_ns()))
                self._check(monotonic_ns())
        finally:
            timer.close()

    def _on_writer_gone(self) -> None:
        gone = self._writer.pid
        self._on_commands()  # its last words
        if self._writer.pid != gone:
            return  # its successor commands already
        unexpected = not self._leash.held and self._told_to_move  # its last word is to stand, when all is well
        self._hold()
        if unexpected:
            self._tell("the process that commands the robot is gone: robot stopped")

    # The wire and its guard.

    def _begin_serving(self) -> None:
        """Only what is asked from here on is executed."""
        self._hold()
        for seq, record in self._ring.since(self._seen):
            self._seen, self._request_id = seq, max(self._request_id, int(record["request_id"]))
        self._serving = True

    async def _keep_driver(self) -> None:
        while True:
            try:
                await self._driver.run()
            except PackageError:
                raise
            except SafetyStop as loss:
                self._serving = False
                async with self._rewiring:
                    await self._reopen(loss)

    async def _reopen(self, loss: SafetyStop) -> None:
        """Wait for a lost wire to come back, stop the robot first thing, go on; else raise `loss`."""
        stood = self._stands()
        state = "the robot stood" if stood else MAY_BE_MOVING
        self._leash.held = True
        await self._drop_guard()
        self._tell(f"{loss.message}: {state}; trying to open it again")
        lost_ns = monotonic_ns()
        while monotonic_ns() - lost_ns < self._driver.reopen_limit_s * NS_PER_S:
            try:
                await self._open()
                break
            except StartError:
                await asyncio.sleep(REOPEN_PAUSE_S)
        else:
            raise SafetyStop(f"{loss.message}: {state}", loss.hint if stood else MAY_BE_MOVING_HINT)
        await self._start_guard()
        self._begin_serving()
        self._tell(f"{self._job.address} is back after {(monotonic_ns() - lost_ns) / NS_PER_S:.1f} s; robot stopped")

    async def _keep_guard(self) -> None:
        while True:
            await self._guard_ended.wait()
            self._guard_ended.clear()
            async with self._rewiring:
                if self._guard is None or self._guard.alive:
                    continue  # it was replaced together with the wire
                self._serving = False
                self._hold()
                await self._drop_guard()
                self._tell("the guard died: robot stopped until there is a new one")
                await self._start_guard()
                self._begin_serving()

    async def _start_guard(self) -> None:
        guarded = self._driver.guarded_wire()
        if guarded is not None:
            self._guard = await Guard.start(
                wire_fd=guarded[0],
                stop=guarded[1],
                limit_ms=self._job.safety.command_timeout_ms,
                on_end=self._guard_ended.set,
            )
            if self._job.realtime:
                raise_to("guard", self._guard.pid)

    async def _drop_guard(self) -> None:
        if self._guard is not None:
            await self._guard.abandon()
        self._guard = None

    async def _keep_reporting(self) -> None:
        packets, since_ns = 0.0, monotonic_ns()
        while True:
            await asyncio.sleep(1.0)
            counters, now_ns = self._driver.counters(), monotonic_ns()
            rate = (float(counters["packets"]) - packets) * NS_PER_S / (now_ns - since_ns)
            packets, since_ns = float(counters["packets"]), now_ns
            self._channel.send(
                Report(
                    {
                        **counters,
                        "packets_per_s": round(rate, 1),
                        "commands": float(self._commands),
                        "late_commands": float(self._late),
                        "stale_stops": float(self._stops),
                        "guard_stops": float(self._guard.stops if self._guard is not None else 0),
                        "command_errors": float(self._write_errors),
                    }
                )
            )
