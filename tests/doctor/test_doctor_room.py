"""Memory, descriptors and disk, on made-up machines."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from relod.doctor import room
from relod.doctor.finding import Machine, State, guarded
from tests.doctor.machines import JETSON


def test_memory_by_what_the_machine_says(build):
    assert room.check_memory(build(JETSON)).state is State.NOTE
    few = {**JETSON, "/proc/meminfo": "MemAvailable: 500000 kB\n"}
    assert room.check_memory(build(few)).state is State.WRONG
    (finding,) = guarded("memory", lambda: room.check_memory(Machine(root=Path("/nowhere"))))
    assert finding.state is State.NOTE


def test_shared_memory_needs_memfd_and_no_dev_shm(build):
    def forbidden(name: str) -> int:
        raise OSError(38, "Function not implemented")

    machine = build({})
    assert room.check_shared_memory(machine).found == "memfd works; no /dev/shm, and none is needed"
    assert room.check_shared_memory(machine, forbidden).state is State.WRONG


@pytest.mark.parametrize(
    ("limits", "state", "mend"),
    [
        ((1024, 1048576), State.OK, ""),
        ((512, 4096), State.NOTE, "ulimit -n 1024"),
        ((64, 128), State.WRONG, "sudo prlimit --pid $$ --nofile=1024"),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), State.OK, ""),
    ],
)
def test_open_files(limits, state, mend):
    finding = room.check_descriptors(limits)
    assert (finding.state, finding.mend) == (state, mend)


def test_disk_where_runs_go(tmp_path):
    later = tmp_path / "not" / "yet"
    states = [room.check_disk(later, 16.0, lambda _, free=free: free << 30).state for free in (20, 10, 0)]
    assert states == [State.OK, State.NOTE, State.WRONG]
    assert "log.limit_gib=8" in room.check_disk(later, 16.0, lambda _: 10 << 30).mend
    (tmp_path / "file").write_text("")
    assert room.check_disk(tmp_path / "file", 16.0).state is State.WRONG
