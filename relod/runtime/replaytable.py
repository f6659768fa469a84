"""The replay's memory: its sizes, the shared table, and the news that tell a sampler what is in it."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..algos.batch import PIXEL
from ..types import TaskSpec
from .clock import NS_PER_S
from .tensors import shared_tensor

__all__ = ["CHUNK_STEPS", "ReplayLayout", "ReplayNews", "ReplayTable"]

CHUNK_STEPS = 256
SPARE_FRAMES = 0.03  # share of frames that a camera may deliver beyond its rate before a chunk ends early


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
    extras_dim: int = 0  # what the algorithm stores beside each action
    streams: int = 1
    chunk_steps: int = CHUNK_STEPS

    @classmethod
    def for_task(
        cls, spec: TaskSpec, *, capacity: int, lookahead: int, streams: int = 1, extras_dim: int = 0
    ) -> ReplayLayout:
        """The layout for a task's observations."""
        per_step = min(float(spec.frames), (1 + SPARE_FRAMES) * spec.camera_fps * spec.cycle_ns / NS_PER_S)
        return cls(
            capacity=capacity,
            image_hw=spec.image_hw,
            frames=spec.frames,
            proprio_dim=spec.proprio_dim,
            action_dim=spec.action_dim,
            lookahead=lookahead,
            frames_per_step=max(1.0, per_step),
            streams=streams,
            extras_dim=extras_dim,
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

    @property
    def row_type(self) -> np.dtype[np.void]:
        """A row's fields."""
        return np.dtype(
            [
                ("proprio", "<f4", (self.proprio_dim,)),
                ("action", "<f4", (self.action_dim,)),
                ("reward", "<f4"),
                ("slots", "<u2", (self.frames,)),
                ("terminated", "u1"),
                ("last", "u1"),  # the episode's last step: its next row is the episode's last observation
                # Whose step it is, by which policy.
                ("stream", "<u2"),
                ("episode", "<u4"),
                ("index", "<u4"),
                ("epoch", "<u4"),
                ("updates", "<u4"),
                ("extras", "<f4", (self.extras_dim,)),
            ]
        )

    @property
    def step_bytes(self) -> float:
        """Bytes of a step on average: its new frames, as many as a camera may deliver, and its row."""
        return self.frames_per_step * math.prod(self.image_hw) * 3 + self.row_type.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the table when it is full; the kernel gives them as they are first written."""
        return self.frame_bytes + self.chunks * (8 + self.rows * self.row_type.itemsize)

    @property
    def frame_bytes(self) -> int:
        """Bytes of the table's frames alone."""
        return self.chunks * self.slots * math.prod(self.image_hw) * 3


class ReplayTable:
    """The shared memory; pickles into a spawned child."""

    def __init__(self, layout: ReplayLayout) -> None:
        self.layout = layout
        height, width = layout.image_hw
        self._frames = shared_tensor((layout.chunks * layout.slots, height, width, 3), torch.uint8)
        # Eight bytes a chunk for its generation, which only ever grows, then the rows.
        self._rows = shared_tensor((layout.nbytes - layout.frame_bytes,), torch.uint8)
        self._bind()

    def _bind(self) -> None:
        layout = self.layout
        self.frames = self._frames.numpy().view(PIXEL)[..., 0]
        rows: npt.NDArray[np.uint8] = self._rows.numpy()
        self.generations = rows[: 8 * layout.chunks].view(np.uint64)
        self.rows = rows[8 * layout.chunks :].view(layout.row_type).reshape(layout.chunks, layout.rows)

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
