"""SAC with the paper's networks, written the straightforward way: what `relod bench update` compares with.

Pictures are channels-first bytes, cut sample by sample for every use; each of the five uses runs the encoder again;
the critics are two separate networks; statistics are read after every update. The mathematics is relod's, but for one
thing: the actor's features are computed after the critics' step and not before.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..algos.nets import coordinate_grid, squashed_log_std, tanh_log_prob
from ..algos.sac import SacSettings

__all__ = ["USES", "StraightforwardSac"]

USES = ("next actor", "next critics", "critics", "actor", "actor's critics")


class PlainEncoder(nn.Module):
    """Convolutions over `(B, C, h, w)` and a spatial softmax."""

    def __init__(self, channels: int, settings: SacSettings, feature_hw: tuple[int, int]) -> None:
        super().__init__()
        inputs = [channels] + [settings.conv_channels] * (len(settings.conv_strides) - 1)
        strides = settings.conv_strides
        self.convs = nn.ModuleList(
            nn.Conv2d(count, settings.conv_channels, 3, stride) for count, stride in zip(inputs, strides, strict=True)
        )
        self.grid: Tensor
        self.register_buffer("grid", coordinate_grid(feature_hw))

    def forward(self, images: Tensor) -> Tensor:
        x = images.float() / 255
        for index, conv in enumerate(self.convs):
            x = conv(x if index == 0 else functional.relu(x))
        weights = functional.softmax(x.flatten(2), -1)  # (B, C, h*w)
        return torch.stack([(weights * axis).sum(-1) for axis in self.grid], -1).flatten(1)


def plain_mlp(inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Linear layers with ReLU between."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class StraightforwardSac:
    """Networks, optimisers and the update; starts with the weights of a `SacLearner`'s state, on its device."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        settings: SacSettings,
        *,
        feature_hw: tuple[int, int],
        out_hw: tuple[int, int],
        device: torch.device,
    ) -> None:
        self._settings = settings
        self._out_hw = out_hw
        first = state["policy.encoder.first.weight"]
        features = state["policy.head.0.weight"].shape[1]
        self._action_dim = state["critic.layers.0.weight"].shape[1] - features
        self.encoder = PlainEncoder(first.shape[1], settings, feature_hw).to(device)
        self.actor = plain_mlp(features, settings.hidden, 2 * self._action_dim).to(device)
        critics = [plain_mlp(features + self._action_dim, settings.hidden, 1) for _ in range(2)]
        self.critics = nn.ModuleList(critics).to(device)
        self.target_encoder, self.target_critics = copy.deepcopy(self.encoder), copy.deepcopy(self.critics)
        self.log_alpha = state["log_alpha"].to(device, copy=True).requires_grad_()
        self._load(state)
        self._critic_adam = torch.optim.Adam(
            [*self.encoder.parameters(), *self.critics.parameters()], lr=settings.critic_lr
        )
        self._actor_adam = torch.optim.Adam(self.actor.parameters(), lr=settings.actor_lr)
        betas = (settings.alpha_beta1, 0.999)
        self._alpha_adam = torch.optim.Adam([self.log_alpha], lr=settings.alpha_lr, betas=betas)
        self.generator = torch.Generator(device)
        self.generator.set_state(state["generator"])

    @torch.no_grad()
    def _load(self, state: Mapping[str, Tensor]) -> None:
        for name, encoder in (("policy.encoder", self.encoder), ("target_encoder", self.target_encoder)):
            keys = ["first", *(f"rest.{index}" for index in range(len(encoder.convs) - 1))]
            for key, conv in zip(keys, encoder.convs, strict=True):
                conv.load_state_dict({part: state[f"{name}.{key}.{part}"] for part in ("weight", "bias")})
        self.actor.load_state_dict({key: state[f"policy.head.{key}"] for key in self.actor.state_dict()})
        for name, critics in (("critic", self.critics), ("target_critic", self.target_critics)):
            for member, critic in enumerate(critics):
                for key, value in critic.state_dict().items():
                    source = state[f"{name}.layers.{key}"][member]
                    value.copy_(source.T if value.dim() == 2 else source[0])

    def update(self, batch: Mapping[str, Tensor], corners: Mapping[str, Tensor]) -> dict[str, float]:
        """One update from whole pictures `(B, 3k, H, W) uint8`, with a corner per sample for each of `USES`."""
        settings = self._settings
        with torch.no_grad():
            actions, log_prob = self._act(self._see("next actor", batch, corners, self.encoder))
            features = self._see("next critics", batch, corners, self.target_encoder)
            value = self._least(self.target_critics, features, actions) - self.log_alpha.exp() * log_prob
            target = batch["rewards"] + batch["discounts"] * value
        inputs = torch.cat([self._see("critics", batch, corners, self.encoder), batch["actions"]], -1)
        first, second = (functional.mse_loss(critic(inputs).squeeze(-1), target) for critic in self.critics)
        critic_loss = first + second
        self._step(self._critic_adam, critic_loss)

        actions, log_prob = self._act(self._see("actor", batch, corners, self.encoder).detach())
        features = self._see("actor's critics", batch, corners, self.encoder).detach()
        alpha = self.log_alpha.exp()
        actor_loss = (alpha.detach() * log_prob - self._least(self.critics, features, actions)).mean()
        self._step(self._actor_adam, actor_loss)
        target_entropy = settings.entropy_per_action * self._action_dim
        alpha_loss = (alpha * (-log_prob - target_entropy).detach()).mean()
        self._step(self._alpha_adam, alpha_loss)
        self._follow(self.target_critics, self.critics, settings.critic_tau)
        self._follow(self.target_encoder, self.encoder, settings.encoder_tau)
        losses = {"critic_loss": critic_loss, "actor_loss": actor_loss, "alpha_loss": alpha_loss}
        return {name: loss.item() for name, loss in losses.items()}

    def _see(
        self, use: str, batch: Mapping[str, Tensor], corners: Mapping[str, Tensor], encoder: PlainEncoder
    ) -> Tensor:
        prefix = "next_" if use.startswith("next") else ""
        images, (height, width) = batch[f"{prefix}images"], self._out_hw
        cut = images.new_empty((*images.shape[:2], height, width))
        for index, (y, x) in enumerate(corners[use].tolist()):
            cut[index] = images[index, :, y : y + height, x : x + width]
        return torch.cat([encoder(cut), batch[f"{prefix}proprio"]], -1)

    def _act(self, features: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = self.actor(features).chunk(2, -1)
        log_std = squashed_log_std(raw, self._settings.log_std_min, self._settings.log_std_max)
        u = mean + log_std.exp() * torch.randn(mean.shape, generator=self.generator, device=mean.device)
        return torch.tanh(u), tanh_log_prob(u, mean, log_std)

    @staticmethod
    def _least(critics: nn.ModuleList, features: Tensor, actions: Tensor) -> Tensor:
        inputs = torch.cat([features, actions], -1)
        found: Tensor = torch.min(*(critic(inputs).squeeze(-1) for critic in critics))
        return found

    @staticmethod
    def _step(adam: torch.optim.Adam, loss: Tensor) -> None:
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()

    @staticmethod
    @torch.no_grad()
    def _follow(target: nn.Module, source: nn.Module, tau: float) -> None:
        for slow, fast in zip(target.parameters(), source.parameters(), strict=True):
            slow.copy_(tau * fast + (1 - tau) * slow)
