"""How fast the simulated world is: steps per second in virtual time, and its share of a core in real time.

A step is one action cycle of 45 ms with one camera frame and the task's look at it; physics alone leaves the camera
out. Virtual rounds alternate with a fixed reference load (float32 arithmetic on an image and one cv2.remap), so that
a ratio to it can be compared between machines and moments.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

from relod.robots.create2.plant import Plant, PlantSettings
from relod.robots.create2.reacher import CREATE_REACHER, ReacherSettings
from relod.robots.create2.world import SimSettings, VirtualCreate, serve_world
from relod.runtime.clock import NS_PER_S, cpu_seconds, monotonic_ns
from relod.runtime.provenance import describe
from relod.types import Command, SensorWindow

TASK = CREATE_REACHER.build(ReacherSettings())
CYCLE_NS = TASK.spec.cycle_ns


def actions(count: int) -> list[tuple[float, float]]:
    speeds = np.random.default_rng(0).integers(-150, 151, (count, 2))
    return [(float(left), float(right)) for left, right in speeds]


def world_steps(count: int) -> float:
    """Steps per second of plant, firmware, camera and the task's judgement."""
    world = VirtualCreate(SimSettings(frame_per_step=True), 1, TASK.spec, NS_PER_S)
    now_ns = NS_PER_S
    started_ns = monotonic_ns()
    for values in actions(count):
        world.execute(Command(values=values), now_ns)
        now_ns += CYCLE_NS
        packets, frames = world.advance(now_ns)
        window = SensorWindow(
            names=CREATE_REACHER.sensor_names,
            seq=np.arange(len(packets)),
            arrived_ns=np.array([arrived_ns for arrived_ns, _ in packets]),
            values=np.array([values for _, values in packets]).reshape(len(packets), -1),
        )
        for frame in frames:
            TASK.judge(window, frame.image, 0)
    return count * NS_PER_S / (monotonic_ns() - started_ns)


def physics_steps(count: int) -> float:
    """Steps per second of the plant alone, sensors included."""
    plant = Plant(PlantSettings(), 1)
    now_ns = 0
    started_ns = monotonic_ns()
    for left, right in actions(count):
        plant.command(now_ns, left, right)
        now_ns += CYCLE_NS
        plant.advance(now_ns)
        plant.light_bumps()
    return count * NS_PER_S / (monotonic_ns() - started_ns)


def reference_rounds(count: int) -> float:
    """Rounds per second of a fixed load: 40 float32 operations on 160x120 and one remap."""
    a, b = np.random.default_rng(0).random((2, 120, 160), np.float32)
    out = np.empty_like(a)
    image = np.zeros((240, 640, 3), np.uint8)
    started_ns = monotonic_ns()
    for _ in range(count):
        for _ in range(20):
            np.multiply(a, b, out=out)
            np.add(out, a, out=out)
        cv2.remap(image, a, b, cv2.INTER_LINEAR)
    return count * NS_PER_S / (monotonic_ns() - started_ns)


async def realtime_share(seconds: float) -> float:
    """CPU share of one core of the world process's work in real time: plant, firmware, pty, camera, frame server."""
    stop = asyncio.Event()
    share = 0.0

    async def measure() -> None:
        nonlocal share
        before_s, started_ns = cpu_seconds(), monotonic_ns()
        await asyncio.sleep(seconds)
        share = (cpu_seconds() - before_s) * NS_PER_S / (monotonic_ns() - started_ns)
        stop.set()

    with tempfile.TemporaryDirectory() as folder:
        await asyncio.gather(
            serve_world(
                SimSettings(),
                1,
                TASK.spec,
                on_ready=lambda where: None,
                stop=stop,
                new_episode=asyncio.Event(),
                frames=Path(folder) / "frames.sock",
            ),
            measure(),
        )
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=400, help="a round")
    parser.add_argument("--seconds", type=float, default=10.0, help="of real time")
    parser.add_argument("--out", type=Path, default=Path("out/virtual_speed.json"))
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    samples: dict[str, list[float]] = {"world": [], "physics": [], "reference": []}
    for _ in range(arguments.rounds):
        samples["world"].append(world_steps(arguments.steps))
        samples["physics"].append(physics_steps(arguments.steps))
        samples["reference"].append(reference_rounds(arguments.steps))
    result = {
        "benchmark": "virtual_speed",
        **describe(sys.argv),
        "world_steps_per_s": statistics.median(samples["world"]),
        "physics_steps_per_s": statistics.median(samples["physics"]),
        "world_over_reference": statistics.median(
            world / reference for world, reference in zip(samples["world"], samples["reference"], strict=True)
        ),
        "realtime_core_share": asyncio.run(realtime_share(arguments.seconds)),
        "samples": samples,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2))
    print(json.dumps({key: value for key, value in result.items() if key != "samples"}, indent=2))


if __name__ == "__main__":
    main()
