"""Whether there is room: memory, shared memory, file descriptors, disk."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..runtime.headroom import available_bytes
from .finding import Finding, Machine, note, ok, wrong

__all__ = ["check_descriptors", "check_disk", "check_memory", "check_shared_memory"]

GIB = 1 << 30
LEAST_MEMORY, GOOD_MEMORY = GIB, 4 * GIB  # torch in two processes takes the first; the rest is for the replay
LEAST_DESCRIPTORS, GOOD_DESCRIPTORS = 256, 1024  # a robot host has some 60 open; a learner 100 and one for each robot
LEAST_DISK = GIB


def check_memory(machine: Machine) -> Finding:
    """Memory that relod can still take."""
    name = "memory"
    free = available_bytes(machine.root)
    found = f"{free / GIB:.1f} GiB available"
    if free < LEAST_MEMORY:
        mend = "learn elsewhere: --mode remote-only"
        return wrong(name, f"{found}: too little to learn here", mend, available_bytes=free)
    if free < GOOD_MEMORY:
        return note(name, f"{found}: the usual replay may not fit", "use --profile laptop", available_bytes=free)
    return ok(name, found, available_bytes=free)


def check_shared_memory(machine: Machine, create: Callable[[str], int] = os.memfd_create) -> Finding:
    """memfds, by which processes share frames and the replay; /dev/shm has no part in it."""
    name = "shared memory"
    folder = machine.path("/dev/shm")
    shm = shutil.disk_usage(folder).free if folder.is_dir() else None
    values: dict[str, Any] = {"dev_shm_free_bytes": shm}
    beside = f"/dev/shm {shm / GIB:.1f} GiB free, not needed" if shm is not None else "no /dev/shm, and none is needed"
    try:
        os.close(create("relod-doctor"))
    except OSError as error:
        mend = "use a Linux kernel and container profile that allow memfd_create(2)"
        return wrong(name, f"no memfd can be made: {error.strerror}; {beside}", mend, memfd=False, **values)
    return ok(name, f"memfd works; {beside}", memfd=True, **values)


def check_descriptors(limits: tuple[int, int] | None = None) -> Finding:
    """How many files, sockets and memfds one process may have open."""
    name = "open files"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE) if limits is None else limits
    if soft == resource.RLIM_INFINITY:
        return ok(name, "no limit", soft=None)
    found = f"{soft} allowed (at most {hard})"
    reachable = hard == resource.RLIM_INFINITY or hard >= GOOD_DESCRIPTORS
    mend = f"ulimit -n {GOOD_DESCRIPTORS}" if reachable else f"sudo prlimit --pid $$ --nofile={GOOD_DESCRIPTORS}"
    if soft < LEAST_DESCRIPTORS:
        return wrong(name, found, mend, soft=soft, hard=hard)
    if soft < GOOD_DESCRIPTORS:
        return note(name, f"{found}: few for a learner of many robots", mend, soft=soft, hard=hard)
    return ok(name, found, soft=soft, hard=hard)


def check_disk(folder: Path, log_limit_gib: float, free: Callable[[Path], int] | None = None) -> Finding:
    """Space where run folders are made: the experience log grows to `log.limit_gib`."""
    name = "disk"
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    left = (free or _free_bytes)(there)
    found = f"{left / GIB:.1f} GiB free for {folder.absolute()}"
    values: dict[str, Any] = {"folder": str(folder.absolute()), "free_bytes": left, "log_limit_gib": log_limit_gib}
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return wrong(name, f"no run folder can be made in {there}", "use --set run.folder=DIR", **values)
    if left < LEAST_DISK:
        return wrong(name, found, "free some space, or use --set run.folder=DIR", **values)
    if left < log_limit_gib * GIB:
        mend = f"use --set log.limit_gib={max(1, int(left / GIB * 0.8))}, or --set run.folder=DIR on another disk"
        return note(name, f"{found}: a run's log may grow to {log_limit_gib:g} GiB", mend, **values)
    return ok(name, found, **values)


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free
