"""What a learner that dies costs: is anything lost, and how soon is its robot back once another goes on with the run?

    python benchmarks/linkcuts.py --kills 20 --out out/linkcuts.json

A recorded Create run is sent at its own pace by a real `RobotLink`, through a relay, to a real `relod learner`. At
seeded moments the learner gets `kill -9` and is started again with --resume. At the end `audit` compares what was sent
with the learner's log. `relod bench link` is the same for a link that is cut.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import uvloop

from relod.bench.children import RELOD
from relod.bench.cuts import ChainedRobot, CutWay
from relod.bench.form import percentiles
from relod.bench.linkecho import create_spec
from relod.bench.loadrobot import record
from relod.runtime.clock import NS_PER_S, monotonic_ns
from relod.runtime.provenance import describe

RECORDED_STEPS = 600
BACK_LIMIT_S = 60.0
BETWEEN_S = (0.3, 1.2)  # from being back to the next death


class DeadlyWay(CutWay):
    """One whose learner can die."""

    async def kill(self) -> int:
        """`kill -9` of the learner, and another that goes on with its run. Returns when its port listens."""
        self.learner.send_signal(signal.SIGKILL)
        self.learner.wait()
        listen = f"127.0.0.1:{self.target}"
        command = [*RELOD, "learner", "--json", "--listen", listen, "--resume", str(self.run_folder)]
        with (self.folder / "stderr").open("ab") as errors:
            self.learner = subprocess.Popen(  # noqa: ASYNC220
                command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
            )
        while not self._listens():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        return monotonic_ns()

    def _listens(self) -> bool:
        """Whether the port is bound, without connecting to it."""
        wanted = f"0100007F:{self.target:04X} 00000000:0000 0A"
        return any(wanted in line for line in Path("/proc/net/tcp").read_text().splitlines())


async def measure(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    recording = await asyncio.to_thread(record, folder / "recorded", RECORDED_STEPS)
    way = DeadlyWay(folder)
    robot_folder = folder / "robot"
    robot_folder.mkdir()
    back_s = []
    try:
        robot = ChainedRobot(await way.open(), robot_folder, recording)
        await robot.link.open()
        driving = asyncio.create_task(robot.drive(monotonic_ns(), 36_000.0, create_spec().cycle_ns))
        for _ in range(kills):
            await asyncio.sleep(rng.uniform(*BETWEEN_S))
            returned_ns = await way.kill()
            async with asyncio.timeout(BACK_LIMIT_S):
                if robot.came_up_ns < returned_ns:
                    await robot.down.wait()
                await robot.up.wait()
            back_s.append(max(0.0, (robot.came_up_ns - returned_ns) / NS_PER_S))
            if robot.failure:
                break
        driving.cancel()
        outcome = await way.finish(robot)
        robot.close()
    finally:
        await way.close()
    return {
        **outcome,
        "back_s": percentiles(back_s),
        "samples": {"back_s": back_s},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of the learner")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/linkcuts.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="relod-cuts-") as folder:
        result = uvloop.run(measure(Path(folder), options.kills, options.seed))
    print(json.dumps({k: v for k, v in result.items() if k != "samples"}, indent=2), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    document = {"benchmark": "linkcuts", **describe(sys.argv), "seed": options.seed, **result}
    options.out.write_text(json.dumps(document, indent=2))
    bad = result["audit_exit_code"] or not result["delivered"] or result["failure"]
    sys.exit("something is wrong" if bad else 0)


if __name__ == "__main__":
    main()
