"""The emulator process: the simulated world in real time, behind the robot's real wire protocol.

It outlives its parent until the wheels stand, so that its log can say what the robot did when everything died.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from pathlib import Path

import uvloop

from ..config import Section
from ..loading import load_attribute
from ..packages import calling, full_name
from ..types import TaskSpec
from .channel import Channel, Ready
from .spans import SpanRing, SpanWriter, Stage

__all__ = ["NEW_EPISODE", "WorldJob", "run_world"]

NEW_EPISODE = "new episode"  # told by the parent; a world may change its look


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldJob:
    """What the emulator process is given."""

    serve: str  # "module:attribute" of the robot's serve_world
    settings: Section
    seed: int
    spec: TaskSpec
    folder: Path  # for its sockets
    wheel_log: Path | None
    spans: SpanRing | None = None  # with a row for the writer "world"


class _SpanWitness:
    """Stamps what the robot says of itself."""

    def __init__(self, writer: SpanWriter) -> None:
        self._writer = writer
        self._packets = self._commands = 0

    def sensed(self, true_ns: int, sent_ns: int) -> None:
        self._packets += 1
        self._writer.add(Stage.SENSED, self._packets, true_ns, sent_ns)

    def obeyed(self, came_ns: int, moved_ns: int) -> None:
        self._commands += 1
        self._writer.add(Stage.MOVED, self._commands, came_ns, moved_ns)


def run_world(channel: Channel, job: WorldJob) -> None:
    """Body of the emulator process."""
    uvloop.run(_run(channel, job))


async def _run(channel: Channel, job: WorldJob) -> None:
    stop, new_episode = asyncio.Event(), asyncio.Event()

    def on_tell(text: str) -> None:
        if text == NEW_EPISODE:
            new_episode.set()

    async def until_finished() -> None:
        await channel.finished(on_tell)
        stop.set()

    finished = asyncio.create_task(until_finished(), name="finished")
    frames = job.folder / "frames.sock"
    try:
        serve = load_attribute(job.serve, "the simulated world")
        with calling(full_name(serve)):
            await serve(
                job.settings,
                job.seed,
                job.spec,
                on_ready=lambda where: channel.send(Ready({**where, "frames": str(frames)})),
                stop=stop,
                new_episode=new_episode,
                control=job.folder / "world.sock",
                frames=frames,
                wheel_log=job.wheel_log,
                witness=_SpanWitness(job.spans.writer("world")) if job.spans is not None else None,
            )
    finally:
        finished.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await finished
