"""Bodies of the child processes that tests spawn; a module of its own, so that a child imports little."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass

import numpy as np

from relod.errors import StartError
from relod.runtime.channel import Channel, Event, Ready, Report
from relod.runtime.shared import FrameRing, SensorRing, Signal

# -- processes ---------------------------------------------------------------------------------------------------------


def obedient(channel: Channel, job: object) -> None:
    """Says what it has, waits to be asked, and tells what it was told."""
    channel.send(Ready({"pid": str(os.getpid()), "job": str(job)}))
    channel.send(Report({"value": 1.5, "name": "x"}))
    reason = asyncio.run(channel.finished(lambda text: channel.send(Event(f"told {text}"))))
    channel.send(Event(f"finished: {reason}"))


def refusing(channel: Channel, job: object) -> None:
    raise StartError(f"no robot at {job}", "plug it in")


def defective(channel: Channel, job: object) -> None:
    raise ZeroDivisionError("by nothing")


def verbose(channel: Channel, job: object) -> None:
    """Fails with an error far larger than a message may be."""
    raise ValueError("x" * 1_000_000)


def sudden(channel: Channel, job: object) -> None:
    """Dies without a word."""
    os._exit(7)


def mute(channel: Channel, job: object) -> None:
    """Never says that it is ready."""
    asyncio.run(channel.finished())


def brief(channel: Channel, job: object) -> None:
    """Its work is done at once."""
    channel.send(Ready())


def loud(channel: Channel, job: object) -> None:
    """Prints where SDKs print."""
    os.write(1, b"from the descriptor\n")
    print("from python", flush=True)
    channel.send(Ready())
    asyncio.run(channel.finished())


def deaf(channel: Channel, job: object) -> None:
    """Does not listen; SIGTERM ends it unless the job is "stubborn"."""
    if job == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel.send(Ready({"pid": str(os.getpid())}))
    while True:
        time.sleep(60)


def failing_then_well(channel: Channel, job: int) -> None:
    """The first start reports ready and then fails; the job counts starts."""
    channel.send(Ready())
    if job == 1:
        raise RuntimeError("once")
    asyncio.run(channel.finished())


# -- shared memory -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RingsJob:
    """Rings to write into, and a signal that says it was done."""

    sensors: SensorRing
    frames: FrameRing
    done: Signal
    packets: int


def write_rings(job: RingsJob) -> None:
    """Continue both rings with records made of their numbers."""
    job.sensors.ring.take_over()
    job.frames.take_over()
    for _ in range(job.packets):
        seq = job.sensors.ring.newest_seq + 1
        job.sensors.publish(10 * seq, [seq, -seq])
        frame_id = job.frames.newest_id + 1
        image = np.full((job.frames.height, job.frames.width, 3), frame_id % 256, np.uint8)
        job.frames.publish(frame_id, frame_id + 1, image)
    job.done.set()


def write_frames_for_ever(job: RingsJob) -> None:
    """Write as fast as it goes until killed."""
    job.frames.take_over()
    while True:
        frame_id = job.frames.newest_id + 1
        image = np.full((job.frames.height, job.frames.width, 3), frame_id % 256, np.uint8)
        job.frames.publish(frame_id, frame_id, image)
