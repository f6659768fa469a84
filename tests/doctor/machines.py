"""Made-up machines: folders with the files that such a machine has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from relod.doctor.finding import Machine

CPU = "/sys/devices/system/cpu/cpu0/cpufreq"
CLOCK = "/sys/devices/system/clocksource/clocksource0"
USER = 1000
JETSON = {
    "/proc/device-tree/model": "NVIDIA Jetson Nano Developer Kit\0",
    "/etc/nv_tegra_release": "# R32 (release), REVISION: 7.1",
    f"{CPU}/scaling_governor": "schedutil\n",
    f"{CPU}/scaling_driver": "tegra-cpufreq\n",
    "/proc/loadavg": "0.31 0.20 0.11 1/512 4242\n",
    f"{CLOCK}/current_clocksource": "arch_sys_counter\n",
    "/proc/meminfo": "MemTotal: 4059712 kB\nMemAvailable:    2936012 kB\n",
    "/proc/self/cgroup": "0::/\n",
    "/proc/self/timerslack_ns": "50000\n",
}


def made(root: Path, files: Mapping[str, str], locked: tuple[str, ...] = ()) -> Machine:
    """A machine of these files; its user is `robo`, in no group, and may use no device of `locked`."""
    for name, text in {"/etc/passwd": f"robo:x:{USER}:{USER}::/home/robo:/bin/bash\n", **files}.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Machine(
        root=root,
        may_use=lambda path: f"/{path.relative_to(root)}" not in locked,
        groups=frozenset(),
        uid=USER,
    )


def hold(machine: Machine, pid: int, command: str, device: str) -> None:
    """Let a process have the device open."""
    (machine.root / f"proc/{pid}/fd").mkdir(parents=True)
    (machine.root / f"proc/{pid}/comm").write_text(f"{command}\n")
    (machine.root / f"proc/{pid}/fd/7").symlink_to(device)
