"""Cameras and serial ports: whether they are there, whether this user may use them, and who else does.

Nothing is opened that a robot could notice: opening a serial port moves its control lines.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import math
import os
import pwd
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import SettingsError
from .finding import Finding, Machine, absent, note, ok, wrong

__all__ = ["check_camera_source", "check_cameras", "check_port", "check_ports", "video_capabilities"]

PORTS = ("/dev/ttyUSB*", "/dev/ttyACM*", "/dev/ttyAMA*", "/dev/ttyTHS*")
CAMERA, SERIAL = "camera", "serial"
LATENCY_MS = 1  # of an FTDI adapter; its default of 16 holds back every sensor packet of 52 bytes
PSEUDO = "/dev/pts/"
CONNECT_S = 1.0
PORT_THIEVES = ("ModemManager", "brltty")  # daemons that open a serial adapter of their own accord

_VIDIOC_QUERYCAP = 0x80685600
_CAPABILITY_BYTES, _DEVICE_CAPS_AT = 104, 88  # struct v4l2_capability, videodev2.h
_CAPTURE = 0x1 | 0x1000  # single- or multi-planar video capture


# -- cameras -----------------------------------------------------------------------------------------------------------


def video_capabilities(path: Path) -> int:
    """What a video device can do, V4L2_CAP_*; `OSError` when it cannot be opened or is none."""
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        answer = bytearray(_CAPABILITY_BYTES)
        fcntl.ioctl(fd, _VIDIOC_QUERYCAP, answer)
    finally:
        os.close(fd)
    return int(struct.unpack_from("=I", answer, _DEVICE_CAPS_AT)[0])


def check_cameras(machine: Machine, capabilities: Callable[[Path], int] = video_capabilities) -> list[Finding]:
    """Every V4L2 device that gives pictures; the second node of a webcam, for metadata, is left out."""
    paths = machine.find("/dev/video*")
    found = [_check_camera(machine, path, capabilities) for path in paths]
    cameras = [finding for finding in found if finding is not None]
    if cameras:
        return cameras
    others = f"; {', '.join(map(machine.name_of, paths))} give no pictures" if paths else ""
    return [absent(CAMERA, f"no V4L2 camera{others}", mend="plug one in, or name a stream: --camera http://…")]


def _check_camera(machine: Machine, path: Path, capabilities: Callable[[Path], int]) -> Finding | None:
    device = machine.name_of(path)
    label = machine.text(f"/sys/class/video4linux/{path.name}/name") or "without a name"
    if not machine.may_use(path):
        return _no_permission(CAMERA, machine, path, label)
    holders = _holders(machine, path)
    values: dict[str, Any] = {"label": label, "held_by": holders}
    try:
        does = capabilities(path)
    except OSError as error:
        reason = error.strerror or str(error)
        return wrong(CAMERA, f"{label}: does not open ({reason})", f"fuser -v {device}", device, **values)
    if not does & _CAPTURE:
        return None
    if holders:
        return note(CAMERA, f"{label}: in use by {', '.join(holders)}", f"fuser -k {device}", device, **values)
    return ok(CAMERA, f"{label}: opens", device, **values)


def check_camera_source(source: str) -> Finding:
    """The camera named by `--camera`, looked through for two seconds. `StartError` when it cannot be had."""
    if source == "sim":
        return absent(CAMERA, "simulated", source)
    from ..config import CameraSettings
    from ..runtime.cameratrial import CameraPlan, try_camera

    seen = try_camera(CameraPlan(source=source, settings=CameraSettings(), height=120, width=160))
    values: dict[str, Any] = {"fps": seen.fps}
    if math.isfinite(seen.age_max_ms):
        values |= {"age_p50_ms": seen.age_p50_ms, "age_max_ms": seen.age_max_ms}
    if seen.failure:
        mend = "more light (exposure sets the rate), a port of its own instead of a hub, or --set camera.fps"
        return wrong(CAMERA, f"{seen}: {seen.failure}", mend, seen.source, **values)
    return ok(CAMERA, f"{seen}, asked for 160x120", seen.source, **values)


# -- serial ports ------------------------------------------------------------------------------------------------------


def check_ports(machine: Machine) -> list[Finding]:
    """Every serial adapter of this machine."""
    ports = machine.find(*PORTS)
    if ports:
        return [_check_port(machine, path) for path in ports]
    thieves = _running(machine, PORT_THIEVES[1:])
    if thieves:
        return [note(SERIAL, f"no port; {thieves[0]} takes some adapters away as they come", "sudo apt remove brltty")]
    return [absent(SERIAL, "no serial adapter", mend="plug the robot's cable in")]


def check_port(machine: Machine, address: str) -> Finding:
    """The port, or the socket of a simulated robot, that `--robot` names. Raises SettingsError when it is neither."""
    path = machine.path(address)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        there = ", ".join(map(machine.name_of, machine.find(*PORTS)))
        mend = f"use one of those there are: {there}" if there else "plug the robot's cable in; there is no port at all"
        return wrong(SERIAL, f"cannot be found: {error.strerror}", mend, address)
    if not (stat.S_ISCHR(mode) or stat.S_ISSOCK(mode)):
        raise SettingsError(f"--robot {address} is neither a serial port nor a socket", "give a device of /dev")
    if stat.S_ISSOCK(mode):
        return _check_socket(path, address)
    return _check_port(machine, path.resolve(), address)


def _check_socket(path: Path, address: str) -> Finding:
    """Of a simulated robot; connecting drives nothing."""
    with socket.socket(socket.AF_UNIX) as wire:
        wire.settimeout(CONNECT_S)
        try:
            wire.connect(str(path))
        except OSError as error:
            mend = "start the simulated robot again: relod emulate"
            return wrong(SERIAL, f"socket: nobody there ({error.strerror or error})", mend, address)
    return ok(SERIAL, "socket: somebody answers", address)


def _check_port(machine: Machine, path: Path, address: str = "") -> Finding:
    device = machine.name_of(path)
    subject = address or device
    label = _lasting_name(machine, path) or ("pseudo-terminal" if device.startswith(PSEUDO) else "serial port")
    if not machine.may_use(path):
        return _no_permission(SERIAL, machine, path, label, subject)
    holders, latency_ms = _holders(machine, path), _latency_ms(machine, path)
    values: dict[str, Any] = {"label": label, "held_by": holders, "latency_timer_ms": latency_ms}
    if holders:
        mend = f"end it, or name another port: fuser -v {device}"
        return wrong(SERIAL, f"{label}: held by {', '.join(holders)}", mend, subject, **values)
    if latency_ms is not None and latency_ms > LATENCY_MS:
        mend = f"echo {LATENCY_MS} | sudo tee /sys/bus/usb-serial/devices/{path.name}/latency_timer"
        return note(SERIAL, f"{label}: the adapter holds bytes back for up to {latency_ms} ms", mend, subject, **values)
    thieves = _running(machine, PORT_THIEVES) if path.name.startswith(("ttyUSB", "ttyACM")) else []
    if thieves:
        mend = f"sudo systemctl disable --now {thieves[0]}"
        return note(
            SERIAL, f"{label}: usable, but {thieves[0]} may open it when it is plugged in", mend, subject, **values
        )
    told = f", latency timer {latency_ms} ms" if latency_ms is not None else ""
    return ok(SERIAL, f"{label}: usable, nobody has it open{told}", subject, **values)


def _latency_ms(machine: Machine, path: Path) -> int | None:
    """Of an FTDI adapter; None for all others."""
    return machine.number(f"/sys/bus/usb-serial/devices/{path.name}/latency_timer")


def _lasting_name(machine: Machine, path: Path) -> str:
    """Its link in /dev/serial/by-id, which outlives being plugged in elsewhere; empty without one."""
    for link in machine.find("/dev/serial/by-id/*"):
        with contextlib.suppress(OSError):
            if Path(os.readlink(link)).name == path.name:
                return link.name
    return ""


# -- both --------------------------------------------------------------------------------------------------------------


def _no_permission(name: str, machine: Machine, path: Path, label: str, subject: str = "") -> Finding:
    """A device of a group that this user is not in, or not yet."""
    status = path.stat()
    group = _group_name(machine, status.st_gid)
    values: dict[str, Any] = {"label": label, "group": group, "mode": f"{stat.S_IMODE(status.st_mode):03o}"}
    subject = subject or machine.name_of(path)
    found = f"{label}: no permission (group {group}, mode {values['mode']})"
    user = _user_name(machine)
    if not status.st_mode & stat.S_IRGRP or not status.st_mode & stat.S_IWGRP:
        return wrong(name, found, f"sudo chmod 660 {machine.name_of(path)}", subject, **values)
    if user in _members(machine, group) and status.st_gid not in machine.groups:
        found += f"; {user} is in it since this login began"
        return wrong(name, found, "log out and in again, or reboot", subject, **values)
    return wrong(name, found, f"sudo usermod -aG {group} $USER   # then log out and in again", subject, **values)


def _holders(machine: Machine, path: Path) -> list[str]:
    """Processes that have the device open or locked; of other users' only the lock can be seen."""
    device, found = machine.name_of(path), dict[int, str]()
    for folder in machine.find("/proc/[0-9]*") if not device.startswith(PSEUDO) else ():  # its emulator has it open
        pid = int(folder.name)
        with contextlib.suppress(OSError):
            for link in (folder / "fd").iterdir():
                if pid != os.getpid() and os.readlink(link) == device:
                    found[pid] = machine.text(f"/proc/{pid}/comm") or "a process"
    status = path.stat()
    inode = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in machine.text("/proc/locks").splitlines():
        fields = line.split()
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5] == inode and fields[4].isdecimal():
            found.setdefault(int(fields[4]), machine.text(f"/proc/{fields[4]}/comm") or "a process")
    return [f"{command} (pid {pid})" for pid, command in sorted(found.items())]


def _running(machine: Machine, commands: tuple[str, ...]) -> list[str]:
    """Those of these commands that run."""
    running = {machine.text(machine.name_of(path)) for path in machine.find("/proc/[0-9]*/comm")}
    return [command for command in commands if command in running]


def _members(machine: Machine, group: str) -> list[str]:
    for line in machine.text("/etc/group").splitlines():
        fields = line.split(":")
        if fields[0] == group and len(fields) > 3:
            return fields[3].split(",")
    return []


def _group_name(machine: Machine, gid: int) -> str:
    for line in machine.text("/etc/group").splitlines():
        fields = line.split(":")
        if len(fields) > 2 and fields[2] == str(gid):
            return fields[0]
    try:  # from a directory service
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _user_name(machine: Machine) -> str:
    for line in machine.text("/etc/passwd").splitlines():
        fields = line.split(":")
        if len(fields) > 2 and fields[2] == str(machine.uid):
            return fields[0]
    try:
        return pwd.getpwuid(machine.uid).pw_name
    except KeyError:
        return str(machine.uid)
