"""The kinds of camera `--camera` can name, each behind the same two calls: read a stamped frame, close."""

from __future__ import annotations

import enum
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast
from urllib.parse import urlsplit

import numpy as np

from ..config import CameraSettings
from ..errors import SettingsError, StartError
from ..runtime.clock import NS_PER_MS, NS_PER_S, monotonic_ns
from ..types import Image
from .frameserver import HEADER, MAGIC
from .vision import cv2

__all__ = ["CameraSource", "Capture", "Device", "SourceKind", "open_camera", "parse_source"]

HTTP_OPEN_MS = 1000  # FFmpeg's own limit is 30 s; a camera on the same network opens in 42 ms at most
V4L2_SELECT_S = 1  # OpenCV waits 10 s for a frame if not told otherwise, and takes whole seconds only
MOST_PIXELS_A_SIDE = 8192


class SourceKind(enum.Enum):
    """How a camera is connected."""

    SIM = "sim"  # frames of a FrameServer's unix socket
    V4L2 = "v4l2"  # a device of this host
    HTTP = "http"  # an MJPEG stream


@dataclass(frozen=True, slots=True)
class CameraSource:
    """A camera as named by `--camera`."""

    kind: SourceKind
    address: str  # socket path, device path or URL

    def __str__(self) -> str:
        if self.kind is SourceKind.HTTP:
            url = urlsplit(self.address)  # may hold a password, which has no place in a log
            return url._replace(netloc=url.netloc.rpartition("@")[2]).geturl()
        return self.address


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """A frame as a camera delivered it."""

    captured_ns: int
    arrived_ns: int
    image: Image  # (H, W, 3) uint8, BGR


class Device(Protocol):
    """An open camera."""

    def read(self) -> Capture | None:
        """The next frame, in bounded time; None when the camera must be opened again."""
        ...

    def close(self) -> None:
        """Let the camera go."""
        ...


def parse_source(text: str) -> CameraSource:
    """What `--camera` means: `0` or `/dev/video0`, an `http(s)://` URL, or `sim:PATH` of a simulated world.

    Raises SettingsError for anything else.
    """
    kind, _, path = text.partition(":")
    if kind == "sim" and path:
        return CameraSource(SourceKind.SIM, path)
    if text.isascii() and text.isdigit():
        return CameraSource(SourceKind.V4L2, f"/dev/video{int(text)}")
    if text.startswith("/"):
        return CameraSource(SourceKind.V4L2, text)
    if kind in ("http", "https") and urlsplit(text).hostname:
        return CameraSource(SourceKind.HTTP, text)
    raise SettingsError(
        f"--camera {text!r} is no camera",
        "give a number or a device (0, /dev/video0) or the URL of an MJPEG stream (http://camera.local:8080/video);"
        " leave both --robot and --camera away to simulate",
    )


def open_camera(source: CameraSource, settings: CameraSettings, height: int, width: int) -> Device:
    """Open a camera and ask it for frames of `height` x `width`, which it need not honour.

    Raises StartError with what is missing.
    """
    if source.kind is SourceKind.SIM:
        return _SimDevice(source.address, settings)
    if source.kind is SourceKind.V4L2:
        return _open_v4l2(source.address, settings, height, width)
    return _open_http(source, settings)


class _SimDevice:
    """The raw frames of a `FrameServer`."""

    def __init__(self, path: str, settings: CameraSettings) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(settings.read_timeout_s)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise StartError(f"no simulated camera at {path}: {error.strerror or error}") from error

    def read(self) -> Capture | None:
        try:
            magic, height, width, captured_ns = HEADER.unpack(self._receive(HEADER.size))
            if magic != MAGIC or not 0 < height <= MOST_PIXELS_A_SIDE or not 0 < width <= MOST_PIXELS_A_SIDE:
                return None
            pixels = self._receive(height * width * 3)
        except OSError:  # silent, or gone
            return None
        image = np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
        return Capture(captured_ns=captured_ns, arrived_ns=monotonic_ns(), image=image)

    def _receive(self, size_bytes: int) -> bytearray:
        data = bytearray(size_bytes)
        view = memoryview(data)
        while view:
            count = self._socket.recv_into(view)
            if count == 0:
                raise ConnectionResetError("the simulated camera hung up")
            view = view[count:]
        return data

    def close(self) -> None:
        self._socket.close()


class _VideoDevice:
    """A camera behind OpenCV's VideoCapture."""

    def __init__(self, capture: cv2.VideoCapture, settings: CameraSettings, *, stamped: bool) -> None:
        self._capture = capture
        self._latency_ns = round(settings.latency_ms * NS_PER_MS)
        self._stamped = stamped

    def read(self) -> Capture | None:
        try:
            there, image = self._capture.read()
        except cv2.error:  # a frame damaged so that it cannot be decoded
            return None
        if not there or image is None:
            return None
        arrived_ns = monotonic_ns()
        captured_ns = self._stamp_ns(arrived_ns) if self._stamped else arrived_ns - self._latency_ns
        return Capture(captured_ns=captured_ns, arrived_ns=arrived_ns, image=cast(Image, image))

    def _stamp_ns(self, arrived_ns: int) -> int:
        """The driver's monotonic stamp, unless the driver does not give one."""
        stamp_ns = round(self._capture.get(cv2.CAP_PROP_POS_MSEC) * NS_PER_MS)
        return stamp_ns if 0 <= arrived_ns - stamp_ns < NS_PER_S else arrived_ns - self._latency_ns

    def close(self) -> None:
        self._capture.release()


def _open_v4l2(path: str, settings: CameraSettings, height: int, width: int) -> Device:
    if not os.path.exists(path):
        others = ", ".join(sorted(str(found) for found in Path("/dev").glob("video*")))
        raise StartError(f"no camera at {path}", f"there are: {others}" if others else "no camera is plugged in")
    if not os.access(path, os.R_OK | os.W_OK):
        raise StartError(f"no permission for camera {path}", "sudo usermod -aG video $USER, then log out and in again")
    os.environ.setdefault("OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT", str(V4L2_SELECT_S))
    capture = cv2.VideoCapture(path, cv2.CAP_V4L2)
    if not capture.isOpened():
        raise StartError(f"camera {path} cannot be opened", "another program may use it, or it is no camera")
    # In this order: the format decides which sizes there are, the size which rates, and only MJPG has them all.
    capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*"MJPG"))
    capture.set(cv2.CAP_PROP_FRAME_WIDTH, width)
    capture.set(cv2.CAP_PROP_FRAME_HEIGHT, height)
    capture.set(cv2.CAP_PROP_FPS, settings.fps)
    capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
    return _VideoDevice(capture, settings, stamped=True)


def _open_http(source: CameraSource, settings: CameraSettings) -> Device:
    # A stream whose read timed out never recovers, though it says it is open: every failed read means opening anew.
    limits = [
        *(cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, HTTP_OPEN_MS),
        *(cv2.CAP_PROP_READ_TIMEOUT_MSEC, round(settings.read_timeout_s * 1000)),
    ]
    capture = cv2.VideoCapture(source.address, cv2.CAP_FFMPEG, limits)
    if not capture.isOpened():
        raise StartError(f"camera {source} cannot be opened: {_http_trouble(source.address)}")
    return _VideoDevice(capture, settings, stamped=False)


def _http_trouble(address: str) -> str:
    """Why an MJPEG stream does not open, which OpenCV does not say."""
    url = urlsplit(address)
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname or "", port), timeout=HTTP_OPEN_MS / 1000).close()
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    return "the host answers, but not with a video stream; open the URL in a browser to check it"
