"""A replay full of random pictures, for benchmarks that sample from one."""

from __future__ import annotations

import numpy as np

from ..runtime.clock import NS_PER_MS, monotonic_ns
from ..runtime.replay import ReplayLayout, ReplaySampler, ReplayTable, ReplayWriter
from ..types import Step, TaskSpec

__all__ = ["ACTION_DIM", "PROPRIO_DIM", "fill", "make_spec"]

PICTURES = 64
PROPRIO_DIM, ACTION_DIM = 8, 2


def make_spec(image_hw: tuple[int, int]) -> TaskSpec:
    """A Create's task at 30 frames a second and 45 ms a cycle."""
    return TaskSpec(
        name="synthetic",
        robot="none",
        cycle_ns=45_000_000,
        frames=3,
        camera_hw=image_hw,
        camera_fps=30.0,
        image_hw=image_hw,
        proprio_names=tuple(f"p{i}" for i in range(PROPRIO_DIM)),
        action_names=tuple(f"a{i}" for i in range(ACTION_DIM)),
        max_steps=1000,
        sensor_window=1,
    )


def fill(
    spec: TaskSpec, *, steps: int, lookahead: int, threads: tuple[int, ...], staged: bool = False
) -> tuple[tuple[ReplaySampler, ...], list[float]]:
    """Samplers with so many threads over one shared table of `steps` steps; every cycle sees one or two new frames.

    Also the milliseconds that adding each step took. `staged` as `ReplaySampler` has it.
    """
    table = ReplayTable(ReplayLayout.for_task(spec, capacity=steps, lookahead=lookahead))
    writer = ReplayWriter(table)
    samplers = tuple(ReplaySampler(table, threads=count, staged=staged) for count in threads)
    rng, newest = np.random.default_rng(0), spec.frames
    pictures = rng.integers(0, 256, (PICTURES, *spec.image_hw, 3), np.uint8)
    added_ms = []
    for index in range(steps):
        newest += 1 + (index % 3 == 0)
        frame_ids = tuple(range(newest - spec.frames + 1, newest + 1))
        step = Step(
            episode=0,
            index=index,
            frame_ids=frame_ids,
            proprio=rng.standard_normal(spec.proprio_dim, np.float32),
            action=rng.uniform(-1, 1, spec.action_dim).astype(np.float32),
            reward=-1.0,
            terminated=False,
            truncated=False,
            extras=np.zeros(0, np.float32),
            policy_version=(0, 0),
            observed_ns=0,
            acted_ns=0,
        )
        frames = {number: pictures[number % PICTURES] for number in frame_ids}
        start_ns = monotonic_ns()
        news = writer.append(step, frames)
        added_ms.append((monotonic_ns() - start_ns) / NS_PER_MS)
        for sampler in samplers:
            sampler.apply(news)
    return samplers, added_ms
