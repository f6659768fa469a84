"""The camera process: hosts the reader of `robots/camera.py` and publishes its frames into shared memory."""

from __future__ import annotations

import select
import threading
from dataclasses import dataclass

from ..config import CameraSettings
from ..robots.camera import parse_source, run_camera
from .channel import Channel, Event, Finish, Ready
from .shared import FrameRing

__all__ = ["CameraJob", "run_camera_process"]

POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class CameraJob:
    """What the camera process is given."""

    source: str
    settings: CameraSettings
    frames: FrameRing


def run_camera_process(channel: Channel, job: CameraJob) -> None:
    """Body of the camera process; it is ready once the first frame is there."""
    stop = threading.Event()
    listener = threading.Thread(target=_listen, args=(channel, job.frames, stop), name="listen", daemon=True)
    listener.start()

    def tell(text: str) -> None:
        channel.send(Event(text))

    try:
        run_camera(
            parse_source(job.source),
            job.settings,
            job.frames,
            stop,
            tell,
        )
    finally:
        stop.set()
        listener.join()


def _listen(channel: Channel, frames: FrameRing, stop: threading.Event) -> None:
    """Say ready at the first frame; set `stop` when the parent asks for the end or is gone."""
    first_id, ready = frames.newest_id, False
    while not stop.is_set():
        select.select([channel], [], [], POLL_S if not ready else 10 * POLL_S)
        if not ready and frames.newest_id > first_id:
            ready = channel.send(Ready())
        try:
            if any(isinstance(message, Finish) for message in channel.pending()):
                stop.set()
        except EOFError:
            stop.set()
