"""Drawing minibatches from the replay: the sampler's own index, the check against overwriting, and the copying."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..algos.batch import PIXEL, Batch, Window, copy_stacks
from ..types import FloatArray
from .replaytable import ReplayNews, ReplayTable

__all__ = ["ReplaySampler"]

MAX_REDRAWS = 100  # a redraw is rare, a hundred in a row mean that the writer laps the sampler
PART_BYTES = 4 * 1024 * 1024  # of a minibatch's images, least for a thread of its own


class ReplaySampler:
    """Draws minibatches; keeps its own index of what may be drawn, fed by `apply`.

    `threads` share the copying of large minibatches. For a learner on a GPU, `staged` minibatches hold whole frames
    and the corners of their windows, and lie in two buffers used in turn, page-locked where there is CUDA.
    """

    def __init__(self, table: ReplayTable, *, threads: int = 1, staged: bool = False) -> None:
        layout = table.layout
        self.env_steps = 0
        self.redrawn = 0  # draws repeated because a chunk was overwritten meanwhile
        self._table = table
        self._layout = layout
        self._rows = table.rows.reshape(-1)
        self._index = np.zeros(layout.chunks * layout.rows, np.int64)  # chunk * rows + row
        self._size = 0
        self._generations = np.zeros(layout.chunks, np.uint64)
        self._staged = staged
        self._buffers = 2 if staged else 1
        self._batches: deque[Batch] = deque()  # the newest is the last
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "relod-sampler") if threads > 1 else None

    def __len__(self) -> int:
        """Transitions that can be drawn."""
        return self._size

    def apply(self, data: bytes) -> None:
        """Take in news from the writer."""
        for news in ReplayNews.unpack(data):
            self.env_steps = max(self.env_steps, news.env_steps)
            if news.generation > self._generations[news.chunk]:
                self._forget(news.chunk)
                self._generations[news.chunk] = news.generation
            count = news.stop - news.start
            first = news.chunk * self._layout.rows + news.start
            self._index[self._size : self._size + count] = np.arange(first, first + count)
            self._size += count

    def sample(self, batch_size: int, *, n_step: int, gamma: float, window: Window, rng: np.random.Generator) -> Batch:
        """Draw uniformly, with replacement. The batch's memory is used again by a later call.

        Raises:
            ValueError: the replay is empty, or `n_step` is beyond the layout's lookahead.
        """
        if not 1 <= n_step <= self._layout.lookahead:
            raise ValueError(f"n_step is {n_step}; this replay offers 1 to {self._layout.lookahead}")
        rows = self._draw(batch_size, rng)
        corners = window.offsets(rng, batch_size)
        batch = self._memory(batch_size, window)
        for _ in range(MAX_REDRAWS):
            self._fill(batch, rows, n_step, gamma, corners, cut=not (self._staged or window.is_whole))
            chunks = rows // self._layout.rows
            stale = self._table.generations[chunks] != self._generations[chunks]
            if not stale.any():
                return batch
            for chunk in np.unique(chunks[stale]):
                self._forget(int(chunk))
            rows[stale] = self._draw(int(stale.sum()), rng)
            self.redrawn += int(stale.sum())
        raise ValueError(f"the replay is overwritten faster than it is read ({MAX_REDRAWS} redraws)")

    def _draw(self, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        if self._size == 0:
            raise ValueError("nothing to sample: the replay holds no transition yet")
        return self._index[rng.integers(0, self._size, count)]

    def _forget(self, chunk: int) -> None:
        kept = self._index[: self._size]
        kept = kept[kept // self._layout.rows != chunk]
        self._size = len(kept)
        self._index[: self._size] = kept

    def _memory(self, batch_size: int, window: Window) -> Batch:
        """A batch to be filled: memory that was used before, once its reader is done with it."""
        shape = (batch_size, self._layout.frames, *(window.in_hw if self._staged else window.out_hw), 3)
        if self._batches and self._batches[0].images.shape != shape:
            for old in self._batches:
                old.fence.wait()
            self._batches.clear()
        if len(self._batches) < self._buffers:
            self._batches.append(self._allocate(shape))
        else:
            self._batches.rotate(-1)
        batch = self._batches[-1]
        batch.fence.wait()
        return batch

    def _allocate(self, shape: tuple[int, ...]) -> Batch:
        size, layout = shape[0], self._layout
        images = self._zeros((2, *shape), np.uint8)
        return Batch(
            images=images[0],
            next_images=images[1],
            proprio=self._zeros((size, layout.proprio_dim), np.float32),
            next_proprio=self._zeros((size, layout.proprio_dim), np.float32),
            actions=self._zeros((size, layout.action_dim), np.float32),
            rewards=self._zeros((size,), np.float32),
            discounts=self._zeros((size,), np.float32),
            corners=self._zeros((size, 2), np.int64) if self._staged else None,
        )

    def _zeros(self, shape: tuple[int, ...], dtype: type[np.generic]) -> npt.NDArray[Any]:
        array = np.zeros(shape, dtype)
        return torch.from_numpy(array).pin_memory().numpy() if self._staged and torch.cuda.is_available() else array

    def _fill(
        self,
        batch: Batch,
        rows: npt.NDArray[np.int64],
        n_step: int,
        gamma: float,
        corners: npt.NDArray[np.int64],
        *,
        cut: bool,
    ) -> None:
        next_rows, batch.rewards[:], batch.discounts[:] = self._returns(rows, n_step, gamma)
        now, later = self._rows[rows], self._rows[next_rows]
        batch.proprio[:], batch.next_proprio[:] = now["proprio"], later["proprio"]
        batch.actions[:] = now["action"]
        if batch.corners is not None:
            batch.corners[:] = corners
        places = corners if cut else None
        self._copy_images(rows, now["slots"], places, batch.images)
        self._copy_images(next_rows, later["slots"], places, batch.next_images)

    def _returns(
        self, rows: npt.NDArray[np.int64], n_step: int, gamma: float
    ) -> tuple[npt.NDArray[np.int64], FloatArray, FloatArray]:
        """Rows of the bootstrap observations, discounted reward sums, and discounts (0 after a termination)."""
        reward, last, terminated = (self._rows[name] for name in ("reward", "last", "terminated"))
        at = rows.copy()
        total = np.zeros(len(rows))
        discount = np.ones(len(rows))
        going = np.ones(len(rows), bool)
        ended = np.zeros(len(rows), bool)
        for _ in range(n_step):
            total += np.where(going, discount * reward[at], 0.0)
            discount[going] *= gamma
            ended |= going & (terminated[at] != 0)
            ends = last[at] != 0
            at = np.minimum(at + going, len(self._rows) - 1)
            going &= ~ends
        discount[ended] = 0.0
        return at, total.astype(np.float32), discount.astype(np.float32)

    def _copy_images(
        self,
        rows: npt.NDArray[np.int64],  # (B,)
        slots: npt.NDArray[np.uint16],  # (B, k)
        corners: npt.NDArray[np.int64] | None,
        images: npt.NDArray[np.uint8],
    ) -> None:
        """Observations' frames, or windows of them, into `images` `(B, k, h, w, 3)`; large ones by several threads."""
        frames, pixels = self._table.frames, images.view(PIXEL)[..., 0]
        stacks = (rows // self._layout.rows * self._layout.slots)[:, None] + slots
        parts = max(1, min(self._threads, images.nbytes // PART_BYTES))
        edges = [len(rows) * part // parts for part in range(parts + 1)]

        def copy(start: int, stop: int) -> None:
            cut = None if corners is None else corners[start:stop]
            copy_stacks(frames, stacks[start:stop], cut, pixels[start:stop])

        others = [self._pool.submit(copy, a, b) for a, b in pairwise(edges[1:])] if self._pool is not None else []
        copy(0, edges[1])
        for other in others:
            other.result()
