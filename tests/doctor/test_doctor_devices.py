"""Cameras and serial ports, on made-up machines."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from relod.doctor import devices
from relod.doctor.finding import Finding, Machine, State, guarded
from relod.errors import SettingsError
from tests.doctor.machines import hold

CAPTURE, METADATA = 0x04000001, 0x04800000  # V4L2_CAP_*


def summary(finding: Finding) -> tuple[str, str]:
    return finding.state.value, finding.subject


# -- cameras -----------------------------------------------------------------------------------------------------------

WEBCAM = {
    "/dev/video0": "",
    "/dev/video1": "",
    "/sys/class/video4linux/video0/name": "HD Pro Webcam C920\n",
    "/sys/class/video4linux/video1/name": "HD Pro Webcam C920\n",
    "/etc/group": f"video:x:{os.getegid()}:\n",
}


def webcam(path: Path) -> int:
    return CAPTURE if path.name == "video0" else METADATA


def test_a_webcam_is_one_camera(build):
    (finding,) = devices.check_cameras(build(WEBCAM), webcam)
    assert summary(finding) == ("ok", "/dev/video0")
    assert finding.found == "HD Pro Webcam C920: opens"


def test_no_camera(build):
    assert [summary(finding) for finding in devices.check_cameras(build({}), webcam)] == [("not here", "")]
    (finding,) = devices.check_cameras(build({"/dev/video1": ""}), webcam)
    assert "/dev/video1 give no pictures" in finding.found


def test_a_camera_that_may_not_be_used_names_its_group(build):
    machine = build(WEBCAM, locked=("/dev/video0",))
    (machine.root / "dev/video0").chmod(0o660)
    finding = devices.check_cameras(machine, webcam)[0]
    assert finding.state is State.WRONG
    assert finding.mend.startswith("sudo usermod -aG video $USER")


def test_a_camera_that_does_not_open_or_is_in_use(build):
    def broken(path: Path) -> int:
        raise OSError(19, "No such device")

    machine = build(WEBCAM)
    assert {finding.state for finding in devices.check_cameras(machine, broken)} == {State.WRONG}
    hold(machine, 4711, "cheese", "/dev/video0")
    (finding,) = devices.check_cameras(machine, webcam)
    assert (finding.state, finding.values["held_by"]) == (State.NOTE, ["cheese (pid 4711)"])


def test_what_is_no_v4l2_device_says_so(build):
    with pytest.raises(OSError, match="ioctl"):
        devices.video_capabilities(build(WEBCAM).path("/dev/video0"))


def test_a_simulated_camera_has_nothing_to_check():
    assert devices.check_camera_source("sim").state is State.ABSENT


def test_a_camera_that_is_none_is_one_line():
    (finding,) = guarded("camera", lambda: devices.check_camera_source("foo"), "foo")
    assert (finding.state, finding.found) == (State.WRONG, "--camera 'foo' is no camera")


# -- serial ports ------------------------------------------------------------------------------------------------------

TIMER = "/sys/bus/usb-serial/devices/ttyUSB0/latency_timer"
FTDI = {"/dev/ttyUSB0": "", TIMER: "1\n", "/etc/group": f"dialout:x:{os.getegid()}:\n"}


def port(machine: Machine) -> Finding:
    (finding,) = devices.check_ports(machine)
    return finding


def test_a_port_that_is_free_is_called_by_its_lasting_name(build):
    machine = build(FTDI)
    link = machine.root / "dev/serial/by-id/usb-FTDI_FT232R_A5069RR4-if00-port0"
    link.parent.mkdir(parents=True)
    link.symlink_to("../../ttyUSB0")
    finding = port(machine)
    assert summary(finding) == ("ok", "/dev/ttyUSB0")
    assert finding.found.startswith("usb-FTDI_FT232R_A5069RR4-if00-port0: usable")


def test_no_port(build):
    assert port(build({})).state is State.ABSENT
    assert "brltty" in port(build({"/proc/77/comm": "brltty\n"})).found


@pytest.mark.parametrize(
    ("mode", "members", "mend"),
    [
        (0o660, "", "sudo usermod -aG dialout $USER"),
        (0o660, "robo", "log out and in again"),
        (0o600, "", "sudo chmod 660 /dev/ttyUSB0"),
    ],
)
def test_a_port_without_permission(build, mode, members, mend):
    machine = build({**FTDI, "/etc/group": f"dialout:x:{os.getegid()}:{members}\n"}, locked=("/dev/ttyUSB0",))
    (machine.root / "dev/ttyUSB0").chmod(mode)
    finding = port(machine)
    assert finding.state is State.WRONG
    assert finding.mend.startswith(mend)


def test_a_port_that_somebody_has_open(build):
    machine = build(FTDI)
    hold(machine, 812, "minicom", "/dev/ttyUSB0")
    finding = port(machine)
    assert (finding.state, finding.values["held_by"]) == (State.WRONG, ["minicom (pid 812)"])


def test_a_port_that_another_users_relod_has_locked(build):
    machine = build(FTDI)
    status = machine.path("/dev/ttyUSB0").stat()
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    lines = f"1: POSIX  ADVISORY  WRITE 5 {place} 0 EOF\n2: FLOCK  ADVISORY  WRITE 913 {place} 0 EOF\n"
    finding = port(build({**FTDI, "/proc/locks": lines, "/proc/913/comm": "relod-device\n"}))
    assert (finding.state, finding.values["held_by"]) == (State.WRONG, ["relod-device (pid 913)"])


def test_an_adapter_that_holds_bytes_back(build):
    finding = port(build({**FTDI, TIMER: "16\n"}))
    assert (finding.state, finding.mend) == (State.NOTE, f"echo 1 | sudo tee {TIMER}")


def test_a_daemon_that_opens_ports(build):
    finding = port(build({**FTDI, "/proc/640/comm": "ModemManager\n"}))
    assert (finding.state, finding.mend) == (State.NOTE, "sudo systemctl disable --now ModemManager")


def test_a_named_port(build, tmp_path):
    missing = devices.check_port(build(FTDI), "/dev/ttyUSB7")
    assert (missing.state, missing.mend) == (State.WRONG, "use one of those there are: /dev/ttyUSB0")
    with pytest.raises(SettingsError, match="neither a serial port nor a socket"):
        devices.check_port(Machine(), str(tmp_path / "dev/ttyUSB0"))
    master, slave = os.openpty()
    try:
        assert devices.check_port(Machine(), os.ttyname(slave)).state is State.OK
    finally:
        os.close(master)
        os.close(slave)


def test_a_named_socket(tmp_path):
    path = tmp_path / "rig.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        assert devices.check_port(Machine(), str(path)).state is State.OK
    assert devices.check_port(Machine(), str(path)).state is State.WRONG
