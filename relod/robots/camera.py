"""Real cameras and the simulated one, read in the same way: always grabbing, only the newest frame kept.

A camera that is read only when somebody wants a frame hands out old ones: four V4L2 buffers read at 5 Hz are 0.8 s
behind, an HTTP stream falls behind without bound. So a thread grabs continuously, stamps each frame with the moment
of its capture as well as the source can tell, and reopens what stalled or was unplugged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Self, cast

import numpy as np

from ..config import CameraSettings
from ..errors import StartError
from ..runtime.clock import NS_PER_S, monotonic_ns
from ..runtime.shared import FrameRing
from ..types import Image
from .sources import CameraSource, Capture, Device, open_camera, parse_source
from .vision import cv2

__all__ = ["CameraReader", "CameraSource", "Capture", "fit_image", "parse_source", "run_camera"]

FIRST_FRAME_S = 5.0  # webcams need up to 2 s for exposure and focus before the first one
POLL_S = 0.1

_ASPECT_TOLERANCE = 0.01


def fit_image(image: Image, height: int, width: int) -> Image:
    """`image` at `height` x `width`: the middle of it where the aspect differs, then averaged down.

    Raises StartError for an image that is too small, or not `(H, W, 3) uint8`.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise StartError(f"the camera delivers {image.shape} {image.dtype}, not colour images (H, W, 3) uint8")
    have_height, have_width = image.shape[:2]
    if (have_height, have_width) == (height, width):
        return image
    if have_height < height or have_width < width:
        raise StartError(
            f"the camera delivers {have_width}x{have_height}, which cannot be scaled up to {width}x{height}",
            "choose a larger picture at the camera, or set the task's camera size to this one",
        )
    if abs(have_width * height / (have_height * width) - 1) > _ASPECT_TOLERANCE:
        keep_height = min(have_height, round(have_width * height / width))
        keep_width = min(have_width, round(have_height * width / height))
        top, left = (have_height - keep_height) // 2, (have_width - keep_width) // 2
        image = image[top : top + keep_height, left : left + keep_width]
    return cast(Image, cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA))


class CameraReader:
    """A camera and the thread that reads it; a context manager.

    Entering returns once there is a first frame that fits. Later stalls and unpluggings are survived: the camera
    is opened again until it is back.

    Args:
        source: which camera.
        settings: how to read it.
        height, width: size of the frames wanted, px.

    Raises:
        StartError: on entering, with what is missing.
    """

    def __init__(self, source: CameraSource, settings: CameraSettings, *, height: int, width: int) -> None:
        self.frames = 0  # frames that fitted
        self.stalls = 0  # reads that failed: hung, unplugged or damaged
        self.reopens = 0  # times the camera was opened after the first
        self.unfit = 0  # frames that could not be used
        self._source, self._settings = source, settings
        self._height, self._width = height, width
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._newest: Capture | None = None
        self._failure: Exception | None = None  # what ended the thread
        self._events: list[str] = []
        self._scaled = False
        self._thread = threading.Thread(target=self._run, name="camera", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        with self._changed:
            done = self._changed.wait_for(lambda: self._failure is not None or self.frames > 0, FIRST_FRAME_S)
        if done and self._failure is None:
            return self
        self.close()
        raise self._failure or StartError(
            f"camera {self._source} opens but delivers no frame within {FIRST_FRAME_S:g} s",
            "try it in another program; unplug it and plug it in again",
        )

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread and let the camera go; takes as long as the read in progress."""
        self._stop.set()
        self._thread.join()

    def read(self, timeout_s: float) -> Capture | None:
        """The newest frame that was not read yet; None when there is none for `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._newest is not None or self._failure is not None, timeout_s)
            newest, self._newest = self._newest, None
        if self._failure is not None:
            raise self._failure
        return newest

    def take_events(self) -> list[str]:
        """What happened since the last call, in words for people."""
        with self._changed:
            events, self._events = self._events, []
        return events

    def _run(self) -> None:
        try:
            self._grab()
        except Exception as error:  # handed to whoever reads; a thread's own end goes unseen
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _grab(self) -> None:
        device: Device | None = None
        lost_ns = 0  # when the frames stopped; 0 while they come
        try:
            while not self._stop.is_set():
                try:
                    device = device or open_camera(self._source, self._settings, self._height, self._width)
                except StartError:
                    if self.frames == 0:
                        raise
                capture = device.read() if device else None
                if capture is not None:
                    self._deliver(capture, lost_ns)
                    lost_ns = 0
                    continue
                if lost_ns == 0:
                    lost_ns = monotonic_ns()
                    self._tell(f"camera {self._source} stopped delivering; opening it again")
                if device is not None:
                    self.stalls += 1
                    device.close()
                    device = None
                self._stop.wait(self._settings.reopen_s)
        finally:
            if device is not None:
                device.close()

    def _deliver(self, capture: Capture, lost_ns: int) -> None:
        image = capture.image
        try:
            fitted = fit_image(image, self._height, self._width)
        except StartError as error:
            if self.frames == 0:
                raise
            self.unfit += 1
            if self.unfit == 1:
                self._tell(f"{error.message}; such frames are left out")
            return
        if fitted is not image and not self._scaled:
            self._scaled = True
            size = f"{image.shape[1]}x{image.shape[0]}"
            self._tell(f"camera {self._source} delivers {size}; scaled to {self._width}x{self._height}")
        if lost_ns:
            self.reopens += 1
            self._tell(f"camera {self._source} is back after {(capture.arrived_ns - lost_ns) / NS_PER_S:.1f} s")
        with self._changed:
            self._newest = Capture(captured_ns=capture.captured_ns, arrived_ns=capture.arrived_ns, image=fitted)
            self.frames += 1
            self._changed.notify_all()

    def _tell(self, event: str) -> None:
        with self._changed:
            self._events.append(event)


def run_camera(
    source: CameraSource,
    settings: CameraSettings,
    ring: FrameRing,
    stop: threading.Event,
    on_event: Callable[[str], None],
) -> None:
    """Publish a camera's frames into `ring` until `stop` is set; the body of the camera process.

    `on_event` is called in this thread with what people should know. Raises StartError when the camera cannot be
    had at the start; afterwards it is opened again for as long as it takes.
    """
    cv2.setNumThreads(1)
    ring.take_over()
    with CameraReader(source, settings, height=ring.height, width=ring.width) as reader:
        while not stop.is_set():
            capture = reader.read(POLL_S)
            if capture is not None:
                ring.publish(capture.captured_ns, capture.arrived_ns, capture.image)
            for event in reader.take_events():
                on_event(event)
