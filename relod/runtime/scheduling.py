"""Real-time scheduling and locked memory for the processes between senses and motors (Linux).

`enter` is called by each of them, `check_permitted` by the parent before anything starts, and `described` says what
the kernel made of it. Nothing here is done by halves: who asked for it and cannot have it is told and nothing runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StartError

__all__ = [
    "PRIORITIES",
    "Permitted",
    "check_permitted",
    "described",
    "enter",
    "lock_if_inherited",
    "lock_memory",
    "name_process",
    "raise_to",
    "refusal",
]

# Who stops the robot comes before who moves it. All below 50, where a PREEMPT_RT kernel runs the interrupt handlers
# that bring packets and images. The sentinel is a process like the control process, or it would not say what the
# machine does to one.
PRIORITIES = {"guard": 46, "device": 45, "control": 44, "sentinel": 44}
# What this one starts is on the path too: the guard, ur_rtde's process and its threads. The threads of the others
# are libraries' pools; they come back to normal scheduling (SCHED_RESET_ON_FORK).
PASSES_ON = ("device",)

# Processor time without a pause after which the kernel ends a real-time process (SIGXCPU, then SIGKILL), so that an
# endless loop cannot hold a core for good. The longest honest stretch is the collection before the first cycle, some
# 0.1 s with torch loaded; ten times as much on a weak computer must fit.
RUNAWAY_S = 2
_US_PER_S = 1_000_000

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4  # sys/mman.h
_CAP_IPC_LOCK, _CAP_SYS_NICE = 14, 23  # linux/capability.h
_MAX_PRIORITY = 99
_MIB = 1 << 20
_POLICIES = {os.SCHED_OTHER: "SCHED_OTHER", os.SCHED_IDLE: "SCHED_IDLE", os.SCHED_BATCH: "SCHED_BATCH"} | {
    os.SCHED_FIFO: "SCHED_FIFO",
    os.SCHED_RR: "SCHED_RR",
}


# -- what is permitted -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Permitted:
    """What a process may ask of the kernel."""

    priority: int  # highest real-time priority; 0 for none
    memory_bytes: int | None  # that it may lock; None for any amount
    refused: str = ""  # why the kernel refuses a real-time policy although the limits allow it

    @classmethod
    def here(cls) -> Permitted:
        """What this process may, by its limits, its capabilities, and a trial in a thread of its own."""
        capabilities = _capabilities()
        priority, memory = (resource.getrlimit(which)[1] for which in (resource.RLIMIT_RTPRIO, resource.RLIMIT_MEMLOCK))
        if capabilities >> _CAP_SYS_NICE & 1 or priority == resource.RLIM_INFINITY:
            priority = _MAX_PRIORITY
        unlimited = bool(capabilities >> _CAP_IPC_LOCK & 1) or memory == resource.RLIM_INFINITY
        tried = _try_policy(min(priority, max(PRIORITIES.values()))) if priority else ""
        return cls(priority=priority, memory_bytes=None if unlimited else memory, refused=tried)


def refusal(permitted: Permitted) -> str:
    """What is not permitted, in words; empty when everything is. Pure.

    Memory must be without limit: also what is mapped later counts, so that a limit would end a process in mid-run.
    """
    needed = max(PRIORITIES.values())
    lacking = []
    if permitted.priority < needed:
        lacking.append(f"real-time priority {needed} (limit: {permitted.priority})")
    elif permitted.refused:
        lacking.append(f"a real-time policy, whatever the limits say ({permitted.refused})")
    if permitted.memory_bytes is not None:
        lacking.append(f"locked memory without limit (limit: {permitted.memory_bytes / _MIB:g} MiB)")
    return " and ".join(lacking)


def check_permitted() -> None:
    """`StartError` unless this process's children may `enter`."""
    lacking = refusal(Permitted.here())
    if lacking:
        raise _not_permitted(lacking)


def _not_permitted(lacking: str) -> StartError:
    needed = max(PRIORITIES.values())
    return StartError(
        f"--realtime is not permitted here: {lacking}",
        f"for this shell: `sudo prlimit --pid $$ --rtprio={needed} --memlock=unlimited`; for good: rtprio and memlock "
        "in /etc/security/limits.conf (docs/timing.md); or leave out --realtime",
    )


def _capabilities() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    return 0


def _try_policy(priority: int) -> str:
    """Why a thread of this process may not have a real-time policy; containers refuse it in several ways."""
    told: list[str] = []

    def attempt() -> None:
        try:
            _raise_limit(resource.RLIMIT_RTPRIO)
            os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
        except OSError as error:
            told.append(error.strerror or str(error))

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return "".join(told)


# -- taking it ---------------------------------------------------------------------------------------------------------


def enter(role: str, *, runaway_s: float = RUNAWAY_S) -> None:
    """Give the calling thread its role's real-time priority and lock this process's memory.

    To be called when whatever takes long at a start is done, and before anything moves: from here on a stretch of
    `runaway_s` without a pause ends the process.

    Raises:
        StartError: it is not permitted.
    """
    flags = 0 if role in PASSES_ON else os.SCHED_RESET_ON_FORK
    try:
        _limit_stretch(int(runaway_s * _US_PER_S))
        _raise_limit(resource.RLIMIT_MEMLOCK)
        lock_memory()
        _raise_limit(resource.RLIMIT_RTPRIO)
        os.sched_setscheduler(0, os.SCHED_FIFO | flags, os.sched_param(PRIORITIES[role]))
    except OSError as error:
        raise _not_permitted(f"{role} process: {error.strerror}") from error


def raise_to(role: str, pid: int) -> None:
    """Give a process that this one has started the priority of another role; `StartError` if that is refused."""
    try:
        os.sched_setscheduler(pid, os.SCHED_FIFO, os.sched_param(PRIORITIES[role]))
    except ProcessLookupError:
        pass  # whoever watches it will notice
    except OSError as error:
        raise _not_permitted(f"{role} process: {error.strerror}") from error


def lock_memory() -> None:
    """Keep every page this process touches in memory, now and later; pages it never touches stay where they are.

    Raises:
        OSError: not permitted, or no such call.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"memory cannot be locked ({os.strerror(number)})")


def lock_if_inherited() -> None:
    """Lock this process's memory if it was started by a real-time process that passes its policy on."""
    if os.sched_getscheduler(0) == os.SCHED_FIFO:
        with contextlib.suppress(OSError):  # its starter could; without it this process runs all the same
            lock_memory()


def _limit_stretch(limit_us: int) -> None:
    hard_us = resource.getrlimit(resource.RLIMIT_RTTIME)[1]
    most_us = 2 * limit_us if hard_us == resource.RLIM_INFINITY else min(2 * limit_us, hard_us)
    resource.setrlimit(resource.RLIMIT_RTTIME, (min(limit_us, most_us), most_us))


def _raise_limit(which: int) -> None:
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (hard, hard))


def name_process(name: str) -> None:
    """Call this process `relod-NAME`, cut to 15 characters, where `top` and `ps -o comm` show it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_bytes(f"relod-{name}".encode()[:15])


# -- what became of it -------------------------------------------------------------------------------------------------


def described(pids: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Policy, priority and whether memory is locked, as the kernel has it, of these processes and what they started.

    A child of theirs goes by the name it gave itself, without `relod-`; one that gave itself none is left out, and so
    is one that has ended or is about to.
    """
    found = {}
    for name, pid in pids.items():
        for known, number in ((name, pid), *_named_children(pid)):
            with contextlib.suppress(OSError):
                found[known] = _described(number)
    return found


def _described(pid: int) -> dict[str, Any]:
    policy = os.sched_getscheduler(pid) & ~os.SCHED_RESET_ON_FORK
    status = Path(f"/proc/{pid}/status").read_text()
    locked_kib = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmLck:")), None)
    if locked_kib is None:  # it has given its memory back, and waits to be waited for
        raise ProcessLookupError(pid)
    return {
        "policy": _POLICIES.get(policy, str(policy)),
        "priority": os.sched_getparam(pid).sched_priority,
        "memory_locked": locked_kib > 0,
    }


def _named_children(pid: int) -> Iterator[tuple[str, int]]:
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split():
                name = Path(f"/proc/{child}/comm").read_text().strip()
                if name.startswith("relod-"):
                    yield name.removeprefix("relod-"), int(child)
