"""The way of commands from the control process to the device process: the newest wins, and only while it is fresh
and the process that wrote it lives."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence

from ..types import NO_REQUEST
from .shared import Ring

__all__ = ["CommandRing", "Leash", "WriterWatch"]


class CommandRing:
    """The newest command of one robot; the control process writes, the device process executes.

    A request is one-off: it is executed when `request_id` grows, and stays in all later records, so that a newer
    command written before the device process looked does not lose it.
    """

    def __init__(self, width: int, capacity: int = 64) -> None:
        fields = [("tick", "<u8"), ("deadline_ns", "<i8"), ("issued_ns", "<i8"), ("values", "<f8", (width,))]
        self.ring = Ring(
            "commands", [*fields, ("request", "<u4"), ("request_id", "<u8"), ("writer_pid", "<u4")], capacity
        )
        self.signal = self.ring.add_signal()
        self._request = NO_REQUEST
        self._request_id = self._first_request_id = 0

    def take_over(self) -> None:
        """Become the writer; request ids go on after those of the writer before."""
        self.ring.take_over()
        newest = self.ring.newest()
        if newest is not None:
            self._request = int(newest[1]["request"])
            self._request_id = self._first_request_id = int(newest[1]["request_id"])

    def publish(
        self,
        *,
        tick: int,
        deadline_ns: int,
        issued_ns: int,
        values: Sequence[float],
        request: int = NO_REQUEST,
        request_id: int = 0,
    ) -> None:
        """Give the next command; `request_id` counts this writer's requests from 1."""
        if request != NO_REQUEST:
            self._request, self._request_id = request, self._first_request_id + request_id
        self.ring.publish((tick, deadline_ns, issued_ns, tuple(values), self._request, self._request_id, os.getpid()))


class Leash:
    """Whether the robot may move. Pure; moves: held -> loose on a fresh command, loose -> held on all else."""

    def __init__(self, limit_ns: int) -> None:
        self.limit_ns = limit_ns
        self.held = True
        self.issued_ns = 0

    def offer(self, issued_ns: int, now_ns: int) -> bool:
        """Whether a command issued then may be executed now; if so the leash is loose."""
        if now_ns - issued_ns > self.limit_ns:
            return False
        self.held, self.issued_ns = False, issued_ns
        return True

    def expired(self, now_ns: int) -> bool:
        """Whether the robot moves, if it does, on a command that is too old."""
        return not self.held and now_ns - self.issued_ns > self.limit_ns


class WriterWatch:
    """Notices the death of the process that writes the commands at once, not by its silence (Linux pidfd).

    `on_gone()` is called on the loop when the process last given to `follow` has died.
    """

    def __init__(self, on_gone: Callable[[], None]) -> None:
        self.pid = 0
        self._fd = -1
        self._on_gone = on_gone

    def follow(self, pid: int) -> bool:
        """Watch this process from now on; False if it is dead."""
        if pid == self.pid:
            return self._fd >= 0
        self.close()
        self.pid = pid
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        asyncio.get_running_loop().add_reader(self._fd, self._on_readable)
        return True

    def _on_readable(self) -> None:
        self.close()
        self._on_gone()

    def close(self) -> None:
        """Watch nobody."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
        self._fd = -1
