"""OpenCV, imported in one place, so that a machine that lacks its libraries gets one clear error.

Everything in relod takes `cv2` from here: `from .vision import cv2`.
"""

from __future__ import annotations

from collections.abc import Callable

from ..errors import StartError
from ..types import Image

__all__ = ["cv2", "make_shrink"]


def import_error(error: ImportError) -> StartError:
    """What to tell about a `cv2` that cannot be imported."""
    return StartError(
        f"OpenCV cannot be imported ({error})",
        "install its system libraries: apt-get install libgl1 libglib2.0-0 (libglib2.0-0t64 on Debian 13 and"
        " Ubuntu 24.04); or use the build that needs none: pip uninstall opencv-python && pip install"
        " opencv-python-headless (never both at once, they share one folder)",
    )


try:
    import cv2
except ImportError as error:
    raise import_error(error) from error


def make_shrink(image_hw: tuple[int, int]) -> Callable[[Image], Image]:
    """The function from a full-size image to the agent's `(H, W, 3) uint8`; area averages, so it is a pure function
    of the pixels. An image of the right size is returned as it is."""
    height, width = image_hw
    cv2.setNumThreads(1)  # its thread pool costs more than an image this small, and disturbs the deadlines

    def shrink(image: Image) -> Image:
        if image.shape[:2] == (height, width):
            return image
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)  # type: ignore[return-value]

    return shrink
