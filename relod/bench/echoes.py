"""Simpler ways to send an observation to another process and get an action back, for `relod bench transport`.

Each has a server, which tells its port and answers until its process ends, and a client, which gives an `Exchange`.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

__all__ = ["ECHOES", "Client", "Exchange", "Server", "Tell"]

FRAME_BYTES, ACTION_BYTES, STACK = 57_600, 24, 3
FRAME, ACTION = bytes(FRAME_BYTES), bytes(ACTION_BYTES)
OBSERVATION = bytes(100)  # what else there is to say: header and proprioception
LENGTH = struct.Struct(">I")
MIB = 1 << 20

Exchange: TypeAlias = Callable[[int], Awaitable[object]]  # sends so many new frames and returns with the action
Tell: TypeAlias = Callable[[int], object]  # the port
Server: TypeAlias = Callable[[Tell], Awaitable[None]]
Client: TypeAlias = Callable[[int, Path], contextlib.AbstractAsyncContextManager[Exchange]]


async def serve_websockets(tell: Tell) -> None:
    async def answer(websocket: ServerConnection) -> None:
        async for message in websocket:
            if len(message) != FRAME_BYTES:  # the last message of an observation
                await websocket.send(ACTION)

    server = await serve(answer, "127.0.0.1", 0, compression=None, ping_interval=None, max_size=MIB)
    tell(next(iter(server.sockets)).getsockname()[1])
    await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def open_websockets(port: int, folder: Path, *, joined: bool = False) -> AsyncIterator[Exchange]:
    url = f"ws://127.0.0.1:{port}"
    websocket = await connect(url, compression=None, ping_interval=None, close_timeout=1, max_size=MIB)

    async def exchange(frames: int) -> None:
        if joined:
            await websocket.send(b"".join((*(FRAME,) * frames, OBSERVATION)))
        else:
            for _ in range(frames):
                await websocket.send(FRAME)
            await websocket.send(OBSERVATION)
        await websocket.recv()

    try:
        yield exchange
    finally:
        await websocket.close()


async def serve_tcp(tell: Tell) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):  # the client's end
            while True:
                await reader.readexactly(LENGTH.unpack(await reader.readexactly(LENGTH.size))[0])
                writer.write(ACTION)

    server = await asyncio.start_server(answer, "127.0.0.1", 0, limit=MIB)
    tell(server.sockets[0].getsockname()[1])
    await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def open_tcp(port: int, folder: Path) -> AsyncIterator[Exchange]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=MIB)

    async def exchange(frames: int) -> None:
        writer.write(LENGTH.pack(frames * FRAME_BYTES + len(OBSERVATION)))
        writer.writelines([*(FRAME,) * frames, OBSERVATION])
        await writer.drain()
        await reader.readexactly(ACTION_BYTES)

    try:
        yield exchange
    finally:
        writer.transport.abort()


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


def accept_blocking(tell: Tell) -> socket.socket:
    listener = socket.create_server(("127.0.0.1", 0))
    tell(listener.getsockname()[1])
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


async def serve_tcp_blocking(tell: Tell) -> None:
    sock = accept_blocking(tell)
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

    with sock:
        yield exchange


async def serve_pickle(tell: Tell) -> None:
    sock, action = accept_blocking(tell), np.zeros(ACTION_BYTES // 4, np.float32)
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

    with sock:
        yield exchange


async def serve_zeromq(tell: Tell) -> None:
    import zmq

    sock: Any = zmq.Context().socket(zmq.REP)
    tell(sock.bind_to_random_port("tcp://127.0.0.1"))
    while True:
        sock.recv_multipart(copy=False)
        sock.send(ACTION)


@contextlib.asynccontextmanager
async def open_zeromq(port: int, folder: Path) -> AsyncIterator[Exchange]:
    import zmq

    context = zmq.Context()
    sock: Any = context.socket(zmq.REQ)
    sock.connect(f"tcp://127.0.0.1:{port}")

    async def exchange(frames: int) -> None:
        sock.send_multipart([*(FRAME,) * frames, OBSERVATION], copy=False)
        sock.recv()

    try:
        yield exchange
    finally:
        context.destroy(linger=0)


ECHOES: dict[str, tuple[Server, Client]] = {
    "websockets": (serve_websockets, open_websockets),
    "websockets-joined": (serve_websockets, lambda port, folder: open_websockets(port, folder, joined=True)),
    "tcp-uvloop": (serve_tcp, open_tcp),
    "tcp-blocking": (serve_tcp_blocking, open_tcp_blocking),
    "pickle-stacks": (serve_pickle, open_pickle),
}
if find_spec("zmq"):
    ECHOES["zeromq"] = serve_zeromq, open_zeromq
