"""The replay: transitions in shared memory, written by whoever receives steps, sampled by the update worker.

Steps lie in chunks of 256 rows with their own frames, leased from one pool by the streams (one per robot) and evicted
oldest first. A row is a step, or the true last observation of an episode. The next observation of a row is the next
row, so an n-step window must lie within one chunk: when a chunk fills up in mid-episode its last n rows and their
frames are copied to the new one, and only there become transitions. Every transition is offered exactly once, with
its true window, and none mixes episodes.

What may be sampled is told by `ReplayNews` through a pipe, never by a bare store; the sampler keeps its own index. A
chunk is retired, and the news of it sent, one chunk before it is needed again; each draw is checked against the
chunks' generations after copying, and what was overwritten meanwhile is drawn again.

Frames and rows lie in torch tensors that torch.multiprocessing hands to the worker; both ends look at them through
numpy, which copies single pixels of 3 bytes faster than torch.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from ..algos.batch import Batch, Window, copy_window
from ..types import EpisodeEnd, FloatArray, Image, Step, TaskSpec
from .clock import NS_PER_S
from .tensors import shared_tensor

__all__ = ["ReplayLayout", "ReplayNews", "ReplaySampler", "ReplayTable", "ReplayWriter"]

CHUNK_STEPS = 256
MAX_REDRAWS = 100  # a redraw is rare, a hundred in a row mean that the writer laps the sampler
PIXEL = np.dtype("V3")  # one BGR pixel as an item


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayLayout:
    """Sizes of a replay; both ends must agree on them."""

    capacity: int  # steps kept at least
    image_hw: tuple[int, int]
    frames: int  # k
    proprio_dim: int
    action_dim: int
    lookahead: int  # n, the longest n-step window
    frames_per_step: float  # new camera frames per action cycle
    streams: int = 1
    chunk_steps: int = CHUNK_STEPS

    @classmethod
    def for_task(cls, spec: TaskSpec, *, capacity: int, lookahead: int, streams: int = 1) -> ReplayLayout:
        """The layout for a task's observations."""
        per_step = min(float(spec.frames), 1.05 * spec.camera_fps * spec.cycle_ns / NS_PER_S)
        return cls(
            capacity=capacity,
            image_hw=spec.image_hw,
            frames=spec.frames,
            proprio_dim=spec.proprio_dim,
            action_dim=spec.action_dim,
            lookahead=lookahead,
            frames_per_step=max(1.0, per_step),
            streams=streams,
        )

    @property
    def chunks(self) -> int:
        """Chunks in the pool: the capacity, one being filled by each stream, one retired ahead."""
        return math.ceil(self.capacity / self.chunk_steps) + self.streams + 1

    @property
    def rows(self) -> int:
        """Rows in a chunk: its own and those copied in."""
        return self.chunk_steps + self.lookahead

    @property
    def slots(self) -> int:
        """Frames in a chunk; where a camera delivers more than expected, the chunk just ends earlier."""
        return math.ceil(self.chunk_steps * self.frames_per_step) + (self.lookahead + 2) * self.frames


class ReplayTable:
    """The shared memory; pickles into a spawned child."""

    def __init__(self, layout: ReplayLayout) -> None:
        self.layout = layout
        height, width = layout.image_hw
        self._frames = shared_tensor((layout.chunks * layout.slots, height, width, 3), torch.uint8)
        # Eight bytes a chunk for its generation, which only ever grows, then the rows.
        self._rows = shared_tensor((layout.chunks * (8 + layout.rows * self._row_type().itemsize),), torch.uint8)
        self._bind()

    def _row_type(self) -> np.dtype[np.void]:
        layout = self.layout
        return np.dtype(
            [
                ("proprio", "<f4", (layout.proprio_dim,)),
                ("action", "<f4", (layout.action_dim,)),
                ("reward", "<f4"),
                ("slots", "<u2", (layout.frames,)),
                ("terminated", "u1"),
                ("last", "u1"),  # the episode's last step: its next row is the episode's last observation
            ]
        )

    def _bind(self) -> None:
        layout = self.layout
        self.frames = self._frames.numpy().view(PIXEL)[..., 0]
        rows: npt.NDArray[np.uint8] = self._rows.numpy()
        self.generations = rows[: 8 * layout.chunks].view(np.uint64)
        self.rows = rows[8 * layout.chunks :].view(self._row_type()).reshape(layout.chunks, layout.rows)

    def __getstate__(self) -> dict[str, object]:
        return {"layout": self.layout, "_frames": self._frames, "_rows": self._rows}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._bind()


_NEWS = struct.Struct("<QQIHH")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayNews:
    """Rows `start..stop` of a chunk became transitions. A generation above the last one said the chunk was emptied."""

    chunk: int
    generation: int
    start: int
    stop: int
    env_steps: int  # environment steps of the run so far

    def pack(self) -> bytes:
        """24 bytes; messages may be joined."""
        return _NEWS.pack(self.env_steps, self.generation, self.chunk, self.start, self.stop)

    @classmethod
    def unpack(cls, data: bytes) -> Iterator[ReplayNews]:
        """All news in `data`."""
        for env_steps, generation, chunk, start, stop in _NEWS.iter_unpack(data):
            yield cls(chunk=chunk, generation=generation, start=start, stop=stop, env_steps=env_steps)


@dataclass(slots=True)
class _Chunk:
    """A chunk as its writer sees it."""

    number: int
    used_rows: int = 0
    slots: dict[int, int] = field(default_factory=dict)  # frame id -> slot


@dataclass(slots=True)
class _Stream:
    """One robot's open chunk, and the rows of its open episode that still wait for their window, oldest first."""

    chunk: _Chunk | None = None
    before: _Chunk | None = None  # the chunk filled before, for frames that the new one repeats
    waiting: deque[tuple[int, tuple[int, ...]]] = field(default_factory=deque)  # (row, frame ids)


class ReplayWriter:
    """Appends steps; the one writer of a table. Every call returns the news to tell the sampler, in `bytes`."""

    def __init__(self, table: ReplayTable, *, env_steps: int = 0) -> None:
        layout = table.layout
        self.env_steps = env_steps
        self._table = table
        self._layout = layout
        self._streams: dict[int, _Stream] = {}
        self._free = deque(range(layout.chunks))
        self._leased: dict[int, None] = {}  # chunks in use, in the order of their leases
        self._open: set[int] = set()
        self._offered = np.zeros((layout.chunks, layout.rows), bool)
        self._news: list[bytes] = []

    def append(self, step: Step, frames: Mapping[int, Image], stream: int = 0) -> bytes:
        """Add a step; `frames` holds at least those it names that the stream's previous row did not."""
        state = self._streams.setdefault(stream, _Stream())
        row = self._add_row(state, step.proprio, step.frame_ids, frames)
        assert state.chunk is not None
        record = self._table.rows[state.chunk.number, row]
        record["action"], record["reward"], record["terminated"] = step.action, step.reward, step.terminated
        self.env_steps += 1
        self._offer_complete(state, row)
        state.waiting.append((row, step.frame_ids))
        return self._take_news(state)

    def close_episode(self, end: EpisodeEnd, frames: Mapping[int, Image], stream: int = 0) -> bytes:
        """End the episode with its true last observation; all its steps are transitions now."""
        state = self._streams.setdefault(stream, _Stream())
        if state.waiting:
            self._add_row(state, end.proprio, end.frame_ids, frames)
            self._end_at(state, state.waiting[-1][0])
        return self._take_news(state)

    def abandon(self, stream: int = 0) -> bytes:
        """End an episode whose last observation is unknown: its last step becomes the last observation."""
        state = self._streams.setdefault(stream, _Stream())
        if state.waiting:
            state.waiting.pop()
        if state.waiting:
            self._end_at(state, state.waiting[-1][0])
        return self._take_news(state)

    def release(self, stream: int) -> bytes:
        """Forget a stream that will not come back, so that its open chunk can be evicted in its turn."""
        news = self.abandon(stream)
        state = self._streams.pop(stream)
        if state.chunk is not None:
            self._open.discard(state.chunk.number)
        return news

    def reissue(self) -> bytes:
        """News of everything that can be sampled, for a worker that starts over."""
        news = [self._pack(chunk, 0, 0) for chunk in range(self._layout.chunks)]
        for chunk in self._leased:
            edges = np.flatnonzero(np.diff(self._offered[chunk], prepend=False, append=False))
            news += [self._pack(chunk, int(a), int(b)) for a, b in edges.reshape(-1, 2)]
        return b"".join(news)

    def _add_row(
        self, state: _Stream, proprio: FloatArray, frame_ids: tuple[int, ...], frames: Mapping[int, Image]
    ) -> int:
        chunk = state.chunk
        new_frames = len(frame_ids) if chunk is None else len(set(frame_ids) - chunk.slots.keys())
        if chunk is None or chunk.used_rows == self._layout.rows or len(chunk.slots) + new_frames > self._layout.slots:
            chunk = self._roll_over(state)
        row = self._write_row(state, chunk, proprio, frame_ids, frames)
        state.before = None
        return row

    def _write_row(
        self,
        state: _Stream,
        chunk: _Chunk,
        proprio: FloatArray,
        frame_ids: tuple[int, ...],
        frames: Mapping[int, Image],
    ) -> int:
        record = self._table.rows[chunk.number, chunk.used_rows]
        record["slots"] = [self._slot(state, chunk, frame_id, frames) for frame_id in frame_ids]
        record["proprio"] = proprio
        record["last"] = False
        chunk.used_rows += 1
        return chunk.used_rows - 1

    def _slot(self, state: _Stream, chunk: _Chunk, frame_id: int, frames: Mapping[int, Image]) -> int:
        known = chunk.slots.get(frame_id)
        if known is not None:
            return known
        base, before = self._layout.slots, state.before
        slot = len(chunk.slots)
        if frame_id in frames:
            target = self._table.frames[chunk.number * base + slot]
            target[...] = np.ascontiguousarray(frames[frame_id]).view(PIXEL)[..., 0]
        elif before is not None and frame_id in before.slots:
            source = self._table.frames[before.number * base + before.slots[frame_id]]
            self._table.frames[chunk.number * base + slot] = source
        else:
            raise ValueError(f"frame {frame_id} was neither given nor part of the stream's previous row")
        chunk.slots[frame_id] = slot
        return slot

    def _roll_over(self, state: _Stream) -> _Chunk:
        """A new chunk for the stream, begun with the rows that still wait for their window."""
        state.before, old_rows = state.chunk, list(state.waiting)
        chunk = state.chunk = _Chunk(self._lease())
        state.waiting.clear()
        if state.before is None:
            return chunk
        for old_row, frame_ids in old_rows:
            old = self._table.rows[state.before.number, old_row]
            row = self._write_row(state, chunk, old["proprio"], frame_ids, {})
            record = self._table.rows[chunk.number, row]
            for name in ("action", "reward", "terminated"):
                record[name] = old[name]
            state.waiting.append((row, frame_ids))
        self._open.discard(state.before.number)
        return chunk

    def _offer_complete(self, state: _Stream, newest_row: int) -> None:
        """Offer the rows whose full window ends at or before `newest_row`."""
        start = stop = None
        while state.waiting and newest_row - state.waiting[0][0] >= self._layout.lookahead:
            row, _ = state.waiting.popleft()
            start, stop = row if start is None else start, row + 1
        if start is not None and stop is not None:
            self._offer(state, start, stop)

    def _end_at(self, state: _Stream, last_row: int) -> None:
        """Mark the episode's last step; its windows are as complete as they will ever be."""
        assert state.chunk is not None
        self._table.rows[state.chunk.number, last_row]["last"] = True
        self._offer(state, state.waiting[0][0], last_row + 1)
        state.waiting.clear()

    def _offer(self, state: _Stream, start: int, stop: int) -> None:
        assert state.chunk is not None
        self._offered[state.chunk.number, start:stop] = True
        self._news.append(self._pack(state.chunk.number, start, stop))

    def _lease(self) -> int:
        chunk = self._free.popleft()
        if not self._free:
            self._retire(next(number for number in self._leased if number not in self._open))
        self._leased[chunk] = None
        self._open.add(chunk)
        return chunk

    def _retire(self, chunk: int) -> None:
        del self._leased[chunk]
        self._table.generations[chunk] += np.uint64(1)
        self._offered[chunk] = False
        self._free.append(chunk)
        self._news.append(self._pack(chunk, 0, 0))

    def _pack(self, chunk: int, start: int, stop: int) -> bytes:
        generation = int(self._table.generations[chunk])
        return ReplayNews(chunk=chunk, generation=generation, start=start, stop=stop, env_steps=self.env_steps).pack()

    def _take_news(self, state: _Stream) -> bytes:
        """The news so far, closed by one with the count of steps."""
        chunk = 0 if state.chunk is None else state.chunk.number
        news, self._news = b"".join([*self._news, self._pack(chunk, 0, 0)]), []
        return news


class ReplaySampler:
    """Draws minibatches; keeps its own index of what may be drawn, fed by `apply`."""

    def __init__(self, table: ReplayTable) -> None:
        layout = table.layout
        self.env_steps = 0
        self.redrawn = 0  # draws repeated because a chunk was overwritten meanwhile
        self._table = table
        self._layout = layout
        self._rows = table.rows.reshape(-1)
        self._index = np.zeros(layout.chunks * layout.rows, np.int64)  # chunk * rows + row
        self._size = 0
        self._generations = np.zeros(layout.chunks, np.uint64)
        self._scratch = np.zeros((layout.frames, *layout.image_hw), PIXEL)
        self._pixels = np.zeros(0, PIXEL)

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
        """Draw uniformly, with replacement. The batch's memory is used again by the next call.

        Raises:
            ValueError: the replay is empty, or `n_step` is beyond the layout's lookahead.
        """
        if not 1 <= n_step <= self._layout.lookahead:
            raise ValueError(f"n_step is {n_step}; this replay offers 1 to {self._layout.lookahead}")
        rows = self._draw(batch_size, rng)
        corners = window.offsets(rng, batch_size)
        for _ in range(MAX_REDRAWS):
            batch = self._gather(rows, n_step, gamma, window, corners)
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

    def _gather(
        self,
        rows: npt.NDArray[np.int64],
        n_step: int,
        gamma: float,
        window: Window,
        corners: npt.NDArray[np.int64],
    ) -> Batch:
        next_rows, rewards, discounts = self._returns(rows, n_step, gamma)
        now, later = self._rows[rows], self._rows[next_rows]
        slots = np.stack([now["slots"], later["slots"]])
        pixels = self._copy_images(np.stack([rows, next_rows]), slots, window, corners)
        return Batch(
            images=pixels[0],
            next_images=pixels[1],
            proprio=np.ascontiguousarray(now["proprio"]),
            next_proprio=np.ascontiguousarray(later["proprio"]),
            actions=np.ascontiguousarray(now["action"]),
            rewards=rewards,
            discounts=discounts,
        )

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
        rows: npt.NDArray[np.int64],  # (2, B)
        slots: npt.NDArray[np.uint16],  # (2, B, k)
        window: Window,
        corners: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.uint8]:
        """Observations' and next observations' frames, `(2, B, k, h, w, 3) uint8`."""
        layout, shape = self._layout, (*slots.shape, *window.out_hw)
        if self._pixels.shape != shape:
            self._pixels = np.zeros(shape, PIXEL)
        numbers = (rows // layout.rows * layout.slots)[..., None] + slots
        places = corners.tolist()
        for targets, stacks in zip(self._pixels, numbers, strict=True):
            for target, stack, (y, x) in zip(targets, stacks, places, strict=True):
                np.take(self._table.frames, stack, axis=0, out=self._scratch, mode="clip")
                copy_window(self._scratch, y, x, target)
        return self._pixels.view(np.uint8).reshape(*shape, 3)
