"""What both kinds of environment have in common: spaces, observations, and pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from ..types import FloatArray, Image, TaskSpec

__all__ = ["RENDER_MODES", "action_space", "observation_space", "observe", "to_rgb"]

RENDER_MODES = ["rgb_array"]


def action_space(spec: TaskSpec) -> spaces.Box:
    """`(A,) float32` in [-1, 1]."""
    return spaces.Box(-1.0, 1.0, (spec.action_dim,), np.float32)


def observation_space(spec: TaskSpec, images: bool) -> spaces.Space[Any]:
    """A dictionary of `images` `(k, h, w, 3) uint8` BGR, oldest first, and `vector` `(P,) float32`; or the vector."""
    vector = spaces.Box(-np.inf, np.inf, (spec.proprio_dim,), np.float32)
    if not images:
        return vector
    return spaces.Dict({"images": spaces.Box(0, 255, (spec.frames, *spec.image_hw, 3), np.uint8), "vector": vector})


def observe(images: tuple[Image, ...], vector: FloatArray, with_images: bool) -> Any:
    """An observation of that space."""
    return {"images": np.stack(images), "vector": vector} if with_images else vector


def to_rgb(image: Image) -> Image:
    """A camera's picture as `render` gives it."""
    return np.ascontiguousarray(image[..., ::-1])
