"""How long an action takes on one CPU thread, next to the straightforward way of writing it.

    python benchmarks/inference.py --out inference.json

All ways are given the same observations and noise, and take turns in one process, so that each finds the caches as the
others left them. A round counts when the kernel gave the processor to nobody else during any of its calls.

`plan` is `inference.Plan`, given what the other two are given. `actor` is `TorchActor.act`, as the control process
calls it; it draws the noise, too. Neither follows the other, so both find their buffers out of the cache. `module` is
the policy network called on the windows as one array. `straightforward` stacks channels first, makes floats, divides by
255, and calls `nn.Conv2d`, ReLU, spatial softmax and `nn.Linear` one after the other; it has the same weights, the head
being the very same modules. `taking a policy` is what a new one costs, right after a command. Beforehand the actions of
all are compared over random policies and observations.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from relod.algos.agent import FixedPolicy, TorchActor
from relod.algos.checked import find_algorithm
from relod.algos.inference import Plans
from relod.algos.nets import CENTRE, soft_argmax
from relod.algos.ppo import PpoPolicy, log_density
from relod.algos.sac import SacPolicy
from relod.config import load
from relod.runtime.clock import NS_PER_MS, monotonic_ns
from relod.runtime.provenance import describe
from relod.types import Observation, TaskSpec

AGREEMENT = 1e-5  # of actions, which lie in [-1, 1]
PROPRIO = 18
WARM_UP = 20  # rounds
MOST_TRIES = 20  # for a round
CASES = {  # algorithm, preset, height and width of the image
    "sac paper": ("relod.algos.sac:SAC", "paper", (120, 160)),
    "sac paper, UR5": ("relod.algos.sac:SAC", "paper", (90, 160)),
    "sac": ("relod.algos.sac:SAC", "sac", (120, 160)),
    "sac-lite": ("relod.algos.sac:SAC", "sac-lite", (48, 64)),
    "ppo": ("relod.algos.ppo:PPO", "ppo", (48, 64)),
    "ppo paper": ("relod.algos.ppo:PPO", "paper", (120, 160)),
}


class Straightforward(nn.Module):
    """The same function as `policy`, from stacked channels `(B, 3k, h, w) uint8`."""

    def __init__(self, policy: SacPolicy | PpoPolicy) -> None:
        super().__init__()
        self.policy = policy
        self.convolutions = nn.ModuleList()
        for theirs in (policy.encoder.first, *policy.encoder.rest):
            mine = nn.Conv2d(theirs.in_channels, theirs.out_channels, 3, theirs.stride).requires_grad_(False)
            mine.weight.copy_(theirs.weight)
            mine.bias.copy_(theirs.bias)
            self.convolutions.append(mine)

    def forward(self, images: Tensor, proprio: Tensor, noise: Tensor) -> Tensor:
        encoder = self.policy.encoder
        x = images.float() / 255
        if encoder.centred:
            x = x - CENTRE
        for number, convolution in enumerate(self.convolutions):
            x = convolution(torch.relu(x) if number else x)
        features = [soft_argmax(x, encoder.grid)]
        if encoder.presence:
            features.append(torch.tanh(x.amax((2, 3)) / 4))
        mean, log_std = self.policy.distribution(torch.cat([*features, proprio], -1))
        drawn = mean + log_std.exp() * noise
        if isinstance(self.policy, SacPolicy):
            return torch.tanh(drawn)
        log_density(drawn, (mean, log_std))  # a robot's step carries it
        return drawn.clamp(-1.0, 1.0)


class Case:
    """One architecture, with the ways to act by it."""

    def __init__(self, algorithm_name: str, preset: str, image_hw: tuple[int, int]) -> None:
        algorithm = find_algorithm(algorithm_name)
        self.spec = make_spec(image_hw)
        agent = algorithm.presets[preset].get("agent", {})
        settings = load({"agent": algorithm.settings_type}, presets=[{"agent": agent}]).agent
        # White noise: the others are given the same by a generator of the same seed.
        self._needs = replace(algorithm.needs(self.spec, settings), noise_cycles=0.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._policies = [stirred(algorithm.build_actor(self.spec, settings), seed) for seed in range(10)]
        self._plain = [Straightforward(policy) for policy in self._policies]
        self._plans = Plans(self._needs.window.out_hw)
        self._rng = np.random.default_rng(0)
        self.use(0)

    def use(self, number: int) -> None:
        """Act by one of the random policies from now on."""
        self.policy, self.plain = self._policies[number], self._plain[number]
        source = FixedPolicy(module=self.policy, version=(1, number))
        self.actor = TorchActor(
            source, self.spec, self._needs, np.random.default_rng(number), steps_done=1 << 40, plans=self._plans
        )
        self._mirror = np.random.default_rng(number)  # the same noise for the others

    def observe(self) -> Observation:
        """An observation of noise."""
        images = tuple(self._rng.integers(0, 256, (*self.spec.image_hw, 3), dtype=np.uint8) for _ in range(3))
        proprio = self._rng.standard_normal(PROPRIO, np.float32)
        return Observation(frame_ids=(0, 1, 2), images=images, proprio=proprio, now_ns=0)

    def windows(self, seen: Observation) -> list[np.ndarray]:
        """What the policy sees of the images."""
        (top, left), (height, width) = self._needs.window.centre, self._needs.window.out_hw
        return [image[top : top + height, left : left + width] for image in seen.images]

    def noise(self) -> Tensor:
        """What the actor drew for its newest action, if asked as often."""
        return torch.from_numpy(self._mirror.standard_normal(self.spec.action_dim, np.float32))[None]

    def by_module(self, seen: Observation, noise: Tensor) -> np.ndarray:
        with torch.inference_mode():
            images = torch.from_numpy(np.stack(self.windows(seen)))[None]
            return self.policy(images, torch.from_numpy(seen.proprio)[None], noise)[0][0].numpy()

    def straightforward(self, seen: Observation, noise: Tensor) -> np.ndarray:
        with torch.inference_mode():
            stacked = np.ascontiguousarray(np.concatenate(self.windows(seen), -1).transpose(2, 0, 1))
            given = torch.from_numpy(stacked)[None], torch.from_numpy(seen.proprio)[None], noise
            return self.plain(*given)[0].numpy()

    def largest_difference(self, observations: int) -> dict[str, float]:
        """Between the actor's actions and the others', over all policies."""
        worst = {"module": 0.0, "straightforward": 0.0}
        for number in range(len(self._policies)):
            for _ in range(observations):
                self.use(number)
                seen = self.observe()
                ours, noise = self.actor.act(seen).values, self.noise()
                for name, way in (("module", self.by_module), ("straightforward", self.straightforward)):
                    worst[name] = max(worst[name], float(np.abs(way(seen, noise) - ours).max()))
        self.use(0)
        return worst

    def ways(self) -> dict[str, Callable[[], object]]:
        """What takes turns."""
        seen, noise, version = self.observe(), self.noise(), self.actor.act(self.observe()).policy_version

        plan = self._plans.follow(self.policy, version)

        def take() -> None:
            self._plans.follow(self.policy, version)

        return {
            "straightforward": lambda: self.straightforward(seen, noise),
            "plan": lambda: plan(self.windows(seen), seen.proprio, noise[0].numpy()),
            "module": lambda: self.by_module(seen, noise),
            "actor": lambda: self.actor.act(seen),
            "": lambda: self._plans.follow(self.policy, (0, 0)),  # so that the next has something to take
            "taking a policy": take,
        }


def make_spec(image_hw: tuple[int, int]) -> TaskSpec:
    """A task of that image size."""
    return TaskSpec(
        name="inference",
        robot="none",
        cycle_ns=45 * NS_PER_MS,
        frames=3,
        camera_hw=image_hw,
        camera_fps=30.0,
        image_hw=image_hw,
        proprio_names=tuple(f"p{number}" for number in range(PROPRIO)),
        action_names=("a0", "a1"),
        max_steps=667,
        sensor_window=1,
    )


def stirred(policy: nn.Module, seed: int) -> nn.Module:
    """With biases and last weights that are not zero, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        parameter.requires_grad_(False).add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy.eval()


def measure(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each way in turn, in as many rounds without another program in one, after some to warm up."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(MOST_TRIES * rounds):
        found, interruptions = {}, interrupted()
        for name, way in ways.items():
            start_ns = monotonic_ns()
            way()
            found[name] = (monotonic_ns() - start_ns) / NS_PER_MS
        if number >= WARM_UP and interrupted() == interruptions:
            for name, value in found.items():
                samples[name].append(value)
        if len(samples[""]) == rounds:
            break
    return {name: values for name, values in samples.items() if name}


def interrupted() -> int:
    """How often this thread had to leave the processor to another."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw


def percentiles(samples: list[float]) -> dict[str, float]:
    """p10, p50 and p90."""
    return {f"p{q}": round(float(np.percentile(samples, q)), 3) for q in (10, 50, 90)}


def ratio(ones: list[float], others: list[float]) -> dict[str, float]:
    """Of the samples, round by round."""
    return percentiles([one / other for one, other in zip(ones, others, strict=True)])


def main() -> None:
    """Compare, measure, print, and write the record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--observations", type=int, default=20, help="for each of 10 policies, to compare actions")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, help="JSON file for the record")
    options = parser.parse_args()

    torch.set_num_threads(1)
    cases, samples = {}, {}
    for name in options.cases:
        case = Case(*CASES[name])
        differences = case.largest_difference(options.observations)
        if max(differences.values()) > AGREEMENT:
            raise SystemExit(f"{name}: actions differ by more than {AGREEMENT:g}: {differences}")
        found = samples[name] = measure(case.ways(), options.rounds)
        ms = {way: percentiles(values) for way, values in found.items()}
        cases[name] = {
            "largest_difference": differences,
            "ms": ms,
            "rounds": len(found["actor"]),
            "ratio": {
                f"{other} / {ours}": ratio(found[other], found[ours])
                for ours in ("plan", "actor")
                for other in ("straightforward", "module")
            },
        }
        print(f"{name}: actions differ by {max(differences.values()):.1e} at most")
        for way, values in ms.items():
            print(f"  {way:<16} {values} ms")
        for pair, values in cases[name]["ratio"].items():
            print(f"  {pair}: {values}")
    record = {
        "benchmark": "inference",
        "made_with": describe(sys.argv),
        "cases": cases,
        "samples": {"ms": samples},
    }
    if options.out:
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(record)))


if __name__ == "__main__":
    main()
