"""A robot's end of the wire for the tests of the server: raw websocket messages, and a hall that writes down."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from websockets import Subprotocol
from websockets.asyncio.client import ClientConnection, connect

from relod.config import ServerSettings
from relod.runtime.log.format import EncodedFrame
from relod.runtime.messages import encode
from relod.runtime.remote import wire
from relod.runtime.remote.access import robot_proof
from relod.runtime.remote.server import Admission, LearnerServer
from relod.types import EpisodeEnd, FloatArray, Image, Step, TaskSpec

HOST = "127.0.0.1"
RUN = "0" * 32
OTHER_RUN = "1" * 32
SPEC = TaskSpec(
    name="fake",
    robot="none",
    cycle_ns=40_000_000,
    frames=2,
    camera_hw=(2, 3),
    camera_fps=25.0,
    image_hw=(2, 3),
    proprio_names=("x", "y"),
    action_names=("speed",),
    max_steps=100,
    sensor_window=2,
)
WELCOME = wire.Welcome(
    learner="f" * 32,
    run_dir="runs/1",
    algorithm="sac",
    preset="paper",
    agent={},
    seed=0,
    position=None,
    env_steps=0,
    policy_size=4,
    has_policy=False,
    precision="float16",
    proof=b"",
)


def position_of(message: Step | EpisodeEnd) -> tuple[int, int]:
    return message.episode, message.length if isinstance(message, EpisodeEnd) else message.index


@dataclass
class FakeHall:
    """Keeps what it is given; a robot goes on where the newest record of its run is."""

    records: list[tuple[str, Step | EpisodeEnd]] = field(default_factory=list)
    frames: dict[tuple[str, int], bytes] = field(default_factory=dict)
    leavings: list[tuple[str, str]] = field(default_factory=list)
    error: Exception | None = None  # raised by the next call
    acted: list[int] = field(default_factory=list)  # questions answered

    def admit(self, join: wire.Join) -> Admission:
        self._trip()
        mine = [position_of(message) for run, message in self.records if run == join.run]
        return Admission(
            stream=0,
            robot=join.robot,
            run=join.run,
            acts=join.acts,
            spec=join.task,
            codec=join.codec,
            welcome=msgspec.structs.replace(WELCOME, position=max(mine, default=None)),
        )

    def record(self, admission: Admission, message: Step | EpisodeEnd, frames: Mapping[int, EncodedFrame]) -> None:
        self._trip()
        self.records.append((admission.run, message))
        for frame_id, frame in frames.items():
            self.frames[admission.run, frame_id] = bytes(frame.data)

    def act(
        self, admission: Admission, images: tuple[Image, ...], head: wire.Observe, proprio: FloatArray
    ) -> tuple[FloatArray, FloatArray, tuple[int, int]]:
        self._trip()
        self.acted.append(head.ask)
        return np.array([images[-1].mean()], np.float32), proprio, (1, head.ask)

    def left(self, admission: Admission, reason: str) -> None:
        self.leavings.append((admission.robot, reason))

    def _trip(self) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def positions(self, run: str = RUN) -> list[tuple[int, int]]:
        return [position_of(message) for of, message in self.records if of == run]


@dataclass
class Learner:
    """A server on loopback with its hall."""

    server: LearnerServer
    hall: FakeHall
    port: int
    said: list[str]

    @contextlib.asynccontextmanager
    async def socket(self, **options: Any) -> AsyncIterator[ClientConnection]:
        """A websocket that has said nothing yet."""
        options = {"subprotocols": [Subprotocol(wire.SUBPROTOCOL)], **options}
        scheme = "wss" if "ssl" in options else "ws"
        async with connect(f"{scheme}://{HOST}:{self.port}", compression=None, ping_interval=None, **options) as socket:
            yield socket

    @contextlib.asynccontextmanager
    async def robot(self, **choices: Any) -> AsyncIterator[Robot]:
        """A robot that was welcomed."""
        async with self.socket() as socket:
            robot = Robot(socket)
            await robot.join(**choices)
            robot.welcome = await robot.get(wire.Welcome)
            yield robot


async def until(condition: Callable[[], object]) -> None:
    """Wait until something has happened at the other end."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # nobody could set an event
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def learner(
    token: bytes | None = None, *, tls: ssl.SSLContext | None = None, **settings: Any
) -> AsyncIterator[Learner]:
    """A server, closed at the end."""
    hall, said = FakeHall(), []
    server = LearnerServer(hall=hall, settings=ServerSettings(**settings), token=token, tls=tls, say=said.append)
    port = await server.start(HOST, 0)
    try:
        yield Learner(server, hall, port, said)
    finally:
        await server.close(None)


class Robot:
    """The robot's end of one connection, by hand."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.seq = 0
        self.sent_frames: set[int] = set()
        self.welcome: Any = None

    async def join(
        self,
        *,
        robot: str = "one",
        run: str = RUN,
        acts: str = "robot",
        token: bytes | None = None,
        spec: TaskSpec = SPEC,
        codec: str = "raw",
        protocol: int = wire.PROTOCOL,
    ) -> wire.Challenge:
        challenge = await self.get(wire.Challenge)
        nonce = bytes(range(wire.NONCE_BYTES))
        proof = b"" if token is None else robot_proof(token, challenge.nonce, nonce, robot, run)
        await self.send(
            wire.Join(
                protocol=protocol,
                relod="test",
                robot=robot,
                run=run,
                acts=acts,
                task=spec,
                codec=codec,
                algorithm="sac",
                presets={},
                nonce=nonce,
                proof=proof,
            )
        )
        return challenge

    async def send(self, head: Any, payload: bytes = b"") -> None:
        await self.socket.send(wire.pack(head, payload))

    async def record(self, message: Step | EpisodeEnd, *, seq: int | None = None) -> None:
        """Send a record after the frames it names."""
        await self.frames(message.frame_ids)
        self.seq = self.seq + 1 if seq is None else seq
        await self.send(wire.RecordHead(seq=self.seq), encode(message))

    async def frames(self, frame_ids: Sequence[int]) -> None:
        for frame_id in frame_ids:
            if frame_id not in self.sent_frames:
                self.sent_frames.add(frame_id)
                await self.send(wire.FrameHead(id=frame_id, captured_ns=100 * frame_id), pixels(frame_id))

    async def receive(self) -> tuple[Any, memoryview]:
        async with asyncio.timeout(5):
            return wire.unpack_from_learner(await self.socket.recv())

    async def get(self, kind: type[Any]) -> Any:
        """The next message of this kind; others are passed over."""
        while True:
            head, _ = await self.receive()
            if isinstance(head, kind):
                return head

    async def acked(self, seq: int) -> None:
        while (await self.get(wire.Ack)).seq < seq:
            pass

    async def policy(self) -> tuple[tuple[int, int], np.ndarray]:
        """The next whole policy."""
        data = b""
        while True:
            head, payload = await self.receive()
            if isinstance(head, wire.PolicyPart):
                data = bytes(payload) if head.offset == 0 else data + payload
                assert head.offset + len(payload) == len(data)
                if len(data) == head.size * np.dtype(head.precision).itemsize:
                    return head.version, np.frombuffer(data, head.precision)


def pixels(frame_id: int) -> bytes:
    return bytes([frame_id % 256]) * (2 * 3 * 3)
