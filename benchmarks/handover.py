"""How long a minibatch takes from the replay to the update: out of shared memory, and through a queue.

    python benchmarks/handover.py --out handover.json

The minibatch is the paper's: 256 observations of three 160x120 frames and their successors, 88 MB. Three ways, in turn:

    shared  the sampler gathers it from the shared replay into the worker's memory; with one thread and with two
    queue   a spawned process that holds it ready sends it, pickled, through a multiprocessing queue
    memcpy  one thread copies as many bytes from array to array

Time runs from asking to having; the queue's producer does not even draw the minibatch. With --streaming glibc copies
blocks of 32 KB and more past the caches, in all three: half the memory traffic.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.queues import Queue
from pathlib import Path

import msgspec
import numpy as np
from synthetic_replay import ACTION_DIM, PROPRIO_DIM, make_samplers, make_spec

from relod.algos.batch import Window, centre_window, crop_window
from relod.runtime.clock import NS_PER_MS, monotonic_ns
from relod.runtime.provenance import describe
from relod.runtime.replay import ReplayLayout, ReplaySampler

IMAGE_HW, BATCH_SIZE, FRAMES = (120, 160), 256, 3
REPLAY_STEPS = 8_000  # 0.7 GB, far beyond the caches
CAPACITY = 100_000  # of the presets, for the bytes a step
STREAMING = {"GLIBC_TUNABLES": "glibc.cpu.x86_non_temporal_threshold=0x8000"}  # read by the loader only
SOURCE_BATCHES = 4  # memcpy's source, so that it does not lie in a cache either


def produce(requests: Queue[bool], batches: Queue[dict[str, np.ndarray]]) -> None:
    """Body of the producer: one minibatch for every request, until one is False."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, BATCH_SIZE, 3 * FRAMES, *IMAGE_HW), np.uint8)
    batch = {"images": images[0], "next_images": images[1]}
    batch |= {name: rng.standard_normal((BATCH_SIZE, PROPRIO_DIM), np.float32) for name in ("proprio", "next_proprio")}
    batch["actions"] = rng.standard_normal((BATCH_SIZE, ACTION_DIM), np.float32)
    batch |= {name: rng.standard_normal(BATCH_SIZE, np.float32) for name in ("rewards", "discounts")}
    while requests.get():
        batches.put(batch)


def make_ways(requests: Queue[bool], batches: Queue[dict[str, np.ndarray]]) -> dict[str, Callable[[], object]]:
    """What is measured, by name; each call ends with a complete minibatch in this process."""
    samplers = make_samplers(make_spec(IMAGE_HW), steps=REPLAY_STEPS, lookahead=1, threads=(1, 2, 1, 2))
    rng = np.random.default_rng(0)
    size_bytes = 2 * BATCH_SIZE * FRAMES * IMAGE_HW[0] * IMAGE_HW[1] * 3
    source = rng.integers(0, 256, (SOURCE_BATCHES, size_bytes), np.uint8)
    target = np.zeros(size_bytes, np.uint8)
    turn = iter(range(sys.maxsize))

    def ask() -> object:
        requests.put(True)
        return batches.get()

    def draw(sampler: ReplaySampler, window: Window) -> Callable[[], object]:
        return lambda: sampler.sample(BATCH_SIZE, n_step=1, gamma=0.99, window=window, rng=rng)

    whole, crop = centre_window(IMAGE_HW), crop_window(IMAGE_HW, 0.01)
    return {
        "queue": ask,
        "memcpy": lambda: np.copyto(target, source[next(turn) % SOURCE_BATCHES]),
        "shared": draw(samplers[0], whole),
        "shared, 2 threads": draw(samplers[1], whole),
        "shared, cropped": draw(samplers[2], crop),
        "shared, cropped, 2 threads": draw(samplers[3], crop),
    }


def measure(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each way in turn, `rounds` times, after one round to warm up."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start_ns = monotonic_ns()
            batch = way()
            samples[name].append((monotonic_ns() - start_ns) / NS_PER_MS)
            del batch
    return {name: values[1:] for name, values in samples.items()}


def percentiles(samples: list[float]) -> dict[str, float]:
    """p10, p50 and p90."""
    return {f"p{q}": round(float(np.percentile(samples, q)), 2) for q in (10, 50, 90)}


def main() -> None:
    """Measure, print, and write the record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="JSON file for the record")
    parser.add_argument("--streaming", action="store_true", help="copy past the caches")
    options = parser.parse_args()
    if options.streaming and not STREAMING.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **STREAMING})

    context = multiprocessing.get_context("spawn")
    requests: Queue[bool] = context.Queue()
    batches: Queue[dict[str, np.ndarray]] = context.Queue(2)
    producer = context.Process(target=produce, args=(requests, batches), name="producer")
    producer.start()
    try:
        samples = measure(make_ways(requests, batches), options.rounds)
    finally:
        requests.put(False)
        producer.join()
    queue_ms = float(np.median(samples["queue"]))
    layout = ReplayLayout.for_task(make_spec(IMAGE_HW), capacity=CAPACITY, lookahead=3)
    record = {
        "benchmark": "handover",
        "made_with": describe(sys.argv),
        "streaming": options.streaming,
        "ms": {name: percentiles(values) for name, values in samples.items()},
        "queue_to_way": {name: round(queue_ms / float(np.median(values)), 1) for name, values in samples.items()},
        "replay_bytes_per_step": round(layout.nbytes / CAPACITY),
        "samples": {"ms": samples},
    }
    for name, values in samples.items():
        print(f"{name:<27} {percentiles(values)} ms, queue / this {queue_ms / float(np.median(values)):.1f}")
    print(f"replay {layout.nbytes / CAPACITY / 1000:.1f} kB a step at 160x120, n-step 3, capacity {CAPACITY}")
    if options.out:
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(record)))


if __name__ == "__main__":
    main()
