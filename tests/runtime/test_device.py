"""The device process's loop around a fake driver, in this process; whole processes are tried in test_check.py."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relod.config import SafetySettings, Section
from relod.errors import SafetyStop, StartError
from relod.runtime import device
from relod.runtime.channel import Channel, Event, Finish, Ready, Report
from relod.runtime.clock import NS_PER_MS, monotonic_ns
from relod.runtime.commands import CommandRing, Leash
from relod.runtime.device import DeviceJob
from relod.runtime.shared import SensorRing
from relod.runtime.spans import SpanRing, Stage

TIMEOUT_MS = 150.0
STILL_NS = 15 * NS_PER_MS


class FakeDriver:
    """A robot of one joint that does at once what it is told."""

    sensor_names = ("speed", "connection_epoch")
    command_names = ("speed",)
    newest: FakeDriver  # the one made last
    deaf = False  # whether what is written gets lost
    openings = 0

    def __init__(
        self,
        address: str,
        settings: Section,
        publish: Callable[[int, Sequence[float]], object],
        on_event: Callable[[str], object],
    ) -> None:
        FakeDriver.newest = self
        self.reopen_limit_s = 0.5
        self.connection_epoch = 0
        self.publish, self.on_event = publish, on_event
        self.log: list[object] = []
        self.speed = 0.0
        self.changed_ns = 0
        self.lost = asyncio.Event()
        self.refuse_to_open = False
        self.wire: int | None = None
        self.is_open = False

    async def open(self) -> None:
        if self.refuse_to_open:
            raise StartError("there is no port")
        self.is_open = True
        self.connection_epoch += 1
        self.lost.clear()
        self.log.append("open")
        self.tell()

    def tell(self) -> None:
        self.publish(monotonic_ns(), (self.speed, self.connection_epoch))

    async def run(self) -> None:
        await self.lost.wait()
        self.is_open = False
        raise SafetyStop("the wire was lost")

    def set(self, speed: float) -> None:
        if not self.is_open:
            raise OSError("no wire")
        if not self.deaf:
            self.speed, self.changed_ns = speed, monotonic_ns()

    def command(self, values: tuple[float, ...]) -> None:
        self.log.append(values[0])
        self.set(values[0])

    def request(self, request: int) -> None:
        self.log.append(f"request {request}")

    def stop(self) -> None:
        if self.is_open:
            self.log.append("stop")
            self.set(0.0)

    async def close(self) -> None:
        self.is_open = False
        self.log.append("close")

    def guarded_wire(self) -> tuple[int, bytes] | None:
        return None if self.wire is None else (self.wire, b"!")

    def stands(self, after_ns: int) -> bool:
        still_ns = monotonic_ns() - max(after_ns, self.changed_ns)
        return self.is_open and self.speed == 0.0 and still_ns > STILL_NS

    def counters(self) -> dict[str, float | str]:
        return {"packets": 0.0}


class Bench:
    """The device loop as a task, the parent's end of its channel, and a control process's end of its ring."""

    def __init__(self) -> None:
        self.channel, self.theirs = Channel.pair()
        self.job = DeviceJob(
            driver=f"{__name__}:FakeDriver",
            address="fake",
            settings=Section(),
            safety=SafetySettings(command_timeout_ms=TIMEOUT_MS),
            sensors=SensorRing(FakeDriver.sensor_names),
            commands=CommandRing(1),
            spans=SpanRing(("device",)),
        )
        self.job.commands.take_over()
        self.messages: list[object] = []
        self.ticks = 0

    async def start(self) -> None:
        self.task = asyncio.create_task(device._Device(self.theirs, self.job).run())
        await self.until(lambda: Ready({"address": "fake"}) in self.messages)
        self.driver.log.clear()

    @property
    def driver(self) -> FakeDriver:
        return FakeDriver.newest

    @property
    def events(self) -> list[str]:
        return [message.text for message in self.messages if isinstance(message, Event)]

    def listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            self.messages += self.channel.pending()

    async def until(self, what: Callable[[], bool], limit_s: float = 1.5) -> None:
        async with asyncio.timeout(limit_s):
            while True:
                self.listen()
                if what():
                    return
                if self.task.done():
                    self.task.result()
                await asyncio.sleep(0.002)

    def command(self, speed: float, request: int = 0, request_id: int = 0, age_ms: float = 0.0) -> None:
        self.ticks += 1
        now_ns = monotonic_ns() - int(age_ms * NS_PER_MS)
        self.job.commands.publish(
            tick=self.ticks,
            deadline_ns=now_ns - NS_PER_MS,
            issued_ns=now_ns,
            values=(speed,),
            request=request,
            request_id=request_id,
        )

    async def end(self) -> None:
        self.channel.send(Finish("the test is over"))
        await asyncio.wait_for(self.task, 2.0)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.channel.close()
    made.theirs.close()


def on_bench(bench: Bench, body: Callable[[Bench], Awaitable[None]]) -> None:
    """Run `body` beside a started device loop and see it end in good order if it has not ended."""

    async def main() -> None:
        await bench.start()
        await body(bench)
        if not bench.task.done():
            await bench.end()
        bench.listen()
        assert bench.driver.log[-1] == "close"

    asyncio.run(main())


def test_a_command_is_executed_at_once_and_measured(bench: Bench) -> None:
    async def body(bench: Bench) -> None:
        before_ns = monotonic_ns()
        bench.command(0.5)
        await bench.until(lambda: 0.5 in bench.driver.log)
        act, write = bench.job.spans.drain("device")
        assert (act["stage"], write["stage"]) == (Stage.ACT, Stage.WRITE)
        assert act["index"] == write["index"] == 1
        assert before_ns - NS_PER_MS <= act["start_ns"] < act["end_ns"]
        assert before_ns < write["end_ns"] == act["end_ns"]

    on_bench(bench, body)
    assert Report({"stopped_cleanly": 1.0}) in bench.messages
    assert bench.driver.speed == 0.0


def test_only_the_newest_motion_but_every_request_is_executed(bench: Bench) -> None:
    async def body(bench: Bench) -> None:
        bench.command(0.1, request=3, request_id=1)
        bench.command(0.2)
        bench.command(0.3, request=4, request_id=2)
        bench.command(0.4)
        await bench.until(lambda: 0.4 in bench.driver.log)
        bench.command(0.5)
        await bench.until(lambda: 0.5 in bench.driver.log)
        assert bench.driver.log == ["request 3", "request 4", 0.4, 0.5]

    on_bench(bench, body)


def test_a_request_survives_being_overwritten(bench: Bench) -> None:
    async def body(bench: Bench) -> None:
        bench.command(0.0, request=7, request_id=1)
        for _ in range(2 * bench.job.commands.ring.capacity):
            bench.command(0.0)
        await bench.until(lambda: 0.0 in bench.driver.log)
        assert bench.driver.log == ["request 7", 0.0]

    on_bench(bench, body)


def test_silence_stops_the_robot(bench: Bench) -> None:
    async def body(bench: Bench) -> None:
        bench.command(0.5)
        await bench.until(lambda: 0.5 in bench.driver.log)
        moving_ns = bench.driver.changed_ns
        await bench.until(lambda: "stop" in bench.driver.log)
        assert TIMEOUT_MS <= (bench.driver.changed_ns - moving_ns) / NS_PER_MS < TIMEOUT_MS + 100
        await bench.until(lambda: any("no command for" in event for event in bench.events))
        bench.command(0.6)
        await bench.until(lambda: 0.6 in bench.driver.log)

    on_bench(bench, body)


def test_a_late_command_is_not_executed(bench: Bench) -> None:
    async def body(bench: Bench) -> None:
        bench.command(0.5, request=3, request_id=1, age_ms=TIMEOUT_MS + 20)
        await asyncio.sleep(0.02)
        assert 0.5 not in bench.driver.log
        bench.command(0.1)  # carries the request still
        await bench.until(lambda: 0.1 in bench.driver.log)
        assert bench.driver.log[-2:] == ["request 3", 0.1]

    on_bench(bench, body)


def test_a_lost_stop_is_repeated(bench: Bench) -> None:
    async def body(bench: Bench) -> None:
        bench.command(0.5)
        await bench.until(lambda: 0.5 in bench.driver.log)
        bench.driver.deaf = True
        await bench.until(lambda: bench.driver.log.count("stop") > 3)
        assert bench.driver.speed == 0.5
        bench.driver.deaf = False
        await bench.until(lambda: bench.driver.speed == 0.0)
        await asyncio.sleep(0.05)
        count = bench.driver.log.count("stop")
        await asyncio.sleep(0.1)
        assert bench.driver.log.count("stop") == count

    on_bench(bench, body)


def test_commands_from_before_its_start_are_not_executed(bench: Bench) -> None:
    bench.command(0.5, request=3, request_id=1)

    async def main() -> None:
        await bench.start()
        await asyncio.sleep(0.03)
        assert bench.driver.speed == 0.0
        assert "request 3" not in bench.driver.log
        bench.command(0.2, request=3, request_id=2)
        await bench.until(lambda: bench.driver.log[-2:] == ["request 3", 0.2])
        await bench.end()

    asyncio.run(main())


def test_the_death_of_the_commanding_process_is_noticed_without_waiting(bench: Bench) -> None:
    sleeper = subprocess.Popen(["sleep", "60"])

    async def body(bench: Bench) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "getpid", lambda: sleeper.pid)
            bench.command(0.5)
        await bench.until(lambda: 0.5 in bench.driver.log)
        killed_ns = monotonic_ns()
        sleeper.kill()
        await bench.until(lambda: bench.driver.speed == 0.0)
        assert (bench.driver.changed_ns - killed_ns) / NS_PER_MS < TIMEOUT_MS / 2
        sleeper.wait()
        await bench.until(lambda: any("is gone" in event for event in bench.events))
        bench.command(0.3)  # its successor
        await bench.until(lambda: 0.3 in bench.driver.log)

    on_bench(bench, body)


def test_a_dead_parent_ends_it(bench: Bench) -> None:
    async def body(bench: Bench) -> None:
        bench.command(0.5)
        await bench.until(lambda: 0.5 in bench.driver.log)
        bench.channel.close()
        await asyncio.wait_for(bench.task, 1.0)
        assert bench.driver.speed == 0.0

    on_bench(bench, body)


def test_sigterm_ends_it_with_143(bench: Bench) -> None:

    async def main() -> None:
        await bench.start()
        bench.command(0.5)
        await bench.until(lambda: 0.5 in bench.driver.log)
        os.kill(os.getpid(), signal.SIGTERM)
        await bench.task

    with pytest.raises(SystemExit) as caught:
        asyncio.run(main())
    assert caught.value.code == 143
    assert bench.driver.speed == 0.0
    assert bench.driver.log[-1] == "close"


def test_a_robot_that_does_not_stop_is_said_to_move(bench: Bench) -> None:

    async def main() -> None:
        await bench.start()
        bench.command(0.5)
        await bench.until(lambda: 0.5 in bench.driver.log)
        bench.driver.deaf = True
        await bench.end()

    with pytest.raises(SafetyStop, match="ROBOT MAY BE MOVING"):
        asyncio.run(main())
    bench.listen()
    assert Report({"stopped_cleanly": 0.0}) in bench.messages


def test_a_robot_that_never_moved_need_not_prove_it(bench: Bench) -> None:
    async def body(bench: Bench) -> None:
        bench.driver.deaf = True
        bench.driver.speed = 0.1  # noise on a sensor
        await bench.end()

    on_bench(bench, body)


def test_a_lost_wire_is_opened_again_standing(bench: Bench) -> None:
    async def body(bench: Bench) -> None:
        bench.command(0.5)
        await bench.until(lambda: 0.5 in bench.driver.log)
        bench.driver.refuse_to_open = True
        bench.driver.lost.set()
        await bench.until(lambda: any("ROBOT MAY BE MOVING" in event for event in bench.events))
        bench.command(0.7)
        bench.driver.refuse_to_open = False
        await bench.until(lambda: any("is back" in event for event in bench.events))
        assert bench.driver.log[1:3] == ["open", "stop"]
        assert 0.7 not in bench.driver.log
        assert bench.job.sensors.window(1).newest("connection_epoch") == 2
        bench.command(0.8)
        await bench.until(lambda: 0.8 in bench.driver.log)

    on_bench(bench, body)


def test_a_wire_lost_for_good_is_a_safety_stop(bench: Bench) -> None:

    async def main() -> None:
        await bench.start()
        bench.command(0.5)
        await bench.until(lambda: 0.5 in bench.driver.log)
        bench.driver.reopen_limit_s = 0.15
        bench.driver.refuse_to_open = True
        bench.driver.lost.set()
        await bench.task

    with pytest.raises(SafetyStop, match="ROBOT MAY BE MOVING"):
        asyncio.run(main())


def test_the_epoch_goes_on_over_processes(bench: Bench) -> None:
    bench.job.sensors.ring.take_over()
    bench.job.sensors.publish(monotonic_ns(), (0.0, 5.0))

    async def main() -> None:
        await bench.start()
        assert bench.job.sensors.window(1).newest("connection_epoch") == 6
        await bench.end()

    asyncio.run(main())


def test_a_robot_that_cannot_be_opened(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(self: FakeDriver) -> None:
        raise StartError("there is no port")

    monkeypatch.setattr(FakeDriver, "open", fail)
    with pytest.raises(StartError, match="there is no port"):
        asyncio.run(device._Device(bench.theirs, bench.job).run())


def test_a_dead_guard_is_replaced_with_the_robot_standing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    made = FakeDriver.__init__

    def with_wire(self: FakeDriver, *arguments: object) -> None:
        made(self, *arguments)  # type: ignore[arg-type]
        self.wire = write_end

    monkeypatch.setattr(FakeDriver, "__init__", with_wire)

    async def main() -> None:
        await bench.start()
        device_loop = bench.task.get_coro().cr_frame.f_locals["self"]  # type: ignore[union-attr]
        bench.command(0.5)
        await bench.until(lambda: 0.5 in bench.driver.log)
        first_pid = device_loop._guard.pid
        os.kill(first_pid, signal.SIGKILL)
        await bench.until(lambda: any("guard died" in event for event in bench.events))
        assert "stop" in bench.driver.log
        await bench.until(lambda: device_loop._guard is not None and device_loop._serving)
        assert device_loop._guard.pid != first_pid
        bench.command(0.6)
        await bench.until(lambda: 0.6 in bench.driver.log)
        await bench.end()

    asyncio.run(main())
    os.set_blocking(read_end, False)
    with pytest.raises(BlockingIOError):
        os.read(read_end, 1)  # the guards were dismissed, they did not stop anything
    os.close(read_end)
    os.close(write_end)


# The pure parts.


def test_a_new_writer_goes_on_counting_requests() -> None:
    ring = CommandRing(1)
    ring.take_over()
    ring.publish(tick=1, deadline_ns=0, issued_ns=0, values=(0.0,), request=3, request_id=1)
    ring.publish(tick=2, deadline_ns=0, issued_ns=0, values=(0.0,), request=0, request_id=1)
    ring.take_over()
    ring.publish(tick=1, deadline_ns=0, issued_ns=0, values=(0.0,))
    newest = ring.ring.newest()
    assert newest is not None
    assert (newest[1]["request"], newest[1]["request_id"]) == (3, 1)
    ring.publish(tick=2, deadline_ns=0, issued_ns=0, values=(0.0,), request=4, request_id=1)
    newest = ring.ring.newest()
    assert newest is not None
    assert (newest[1]["request"], newest[1]["request_id"]) == (4, 2)


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400), st.booleans()), max_size=30))
def test_a_loose_leash_always_has_a_fresh_command(moves: list[tuple[int, int, bool]]) -> None:
    leash, now_ms = Leash(200), 1000
    assert leash.held
    for pause_ms, age_ms, is_command in moves:
        now_ms += pause_ms
        if is_command:
            assert leash.offer(now_ms - age_ms, now_ms) == (age_ms <= 200)
        elif leash.expired(now_ms):
            leash.held = True
        if not leash.held and not leash.expired(now_ms):
            assert now_ms - leash.issued_ns <= 200


def test_the_job_travels_into_a_spawned_process(bench: Bench) -> None:
    with contextlib.suppress(RuntimeError):  # descriptors are handed over only while a process is being spawned
        pickle.dumps(bench.job)
    process = multiprocessing.get_context("spawn").Process(target=_publish_one, args=(bench.job.commands,))
    process.start()
    process.join(20)
    newest = bench.job.commands.ring.newest()
    assert newest is not None
    assert newest[1]["values"].tolist() == [0.25]
    assert newest[1]["writer_pid"] == process.pid
    assert bench.job.commands.signal.clear() == 1


def _publish_one(commands: CommandRing) -> None:
    commands.take_over()
    commands.publish(tick=1, deadline_ns=0, issued_ns=0, values=(0.25,))
