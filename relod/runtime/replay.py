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

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..algos.batch import PIXEL
from ..types import EpisodeEnd, FloatArray, Image, Step
from .replaytable import ReplayLayout, ReplayNews, ReplayTable
from .sampler import ReplaySampler

__all__ = ["ReplayLayout", "ReplayNews", "ReplaySampler", "ReplayTable", "ReplayWriter"]


CARRIED = ("action", "reward", "terminated", "stream", "episode", "index", "epoch", "updates", "extras")  # of a row


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
        self._leased: dict[int, int] = {}  # chunks in use and their first step, in the order of their leases
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
        record["stream"], record["episode"], record["index"] = stream, step.episode, step.index
        record["epoch"], record["updates"] = step.policy_version
        record["extras"] = step.extras if step.extras.size == self._layout.extras_dim else 0.0
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

    @property
    def first_step(self) -> int:
        """The oldest environment step here: a writer fed from it on fills its table in the same way (one stream)."""
        return next(iter(self._leased.values()), self.env_steps)

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
        chunk = state.chunk = _Chunk(self._lease(self.env_steps - len(old_rows)))
        state.waiting.clear()
        if state.before is None:
            return chunk
        for old_row, frame_ids in old_rows:
            old = self._table.rows[state.before.number, old_row]
            row = self._write_row(state, chunk, old["proprio"], frame_ids, {})
            record = self._table.rows[chunk.number, row]
            for name in CARRIED:
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

    def _lease(self, first_step: int) -> int:
        chunk = self._free.popleft()
        if not self._free:
            self._retire(next(number for number in self._leased if number not in self._open))
        self._leased[chunk] = first_step
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
