"""The sentinel: a ticker that does nothing, so that its lateness is the machine's own.

It wakes every 5 ms, often enough to see every stall that could delay a cycle, on the same timer as the cycle's
and scheduled as the control process is.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from .channel import Channel, Ready
from .clock import NS_PER_MS, DeadlineTimer, Ticker, monotonic_ns
from .scheduling import enter
from .spans import SpanRing, Stage

__all__ = ["SentinelJob", "run_sentinel"]

PERIOD_NS = 5 * NS_PER_MS


@dataclass(frozen=True, slots=True, kw_only=True)
class SentinelJob:
    """What the sentinel process is given."""

    spans: SpanRing
    realtime: bool = False  # scheduled as the control process is


def run_sentinel(channel: Channel, job: SentinelJob) -> None:
    """Body of the sentinel process."""
    asyncio.run(_run(channel, job))


async def _run(channel: Channel, job: SentinelJob) -> None:
    spans = job.spans.writer("sentinel")
    timer = DeadlineTimer()
    if job.realtime:
        enter("sentinel")
    channel.send(Ready())
    finished = asyncio.create_task(channel.finished(), name="finished")
    ticker = Ticker(PERIOD_NS, monotonic_ns())
    index = 0
    while not finished.done():
        deadline_ns = ticker.next(monotonic_ns())
        await timer.wait_until(deadline_ns)
        spans.add(Stage.SENTINEL, index, deadline_ns, monotonic_ns())
        index += 1
    with contextlib.suppress(asyncio.CancelledError):
        await finished
