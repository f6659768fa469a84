"""Kill -9 of everything at random moments, then `--resume`: does every run go on, and is nothing lost?

In virtual time a run that was killed and resumed, as often as it takes, is compared with one that never was: log,
tape, networks, optimisers and random states bit for bit. On the wall clock one run is killed again and again; after
each death its log is checked, and no step that was in it before may be missing. Writes JSON with machine and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from relod.runtime.checkpoint import newest_readable
from relod.runtime.log.check import check_log
from relod.runtime.log.reader import LogReader
from relod.runtime.provenance import describe

RELOD = str(Path(sys.executable).with_name("relod"))
QUICK = ("--set", "agent.init_steps=100", "--set", "learner.checkpoint_every_s=1", "--set", "learner.threads=1")
LONGEST_LIFE_S = 14.0  # of which starting up takes 3 to 6
END_LIMIT_S = 600.0


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A run in a process group of its own, so that all of it can be killed at once."""
    command = [RELOD, "robot", *arguments]
    with (folder / "stderr.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True)


def kill_within(process: subprocess.Popen[bytes], life_s: float) -> bool:
    """Let it live that long, then kill every process of it; False when it was done before."""
    try:
        process.wait(life_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def state(run: Path) -> dict[str, Any]:
    """All of a virtual run that must not depend on interruptions."""
    lines = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    found = newest_readable(run / "checkpoints").checkpoint
    assert found is not None
    extra = found.counters["extra"]
    return {
        "episodes": [{key: value for key, value in line.items() if key != "wall_s"} for line in lines],
        "log": [path.read_bytes() for path in sorted((run / "log").iterdir())],
        "tape": (run / "tape.bin").read_bytes(),
        "tensors": {name: tensor.numpy().tobytes() for name, tensor in found.tensors.items()},
        "counters": {key: value for key, value in found.counters.items() if key != "extra"},
        "streams": [extra[key] for key in ("actor", "crc", "ticks", "first_step")],
    }


def virtual(root: Path, kills: int, steps: int, rng: random.Random) -> dict[str, Any]:
    """Runs that are killed up to five times each, against one that is not."""
    arguments = ("--task", "track", "--clock", "virtual", "--seed", "7", "--steps", str(steps), *QUICK)
    whole_folder = root / "whole"
    whole_folder.mkdir(parents=True)
    if start(whole_folder, *arguments, "--set", f"run.folder={whole_folder}").wait(END_LIMIT_S):
        raise SystemExit((whole_folder / "stderr.txt").read_text())
    whole = state(whole_folder / "latest")
    killed, runs, equal, failed = 0, 0, 0, []
    while killed < kills:
        folder = root / f"virtual-{runs}"
        folder.mkdir(parents=True)
        for _ in range(5):
            process = start(folder, *_again(folder, arguments))
            if not kill_within(process, rng.uniform(0.5, LONGEST_LIFE_S)):
                break
            killed += 1
        code = start(folder, *_again(folder, arguments)).wait(END_LIMIT_S) if process.returncode else 0
        runs += 1
        differs = [key for key, value in state(folder / "latest").items() if value != whole[key]] if not code else []
        equal += not code and not differs
        if code or differs:
            failed.append({"run": str(folder), "exit_code": code, "differs": differs})
        print(f"virtual: {killed} killed, {runs} runs, {equal} equal", file=sys.stderr)
    return {"kills": killed, "runs": runs, "bit_equal": equal, "failed": failed}


def _again(folder: Path, arguments: tuple[str, ...]) -> tuple[str, ...]:
    """The run's own arguments until it has a folder, afterwards `--resume`."""
    latest = folder / "latest"
    if (latest / "log").is_dir():
        return ("--resume", str(latest.resolve()))
    return (*arguments, "--set", f"run.folder={folder}")


def wall(root: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """One run on the wall clock, killed again and again."""
    folder = root / "wall"
    folder.mkdir(parents=True)
    arguments = ("--task", "track", "--seed", "7", *QUICK)
    deaths, steps, updates = [], 0, 0
    while len(deaths) < kills:
        process = start(folder, *_again(folder, arguments))
        died = kill_within(process, rng.uniform(0.5, LONGEST_LIFE_S))
        run = (folder / "latest").resolve()
        death = {"resumed": died, "exit_code": None if died else process.returncode}
        if (run / "log").is_dir():
            _, faults = check_log(run)
            found = newest_readable(run / "checkpoints").checkpoint
            now_steps = LogReader(run / "log").summary().last_env_step
            now_updates = 0 if found is None else found.counters["updates"]
            death |= {"steps": now_steps, "updates": now_updates, "faults": faults}
            death["lost"] = now_steps < steps or now_updates < updates
            steps, updates = now_steps, now_updates
        deaths.append(death)
        print(f"wall: {len(deaths)} killed, {death}", file=sys.stderr)
        time.sleep(0.2)
    last = start(folder, *_again(folder, arguments), "--steps", str(steps + 200)).wait(END_LIMIT_S)
    bad = [death for death in deaths if not death["resumed"] or death.get("lost") or death.get("faults")]
    return {"kills": len(deaths), "bad": bad, "last_exit_code": last, "steps": steps + 200, "deaths": deaths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="half of them in virtual time")
    parser.add_argument("--steps", type=int, default=500, help="of a run in virtual time")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=Path("out/interruptions.json"))
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "benchmark": "interruptions",
            **describe(sys.argv),
            "virtual": virtual(Path(folder) / "virtual", options.kills - options.kills // 2, options.steps, rng),
            "wall": wall(Path(folder) / "wall", options.kills // 2, rng),
        }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2))
    shown = {key: {k: v for k, v in result[key].items() if k != "deaths"} for key in ("virtual", "wall")}
    print(json.dumps(shown, indent=2))


if __name__ == "__main__":
    main()
