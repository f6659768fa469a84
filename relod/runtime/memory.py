"""What room a run needs, and what there is: refused at the start rather than killed hours later.

Replay and frames lie on memfds, so /dev/shm and its limit do not matter. Their pages are taken as they are filled:
without this check a replay that does not fit would end the run when the learner has just become good.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from ..config import LogSettings, ReplaySettings
from ..errors import SettingsError
from .replaytable import CHUNK_STEPS

__all__ = ["available_bytes", "cgroup_headroom_bytes", "check_log", "check_replay", "mem_available_bytes"]

AUTO_SHARE = 0.6  # of what is available; networks, torch in two processes and the page cache of the log want the rest
SPARE_CHUNKS = 3  # of a replay: one being filled, one retired ahead, one begun by the last steps
LEAST_STEPS = 512  # least `replay.capacity`
# Of the raw pixels, at quality 90 and 160x120: the least measured, so that only what is too much for sure is refused.
JPEG_SHARE = 1 / 14
LAPTOP_STEPS = 16_000  # capacity of the profile `laptop`
MIB, GIB = 1 << 20, 1 << 30

_MEMINFO = Path("/proc/meminfo")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")


def check_replay(layout_bytes: int, capacity: int, settings: ReplaySettings, *, available: int | None = None) -> None:
    """Refuse a replay that does not fit into the memory it may take.

    Args:
        layout_bytes: size of the replay's table for `capacity` steps.
        available: bytes of memory to be had; by default what the machine says now.

    Raises:
        SettingsError: it does not fit; the hint has a capacity that does.
    """
    available = available_bytes() if available is None else available
    limit_bytes = settings.memory_mib * MIB
    if not limit_bytes:
        allowed = int(AUTO_SHARE * available)
        reason = f"the machine has {_gib(available)} available, and it may take {AUTO_SHARE:.0%} of that"
    elif limit_bytes < available:
        allowed, reason = limit_bytes, f"replay.memory_mib allows {_gib(limit_bytes)}"
    else:
        allowed, reason = available, f"the machine has {_gib(available)} available"
    if layout_bytes > allowed:
        needed = f"{_gib(layout_bytes)} for {capacity:,} steps of {layout_bytes / capacity / 1000:,.1f} kB"
        raise SettingsError(f"the replay needs {needed}; {reason}", _hint(capacity * allowed / layout_bytes))


def check_log(step_bytes: float, capacity: int, settings: LogSettings) -> None:
    """Refuse a limit of the log that is too small for the steps of the replay, which is filled from it again.

    Args:
        step_bytes: of a step with its new frames, raw.

    Raises:
        SettingsError: the log would have to outgrow its limit, or a resumed run to go on with less experience.
    """
    stored_bytes = step_bytes * (JPEG_SHARE if settings.codec == "jpeg" else 1)
    # What goes is whole segments: one is being written, and the oldest may be needed in part only, as a chunk may.
    needed = (capacity + SPARE_CHUNKS * CHUNK_STEPS) * stored_bytes + 2 * settings.segment_mib * MIB
    if needed > settings.limit_gib * GIB:
        raise SettingsError(
            f"log.limit_gib allows {settings.limit_gib:g} GiB, and the replay's {capacity:,} steps need {_gib(needed)}",
            f"use --set log.limit_gib={math.ceil(10 * needed / GIB) / 10:g}, or a smaller replay.capacity",
        )


def _hint(steps: float) -> str:
    """What to do where a table in proportion would hold `steps`; its chunks beyond the capacity do not shrink."""
    fitting = int(steps) - SPARE_CHUNKS * CHUNK_STEPS
    fitting = fitting // 1000 * 1000 if fitting >= 2000 else fitting
    if fitting < LEAST_STEPS:
        return "free some memory, or make the task's images smaller"
    hint = f"use --set replay.capacity={fitting}"
    return f"{hint} or --profile laptop" if fitting >= LAPTOP_STEPS else hint


def available_bytes() -> int:
    """Memory that this process and its children can still take: the machine's, or what its cgroups leave if less."""
    found = [mem_available_bytes(_MEMINFO.read_text())]
    for folder, names in _memory_cgroups(_OWN_CGROUPS.read_text()):
        try:
            headroom = cgroup_headroom_bytes(*((folder / name).read_text() for name in names))
        except OSError:  # this level has no limit, or belongs to the host of our container
            continue
        if headroom is not None:
            found.append(headroom)
    return min(found)


def mem_available_bytes(meminfo: str) -> int:
    """`MemAvailable` of /proc/meminfo, in bytes."""
    for line in meminfo.splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024  # proc(5): in units of 1024 bytes, printed as kB
    raise ValueError("/proc/meminfo has no MemAvailable; Linux has had it since 3.14")


def cgroup_headroom_bytes(limit: str, usage: str, stat: str) -> int | None:
    """What a cgroup leaves, from the texts of its files; None without a limit.

    Usage counts the page cache too. Its inactive part is given back before anybody is killed, so it counts as free.
    """
    if limit.strip() == "max":
        return None
    fields = dict(line.split() for line in stat.splitlines())
    cache = int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))  # v1's total, else v2's
    return max(0, int(limit) - int(usage) + cache)


_V2_FILES = ("memory.max", "memory.current", "memory.stat")
_V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")


def _memory_cgroups(own: str) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Folders of the cgroups with a say in our memory, innermost first, and their files; `own`: /proc/self/cgroup."""
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            root, names = (_CGROUP_ROOT / "memory", _V1_FILES) if controllers else (_CGROUP_ROOT, _V2_FILES)
            folder = root / path.lstrip("/")
            yield from ((level, names) for level in (folder, *folder.parents) if level.is_relative_to(root))


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:,.2f} GiB"
