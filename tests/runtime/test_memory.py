"""The memory check: what the system's files say, and that a replay which fits starts and one which does not is told."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from relod.config import LogSettings, ReplaySettings
from relod.errors import EXIT_SETTINGS, SettingsError
from relod.runtime.headroom import available_bytes, cgroup_headroom_bytes, mem_available_bytes
from relod.runtime.memory import GIB, MIB, check_log, check_replay

MEMINFO = "MemTotal:       24684092 kB\nMemFree:        22466132 kB\nMemAvailable:   23132504 kB\nHugePages_Total: 0\n"
AUTO = ReplaySettings()


def table_bytes(capacity: int, chunk_bytes: int = 256 * 60_000) -> int:
    """A replay's table: the capacity in chunks, one being filled, one retired ahead."""
    return (math.ceil(capacity / 256) + 2) * chunk_bytes


# -- what the machine has ----------------------------------------------------------------------------------------------


def test_meminfo_counts_in_units_of_1024():
    assert mem_available_bytes(MEMINFO) == 23132504 * 1024
    with pytest.raises(ValueError, match="MemAvailable"):
        mem_available_bytes("MemTotal: 1 kB\nMemFree: 1 kB\n")


@pytest.mark.parametrize(
    ("limit", "usage", "stat", "expected"),
    [
        ("max\n", "1000\n", "anon 5\n", None),
        ("4000\n", "1000\n", "anon 5\ninactive_file 0\n", 3000),
        ("4000\n", "3900\n", "anon 100\ninactive_file 3000\n", 3100),
        ("4000\n", "4100\n", "anon 4100\n", 0),
        ("4000\n", "3900\n", "inactive_file 7\ntotal_inactive_file 3000\n", 3100),  # version 1
        ("9223372036854771712\n", "1000\n", "total_inactive_file 0\n", 9223372036854770712),  # version 1, no limit
    ],
)
def test_a_cgroup_leaves_what_its_limit_does_and_its_page_cache(limit, usage, stat, expected):
    assert cgroup_headroom_bytes(limit, usage, stat) == expected


def make_cgroup(folder: Path, names: tuple[str, str], limit: str, usage: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in ((names[0], limit), (names[1], str(usage)), ("memory.stat", "inactive_file 0\n")):
        (folder / name).write_text(text)


V1, V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")


@pytest.fixture
def host(tmp_path):
    """A made-up machine with 22 GiB available; its root, its cgroups, and how to say which one is ours."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(MEMINFO)
    return tmp_path, tmp_path / "sys/fs/cgroup", (tmp_path / "proc/self/cgroup").write_text


def test_the_tightest_cgroup_above_us_counts_in_version_2(host):
    machine, root, say_own = host
    say_own("0::/user/app.slice/relod\n")
    make_cgroup(root / "user/app.slice/relod", V2, "max", 0)
    make_cgroup(root / "user/app.slice", V2, str(4 * GIB), GIB)
    make_cgroup(root / "user", V2, str(10 * GIB), GIB)
    make_cgroup(root / "user/app.slice/other", V2, "1000", 0)
    assert available_bytes(machine) == 3 * GIB


def test_in_a_container_the_limit_lies_at_the_root(host):
    machine, root, say_own = host
    say_own("0::/docker/0123\n")  # the host's path, of which the container sees only the inside
    make_cgroup(root, V2, str(2 * GIB), GIB)
    assert available_bytes(machine) == GIB


def test_version_1_has_a_hierarchy_for_memory(host):
    machine, root, say_own = host
    say_own("9:name=systemd:/\n5:cpu,memory:/job\n1:cpuset:/x\n0::/\n")
    make_cgroup(root / "memory/job", V1, str(5 * GIB), GIB)
    make_cgroup(root / "memory", V1, "9223372036854771712", 20 * GIB)
    assert available_bytes(machine) == 4 * GIB


def test_without_limits_the_machine_counts(host):
    machine, _, say_own = host
    say_own("0::/\n")
    assert available_bytes(machine) == 23132504 * 1024


def test_this_machine_has_memory():
    assert 0 < available_bytes() <= mem_available_bytes(Path("/proc/meminfo").read_text()) * 1.1


# -- what a replay needs -----------------------------------------------------------------------------------------------


def refused(capacity: int, settings: ReplaySettings, available: int) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        check_replay(table_bytes(capacity), capacity, settings, available=available)
    assert caught.value.exit_code == EXIT_SETTINGS
    assert "\n" not in str(caught.value)
    return caught.value


def test_what_fits_starts_and_a_byte_more_does_not():
    size = table_bytes(100_000)
    check_replay(size, 100_000, AUTO, available=math.ceil(size / 0.6))
    refused(100_000, AUTO, math.ceil(size / 0.6) - 2)
    exact = ReplaySettings(memory_mib=100)
    check_replay(100 * MIB, 1000, exact, available=GIB)
    with pytest.raises(SettingsError):
        check_replay(100 * MIB + 1, 1000, exact, available=GIB)


def test_the_numbers_are_told_and_what_would_fit():
    error = refused(100_000, AUTO, 6 * GIB)
    assert error.message == (
        "the replay needs 5.62 GiB for 100,000 steps of 60.4 kB; "
        "the machine has 6.00 GiB available, and it may take 60% of that"
    )
    assert error.hint == "use --set replay.capacity=63000 or --profile laptop"


def test_a_setting_allows_more_than_the_share_and_less_but_never_more_than_there_is():
    check_replay(table_bytes(100_000), 100_000, ReplaySettings(memory_mib=6000), available=6 * GIB)
    less = refused(100_000, ReplaySettings(memory_mib=1024), 64 * GIB)
    assert "; replay.memory_mib allows 1.00 GiB" in less.message
    assert less.hint == "use --set replay.capacity=17000 or --profile laptop"
    absent = refused(100_000, ReplaySettings(memory_mib=100_000), 4 * GIB)
    assert "; the machine has 4.00 GiB available" in absent.message
    assert "60%" not in absent.message


def test_the_laptops_profile_is_offered_only_where_it_fits():
    assert "laptop" not in refused(100_000, ReplaySettings(memory_mib=512), GIB).hint
    assert refused(100_000, ReplaySettings(memory_mib=20), GIB).hint.startswith("free some memory")


@given(
    capacity=st.integers(512, 10**6), available=st.integers(MIB, 64 * GIB), chunk_bytes=st.integers(10**5, 2 * 10**8)
)
def test_the_capacity_that_is_offered_fits(capacity, available, chunk_bytes):
    size = table_bytes(capacity, chunk_bytes)
    assume(size > 0.6 * available)
    with pytest.raises(SettingsError) as caught:
        check_replay(size, capacity, AUTO, available=available)
    offered = re.search(r"replay\.capacity=(\d+)", caught.value.hint)
    if offered is not None:
        fitting = int(offered[1])
        assert 512 <= fitting < capacity
        check_replay(table_bytes(fitting, chunk_bytes), fitting, AUTO, available=available)


# -- the log -----------------------------------------------------------------------------------------------------------


def test_a_log_that_cannot_hold_the_replay_is_told_in_one_line():
    settings = LogSettings(limit_gib=2.0)
    with pytest.raises(SettingsError) as caught:
        check_log(78_000, 100_000, settings)
    assert caught.value.exit_code == EXIT_SETTINGS
    assert caught.value.message == "log.limit_gib allows 2 GiB, and the replay's 100,000 steps need 7.45 GiB"
    assert caught.value.hint == "use --set log.limit_gib=7.5, or a smaller replay.capacity"
    check_log(78_000, 100_000, LogSettings(limit_gib=7.5))
    check_log(78_000, 100_000, LogSettings(limit_gib=2.0, codec="jpeg"))
    check_log(78_000, 24_000, settings)


def test_a_segment_larger_than_the_log_does_not_fit():
    with pytest.raises(SettingsError, match=r"allows 1 GiB, .* 1\.01 GiB"):
        check_log(1_000, 5_000, LogSettings(limit_gib=1.0, segment_mib=512.0))
