"""The UR5's driver with the real ur_rtde against a simulated controller: packets, latency, losses, deaths.

    python benchmarks/ur5_driver.py --seconds 600 --drops 100 --deaths 30 --out ur5_driver.json

The controller runs in a process of its own on an address 127.0.0.x. While packets are counted, a process per core
multiplies matrices at the priority of relod's update worker (SCHED_IDLE), and a sentinel that does nothing but wake
every 8 ms says how late the machine itself was.

- packets: which part of the controller's packets was published, each once, and how long after a command the packets
  show that the arm is asked for another speed (its 8 ms ticks included).
- drops: every connection is cut at a random moment while the arm moves; how long until the driver obeys again.
- deaths: from just before the signal until the arm stands for good, by the controller's own log.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # further threads would not be of the lowest class

import numpy as np

from relod.config import SafetySettings
from relod.errors import SafetyStop, StartError
from relod.robots.faultserver import ask
from relod.robots.ur5.commission import UR5Commission
from relod.robots.ur5.controller import Controller
from relod.robots.ur5.driver import UR5Driver
from relod.robots.ur5.emulator import EmulatorOptions, serve
from relod.robots.ur5.interface import SENSOR_COLUMNS, RobotSettings
from relod.robots.ur5.states import ArmSettings
from relod.runtime.clock import NS_PER_MS, NS_PER_S, monotonic_ns, sleep_s, sleep_until
from relod.runtime.provenance import describe
from relod.runtime.trial import Death, DeviceTrial, TrialPlan
from relod.seeds import random_stream

CYCLE_S = 0.04
TURN_CYCLES = 12  # to and fro: a command that changes the speed every 0.48 s
SETTLE_S = 0.7
STILL_RAD_S = 0.01
DEATHS = (Death.DEVICE_KILLED, Death.CONTROL_KILLED, Death.PARENT_GONE)
TIME, ASKED = SENSOR_COLUMNS.index("controller_s"), SENSOR_COLUMNS.index("base_target_rad_s")


def main() -> int:
    options = _arguments()
    rng = random_stream(options.seed, "benchmark.ur5_driver")
    document: dict[str, Any] = {"benchmark": "ur5_driver", "made_with": describe(sys.argv)}
    with tempfile.TemporaryDirectory(prefix="relod-ur5-") as name:
        folder = Path(name)
        with simulated_controller(folder / "control") as host:
            if options.seconds:
                with busy_processes(os.cpu_count() or 1), sentinel() as late_ms:
                    document["packets"] = asyncio.run(_count_packets(host, options.seconds))
                document["packets"]["sentinel"] = _lateness(late_ms)
                _tell("packets", document["packets"])
            if options.drops:
                document["drops"] = asyncio.run(_drop(host, folder / "control", options.drops, rng))
                _tell("drops", document["drops"])
            if options.deaths:
                document["deaths"] = {death.name: _die(death, host, folder, options, rng) for death in DEATHS}
                _tell("deaths", document["deaths"])
    text = msgspec.json.format(msgspec.json.encode(document), indent=1)
    if options.out is None:
        sys.stdout.buffer.write(text + b"\n")
    else:
        options.out.write_bytes(text + b"\n")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="for which packets are counted; 0 = not at all")
    parser.add_argument("--drops", type=int, default=100, help="of every connection")
    parser.add_argument("--deaths", type=int, default=30, help="of each kind")
    parser.add_argument("--speed", type=float, default=0.7, help="of the base at a death, in rad/s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="file for the JSON; standard output if left out")
    return parser.parse_args()


def _tell(name: str, result: dict[str, Any]) -> None:
    shown = {key: value for key, value in result.items() if key != "samples_ms"}
    print(f"{name}: {msgspec.json.encode(shown).decode()[:2000]}", file=sys.stderr)


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    percents = {"p50": 50, "p90": 90, "p99": 99, "p999": 99.9, "max": 100}
    return {key: round(float(np.percentile(values, percent)), 2) for key, percent in percents.items()}


# Packets and latency.


async def _count_packets(host: str, seconds: float) -> dict[str, Any]:
    times: list[float] = []
    ages_ms: list[float] = []
    latencies_ms: list[float] = []
    wanted: tuple[int, float] | None = None  # when another speed was commanded, and which

    def publish(arrived_ns: int, values: Sequence[float]) -> None:
        nonlocal wanted
        times.append(values[TIME])
        ages_ms.append((monotonic_ns() - arrived_ns) / NS_PER_MS)
        if wanted is not None and values[ASKED] * wanted[1] > 0:
            latencies_ms.append((arrived_ns - wanted[0]) / NS_PER_MS)
            wanted = None

    driver = UR5Driver(host, RobotSettings(target="none", stop_rad_s2=40.0), publish, _event)
    await driver.open()
    serving = asyncio.create_task(driver.run())
    end_ns = monotonic_ns() + int(seconds * NS_PER_S)
    for cycle in itertools.count():
        if monotonic_ns() > end_ns or serving.done():
            break
        # Half of the turn the arm stands, so that the first tick of the next half shows the new sign.
        speed = 0.0 if cycle // TURN_CYCLES % 2 else 0.2 if cycle // TURN_CYCLES % 4 == 0 else -0.2
        if cycle % TURN_CYCLES == 0 and speed:
            await asyncio.sleep(0.008 * (cycle * 0.618 % 1.0))  # at every phase of the controller's ticks
            wanted = (monotonic_ns(), speed)
        driver.command((speed, 0.0, 0.0, 0.0, 0.0, 0.0))
        await asyncio.sleep(CYCLE_S)
    lost = str(serving.exception()) if serving.done() else ""
    serving.cancel()
    await driver.close()
    expected = round((times[-1] - times[0]) / 0.008) + 1
    return {
        "seconds": seconds,
        "packets_expected": expected,
        "packets": len(times),
        "packets_distinct": len(set(times)),
        "distinct_share": round(len(set(times)) / expected, 6),
        "command_to_packet_ms": _percentiles(latencies_ms),
        "commands": len(latencies_ms),
        "from_client_to_publish_ms": _percentiles(ages_ms),
        "lost": lost,
        "samples_ms": [round(value, 3) for value in latencies_ms],
    }


def _event(text: str) -> None:
    print(text, file=sys.stderr)


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """As many processes that use all the time that nobody else wants."""
    processes = [multiprocessing.get_context("spawn").Process(target=_be_busy, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _be_busy() -> None:
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    matrix = np.random.default_rng(0).normal(size=(300, 300))
    while True:
        matrix = matrix @ matrix / np.linalg.norm(matrix) ** 0.5 + 0.1
        matrix /= np.abs(matrix).max()


@contextlib.contextmanager
def sentinel() -> Iterator[list[float]]:
    """A process that wakes every 8 ms; the list holds how late it was, in ms, once the block is left."""
    late_ms: list[float] = []
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_tick, args=(theirs,), daemon=True)
    process.start()
    try:
        yield late_ms
    finally:
        ours.send(None)
        late_ms.extend(ours.recv())
        process.join()


def _tick(wire: multiprocessing.connection.Connection) -> None:
    late_ms: list[float] = []
    deadline_ns = monotonic_ns()
    while not wire.poll():
        deadline_ns += 8 * NS_PER_MS
        sleep_until(deadline_ns)
        late_ms.append((monotonic_ns() - deadline_ns) / NS_PER_MS)
    wire.send(late_ms)


def _lateness(late_ms: Sequence[float]) -> dict[str, Any]:
    late = sum(value > 8.0 for value in late_ms)
    return {"late_ms": _percentiles(late_ms), "later_than_8_ms": late, "share": round(late / len(late_ms), 6)}


# Losses.


async def _drop(host: str, control: Path, count: int, rng: np.random.Generator) -> dict[str, Any]:
    driver = UR5Driver(host, RobotSettings(target="none"), lambda arrived_ns, values: None, _event)
    await driver.open()
    noticed_ms, recovered_ms, failed = [], [], 0
    for _ in range(count):
        serving = asyncio.create_task(driver.run())
        for _ in range(int(rng.integers(3, 12))):
            driver.command((0.2, 0.0, 0.0, 0.0, 0.0, 0.0))
            await asyncio.sleep(CYCLE_S * (0.5 + rng.random() / 2))
        dropped_ns = monotonic_ns()
        await asyncio.to_thread(ask, control, "drop")
        with contextlib.suppress(SafetyStop):
            await serving
        noticed_ms.append((monotonic_ns() - dropped_ns) / NS_PER_MS)
        while True:
            try:
                await driver.open()
                break
            except StartError as error:
                failed += 1
                _event(str(error))
                await asyncio.sleep(0.1)
        recovered_ms.append((monotonic_ns() - dropped_ns) / NS_PER_MS)
    await driver.close()
    return {
        "drops": count,
        "recoveries": len(recovered_ms),
        "attempts_in_vain": failed,
        "noticed_ms": _percentiles(noticed_ms),
        "recovered_ms": _percentiles(recovered_ms),
        "samples_ms": [round(value, 1) for value in recovered_ms],
    }


# Deaths.


def _die(
    death: Death, host: str, folder: Path, options: argparse.Namespace, rng: np.random.Generator
) -> dict[str, Any]:
    plan = TrialPlan(
        driver="relod.robots.ur5.driver:UR5Driver",
        address=host,
        settings=RobotSettings(target="none"),
        safety=SafetySettings(),
        robot=UR5Commission(),
        log_path=folder / "device.log",
    )
    stopped_ms, direction = [], 1.0
    for _ in range(options.deaths):
        values = (direction * options.speed, 0.0, 0.0, 0.0, 0.0, 0.0)
        with DeviceTrial(plan) as trial:
            trial.drive(values, 0.9 + 0.2 * float(rng.random()))
            trial.die(death, values)
            sleep_s(SETTLE_S)
            stopped_ms.append(_stopped_ms(ask(folder / "control", "motion_log")["records"], trial.died_ns))
        direction = -direction
    seen = [value for value in stopped_ms if value]
    return {
        "deaths": len(stopped_ms),
        "stood_before": stopped_ms.count(0.0),  # a machine that is too busy to command every 100 ms
        "stopped": len(stopped_ms) - stopped_ms.count(None),
        "stopped_ms": _percentiles(seen),
        "samples_ms": [None if value is None else round(value, 1) for value in stopped_ms],
    }


def _stopped_ms(records: Sequence[dict[str, Any]], died_ns: int) -> float | None:
    """ms until the arm stands for good; None if it moves."""
    stood_ns: int | None = died_ns
    for record in records:
        if record["asked_rad_s"] or record["speed_rad_s"] >= STILL_RAD_S:
            stood_ns = None
        elif stood_ns is None:
            stood_ns = max(record["t_ns"], died_ns)
    return None if stood_ns is None else (stood_ns - died_ns) / NS_PER_MS


# The controller.


@contextlib.contextmanager
def simulated_controller(control: Path) -> Iterator[str]:
    """A simulated UR5 in a process of its own, its faults at `control`; its address."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_emulate, args=(control, theirs))
    process.start()
    theirs.close()
    try:
        yield str(ours.recv())
    finally:
        process.terminate()
        process.join(5.0)
        process.kill()
        process.join()
        ours.close()


def _emulate(control: Path, ready: multiprocessing.connection.Connection) -> None:
    async def run() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        controller = Controller(ArmSettings(), start_ns=monotonic_ns())
        await serve(
            controller, EmulatorOptions(control=control), on_ready=lambda where: ready.send(where.host), stop=stop
        )

    asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main())
