"""Proximal policy optimisation from camera images (Schulman et al. 2017, arXiv 1707.06347).

Learns from whole episodes of one policy. The robot stands at the start of its next episode while an update runs.
docs/algos/ppo.md says what it does, what the preset `paper` keeps of the published runs, and what it mends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.nn import functional

from ..config import Section
from ..types import FloatArray, RawSettings, TaskSpec
from .agent import Needs, Rollouts
from .batch import Rollout, Window, centre_window, crop_window, shift_window
from .nets import ConvInit, make_encoder, mlp
from .state import load_tensors, module_tensors, save_tensors, torch_seed

__all__ = ["PPO", "PpoLearner", "PpoPolicy", "PpoSettings", "advantages"]

VALUES_AT_ONCE = 256  # observations whose values are computed together
KL_SLACK = 1.5  # Spinning Up's: epochs end when the policy has moved this much further than wanted
LOG_STD_RANGE = (-10.0, 2.0)  # of a policy that states its own; beyond, exp() or 1 / exp() means nothing
EPSILON = 1e-8

Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]


class PpoSettings(Section, frozen=True):
    """Settings of PPO; the defaults are the preset `ppo`."""

    # The published runs take 4,096, a tenth of what a robot has time for, and forget them. An update learns from as
    # many here, but there is one for every 250. What was tried: docs/algos/experiments.md.
    rollout_steps: Annotated[
        int, Meta(ge=1, description="steps of whole episodes by one policy, at least, before an update")
    ] = 250
    reuse_steps: Annotated[
        int, Meta(ge=0, description="steps of earlier policies' episodes that an update learns from besides, at most")
    ] = 4000
    epochs: Annotated[int, Meta(ge=1, le=1000, description="passes over these steps, at most")] = 3
    minibatch: Annotated[int, Meta(ge=2, description="steps per gradient step")] = 256
    gamma: Annotated[float, Meta(gt=0, le=1, description="discount per action cycle")] = 0.99
    gae_lambda: Annotated[Share, Meta(description="decay of the advantage estimate (GAE, arXiv 1506.02438)")] = 0.95
    clip: Annotated[float, Meta(gt=0, lt=1, description="how far the ratio of probabilities may gainfully go")] = 0.2
    target_kl: Annotated[float, Meta(ge=0, description="divergence after which a rollout is done; 0 = never")] = 0.02
    value_weight: Annotated[Positive, Meta(description="of the value's loss, which is half a squared error")] = 1.0
    entropy_weight: Annotated[float, Meta(ge=0, description="of an entropy bonus")] = 0.0

    # Old and new probabilities are of the same centre view. Augmented views only have to agree with it (DrAC,
    # arXiv 2006.12862): an augmentation within the ratio would move it from 1 before anything was learned.
    augment: Annotated[Literal["shift", "crop", "none"], Meta(description="augmentation of the images")] = "shift"
    shift_px: Annotated[int, Meta(ge=0, le=32, description="largest shift each way")] = 2
    crop_fraction: Annotated[float, Meta(ge=0, lt=0.25, description="crop's margin on each side, of the size")] = 0.01
    regularise: Annotated[float, Meta(ge=0, description="weight of the agreement under augmentation")] = 0.1
    augment_ratio: Annotated[
        bool, Meta(description="probabilities and values of augmented views, as the published code has it")
    ] = False

    conv_channels: Annotated[int, Meta(ge=1, le=256, description="channels of every convolution")] = 32
    conv_strides: Annotated[tuple[int, ...], Meta(min_length=1, description="of the 3x3 convolutions")] = (2, 2, 1)
    conv_init: Annotated[ConvInit, Meta(description="initial convolution weights")] = "orthogonal"
    conv_presence: Annotated[bool, Meta(description="how present each feature is, beside where it is")] = True
    centre_pixels: Annotated[bool, Meta(description="pixels in [-0.5, 0.5] instead of [0, 1]")] = True
    policy_trains_encoder: Annotated[bool, Meta(description="the policy's loss reaches the encoder too")] = True

    hidden: Annotated[tuple[int, ...], Meta(min_length=1, description="widths of the hidden layers")] = (256, 256)
    layer_norm: Annotated[bool, Meta(description="LayerNorm in policy and value")] = True
    # Andrychowicz et al. (arXiv 2006.05990): small last weights, and a spread that depends on no state.
    last_scale: Annotated[Positive, Meta(description="of the policy's last weights at the start")] = 0.01
    initial_log_std: Annotated[float, Meta(ge=-5, le=2, description="of the policy's spread")] = -0.5
    std_by_state: Annotated[bool, Meta(description="the network says the spread, too")] = False

    actor_lr: Annotated[Positive, Meta(description="Adam step size of the policy's head")] = 3e-4
    critic_lr: Annotated[Positive, Meta(description="Adam step size of value and encoder")] = 3e-4
    weight_decay: Annotated[float, Meta(ge=0, description="L2 penalty on all weights")] = 0.0
    adam_epsilon: Annotated[Positive, Meta(description="Adam's epsilon")] = 1e-5
    grad_clip: Annotated[float, Meta(ge=0, description="largest gradient norm; 0 = no clipping")] = 0.5
    scale_rewards: Annotated[bool, Meta(description="rewards by the running spread of the returns")] = True


# [paper]: reference runs of PPO-RAD. Their rollout ends with the episode in which it is full, as here.
PAPER: RawSettings = {
    "agent": {
        "rollout_steps": 4096,
        "reuse_steps": 0,
        "epochs": 10,
        "minibatch": 256,
        "gamma": 0.99,
        "gae_lambda": 0.97,
        "clip": 0.2,
        "target_kl": 0.0,
        "augment": "crop",
        "regularise": 0.0,
        "augment_ratio": True,
        "conv_strides": [2, 2, 2, 1],
        "conv_init": "delta_orthogonal",
        "conv_presence": False,
        "centre_pixels": False,
        "policy_trains_encoder": False,
        "hidden": [1024, 1024],
        "layer_norm": False,
        "last_scale": 1.0,
        "initial_log_std": 0.0,
        "std_by_state": True,
        "actor_lr": 3e-4,
        "critic_lr": 1e-3,
        "weight_decay": 1e-4,
        "adam_epsilon": 1e-8,
        "grad_clip": 0.0,
        "scale_rewards": False,
    },
    "replay": {"capacity": 10_000},
}
LITE: RawSettings = {"replay": {"capacity": 10_000}, "task": {"image_height": 48, "image_width": 64}}

Gaussian: TypeAlias = tuple[Tensor, Tensor]  # mean and log standard deviation, `(B, A)` each


class PpoPolicy(nn.Module):
    """The shipped network. Its extras are the action as it was drawn, before it was clipped, and its log-density."""

    def __init__(self, spec: TaskSpec, settings: PpoSettings) -> None:
        super().__init__()
        self.encoder = make_encoder(
            frames=spec.frames,
            image_hw=make_window(spec, settings).out_hw,
            channels=settings.conv_channels,
            strides=settings.conv_strides,
            centred=settings.centre_pixels,
            init=settings.conv_init,
            presence=settings.conv_presence,
        )
        self.feature_dim = self.encoder.out_dim + spec.proprio_dim
        outputs = spec.action_dim * (2 if settings.std_by_state else 1)
        self.head = mlp(self.feature_dim, settings.hidden, outputs, layer_norm=settings.layer_norm)
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.weight *= settings.last_scale
        self.log_std = nn.Parameter(torch.full((spec.action_dim,), settings.initial_log_std))
        if settings.std_by_state:
            self.log_std.requires_grad_(False)  # a constant beside what the network says

    def features(self, images: Tensor, proprio: Tensor) -> Tensor:
        """What policy and value see: `(B, Z) float32`."""
        return torch.cat([self.encoder(images), proprio], -1)

    def distribution(self, features: Tensor) -> Gaussian:
        """Of the actions before they are clipped."""
        out = self.head(features)
        if out.shape[-1] == len(self.log_std):
            return out, self.log_std.expand_as(out)
        mean, log_std = out.chunk(2, -1)
        return mean, (self.log_std + log_std).clamp(*LOG_STD_RANGE)

    def forward(self, images: Tensor, proprio: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        gaussian = self.distribution(self.features(images, proprio))
        mean, log_std = gaussian
        drawn = mean + log_std.exp() * noise
        return drawn.clamp(-1.0, 1.0), torch.cat([drawn, log_density(drawn, gaussian)[:, None]], -1)

    def decide(self, outputs: FloatArray, noise: FloatArray) -> tuple[FloatArray, FloatArray]:
        """What `forward` does after the head, for one observation; see `inference.HeadedPolicy`.

        The log-density is taken of the action as it was rounded, as `log_density` and the update take it.
        """
        size = len(noise)
        mean, log_std = outputs[:size], self.log_std.detach().numpy()
        if len(outputs) > size:
            log_std = np.clip(log_std + outputs[size:], *LOG_STD_RANGE)
        drawn = mean + np.exp(log_std) * noise
        seen = (drawn - mean) * np.exp(-log_std)
        density = (-0.5 * seen * seen - log_std - np.float32(0.5 * math.log(2 * math.pi))).sum()
        return np.clip(drawn, -1.0, 1.0), np.append(drawn, density)


def log_density(drawn: Tensor, gaussian: Gaussian) -> Tensor:
    """Summed over the last axis: `(B,)`."""
    mean, log_std = gaussian
    noise = (drawn - mean) * torch.exp(-log_std)
    return (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def divergence(old: Gaussian, new: Gaussian) -> Tensor:
    """KL(old || new), `(B,)`."""
    (mean, log_std), (other_mean, other_log_std) = old, new
    square = (2 * (log_std - other_log_std)).exp() + ((mean - other_mean) * torch.exp(-other_log_std)).square()
    return (other_log_std - log_std + 0.5 * (square - 1)).sum(-1)


def advantages(
    rewards: FloatArray,
    values: FloatArray,
    successors: npt.NDArray[np.int64],
    terminated: npt.NDArray[np.bool_],
    ends: npt.NDArray[np.bool_],
    *,
    trust: FloatArray,
    gamma: float,
    gae_lambda: float,
) -> FloatArray:
    """Generalised advantage estimates `(T,)`; nothing flows over the end of an episode.

    `values` `(T + N,)` are of all observations, `successors` says which comes after a step. A step that terminated is
    worth its reward; the last one of a truncated episode is bootstrapped from the true last observation. `trust` `(T,)`
    in [0, 1] is V-trace's truncated ratio (arXiv 1802.01561) and 1 for steps of the policy that is asked about: what a
    step led to counts for those before it as far as that policy would have done it.
    """
    after = np.where(terminated, 0.0, values[successors])
    errors = rewards + gamma * after - values[: len(rewards)]
    found = np.zeros(len(rewards))
    running = 0.0
    for t in range(len(rewards) - 1, -1, -1):
        found[t] = errors[t] + (0.0 if ends[t] else running)
        running = gamma * gae_lambda * trust[t] * found[t]
    return found.astype(np.float32)


class PpoLearner:
    """Policy, value, optimiser and the update; implements `agent.Learner`."""

    def __init__(self, spec: TaskSpec, settings: PpoSettings, *, seed: int, device: torch.device) -> None:
        self._settings, self._device = settings, device
        self._window = make_window(spec, settings)
        self._action_dim = spec.action_dim
        self._rng = np.random.default_rng(torch_seed(seed, "agent.minibatches"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed, "agent.weights"))
            self._policy = PpoPolicy(spec, settings)
            self._value = mlp(self._policy.feature_dim, settings.hidden, 1, layer_norm=settings.layer_norm)
        self._policy.to(device)
        self._value.to(device)
        actor = [*self._policy.head.parameters(), *([] if settings.std_by_state else [self._policy.log_std])]
        critic = [*self._policy.encoder.parameters(), *self._value.parameters()]
        self._parameters = [*actor, *critic]
        self._optimizer = torch.optim.Adam(
            [{"params": actor, "lr": settings.actor_lr}, {"params": critic, "lr": settings.critic_lr}],
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
        )
        # Of the discounted returns so far: how many, their mean, and the sum of squared differences from it.
        self._returns = torch.zeros(3, dtype=torch.float64)
        self._newest: dict[str, float] = {}

    def update(self, batch: Rollout) -> None:
        """Epochs over one rollout and earlier steps, until they are done or the policy has moved enough."""
        settings = self._settings
        rewards = batch.rewards * self._reward_scale(batch) if settings.scale_rewards else batch.rewards
        values, densities = self._assess(batch)
        steps = len(rewards)
        trust = np.exp(np.minimum(densities - batch.extras[:, self._action_dim], 0.0))
        gains = advantages(
            rewards,
            values,
            batch.successors(),
            batch.terminated,
            batch.ends,
            trust=trust,
            gamma=settings.gamma,
            gae_lambda=settings.gae_lambda,
        )
        targets = trust * gains + values[:steps]
        spread = float(np.var(targets[batch.earlier :]))
        explained = 1 - float(np.var(gains[batch.earlier :])) / spread if spread > 0 else 0.0
        gains = trust * (gains - gains.mean()) / (gains.std() + EPSILON)
        sums: dict[str, float] = {}
        done = epochs = 0
        for _ in range(settings.epochs):
            epochs += 1
            divergences = []
            for part in self._minibatches(steps):
                found = self._step(batch, part, densities, gains, targets)
                done += 1
                divergences.append(found["kl"])
                sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
            if settings.target_kl > 0 and np.mean(divergences) > KL_SLACK * settings.target_kl:
                break
        self._newest = {name: value / done for name, value in sums.items()} | {
            "explained_variance": explained,
            "epochs": float(epochs),
            "trust": float(trust.mean()),
        }

    def _minibatches(self, steps: int) -> Iterator[npt.NDArray[np.int64]]:
        """All steps in random order, in parts of at most the minibatch's size that differ by one at most."""
        order = self._rng.permutation(steps)
        yield from np.array_split(order, math.ceil(steps / self._settings.minibatch))

    def _step(
        self,
        rollout: Rollout,
        part: npt.NDArray[np.int64],
        densities: FloatArray,
        gains: FloatArray,
        targets: FloatArray,
    ) -> dict[str, float]:
        settings = self._settings
        proprio, gain, target = (self._tensor(array[part]) for array in (rollout.proprio, gains, targets))
        drawn, old_density = self._tensor(rollout.extras[part, : self._action_dim]), self._tensor(densities[part])
        corners = self._window.offsets(self._rng, len(part))
        features = self._features(rollout, part, proprio, corners if settings.augment_ratio else None)
        gaussian = self._policy.distribution(self._for_policy(features))
        value = self._value(features).squeeze(-1)
        density = log_density(drawn, gaussian)
        log_ratio = density - old_density
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
        policy_loss = -torch.minimum(ratio * gain, clipped * gain).mean()
        value_loss = 0.5 * functional.mse_loss(value, target)
        entropy = (gaussian[1] + 0.5 * math.log(2 * math.pi * math.e)).sum(-1).mean()
        loss = policy_loss + settings.value_weight * value_loss - settings.entropy_weight * entropy
        if settings.regularise > 0 and settings.augment != "none":
            other = self._features(rollout, part, proprio, corners)
            seen = (gaussian[0].detach(), gaussian[1].detach())
            apart = divergence(seen, self._policy.distribution(self._for_policy(other)))
            off = (value.detach() - self._value(other).squeeze(-1)).square()
            loss = loss + settings.regularise * (apart + off).mean()
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if settings.grad_clip > 0:
            nn.utils.clip_grad_norm_(self._parameters, settings.grad_clip)
        self._optimizer.step()
        found = {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "kl": (ratio - 1 - log_ratio).mean(),  # Schulman's estimate, never negative
            "clipped": ((ratio - 1).abs() > settings.clip).float().mean(),
        }
        return {name: float(value.detach()) for name, value in found.items()}

    def _for_policy(self, features: Tensor) -> Tensor:
        return features if self._settings.policy_trains_encoder else features.detach()

    def _features(
        self,
        rollout: Rollout,
        part: npt.NDArray[np.int64],
        proprio: Tensor,
        corners: npt.NDArray[np.int64] | None,
    ) -> Tensor:
        """Of the centre view, or of the views at `corners`."""
        if corners is None and not self._window.is_whole:
            corners = np.broadcast_to(np.array(self._window.centre), (len(part), 2))
        images = rollout.look(part, corners)
        height, width = self._window.out_hw
        return self._policy.features(self._tensor(images[:, :, :height, :width]), proprio)

    @torch.no_grad()
    def _assess(self, rollout: Rollout) -> tuple[FloatArray, FloatArray]:
        """Values of all observations, `(T + N,)`, and log-densities of what was drawn, `(T,)`, before the update.

        Of the newest policy's steps its actor said the densities, to its own rounding.
        """
        values, densities = [], rollout.extras[:, self._action_dim].copy()
        for start in range(0, len(rollout.proprio), VALUES_AT_ONCE):
            part = np.arange(start, min(start + VALUES_AT_ONCE, len(rollout.proprio)))
            features = self._features(rollout, part, self._tensor(rollout.proprio[part]), None)
            values.append(self._value(features).squeeze(-1).cpu().numpy())
            earlier = part[part < rollout.earlier]
            if len(earlier):
                drawn = self._tensor(rollout.extras[earlier, : self._action_dim])
                gaussian = self._policy.distribution(features[: len(earlier)])
                densities[earlier] = log_density(drawn, gaussian).cpu().numpy()
        return np.concatenate(values), densities

    def _reward_scale(self, rollout: Rollout) -> float:
        """One over the spread of all discounted returns so far, the newest included."""
        rewards, ends = rollout.rewards[rollout.earlier :], rollout.ends[rollout.earlier :]
        running, returns = 0.0, np.zeros(len(rewards))
        for t, (reward, end) in enumerate(zip(rewards.tolist(), ends.tolist(), strict=True)):
            running = returns[t] = reward + self._settings.gamma * running
            running = 0.0 if end else running
        count, mean, squares = self._returns.tolist()
        more, other = len(returns), float(returns.mean())
        both = count + more
        squares += float(((returns - other) ** 2).sum()) + (other - mean) ** 2 * count * more / both
        self._returns[:] = torch.tensor([both, mean + (other - mean) * more / both, squares], dtype=torch.float64)
        return 1 / (math.sqrt(squares / both) + EPSILON)

    def _tensor(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)

    def metrics(self) -> dict[str, float]:
        """policy_loss, value_loss, entropy, kl and clipped, means over the newest update; explained_variance before
        it, its epochs, and the mean trust in its steps, 1 without earlier ones. Empty before the first."""
        return dict(self._newest)

    def policy(self) -> PpoPolicy:
        return self._policy

    def state(self) -> dict[str, Tensor]:
        """Copies on the CPU: networks, optimiser, spread of the returns, order of the minibatches."""
        tensors = save_tensors(self._tensors(), {"all": self._optimizer})
        return tensors | {"rng": _pack(self._rng)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        load_tensors(self._tensors(), {"all": self._optimizer}, state)
        _unpack(self._rng, state["rng"])

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from module_tensors({"policy": self._policy, "value": self._value})
        yield "returns", self._returns


def _pack(rng: np.random.Generator) -> Tensor:
    """PCG64's state in a tensor."""
    state = rng.bit_generator.state
    words = [*_words(state["state"]["state"]), *_words(state["state"]["inc"]), state["has_uint32"], state["uinteger"]]
    return torch.tensor(words, dtype=torch.int64)


def _unpack(rng: np.random.Generator, packed: Tensor) -> None:
    words = packed.tolist()
    whole = [sum(word << (32 * place) for place, word in enumerate(words[i : i + 4])) for i in (0, 4)]
    rng.bit_generator.state = {
        "bit_generator": "PCG64",
        "state": {"state": whole[0], "inc": whole[1]},
        "has_uint32": words[8],
        "uinteger": words[9],
    }


def _words(number: int) -> list[int]:
    return [(number >> (32 * place)) & 0xFFFFFFFF for place in range(4)]


def make_window(spec: TaskSpec, settings: PpoSettings) -> Window:
    """The views that augmentation makes, and what the actor cuts out."""
    if settings.augment == "shift":
        return shift_window(spec.image_hw, settings.shift_px)
    if settings.augment == "crop":
        return crop_window(spec.image_hw, settings.crop_fraction)
    return centre_window(spec.image_hw)


class PpoAlgorithm:
    """PPO's entry in the registry: `relod.algos.ppo:PPO`."""

    settings_type = PpoSettings
    presets: Mapping[str, RawSettings] = {"ppo": {"replay": {"capacity": 10_000}}, "ppo-lite": LITE, "paper": PAPER}
    profiles: Mapping[str, RawSettings] = {}

    def needs(self, spec: TaskSpec, settings: PpoSettings) -> Needs:
        return Needs(
            memory=Rollouts(steps=settings.rollout_steps, earlier_steps=settings.reuse_steps),
            window=make_window(spec, settings),
            extras=spec.action_dim + 1,
            precision="float32",  # rounded weights give other densities than the learner's, and so other ratios
        )

    def build_actor(self, spec: TaskSpec, settings: PpoSettings) -> PpoPolicy:
        return PpoPolicy(spec, settings)

    def build_learner(self, spec: TaskSpec, settings: PpoSettings, *, seed: int, device: torch.device) -> PpoLearner:
        return PpoLearner(spec, settings, seed=seed, device=device)


PPO = PpoAlgorithm()
