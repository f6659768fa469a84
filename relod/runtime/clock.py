"""Time: the only module that reads a clock, and the ticker that keeps the control cycle on its grid.

All stamps are `int` nanoseconds of one monotonic clock per host. `loop.time()` is never used: uvloop's is
quantised to milliseconds and its timers fire up to 1 ms early, so deadlines wait on a timerfd, which the kernel
fires to the microsecond whatever the loop: timer slack (PR_SET_TIMERSLACK) applies to sleeps and poll timeouts only.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import struct
import time
from typing import Protocol

__all__ = [
    "NS_PER_MS",
    "NS_PER_S",
    "Clock",
    "DeadlineTimer",
    "Ticker",
    "VirtualClock",
    "WallClock",
    "cpu_seconds",
    "cpu_seconds_of",
    "cpu_seconds_of_tree",
    "monotonic_ns",
    "monotonic_resolution_ns",
    "sleep_until",
    "utc_seconds",
    "utc_synchronised",
]

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000

_TFD_NONBLOCK = 0o4000
_TFD_CLOEXEC = 0o2000000
_TFD_TIMER_ABSTIME = 1
_TIMEX_BYTES = 512  # struct timex has 208 on 64-bit machines
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


def monotonic_ns() -> int:
    """Nanoseconds of this host's monotonic clock; comparable between processes of one host only."""
    return time.monotonic_ns()


def utc_seconds() -> float:
    """Seconds since 1970, for names and records; never for control."""
    return time.time()


def monotonic_resolution_ns() -> int:
    """The smallest step of `monotonic_ns`, as the kernel says; 1 with high-resolution timers."""
    return round(time.clock_getres(time.CLOCK_MONOTONIC) * NS_PER_S)


def utc_synchronised() -> bool:
    """Whether the kernel's calendar clock is kept right by somebody, such as an NTP client. `OSError`: not told."""
    libc = ctypes.CDLL(None, use_errno=True)
    question = ctypes.create_string_buffer(_TIMEX_BYTES)  # zero modes: only ask
    state = libc.adjtimex(question)
    if state < 0:
        raise OSError(ctypes.get_errno(), "adjtimex failed")
    return int(state) != _TIME_ERROR


def cpu_seconds() -> float:
    """Seconds of processor time this process has used."""
    return time.process_time()


def cpu_seconds_of(pid: int) -> float:
    """Seconds of processor time another process has used so far; 0 when it is gone."""
    return sum(_cpu_times_of(pid)[:2])


def cpu_seconds_of_tree(pid: int) -> float:
    """The same of a process and all that it started, those that ended included; 0 when it is gone."""
    children = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                children += file.read().split()
    return sum(_cpu_times_of(pid)) + sum(cpu_seconds_of_tree(int(child)) for child in children)


def _cpu_times_of(pid: int) -> tuple[float, ...]:
    """Seconds in user mode, in the kernel, and both of its children that ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()
    except OSError:
        return (0.0, 0.0, 0.0, 0.0)
    return tuple(int(ticks) / os.sysconf("SC_CLK_TCK") for ticks in fields[11:15])


def sleep_until(deadline_ns: int) -> None:
    """Block this thread until the monotonic clock passes `deadline_ns`."""
    while (left_ns := deadline_ns - time.monotonic_ns()) > 0:
        time.sleep(left_ns / NS_PER_S)


def sleep_s(duration_s: float) -> None:
    """Block this thread for `duration_s` seconds."""
    sleep_until(time.monotonic_ns() + int(duration_s * NS_PER_S))


class Clock(Protocol):
    """What code that must run on both the wall clock and virtual time may ask."""

    def now_ns(self) -> int:
        """The present, in nanoseconds."""
        ...


class WallClock:
    """The host's monotonic clock."""

    def now_ns(self) -> int:
        return time.monotonic_ns()


class VirtualClock:
    """A clock that moves only when told to; starts at 1 s so that stamps before the start stay positive."""

    def __init__(self, start_ns: int = NS_PER_S) -> None:
        self._now_ns = start_ns

    def now_ns(self) -> int:
        return self._now_ns

    def advance_to(self, now_ns: int) -> None:
        """Move to `now_ns`; going back is a defect."""
        if now_ns < self._now_ns:
            raise ValueError(f"virtual time cannot go back from {self._now_ns} to {now_ns} ns")
        self._now_ns = now_ns


class DeadlineTimer:
    """One absolute deadline on the monotonic clock, awaited on any asyncio loop (Linux timerfd)."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        fd = self._libc.timerfd_create(time.CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._fd = int(fd)

    async def wait_until(self, deadline_ns: int) -> None:
        """Return as soon as the kernel wakes us at or after `deadline_ns`; at once if it has passed."""
        if deadline_ns <= time.monotonic_ns():
            return
        spec = struct.pack("@llll", 0, 0, deadline_ns // NS_PER_S, deadline_ns % NS_PER_S)
        if self._libc.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, spec, None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")
        loop = asyncio.get_running_loop()
        fired: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._fd, _resolve, fired)
        try:
            await fired
        finally:
            loop.remove_reader(self._fd)
            try:
                os.read(self._fd, 8)
            except BlockingIOError:  # cancelled before it fired
                pass

    def close(self) -> None:
        os.close(self._fd)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Ticker:
    """Absolute deadlines on a grid. After an overrun it goes on at the next grid point and counts what it missed.

    Pure: `next(now_ns)` says which deadline to wait for; waiting is the driver's business.
    """

    def __init__(self, period_ns: int, start_ns: int) -> None:
        if period_ns <= 0:
            raise ValueError(f"period must be positive, not {period_ns} ns")
        self.period_ns = period_ns
        self.start_ns = start_ns
        self.overruns = 0  # calls that came after the deadline they should have waited for
        self.skipped = 0  # grid points nobody served
        self._next_index = 0

    def next(self, now_ns: int) -> int:
        """The next deadline in ns: one period after the last, or the next grid point if that has passed."""
        deadline_ns = self.start_ns + self._next_index * self.period_ns
        if now_ns > deadline_ns and self._next_index > 0:
            behind = -((deadline_ns - now_ns) // self.period_ns)  # rounded up, exact for any int
            self.overruns += 1
            self.skipped += behind
            self._next_index += behind
            deadline_ns = self.start_ns + self._next_index * self.period_ns
        self._next_index += 1
        return deadline_ns
