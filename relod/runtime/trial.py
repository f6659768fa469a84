"""One device process on trial: drive the robot through it, let something die, see when the wheels stand.

Used to commission a robot (`check.py`) and to measure stopping (`benchmarks/stopping.py`). Everything is as in a
run: the same process, ring, channel and guard. What the robot did is seen in its own sensors.
"""

from __future__ import annotations

import contextlib
import enum
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..config import SafetySettings, Section
from ..errors import RelodError, SafetyStop, StartError, error_with_code
from ..types import NO_REQUEST, SensorWindow
from .channel import Channel, Event, Failed, Finish, Ready
from .clock import NS_PER_MS, NS_PER_S, monotonic_ns, sleep_s, sleep_until
from .device import TARGET, CommandRing, DeviceJob
from .processes import child_main
from .shared import SensorRing
from .spans import SpanRing

__all__ = ["Commissioning", "Death", "DeviceTrial", "TrialPlan"]

CYCLE_NS = 45 * NS_PER_MS
POLL_S = 0.005
START_LIMIT_S = 30.0
END_LIMIT_S = 3.0
STILL_PACKETS = 8  # in a row, without motion: it stands
STILL_AT_END = 3  # as many are enough of an orderly end
SILENCE_NS = 100 * NS_PER_MS
OBSERVE_LIMIT_NS = 2 * NS_PER_S
SPIN_UP_S = 0.8  # from standing to full speed, and the encoders have seen it
RING_CAPACITY = 1024  # packets: 15 s of the Create 2's

Packet = tuple[int, Sequence[float]]  # arrived_ns, values in the order of the driver's sensor names


class Listener(Protocol):
    """Hears what the robot sends without the device process."""

    def packets(self) -> list[Packet]:
        """Packets since the last call."""
        ...

    def close(self) -> None:
        """Let the wire go."""
        ...


class Commissioning(Protocol):
    """What commissioning has to know about a robot."""

    sensor_names: tuple[str, ...]
    command_names: tuple[str, ...]
    take_control: int  # the request after which the robot moves although its wheels hang in the air
    question: str  # for whoever has to make sure that it may move
    motions: tuple[tuple[str, tuple[float, ...]], ...]  # (name, command): each part of the robot by itself
    cruise: tuple[float, ...]  # command from which stopping is measured

    def rows(self, window: SensorWindow) -> list[tuple[str, str, str]]:
        """The newest sensors for people: name, value, unit."""
        ...

    def summary(self, window: SensorWindow) -> str:
        """Battery and mode, in a line."""
        ...

    def speeds(self, window: SensorWindow) -> tuple[float, ...]:
        """Speeds over the window, measured by encoders, each as the command value of the same place."""
        ...

    def moved(self, before: Sequence[float], after: Sequence[float]) -> bool:
        """Whether the robot moved, or was told to, between two packets."""
        ...

    def listen(self, address: str) -> Listener:
        """Open the wire for reading only, beside the process that owns it."""
        ...


class Death(enum.Enum):
    """What ends the robot's control; nothing moves from one to another."""

    COMMANDS_STOP = "control process hangs: commands stop coming"
    CONTROL_KILLED = "control process killed (SIGKILL)"
    PARENT_GONE = "parent process gone"
    DEVICE_TERMINATED = "device process terminated (SIGTERM)"
    DEVICE_KILLED = "device process killed (SIGKILL)"
    DEVICE_HANGS = "device process hangs (SIGSTOP)"

    @property
    def by_timeout(self) -> bool:
        """Whether it is only noticed by silence."""
        return self in (Death.COMMANDS_STOP, Death.DEVICE_HANGS)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialPlan:
    """The robot and how it is driven."""

    driver: str  # "module:attribute", as in `DeviceJob`
    address: str
    settings: Section
    safety: SafetySettings
    robot: Commissioning
    log_path: Path  # of the processes' own output


class DeviceTrial:
    """A running device process; a context manager that ends it whatever happened.

    Raises:
        StartError, SafetyStop: what the device process reported.
    """

    def __init__(self, plan: TrialPlan) -> None:
        self.plan = plan
        self.events: list[str] = []
        self.sensors = SensorRing(plan.robot.sensor_names, RING_CAPACITY)
        self._commands = CommandRing(len(plan.robot.command_names))
        self._commands.take_over()
        self._context = multiprocessing.get_context("spawn")
        self._ready = False
        self._tick = self._requests = 0
        self.died_ns = 0  # when the death of `die` was caused
        self._next_ns = 0

    def __enter__(self) -> DeviceTrial:
        plan = self.plan
        self._channel, theirs = Channel.pair()
        job = DeviceJob(
            driver=plan.driver,
            address=plan.address,
            settings=plan.settings,
            safety=plan.safety,
            sensors=self.sensors,
            commands=self._commands,
            spans=SpanRing(("device",)),
        )
        self._process = self._context.Process(
            target=child_main, args=(TARGET, "device", theirs, str(plan.log_path), job), name="relod-device"
        )
        self._process.start()
        theirs.close()
        try:
            self._wait_ready()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def _wait_ready(self) -> None:
        deadline_ns = monotonic_ns() + int(START_LIMIT_S * NS_PER_S)
        while not self._ready:
            alive = self._process.is_alive()
            self.listen()
            if not alive and not self._ready:
                raise StartError("the device process died at its start", f"see {self.plan.log_path}")
            if monotonic_ns() > deadline_ns:
                raise StartError(f"the device process was not ready after {START_LIMIT_S:.0f} s")
            sleep_s(POLL_S)

    def listen(self) -> None:
        """Take in what the device process says; raises what it failed with."""
        try:
            messages = self._channel.pending()
        except (EOFError, OSError):
            return
        for message in messages:
            match message:
                case Ready():
                    self._ready = True
                case Event(text):
                    self.events.append(text)
                case Failed(code, text, hint):
                    raise error_with_code(code, text, hint)
                case _:
                    pass

    def command(self, values: Sequence[float], request: int = NO_REQUEST) -> None:
        """Publish one command now."""
        self._tick += 1
        self._requests += request != NO_REQUEST
        now_ns = monotonic_ns()
        self._commands.publish(
            tick=self._tick,
            deadline_ns=now_ns,
            issued_ns=now_ns,
            values=values,
            request=request,
            request_id=self._requests,
        )

    def keep_commanding(self, values: Sequence[float]) -> None:
        """Publish a command if a cycle has passed since the last."""
        if monotonic_ns() >= self._next_ns:
            self._next_ns = monotonic_ns() + CYCLE_NS
            self.command(values)

    def drive(self, values: Sequence[float], duration_s: float, request: int = NO_REQUEST) -> SensorWindow:
        """Command `values` once per cycle; returns the packets of the second half."""
        begin_ns = monotonic_ns()
        half_ns, end_ns = begin_ns + int(duration_s * NS_PER_S / 2), begin_ns + int(duration_s * NS_PER_S)
        half_seq = 0
        if request != NO_REQUEST:
            self.command(values, request)
        while (now_ns := monotonic_ns()) < end_ns:
            self.keep_commanding(values)
            self.listen()
            half_seq = half_seq or (self.sensors.ring.newest_seq if now_ns >= half_ns else 0)
            sleep_until(min(self._next_ns, end_ns))
        return self.sensors.window(max(2, self.sensors.ring.newest_seq - half_seq))

    def stop(self, duration_s: float = 0.5) -> None:
        """Command zeros for a while."""
        self.drive(tuple(0.0 for _ in self.plan.robot.command_names), duration_s)

    def die(self, death: Death, values: Sequence[float]) -> float | None:
        """Let `death` happen while the robot drives; ms until the sensors show it standing, None if they do not."""
        match death:
            case Death.COMMANDS_STOP:
                return self._fall_silent(values)
            case Death.CONTROL_KILLED:
                return self._lose_control(values)
            case Death.PARENT_GONE:
                return self._lose_parent(values)
            case Death.DEVICE_TERMINATED:
                died_ns = monotonic_ns()
                os.kill(self.pid, signal.SIGTERM)
                return self._observe_ring(died_ns, values)
            case Death.DEVICE_KILLED:
                return self._signal_unheard(signal.SIGKILL, values)
            case Death.DEVICE_HANGS:
                return self._signal_unheard(signal.SIGSTOP, values)

    def _fall_silent(self, values: Sequence[float]) -> float | None:
        self.command(values)
        return self._observe_ring(monotonic_ns(), None)

    def _lose_control(self, values: Sequence[float]) -> float | None:
        """Another process commands, and is killed."""
        controller = self._context.Process(target=_command_for_ever, args=(self._commands, tuple(values)))
        controller.start()
        begin_ns = monotonic_ns()
        while not self._commanded_by_another():
            if monotonic_ns() - begin_ns > START_LIMIT_S * NS_PER_S:
                raise StartError("the stand-in for the control process did not come up")
            self.keep_commanding(values)
            self.listen()
            sleep_s(POLL_S)
        sleep_s(SPIN_UP_S)
        died_ns = monotonic_ns()
        controller.kill()
        stopped_ms = self._observe_ring(died_ns, None)
        controller.join()
        self._commands.take_over()
        return stopped_ms

    def _commanded_by_another(self) -> bool:
        newest = self._commands.ring.newest()
        return newest is not None and int(newest[1]["writer_pid"]) != os.getpid()

    def _lose_parent(self, values: Sequence[float]) -> float | None:
        died_ns = monotonic_ns()
        self._channel.close()
        return self._observe_ring(died_ns, values)

    def _signal_unheard(self, number: signal.Signals, values: Sequence[float]) -> float | None:
        """After this the device process reads no more: listen on the wire ourselves."""
        listener = self.plan.robot.listen(self.plan.address)
        try:
            died_ns = monotonic_ns()
            os.kill(self.pid, number)
            return self._observe(died_ns, listener.packets, values)
        finally:
            listener.close()

    def _observe_ring(self, from_ns: int, values: Sequence[float] | None) -> float | None:
        seen = max(0, self.sensors.ring.newest_seq - 1)

        def packets() -> list[Packet]:
            nonlocal seen
            found = []
            for seq, record in self.sensors.ring.since(seen):
                seen = seq
                found.append((int(record["arrived_ns"]), record["values"].tolist()))
            return found

        return self._observe(from_ns, packets, values)

    def _observe(self, from_ns: int, packets: _Packets, values: Sequence[float] | None) -> float | None:
        """ms from `from_ns` to the last packet that shows motion, once some have shown none; goes on commanding
        `values` meanwhile, as a control process that still lives would."""
        before: Sequence[float] | None = None
        self.died_ns = last_motion_ns = heard_ns = from_ns
        still = 0
        while monotonic_ns() - from_ns < OBSERVE_LIMIT_NS and still < STILL_PACKETS:
            if values is not None:
                self.keep_commanding(values)
            if not self._process.is_alive() and monotonic_ns() - heard_ns > SILENCE_NS:
                break  # an orderly end switches the stream off as soon as it knows that the robot stands
            for arrived_ns, after in packets():
                heard_ns = arrived_ns
                if before is not None and self.plan.robot.moved(before, after):
                    last_motion_ns, still = max(last_motion_ns, arrived_ns), 0
                elif before is not None:
                    still += 1
                before = after
            sleep_s(POLL_S)
        return (last_motion_ns - from_ns) / NS_PER_MS if still >= STILL_AT_END else None

    def _end(self) -> None:
        """Ask, then SIGKILL; the guard stops the robot then."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)
        failure: RelodError | None = None
        try:
            with contextlib.suppress(OSError):
                self._channel.send(Finish())
            self._process.join(END_LIMIT_S)
            self.listen()
        except RelodError as error:
            failure = error
        finally:
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
            self._channel.close()
            self._process.close()
        if isinstance(failure, SafetyStop):
            raise failure


class _Packets(Protocol):
    def __call__(self) -> list[Packet]: ...


def _command_for_ever(commands: CommandRing, values: tuple[float, ...]) -> None:
    """A stand-in for the control process, in a process of its own."""
    commands.take_over()
    for tick, deadline_ns in enumerate(_grid()):
        sleep_until(deadline_ns)
        commands.publish(tick=tick, deadline_ns=deadline_ns, issued_ns=monotonic_ns(), values=values)


def _grid() -> Iterator[int]:
    deadline_ns = monotonic_ns()
    while True:
        yield deadline_ns
        deadline_ns += CYCLE_NS
