"""A worse network than the one at hand: a TCP relay between a robot's link and its learner, in the same process.

What it does to the bytes is what a radio does to a TCP connection: they come late, in order and all of them, at a
limited rate; now and then nothing passes for a while; sometimes the connection is reset. There is no packet loss:
above TCP, a loss is a delay.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from enum import Enum
from typing import Any, cast

import numpy as np

from ..clock import NS_PER_MS, NS_PER_S, DeadlineTimer, monotonic_ns
from ..spans import Histogram
from ..tasks import TaskGroup
from .linkprofile import Channel, LinkProfile

__all__ = ["Relay"]

PIECE_BYTES = 16 << 10  # a limited rate lets data through in pieces of this size
INJECTED_KEPT = 100_000
STAMPS_AT_ONCE = 256  # taken into the percentiles in some 0.1 ms
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, for 0 s


class _Mark(Enum):
    """What travels between bytes."""

    END = 1  # the sender will send no more
    RESET = 2  # the sender's connection is gone


class _Direction:
    """One direction of the relay: its channel, and what it did to the bytes."""

    def __init__(self, profile: LinkProfile, *, up: bool, seed: int) -> None:
        self.channel = Channel(profile, up=up, seed=seed)
        self.injected: deque[tuple[int, int, int]] = deque(maxlen=INJECTED_KEPT)
        self.bytes = 0
        self._one_way, self._late = Histogram(), Histogram()
        self._new: list[tuple[int, int, int]] = []

    def passed(self, received_ns: int, due_ns: int, size_bytes: int) -> None:
        self.bytes += size_bytes
        stamps = received_ns, due_ns, monotonic_ns()
        self.injected.append(stamps)
        self._new.append(stamps)
        if len(self._new) == STAMPS_AT_ONCE:
            self._count()

    def _count(self) -> None:
        received_ns, due_ns, passed_ns = np.array(self._new, np.int64).reshape(-1, 3).T
        self._one_way.add_ms((passed_ns - received_ns) / NS_PER_MS)
        self._late.add_ms((passed_ns - due_ns) / NS_PER_MS)
        self._new.clear()

    def figures(self) -> dict[str, Any]:
        self._count()
        return {"bytes": self.bytes, "one_way_ms": self._one_way.summary_ms(), "late_ms": self._late.summary_ms()}


class _Flow:
    """One direction of one connection: what is on its way from one socket to the other."""

    def __init__(self, relay: Relay, direction: _Direction, source: _Socket, sink: _Socket) -> None:
        self._relay, self._direction, self._source, self._sink = relay, direction, source, sink
        self._open_ns = relay.open_ns()
        self._queue: deque[tuple[int, int, bytes | _Mark]] = deque()  # (is due, was received, what)
        self._waiting_bytes = 0
        self._filled = asyncio.Event()
        self._over = False
        self.writable = asyncio.Event()  # the sink takes more
        source.outward, sink.inward = self, self

    def put(self, what: bytes | _Mark) -> None:
        """Send what the source received."""
        if isinstance(what, _Mark) or not self._direction.channel.limited:
            self._put(what)
            return
        for start in range(0, len(what), PIECE_BYTES):
            self._put(what[start : start + PIECE_BYTES])

    def _put(self, what: bytes | _Mark) -> None:
        now_ns = monotonic_ns()
        relay, channel = self._relay, self._direction.channel
        if channel.ideal and not self._queue and self.writable.is_set() and relay.clear_ns(now_ns) == now_ns:
            self._deliver(now_ns, now_ns, what)
            return
        due_ns = relay.start_ns + channel.arrival_ns(now_ns - relay.start_ns, _size(what))
        self._queue.append((max(due_ns, self._open_ns), now_ns, what))
        self._filled.set()
        self._waiting_bytes += _size(what)
        if self._waiting_bytes > relay.buffer_bytes:
            self._source.hold(True)

    async def run(self) -> None:
        """Deliver until one side sends no more."""
        timer = DeadlineTimer()
        try:
            while not self._over:
                await self._filled.wait()
                while self._queue:
                    due_ns, received_ns, what = self._queue[0]
                    await timer.wait_until(due_ns)
                    while (clear_ns := self._relay.clear_ns(now_ns := monotonic_ns())) > now_ns:
                        await timer.wait_until(clear_ns)
                    await self.writable.wait()
                    self._queue.popleft()
                    self._waiting_bytes -= _size(what)
                    if self._waiting_bytes <= self._relay.buffer_bytes // 2:
                        self._source.hold(False)
                    self._deliver(received_ns, due_ns, what)
                if not self._over:
                    self._filled.clear()
        finally:
            timer.close()

    def _deliver(self, received_ns: int, due_ns: int, what: bytes | _Mark) -> None:
        if isinstance(what, bytes):
            self._sink.write(what)
            self._direction.passed(received_ns, due_ns, len(what))
            return
        self._over = True
        self._filled.set()
        if what is _Mark.RESET:
            self._sink.reset()
        else:
            self._sink.end()


def _size(what: bytes | _Mark) -> int:
    return len(what) if isinstance(what, bytes) else 0


class _Socket(asyncio.Protocol):
    """One socket of the relay: the robot's or the learner's. What it receives goes outward, what it sends comes in."""

    outward: _Flow
    inward: _Flow

    def __init__(self, receive_buffer_bytes: int | None) -> None:
        self._receive_buffer_bytes = receive_buffer_bytes
        self._transport: asyncio.Transport | None = None
        self._held = self._gone = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._receive_buffer_bytes is not None:  # else the kernel takes megabytes the link cannot carry
            self._option(socket.SO_RCVBUF, self._receive_buffer_bytes)
        if self._gone:
            self.reset()
        self.inward.writable.set()

    def data_received(self, data: bytes) -> None:
        self.outward.put(bytes(data))

    def eof_received(self) -> bool:
        self.outward.put(_Mark.END)
        return True  # the other direction stays open

    def connection_lost(self, error: Exception | None) -> None:
        self._gone = True
        self.outward.put(_Mark.RESET if error else _Mark.END)
        self.inward.writable.set()  # into nothing

    def pause_writing(self) -> None:
        self.inward.writable.clear()

    def resume_writing(self) -> None:
        self.inward.writable.set()

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def hold(self, held: bool) -> None:
        """Read no more, or go on reading."""
        if held is self._held or self._transport is None or self._transport.is_closing():
            return
        self._held = held
        if held:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def end(self) -> None:
        """Send no more: the peer reads the end of the stream."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write_eof()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def reset(self) -> None:
        """Close at once; the peer's next read or write fails with a connection reset."""
        self._gone = True
        if self._transport is not None and not self._transport.is_closing():
            self._option(socket.SO_LINGER, _RESET_ON_CLOSE)
            self._transport.abort()

    def _option(self, name: int, value: int | bytes) -> None:
        assert self._transport is not None
        self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, name, value)


class Relay:
    """Listens on a port of its own on the loopback and passes every connection on to the learner."""

    def __init__(self) -> None:
        self.start_ns = 0  # of the profile's weather
        self.cuts = 0
        self._stalled_until_ns = 0
        self._connections: dict[asyncio.Task[None], tuple[_Socket, _Socket]] = {}

    async def start(self, target_host: str, target_port: int, profile: LinkProfile, seed: int = 0) -> tuple[str, int]:
        """Begin to listen; the address to connect to instead of the target's."""
        self.start_ns = monotonic_ns()
        self._profile, self._seed = profile, seed
        self._target = target_host, target_port
        self._up, self._down = (_Direction(profile, up=up, seed=seed) for up in (True, False))
        self.buffer_bytes = profile.buffer_kib << 10
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accept, "127.0.0.1", 0)
        self._cutting = loop.create_task(self._cut_now_and_then(), name="link cuts") if profile.cut_every_s else None
        host, port = self._server.sockets[0].getsockname()[:2]
        return host, port

    def cut(self) -> None:
        """Reset all connections now."""
        self.cuts += 1
        for task, pair in self._connections.items():
            for end in pair:
                end.reset()
            task.cancel()

    def stall(self, duration_s: float) -> None:
        """Let nothing pass from now on, in either direction, for `duration_s`; nothing is closed either."""
        self._stalled_until_ns = max(self._stalled_until_ns, monotonic_ns() + int(duration_s * NS_PER_S))

    def clear_ns(self, now_ns: int) -> int:
        """The first moment from now on that is not in a `stall`."""
        return max(now_ns, self._stalled_until_ns)

    def open_ns(self) -> int:
        """When a connection begun now is set up: the three packets of its handshake take a round trip."""
        return monotonic_ns() + int(2 * self._profile.delay_ms * NS_PER_MS)

    @property
    def injected(self) -> dict[str, list[tuple[int, int, int]]]:
        """The newest pieces by direction: (received, due, passed on), ns of the monotonic clock."""
        return {"up": list(self._up.injected), "down": list(self._down.injected)}

    def figures(self) -> dict[str, Any]:
        """What was done so far: bytes, one-way delays, and how late the relay itself was with them."""
        return {
            "profile": self._profile.name,
            "seed": self._seed,
            "connections": len(self._connections),
            "cuts": self.cuts,
            "up": self._up.figures(),
            "down": self._down.figures(),
        }

    async def close(self) -> None:
        """Reset what is connected and listen no more."""
        self._server.close()
        tasks = list(self._connections)
        for pair in self._connections.values():
            for end in pair:
                end.reset()
        if self._cutting is not None:
            tasks.append(self._cutting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self) -> asyncio.Protocol:
        receive_buffer_bytes = self.buffer_bytes if self._up.channel.limited else None
        robot, learner = _Socket(receive_buffer_bytes), _Socket(receive_buffer_bytes)
        flows = _Flow(self, self._up, robot, learner), _Flow(self, self._down, learner, robot)
        task = asyncio.get_running_loop().create_task(self._serve(robot, learner, flows), name="link emulation")
        self._connections[task] = robot, learner
        task.add_done_callback(self._connections.pop)
        return robot

    async def _serve(self, robot: _Socket, learner: _Socket, flows: tuple[_Flow, _Flow]) -> None:
        """One connection, from accepted to closed."""
        try:
            await asyncio.get_running_loop().create_connection(lambda: learner, *self._target)
        except OSError:  # as the learner's host itself would
            robot.reset()
            return
        async with TaskGroup() as group:
            for flow in flows:
                group.create_task(flow.run())
        robot.close()
        learner.close()

    async def _cut_now_and_then(self) -> None:
        rng = np.random.default_rng([self._seed, 2])
        while True:
            await asyncio.sleep(rng.exponential(self._profile.cut_every_s))
            self.cut()
