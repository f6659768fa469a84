"""Soft actor-critic from camera images (Haarnoja et al. 2018, arXiv 1812.05905, with RAD/DrQ augmentation).

One encoder serves actor and critics and is trained by the critics' loss only (SAC-AE, arXiv 1910.01741). Augmentation
happens once per batch, before this module. Settings marked [paper] are those of the paper's own Create-Reacher runs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from msgspec import Meta
from torch import Tensor, nn

from ..config import Section
from ..errors import SettingsError
from ..types import FloatArray, RawSettings, TaskSpec
from .agent import Minibatches, Needs
from .augment import gather_windows
from .batch import Batch, Window, centre_window, crop_window, shift_window
from .nets import ConvInit, ensemble, make_encoder, mlp, squashed_log_std, tanh_log_prob
from .state import load_tensors, module_tensors, save_tensors, torch_seed

__all__ = ["SAC", "SacLearner", "SacPolicy", "SacSettings"]

Rate = Annotated[float, Meta(gt=0, lt=1)]


class SacSettings(Section, frozen=True):
    """Settings of SAC; the defaults are the preset `sac`, made for a GPU."""

    # Data. The paper's batch for Create-Reacher is 256; a CPU does 64 within an action cycle.
    batch_size: Annotated[int, Meta(ge=1, description="transitions per update")] = 256
    # Three steps speed up the first thousand steps (DrQ-v2; seen on the Track task too) at little bias at 45 ms.
    n_step: Annotated[int, Meta(ge=1, le=16, description="rewards summed before bootstrapping")] = 3
    # Looks 200 cycles ahead: at -1 per step, states 400 and 600 cycles from the goal are worth -173 and -190. With
    # 0.99 it would be -98.2 and -99.8, too close to learn from; with 1 a time limit of 667 steps never converges.
    gamma: Annotated[float, Meta(gt=0, le=1, description="discount per action cycle")] = 0.995
    # In 40 episodes a Create with uniformly random actions finds its target 4 times; with random actions held for 15,
    # 25, 40, 60 cycles 10, 15, 17, 22 times. What the replay does not hold cannot be learned: of runs with 1,500 steps
    # held for 40 cycles one in five begins without a success, and those learn late.
    init_steps: Annotated[int, Meta(ge=0, description="steps of random actions at the start of a run")] = 2000
    init_hold: Annotated[int, Meta(ge=1, description="cycles for which a random action is held")] = 60
    update_after: Annotated[int, Meta(ge=0, description="steps before the first update, at most init_steps")] = 1000
    # White noise at 22 Hz moves a robot nowhere; with a memory of half a second it does, and every single action is
    # distributed as before (cf. Eberhard et al. 2023, "Pink noise is all you need"). With 25 cycles the target was
    # found sooner and reaching it learned later: docs/algos/experiments.md.
    noise_cycles: Annotated[
        float, Meta(ge=0, le=1000, description="correlation time of the policy's noise, in cycles; 0 = white")
    ] = 10.0
    # More updates on the same data overfit young replays; As et al. (arXiv 2602.20220) call the ratio decisive.
    max_updates_per_step: Annotated[float, Meta(gt=0, description="cap on updates per environment step")] = 2.0

    # Augmentation, once per batch: random shift (DrQ), the paper's random crop (RAD), or none.
    augment: Annotated[Literal["shift", "crop", "none"], Meta(description="augmentation of the images")] = "shift"
    shift_px: Annotated[int, Meta(ge=0, le=32, description="largest shift each way; DrQ uses 4 of 84")] = 4
    crop_fraction: Annotated[float, Meta(ge=0, lt=0.25, description="crop's margin on each side, of the size")] = 0.01

    # Encoder: the paper's four layers. [paper] starts delta-orthogonal with pixels in [0, 1].
    conv_channels: Annotated[int, Meta(ge=1, le=256, description="channels of every convolution")] = 32
    conv_strides: Annotated[tuple[int, ...], Meta(min_length=1, description="of the 3x3 convolutions")] = (2, 2, 2, 1)
    conv_init: Annotated[ConvInit, Meta(description="initial convolution weights")] = "orthogonal"
    # An expected place alone cannot tell a target in the middle of the image from none at all (cf. Finn et al. 2016).
    conv_presence: Annotated[bool, Meta(description="how present each feature is, beside where it is")] = True
    centre_pixels: Annotated[bool, Meta(description="pixels in [-0.5, 0.5] instead of [0, 1]")] = True

    # Actor and critics. LayerNorm guards against overestimation (RLPD, arXiv 2302.02948) at nearly no cost.
    hidden: Annotated[tuple[int, ...], Meta(min_length=1, description="widths of the hidden layers")] = (512, 512)
    layer_norm: Annotated[bool, Meta(description="LayerNorm in actor and critics")] = True
    critics: Annotated[int, Meta(ge=1, le=20, description="critics in the ensemble")] = 2
    log_std_min: Annotated[float, Meta(ge=-20, le=0, description="least log standard deviation")] = -5.0
    log_std_max: Annotated[float, Meta(ge=-5, le=10, description="largest log standard deviation")] = 2.0
    # Zero weights alone would start at 0.22, too little to find anything in pixels.
    initial_std: Annotated[float, Meta(ge=0, description="of the untrained policy; 0 = as the weights fall")] = 0.8

    # Learning rates as in SAC; [paper] takes larger ones. Clipping is a guard, seldom reached.
    actor_lr: Annotated[float, Meta(gt=0, description="Adam step size of the actor")] = 3e-4
    critic_lr: Annotated[float, Meta(gt=0, description="Adam step size of critics and encoder")] = 3e-4
    alpha_lr: Annotated[float, Meta(gt=0, description="Adam step size of the entropy coefficient's log")] = 3e-4
    alpha_beta1: Annotated[float, Meta(ge=0, lt=1, description="Adam's first decay for the same")] = 0.9
    grad_clip: Annotated[float, Meta(ge=0, description="largest gradient norm; 0 = no clipping")] = 10.0
    initial_alpha: Annotated[float, Meta(gt=0, description="entropy coefficient at the start (SAC-AE: 0.1)")] = 0.1
    # -0.5 ends near a standard deviation of 0.15 per action (SERL, LeRobot); [paper] has -1.
    entropy_per_action: Annotated[float, Meta(description="target entropy per action dimension")] = -0.5
    # At -1 per step the bonus would pay for staying alive (SERL and RLPD from pixels: off).
    backup_entropy: Annotated[bool, Meta(description="entropy in the critics' target")] = False
    critic_tau: Annotated[Rate, Meta(description="share of the critics taken over by their targets")] = 0.01
    # A target encoder costs a fifth of an update; DrQ-v2 has none, and Track learned as well without.
    target_encoder: Annotated[bool, Meta(description="a slow copy of the encoder for the targets")] = False
    encoder_tau: Annotated[Rate, Meta(description="share of the encoder taken over by its target")] = 0.05
    actor_every: Annotated[int, Meta(ge=1, description="critic updates per update of the actor")] = 2
    target_every: Annotated[int, Meta(ge=1, description="critic updates per update of the targets")] = 1
    autocast: Annotated[bool, Meta(description="bfloat16 layers on a GPU; losses stay float32")] = True


# [paper]: Create-Reacher's command line of the paper's runs (February to September 2022).
PAPER: RawSettings = {
    "agent": {
        "batch_size": 256,
        "n_step": 1,
        "gamma": 1.0,  # undiscounted episodic task, true terminals
        "init_steps": 1000,
        "update_after": 1000,
        "init_hold": 1,
        "noise_cycles": 0.0,
        "max_updates_per_step": 1.0,
        "augment": "crop",
        "crop_fraction": 0.01,
        "conv_channels": 32,
        "conv_strides": [2, 2, 2, 1],
        "conv_init": "delta_orthogonal",
        "conv_presence": False,
        "centre_pixels": False,
        "hidden": [1024, 1024],
        "layer_norm": False,
        "critics": 2,
        "log_std_min": -10.0,
        "log_std_max": 2.0,
        "initial_std": 0.0,
        "actor_lr": 1e-3,
        "critic_lr": 1e-3,
        "alpha_lr": 1e-4,
        "alpha_beta1": 0.5,
        "grad_clip": 0.0,
        "initial_alpha": 0.1,
        "entropy_per_action": -1.0,
        "backup_entropy": True,
        "critic_tau": 0.01,
        "encoder_tau": 0.05,
        "target_encoder": True,
        "actor_every": 1,
        "target_every": 1,
        "autocast": False,
    },
    "replay": {"capacity": 100_000},
    "task": {"image_height": 120, "image_width": 160},
}

# An update of sac-lite takes about 30 ms on one core, two thirds of an action cycle; see docs/algos/sac.md.
LITE: RawSettings = {
    "agent": {
        "batch_size": 64,
        "max_updates_per_step": 1.0,
        "shift_px": 2,  # of 48 rows, as 4 of DrQ's 84
        "conv_strides": [2, 2, 1],
        "hidden": [256, 256],
        "actor_every": 1,
        "autocast": False,
    },
    "replay": {"capacity": 50_000},  # 0.6 GB of frames
    "task": {"image_height": 48, "image_width": 64},
}


# The paper's two small local computers (section VI), over any preset. Laptop: minibatches of 64, 16,000 steps, updates
# back to back. Emulated Jetson Nano, on that laptop: one update per 12 steps as well, from 500 ms an update and cycles
# of 40 ms; its published code says 0.08 per step, one per 12.5.
PROFILES: Mapping[str, RawSettings] = {
    "laptop": {"agent": {"batch_size": 64}, "replay": {"capacity": 16_000}},
    "jnano-em": {
        "agent": {"batch_size": 64},
        "learner": {"update_every_steps": 12.0},
        "replay": {"capacity": 16_000},
    },
}


class SacPolicy(nn.Module):
    """The shipped network: encoder and actor head."""

    def __init__(self, spec: TaskSpec, settings: SacSettings) -> None:
        super().__init__()
        self._log_std_range = (settings.log_std_min, settings.log_std_max)
        self.encoder = make_encoder(
            frames=spec.frames,
            image_hw=_window(spec, settings).out_hw,
            channels=settings.conv_channels,
            strides=settings.conv_strides,
            centred=settings.centre_pixels,
            init=settings.conv_init,
            presence=settings.conv_presence,
        )
        self.feature_dim = self.encoder.out_dim + spec.proprio_dim
        self.head = mlp(self.feature_dim, settings.hidden, 2 * spec.action_dim, layer_norm=settings.layer_norm)
        if settings.initial_std > 0:
            self._start_with(settings.initial_std)

    def features(self, images: Tensor, proprio: Tensor) -> Tensor:
        """What actor and critics see: `(B, Z) float32`."""
        return torch.cat([self.encoder(images), proprio], -1)

    def distribution(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of the Gaussian under the tanh, `(B, A) float32` each."""
        mean, raw = self.head(features).float().chunk(2, -1)
        return mean, squashed_log_std(raw, *self._log_std_range)

    def forward(self, images: Tensor, proprio: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.distribution(self.features(images, proprio))
        return torch.tanh(mean + log_std.exp() * noise), noise[:, :0]

    def decide(self, outputs: FloatArray, noise: FloatArray) -> tuple[FloatArray, FloatArray]:
        """What `forward` does after the head, for one observation; see `inference.HeadedPolicy`."""
        low, high = self._log_std_range
        means, raws = outputs[: len(noise)].tolist(), outputs[len(noise) :].tolist()
        values = [
            math.tanh(mean + math.exp(low + 0.5 * (high - low) * (math.tanh(raw) + 1)) * z)
            for mean, raw, z in zip(means, raws, noise.tolist(), strict=True)
        ]
        return np.array(values, np.float32), noise[:0]

    def _start_with(self, std: float) -> None:
        """Zero the last layer, and set its bias so that every action starts as `tanh(N(0, std))`."""
        last, (low, high) = self.head[-1], self._log_std_range
        assert isinstance(last, nn.Linear)
        place = 2 * (math.log(std) - low) / (high - low) - 1
        if not -1 < place < 1:
            raise SettingsError(
                f"agent.initial_std = {std:g} lies outside the standard deviations the policy can have",
                f"choose one between {math.exp(low):.3g} and {math.exp(high):.3g}, or 0",
            )
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias[last.bias.numel() // 2 :] = math.atanh(place)


class SacLearner:
    """Networks, targets, optimisers and the update; implements `agent.Learner`."""

    def __init__(self, spec: TaskSpec, settings: SacSettings, *, seed: int, device: torch.device) -> None:
        self.updates = 0
        self._settings = settings
        self._device = device
        self._target_entropy = settings.entropy_per_action * spec.action_dim
        self._generator = torch.Generator(device)
        self._generator.manual_seed(torch_seed(seed, "agent.noise"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed, "agent.weights"))
            self._policy = SacPolicy(spec, settings)
            inputs = self._policy.feature_dim + spec.action_dim
            self._critic = ensemble(settings.critics, inputs, settings.hidden, layer_norm=settings.layer_norm)
        self._policy.to(device)
        self._critic.to(device)
        self._target_critic = copy.deepcopy(self._critic).requires_grad_(False)
        self._target_encoder = self._policy.encoder
        if settings.target_encoder:
            self._target_encoder = copy.deepcopy(self._policy.encoder).requires_grad_(False)
        self._log_alpha = torch.tensor(math.log(settings.initial_alpha), device=device, requires_grad=True)
        self._critic_params = [*self._policy.encoder.parameters(), *self._critic.parameters()]
        self._actor_params = [*self._policy.head.parameters()]
        adam = torch.optim.Adam
        self._optimizers: dict[str, torch.optim.Optimizer] = {
            "critic": adam(self._critic_params, lr=settings.critic_lr, fused=True),
            "actor": adam(self._actor_params, lr=settings.actor_lr, fused=True),
            "alpha": adam([self._log_alpha], lr=settings.alpha_lr, betas=(settings.alpha_beta1, 0.999), fused=True),
        }
        self._newest: dict[str, Tensor] = {}
        self._kept_pixels = torch.empty(0)
        self._window_hw = _window(spec, settings).out_hw

    def update(self, batch: Batch) -> None:
        """One update: critics and encoder, then actor and entropy coefficient, then targets."""
        settings = self._settings
        self.updates += 1
        target = self.critic_target(batch)
        images, proprio, actions = self._pixels(batch.images, batch), *map(self._tensor, (batch.proprio, batch.actions))
        if self._device.type == "cuda":
            batch.fence.raise_until(torch.cuda.current_stream(self._device).record_event())
        with self._autocast():
            features = self._policy.features(images, proprio)
            values = self._critic(features, actions)  # (N, B)
        critic_loss = (values - target).square().sum(0).mean()
        self._step("critic", critic_loss, self._critic_params)
        self._newest |= {"critic_loss": critic_loss.detach(), "q_mean": values.detach().mean()}
        if self.updates % settings.actor_every == 0:
            self._update_actor(features.detach())
        if self.updates % settings.target_every == 0:
            self._update_targets()

    @torch.no_grad()
    def critic_target(self, batch: Batch) -> Tensor:
        """`R + d * (min Q'(s', a') - alpha log pi(a'|s'))`, `(B,)`; the entropy term only with `backup_entropy`."""
        images, proprio = self._pixels(batch.next_images, batch), self._tensor(batch.next_proprio)
        rewards = self._tensor(batch.rewards)
        discounts = self._tensor(batch.discounts)
        with self._autocast():
            features = self._policy.features(images, proprio)
            actions, log_prob = self._sample(features)
            if self._settings.target_encoder:
                features = torch.cat([self._target_encoder(images), proprio], -1)
            value = self._target_critic(features, actions).amin(0)
        if self._settings.backup_entropy:
            value = value - self._log_alpha.exp() * log_prob
        target: Tensor = rewards + discounts * value
        return target

    def _sample(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Actions `(B, A)` and their log-probabilities `(B,)`, differentiable."""
        mean, log_std = self._policy.distribution(features)
        noise = torch.randn(mean.shape, generator=self._generator, device=self._device)
        u = mean + log_std.exp() * noise
        return torch.tanh(u), tanh_log_prob(u, mean, log_std)

    def _update_actor(self, features: Tensor) -> None:
        alpha = self._log_alpha.detach().exp()
        with self._autocast():
            actions, log_prob = self._sample(features)
            value = self._critic(features, actions)
        value = value.amin(0) if self._settings.critics <= 2 else value.mean(0)
        actor_loss = (alpha * log_prob - value).mean()
        self._step("actor", actor_loss, self._actor_params)
        entropy = -log_prob.detach().mean()
        alpha_loss = self._log_alpha.exp() * (entropy - self._target_entropy)
        self._step("alpha", alpha_loss, [self._log_alpha])
        self._newest |= {"actor_loss": actor_loss.detach(), "alpha": alpha, "entropy": entropy}

    def _step(self, name: str, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        """One optimiser step; the gradient reaches `parameters` only, so the actor's leaves the critics alone."""
        optimizer = self._optimizers[name]
        optimizer.zero_grad()
        loss.backward(inputs=list(parameters))  # type: ignore[no-untyped-call]
        if self._settings.grad_clip > 0 and name != "alpha":
            nn.utils.clip_grad_norm_(parameters, self._settings.grad_clip)
        optimizer.step()

    @torch.no_grad()
    def _update_targets(self) -> None:
        pairs: list[tuple[nn.Module, nn.Module, float]] = [
            (self._target_critic, self._critic, self._settings.critic_tau)
        ]
        if self._settings.target_encoder:
            pairs.append((self._target_encoder, self._policy.encoder, self._settings.encoder_tau))
        for target, source, tau in pairs:
            torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)

    def _tensor(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _pixels(self, images: npt.NDArray[np.uint8], batch: Batch) -> Tensor:
        """Images on the device, their windows cut.

        On a CPU as float32 in memory kept for it, as fresh pages cost 2 ms for 7 MB; valid until the next call.
        """
        pixels = self._tensor(images)
        if batch.corners is not None:
            pixels = gather_windows(pixels, self._tensor(batch.corners), self._window_hw)
        if self._device.type != "cpu":
            return pixels
        if self._kept_pixels.shape != pixels.shape:
            self._kept_pixels = torch.empty(pixels.shape)
        return self._kept_pixels.copy_(pixels)

    def _autocast(self) -> torch.autocast:
        enabled = self._settings.autocast and self._device.type == "cuda"
        return torch.autocast(self._device.type, torch.bfloat16, enabled=enabled)

    def metrics(self) -> dict[str, float]:
        """critic_loss, q_mean, actor_loss, alpha, entropy of the newest update; empty before the first."""
        return {name: float(value) for name, value in self._newest.items()}

    def policy(self) -> SacPolicy:
        return self._policy

    def state(self) -> dict[str, Tensor]:
        """Copies on the CPU: networks, targets, log alpha, optimisers, noise generator, update count."""
        tensors = save_tensors(self._tensors(), self._optimizers)
        return tensors | {"generator": self._generator.get_state(), "updates": torch.tensor(self.updates)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        load_tensors(self._tensors(), self._optimizers, state)
        self._generator.set_state(state["generator"])
        self.updates = int(state["updates"])

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        modules = {"policy": self._policy, "critic": self._critic, "target_critic": self._target_critic}
        if self._settings.target_encoder:
            modules["target_encoder"] = self._target_encoder
        yield from module_tensors(modules)
        yield "log_alpha", self._log_alpha


def _window(spec: TaskSpec, settings: SacSettings) -> Window:
    if settings.augment == "shift":
        return shift_window(spec.image_hw, settings.shift_px)
    if settings.augment == "crop":
        return crop_window(spec.image_hw, settings.crop_fraction)
    return centre_window(spec.image_hw)


class SacAlgorithm:
    """SAC's entry in the registry: `relod.algos.sac:SAC`."""

    settings_type = SacSettings
    presets: Mapping[str, RawSettings] = {"sac": {"replay": {"capacity": 100_000}}, "sac-lite": LITE, "paper": PAPER}
    profiles = PROFILES

    def needs(self, spec: TaskSpec, settings: SacSettings) -> Needs:
        return Needs(
            memory=Minibatches(
                size=settings.batch_size,
                n_step=settings.n_step,
                gamma=settings.gamma,
                update_after=min(settings.update_after, settings.init_steps),
                max_updates_per_step=settings.max_updates_per_step,
            ),
            window=_window(spec, settings),
            init_steps=settings.init_steps,
            init_hold=settings.init_hold,
            noise_cycles=settings.noise_cycles,
        )

    def build_actor(self, spec: TaskSpec, settings: SacSettings) -> SacPolicy:
        return SacPolicy(spec, settings)

    def build_learner(self, spec: TaskSpec, settings: SacSettings, *, seed: int, device: torch.device) -> SacLearner:
        return SacLearner(spec, settings, seed=seed, device=device)


SAC = SacAlgorithm()
