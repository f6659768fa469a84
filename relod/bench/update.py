"""`relod bench update`: an update of SAC, next to the straightforward way of writing it.

`relod-N` draws a minibatch of N from a shared replay, random crop included, and updates. `straightforward-N`
(`straightforward.py`) starts with its minibatch at hand. Both have the preset `paper`, 160x120 pixels, the same
threads and the same allocator settings as the update worker, and take turns in one process. Beforehand both are given
the same weights, crops and noise, and their losses are compared. `sac-lite` is that preset's update, measured alone.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..algos.agent import Minibatches
from ..algos.batch import Batch, centre_window
from ..algos.nets import Encoder
from ..algos.sac import SAC, SacLearner, SacSettings
from ..config import load
from ..errors import RelodError, SettingsError, StartError
from ..runtime.clock import NS_PER_MS, monotonic_ns
from ..runtime.remote.owed import pack_policy
from ..runtime.worker import keep_freed_memory
from .form import Findings, Series, positive, ratio
from .straightforward import USES, StraightforwardSac
from .syntheticreplay import fill, make_spec

__all__ = ["ROUNDS", "SHORT_ROUNDS", "UpdateRequest", "compare_losses", "measure_update"]

ROUNDS, SHORT_ROUNDS = 20, 3
LITE_PER_ROUND = 10  # an update of sac-lite takes about 30 ms, one of the straightforward version up to 1.3 s
REPLAY_STEPS = 2_000
# Relative, of losses in float32. On a GPU sums are made in orders of the device's own.
AGREEMENT = {"cpu": 1e-4, "cuda": 1e-2}
CHECKED_UPDATES, CHECKED_BATCH = 3, 32
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRequest:
    """What to measure; raises `SettingsError` for what is no device or size, `StartError` without such a device."""

    rounds: int = ROUNDS
    device: str = "cpu"
    batch_sizes: tuple[int, ...] = (64, 256)
    threads: int = 2

    def __post_init__(self) -> None:
        positive("--rounds", self.rounds)
        positive("--threads", self.threads)
        for size in self.batch_sizes:
            positive("--batch-size", size)
        if self.device not in AGREEMENT:
            raise SettingsError(f"--device {self.device!r}", f"choose one of {', '.join(AGREEMENT)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise StartError("--device cuda: torch finds no such device", "leave it out, or install a torch with CUDA")


def measure_update(request: UpdateRequest) -> Findings:
    """Compare the losses, then measure both versions in turns; raises `RelodError` when the losses differ."""
    device = torch.device(request.device)
    keep_freed_memory()
    samples: dict[str, list[float]] = {}
    ratios = {}
    with _threads(request.threads):
        differences = {name: compare_losses(torch.device(name)) for name in dict.fromkeys(("cpu", request.device))}
        for size in dict.fromkeys(request.batch_sizes):
            samples |= _measure(_make_pair(size, device), request.rounds, device)
            ours, theirs = f"relod-{size}", f"straightforward-{size}"
            ratios[theirs] = ratio(ours, samples[theirs], samples[ours])
        samples |= _measure({"sac-lite": _make_lite(device)}, LITE_PER_ROUND * request.rounds, device)
    policy = policy_bytes()
    return Findings(
        benchmark="update",
        parameters={
            "rounds": request.rounds,
            "device": request.device,
            "batch_sizes": list(request.batch_sizes),
            "threads": request.threads,
        },
        samples={name: Series(values=values) for name, values in samples.items()},
        ratios=ratios,
        facts={
            **({"cuda_device": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
            "largest_relative_difference": differences,
            "policy": policy,
        },
        notes=[
            f"losses of both versions agree: {max(max(each.values()) for each in differences.values()):.1e} at most",
            f"a policy of the preset paper is {policy['relod_bytes'] / 1e6:.2f} MB over relod's link",
            f"actor and critics pickled are {policy['actor_and_critics_pickled_bytes'] / 1e6:.2f} MB",
        ],
    )


def compare_losses(device: torch.device) -> dict[str, float]:
    """The largest relative differences of the losses over some updates; `RelodError` when they are not equal.

    The critics' step size is next to nothing, so that encoder and critics stay what they are and it does not matter
    whether the actor's features come from before that step or after it. Actor and entropy coefficient do move.
    """
    settings, spec = _settings_of("paper", critic_lr=1e-12), make_spec((120, 160))
    learner = SAC.build_learner(spec, settings, seed=0, device=device)
    window = SAC.needs(spec, settings).window
    other = _straightforward(learner, settings, window.out_hw, device)
    (whole, cropped), _ = fill(spec, steps=REPLAY_STEPS, lookahead=1, threads=(1, 1))
    worst = dict.fromkeys(("critic_loss", "actor_loss", "alpha_loss"), 0.0)
    for seed in range(CHECKED_UPDATES):
        # The sampler draws rows, then corners: the same seed gives both versions the same of either.
        batch = cropped.sample(CHECKED_BATCH, n_step=1, gamma=1.0, window=window, rng=np.random.default_rng(seed))
        rng, whole_window = np.random.default_rng(seed), centre_window(spec.image_hw)
        uncut = whole.sample(CHECKED_BATCH, n_step=1, gamma=1.0, window=whole_window, rng=np.random.default_rng(seed))
        rng.integers(0, len(whole), CHECKED_BATCH)
        corners = torch.from_numpy(window.offsets(rng, CHECKED_BATCH))
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            learner.update(batch)
            theirs = other.update(_channels_first(uncut, device), dict.fromkeys(USES, corners))
        ours = learner.metrics()
        target_entropy = settings.entropy_per_action * spec.action_dim
        ours["alpha_loss"] = ours["alpha"] * (ours["entropy"] - target_entropy)
        for name, loss in theirs.items():
            worst[name] = max(worst[name], abs(ours[name] - loss) / abs(loss))
    if not max(worst.values()) <= AGREEMENT[device.type]:
        raise RelodError(f"the losses differ by more than {AGREEMENT[device.type]:g} of themselves: {worst}")
    return worst


# -- both versions -----------------------------------------------------------------------------------------------------


def _settings_of(preset: str, **changes: object) -> SacSettings:
    """A preset's agent settings, with changes."""
    agent = {**SAC.presets[preset]["agent"], **changes}
    found: SacSettings = load({"agent": SacSettings}, presets=[{"agent": agent}]).agent
    return found


def _straightforward(
    learner: SacLearner, settings: SacSettings, out_hw: tuple[int, int], device: torch.device
) -> StraightforwardSac:
    """The straightforward version with the learner's weights, targets, entropy coefficient and noise."""
    encoder = learner.policy().encoder
    assert isinstance(encoder, Encoder)
    feature_hw = encoder.feature_hw
    return StraightforwardSac(learner.state(), settings, feature_hw=feature_hw, out_hw=out_hw, device=device)


def _channels_first(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The same minibatch as the straightforward version keeps it: `(B, 3k, H, W) uint8`."""
    tensors = {name: torch.from_numpy(getattr(batch, name).copy()) for name in ("rewards", "discounts", "actions")}
    for prefix in ("", "next_"):
        images = torch.from_numpy(getattr(batch, f"{prefix}images"))
        size, frames, height, width, _ = images.shape
        tensors[f"{prefix}images"] = images.permute(0, 1, 4, 2, 3).reshape(size, 3 * frames, height, width).clone()
        tensors[f"{prefix}proprio"] = torch.from_numpy(getattr(batch, f"{prefix}proprio").copy())
    return {name: value.to(device) for name, value in tensors.items()}


def _make_pair(batch_size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Both versions of an update with the preset `paper`."""
    settings, spec = _settings_of("paper", batch_size=batch_size), make_spec((120, 160))
    learner = SAC.build_learner(spec, settings, seed=0, device=device)
    window, rng = SAC.needs(spec, settings).window, np.random.default_rng(0)
    other = _straightforward(learner, settings, window.out_hw, device)
    threads, staged = (torch.get_num_threads(),), device.type == "cuda"
    (sampler,), _ = fill(spec, steps=REPLAY_STEPS, lookahead=1, threads=threads, staged=staged)
    (whole,), _ = fill(spec, steps=REPLAY_STEPS, lookahead=1, threads=(1,))
    uncut = whole.sample(batch_size, n_step=1, gamma=1.0, window=centre_window(spec.image_hw), rng=rng)
    given = _channels_first(uncut, device)

    def ours() -> None:
        learner.update(sampler.sample(batch_size, n_step=1, gamma=1.0, window=window, rng=rng))

    def theirs() -> None:
        other.update(given, {use: torch.from_numpy(window.offsets(rng, batch_size)) for use in USES})

    return {f"relod-{batch_size}": ours, f"straightforward-{batch_size}": theirs}


def _make_lite(device: torch.device) -> Callable[[], object]:
    """An update with the preset `sac-lite`, the minibatch included."""
    settings, spec = _settings_of("sac-lite"), make_spec((48, 64))
    learner = SAC.build_learner(spec, settings, seed=0, device=device)
    needs, rng = SAC.needs(spec, settings), np.random.default_rng(0)
    memory, staged = needs.memory, device.type == "cuda"
    assert isinstance(memory, Minibatches)
    (sampler,), _ = fill(spec, steps=REPLAY_STEPS, lookahead=needs.lookahead, threads=(1,), staged=staged)

    def update() -> None:
        n_step, gamma = memory.n_step, memory.gamma
        learner.update(sampler.sample(memory.size, n_step=n_step, gamma=gamma, window=needs.window, rng=rng))

    return update


def _measure(ways: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each way in turn, `rounds` times, after two rounds to warm up."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 2):
        for name, way in ways.items():
            start_ns = monotonic_ns()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            samples[name].append((monotonic_ns() - start_ns) / NS_PER_MS)
    return {name: values[2:] for name, values in samples.items()}


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def policy_bytes() -> dict[str, Any]:
    """Bytes of a policy of the preset `paper`: actor in half precision, or actor and critics pickled."""
    learner = SAC.build_learner(make_spec((120, 160)), _settings_of("paper"), seed=0, device=CPU)
    flat = np.concatenate([value.detach().numpy().ravel() for value in learner.policy().parameters()])
    networks = {name: value.numpy() for name, value in learner.state().items()}
    networks = {name: value for name, value in networks.items() if "target" not in name and "optimiser" not in name}
    return {
        "values": flat.size,
        "relod_bytes": sum(len(part) for part in pack_policy(flat, (1, 1), "float16").parts),
        "actor_and_critics_pickled_bytes": len(pickle.dumps(networks)),
    }
