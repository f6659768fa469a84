"""Child processes: the channel to each, and what the supervisor does when one fails, dies or does not listen."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
from collections.abc import Callable, Coroutine
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest

from relod.errors import EXIT_BUG, EXIT_SAFETY, RelodError, SafetyStop, StartError
from relod.runtime.channel import Channel, Event, Finish, Ready, Report, Tell, readable
from relod.runtime.clock import NS_PER_S, monotonic_ns
from relod.runtime.processes import Child, Supervisor

# -- channel -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ends():
    left, right = Channel.pair()
    yield left, right
    left.close()
    right.close()


def test_messages_go_both_ways_and_keep_their_order(ends):
    left, right = ends
    sent = [Ready({"port": "x"}), Report({"a": 1.0, "b": "text"}), Event("hello")]
    assert all(left.send(message) for message in sent)
    assert right.pending() == sent
    assert right.receive() is None
    assert right.send(Finish("enough"))
    assert left.receive() == Finish("enough")


def test_an_end_that_is_gone_is_eof_after_what_it_said(ends):
    left, right = ends
    left.send(Event("last words"))
    left.close()
    assert right.pending() == [Event("last words")]
    with pytest.raises(EOFError):
        right.pending()
    with pytest.raises(EOFError):
        right.receive()
    assert not right.send(Event("nobody hears"))


def test_sending_to_an_end_that_does_not_read_says_so_and_never_blocks(ends):
    left, _right = ends
    sent = 0
    while left.send(Event("x" * 1000)):
        sent += 1
        assert sent < 100_000
    assert not left.send(Event("x" * 1000))


def test_a_child_waits_until_it_is_asked_to_finish_and_hears_what_it_is_told(ends):
    left, right = ends
    told: list[str] = []

    async def child() -> str:
        return await right.finished(told.append)

    async def main() -> str:
        waiting = asyncio.create_task(child())
        for message in (Tell("begin"), Report({"ignored": 1.0}), Tell("more"), Finish("time is up")):
            left.send(message)
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            return await waiting

    assert asyncio.run(main()) == "time is up"
    assert told == ["begin", "more"]


def test_a_child_finishes_when_its_parent_is_gone(ends):
    left, right = ends
    left.close()
    assert asyncio.run(right.finished()) == "the parent process is gone"


def test_a_channel_only_travels_into_a_process_that_is_being_spawned(ends):
    with pytest.raises((RuntimeError, TypeError, pickle.PicklingError)):
        pickle.dumps(ends[0])
    assert ForkingPickler.dumps(ends[1]) is not None


def test_two_may_wait_for_one_end(ends):
    left, right = ends

    async def main() -> None:
        first, second = (asyncio.create_task(readable(right)) for _ in range(2))
        await asyncio.sleep(0)
        left.send(Event("x"))
        async with asyncio.timeout(5):
            await first
            await second

    asyncio.run(main())


# -- supervisor --------------------------------------------------------------------------------------------------------


class House:
    """A supervisor and what it was told."""

    def __init__(self, folder: Path, max_restarts: int = 2) -> None:
        self.log = folder / "children.log"
        self.events: list[tuple[str, str]] = []
        self.reports: list[tuple[str, dict[str, float | str]]] = []
        self.restarted: list[str] = []
        self.done: list[str] = []
        self.supervisor = Supervisor(
            log_path=self.log,
            max_restarts=max_restarts,
            on_event=lambda name, text: self.events.append((name, text)),
            on_report=lambda name, values: self.reports.append((name, values)),
            on_restart=self.restarted.append,
            on_done=self.done.append,
        )

    def start(self, body: str, job: object = None, *, restart: bool = False) -> Child:
        """A child named after its body; `job` may be a function that makes one for each start."""
        make = job if callable(job) else lambda: job
        return self.supervisor.start(body, f"children:{body}", make, restart=restart)

    async def ready(self, body: str, job: object = None, *, restart: bool = False) -> Child:
        child = self.start(body, job, restart=restart)
        await self.supervisor.wait_ready(child, 20.0)
        return child

    async def ended(self) -> None:
        """End whatever is left."""
        for name in list(self.supervisor.children):
            await self.supervisor.stop(name, limit_s=5.0)
        self.supervisor.close()


def house(folder: Path, body: Callable[[House], Coroutine[Any, Any, None]], max_restarts: int = 2) -> House:
    """Run `body` in a house and end all its children."""
    made: list[House] = []

    async def main() -> None:
        made.append(House(folder, max_restarts))
        try:
            async with asyncio.timeout(30):
                await body(made[0])
        finally:
            await made[0].ended()
            assert not any(child.alive for child in made[0].supervisor.children.values())

    asyncio.run(main())
    return made[0]


async def until(condition: Callable[[], object], limit_s: float = 10.0) -> None:
    """Let the loop turn until something is so."""
    deadline_ns = monotonic_ns() + int(limit_s * NS_PER_S)
    while not condition():
        assert monotonic_ns() < deadline_ns, "never so"
        await asyncio.sleep(0.005)


def kill(child: Child, number: signal.Signals = signal.SIGKILL) -> None:
    assert child.process is not None
    assert child.process.pid is not None
    os.kill(child.process.pid, number)


@pytest.mark.slow
def test_a_child_works_until_it_is_asked_to_finish(tmp_path):
    async def body(house: House) -> None:
        child = await house.ready("obedient", 42)
        assert child.info["job"] == "42"
        assert child.process is not None
        assert child.info["pid"] == str(child.process.pid)
        async with house.supervisor.watching():
            house.supervisor.tell("obedient", "begin")
            house.supervisor.tell("nobody", "hello")
            await until(lambda: house.events)
            assert 0.0 < house.supervisor.cpu_seconds()["obedient"] < 10.0
            await house.supervisor.stop("obedient", "enough")
            await until(lambda: len(house.events) == 2)
        assert not child.alive
        assert child.process.exitcode == 0

    told = house(tmp_path, body)
    assert told.events == [("obedient", "told begin"), ("obedient", "finished: enough")]
    assert told.reports == [("obedient", {"value": 1.5, "name": "x"})]
    assert (told.done, told.restarted, told.supervisor.failure) == ([], [], None)


@pytest.mark.slow
@pytest.mark.parametrize("restart", [False, True])
def test_an_error_that_a_child_reports_ends_the_start_with_that_error(tmp_path, restart):
    async def body(house: House) -> None:
        child = house.start("refusing", "/dev/ttyUSB9", restart=restart)
        with pytest.raises(StartError) as caught:
            await house.supervisor.wait_ready(child)
        assert (caught.value.message, caught.value.hint) == ("no robot at /dev/ttyUSB9", "plug it in")

    house(tmp_path, body)


@pytest.mark.slow
def test_a_defect_in_a_child_ends_the_start_and_its_trace_is_in_the_log(tmp_path):
    async def body(house: House) -> None:
        child = house.start("defective")
        with pytest.raises(RelodError, match="defective process: ZeroDivisionError") as caught:
            await house.supervisor.wait_ready(child)
        assert caught.value.exit_code == EXIT_BUG
        assert str(house.log) in caught.value.hint

    assert "Traceback" in house(tmp_path, body).log.read_text()


@pytest.mark.slow
def test_an_error_too_large_for_a_message_is_cut(tmp_path):
    async def body(house: House) -> None:
        child = house.start("verbose")
        with pytest.raises(RelodError, match="ValueError") as caught:
            await house.supervisor.wait_ready(child)
        assert len(caught.value.message) < 3000

    house(tmp_path, body)


@pytest.mark.slow
def test_a_child_that_dies_at_its_start_says_how(tmp_path):
    async def body(house: House) -> None:
        with pytest.raises(StartError, match="at its start the sudden process ended with exit code 7"):
            await house.supervisor.wait_ready(house.start("sudden"))

    house(tmp_path, body)


@pytest.mark.slow
def test_a_child_that_never_reports_ready_is_not_waited_for_for_ever(tmp_path):
    async def body(house: House) -> None:
        with pytest.raises(StartError, match="the mute process was not ready after 1 s"):
            await house.supervisor.wait_ready(house.start("mute"), 1.0)

    house(tmp_path, body)


@pytest.mark.slow
def test_a_child_that_was_killed_is_started_again_and_told_of(tmp_path):
    starts: list[int] = []

    def job() -> int:
        starts.append(len(starts) + 1)
        return starts[-1]

    async def body(house: House) -> None:
        child = await house.ready("obedient", job, restart=True)
        async with house.supervisor.watching():
            kill(child)
            await until(lambda: house.restarted)
            await house.supervisor.wait_ready(child, 20.0)
            assert child.info["job"] == "2"  # each start gets a job of its own
            house.supervisor.tell("obedient", "hello")
            await until(lambda: ("obedient", "told hello") in house.events)

    told = house(tmp_path, body)
    assert told.events[0] == ("obedient", "the obedient process was killed by SIGKILL; starting it again")
    assert (told.restarted, starts, told.supervisor.failure) == (["obedient"], [1, 2], None)


@pytest.mark.slow
def test_a_child_that_dies_too_often_ends_the_run(tmp_path):
    async def body(house: House) -> None:
        child = house.start("sudden", restart=True)
        async with house.supervisor.watching():
            await asyncio.wait_for(house.supervisor.failed.wait(), 20)
        assert child.starts == 2

    told = house(tmp_path, body, max_restarts=1)
    assert told.restarted == ["sudden"]
    assert "ended with exit code 7" in str(told.supervisor.failure)


@pytest.mark.slow
def test_a_defect_may_be_mended_by_a_restart(tmp_path):
    starts: list[int] = []

    def job() -> int:
        starts.append(1)
        return len(starts)

    async def body(house: House) -> None:
        await house.ready("failing_then_well", job, restart=True)
        async with house.supervisor.watching():
            await until(lambda: house.restarted)
            child = house.supervisor.children["failing_then_well"]
            await house.supervisor.wait_ready(child, 20.0)

    told = house(tmp_path, body)
    assert "RuntimeError('once')" in told.events[0][1]
    assert told.supervisor.failure is None


@pytest.mark.slow
def test_a_reported_error_is_not_mended_by_a_restart(tmp_path):
    async def body(house: House) -> None:
        house.start("refusing", "there", restart=True)
        async with house.supervisor.watching():
            await asyncio.wait_for(house.supervisor.failed.wait(), 20)

    told = house(tmp_path, body)
    assert isinstance(told.supervisor.failure, StartError)
    assert told.restarted == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_child_that_may_not_restart_ends_the_run_and_the_failure_names_it_and_the_signal(tmp_path, number):
    async def body(house: House) -> None:
        child = await house.ready("obedient")
        async with house.supervisor.watching():
            kill(child, number)
            await asyncio.wait_for(house.supervisor.failed.wait(), 10)

    failure = house(tmp_path, body).supervisor.failure
    assert isinstance(failure, SafetyStop)
    assert failure.exit_code == EXIT_SAFETY
    assert f"the obedient process was killed by {number.name}; the run was ended" in failure.message


@pytest.mark.slow
def test_a_child_whose_work_is_done_is_no_failure(tmp_path):
    async def body(house: House) -> None:
        await house.ready("brief")
        async with house.supervisor.watching():
            await until(lambda: house.done)

    told = house(tmp_path, body)
    assert (told.done, told.restarted, told.supervisor.failure) == (["brief"], [], None)


@pytest.mark.slow
def test_a_child_that_is_to_live_and_ends_in_good_order_is_started_again(tmp_path):
    """Somebody else told it to end: a worker is no worker's work done."""

    async def body(house: House) -> None:
        await house.ready("brief", restart=True)
        async with house.supervisor.watching():
            await until(lambda: house.restarted)

    told = house(tmp_path, body)
    assert told.restarted[0] == "brief"
    assert told.done == []


@pytest.mark.slow
@pytest.mark.parametrize(("job", "ended_by"), [("polite", signal.SIGTERM), ("stubborn", signal.SIGKILL)])
def test_stop_asks_then_terminates_then_kills(tmp_path, monkeypatch, job, ended_by):
    monkeypatch.setattr("relod.runtime.processes.KILL_LIMIT_S", 0.2)

    async def body(house: House) -> None:
        child = await house.ready("deaf", job, restart=True)
        async with house.supervisor.watching():
            await house.supervisor.stop("deaf", limit_s=0.1)
        assert child.process is not None
        assert child.process.exitcode == -ended_by

    told = house(tmp_path, body)
    assert (told.restarted, told.done, told.supervisor.failure) == ([], [], None)


@pytest.mark.slow
def test_ctrl_c_in_the_terminal_is_the_parents_business(tmp_path):
    async def body(house: House) -> None:
        child = await house.ready("obedient")
        kill(child, signal.SIGINT)
        kill(child, signal.SIGHUP)
        async with house.supervisor.watching():
            house.supervisor.tell("obedient", "still there")
            await until(lambda: ("obedient", "told still there") in house.events)

    assert house(tmp_path, body).supervisor.failure is None


@pytest.mark.slow
def test_what_children_print_goes_to_the_log(tmp_path, capfd):
    async def body(house: House) -> None:
        await house.ready("loud")

    told = house(tmp_path, body)
    assert told.log.read_text().splitlines() == ["from the descriptor", "from python"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_stopping_what_never_ran_or_has_ended_is_nothing(tmp_path):
    async def body(house: House) -> None:
        await house.supervisor.stop("nobody")
        await house.ready("brief")
        with suppress(TimeoutError):
            await until(lambda: not house.supervisor.children["brief"].alive)
        await house.supervisor.stop("brief")
        await house.supervisor.stop("brief")

    house(tmp_path, body)
