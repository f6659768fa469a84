"""What a link that breaks costs: is anything lost, and how soon is a robot back once its learner can be reached again?

    python benchmarks/linkcuts.py --faults 50 --kills 20 --out out/linkcuts.json

A recorded Create run is sent at its own pace by a real `RobotLink`, through a relay, to a real `relod learner`. Faults
come at seeded moments: a reset, a silence without a word, a port that is closed for a while, and `kill -9` of the
learner, which is then started again with --resume. At the end `audit` compares what was sent with the learner's log.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import uvloop
from ingest import RELOD, Robot, create_spec, ingest_settings, record, start_learner

from relod.runtime.clock import NS_PER_S, monotonic_ns
from relod.runtime.log.format import EncodedFrame
from relod.runtime.provenance import describe
from relod.runtime.remote.audit import audit
from relod.runtime.remote.chain import CHAIN_NAME, ChainWriter
from relod.runtime.remote.emulation import Relay
from relod.runtime.remote.linkprofile import profile_named

RECORDED_STEPS = 600
BACK_LIMIT_S = 60.0
BETWEEN_S = (0.3, 1.2)  # from being back to the next fault


class ChainedRobot(Robot):
    """A robot that keeps the chain of what it sends and knows when its link is up."""

    def __init__(self, url: str, folder: Path, recording: Any) -> None:
        super().__init__(0, url, folder, recording)
        self.up, self.down = asyncio.Event(), asyncio.Event()
        self.came_up_ns = 0
        self._chain = ChainWriter(folder / CHAIN_NAME)
        self._seen: dict[int, EncodedFrame] = {}
        (folder / "run.json").write_text(json.dumps({"link_run": self.run}))
        keep, add = self.outbox.add_frame, self.outbox.add

        def add_frame(frame_id: int, frame: EncodedFrame) -> None:
            self._seen[frame_id] = frame
            keep(frame_id, frame)

        def add_record(message: Any) -> bool:
            self._chain.add(message, self._seen)
            for old in [each for each in self._seen if each < message.frame_ids[0]]:
                del self._seen[old]
            return add(message)

        self.outbox.add_frame, self.outbox.add = add_frame, add_record  # type: ignore[method-assign]

    def link_state(self, up: bool) -> None:
        if up:
            self.came_up_ns = monotonic_ns()
        (self.up if up else self.down).set()
        (self.down if up else self.up).clear()

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        self._chain.close()


class Bench:
    """A relay and a learner behind it, both of which can be hurt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.relay = Relay()
        self.learner, url = start_learner(folder, ingest_settings(4))
        self._target = int(url.rpartition(":")[2])
        self.port = 0

    @property
    def run_folder(self) -> Path:
        """Of the learner's run."""
        return next(self.folder.glob("*learner*"))

    async def open(self) -> str:
        host, self.port = await self.relay.start("127.0.0.1", self._target, profile_named("none"))
        return f"ws://{host}:{self.port}"

    async def reset(self, rng: random.Random) -> int:
        """Both ends are told at once. Returns when the learner could be reached again."""
        self.relay.cut()
        return monotonic_ns()

    async def silence(self, rng: random.Random) -> int:
        """Nothing passes and nothing closes, for longer than the link waits."""
        duration_s = rng.uniform(1.3, 3.0)
        self.relay.stall(duration_s)
        await asyncio.sleep(duration_s)
        return monotonic_ns()

    async def kill(self, rng: random.Random) -> int:
        """`kill -9` of the learner, and another that goes on with its run."""
        self.learner.send_signal(signal.SIGKILL)
        self.learner.wait()
        listen = f"127.0.0.1:{self._target}"
        command = [*RELOD, "learner", "--json", "--listen", listen, "--resume", str(self.run_folder)]
        with (self.folder / "stderr").open("ab") as errors:
            self.learner = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)  # noqa: ASYNC220
        while not self._listens():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        return monotonic_ns()

    def _listens(self) -> bool:
        """Whether the port is bound, without connecting to it."""
        wanted = f"0100007F:{self._target:04X} 00000000:0000 0A"
        return any(wanted in line for line in Path("/proc/net/tcp").read_text().splitlines())


async def measure(folder: Path, faults: list[str], seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    recording = record(folder / "recorded", RECORDED_STEPS)
    bench = Bench(folder)
    robot_folder = folder / "robot"
    robot_folder.mkdir()
    robot = ChainedRobot(await bench.open(), robot_folder, recording)
    back: list[dict[str, Any]] = []
    try:
        await robot.link.open()
        driving = asyncio.create_task(robot.drive(monotonic_ns(), 36_000.0, create_spec().cycle_ns))
        for fault in faults:
            await asyncio.sleep(rng.uniform(*BETWEEN_S))
            returned_ns = await getattr(bench, fault)(rng)
            if not robot.down.is_set() and robot.came_up_ns < returned_ns:
                async with asyncio.timeout(BACK_LIMIT_S):
                    await robot.down.wait()
            async with asyncio.timeout(BACK_LIMIT_S):
                await robot.up.wait()
            back.append({"fault": fault, "back_s": max(0.0, (robot.came_up_ns - returned_ns) / NS_PER_S)})
            if robot.failure:
                break
        driving.cancel()
        delivered = await robot.link.close(drain=True)
    finally:
        bench.learner.send_signal(signal.SIGINT)
        out, _ = await asyncio.to_thread(bench.learner.communicate)
        await bench.relay.close()
        robot.close()
    report = audit(robot_folder, bench.run_folder)
    learned = json.loads(out) if out.strip() else {}
    outbox = robot.outbox
    return {
        "faults": back,
        "failure": robot.failure,
        "delivered": delivered,
        "audit": report.to_dict(),
        "audit_exit_code": report.exit_code,
        "records": {n: getattr(outbox, n) for n in ("sent", "acked", "resent", "duplicates", "backlog_max")},
        "learner_steps": learned.get("steps"),
        "back_s": {name: summary([f["back_s"] for f in back if f["fault"] == name]) for name in sorted(set(faults))},
        "back_s_all_but_kills": summary([f["back_s"] for f in back if f["fault"] != "kill"]),
    }


def summary(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "count": len(ordered),
        "p50": round(statistics.median(ordered), 3),
        "p99": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 3),
        "max": round(ordered[-1], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50, help="resets and silences")
    parser.add_argument("--kills", type=int, default=20, help="of the learner")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/linkcuts.json"))
    options = parser.parse_args()
    results: dict[str, Any] = {}
    rng = random.Random(options.seed)
    plans = {
        "cuts": [rng.choice(("reset", "silence")) for _ in range(options.faults)],
        "kills": ["kill"] * options.kills,
    }
    for name, faults in plans.items():
        if faults:
            with tempfile.TemporaryDirectory(prefix="relod-cuts-") as folder:
                results[name] = uvloop.run(measure(Path(folder), faults, options.seed))
            told = {k: v for k, v in results[name].items() if k != "faults"}
            print(json.dumps({name: told}, indent=2), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    document = {"benchmark": "linkcuts", **describe(sys.argv), "seed": options.seed, **results}
    options.out.write_text(json.dumps(document, indent=2))
    bad = [n for n, r in results.items() if r["audit_exit_code"] or not r["delivered"] or r["failure"]]
    sys.exit(f"something is wrong in {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
