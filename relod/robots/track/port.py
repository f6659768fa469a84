"""The simulated rig's socket: everybody who connects gets its states, the first to send a command drives it."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Self

from ...errors import StartError
from ...runtime.clock import monotonic_ns
from ...types import Witness
from .rig import COMMAND, STAND, Rig

__all__ = ["RigPort"]

UNREAD_LIMIT_BYTES = 4096  # 1.7 s of states; a client that does not read misses states, the rig never waits for it


class RigPort:
    """A unix stream socket at `path`; an async context manager.

    The rig stands as soon as whoever drives it hangs up, which the kernel does for a process that dies. Another
    client that sends a command meanwhile is hung up on.

    Raises:
        StartError: on entering, when there can be no socket at `path`.
    """

    def __init__(self, rig: Rig, path: Path, witness: Witness | None = None) -> None:
        self._rig, self._path, self._witness = rig, path, witness
        self._clients: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._driver: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Self:
        try:
            if self._path.is_socket():
                self._path.unlink()  # left by a process that was killed
            self._server = await asyncio.start_unix_server(self._serve, self._path)
        except OSError as error:
            raise StartError(f"the rig's socket cannot be {self._path}: {error}", "give another path") from error
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for client in tuple(self._clients):
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        self._path.unlink(missing_ok=True)

    def send(self, state: bytes) -> None:
        """Send a state to everybody."""
        for writer in self._clients.values():
            if writer.transport.get_write_buffer_size() < UNREAD_LIMIT_BYTES:
                writer.write(state)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients[task] = writer
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
                await self._obey(reader, writer)
        finally:
            if self._driver is writer:
                self._driver = None
                self._rig.receive(STAND, monotonic_ns())
            del self._clients[task]
            writer.transport.abort()

    async def _obey(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            command = await reader.readexactly(COMMAND.size)
            self._driver = self._driver or writer
            if self._driver is not writer:
                return
            now_ns = monotonic_ns()
            self._rig.receive(command, now_ns)
            if self._witness is not None:
                self._witness.obeyed(now_ns, self._rig.next_tick_ns)
