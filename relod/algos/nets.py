"""The networks: encoder with spatial softmax, MLPs, critic ensemble, and the arithmetic of the tanh-Gaussian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "Blind",
    "Encoder",
    "Ensemble",
    "ensemble",
    "make_encoder",
    "mlp",
    "soft_argmax",
    "squashed_log_std",
    "tanh_log_prob",
]

KERNEL = 3
CENTRE = 0.5  # taken off pixels in [0, 1] to centre them

ConvInit = Literal["orthogonal", "delta_orthogonal"]


class Blind(nn.Module):
    """The encoder of a task without images, which has one pixel: no features, `(B, 0) float32`."""

    out_dim = 0

    def forward(self, images: Tensor) -> Tensor:
        return torch.zeros((len(images), 0), device=images.device)


def make_encoder(
    *,
    frames: int,
    image_hw: tuple[int, int],
    channels: int,
    strides: Sequence[int],
    centred: bool,
    init: ConvInit,
    presence: bool = False,
) -> Encoder | Blind:
    """An `Encoder`, or none for images of one pixel."""
    if image_hw == (1, 1):
        return Blind()
    return Encoder(
        frames=frames,
        image_hw=image_hw,
        channels=channels,
        strides=strides,
        centred=centred,
        init=init,
        presence=presence,
    )


class Encoder(nn.Module):
    """3x3 convolutions without padding, ReLU between them, none after the last, then a spatial softmax.

    `(B, k, h, w, 3) uint8` to `(B, 2 * channels) float32`: the expected (x, y) of every channel's feature, in
    [-1, 1], interleaved x0, y0, x1, y1 (Levine et al. 2016, section 4.2; temperature 1).

    Pixels enter as 0..255 and the first layer's weights are scaled instead: the same function, one pass over the
    images less, and exact in bfloat16.
    """

    def __init__(
        self,
        *,
        frames: int,
        image_hw: tuple[int, int],
        channels: int,
        strides: Sequence[int],
        centred: bool,
        init: ConvInit,
        presence: bool = False,
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.presence = presence
        self.centred = centred
        inputs = [3 * frames] + [channels] * (len(strides) - 1)
        layers = [nn.Conv2d(count, channels, KERNEL, stride) for count, stride in zip(inputs, strides, strict=True)]
        for layer in layers:
            _init_conv(layer, init)
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
        self.first = layers[0]
        self.rest = nn.ModuleList(layers[1:])
        self.feature_hw = feature_size(image_hw, strides)
        self.out_dim = (3 if presence else 2) * channels
        self.register_buffer("grid", coordinate_grid(self.feature_hw), persistent=False)
        self.grid: Tensor

    def forward(self, images: Tensor) -> Tensor:
        features = self._convolve(images)
        where = soft_argmax(features, self.grid)
        if not self.presence:
            return where
        return torch.cat([where, torch.tanh(features.float().amax((2, 3)) / 4)], -1)

    def _convolve(self, images: Tensor) -> Tensor:
        """All convolutions, `(B, C, h, w)`; ReLU in place, a pass less over the largest tensors."""
        weight, bias, stride = self.first.weight * (1 / 255), self.first.bias, self.first.stride[0]
        assert bias is not None
        if self.centred:
            bias = bias - CENTRE * self.first.weight.sum((1, 2, 3))
        convolve = channel_convolution if images.is_cuda else stack_convolution
        features = convolve(images, weight, bias, stride, rectify=len(self.rest) > 0)
        for index, layer in enumerate(self.rest):
            features = layer(features if index == 0 else functional.relu_(features))
        return features


def channel_convolution(images: Tensor, weight: Tensor, bias: Tensor, stride: int, *, rectify: bool) -> Tensor:
    """`conv2d` over frames `(B, k, h, w, 3)` stacked to 3k channels, channels last: cuDNN's favourite layout.

    Pixels are interleaved as bytes and made floats of the convolution's type at once; both hold 0..255 exactly.
    """
    batch, frames, height, width, _ = images.shape
    kind = images.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    stacked = images.permute(0, 2, 3, 1, 4).reshape(batch, height, width, 3 * frames).to(dtype)
    features = functional.conv2d(stacked.permute(0, 3, 1, 2), weight, bias, stride)
    return functional.relu_(features) if rectify else features


def stack_convolution(images: Tensor, weight: Tensor, bias: Tensor, stride: int, *, rectify: bool) -> Tensor:
    """The same as `channel_convolution`, with the frames read as they lie; weight `(C, 3k, 3, 3)`.

    A convolution over (k, y, x) with a kernel as deep as the stack is the same sum. oneDNN does it at conv2d's speed
    (B=64, 48x64, forward and backward on one core: 4.6 ms against 4.9 ms), and nobody interleaves channels first.
    """
    pixels, frames = images.to(torch.float32), images.shape[1]
    volume = weight.reshape(-1, frames, 3, KERNEL, KERNEL).transpose(1, 2)
    features = functional.conv3d(pixels.permute(0, 4, 1, 2, 3), volume, bias, (1, stride, stride))
    if rectify:  # before the squeeze: what is changed through a view autograd copies, twice the time backwards
        functional.relu_(features)
    return features.squeeze(2)


def soft_argmax(features: Tensor, grid: Tensor) -> Tensor:
    """Expected coordinates of each channel: features `(B, C, h, w)`, grid `(2, h*w)`; returns `(B, 2C) float32`."""
    batch, channels = features.shape[:2]
    by_place = features.float().permute(0, 2, 3, 1).reshape(batch, -1, channels)
    expected = torch.matmul(grid, by_place.softmax(1))  # (B, 2, C)
    return expected.transpose(1, 2).reshape(batch, 2 * channels)


def coordinate_grid(size_hw: tuple[int, int]) -> Tensor:
    """x and y of every place, from -1 to 1: `(2, h*w)`, x along the width."""
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in size_hw), indexing="ij")
    return torch.stack([x.reshape(-1), y.reshape(-1)])


def feature_size(image_hw: tuple[int, int], strides: Sequence[int]) -> tuple[int, int]:
    """Height and width after the convolutions; `ValueError` when the image is too small for them."""
    height, width = image_hw
    for stride in strides:
        height, width = (height - KERNEL) // stride + 1, (width - KERNEL) // stride + 1
        if min(height, width) < 1:
            raise ValueError(f"{image_hw[1]}x{image_hw[0]} pixels are too few for strides {tuple(strides)}")
    return height, width


def _init_conv(conv: nn.Conv2d, init: ConvInit) -> None:
    assert conv.bias is not None
    gain = nn.init.calculate_gain("relu")
    nn.init.zeros_(conv.bias)
    if init == "orthogonal":
        nn.init.orthogonal_(conv.weight, gain)
        return
    nn.init.zeros_(conv.weight)  # delta-orthogonal (Xiao et al. 2018): orthogonal at the kernel's centre, zero around
    with torch.no_grad():
        centre = torch.empty(conv.weight.shape[:2])
        conv.weight[:, :, KERNEL // 2, KERNEL // 2] = nn.init.orthogonal_(centre, gain)


def mlp(inputs: int, hidden: Sequence[int], outputs: int, *, layer_norm: bool) -> nn.Sequential:
    """Linear layers with ReLU, each hidden one with an optional LayerNorm; orthogonal weights, zero biases."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [_linear(inputs, width), *([nn.LayerNorm(width)] if layer_norm else []), nn.ReLU(inplace=True)]
        inputs = width
    return nn.Sequential(*layers, _linear(inputs, outputs))


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class EnsembleLinear(nn.Module):
    """N independent linear layers in one batched product: `(N, B, in)` to `(N, B, out)`."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        blocks = [nn.init.orthogonal_(torch.empty(outputs, inputs)).T for _ in range(members)]
        self.weight = nn.Parameter(torch.stack(blocks).contiguous())
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class EnsembleNorm(nn.Module):
    """N independent LayerNorms over the last axis of `(N, B, width)`."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, 1, width))
        self.bias = nn.Parameter(torch.zeros(members, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, functional.layer_norm(x, x.shape[-1:]), self.weight)


class Ensemble(nn.Module):
    """N critics with their own weights: features `(B, Z)` and actions `(B, A)` to values `(N, B) float32`."""

    def __init__(self, members: int, layers: nn.Sequential) -> None:
        super().__init__()
        self.members = members
        self.layers = layers

    def forward(self, features: Tensor, actions: Tensor) -> Tensor:
        x = torch.cat([features, actions], -1).expand(self.members, -1, -1)
        values: Tensor = self.layers(x)
        return values.squeeze(-1).float()


def ensemble(members: int, inputs: int, hidden: Sequence[int], *, layer_norm: bool) -> Ensemble:
    """Critics of the given hidden widths."""
    layers: list[nn.Module] = []
    for width in hidden:
        norm = [EnsembleNorm(members, width)] if layer_norm else []
        layers += [EnsembleLinear(members, inputs, width), *norm, nn.ReLU(inplace=True)]
        inputs = width
    return Ensemble(members, nn.Sequential(*layers, EnsembleLinear(members, inputs, 1)))


def squashed_log_std(raw: Tensor, low: float, high: float) -> Tensor:
    """Map a network's output to log standard deviations in (low, high) by a tanh."""
    return low + 0.5 * (high - low) * (torch.tanh(raw) + 1)


def tanh_log_prob(u: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of `tanh(u)`, `u ~ N(mean, exp(log_std))`, summed over the last axis.

    The Jacobian is `log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u))`, exact where `log(1 - a^2 + 1e-6)` is off by
    1.2 nats at u = 8. bfloat16 inputs are computed in float32.
    """
    u, mean, log_std = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (u, mean, log_std))
    noise = (u - mean) * torch.exp(-log_std)
    normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    jacobian = 2 * (math.log(2) - u - functional.softplus(-2 * u))
    return (normal - jacobian).sum(-1)
