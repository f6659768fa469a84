"""Image augmentation on torch tensors: the same windows as `batch.copy_window`, gathered for a whole batch at once.

On a GPU, which is handed whole frames, the gather is the fast way; on a CPU the slice copies of `batch` are. Both give
the same bytes for the same corners.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gather_windows"]


def gather_windows(images: Tensor, corners: Tensor, out_hw: tuple[int, int]) -> Tensor:
    """Windows of `images` `(B, k, H, W, 3) uint8` at `corners` `(B, 2) int64` (y, x), edges replicated.

    Returns `(B, k, h, w, 3)`; all frames of a stack share their sample's corner.
    """
    batch, frames, height, width = images.shape[:4]
    device = images.device
    rows = (corners[:, :1] + torch.arange(out_hw[0], device=device)).clamp_(0, height - 1)
    columns = (corners[:, 1:] + torch.arange(out_hw[1], device=device)).clamp_(0, width - 1)
    sample = torch.arange(batch, device=device)[:, None, None, None]
    frame = torch.arange(frames, device=device)[None, :, None, None]
    return images[sample, frame, rows[:, None, :, None], columns[:, None, None, :]]
