"""How long an update of SAC takes, next to the straightforward way of writing it.

    python benchmarks/update.py --out update.json

`ours` draws the minibatch from a shared replay, random crop included, and updates. `straightforward`
(`straightforward_sac.py`) starts with its minibatch at hand. Both have the preset `paper`, 160x120 pixels, the same
threads and the same allocator settings as the update worker, and take turns in one process. Beforehand both are given
the same weights, crops and noise, and their losses are compared. The preset `sac-lite` is measured alone.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch
from straightforward_sac import USES, StraightforwardSac
from synthetic_replay import make_samplers, make_spec
from torch import Tensor

from relod.algos.batch import Batch, centre_window
from relod.algos.sac import SAC, SacLearner, SacSettings
from relod.config import load
from relod.runtime.clock import NS_PER_MS, monotonic_ns
from relod.runtime.provenance import describe

REPLAY_STEPS = 2_000
AGREEMENT = 1e-4  # relative, of losses computed in float32
CHECKED_UPDATES, CHECKED_BATCH = 3, 32
CPU = torch.device("cpu")
MALLOPT = {"M_TRIM_THRESHOLD": (-1, 512 * 1024 * 1024), "M_MMAP_MAX": (-4, 0)}  # mallopt(3): keep freed memory


def settings_of(preset: str, **changes: object) -> SacSettings:
    """A preset's agent settings, with changes."""
    agent = {**SAC.presets[preset]["agent"], **changes}
    found: SacSettings = load({"agent": SacSettings}, presets=[{"agent": agent}]).agent
    return found


def straightforward(learner: SacLearner, settings: SacSettings, out_hw: tuple[int, int]) -> StraightforwardSac:
    """The straightforward version with the learner's weights, targets, entropy coefficient and noise."""
    feature_hw = learner.policy().encoder.feature_hw
    return StraightforwardSac(learner.state(), settings, feature_hw=feature_hw, out_hw=out_hw)


def channels_first(batch: Batch) -> dict[str, Tensor]:
    """The same minibatch as the straightforward version keeps it: `(B, 3k, H, W) uint8`."""
    tensors = {name: torch.from_numpy(getattr(batch, name).copy()) for name in ("rewards", "discounts", "actions")}
    for prefix in ("", "next_"):
        images = torch.from_numpy(getattr(batch, f"{prefix}images"))
        size, frames, height, width, _ = images.shape
        tensors[f"{prefix}images"] = images.permute(0, 1, 4, 2, 3).reshape(size, 3 * frames, height, width).clone()
        tensors[f"{prefix}proprio"] = torch.from_numpy(getattr(batch, f"{prefix}proprio").copy())
    return tensors


def compare_losses() -> dict[str, float]:
    """The largest relative differences of the losses over some updates.

    The critics' step size is next to nothing, so that encoder and critics stay what they are and it does not matter
    whether the actor's features come from before that step or after it. Actor and entropy coefficient do move.
    """
    settings, spec = settings_of("paper", critic_lr=1e-12), make_spec((120, 160))
    learner = SAC.build_learner(spec, settings, seed=0, device=CPU)
    window = SAC.needs(spec, settings).window
    other = straightforward(learner, settings, window.out_hw)
    whole, cropped = make_samplers(spec, steps=REPLAY_STEPS, lookahead=1, threads=(1, 1))
    worst = dict.fromkeys(("critic_loss", "actor_loss", "alpha_loss"), 0.0)
    for number in range(CHECKED_UPDATES):
        # The sampler draws rows, then corners: the same seed gives both versions the same of either.
        batch = cropped.sample(CHECKED_BATCH, n_step=1, gamma=1.0, window=window, rng=np.random.default_rng(number))
        rng, whole_window = np.random.default_rng(number), centre_window(spec.image_hw)
        uncut = whole.sample(CHECKED_BATCH, n_step=1, gamma=1.0, window=whole_window, rng=np.random.default_rng(number))
        rng.integers(0, len(whole), CHECKED_BATCH)
        corners = torch.from_numpy(window.offsets(rng, CHECKED_BATCH))
        learner.update(batch)
        ours = learner.metrics()
        target_entropy = settings.entropy_per_action * spec.action_dim
        ours["alpha_loss"] = ours["alpha"] * (ours["entropy"] - target_entropy)
        theirs = other.update(channels_first(uncut), dict.fromkeys(USES, corners))
        for name, loss in theirs.items():
            worst[name] = max(worst[name], abs(ours[name] - loss) / abs(loss))
    if max(worst.values()) > AGREEMENT:
        raise SystemExit(f"the losses differ by more than {AGREEMENT:g} of themselves: {worst}")
    return worst


def make_pair(batch_size: int) -> dict[str, Callable[[], object]]:
    """Both versions of an update with the preset `paper`."""
    settings, spec = settings_of("paper", batch_size=batch_size), make_spec((120, 160))
    learner = SAC.build_learner(spec, settings, seed=0, device=CPU)
    window, rng = SAC.needs(spec, settings).window, np.random.default_rng(0)
    other = straightforward(learner, settings, window.out_hw)
    threads = torch.get_num_threads()
    sampler, whole = make_samplers(spec, steps=REPLAY_STEPS, lookahead=1, threads=(threads, 1))
    given = channels_first(whole.sample(batch_size, n_step=1, gamma=1.0, window=centre_window(spec.image_hw), rng=rng))

    def ours() -> None:
        learner.update(sampler.sample(batch_size, n_step=1, gamma=1.0, window=window, rng=rng))

    def theirs() -> None:
        other.update(given, {use: torch.from_numpy(window.offsets(rng, batch_size)) for use in USES})

    return {"ours": ours, "straightforward": theirs}


def make_lite() -> Callable[[], object]:
    """An update with the preset `sac-lite`, the minibatch included."""
    settings, spec = settings_of("sac-lite"), make_spec((48, 64))
    learner = SAC.build_learner(spec, settings, seed=0, device=CPU)
    needs, rng = SAC.needs(spec, settings), np.random.default_rng(0)
    (sampler,) = make_samplers(spec, steps=REPLAY_STEPS, lookahead=needs.lookahead, threads=(1,))

    def update() -> None:
        memory = needs.memory
        n_step, gamma = memory.n_step, memory.gamma
        learner.update(sampler.sample(memory.size, n_step=n_step, gamma=gamma, window=needs.window, rng=rng))

    return update


def measure(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each way in turn, `rounds` times, after two rounds to warm up."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 2):
        for name, way in ways.items():
            start_ns = monotonic_ns()
            way()
            samples[name].append((monotonic_ns() - start_ns) / NS_PER_MS)
    return {name: values[2:] for name, values in samples.items()}


def percentiles(samples: list[float]) -> dict[str, float]:
    """p10, p50 and p90."""
    return {f"p{q}": round(float(np.percentile(samples, q)), 2) for q in (10, 50, 90)}


def main() -> None:
    """Compare, measure, print, and write the record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="of both versions of the paper's update")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file for the record")
    options = parser.parse_args()

    for parameter, value in MALLOPT.values():
        ctypes.CDLL(None).mallopt(parameter, value)
    torch.set_num_threads(options.threads)
    differences = compare_losses()
    print(f"losses agree: {', '.join(f'{name} to {value:.1e}' for name, value in differences.items())}")
    samples: dict[str, list[float]] = {}
    ratios: dict[str, dict[str, float]] = {}
    for size in options.batch_sizes:
        found = measure(make_pair(size), options.rounds)
        samples |= {f"{name}, batch {size}": values for name, values in found.items()}
        pairs = zip(found["straightforward"], found["ours"], strict=True)
        ratios[f"batch {size}"] = percentiles([theirs / ours for theirs, ours in pairs])
    samples["sac-lite"] = measure({"sac-lite": make_lite()}, 10 * options.rounds)["sac-lite"]
    record = {
        "benchmark": "update",
        "made_with": describe(sys.argv),
        "threads": options.threads,
        "largest_relative_difference": differences,
        "ms": {name: percentiles(values) for name, values in samples.items()},
        "straightforward_to_ours": ratios,
        "samples": {"ms": samples},
    }
    for name, values in samples.items():
        print(f"{name:<27} {percentiles(values)} ms")
    for name, ratio in ratios.items():
        print(f"straightforward / ours, {name}: {ratio}")
    if options.out:
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(record)))


if __name__ == "__main__":
    main()
