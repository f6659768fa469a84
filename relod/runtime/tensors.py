"""Torch tensors in shared memory, handed to spawned processes by torch.multiprocessing.

The memory is a memfd, so nothing named is left in /dev/shm after any death, and a container's limit on /dev/shm,
commonly 64 MB, does not apply.
"""

from __future__ import annotations

import math
import os

import torch

__all__ = ["shared_tensor"]


def shared_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros that every process it is sent to shares."""
    size_bytes = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
    fd = os.memfd_create("relod-tensor", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size_bytes)
        # The call with which torch.multiprocessing itself attaches a tensor it was sent; it duplicates the descriptor.
        storage = torch.UntypedStorage._new_shared_fd_cpu(fd, size_bytes)  # type: ignore[attr-defined]
    finally:
        os.close(fd)
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)
