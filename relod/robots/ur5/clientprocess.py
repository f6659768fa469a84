"""The driver's end of `client.py`: starts the process, hears its packets, orders speeds, ends it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

from . import client

__all__ = ["ClientProcess"]

END_LIMIT_S = 1.8  # it brakes for 0.6 s at most, and its last call takes 1 s at most


class ClientProcess:
    """A running `client.py`, heard on the loop.

    `on_state(arrived_ns, values)` is called for every packet, `on_ready()` when orders are obeyed, `on_end(why)` once
    when it can go on no more.
    """

    def __init__(
        self,
        plan: client.Plan,
        on_state: Callable[[int, tuple[float, ...]], None],
        on_ready: Callable[[], None],
        on_end: Callable[[str], None],
    ) -> None:
        self._on_state, self._on_ready, self._on_end = on_state, on_ready, on_end
        self._why = ""
        self._ended = asyncio.Event()
        self.ready = False
        self._wire, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._wire.setblocking(False)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", client.__name__, str(theirs.fileno()), json.dumps(asdict(plan))],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
        asyncio.get_running_loop().add_reader(self._wire, self._hear)

    @property
    def pid(self) -> int:
        return self._process.pid

    def order(self, speeds: Sequence[float]) -> None:
        """The newest joint speeds in rad/s. `OSError`: it is gone, or does not read."""
        self._wire.send(client.ORDER.pack(*speeds))

    async def end(self) -> None:
        """Let it make the arm stand and end; kill it if it does not."""
        with contextlib.suppress(OSError):
            self._wire.send(client.CLOSE)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_LIMIT_S):
                await self._ended.wait()
        self.kill()

    def kill(self) -> None:
        """End it now. The watchdog on the controller stops the arm if nobody else does."""
        if self._wire.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._wire)
            self._wire.close()
        self._process.kill()
        self._process.wait()

    def _hear(self) -> None:
        try:
            for _ in range(64):  # then the loop gets its turn
                message = self._wire.recv(client.MESSAGE_BYTES)
                kind, rest = message[:1], message[1:]
                if kind == client.STATE:
                    arrived_ns, *values = client.STATE_BYTES.unpack(rest)
                    self._on_state(arrived_ns, tuple(values))
                elif kind == client.READY:
                    self.ready = True
                    self._on_ready()
                elif kind in (client.FAILED, client.LOST):
                    self._why = rest.decode(errors="replace").strip()
                else:
                    break
            else:
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        asyncio.get_running_loop().remove_reader(self._wire)
        self._ended.set()
        self._on_end(self._why or f"the connection to the controller broke ({self._fate()})")

    def _fate(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.05)  # it has closed its socket: it is gone, or about to be
        code = self._process.returncode
        if code is None:
            return "its process hung up"
        return f"its process ended by {signal.Signals(-code).name}" if code < 0 else f"its process ended with {code}"
