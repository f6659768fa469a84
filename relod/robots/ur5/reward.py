"""What a picture of the red target and a posture are worth. Pure; docs/tasks/ur5-visual-reacher.md has the formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ...types import Image
from ..vision import cv2

__all__ = ["DenseReward", "posture_cost", "target_fraction", "target_in_sight", "target_mask", "vision_weights"]

Form: TypeAlias = Literal["code", "paper"]

RED_LOW_BGR, RED_HIGH_BGR = (0, 0, 120), (50, 50, 255)
MOST_VISION = 4.0  # of a step in the published code's form, reached when the target fills about 2 % of the picture
LEAST_PIXELS = 4  # of a target that is in sight; fewer may be noise


def target_mask(image: Image) -> Image:
    """The pixels of a BGR image `(H, W, 3)` that are as red as the target, `(H, W) uint8`, 255 or 0."""
    mask: Image = cv2.inRange(image, RED_LOW_BGR, RED_HIGH_BGR)  # type: ignore[assignment]
    return mask


def target_fraction(image: Image) -> float:
    """Part of a picture that shows the target, 0 to 1."""
    mask = target_mask(image)
    return cv2.countNonZero(mask) / mask.size


def target_in_sight(image: Image) -> bool:
    """Whether a picture shows the target, and not only noise."""
    return cv2.countNonZero(target_mask(image)) >= LEAST_PIXELS


def vision_weights(height: int, width: int) -> npt.NDArray[np.float64]:
    """What a pixel is worth, `(height, width)`: 1/4 in the middle, falling to 0 at the edges."""
    down = 0.5 - np.abs(np.arange(height) - height // 2) / height
    right = 0.5 - np.abs(np.arange(width) - width // 2) / width
    return np.outer(down, right)


def posture_cost(q: Sequence[float], form: Form) -> float:
    """How far the posture is from the wanted one, in rad.

    The published code's form is zero for a camera that is level and faces the monitor. The paper's printed form
    groups the joints in another way and is 6.3 at the reset posture.
    """
    base, shoulder, elbow, wrist_1, wrist_2 = q[:5]
    if form == "code":
        return abs(base + wrist_2) + abs(math.pi + shoulder + elbow + wrist_1)
    return abs(math.pi - (base + shoulder + elbow)) + abs(wrist_1 + wrist_2)


class DenseReward:
    """Much target in the middle of the picture is good, a camera that is turned costs.

    Args:
        alpha: weight of the picture.
        beta: weight of the posture.
        form: the published code's, with weights of pixels from 0 to 1/4 and the picture worth at most 4; or as printed
            in the paper, with weights from 0 to 1 and without a limit.
    """

    def __init__(self, *, alpha: float, beta: float, form: Form) -> None:
        self._alpha, self._beta = alpha, beta
        self._form: Form = form
        self._weights = np.zeros((0, 0))

    def __call__(self, image: Image, q: Sequence[float]) -> float:
        """The reward of a picture `(H, W, 3) uint8` BGR and a posture of six joints."""
        mask = target_mask(image)
        if self._weights.shape != mask.shape:
            self._weights = vision_weights(*mask.shape)
        vision = self._alpha * float(self._weights[mask > 0].sum()) / mask.size
        vision = min(vision, MOST_VISION) if self._form == "code" else 4 * vision
        return vision - self._beta * posture_cost(q, self._form)
