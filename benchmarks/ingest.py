"""How many robots one learner takes in at full rate, with its worker updating: nothing lost, memory bounded.

    python benchmarks/ingest.py --robots 16 --seconds 60 --ramp 24 32 48 64 --out ingest.json

A Create's run is recorded in virtual time. One process, the load generator, replays it as so many robots at once, each
over a RobotLink of its own: 22.2 steps and 30 raw frames of 57,600 bytes a second. The learner is `relod learner`, a
command of its own. It keeps up when what is not acked yet is less than `BACKLOG_S` of experience in the second half of
the time; processor time says what stands in the way.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from relod.bench.linkecho import create_spec
from relod.bench.loadrobot import LoadRobot, Recording, learner_settings, record, start_learner
from relod.runtime.clock import NS_PER_S, cpu_seconds, cpu_seconds_of, monotonic_ns
from relod.runtime.provenance import describe

BACKLOG_S = 1.0
START_S = 3.0  # for every robot to be connected, before the first step

# -- figures -----------------------------------------------------------------------------------------------------------


def worker_of(pid: int) -> int:
    """Process number of the learner's update worker; 0 when there is none yet."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, rest = stat.read_text(errors="replace").rpartition(") ")
        except OSError:
            continue
        if head.endswith("(relod-worker") and int(rest.split()[1]) == pid:
            return int(head.partition(" ")[0])
    return 0


def machine_cpu_s() -> float:
    """Processor time that all of this machine's processes have used."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int) -> dict[str, float]:
    """Resident memory of a process: its own, and what it shares (the replay)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    names = {"RssAnon": "own_mib", "RssShmem": "shared_mib"}
    return {names[n]: int(v.split()[0]) / 1024 for n, _, v in (each.partition(":") for each in lines) if n in names}


# -- a trial -----------------------------------------------------------------------------------------------------------


async def trial(count: int, seconds: float, recording: Recording, arguments: list[str]) -> dict[str, Any]:
    """Replay the recording as `count` robots against a new learner."""
    with tempfile.TemporaryDirectory(prefix="relod-ingest-") as name:
        folder = Path(name)
        learner, url = start_learner(folder, [*learner_settings(count), *arguments])
        try:
            robots = [LoadRobot(number, url, folder / "outbox", recording) for number in range(count)]
            await robots[0].link.open()  # which makes the learner begin its run
            await asyncio.gather(*(robot.link.open() for robot in robots[1:]))
            await asyncio.sleep(START_S)
            samples = await replay(robots, learner.pid, seconds)
            delivered = await asyncio.gather(*(robot.link.close(drain=True) for robot in robots))
        finally:
            learner.send_signal(signal.SIGINT)
            out, _ = await asyncio.to_thread(learner.communicate)
        document = json.loads(out) if out.strip() else {}
        return judge(robots, document, samples, all(delivered), seconds)


async def replay(robots: list[LoadRobot], learner: int, seconds: float) -> list[dict[str, Any]]:
    """Drive all robots, each at its own part of the cycle; figures of every second."""
    cycle_ns = create_spec().cycle_ns
    start_ns = monotonic_ns() + NS_PER_S // 10
    offset_ns = cycle_ns // len(robots)
    driving = [
        asyncio.create_task(robot.drive(start_ns + number * offset_ns, seconds, cycle_ns))
        for number, robot in enumerate(robots)
    ]
    samples = [sample(robots, learner, start_ns)]
    while not all(task.done() for task in driving):
        await asyncio.wait(driving, timeout=1.0)
        samples.append(sample(robots, learner, start_ns))
    for task in driving:
        task.result()
    return samples


def sample(robots: list[LoadRobot], learner: int, start_ns: int) -> dict[str, Any]:
    worker = worker_of(learner)
    return {
        "at_s": (monotonic_ns() - start_ns) / NS_PER_S,
        "backlog": sum(robot.outbox.backlog for robot in robots),
        "acked": sum(robot.outbox.acked for robot in robots),
        "machine_cpu_s": machine_cpu_s(),
        "generator_cpu_s": cpu_seconds(),
        "learner_cpu_s": cpu_seconds_of(learner),
        "worker_cpu_s": cpu_seconds_of(worker) if worker else 0.0,
        "learner": memory_mib(learner),
        "worker": memory_mib(worker) if worker else {},
    }


def judge(
    robots: list[LoadRobot], document: dict[str, Any], samples: list[dict[str, Any]], delivered: bool, seconds: float
) -> dict[str, Any]:
    """What came of it."""
    first, last = samples[0], samples[-1]
    took_s = last["at_s"] - first["at_s"]
    cores = {
        name: round((last[f"{name}_cpu_s"] - first[f"{name}_cpu_s"]) / took_s, 3)
        for name in ("generator", "learner", "worker", "machine")
    }
    cores["others"] = round(cores["machine"] - cores["generator"] - cores["learner"] - cores["worker"], 3)
    kept = document.get("robots", {})
    counts = {robot.name: (robot.outbox.sent, kept.get(robot.name, {}).get("records", 0)) for robot in robots}
    late = [each for each in samples if each["at_s"] > seconds / 2]
    backlog = max((each["backlog"] for each in late), default=0)
    rate = 1e9 / create_spec().cycle_ns
    own = [each["learner"].get("own_mib", 0.0) for each in samples]
    return {
        "robots": len(robots),
        "offered_steps_per_s": round(len(robots) * rate, 1),
        "ingest_steps_per_s": document.get("ingest_steps_per_s"),
        "sent": sum(sent for sent, _ in counts.values()),
        "acked": sum(robot.outbox.acked for robot in robots),
        "learner_records": sum(records for _, records in counts.values()),
        "duplicates": sum(each.get("duplicates", 0) for each in kept.values()),
        "lost": sum(sent != records for sent, records in counts.values()) + sum(r.outbox.dropped for r in robots),
        "delivered": delivered,
        "failures": [robot.failure for robot in robots if robot.failure],
        "reconnects": sum(robot.link.figures()["reconnects"] for robot in robots),
        "updates": document.get("updates"),
        "uplink_bytes_per_s": round(sum(each.get("uplink_bytes", 0) for each in kept.values()) / took_s),
        "backlog_max_second_half": backlog,
        "keeps_up": backlog < len(robots) * rate * BACKLOG_S,
        "cores": cores,
        "learner_own_mib": {"first": round(own[0]), "half": round(own[len(own) // 2]), "last": round(own[-1])},
        "learner_shared_mib": round(last["learner"].get("shared_mib", 0.0)),
        "samples": samples,
    }


def busiest(samples: list[dict[str, Any]], name: str) -> float:
    """Cores that a process used in its busiest second."""
    pairs = [(one, other) for one, other in itertools.pairwise(samples) if other["at_s"] - one["at_s"] > 0.5]
    used = [(other[f"{name}_cpu_s"] - one[f"{name}_cpu_s"]) / (other["at_s"] - one["at_s"]) for one, other in pairs]
    return max(used, default=0.0)


def what_breaks(found: dict[str, Any]) -> str:
    """In words: who had no more time."""
    if found["failures"]:
        return str(found["failures"][0])
    if found["keeps_up"]:
        return "nothing yet"
    full = [name for name in ("generator", "learner") if busiest(found["samples"], name) > 0.95]
    if full:
        return f"one core is not enough for the {' and the '.join(full)}"
    if found["cores"]["machine"] > 0.95 * len(os.sched_getaffinity(0)):
        return f"the machine has no more time; others took {found['cores']['others']:.2f} cores of it"
    return "the learner waits for something that is not a processor"


def main() -> None:
    """Run the trials, print, and write the record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--robots", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--ramp", type=int, nargs="*", default=[], help="further numbers of robots, until one breaks")
    parser.add_argument("--ramp-seconds", type=float, default=20.0)
    parser.add_argument("--recorded-steps", type=int, default=400)
    parser.add_argument("--set", dest="assignments", action="append", default=[], help="a setting of the learner")
    parser.add_argument("--out", type=Path, help="JSON file for the record")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="relod-recording-") as folder:
        recording = record(Path(folder), options.recorded_steps)
    found = []
    for count in (options.robots, *options.ramp):
        seconds = options.ramp_seconds if found else options.seconds
        result = uvloop.run(trial(count, seconds, recording, options.assignments))
        result["breaks"] = what_breaks(result)
        found.append(result)
        print(json.dumps({name: value for name, value in result.items() if name != "samples"}))
        if not result["keeps_up"] or result["failures"]:
            break
    if options.out:
        document = {
            "benchmark": "ingest",
            "made_with": describe(sys.argv),
            "cores": os.cpu_count(),
            "load": os.getloadavg(),
            "trials": found,
        }
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(document)))


if __name__ == "__main__":
    main()
