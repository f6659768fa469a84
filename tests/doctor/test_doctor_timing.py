"""Whether deadlines can be kept, on made-up machines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from relod.doctor import timing
from relod.doctor.finding import Machine, State
from tests.doctor.machines import CLOCK, CPU, JETSON


@pytest.mark.parametrize(
    ("files", "cores", "state", "said"),
    [
        (JETSON, 4, State.OK, "4 cores, load 0.31"),
        ({"/proc/loadavg": "3.9 1 1 1/2 3"}, 4, State.NOTE, "something else is busy"),
        ({"/proc/loadavg": "0.0 1 1 1/2 3"}, 1, State.NOTE, "1 core, load 0: too few"),
        ({"/sys/fs/cgroup/cpu.max": "150000 100000\n"}, 8, State.NOTE, "a cgroup leaves 1.5"),
        ({"/sys/fs/cgroup/cpu.max": "max 100000\n"}, 8, State.OK, "8 cores"),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 8, "ok", ""),
    ],
)
def test_cores_and_load(build, files, cores, state, said):
    finding = timing.check_cpu(build(files), cores)
    assert finding.state == state
    assert said in finding.found


@pytest.mark.parametrize(
    ("governor", "driver", "state"),
    [
        ("performance", "acpi-cpufreq", State.OK),
        ("schedutil", "acpi-cpufreq", State.NOTE),
        ("powersave", "intel_pstate", State.NOTE),
        ("powersave", "acpi-cpufreq", State.WRONG),
    ],
)
def test_the_governor(build, governor, driver, state):
    finding = timing.check_governor(build({f"{CPU}/scaling_governor": governor, f"{CPU}/scaling_driver": driver}))
    assert finding.state is state
    assert (finding.mend == "") == (state is State.OK)
    assert finding.values == {"governors": [governor], "driver": driver}


def test_one_core_with_another_governor_is_seen(build):
    second = "/sys/devices/system/cpu/cpu1/cpufreq/scaling_governor"
    finding = timing.check_governor(build({f"{CPU}/scaling_governor": "performance", second: "ondemand"}))
    assert (finding.state, finding.values["governors"]) == (State.NOTE, ["ondemand", "performance"])


def test_a_jetson_is_mended_its_own_way(build):
    assert timing.check_governor(build(JETSON)).mend == "sudo jetson_clocks"
    assert timing.check_governor(Machine(root=Path("/nowhere"))).state is State.ABSENT


def test_the_clock_and_its_source(build):
    assert timing.check_clock(build(JETSON)).found.startswith("arch_sys_counter, resolution ")
    finding = timing.check_clock(
        build({f"{CLOCK}/current_clocksource": "hpet", f"{CLOCK}/available_clocksource": "hpet acpi_pm"})
    )
    assert finding.state is State.NOTE
    assert "available: hpet acpi_pm" in finding.found


def test_a_calendar_that_nobody_sets_is_only_a_note():
    def silent() -> bool:
        raise OSError(1, "Operation not permitted")

    answers = [lambda: True, lambda: False, silent]
    assert [timing.check_calendar(answer).state for answer in answers] == [State.OK, State.NOTE, State.NOTE]


@pytest.mark.parametrize(
    ("late_ms", "slack", "state"),
    [
        ([0.1] * 99 + [9.0], "50000", State.OK),
        ([0.1] * 90 + [2.0] * 10, "50000", State.NOTE),
        ([0.1] * 90 + [12.0] * 10, "50000", State.WRONG),
        ([0.1] * 100, "40000000", State.NOTE),
        ([0.1] * 100, "", State.OK),
    ],
)
def test_the_lateness_of_timers(build, late_ms, slack, state):
    finding = timing.check_timers(build({"/proc/self/timerslack_ns": slack}), late_ms)
    assert finding.state is state
    assert finding.values["lateness_ms"]["max"] == max(late_ms)


def test_lateness_is_measured_and_never_early():
    late_ms = timing.measure_lateness_ms(0.05)
    assert late_ms
    assert min(late_ms) >= 0


def test_real_time_permission_is_told_and_not_asked_for(build):
    machine = build({"/proc/sys/kernel/sched_rt_runtime_us": "-1\n", "/sys/kernel/realtime": "1\n"})
    refused, given = (timing.check_realtime(machine, lambda answer=answer: answer) for answer in (False, True))
    assert (refused.state, refused.values["sched_fifo"], refused.values["preempt_rt"]) == (State.OK, False, True)
    assert (given.state, given.mend) == (State.NOTE, "sudo sysctl kernel.sched_rt_runtime_us=950000")
    before = os.sched_getscheduler(0)
    timing.check_realtime(machine)
    assert os.sched_getscheduler(0) == before
