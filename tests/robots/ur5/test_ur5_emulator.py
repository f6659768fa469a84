"""The emulator in real time: unmodified clients of ur_rtde, each in a process of its own, and each fault once."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvloop

from relod.errors import StartError
from relod.robots.faultserver import ask
from relod.robots.ur5 import controller as controller_module
from relod.robots.ur5.controller import HOME_Q, Controller
from relod.robots.ur5.emulator import EmulatorOptions, EmulatorReady, serve
from relod.robots.ur5.ports import PORTS
from relod.robots.ur5.rtde import MessageDecoder, MessageType, encode
from relod.robots.ur5.script import Instruction
from relod.robots.ur5.states import ArmSettings
from relod.runtime.clock import NS_PER_S, monotonic_ns, sleep_s

CLIENT_LIMIT_S = 30.0

# What every client begins with. `out` is what it has to say, printed at its end.
CLIENT = """
import json, os, signal, sys, time
from dashboard_client import DashboardClient
from rtde_control import RTDEControlInterface
from rtde_receive import RTDEReceiveInterface
from relod.robots.faultserver import ask
host, control_socket = sys.argv[1:]
do = lambda op, **fields: ask(control_socket, op, **fields)
out = {}
turn = [0.5, 0, 0, 0, 0, 0]
def until(good, limit_s=10.0):
    end = time.monotonic() + limit_s
    while not good():
        if time.monotonic() > end:
            raise SystemExit(f"never: {good.__code__.co_firstlineno}")
        time.sleep(0.002)
def refused(call, *arguments):
    try:
        call(*arguments)
    except RuntimeError as error:
        return str(error)
def finish():
    print(json.dumps(out), flush=True)
    os._exit(0)  # its destructors take a second
"""


@dataclass
class Emulator:
    """An emulator in a thread."""

    host: str
    control: Path

    def ask(self, op: str, **fields: object) -> dict[str, Any]:
        return ask(self.control, op, **fields)

    def start_client(self, code: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", CLIENT + code, self.host, str(self.control)], stdout=subprocess.PIPE, text=True
        )

    def run_client(self, code: str) -> dict[str, Any]:
        """What a client says that runs to its end."""
        client = self.start_client(code + "\nfinish()")
        try:
            said, _ = client.communicate(timeout=CLIENT_LIMIT_S)
        finally:
            client.kill()
        assert client.returncode == 0, said
        result: dict[str, Any] = json.loads(said)
        return result

    def wait_for(self, name: str, value: object, limit_s: float = 10.0) -> None:
        deadline_ns = monotonic_ns() + int(limit_s * NS_PER_S)
        while (state := self.ask("state"))[name] != value:
            assert monotonic_ns() < deadline_ns, state
            sleep_s(0.005)

    def connect(self, port: int) -> socket.socket:
        return socket.create_connection((self.host, port), 2.0)

    def connect_soon(self, port: int) -> socket.socket:
        deadline_ns = monotonic_ns() + 10 * NS_PER_S
        while True:
            try:
                return self.connect(port)
            except ConnectionRefusedError:
                assert monotonic_ns() < deadline_ns
                sleep_s(0.01)


@contextmanager
def running(folder: Path, settings: ArmSettings | None = None, *, motion_log: Path | None = None) -> Iterator[Emulator]:
    """An emulator on the first free address; ended properly."""
    stop, ready = asyncio.Event(), threading.Event()
    found: list[EmulatorReady | BaseException] = []
    loops: list[asyncio.AbstractEventLoop] = []
    options = EmulatorOptions(control=folder / "control", motion_log=motion_log)

    async def live() -> None:
        loops.append(asyncio.get_running_loop())
        controller = Controller(settings or ArmSettings(), start_ns=monotonic_ns())
        await serve(controller, options, on_ready=lambda where: (found.append(where), ready.set()), stop=stop)

    def body() -> None:
        try:
            uvloop.run(live())
        except BaseException as error:
            found.append(error)
            ready.set()
            raise

    thread = threading.Thread(target=body, name="emulator")
    thread.start()
    try:
        assert ready.wait(5.0)
        where = found[0]
        assert isinstance(where, EmulatorReady), where
        yield Emulator(where.host, folder / "control")
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join(5.0)
        assert not thread.is_alive()


@pytest.fixture
def emulator(tmp_path: Path) -> Iterator[Emulator]:
    with running(tmp_path) as started:
        yield started


# ur_rtde


@pytest.mark.slow
def test_the_arm_moves_and_stops_for_an_unmodified_client(emulator: Emulator) -> None:
    said = emulator.run_client("""
d = DashboardClient(host)
d.connect()
r = RTDEReceiveInterface(host)
c = RTDEControlInterface(host)
out["dashboard"] = [d.polyscopeVersion(), d.robotmode(), d.safetymode(), d.running(), d.programState()]
out["start"] = r.getActualQ()
out["states"] = [r.getRobotMode(), r.getSafetyMode(), r.getRuntimeState(), r.getSafetyStatusBits(), r.getRobotStatus()]
out["told"] = [c.speedJ(turn, 1.4, 0.0) for _ in range(3)]
until(lambda: abs(r.getActualQd()[0] - 0.5) < 0.001)
out["stopped"] = c.speedStop(10.0)
until(lambda: abs(r.getActualQd()[0]) < 0.001)
q = r.getTargetQ()
moved = lambda: r.getTargetQ()[0] - q[0]
out["moved"] = c.moveJ([q[0] + 0.2, *q[1:]], 1.05, 1.4)
until(lambda: abs(moved() - 0.2) < 1e-9)
out["began"] = c.moveJ([q[0] + 0.4, *q[1:]], 0.4, 1.4, True)
out["progress"] = c.getAsyncOperationProgress()
until(lambda: c.getAsyncOperationProgress() < 0)
until(lambda: abs(moved() - 0.4) < 1e-9)
c.moveJ([q[0] + 2.4, *q[1:]], 0.5, 1.4, True)
until(lambda: moved() > 0.45)
c.stopJ(5.0)
until(c.isSteady)
out["stopped short"] = moved()
while moved() < 2.39:
    c.servoJ([q[0] + 2.4, *q[1:]], 0, 0, 0.008, 0.1, 300)
    time.sleep(0.008)
out["servoed"] = c.servoStop()
until(c.isSteady)
out["pose"] = [c.getForwardKinematics(), r.getActualTCPPose()]
out["within"] = c.isJointsWithinSafetyLimits(q)
c.stopScript()
out["after"] = [c.isProgramRunning(), c.speedJ(turn, 1.4, 0.0)]
c.reuploadScript()
until(c.isProgramRunning)
until(lambda: c.speedJ(turn, 1.4, 0.0))
""")
    modes = ["Robotmode: RUNNING", "Safetymode: NORMAL", True, "PLAYING rtde_control"]
    assert said["dashboard"] == ["3.15.8.106339", *modes]
    assert said["start"] == list(HOME_Q)
    assert said["states"] == [7, 1, 2, 1, 3]
    assert said["told"] == [True] * 3
    assert said["stopped"] is True
    assert (said["moved"], said["began"], said["servoed"]) == (True, True, True)
    assert said["progress"] >= 0
    assert 0.45 < said["stopped short"] < 2.3
    assert said["pose"][0] == pytest.approx(said["pose"][1], abs=1e-4)
    assert said["within"] is True
    assert said["after"] == [False, False]
    state = emulator.ask("state")
    assert state["refused_packages"] == state["missed_packages"] == 0


@pytest.mark.slow
def test_an_e_series_serves_the_same_client(tmp_path: Path) -> None:
    with running(tmp_path, ArmSettings(series="e")) as emulator:
        said = emulator.run_client("""
c = RTDEControlInterface(host)
r = RTDEReceiveInterface(host)
d = DashboardClient(host)
d.connect()
out["dashboard"] = [d.getSerialNumber().isdigit(), d.isInRemoteControl()]
c.speedJ(turn, 1.4, 0.0)
until(lambda: r.getActualQd()[0] > 0.45)
out["stopped"] = c.speedStop()
d.disconnect()
do("remote_control", on=False)
out["local"] = refused(RTDEControlInterface, host)
""")
        assert said["dashboard"] == [True, True]
        assert said["stopped"] is True
        assert "remote control" in said["local"]


@pytest.mark.slow
def test_a_protective_stop_is_seen_unlocked_and_recovered_from(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller_module, "PROTECTIVE_STOP_NS", NS_PER_S)  # five seconds with a real one
    said = emulator.run_client("""
d = DashboardClient(host)
d.connect()
r = RTDEReceiveInterface(host)
c = RTDEControlInterface(host)
c.speedJ(turn, 1.4, 0.0)
until(lambda: r.getActualQd()[0] > 0.4)
do("protective_stop")
until(r.isProtectiveStopped)
until(lambda: abs(r.getActualQd()[0]) < 0.01)
out["told"] = [c.speedJ(turn, 1.4, 0.0), c.speedStop(), r.getRuntimeState(), r.getSafetyMode()]
out["early"] = refused(d.unlockProtectiveStop)
time.sleep(1.1)
out["late"] = refused(d.unlockProtectiveStop)
until(lambda: not r.isProtectiveStopped())
out["paused"] = r.getRuntimeState()
c.reuploadScript()
until(lambda: c.isProgramRunning() and c.speedJ([0, 0.4, 0, 0, 0, 0], 1.4, 0.0))
until(lambda: r.getActualQd()[1] > 0.3)
""")
    assert said["told"] == [False, False, 4, 3]
    assert "5s" in said["early"]
    assert said["late"] is None
    assert said["paused"] == 4


@pytest.mark.slow
def test_an_emergency_stop_and_the_way_back(emulator: Emulator) -> None:
    said = emulator.run_client("""
d = DashboardClient(host)
d.connect()
r = RTDEReceiveInterface(host)
c = RTDEControlInterface(host)
do("emergency_stop", pressed=True)
until(r.isEmergencyStopped)
out["stopped"] = [c.moveJ([0, -1, 1, -1, -1, 0]), r.getRobotMode(), r.getRuntimeState()]
do("emergency_stop", pressed=False)
d.closeSafetyPopup()
d.powerOn()
until(lambda: r.getRobotMode() == 5)
d.brakeRelease()
until(lambda: r.getRobotMode() == 7)
c.reuploadScript()
until(c.isProgramRunning)
out["moves"] = c.moveJ([0.1, *r.getActualQ()[1:]], 1.0, 2.0)
""")
    assert said["stopped"] == [False, 3, 1]
    assert said["moves"] is True


@pytest.mark.slow
def test_the_watchdog_stops_the_arm_of_a_client_that_was_killed(emulator: Emulator) -> None:
    client = emulator.start_client("""
c = RTDEControlInterface(host)
c.setWatchdog(10.0)
while True:
    c.speedJ(turn, 1.4, 0.0)
    print(flush=True)
    time.sleep(0.04)
""")
    assert client.stdout is not None
    for _ in range(20):
        client.stdout.readline()
    assert not emulator.ask("state")["standing"]
    killed_ns = monotonic_ns()
    client.send_signal(signal.SIGKILL)
    client.communicate()
    emulator.wait_for("standing", True)
    records = emulator.ask("motion_log")["records"]
    assert records[-1]["asked_rad_s"] == 0.0
    assert records[-1]["t_ns"] - killed_ns < 0.3 * NS_PER_S
    assert any("its watchdog was not fed" in text for _, text in emulator.ask("state")["notes"])


@pytest.mark.slow
def test_a_lost_connection_is_seen_and_can_be_made_again(emulator: Emulator) -> None:
    said = emulator.run_client("""
r = RTDEReceiveInterface(host)
out["again"] = []
for _ in range(10):
    do("drop")
    until(lambda: not r.isConnected())
    out["again"].append(r.reconnect())
    before = r.getTimestamp()
    until(lambda: r.getTimestamp() > before)
do("hang_up", seconds=2)
until(lambda: not r.isConnected())
out["off"] = refused(r.reconnect)
until(lambda: not refused(r.reconnect))
out["back"] = r.isConnected()
""")
    assert said["again"] == [True] * 10
    assert said["off"]
    assert said["back"] is True


@pytest.mark.slow
def test_a_client_that_lost_its_connection_is_replaced_by_another(emulator: Emulator) -> None:
    """The control class cannot be trusted after a loss: the process is killed, and its successor drives on."""
    for _ in range(3):
        client = emulator.start_client("""
c = RTDEControlInterface(host)
print(c.speedJ(turn, 1.4, 0.0), flush=True)
time.sleep(20)
""")
        assert client.stdout is not None
        assert client.stdout.readline() == "True\n"
        emulator.ask("drop", servers=["rtde"])
        client.kill()
        client.communicate()
    emulator.wait_for("connections", [])


@pytest.mark.slow
@pytest.mark.parametrize("names", [["input_int_register_0"], ["input_double_register_3", "input_int_register_1"]])
def test_registers_of_another_client_are_refused(emulator: Emulator, names: list[str]) -> None:
    emulator.ask("claim", names=names)
    said = emulator.run_client("""
out["refused"] = refused(RTDEControlInterface, host)
do("claim", names=[])
out["granted"] = RTDEControlInterface(host).isConnected()
""")
    assert "already in use" in said["refused"]
    assert said["granted"] is True


@pytest.mark.slow
def test_a_stall_freezes_what_is_seen_and_passes(emulator: Emulator) -> None:
    said = emulator.run_client("""
r = RTDEReceiveInterface(host)
do("stall", seconds=1.5)
time.sleep(0.3)
held = r.getTimestamp()
time.sleep(0.3)
out["held"] = r.getTimestamp() - held
out["connected"] = r.isConnected()
until(lambda: r.getTimestamp() > held + 1.0)
""")
    assert said == {"held": 0.0, "connected": True}


# Wires


def read_line(connection: socket.socket) -> str:
    with connection.makefile("rb") as lines:
        return lines.readline().decode().strip()


def test_the_dashboard_greets_and_answers(emulator: Emulator) -> None:
    with emulator.connect(29999) as client, client.makefile("rwb") as lines:

        def say(text: str) -> str:
            lines.write(text.encode() + b"\n")
            lines.flush()
            return lines.readline().decode().strip()

        assert lines.readline() == b"Connected: Universal Robots Dashboard Server\n"
        assert say("robotmode") == "Robotmode: RUNNING"
        assert say("RobotMode") == "Robotmode: RUNNING"
        assert say("play") == "Failed to execute: play"
        assert say("unlock protective stop").startswith("Cannot unlock")
        assert say("popup hello") == "showing popup"
        assert say("dance") == "could not understand: 'dance'"
        emulator.ask("mute", on=True)
        lines.write(b"robotmode\n")
        lines.flush()
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.recv(1)
        emulator.ask("mute", on=False)
    with emulator.connect(29999) as client:
        assert "Connected" in read_line(client)
        client.sendall(b"quit\n")
        assert read_line(client) == "Disconnected"
        assert client.recv(1) == b""


@pytest.mark.parametrize(
    ("port", "data"), [(30004, b"GET / HTTP/1.0\r\n\r\n"), (29999, b"x" * 5000), (30002, b"def x():\n" * 200_000)]
)
def test_a_client_that_makes_no_sense_loses_its_connection_only(emulator: Emulator, port: int, data: bytes) -> None:
    with emulator.connect(port) as client:
        try:
            client.sendall(data)
            while client.recv(100):
                pass
        except ConnectionError:
            pass
    emulator.wait_for("connections", [])
    assert any("connection cut" in text for _, text in emulator.ask("state")["notes"])


def test_data_packages_come_every_8_ms(emulator: Emulator) -> None:
    with emulator.connect(30004) as client:
        client.sendall(
            encode(MessageType.OUTPUTS, struct.pack(">d", 125.0) + b"timestamp,") + encode(MessageType.START)
        )
        decoder, packages = MessageDecoder(), []
        while len(packages) < 60:
            packages += [m.body for m in decoder.feed(client.recv(4096)) if m.type is MessageType.DATA]
    stamps = [struct.unpack(">Bd", body)[1] for body in packages]
    assert [b - a for a, b in itertools.pairwise(stamps)] == pytest.approx([0.008] * (len(stamps) - 1))


def test_a_client_that_does_not_read_misses_packages_and_holds_nobody_up(emulator: Emulator) -> None:
    request = struct.pack(">d", 125.0) + b",".join([b"actual_q"] * 1300) + b","
    with emulator.connect(30004) as sleeper, emulator.connect(30004) as reader:
        sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for client in (sleeper, reader):
            client.sendall(encode(MessageType.OUTPUTS, request) + encode(MessageType.START))
        deadline_ns = monotonic_ns() + 5 * NS_PER_S
        while not emulator.ask("state")["missed_packages"]:
            assert reader.recv(1 << 20)
            assert monotonic_ns() < deadline_ns


def test_a_frozen_controller_hears_and_says_nothing_for_a_while(emulator: Emulator) -> None:
    with emulator.connect(29999) as client:
        read_line(client)
        frozen_ns = monotonic_ns()
        emulator.ask("freeze", seconds=0.3)
        client.sendall(b"robotmode\n")
        with emulator.connect(29999) as newcomer:
            for connection, words in ((client, "Robotmode: RUNNING"), (newcomer, "Connected")):
                assert words in read_line(connection)
                assert monotonic_ns() - frozen_ns >= 0.3 * NS_PER_S


def test_a_controller_that_is_switched_off_refuses_and_comes_back(emulator: Emulator) -> None:
    clients = [emulator.connect(port) for ports in PORTS.values() for port in ports]
    emulator.wait_for("connections", ["dashboard", "script", "script", "script", "rtde"])
    emulator.ask("hang_up", seconds=1.0, servers=["dashboard", "script"])
    emulator.wait_for("connections", ["rtde"])
    for port in (29999, 30001, 30002, 30003):
        with pytest.raises(ConnectionRefusedError):
            emulator.connect(port)
    emulator.connect(30004).close()
    sleep_s(1.0)
    for port in (29999, 30001, 30002, 30003):
        emulator.connect_soon(port).close()
    for client in clients:
        client.close()


def test_two_emulators_stand_side_by_side(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    with running(tmp_path / "a") as first, running(tmp_path / "b") as second:
        assert first.host != second.host
        first.ask("protective_stop")
        assert second.ask("state")["safety_mode"] == "NORMAL"


def test_an_address_that_is_taken_is_named(emulator: Emulator) -> None:
    async def another() -> None:
        controller = Controller(ArmSettings(), start_ns=monotonic_ns())
        options = EmulatorOptions(host=emulator.host)
        await serve(controller, options, on_ready=lambda _: None, stop=asyncio.Event())

    with pytest.raises(StartError, match=f"cannot listen on {emulator.host}"):
        asyncio.run(another())


@pytest.mark.parametrize("watched", [True, False])
def test_the_emulator_outlives_its_end_until_the_arm_stands_and_writes_its_log(tmp_path: Path, watched: bool) -> None:
    """It stops nothing itself: the log is to show what the clients' death alone did."""
    log = tmp_path / "motion.jsonl"
    with running(tmp_path, motion_log=log) as emulator:
        with emulator.connect(30003) as client, emulator.connect(30004) as rtde:
            client.sendall(b"def rtde_control():\n  x = 1\nend\n")
            emulator.wait_for("runtime_state", "PLAYING")
            names = ["input_int_register_0", *(f"input_double_register_{i}" for i in range(8))]
            rtde.sendall(encode(MessageType.INPUTS, ",".join([*names, ""]).encode()))

            def send(command: int, *values: float) -> None:
                rtde.sendall(
                    encode(MessageType.DATA, struct.pack(">Bi8d", 1, command, *values, *[0.0] * (8 - len(values))))
                )

            if watched:
                send(Instruction.SET_WATCHDOG, 10.0)
                emulator.wait_for("int_out", [2, 0, 1 << 16])
            send(Instruction.SPEED_J, 0.5, 0, 0, 0, 0, 0, 10.0)
            emulator.wait_for("standing", False)
        ended_ns = monotonic_ns()
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert records[0]["asked_rad_s"] == 0.5
    if watched:
        assert (records[-1]["asked_rad_s"], records[-1]["speed_rad_s"]) == (0.0, pytest.approx(0.0, abs=0.01))
    else:
        assert len(records) == 1
        assert monotonic_ns() - ended_ns >= NS_PER_S


# The control socket


@pytest.mark.parametrize(
    ("op", "fields", "name", "value"),
    [
        ("protective_stop", {}, "safety_mode", "PROTECTIVE_STOP"),
        ("emergency_stop", {"pressed": True}, "safety_mode", "ROBOT_EMERGENCY_STOP"),
        ("safeguard", {"open": True}, "safety_mode", "SAFEGUARD_STOP"),
        ("violation", {}, "safety_mode", "VIOLATION"),
        ("joint_limits", {"low": [0.0] * 6, "high": [1.0] * 6}, "safety_mode", "NORMAL"),  # at rest it may be anywhere
        ("place", {"q": [1.0, -1.0, 1.0, -1.0, -1.0, 0.5]}, "q", [1.0, -1.0, 1.0, -1.0, -1.0, 0.5]),
    ],
)
def test_what_the_control_socket_does(
    emulator: Emulator, op: str, fields: dict[str, Any], name: str, value: object
) -> None:
    emulator.ask(op, **fields)
    assert emulator.ask("state")[name] == value


@pytest.mark.parametrize(
    ("op", "fields", "words"),
    [
        ("explode", {}, "explode"),
        ("stall", {"seconds": 0}, "seconds"),
        ("place", {"q": [0.0] * 5}, "length 6"),
        ("claim", {"names": ["input_int_register_99"]}, "input_int_register_99"),
        ("drop", {"servers": ["coffee"]}, "coffee"),
        ("camera_stall", {"seconds": 1}, "no camera"),
    ],
)
def test_what_the_control_socket_refuses(emulator: Emulator, op: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        emulator.ask(op, **fields)
    assert emulator.ask("state")["safety_mode"] == "NORMAL"
