"""How much memory there is to be had: of the machine, and of what the cgroups around this process leave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["available_bytes", "cgroup_headroom_bytes", "mem_available_bytes"]

ROOT = Path("/")


def available_bytes(root: Path = ROOT) -> int:
    """Memory that this process and its children can still take: the machine's, or what its cgroups leave if less."""
    found = [mem_available_bytes((root / "proc/meminfo").read_text())]
    for folder, names in _memory_cgroups((root / "proc/self/cgroup").read_text(), root / "sys/fs/cgroup"):
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


def _memory_cgroups(own: str, cgroups: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Folders of the cgroups with a say in our memory, innermost first, and their files; `own`: /proc/self/cgroup."""
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            root, names = (cgroups / "memory", _V1_FILES) if controllers else (cgroups, _V2_FILES)
            folder = root / path.lstrip("/")
            yield from ((level, names) for level in (folder, *folder.parents) if level.is_relative_to(root))
