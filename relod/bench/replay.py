"""`relod bench replay`: how long a minibatch takes from the replay to the update, and what adding a step takes.

The minibatch is the paper's: 256 observations of three 160x120 frames and their successors, 88 MB. In turns:

    shared   the sampler gathers it from the shared replay into this process's memory; with one thread and with two
    queue    a spawned process that holds it ready sends it, pickled, through a multiprocessing queue
    memcpy   one thread copies as many bytes from array to array

Time runs from asking to having; the queue's producer does not even draw the minibatch.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.queues import Queue
from queue import Empty
from typing import Any

import numpy as np
import numpy.typing as npt

from ..algos.batch import Window, centre_window, crop_window
from ..errors import StartError
from ..runtime.clock import NS_PER_MS, monotonic_ns
from ..runtime.replay import ReplayLayout, ReplaySampler
from .form import Findings, Series, positive, ratio
from .syntheticreplay import ACTION_DIM, PROPRIO_DIM, fill, make_spec

__all__ = ["ROUNDS", "SHORT_ROUNDS", "ReplayRequest", "measure_replay"]

ROUNDS, SHORT_ROUNDS = 50, 5
BASELINE = "shared-1-thread"
IMAGE_HW, BATCH_SIZE, FRAMES = (120, 160), 256, 3
STEPS = 8_000  # 0.7 GB, far beyond the caches
CAPACITY = 100_000  # of the presets, for the bytes a step
SOURCE_BATCHES = 4  # memcpy's source, so that it does not lie in a cache either
START_LIMIT_S = 60.0  # of the producer: imports on a busy small machine
TUNABLES = "GLIBC_TUNABLES"  # glibc copies large blocks past the caches if told to, which halves the memory traffic

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRequest:
    """What to measure: every way `rounds` times, over a replay of `steps` steps."""

    rounds: int = ROUNDS
    steps: int = STEPS

    def __post_init__(self) -> None:
        positive("--rounds", self.rounds)
        positive("--steps", self.steps)


def measure_replay(request: ReplayRequest) -> Findings:
    """Minibatches out of the shared replay beside a pickling queue and memcpy; rates; bytes per step."""
    samplers, added_ms = fill(make_spec(IMAGE_HW), steps=request.steps, lookahead=1, threads=(1, 2, 1, 2))
    context = multiprocessing.get_context("spawn")
    requests: Queue[bool] = context.Queue()
    batches: Queue[Arrays] = context.Queue(2)
    producer = context.Process(target=_produce, args=(requests, batches), name="producer", daemon=True)
    producer.start()
    try:
        samples = _measure(_make_ways(samplers, requests, batches), request.rounds)
        requests.put(False)
        producer.join()
    finally:
        producer.kill()
    layout = ReplayLayout.for_task(make_spec(IMAGE_HW), capacity=CAPACITY, lookahead=3)
    medians = {name: float(np.median(values)) for name, values in samples.items()}
    bytes_per_step = round(layout.nbytes / CAPACITY)
    add_rate = 1e3 / float(np.mean(added_ms))
    sample_rates = {name: round(BATCH_SIZE * 1e3 / each) for name, each in medians.items() if name.startswith("shared")}
    return Findings(
        benchmark="replay",
        parameters={"rounds": request.rounds, "steps": request.steps, "batch": BATCH_SIZE}
        | ({TUNABLES: os.environ[TUNABLES]} if TUNABLES in os.environ else {}),
        samples={name: Series(values=values) for name, values in samples.items()} | {"add": Series(values=added_ms)},
        ratios={name: ratio(BASELINE, each, samples[BASELINE]) for name, each in samples.items() if name != BASELINE},
        facts={
            "add_steps_per_s": round(add_rate),
            "sample_steps_per_s": sample_rates,
            "bytes_per_step": bytes_per_step,
        },
        notes=[
            f"added {add_rate:,.0f} steps/s",
            f"sampled {sample_rates[BASELINE]:,} steps/s (1 thread), {sample_rates['shared-2-threads']:,} (2 threads)",
            f"{bytes_per_step / 1000:.1f} kB a step at 160x120, n-step 3, capacity {CAPACITY:,}",
        ],
    )


def _make_ways(
    samplers: tuple[ReplaySampler, ...], requests: Queue[bool], batches: Queue[Arrays]
) -> Mapping[str, Callable[[], object]]:
    """What is measured, by series; each call ends with a complete minibatch in this process."""
    rng = np.random.default_rng(0)
    size_bytes = 2 * BATCH_SIZE * FRAMES * IMAGE_HW[0] * IMAGE_HW[1] * 3
    source = rng.integers(0, 256, (SOURCE_BATCHES, size_bytes), np.uint8)
    target = np.zeros(size_bytes, np.uint8)
    turn = iter(range(sys.maxsize))

    def ask() -> object:
        requests.put(True)
        try:
            return batches.get(timeout=START_LIMIT_S)
        except Empty:
            raise StartError("the queue's producer did not start", "see what it says above") from None

    def draw(sampler: ReplaySampler, window: Window) -> Callable[[], object]:
        return lambda: sampler.sample(BATCH_SIZE, n_step=1, gamma=0.99, window=window, rng=rng)

    whole, crop = centre_window(IMAGE_HW), crop_window(IMAGE_HW, 0.01)
    return {
        "queue": ask,
        "memcpy": lambda: np.copyto(target, source[next(turn) % SOURCE_BATCHES]),
        "shared-1-thread": draw(samplers[0], whole),
        "shared-2-threads": draw(samplers[1], whole),
        "shared-cropped-1-thread": draw(samplers[2], crop),
        "shared-cropped-2-threads": draw(samplers[3], crop),
    }


def _measure(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each way in turn, `rounds` times, after one round to warm up."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start_ns = monotonic_ns()
            batch = way()
            samples[name].append((monotonic_ns() - start_ns) / NS_PER_MS)
            del batch
    return {name: values[1:] for name, values in samples.items()}


def _produce(requests: Queue[bool], batches: Queue[Arrays]) -> None:
    """Body of the producer: one minibatch for every request, until one is False."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, BATCH_SIZE, 3 * FRAMES, *IMAGE_HW), np.uint8)
    batch: Arrays = {"images": images[0], "next_images": images[1]}
    batch |= {name: rng.standard_normal((BATCH_SIZE, PROPRIO_DIM), np.float32) for name in ("proprio", "next_proprio")}
    batch["actions"] = rng.standard_normal((BATCH_SIZE, ACTION_DIM), np.float32)
    batch |= {name: rng.standard_normal(BATCH_SIZE, np.float32) for name in ("rewards", "discounts")}
    while requests.get():
        batches.put(batch)
