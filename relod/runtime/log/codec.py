"""Image codecs: the agent's images as bytes, raw or JPEG, and back.

JPEG loses something: who encodes an image goes on with the pixels that the bytes decode to, so that actor, log and
replay see the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, TypeAlias, cast

import numpy as np

from ...robots.vision import cv2, make_shrink
from ...types import Image

__all__ = ["Codec", "make_codec", "make_look"]

DEFAULT_QUALITY = 90
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers SOF0 to SOF15

Bytes: TypeAlias = bytes | memoryview


class Codec(Protocol):
    """Images `(H, W, 3) uint8` BGR at the agent's size as bytes, and back."""

    name: str

    def encode(self, image: Image) -> bytes:
        """The image as bytes; `ValueError` when it has another shape."""
        ...

    def decode(self, data: Bytes) -> Image:
        """The image in `data`, perhaps a read-only view of it; `ValueError` when there is none of the right size."""
        ...


def make_codec(name: str, quality: int = DEFAULT_QUALITY, *, image_hw: tuple[int, int]) -> Codec:
    """The codec of a log; `quality` is that of the JPEG, 1 to 100. `ValueError` when there is no such codec."""
    match name:
        case "raw":
            return _Raw(image_hw)
        case "jpeg":
            return _Jpeg(image_hw, quality)
    raise ValueError(f"unknown codec {name!r}: raw or jpeg")


def make_look(name: str, quality: int, *, image_hw: tuple[int, int]) -> Callable[[Image], Image]:
    """Camera image -> what the agent sees and what is kept: at its size, and after JPEG with what that loses."""
    shrink = make_shrink(image_hw)
    if name == "raw":
        return shrink
    codec = make_codec(name, quality, image_hw=image_hw)
    return lambda image: codec.decode(codec.encode(shrink(image)))


class _Raw:
    name = "raw"

    def __init__(self, image_hw: tuple[int, int]) -> None:
        self._shape = (*image_hw, 3)

    def encode(self, image: Image) -> bytes:
        _check_shape(image, self._shape)
        return image.tobytes()

    def decode(self, data: Bytes) -> Image:
        image = np.frombuffer(data, np.uint8)
        if image.size != math.prod(self._shape):
            raise ValueError(f"{image.size} bytes are no image {self._shape} uint8")
        return image.reshape(self._shape)


class _Jpeg:
    name = "jpeg"

    def __init__(self, image_hw: tuple[int, int], quality: int) -> None:
        self._shape = (*image_hw, 3)
        self._parameters = (cv2.IMWRITE_JPEG_QUALITY, quality)

    def encode(self, image: Image) -> bytes:
        _check_shape(image, self._shape)
        return cv2.imencode(".jpg", image, self._parameters)[1].tobytes()

    def decode(self, data: Bytes) -> Image:
        found = _jpeg_size(data)
        if found is None:
            raise ValueError(f"{len(data)} bytes are no JPEG")
        if found != self._shape[:2]:  # before memory is taken for pixels nobody wants
            raise ValueError(f"a JPEG is {found[0]}x{found[1]}, not {self._shape[0]}x{self._shape[1]}")
        try:
            image = cast(Image | None, cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))
        except cv2.error as error:  # no bytes at all, or a size beyond OpenCV's own limit
            raise ValueError(f"{len(data)} bytes are no JPEG: {error.err}") from error
        if image is None:
            raise ValueError(f"{len(data)} bytes are no JPEG")
        _check_shape(image, self._shape)
        return image


def _jpeg_size(data: Bytes) -> tuple[int, int] | None:
    """Height and width that a JPEG says it has (ITU-T T.81, B.2.2); None where it does not come to that."""
    view, at = memoryview(data), 2
    if bytes(view[:2]) != b"\xff\xd8":
        return None
    while at + 9 <= len(view):
        marker = view[at + 1]
        if view[at] != 0xFF or marker == 0xFF:  # fill bytes may come before a marker
            at += 1
            continue
        if marker in _FRAME_HEADERS:
            return int.from_bytes(view[at + 5 : at + 7], "big"), int.from_bytes(view[at + 7 : at + 9], "big")
        at += 2 + int.from_bytes(view[at + 2 : at + 4], "big")
    return None


def _check_shape(image: Image, shape: tuple[int, ...]) -> None:
    if image.shape != shape or image.dtype != np.uint8:
        raise ValueError(f"an image is {image.shape} {image.dtype}, not {shape} uint8")
