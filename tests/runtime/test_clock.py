"""Time: the grid of deadlines, virtual time, and deadlines awaited on both event loops."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from relod.runtime.clock import (
    NS_PER_MS,
    NS_PER_S,
    DeadlineTimer,
    Ticker,
    VirtualClock,
    WallClock,
    cpu_seconds_of,
    cpu_seconds_of_tree,
    monotonic_ns,
    sleep_s,
    sleep_until,
)

LOOPS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])


def test_a_ticker_that_is_served_in_time_gives_every_grid_point():
    ticker = Ticker(10, 100)
    assert [ticker.next(now_ns) for now_ns in (95, 101, 119, 120)] == [100, 110, 120, 130]
    assert (ticker.overruns, ticker.skipped) == (0, 0)


def test_after_an_overrun_it_goes_on_at_the_next_grid_point_and_counts():
    ticker = Ticker(10, 100)
    ticker.next(100)
    assert ticker.next(137) == 140  # 110, 120 and 130 have passed
    assert (ticker.overruns, ticker.skipped) == (1, 3)
    assert ticker.next(141) == 150
    assert (ticker.overruns, ticker.skipped) == (1, 3)


def test_the_first_deadline_is_served_even_when_it_has_passed():
    ticker = Ticker(10, 100)
    assert ticker.next(125) == 100
    assert (ticker.overruns, ticker.skipped) == (0, 0)


@given(
    period_ns=st.integers(1, 10**12),
    start_ns=st.integers(0, 2**62),
    delays_ns=st.lists(st.integers(0, 10**15), min_size=1, max_size=40),
)
def test_deadlines_stay_on_the_grid_rise_and_never_lie_in_the_past(period_ns, start_ns, delays_ns):
    ticker, now_ns, served = Ticker(period_ns, start_ns), start_ns, []
    for delay_ns in delays_ns:
        deadline_ns = ticker.next(now_ns)
        assert (deadline_ns - start_ns) % period_ns == 0
        assert now_ns <= deadline_ns < now_ns + period_ns or (served and deadline_ns == served[-1] + period_ns)
        assert not served or deadline_ns > served[-1]
        served.append(deadline_ns)
        now_ns = max(now_ns, deadline_ns) + delay_ns
    # Every grid point up to the last was either served or counted as skipped.
    assert (served[-1] - start_ns) // period_ns + 1 == len(served) + ticker.skipped


def test_a_ticker_needs_a_period():
    with pytest.raises(ValueError, match="period must be positive"):
        Ticker(0, 0)


def test_virtual_time_moves_when_told_and_never_back():
    clock = VirtualClock()
    assert clock.now_ns() == NS_PER_S
    clock.advance_to(NS_PER_S)
    clock.advance_to(NS_PER_S + 5)
    assert clock.now_ns() == NS_PER_S + 5
    with pytest.raises(ValueError, match="cannot go back"):
        clock.advance_to(NS_PER_S + 4)
    assert clock.now_ns() == NS_PER_S + 5


def test_wall_time_is_the_monotonic_clock():
    before_ns = monotonic_ns()
    assert before_ns <= WallClock().now_ns() <= monotonic_ns()


def test_a_thread_sleeps_until_its_deadline_and_not_for_one_that_has_passed():
    deadline_ns = monotonic_ns() + 2 * NS_PER_MS
    sleep_until(deadline_ns)
    assert monotonic_ns() >= deadline_ns
    sleep_until(0)
    before_ns = monotonic_ns()
    sleep_s(0.001)
    assert monotonic_ns() - before_ns >= NS_PER_MS


@pytest.fixture
def timer():
    timer = DeadlineTimer()
    yield timer
    timer.close()


@LOOPS
def test_a_timer_never_wakes_early(run, timer):
    async def main() -> list[int]:
        late_ns = []
        for number in range(20):
            deadline_ns = monotonic_ns() + 300_000 + number * 137_001
            await timer.wait_until(deadline_ns)
            late_ns.append(monotonic_ns() - deadline_ns)
        return late_ns

    assert min(run(main())) >= 0


@LOOPS
def test_a_deadline_that_has_passed_is_not_waited_for(run, timer):
    async def main() -> None:
        async with asyncio.timeout(5):
            await timer.wait_until(monotonic_ns() - 1)
            await timer.wait_until(0)

    run(main())


@LOOPS
def test_the_loop_goes_on_while_a_timer_waits(run, timer):
    async def main() -> int:
        waiting = asyncio.create_task(timer.wait_until(monotonic_ns() + 5 * NS_PER_MS))
        turns = 0
        while not waiting.done():
            await asyncio.sleep(0)
            turns += 1
        return turns

    assert run(main()) > 2


@LOOPS
@pytest.mark.parametrize("fired_meanwhile", [False, True])
def test_a_cancelled_wait_leaves_the_timer_usable(run, timer, fired_meanwhile):
    async def main() -> None:
        async with asyncio.timeout(5):
            first_ns = monotonic_ns() + (2 * NS_PER_MS if fired_meanwhile else 60 * NS_PER_S)
            waiting = asyncio.create_task(timer.wait_until(first_ns))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            if fired_meanwhile:
                sleep_until(first_ns)
            deadline_ns = monotonic_ns() + 3 * NS_PER_MS
            await timer.wait_until(deadline_ns)
            assert monotonic_ns() >= deadline_ns

    run(main())


# -- processor time ----------------------------------------------------------------------------------------------------

BUSY = "import time\nwhile time.process_time() < {}: pass\n"
PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "-c", {ended!r}])
subprocess.Popen([sys.executable, "-c", {living!r} + "print(flush=True); input()"])
input()
"""


def test_a_tree_of_processes_has_the_time_of_all_living_and_dead():
    ended, living = BUSY.format(0.2), BUSY.format(0.15)
    script = PARENT.format(ended=ended, living=living)
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        whole_s = cpu_seconds_of_tree(parent.pid)
        assert whole_s >= cpu_seconds_of(parent.pid) + 0.3  # both, to the tick of 10 ms
        parent.kill()
    assert cpu_seconds_of_tree(parent.pid) == 0
