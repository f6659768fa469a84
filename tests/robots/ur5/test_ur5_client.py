from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from relod.robots.ur5 import client
from relod.robots.ur5.client import Lost, Plan, Session
from relod.runtime.clock import NS_PER_S, monotonic_ns, sleep_s

PLAN = Plan(
    address="127.0.0.9",
    acceleration_rad_s2=1.4,
    stop_rad_s2=4.0,
    hold_ms=60.0,
    watchdog_hz=10.0,
    connect_limit_s=5.0,
)
STAND = (0.0,) * 6
GO = (0.1, -0.2, 0.0, 0.3, 0.0, 0.0)


@dataclass
class FakeController:
    """Sends a packet every 8 ms from a thread of its own; speeds are reached at once."""

    speeds: tuple[float, ...] = STAND
    angles: tuple[float, ...] = tuple(map(float, range(6)))
    robot_mode: int = 7
    safety_mode: int = 1
    runtime_state: int = 2
    silent: bool = False
    repeats: bool = False  # one packet again and again
    burst: int = 1  # packets are held back until there are so many
    receives: bool = True
    controls: bool = True
    refuses: bool = False
    stiff: bool = False  # the arm goes on as it was
    calls: list[tuple[str, tuple[float, ...], float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.wire, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.theirs.setblocking(False)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.send)
        self.thread.start()

    def send(self) -> None:
        number, held = 0, []
        while not self.stop.wait(0.008):
            if self.silent:
                continue
            number += not self.repeats
            modes = (self.robot_mode, self.safety_mode, self.runtime_state, 1.0)
            held.append((*self.angles, *self.speeds, *self.angles, *self.speeds, 0.008 * number, *modes))
            if len(held) >= self.burst:
                self.wire.send(json.dumps(held).encode())
                held = []

    # What `listener.StateListener` offers.

    def fileno(self) -> int:
        return self.theirs.fileno()

    def read(self) -> list[tuple[float, ...]]:
        if not self.receives:
            raise ConnectionResetError("it hung up")
        found: list[tuple[float, ...]] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found += map(tuple, json.loads(self.theirs.recv(65_536)))
        return found

    def close(self) -> None:
        self.stop.set()
        self.thread.join()
        self.wire.close()
        self.theirs.close()


Make = Callable[..., FakeController]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes controllers, and ends their threads."""
    with contextlib.ExitStack() as stack:

        def made(**fields: object) -> FakeController:
            controller = FakeController(**fields)
            stack.callback(controller.close)
            return controller

        yield made


class FakeControl:
    def __init__(self, controller: FakeController) -> None:
        self.controller = controller

    def isConnected(self) -> bool:
        return self.controller.controls

    def speedJ(self, qd: list[float], acceleration: float, duration_s: float) -> bool:
        assert type(qd) is list
        assert len(qd) == 6
        assert duration_s == 0.0
        self.controller.calls.append(("speedJ", tuple(qd), acceleration))
        if self.controller.refuses:
            return False
        if not self.controller.stiff:
            self.controller.speeds = tuple(qd)
        return True

    def setWatchdog(self, frequency_hz: float) -> bool:
        self.controller.calls.append(("setWatchdog", (), frequency_hz))
        return True

    def stopScript(self) -> None:
        self.controller.calls.append(("stopScript", (), 0.0))


@dataclass
class Running:
    controller: FakeController
    wire: socket.socket
    thread: threading.Thread
    lost: list[str]

    def order(self, speeds: tuple[float, ...]) -> None:
        self.wire.send(client.ORDER.pack(*speeds))

    def states(self, duration_s: float) -> list[tuple[float, ...]]:
        """What the driver would hear."""
        self.wire.settimeout(0.05)
        found = []
        end_ns = monotonic_ns() + int(duration_s * NS_PER_S)
        while monotonic_ns() < end_ns:
            with contextlib.suppress(TimeoutError):
                message = self.wire.recv(4096)
                assert message[:1] == client.STATE
                found.append(client.STATE_BYTES.unpack(message[1:]))
        return found

    def wait_until_lost(self) -> str:
        self.thread.join(2.0)
        assert not self.thread.is_alive()
        return self.lost[0] if self.lost else ""


@contextlib.contextmanager
def running(controller: FakeController) -> Iterator[Running]:
    wire, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lost: list[str] = []
    session = Session(controller, FakeControl(controller), theirs, PLAN)

    def body() -> None:
        try:
            session.run()
        except Lost as loss:
            lost.append(str(loss))

    thread = threading.Thread(target=body)
    thread.start()
    try:
        yield Running(controller, wire, thread, lost)
    finally:
        wire.close()
        thread.join(2.0)
        theirs.close()
        assert not thread.is_alive()


def moves(controller: FakeController) -> list[tuple[float, ...]]:
    return [qd for name, qd, _ in controller.calls if name == "speedJ"]


@pytest.mark.parametrize("burst", [1, 3])
def test_every_packet_is_passed_on_once(make: Make, burst: int) -> None:
    with running(make(burst=burst)) as it:
        states = it.states(0.4)
    numbers = [round(state[1 + 24] / 0.008) for state in states]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 15
    assert states[0][1:7] == tuple(map(float, range(6)))
    assert states[0][-4:] == (7.0, 1.0, 2.0, 1.0)


def test_an_order_is_obeyed_and_repeated_while_it_is_fresh(make: Make) -> None:
    with running(make()) as it:
        for _ in range(5):
            it.order(GO)
            it.states(0.03)
        count = moves(it.controller).count(GO)
    assert count >= 15
    assert {a for name, qd, a in it.controller.calls if name == "speedJ" and qd == GO} == {PLAN.acceleration_rad_s2}


def test_an_old_order_stops_the_arm(make: Make) -> None:
    with running(make()) as it:
        it.order(GO)
        it.states(0.3)
        assert it.controller.speeds == STAND
        assert moves(it.controller).index(STAND) < len(moves(it.controller)) - 10
        assert it.controller.calls[-1] == ("speedJ", STAND, PLAN.stop_rad_s2)


@pytest.mark.parametrize("how", ["asked", "the driver is gone"])
def test_it_leaves_only_when_the_arm_stands(make: Make, how: str) -> None:
    with running(make(stiff=True, speeds=GO)) as it:
        it.order(GO)
        it.states(0.05)
        if how == "asked":
            it.wire.send(client.CLOSE)
        else:
            it.wire.close()
        sleep_s(0.1)
        assert it.thread.is_alive()
        assert moves(it.controller)[-1] == STAND
        it.controller.speeds = STAND
        it.thread.join(0.5)
        assert not it.thread.is_alive()
        assert not it.lost


def test_it_leaves_a_robot_that_does_not_obey_after_a_while(make: Make) -> None:
    with running(make(stiff=True, speeds=GO)) as it:
        it.wire.send(client.CLOSE)
        assert it.wait_until_lost() == ""


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ({"receives": False}, "lost"),
        ({"controls": False}, "for commands"),
        ({"silent": True}, "silent"),
        ({"repeats": True}, "silent"),
        ({"refuses": True}, "refused"),
    ],
)
def test_a_loss_ends_it(make: Make, trouble: dict[str, object], said: str) -> None:
    controller = make()
    with running(controller) as it:
        it.states(0.05)
        for name, value in trouble.items():
            setattr(controller, name, value)
        assert said in it.wait_until_lost()


@pytest.mark.parametrize("trouble", [{"safety_mode": 3}, {"robot_mode": 5}, {"runtime_state": 1}])
def test_a_robot_that_cannot_move_is_only_listened_to(make: Make, trouble: dict[str, int]) -> None:
    """ur_rtde prints a line for every command that it cannot give."""
    controller = make()
    with running(controller) as it:
        it.states(0.05)
        for name, value in trouble.items():
            setattr(controller, name, value)
        it.states(0.05)
        controller.calls.clear()
        it.order(GO)
        assert it.states(0.2)
    assert not moves(controller)


def served(controller: FakeController, error: Exception | None = None) -> list[bytes]:
    """What `serve` says when its driver hangs up a moment later."""
    wire, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def connect(plan: Plan) -> tuple[object, object]:
        if error is not None:
            raise error
        return controller, FakeControl(controller)

    with wire, theirs:
        hang_up = threading.Timer(0.1, wire.shutdown, [socket.SHUT_WR])
        hang_up.start()
        client.serve(theirs, PLAN, connect)
        hang_up.cancel()
        hang_up.join()
        wire.setblocking(False)
        said = []
        with contextlib.suppress(BlockingIOError):
            while message := wire.recv(4096):
                said.append(message)
    return said


@pytest.fixture
def no_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.signal, "setitimer", lambda *_: None)


@pytest.mark.usefixtures("no_alarm")
def test_the_watchdog_is_set_before_anything_is_obeyed_and_the_script_ended_at_last(make: Make) -> None:
    controller = make()
    said = served(controller)
    assert client.READY in said
    assert next(name for name, *_ in controller.calls) == "setWatchdog"
    assert controller.calls[-1][0] == "stopScript"


@pytest.mark.usefixtures("no_alarm")
def test_why_it_cannot_begin_is_told(make: Make) -> None:
    assert served(make(), RuntimeError("in use")) == [client.FAILED + b"in use"]


@pytest.mark.usefixtures("no_alarm")
def test_a_script_that_does_not_play_is_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "START_LIMIT_S", 0.05)
    said = served(make(runtime_state=1))
    assert said[-1][:1] == client.LOST
    assert b"does not play" in said[-1]


def test_values_that_are_no_numbers_are_not_passed_on(make: Make) -> None:
    with running(make(angles=(math.nan,) * 6)) as it:
        assert it.states(0.1) == []
