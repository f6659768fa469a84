"""How long the wheels turn after a death, in the simulated robot's own wheel log.

    python benchmarks/stopping.py --deaths 30 --out stopping.json

The simulated Create 2 runs in a process of its own behind a pseudo-terminal; the device process, its guard and the
commands are those of a run. At random moments, driving at full speed, something is killed. The time counts from just
before the signal is sent to the first record of the log that shows both wheels standing for good.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import multiprocessing.connection
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from relod.config import SafetySettings
from relod.robots.create2.commission import Create2Commissioning
from relod.robots.create2.driver import Create2Settings
from relod.robots.create2.emulator import EmulatorOptions, serve
from relod.robots.create2.firmware import Firmware
from relod.robots.create2.plant import PRESETS, Plant, PlantSettings, WheelRecord
from relod.robots.faultserver import ask
from relod.runtime.clock import NS_PER_MS, monotonic_ns, sleep_s
from relod.runtime.provenance import describe
from relod.runtime.trial import Death, DeviceTrial, TrialPlan
from relod.seeds import random_stream

SETTLE_S = 0.7  # from the observed stop to reading the log, so that a robot that starts again is seen


def time_to_stop_ms(wheel_log: Sequence[WheelRecord], killed_ns: int) -> float | None:
    """ms from `killed_ns` until both wheels stand for good; 0 if they stood already, None if they still turn."""
    stood_ns: int | None = killed_ns
    for record in wheel_log:
        stands = not (
            record.left_mm_s or record.right_mm_s or record.requested_left_mm_s or record.requested_right_mm_s
        )
        if not stands:
            stood_ns = None
        elif stood_ns is None:
            stood_ns = max(record.t_ns, killed_ns)
    return None if stood_ns is None else (stood_ns - killed_ns) / NS_PER_MS


def time_to_told_ms(wheel_log: Sequence[WheelRecord], killed_ns: int) -> float | None:
    """ms from `killed_ns` until the robot had been told to stand for good: what is left is its own braking."""
    told_ns: int | None = killed_ns
    for record in wheel_log:
        if _asked_to_move(record):
            told_ns = None
        elif told_ns is None:
            told_ns = max(record.t_ns, killed_ns)
    return None if told_ns is None else (told_ns - killed_ns) / NS_PER_MS


def _asked_to_move(record: WheelRecord) -> bool:
    return bool(record.requested_left_mm_s or record.requested_right_mm_s)


def main() -> int:
    options = _arguments()
    samples: dict[str, list[dict[str, Any]]] = {}
    rng = random_stream(options.seed, "benchmark.stopping")
    for death in [Death[name] for name in options.kinds.split(",")]:
        samples[death.name] = [_sample(death, index, options, rng) for index in range(options.deaths)]
        print(f"{death.value}: {_summary(samples[death.name])}", file=sys.stderr)
    document = {
        "benchmark": "stopping",
        "made_with": describe(sys.argv),
        "world": options.world,
        "unit": "ms from the death to both wheels standing, by the simulated robot's wheel log",
        "results": {name: {**_summary(found), "samples": found} for name, found in samples.items()},
    }
    text = msgspec.json.format(msgspec.json.encode(document), indent=1)
    if options.out is None:
        sys.stdout.buffer.write(text + b"\n")
    else:
        options.out.write_bytes(text + b"\n")
    return 0 if all(s["stopped_ms"] is not None for found in samples.values() for s in found) else 4


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--deaths", type=int, default=30, help="of each kind")
    parser.add_argument("--kinds", default="DEVICE_KILLED", help=f"comma-separated: {', '.join(Death.__members__)}")
    parser.add_argument("--world", default="nominal", choices=sorted(PRESETS))
    parser.add_argument("--seed", type=int, default=0, help="of the first robot and of the moments")
    parser.add_argument("--out", type=Path, help="file for the JSON; standard output if left out")
    return parser.parse_args()


def _sample(death: Death, index: int, options: argparse.Namespace, rng: np.random.Generator) -> dict[str, Any]:
    """One robot, with wheels of its own, and one death."""
    robot_seed = options.seed + index
    with tempfile.TemporaryDirectory(prefix="relod-stopping-") as name:
        folder = Path(name)
        plan = TrialPlan(
            driver="relod.robots.create2.driver:Create2Driver",
            address=str(folder / "port"),
            settings=Create2Settings(),
            safety=SafetySettings(),
            robot=Create2Commissioning(),
            log_path=folder / "device.log",
        )
        direction = 1.0 if rng.random() < 0.5 else -1.0
        values = tuple(direction * speed for speed in plan.robot.cruise)
        with emulated_robot(folder, options.world, robot_seed), DeviceTrial(plan) as trial:
            trial.drive(values, 0.6 + 0.5 * float(rng.random()), plan.robot.take_control)
            observed_ms = trial.die(death, values)
            sleep_s(SETTLE_S)
            records = [WheelRecord(**record) for record in ask(folder / "control", "wheel_log")["records"]]
    return {
        "robot_seed": robot_seed,
        "direction": direction,
        "told_ms": time_to_told_ms(records, trial.died_ns),
        "stopped_ms": time_to_stop_ms(records, trial.died_ns),
        "observed_ms": observed_ms,  # what commissioning sees of it, in the robot's own sensors
    }


def _summary(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "count": len(samples),
        "stopped": sum(sample["stopped_ms"] is not None for sample in samples),
        **{name: _percentiles([sample[name] for sample in samples]) for name in ("told_ms", "stopped_ms")},
    }


def _percentiles(values_ms: Sequence[float | None]) -> dict[str, float]:
    found = [value for value in values_ms if value is not None]
    percents = {"p50": 50, "p90": 90, "p99": 99, "p999": 99.9, "max": 100}
    return {key: round(float(np.percentile(found, percent)), 1) for key, percent in percents.items()} if found else {}


@contextlib.contextmanager
def emulated_robot(folder: Path, world: str, seed: int) -> Iterator[None]:
    """A simulated Create 2 in a process of its own, at `folder`/port, its faults at `folder`/control."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_emulate, args=(folder, world, seed, theirs))
    process.start()
    theirs.close()
    try:
        ours.recv()
        yield
    finally:
        process.terminate()
        process.join(5.0)
        process.kill()
        process.join()
        ours.close()


def _emulate(folder: Path, world: str, seed: int, ready: multiprocessing.connection.Connection) -> None:
    async def run() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        plant = Plant(PlantSettings(**PRESETS[world]), seed, start_ns=monotonic_ns())
        options = EmulatorOptions(symlink=folder / "port", control=folder / "control")
        await serve(Firmware(plant), options, on_ready=lambda where: ready.send(where.port), stop=stop)

    asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main())
