"""Whether deadlines can be kept here: processor, clocks, timers, real-time permissions."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import Callable
from typing import Any

from ..runtime.clock import (
    NS_PER_MS,
    NS_PER_S,
    DeadlineTimer,
    Ticker,
    monotonic_ns,
    monotonic_resolution_ns,
    utc_synchronised,
)
from .finding import Finding, Machine, absent, note, ok, percentiles_ms, wrong

__all__ = [
    "check_calendar",
    "check_clock",
    "check_cpu",
    "check_governor",
    "check_realtime",
    "check_timers",
    "measure_lateness_ms",
]

GOOD_SOURCES = ("tsc", "arch_sys_counter", "kvm-clock", "hyperv_clocksource_tsc_page", "xen")  # read without a trap
BUSY_SHARE = 0.7  # of the cores: a cycle that wakes then often waits for one
SLOW_READ_NS = 2_000  # a cycle reads the clock some 20 times; tsc takes 50 ns and Python as much again
# Dynamic, whatever the name says: there the hardware chooses.
OWN_POWERSAVE = ("intel_pstate", "intel_cpufreq", "amd-pstate", "amd-pstate-epp", "amd_pstate_epp")
GOVERNOR_FILES = "/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
SLACK_NS = 1_000_000  # default: 50 us

TIMER_S = 1.2
TIMER_PERIOD_NS = 5 * NS_PER_MS  # the sentinel's, so that the figures compare
LATE_MS, TOO_LATE_MS = 1.0, 10.0  # p99: what a quiet machine keeps; a quarter of the tasks' shortest cycle, 40 ms


def check_cpu(machine: Machine, cores: int | None = None) -> Finding:
    """Cores this process may use, what a container leaves of them, and how busy they are."""
    name = "cpu"
    cores = len(os.sched_getaffinity(0)) if cores is None else cores
    share = _cgroup_cores(machine)
    usable = cores if share is None else min(float(cores), share)
    load = float((machine.text("/proc/loadavg") or "0").split()[0])
    values: dict[str, Any] = {"cores": cores, "cgroup_cores": share, "load_1min": load}
    found = f"{cores} cores" if cores > 1 else "1 core"
    found += f", of which a cgroup leaves {share:g}" if share is not None and share < cores else ""
    found += f", load {load:g}"
    if usable < 2:
        return note(
            name, f"{found}: too few to act and learn at once", "learn elsewhere: --mode remote-local", **values
        )
    if load > BUSY_SHARE * usable:
        return note(name, f"{found}: something else is busy here", "top -o %CPU", **values)
    return ok(name, found, **values)


def _cgroup_cores(machine: Machine) -> float | None:
    """Cores' worth of time that the cgroup at the root of our view allows; None without a limit."""
    quota, _, period = machine.text("/sys/fs/cgroup/cpu.max").partition(" ")
    if not quota:
        quota = machine.text("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
        period = machine.text("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def check_governor(machine: Machine) -> Finding:
    """How the processor chooses its frequency."""
    name = "governor"
    governors = sorted({machine.text(machine.name_of(path)) for path in machine.find(GOVERNOR_FILES)} - {""})
    if not governors:
        return absent(name, "no frequency scaling to be seen, as in most virtual machines")
    driver = machine.text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_driver")
    values: dict[str, Any] = {"governors": governors, "driver": driver}
    found = f"{', '.join(governors)}" + (f" ({driver})" if driver else "")
    if governors == ["performance"]:
        return ok(name, found, **values)
    mend = "sudo jetson_clocks" if machine.jetson else f"echo performance | sudo tee {GOVERNOR_FILES}"
    if "powersave" in governors and driver not in OWN_POWERSAVE:
        return wrong(name, f"{found}: held at the lowest frequency", mend, **values)
    return note(name, f"{found}: a core that idled wakes slowly", mend, **values)


def check_clock(machine: Machine) -> Finding:
    """The monotonic clock, which every stamp and deadline is of."""
    name = "clock"
    source = machine.text("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    resolution_ns, read_ns = monotonic_resolution_ns(), _read_ns()
    values: dict[str, Any] = {"clocksource": source, "resolution_ns": resolution_ns, "read_ns": read_ns}
    found = f"{source or 'unknown source'}, resolution {resolution_ns} ns, {read_ns} ns to read"
    if resolution_ns > NS_PER_MS:
        return wrong(name, f"{found}: no high-resolution timers", "boot a kernel with CONFIG_HIGH_RES_TIMERS", **values)
    if read_ns > SLOW_READ_NS or (source and source not in GOOD_SOURCES):
        others = machine.text("/sys/devices/system/clocksource/clocksource0/available_clocksource")
        mend = "dmesg | grep -i clocksource   # why the kernel left the better one"
        return note(name, f"{found}; available: {others or 'not told'}", mend, **values)
    return ok(name, found, **values)


def _read_ns() -> int:
    """What reading the clock costs, the best of some tries."""
    best_ns = NS_PER_S
    for _ in range(200):
        begun_ns = monotonic_ns()
        best_ns = min(best_ns, max(1, monotonic_ns() - begun_ns))
    return best_ns


def check_calendar(synchronised: Callable[[], bool] = utc_synchronised) -> Finding:
    """The calendar clock, which only names runs and dates records."""
    name = "calendar"
    try:
        right = synchronised()
    except OSError as error:
        return note(name, f"the kernel does not say whether UTC is right ({error})")
    if right:
        return ok(name, "UTC is synchronised", synchronised=True)
    return note(
        name,
        "UTC is not synchronised: dates of runs may be off; control never uses it",
        "sudo timedatectl set-ntp true",
        synchronised=False,
    )


def check_timers(machine: Machine, lateness_ms: list[float]) -> Finding:
    """How late absolute deadlines are met, by the timer that the control cycle waits on."""
    name = "timers"
    slack_ns = machine.number("/proc/self/timerslack_ns")
    late = percentiles_ms(lateness_ms)
    values: dict[str, Any] = {"lateness_ms": late, "wakeups": len(lateness_ms), "slack_ns": slack_ns}
    found = f"late by p50 {late['p50']:.3f}, p99 {late['p99']:.3f}, max {late['max']:.3f} ms in {len(lateness_ms)}"
    found += f" wake-ups, slack {slack_ns / 1000:g} us" if slack_ns is not None else " wake-ups"
    quieten = "end what else runs (top -o %CPU) and keep the processor's frequency up (governor), then look again"
    if late["p99"] >= TOO_LATE_MS:
        return wrong(name, f"{found}: cycles will be late", quieten, **values)
    if slack_ns is not None and slack_ns > SLACK_NS:
        return note(name, found, "start relod from a shell whose /proc/self/timerslack_ns is 50000", **values)
    if late["p99"] >= LATE_MS:
        return note(name, f"{found}: this machine is busy or saves power", quieten, **values)
    return ok(name, found, **values)


def measure_lateness_ms(duration_s: float = TIMER_S) -> list[float]:
    """Lateness of each of a second's wake-ups, as the control process would see it."""
    try:
        import uvloop
    except ImportError:  # told by the packages' check
        return asyncio.run(_tick(duration_s))
    return uvloop.run(_tick(duration_s))


async def _tick(duration_s: float) -> list[float]:
    timer, late_ms = DeadlineTimer(), []
    begun_ns = monotonic_ns()
    ticker = Ticker(TIMER_PERIOD_NS, begun_ns + TIMER_PERIOD_NS)
    try:
        while (now_ns := monotonic_ns()) < begun_ns + duration_s * NS_PER_S:
            deadline_ns = ticker.next(now_ns)
            await timer.wait_until(deadline_ns)
            late_ms.append((monotonic_ns() - deadline_ns) / NS_PER_MS)
    finally:
        timer.close()
    return late_ms


def check_realtime(machine: Machine, allowed: Callable[[], bool] | None = None) -> Finding:
    """Whether real-time scheduling could be had. relod asks for none, so that it is missing is no fault."""
    name = "real time"
    rtprio, memlock = resource.getrlimit(resource.RLIMIT_RTPRIO)[0], resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    runtime_us = machine.number("/proc/sys/kernel/sched_rt_runtime_us")
    fifo = (allowed or _fifo_allowed)()
    preempt = "PREEMPT_RT" in machine.text("/proc/version") or machine.text("/sys/kernel/realtime") == "1"
    values: dict[str, Any] = {
        "sched_fifo": fifo,
        "rtprio": _limit(rtprio),
        "memlock_bytes": _limit(memlock),
        "sched_rt_runtime_us": runtime_us,
        "preempt_rt": preempt,
    }
    memory = "unlimited" if memlock == resource.RLIM_INFINITY else f"{memlock // 1024} KiB"
    priority = "unlimited" if rtprio == resource.RLIM_INFINITY else str(rtprio)
    found = f"SCHED_FIFO {'' if fifo else 'not '}allowed, rtprio {priority}, memlock {memory}"
    found += f", sched_rt_runtime_us {runtime_us}" if runtime_us is not None else ""
    found += ", PREEMPT_RT" if preempt else ""
    if fifo and runtime_us == -1:
        mend = "sudo sysctl kernel.sched_rt_runtime_us=950000"
        return note(name, f"{found}: a process that hangs in real time would take a core for good", mend, **values)
    return ok(name, found if fifo else f"{found}; relod needs none", **values)


def _fifo_allowed() -> bool:
    """By asking for it, for an instant."""
    before, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        return False
    os.sched_setscheduler(0, before, priority)
    return True


def _limit(value: int) -> int | None:
    """A resource limit; None where there is none."""
    return None if value == resource.RLIM_INFINITY else value
