"""What half precision does to a policy's actions: the same observations, with its values as float32 and as float16.

    relod robot --clock virtual --minutes 10 && python benchmarks/precision.py runs/latest

Observations come from the run's experience log, the policy from its newest checkpoint. Deterministic actions in
[-1, 1]; beside them the standard deviation of the policy's own exploration noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from relod.algos.agent import bind_policy, flatten_policy, policy_from_state
from relod.algos.checked import find_algorithm
from relod.config import load
from relod.robots import registry
from relod.runtime.checkpoint import CHECKPOINTS, newest_readable
from relod.runtime.log.reader import LogReader, find_log
from relod.runtime.provenance import describe
from relod.runtime.rundir import read_run
from relod.types import Step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--observations", type=int, default=2000)
    options = parser.parse_args()
    run = read_run(options.run)
    entry, algorithm = registry.task(run["task"]), find_algorithm(run["algorithm_target"])
    settings = load({**entry.sections(), "agent": algorithm.settings_type}, file=options.run / "settings.toml")
    spec = entry.build(settings.task).spec
    checkpoint = newest_readable(options.run / CHECKPOINTS).checkpoint
    if checkpoint is None:
        sys.exit(f"{options.run} has no checkpoint that can be read")
    whole = policy_from_state(algorithm.build_actor(spec, settings.agent), checkpoint.tensors)
    flat = flatten_policy(whole)
    half = bind_policy(algorithm.build_actor(spec, settings.agent), flat.astype(np.float16).astype(np.float32))
    window = algorithm.needs(spec, settings.agent).window
    (top, left), (height, width) = window.centre, window.out_hw
    steps = [r for r in LogReader(find_log(options.run)).iterate() if isinstance(r.message, Step)]
    moved, spread = [], []
    for record in steps[:: max(1, len(steps) // options.observations)]:
        message = record.message
        assert message is not None
        images = np.stack([record.frames[i][top : top + height, left : left + width] for i in message.frame_ids])
        inputs = (torch.from_numpy(images)[None], torch.from_numpy(np.array(message.proprio))[None])
        with torch.inference_mode():
            still = torch.zeros(1, spec.action_dim)
            moved.append((whole(*inputs, still)[0] - half(*inputs, still)[0]).abs().numpy().ravel())
            spread.append((whole(*inputs, still + 1)[0] - whole(*inputs, still)[0]).abs().numpy().ravel())
    moved_by, noise = np.concatenate(moved), np.concatenate(spread)
    result = {
        "benchmark": "precision",
        **describe(sys.argv),
        "observations": len(moved),
        "values": int(flat.size),
        "bytes_float16": int(flat.size) * 2,
        "action_moved": {
            "p50": float(np.median(moved_by)),
            "p99": float(np.percentile(moved_by, 99)),
            "max": float(moved_by.max()),
        },
        "noise_moves_action_p50": float(np.median(noise)),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
