"""An observation to another process and an action back: relod's link beside simpler and older ways, without inference.

    python benchmarks/transport.py --out transport.json

Create's observations over loopback: one or two new camera frames of 57,600 bytes (1.35 on average) and the
proprioception up, an action of 24 bytes down. `pickle` sends whole stacks of three frames instead, as ReLoD does. Each
way has a server process of its own; all of them take turns in blocks, so that what else the machine does meets all.
`relod` is RobotLink and LearnerServer, whole, with a learner behind that answers at once; `relod, thread` has it answer
from another thread, as inference does. `websockets` sends the same messages as relod; `websockets, joined` puts all of
an observation into one.

Bytes on the wire are computed beside it: experience per second, and a policy of the preset `paper`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import pickle
import secrets
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import uvloop
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from relod.config import LinkSettings, ServerSettings
from relod.robots import registry
from relod.runtime.clock import NS_PER_MS, monotonic_ns
from relod.runtime.log.format import EncodedFrame
from relod.runtime.messages import encode
from relod.runtime.provenance import describe
from relod.runtime.remote.link import JoinFacts, RobotLink
from relod.runtime.remote.outbox import Outbox
from relod.runtime.remote.owed import pack_policy
from relod.runtime.remote.server import Admission, LearnerServer
from relod.runtime.remote.wire import FrameHead, Join, Observe, RecordHead, Welcome, pack
from relod.types import Step, TaskSpec

try:
    import zmq
except ImportError:
    zmq = None  # type: ignore[assignment]

FRAME_BYTES, ACTION_BYTES, STACK = 57_600, 24, 3
FRAMES_PER_CYCLE = 1.35  # 30 frames a second in cycles of 45 ms
FRAME, ACTION = bytes(FRAME_BYTES), bytes(ACTION_BYTES)
OBSERVATION = bytes(100)  # what else there is to say: header and proprioception
LENGTH = struct.Struct(">I")
MIB = 1 << 20

Exchange = Callable[[int], Awaitable[object]]  # sends so many new frames and returns with the action


def create_spec() -> TaskSpec:
    """Create-Reacher's, as it comes."""
    entry = registry.task("create")
    found: TaskSpec = entry.build(entry.sections()["task"]()).spec
    return found


def new_frames() -> Iterator[int]:
    """Frames that are new in each cycle, 1 or 2."""
    cycle = 0
    while True:
        cycle += 1
        yield int(cycle * FRAMES_PER_CYCLE) - int((cycle - 1) * FRAMES_PER_CYCLE)


# -- relod -------------------------------------------------------------------------------------------------------------


class Hall:
    """A learner that lets everyone in and answers at once, with nothing."""

    def __init__(self, *, thread: bool) -> None:
        self._thread = ThreadPoolExecutor(1) if thread else None
        self._action = np.zeros(ACTION_BYTES // 4, np.float32)[:2], np.zeros(ACTION_BYTES // 4 - 2, np.float32), (1, 1)

    def admit(self, join: Join) -> Admission:
        welcome = Welcome(
            learner=secrets.token_hex(16),
            run_dir="",
            algorithm="sac",
            preset="paper",
            agent={},
            seed=0,
            position=None,
            env_steps=0,
            policy_size=1,
            has_policy=False,
            precision="float16",
            proof=b"",
        )
        return Admission(
            stream=0, robot=join.robot, run=join.run, acts=join.acts, spec=join.task, codec=join.codec, welcome=welcome
        )

    def record(self, *_: object) -> None:
        raise NotImplementedError("only questions are asked here")

    async def act(self, *_: object) -> tuple[Any, Any, tuple[int, int]]:
        if self._thread is None:
            return self._action
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: self._action)

    def left(self, *_: object) -> None:
        pass


async def serve_relod(*, thread: bool = False) -> None:
    server = LearnerServer(hall=Hall(thread=thread), settings=ServerSettings(max_mib_per_s=1e6), token=None, tls=None)
    print(await server.start("127.0.0.1", 0), flush=True)
    await asyncio.Event().wait()


class Events:
    """`LinkEvents`: only answers matter, and that the link is up."""

    def __init__(self) -> None:
        self.up = asyncio.Event()
        self.answered = asyncio.get_running_loop().create_future()

    def answer(self, head: object, values: bytes) -> None:
        self.answered.set_result(values)

    def link_state(self, up: bool) -> None:
        self.up.set()

    def failed(self, error: Exception) -> None:
        self.answered.set_exception(error)

    def say(self, text: str) -> None:
        print(text, file=sys.stderr)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


@contextlib.asynccontextmanager
async def open_relod(port: int, folder: Path) -> AsyncIterator[Exchange]:
    spec, events = create_spec(), Events()
    outbox = Outbox(folder / "outbox", memory_bytes=64 * MIB, spool_bytes=0)
    join = JoinFacts(
        robot="bench", run=secrets.token_hex(16), acts="learner", task=spec, codec="raw", algorithm="", presets={}
    )
    link = RobotLink(
        f"ws://127.0.0.1:{port}",
        token=None,
        ca=None,
        join=join,
        settings=LinkSettings(wait_s=10),
        outbox=outbox,
        events=events,
    )
    await link.open()
    await events.up.wait()
    frame, proprio = EncodedFrame(captured_ns=0, data=FRAME), bytes(4 * spec.proprio_dim)
    newest = STACK
    for frame_id in range(newest):
        outbox.add_frame(frame_id + 1, frame)

    async def exchange(frames: int) -> None:
        nonlocal newest
        for _ in range(frames):
            newest += 1
            outbox.add_frame(newest, frame)
        events.answered = asyncio.get_running_loop().create_future()
        ids = tuple(range(newest - STACK + 1, newest + 1))
        link.ask(Observe(ask=newest, episode=0, index=0, frame_ids=ids, now_ns=newest), proprio)
        await events.answered

    try:
        yield exchange
    finally:
        await link.close(drain=False)
        outbox.close()


# -- websockets, TCP, pickle, ZeroMQ ----------------------------------------------------------------------------------


async def serve_websockets() -> None:
    async def answer(websocket: ServerConnection) -> None:
        async for message in websocket:
            if len(message) != FRAME_BYTES:  # the last message of an observation
                await websocket.send(ACTION)

    server = await serve(answer, "127.0.0.1", 0, compression=None, ping_interval=None, max_size=MIB)
    print(next(iter(server.sockets)).getsockname()[1], flush=True)
    await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def open_websockets(port: int, folder: Path, *, joined: bool = False) -> AsyncIterator[Exchange]:
    websocket = await connect(f"ws://127.0.0.1:{port}", compression=None, ping_interval=None, max_size=MIB)

    async def exchange(frames: int) -> None:
        if joined:
            await websocket.send(b"".join((*(FRAME,) * frames, OBSERVATION)))
        else:
            for _ in range(frames):
                await websocket.send(FRAME)
            await websocket.send(OBSERVATION)
        await websocket.recv()

    yield exchange


async def serve_tcp() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readexactly(LENGTH.unpack(await reader.readexactly(LENGTH.size))[0])
            writer.write(ACTION)

    server = await asyncio.start_server(answer, "127.0.0.1", 0, limit=MIB)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def open_tcp(port: int, folder: Path) -> AsyncIterator[Exchange]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=MIB)

    async def exchange(frames: int) -> None:
        writer.write(LENGTH.pack(frames * FRAME_BYTES + len(OBSERVATION)))
        writer.writelines([*(FRAME,) * frames, OBSERVATION])
        await writer.drain()
        await reader.readexactly(ACTION_BYTES)

    yield exchange


def receive(sock: socket.socket, size: int) -> bytearray:
    """Exactly `size` bytes; `ConnectionResetError` when there are no more."""
    data = bytearray(size)
    view = memoryview(data)
    while view:
        if not (count := sock.recv_into(view)):
            raise ConnectionResetError
        view = view[count:]
    return data


def receive_message(sock: socket.socket) -> bytearray:
    return receive(sock, LENGTH.unpack(receive(sock, LENGTH.size))[0])


def connect_blocking(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def accept_blocking() -> socket.socket:
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


async def serve_tcp_blocking() -> None:
    sock = accept_blocking()
    while True:
        receive_message(sock)
        sock.sendall(ACTION)


@contextlib.asynccontextmanager
async def open_tcp_blocking(port: int, folder: Path) -> AsyncIterator[Exchange]:
    sock = connect_blocking(port)

    async def exchange(frames: int) -> None:
        sock.sendall(LENGTH.pack(frames * FRAME_BYTES + len(OBSERVATION)))
        for _ in range(frames):
            sock.sendall(FRAME)
        sock.sendall(OBSERVATION)
        receive(sock, ACTION_BYTES)

    yield exchange


async def serve_pickle() -> None:
    sock, action = accept_blocking(), np.zeros(ACTION_BYTES // 4, np.float32)
    while True:
        pickle.loads(receive_message(sock))  # noqa: S301  # what is measured
        data = pickle.dumps(action)
        sock.sendall(LENGTH.pack(len(data)))
        sock.sendall(data)


@contextlib.asynccontextmanager
async def open_pickle(port: int, folder: Path) -> AsyncIterator[Exchange]:
    sock = connect_blocking(port)
    stack = np.zeros((3 * STACK, 120, 160), np.uint8), np.zeros(len(OBSERVATION) // 4, np.float32)

    async def exchange(frames: int) -> None:
        data = pickle.dumps(stack)
        sock.sendall(LENGTH.pack(len(data)))
        sock.sendall(data)
        pickle.loads(receive_message(sock))  # noqa: S301

    yield exchange


async def serve_zeromq() -> None:
    sock = zmq.Context().socket(zmq.REP)
    print(sock.bind_to_random_port("tcp://127.0.0.1"), flush=True)
    while True:
        sock.recv_multipart(copy=False)
        sock.send(ACTION)


@contextlib.asynccontextmanager
async def open_zeromq(port: int, folder: Path) -> AsyncIterator[Exchange]:
    sock = zmq.Context().socket(zmq.REQ)
    sock.connect(f"tcp://127.0.0.1:{port}")

    async def exchange(frames: int) -> None:
        sock.send_multipart([*(FRAME,) * frames, OBSERVATION], copy=False)
        sock.recv()

    yield exchange


WAYS: dict[
    str, tuple[Callable[[], Awaitable[None]], Callable[[int, Path], contextlib.AbstractAsyncContextManager[Exchange]]]
] = {
    "relod": (serve_relod, open_relod),
    "relod, thread": (lambda: serve_relod(thread=True), open_relod),
    "websockets": (serve_websockets, open_websockets),
    "websockets, joined": (serve_websockets, lambda port, folder: open_websockets(port, folder, joined=True)),
    "TCP, uvloop": (serve_tcp, open_tcp),
    "TCP, blocking": (serve_tcp_blocking, open_tcp_blocking),
    "pickle, whole stacks": (serve_pickle, open_pickle),
} | ({"ZeroMQ": (serve_zeromq, open_zeromq)} if zmq is not None else {})


# -- measuring ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(name: str) -> Iterator[int]:
    """The server of a way in a process of its own; gives its port."""
    with subprocess.Popen([sys.executable, __file__, "--serve", name], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        try:
            yield int(server.stdout.readline())
        finally:
            server.kill()


async def measure(ways: list[str], options: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Milliseconds of each exchange of each block, by way; the ways take turns, the first block is for warming up."""
    samples: dict[str, list[list[float]]] = {name: [] for name in ways}
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        exchanges = {}
        for number, name in enumerate(ways):
            port = stack.enter_context(serving(name))
            exchanges[name] = await stack.enter_async_context(WAYS[name][1](port, folder / str(number)))
        for _ in range(options.blocks + 1):
            for name, exchange in exchanges.items():
                samples[name].append(await block(exchange, options.exchanges, options.pause_ms / 1e3))
    return {name: blocks[1:] for name, blocks in samples.items()}


async def block(exchange: Exchange, count: int, pause_s: float) -> list[float]:
    found = []
    for _, frames in zip(range(count), new_frames(), strict=False):
        start_ns = monotonic_ns()
        await exchange(frames)
        found.append((monotonic_ns() - start_ns) / NS_PER_MS)
        if pause_s:
            await asyncio.sleep(pause_s)
    await asyncio.sleep(0.002)  # whoever waits for this loop has its turn
    return found


def percentiles(samples: list[float]) -> dict[str, float]:
    values = {name: np.percentile(samples, q) for name, q in (("p50", 50), ("p90", 90), ("p99", 99), ("p999", 99.9))}
    return {name: round(float(value), 4) for name, value in (values | {"max": max(samples)}).items()}


def ratios(samples: Mapping[str, list[list[float]]], to: str) -> dict[str, dict[str, float]]:
    """Medians of each way's blocks over those of `to` in the same round: median, least and largest."""
    base = [float(np.median(each)) for each in samples[to]]
    found = {}
    for name, blocks in samples.items():
        each = [float(np.median(one)) / other for one, other in zip(blocks, base, strict=True)]
        found[name] = {
            "median": round(float(np.median(each)), 3),
            "min": round(min(each), 3),
            "max": round(max(each), 3),
        }
    return found


# -- bytes -------------------------------------------------------------------------------------------------------------


def experience_bytes() -> dict[str, float]:
    """Bytes a second that a Create's experience takes, raw: each frame once and a record a cycle, or whole stacks."""
    spec = create_spec()
    cycles_per_s, frames_per_s = 1e9 / spec.cycle_ns, spec.camera_fps
    step = Step(
        episode=1000,
        index=500,
        frame_ids=(100_000, 100_001, 100_002),
        proprio=np.zeros(spec.proprio_dim, np.float32),
        action=np.zeros(spec.action_dim, np.float32),
        reward=-1.0,
        terminated=False,
        truncated=False,
        extras=np.zeros(0, np.float32),
        policy_version=(1, 100_000),
        observed_ns=2**50,
        acted_ns=2**50,
    )
    websocket_header = 14  # of a masked message over 65,535 bytes; shorter ones have less
    frame = websocket_header + len(pack(FrameHead(id=100_000, captured_ns=2**50), FRAME))
    record = websocket_header + len(pack(RecordHead(seq=100_000), encode(step)))
    observation = np.zeros((3 * STACK, *spec.image_hw), np.uint8), np.zeros(spec.proprio_dim, np.float32)
    stacked = len(pickle.dumps(observation)) + len(pickle.dumps((step.action, -1.0, False)))
    return {
        "relod_bytes_per_s": round(frames_per_s * frame + cycles_per_s * record),
        "whole_stacks_bytes_per_s": round(cycles_per_s * stacked),
        "frame_bytes": frame,
        "record_bytes": record,
    }


def policy_bytes() -> dict[str, int]:
    """Bytes of a policy of the preset `paper`: actor in half precision, or actor and critics pickled."""
    import torch

    from relod.algos.sac import SAC, SacSettings
    from relod.config import load

    settings = load({"agent": SacSettings}, presets=[{"agent": SAC.presets["paper"]["agent"]}]).agent
    learner = SAC.build_learner(create_spec(), settings, seed=0, device=torch.device("cpu"))
    flat = np.concatenate([value.detach().numpy().ravel() for value in learner.policy().parameters()])
    networks = {name: value.numpy() for name, value in learner.state().items() if isinstance(value, torch.Tensor)}
    networks = {name: value for name, value in networks.items() if "target" not in name and "optimiser" not in name}
    return {
        "values": flat.size,
        "relod_bytes": sum(len(part) for part in pack_policy(flat, (1, 1), "float16").parts),
        "actor_and_critics_pickled_bytes": len(pickle.dumps(networks)),
    }


def main() -> None:
    """Measure, print, and write the record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--exchanges", type=int, default=200, help="of each way in each block")
    parser.add_argument("--pause-ms", type=float, default=0.0, help="between two exchanges")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="websockets always takes part")
    parser.add_argument("--out", type=Path, help="JSON file for the record")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        uvloop.run(WAYS[options.serve][0]())
        return

    samples = uvloop.run(measure([name for name in WAYS if name in (*options.ways, "websockets")], options))
    record = {
        "benchmark": "transport",
        "made_with": describe(sys.argv),
        "pause_ms": options.pause_ms,
        "ms": {name: percentiles([each for one in blocks for each in one]) for name, blocks in samples.items()},
        "to_websockets": ratios(samples, "websockets"),
        "experience": experience_bytes(),
        "policy": policy_bytes(),
        "samples": {"ms": samples},
    }
    for name, found in record["ms"].items():
        print(f"{name:<22} {found} ms, to websockets {record['to_websockets'][name]}")
    if zmq is None:
        print("pyzmq is not installed, so ZeroMQ was left out")
    print(f"experience: {record['experience']}")
    print(f"policy: {record['policy']}")
    if options.out:
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(record)))


if __name__ == "__main__":
    main()
