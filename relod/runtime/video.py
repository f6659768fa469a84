"""Pictures and videos for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import StartError
from ..robots.vision import cv2
from ..types import Image

__all__ = ["Video", "write_strip"]

STRIP_PICTURES = 8
STRIP_HEIGHT = 120


class Video:
    """An MP4 of BGR images of one size; `StartError` when this OpenCV cannot write any."""

    def __init__(self, path: Path, hw: tuple[int, int], per_s: float) -> None:
        height, width = hw
        self._writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), per_s, (width, height))
        if not self._writer.isOpened():
            raise StartError(f"{path} cannot be written as MP4", "use PNG; this OpenCV may lack FFmpeg")

    def add(self, image: Image) -> None:
        """The next image."""
        self._writer.write(image)

    def close(self) -> None:
        """Complete the file."""
        self._writer.release()


def write_strip(path: Path, images: Sequence[Image]) -> None:
    """A PNG of some of the images side by side, the first and the last among them. `OSError`."""
    places = np.unique(np.linspace(0, len(images) - 1, STRIP_PICTURES).round().astype(int))
    height, width = images[0].shape[:2]
    size = (round(width * STRIP_HEIGHT / height), STRIP_HEIGHT)
    strip = cv2.hconcat([cv2.resize(images[place], size, interpolation=cv2.INTER_AREA) for place in places])
    path.write_bytes(cv2.imencode(".png", strip)[1].tobytes())
