"""Groups of asyncio tasks after which their owner goes on."""

from __future__ import annotations

import asyncio
from types import TracebackType

__all__ = ["TaskGroup"]


class TaskGroup(asyncio.TaskGroup):
    """asyncio's; one that fails leaves no trace in the task that waited for it.

    To end its body asyncio's group cancels the task it is in, and where that waits for the group's end already, Python
    3.11 does not take that back. Of the count that is left `asyncio.timeout` in 3.11.2, which is Debian 12's, makes
    CancelledError in place of every later TimeoutError of the task.
    """

    async def __aenter__(self) -> TaskGroup:
        self._owner = asyncio.current_task()
        self._asked_before = self._owner.cancelling() if self._owner is not None else 0
        await super().__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await super().__aexit__(kind, error, trace)
        except BaseExceptionGroup:
            while self._owner is not None and self._owner.cancelling() > self._asked_before:
                self._owner.uncancel()
            raise
