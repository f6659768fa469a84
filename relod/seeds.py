"""Named random streams: one seed, one independent generator per purpose.

Each stream depends on the seed and its name only, so adding a stream never shifts another.
"""

from __future__ import annotations

import zlib

import numpy as np

__all__ = ["random_stream"]


def random_stream(seed: int, name: str) -> np.random.Generator:
    """The generator of stream `name` in a run with `seed`."""
    return np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(name.encode())]))
