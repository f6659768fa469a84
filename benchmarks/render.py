"""How long the simulated camera takes for a picture, and what it costs at 30 pictures a second.

    python benchmarks/render.py --out render.json

Pictures are 160x120, taken from random poses in motion. Beside each batch of pictures runs a reference of plain
OpenCV and NumPy work of the same size, so that records of different machines, or of a busy one, can be compared:
the ratio is steadier than the milliseconds.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from relod.robots.create2.arena import ArenaLook, ArenaRenderer
from relod.robots.vision import cv2
from relod.runtime.clock import NS_PER_MS, NS_PER_S, cpu_seconds, monotonic_ns, sleep_until
from relod.runtime.provenance import describe

BATCH = 50
FPS = 30
REFERENCE_UFUNCS = 40


def batch_ms(work: Callable[[int], object]) -> float:
    """Milliseconds a call, over one batch."""
    start_ns = monotonic_ns()
    for index in range(BATCH):
        work(index)
    return (monotonic_ns() - start_ns) / NS_PER_MS / BATCH


def make_pictures() -> Callable[[int], object]:
    """Pictures of a drawn look from random poses."""
    renderer = ArenaRenderer()
    rng = np.random.default_rng(0)
    renderer.set_look(ArenaLook.draw(rng))
    poses = [(rng.uniform(-0.35, 0.35), rng.uniform(-0.15, 0.15), rng.uniform(-math.pi, math.pi)) for _ in range(BATCH)]
    return lambda index: renderer.render(*poses[index], 0.1, 0.8, index)


def make_reference() -> Callable[[int], object]:
    """One bilinear remap of three channels and forty float32 operations on 160x120."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (800, 1000, 3), np.uint8)
    map_x, map_y, result = np.empty((3, 120, 160), np.float32)
    map_x[:], map_y[:] = np.arange(160) * 3 + 100, np.arange(120)[:, None] * 3 + 100

    def work(_: int) -> object:
        for _ in range(REFERENCE_UFUNCS):
            np.multiply(map_x, map_y, out=result)
        return cv2.remap(texture, map_x, map_y, cv2.INTER_LINEAR)

    return work


def cpu_share(work: Callable[[int], object], duration_s: float) -> float:
    """Share of a core that 30 pictures a second take in real time."""
    start_ns, start_s, count = monotonic_ns(), cpu_seconds(), round(duration_s * FPS)
    for index in range(count):
        sleep_until(start_ns + index * NS_PER_S // FPS)
        work(index % BATCH)
    return (cpu_seconds() - start_s) / (count / FPS)


def percentiles(samples: list[float]) -> dict[str, float]:
    """p50, p90 and p99 of `samples`, rounded to a microsecond."""
    return {f"p{q}": round(float(np.percentile(samples, q)), 4) for q in (50, 90, 99)}


def main() -> None:
    """Measure, print, and write the record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=40, help=f"of {BATCH} pictures")
    parser.add_argument("--real-time", type=float, default=10.0, help="seconds at 30 pictures a second; 0 to skip")
    parser.add_argument("--out", type=Path, help="JSON file for the record")
    options = parser.parse_args()

    pictures, reference = make_pictures(), make_reference()
    batch_ms(pictures), batch_ms(reference)  # warm up
    pairs = [(batch_ms(pictures), batch_ms(reference)) for _ in range(options.batches)]
    picture_ms, reference_ms = (list(column) for column in zip(*pairs, strict=True))
    ratios = [picture / plain for picture, plain in pairs]
    record = {
        "benchmark": "render",
        "made_with": describe(sys.argv),
        "picture_ms": percentiles(picture_ms),
        "reference_ms": percentiles(reference_ms),
        "picture_to_reference": percentiles(ratios),
        "cpu_share_at_30_fps": round(cpu_share(pictures, options.real_time), 4) if options.real_time else None,
        "samples": {"picture_ms": picture_ms, "reference_ms": reference_ms},
    }
    print(f"picture    {record['picture_ms']} ms")
    print(f"reference  {record['reference_ms']} ms")
    print(f"ratio      {record['picture_to_reference']}")
    print(f"processor  {record['cpu_share_at_30_fps']} of a core at {FPS} pictures a second")
    if options.out:
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(record)))


if __name__ == "__main__":
    main()
