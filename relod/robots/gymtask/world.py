"""Both simulated worlds of a Gymnasium environment: in virtual time, and in real time behind a unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...config import Section
from ...errors import StartError
from ...runtime.clock import NS_PER_MS, DeadlineTimer, monotonic_ns
from ...types import Command, TaskSpec, Witness
from ..frameserver import FrameServer
from ..simcamera import SimFrame
from .simulation import Simulation

__all__ = ["WORLDS", "SimSettings", "VirtualGym", "serve_world"]


class SimSettings(Section, frozen=True):
    """The environment has no settings of its own here."""


SILENCE_NS = 200 * NS_PER_MS  # without a command it stands, as a robot with a watchdog does

# An environment is what it is: its worlds do not differ.
WORLDS: Mapping[str, dict[str, Any]] = {"ideal": {}, "nominal": {}, "harsh": {}}


class VirtualGym:
    """In virtual time: a step per cycle, so that what was done in a cycle is seen at the next one's beginning."""

    def __init__(self, name: str, settings: SimSettings, seed: int, spec: TaskSpec, start_ns: int) -> None:
        self._simulation = Simulation(name, picture_hw=spec.camera_hw)
        self._tick_ns, self._next_ns = spec.cycle_ns, start_ns + spec.cycle_ns
        self._commands: deque[tuple[int, Command]] = deque()

    def advance(self, now_ns: int) -> tuple[list[tuple[int, np.ndarray[Any, Any]]], list[SimFrame]]:
        """Packets `(arrived_ns, values)` and pictures since the last call."""
        packets, frames = [], []
        while self._next_ns <= now_ns:
            at_ns, self._next_ns = self._next_ns, self._next_ns + self._tick_ns
            while self._commands and self._commands[0][0] < at_ns:
                command = self._commands.popleft()[1]
                self._simulation.command(command.values, command.request)
            packets.append((at_ns, np.array([*self._simulation.tick(), 1.0])))
            frames.append(SimFrame(captured_ns=at_ns, available_ns=at_ns, image=self._simulation.render()))
        return packets, frames

    def execute(self, command: Command, now_ns: int) -> None:
        """Give a command at `now_ns`."""
        self._commands.append((now_ns, command))

    def begin_episode(self) -> None:
        """Nothing changes but what a reset asks for."""


async def serve_world(
    name: str,
    settings: SimSettings,
    seed: int,
    spec: TaskSpec,
    *,
    on_ready: Callable[[dict[str, str]], None],
    stop: asyncio.Event,
    new_episode: asyncio.Event,
    control: Path | None = None,
    frames: Path | None = None,
    mjpeg_port: int | None = None,
    wheel_log: Path | None = None,
    witness: Witness | None = None,
) -> None:
    """In real time until `stop` is set.

    Args:
        on_ready: called once with where things are: `port`, `camera_url`, and an empty `control`.
        frames: unix socket on which raw pictures are served.
        mjpeg_port: serve MJPEG on 127.0.0.1, on any free port if 0, not at all if None.
        new_episode, control, wheel_log, witness: every world is given these; this one needs none of them.
    """
    simulation = Simulation(name, picture_hw=spec.camera_hw)
    with contextlib.closing(DeadlineTimer()) as timer, tempfile.TemporaryDirectory(prefix="relod-gym-") as folder:
        address = Path(folder) / "environment.sock"
        async with FrameServer(path=frames, http_port=mjpeg_port) as server, _Port(simulation, address) as port:
            on_ready({"port": str(address), "control": "", "camera_url": server.url or ""})
            tick_ns = monotonic_ns()
            while not stop.is_set():
                tick_ns += spec.cycle_ns
                await timer.wait_until(tick_ns)
                if monotonic_ns() - port.commanded_ns > SILENCE_NS:
                    simulation.stand()
                port.send(simulation.shape.packet.pack(*simulation.tick()))
                now_ns = monotonic_ns()
                server.publish(SimFrame(captured_ns=now_ns, available_ns=now_ns, image=simulation.render()))
    simulation.close()


class _Port:
    """The socket: everybody who connects gets the packets, and who commands is obeyed until it hangs up or falls
    silent."""

    def __init__(self, simulation: Simulation, path: Path) -> None:
        self._simulation, self._path = simulation, path
        self._clients: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self.commanded_ns = 0  # when the newest command came

    async def __aenter__(self) -> _Port:
        try:
            self._server = await asyncio.start_unix_server(self._serve, self._path)
        except OSError as error:
            raise StartError(f"the environment's socket cannot be {self._path}: {error}") from error
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for client in tuple(self._clients):
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    def send(self, packet: bytes) -> None:
        for writer in self._clients.values():
            if not writer.transport.get_write_buffer_size():
                writer.write(packet)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients[task] = writer
        shape = self._simulation.shape
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
                while True:
                    *values, request = shape.command.unpack(await reader.readexactly(shape.command.size))
                    self._simulation.command(values, request)
                    self.commanded_ns = monotonic_ns()
        finally:
            self._simulation.stand()
            del self._clients[task]
            writer.transport.abort()
