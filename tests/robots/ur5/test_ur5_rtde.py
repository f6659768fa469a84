"""RTDE: framing, recipes, and the controller's end of a connection."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relod.robots.ur5.arm import SpeedJ
from relod.robots.ur5.controller import HOME_Q, Controller
from relod.robots.ur5.outputs import INPUTS, OUTPUTS, tcp_pose
from relod.robots.ur5.rtde import FORMATS, Message, MessageDecoder, MessageType, Recipe, encode
from relod.robots.ur5.rtdesession import Claims, RtdeSession
from relod.robots.ur5.states import ArmSettings
from relod.runtime.clock import NS_PER_MS

TICK_NS = 8 * NS_PER_MS
NUMBERS = {
    "?": st.booleans(),
    "B": st.integers(0, 255),
    "I": st.integers(0, 2**32 - 1),
    "Q": st.integers(0, 2**64 - 1),
    "i": st.integers(-(2**31), 2**31 - 1),
    "d": st.floats(allow_nan=False),
}

messages = st.builds(Message, type=st.sampled_from(MessageType), body=st.binary(max_size=300))


@given(st.lists(messages, max_size=8), st.lists(st.integers(0, 2000), max_size=8))
def test_messages_survive_any_cut_of_the_stream(sent: list[Message], cuts: list[int]) -> None:
    stream = b"".join(encode(message.type, message.body) for message in sent)
    decoder, received = MessageDecoder(), []
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    for start, end in itertools.pairwise(edges):
        received += decoder.feed(stream[start:end])
    assert received == sent


@pytest.mark.parametrize("stream", [b"\0\2V", b"\0\0\0", b"\0\5Z\0\0", b"GET / HTTP/1.0\r\n"])
def test_what_is_not_rtde_is_refused(stream: bytes) -> None:
    with pytest.raises(ValueError, match=r"RTDE|MessageType"):
        MessageDecoder().feed(stream)


def test_a_message_must_fit_its_header() -> None:
    assert len(encode(MessageType.TEXT, bytes(0xFFFF - 3))) == 0xFFFF
    with pytest.raises(ValueError, match="65536"):
        encode(MessageType.TEXT, bytes(0xFFFF - 2))


@given(st.data())
def test_recipes_pack_and_unpack_every_type(data: st.DataObject) -> None:
    types = data.draw(st.lists(st.sampled_from(sorted(FORMATS)), min_size=1, max_size=10))
    recipe = Recipe([f"v{i}" for i in range(len(types))], types)
    numbers = tuple(
        data.draw(NUMBERS[FORMATS[kind][-1]])
        for kind, place in zip(types, recipe.places, strict=True)
        for _ in range(place.stop - place.start)
    )
    packed = recipe.pack(numbers)
    assert recipe.unpack(packed) == numbers
    assert recipe.count == len(numbers)
    with pytest.raises(ValueError, match="bytes"):
        recipe.unpack(packed + b"\0")


# The tool


def reference_pose(q: Sequence[float]) -> tuple[list[float], np.ndarray]:
    """Denavit and Hartenberg's way, with the UR5's table: position and rotation matrix in the base frame."""
    a, d = (0, -0.425, -0.39225, 0, 0, 0), (0.089159, 0, 0, 0.10915, 0.09465, 0.0823)
    alpha = (math.pi / 2, 0, 0, math.pi / 2, -math.pi / 2, 0)
    pose = np.eye(4)
    for i in range(6):
        c, s, ca, sa = math.cos(q[i]), math.sin(q[i]), math.cos(alpha[i]), math.sin(alpha[i])
        pose = pose @ [[c, -s * ca, s * sa, a[i] * c], [s, c * ca, -c * sa, a[i] * s], [0, sa, ca, d[i]], [0, 0, 0, 1]]
    return list(pose[:3, 3]), pose[:3, :3]


def matrix_of(vector: Sequence[float]) -> np.ndarray:
    """Rodrigues' formula."""
    angle = math.sqrt(sum(v * v for v in vector))
    if angle == 0:
        return np.eye(3)
    x, y, z = (v / angle for v in vector)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


@given(st.tuples(*(st.floats(-2 * math.pi, 2 * math.pi) for _ in range(6))))
def test_the_tools_pose_is_the_kinematic_chains(q: tuple[float, ...]) -> None:
    position, rotation = reference_pose(q)
    pose = tcp_pose(q)
    assert pose[:3] == pytest.approx(position, abs=1e-9)
    assert matrix_of(pose[3:]) == pytest.approx(rotation, abs=1e-6)
    assert math.sqrt(sum(v * v for v in pose[3:])) <= math.pi + 1e-9


# A session


class Client:
    """A client of a session, without a socket."""

    def __init__(self, controller: Controller, claims: Claims | None = None) -> None:
        self.controller = controller
        self.session = RtdeSession(controller, {} if claims is None else claims)

    def ask(self, kind: str, body: bytes = b"") -> bytes:
        """The body of the one reply."""
        (reply,) = MessageDecoder().feed(self.session.receive(encode(MessageType(ord(kind)), body), self.now_ns))
        assert reply.type == ord(kind)
        return reply.body

    def tell(self, body: bytes) -> None:
        assert self.session.receive(encode(MessageType.DATA, body), self.now_ns) == b""

    def outputs(self, *names: str, frequency_hz: float = 125.0) -> bytes:
        return self.ask("O", struct.pack(">d", frequency_hz) + ",".join([*names, ""]).encode())

    def inputs(self, *names: str) -> bytes:
        return self.ask("I", ",".join([*names, ""]).encode())

    @property
    def now_ns(self) -> int:
        return self.controller.now_ns

    def packages(self, ticks: int) -> list[bytes]:
        """Bodies of the data packages of the next ticks; empty where there was none."""
        samples = self.controller.advance(self.now_ns + ticks * TICK_NS)
        packages = [self.session.package(sample) for sample in samples]
        return [package[3:] for package in packages]


@pytest.fixture
def controller() -> Controller:
    return Controller(ArmSettings(lag_ms=0.0), start_ns=0)


def test_the_handshake_is_the_protocols_byte_for_byte(controller: Controller) -> None:
    session = RtdeSession(controller, {})
    assert session.receive(bytes.fromhex("0005560002"), 0) == bytes.fromhex("00045601")
    assert session.receive(bytes.fromhex("0005560001"), 0) == bytes.fromhex("00045600")
    assert session.receive(bytes.fromhex("000376"), 0) == bytes.fromhex("00137600000003 0000000f 00000008 00019f63")
    assert session.receive(bytes.fromhex("000353"), 0) == bytes.fromhex("00045300")  # nothing to start
    assert session.receive(bytes.fromhex("000350"), 0) == bytes.fromhex("00045001")


def test_outputs_come_at_each_tick_in_the_order_asked_for(controller: Controller) -> None:
    client = Client(controller)
    assert client.outputs("timestamp", "robot_mode", "actual_q", "runtime_state") == b"\1DOUBLE,INT32,VECTOR6D,UINT32"
    assert client.packages(2) == [b"", b""]
    assert client.ask("S") == b"\1"
    controller.begin(SpeedJ(qd=(0.5, 0, 0, 0, 0, 0), acceleration=1000.0), client.now_ns)
    packages = [struct.unpack(">Bdi6dI", body) for body in client.packages(3)]
    assert [package[:3] for package in packages] == [(1, 0.024, 7), (1, 0.032, 7), (1, 0.04, 7)]
    assert [package[3] for package in packages] == pytest.approx([0.0, 0.004, 0.008])
    assert packages[0][4:9] == HOME_Q[1:]
    assert packages[0][9] == 1
    assert client.ask("P") == b"\1"
    assert client.packages(1) == [b""]


def test_outputs_come_as_often_as_asked_for(controller: Controller) -> None:
    client = Client(controller)
    client.outputs("timestamp", frequency_hz=25.0)
    client.ask("S")
    assert [bool(package) for package in client.packages(10)] == [False] * 4 + [True] + [False] * 4 + [True]


def test_a_variable_that_is_not_there_is_named(controller: Controller) -> None:
    client = Client(controller)
    assert client.outputs("timestamp", "ft_raw_wrench") == b"\0DOUBLE,NOT_FOUND"  # only since 5.9
    assert client.ask("S") == b"\0"
    newer = Client(Controller(ArmSettings(series="e"), start_ns=0))
    assert newer.outputs("timestamp", "ft_raw_wrench") == b"\1DOUBLE,VECTOR6D"
    assert newer.outputs("actual_current_as_torque") == b"\0NOT_FOUND"  # only since 5.23


def test_every_output_can_be_read(controller: Controller) -> None:
    client = Client(controller)
    names = [name for name in OUTPUTS if "NOT_FOUND" not in client.outputs(name).decode()]
    assert len(names) > 200
    for name in names:
        client.outputs(name)
        client.ask("S")
        assert client.packages(1) != [b""]


def test_inputs_are_written_to_the_registers(controller: Controller) -> None:
    client = Client(controller)
    assert client.inputs("input_int_register_0", "input_double_register_7") == b"\1INT32,DOUBLE"
    assert client.inputs("input_int_register_1") == b"\2INT32"
    client.tell(struct.pack(">Bid", 1, -5, 0.25))
    client.tell(struct.pack(">Bi", 2, 77))
    assert controller.registers.int_in[:2] == [-5, 77]
    assert controller.registers.double_in[7] == 0.25
    client.outputs("input_int_register_1")
    client.ask("S")
    assert client.packages(1) == [struct.pack(">Bi", 1, 77)]


@pytest.mark.parametrize("body", [b"", b"\1", b"\1" + bytes(5), b"\0" + bytes(4), b"\2" + bytes(4)])
def test_a_data_package_that_does_not_fit_is_dropped(controller: Controller, body: bytes) -> None:
    client = Client(controller)
    client.inputs("input_int_register_0")
    client.tell(struct.pack(">Bi", 1, 3))
    client.tell(body)
    assert controller.registers.int_in[0] == 3
    assert client.session.refused == 1


def test_a_register_belongs_to_one_connection_at_a_time(controller: Controller) -> None:
    claims: Claims = {}
    first, second = Client(controller, claims), Client(controller, claims)
    assert first.inputs("input_int_register_0") == b"\1INT32"
    assert first.inputs("input_int_register_0", "input_int_register_1") == b"\2INT32,INT32"
    assert second.inputs("input_int_register_0", "input_int_register_2") == b"\0IN_USE,INT32"
    assert second.inputs("input_int_register_2") == b"\1INT32"
    first.session.close()
    assert second.inputs("input_int_register_0") == b"\2INT32"


def test_an_input_that_is_not_there_makes_no_recipe(controller: Controller) -> None:
    client = Client(controller)
    assert client.inputs("input_int_register_48") == b"\0NOT_FOUND"
    assert client.inputs(*list(INPUTS)[:3])[0] == 1


@pytest.mark.parametrize("body", [b"", struct.pack(">d", 0.0), struct.pack(">d", math.nan), bytes(8) + b"\xff"])
def test_a_senseless_request_for_outputs_is_refused(controller: Controller, body: bytes) -> None:
    with pytest.raises(ValueError, match=r"outputs|Hz|decode"):
        Client(controller).ask("O", body)


@given(st.lists(messages, max_size=6))
def test_nothing_that_is_framed_right_breaks_a_session(sent: list[Message]) -> None:
    """Whatever it holds: replies or ValueError."""
    session = RtdeSession(Controller(ArmSettings(), start_ns=0), {})
    for message in sent:
        try:
            session.receive(encode(message.type, message.body), 0)
        except ValueError:
            return
