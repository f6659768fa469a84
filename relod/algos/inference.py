"""One observation through a policy at a time, faster than the modules it is made of.

A batch of one is little arithmetic, so what surrounds it counts: the paper's first layer is 23 of 50 MFLOP, and a
general convolution spends most of its time there on bringing pixels and weights into a form of its own. Here a 3x3
convolution is a handful of matrix products on the image as it lies. Nothing is unfolded, and every buffer and view is
made beforehand. It is measured, with what was tried and left out, in benchmarks/README.md.

This is for acting. Learning has batches and gradients; it uses the modules, which stay the definition: results agree
to float32's rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from ..types import FloatArray, Image
from .nets import CENTRE, KERNEL, Blind, Encoder, feature_size

__all__ = ["HeadedPolicy", "Plan", "Plans", "make_plan"]

# Of a vector or of every element for itself: what may stand between linear layers.
BETWEEN = (nn.ReLU, nn.LayerNorm, nn.Tanh, nn.ELU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Identity)
# In which the first layer goes through the image. Right after other work, with its buffers out of the cache, the
# preset `paper` takes 1.06, 0.96, 0.97, 0.98, 1.03 ms with 1, 2, 3, 4, 6 (p10 of 400, in turns, on a busy machine).
STRIPS = 2


@runtime_checkable
class HeadedPolicy(Protocol):
    """A policy network whose `forward` does with `head(cat([encoder(images), proprio], -1))` what `decide` does.

    Having these three says so, and lets robots run it by a plan. The encoder is one of `nets.make_encoder`, the head
    an `nn.Sequential` as `nets.mlp` makes them.
    """

    encoder: Encoder | Blind
    head: nn.Sequential

    def decide(self, outputs: FloatArray, noise: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Action `(A,)` and extras `(E,)`, both float32 and new, from the head's outputs `(O,)` and noise `(A,)`.

        In numpy or plain Python: for a handful of values torch's operations took 0.08 ms, numpy's 0.03.
        """
        ...


def make_plan(module: nn.Module, image_hw: tuple[int, int]) -> Plan | None:
    """A plan for policies built as `module` is, or None for networks that plans do not cover.

    Only what a network is made of decides, never a measurement: the same settings always act by the same arithmetic.
    """
    if not isinstance(module, HeadedPolicy) or type(module.encoder) not in (Encoder, Blind):
        return None
    if type(module.head) is not nn.Sequential or not all(map(_is_covered, module.head)):
        return None
    if not any(isinstance(layer, nn.Linear) for layer in module.head):
        return None
    parameters = list(module.parameters())
    if not all(p.dtype == torch.float32 and p.device.type == "cpu" for p in parameters):
        return None
    with torch.inference_mode():  # its buffers are tensors of that mode, too: less to do for every operation
        return Plan(module, image_hw)


def _is_covered(layer: nn.Module) -> bool:
    return type(layer) in BETWEEN or (type(layer) is nn.Linear and layer.bias is not None)


class Plans:
    """One plan for the policies of a source, as they come. For one thread; its actors may share it."""

    def __init__(self, image_hw: tuple[int, int]) -> None:
        self._image_hw = image_hw
        self._plan: Plan | None = None
        self._loaded: tuple[nn.Module, tuple[int, int]] | None = None

    def follow(self, module: nn.Module, version: tuple[int, int]) -> Plan | None:
        """The plan with the weights of `module`, or None if it must be called itself.

        They are taken anew when the module or its version is another than before. All modules are of one architecture.
        """
        if self._loaded is None:
            self._plan = make_plan(module, self._image_hw)
        elif self._loaded[0] is module and self._loaded[1] == version:
            return self._plan
        elif self._plan is not None:
            self._plan.load(cast(HeadedPolicy, module))
        self._loaded = module, version
        return self._plan


class Plan:
    """Buffers and the sequence of products for one architecture; `load` a network, then call it.

    For one thread at a time. What a call returns belongs to the caller.
    """

    def __init__(self, module: HeadedPolicy, image_hw: tuple[int, int]) -> None:
        encoder = module.encoder
        first = next(layer for layer in module.head if isinstance(layer, nn.Linear))
        self._input = torch.zeros(first.in_features)  # features, then proprioception
        features, self._proprio = self._input[: encoder.out_dim], self._input[encoder.out_dim :].numpy()
        self._eyes = _Eyes(encoder, image_hw, features) if isinstance(encoder, Encoder) else None
        self._outputs = [torch.zeros(layer.out_features) for layer in module.head if isinstance(layer, nn.Linear)]
        self.load(module)

    @torch.inference_mode()
    def load(self, module: HeadedPolicy) -> None:
        """Act by `module` from now on, which must be built as the first one was and must not change while it acts.

        The convolutions' weights are copied in another order, 0.13 ms with the preset `paper`; the head's are referred
        to.
        """
        self._decide = module.decide
        if self._eyes is not None:
            assert isinstance(module.encoder, Encoder)
            self._eyes.load(module.encoder)
        outputs = iter(self._outputs)
        self._head = [_step(layer, outputs) for layer in module.head]

    def __call__(
        self, images: Sequence[Image], proprio: FloatArray, noise: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Action `(A,)` and extras `(E,)` from k windows `(h, w, 3) uint8`, oldest first, `(P,)` and `(A,) float32`."""
        with torch.inference_mode():  # as a decorator it takes 0.02 ms more
            if self._eyes is not None:
                self._eyes.see(images)
            self._proprio[:] = proprio
            x = self._input
            for step in self._head:
                x = step(x)
        return self._decide(x.numpy(), noise)


def _step(layer: nn.Module, outputs: Iterator[Tensor]) -> Callable[[Tensor], Tensor]:
    """One layer of the head as a function of vectors."""
    if type(layer) is nn.ReLU:
        return torch.relu_  # of an output above, which nobody else reads
    if not isinstance(layer, nn.Linear):
        return layer
    bias, weight, output = layer.bias, layer.weight, next(outputs)
    return lambda x: torch.addmv(bias, weight, x, out=output)


class _Eyes:
    """An `Encoder` for one stack of frames.

    Biases are added nowhere: `relu(x + b) = max(x, -b) + b`, and what a `b` adds to the next layer's sums is the same
    everywhere, so it goes into that one's bias. One pass rectifies and lays out what the next layer reads.
    """

    def __init__(self, encoder: Encoder, image_hw: tuple[int, int], features: Tensor) -> None:
        """`features` `(out_dim,)` is where they are written to."""
        sizes = [image_hw, *(feature_size(image_hw, encoder.strides[:n]) for n in range(1, len(encoder.strides) + 1))]
        frames, width, stride = encoder.first.in_channels // 3, image_hw[1], encoder.strides[0]
        # The first layer, whose input and output are the largest, goes through the image in strips of one height and
        # fills the same buffers anew with each: half as much memory to fetch. The last strip may repeat some rows.
        out_rows = sizes[1][0]
        rows = -(-out_rows // (STRIPS if len(sizes) > 2 else 1))
        first = _Convolution(encoder.first, (stride * (rows - 1) + KERNEL, width), frames)
        self._layers = [first]
        for layer, size_hw in zip(encoder.rest, sizes[1:-1], strict=True):
            assert isinstance(layer, nn.Conv2d)
            self._layers.append(_Convolution(layer, size_hw, 1))
        self._strips = []
        for start in dict.fromkeys(min(row, out_rows - rows) for row in range(0, out_rows, rows)):
            hand_on = self._hand_on(0, start) if len(sizes) > 2 else []
            self._strips.append((slice(stride * start, stride * start + first.image_hw[0]), hand_on))
        self._further = [
            (layer, self._hand_on(number, 0) if number < len(self._layers) - 1 else [])
            for number, layer in enumerate(self._layers[1:], 1)
        ]
        self._pixels = [[rows.numpy() for rows in frame] for frame in first.input]
        last = self._layers[-1]
        self._last_sums, self._maps = last.maps, torch.zeros(*last.out_hw, last.channels)
        self._by_place = self._maps.view(-1, last.channels)
        self._last_bias = torch.zeros(last.channels)
        self._grid, self._presence, self._centred = encoder.grid, encoder.presence, encoder.centred
        size = 2 * last.channels
        self._where, self._present = features[:size].view(-1, 2).T, features[size:]

    def _hand_on(self, number: int, start: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Sums, negative biases and where their maximum goes, for a layer that filled the rows from `start` on."""
        layer, (groups,) = self._layers[number], self._layers[number + 1].input
        found = []
        for remainder, target in enumerate(groups):
            first = (remainder - start) % len(groups)
            sums = layer.maps[first :: len(groups)]
            at = (start + first) // len(groups)
            found.append((sums, layer.negative_bias, target[at : at + len(sums)]))
        return found

    def load(self, encoder: Encoder) -> None:
        added = torch.zeros(0)
        for index, (mine, theirs) in enumerate(zip(self._layers, [encoder.first, *encoder.rest], strict=True)):
            weight, bias = theirs.weight, theirs.bias
            if index == 0:
                bias = bias - CENTRE * weight.sum((1, 2, 3)) if self._centred else bias
                weight = weight * (1 / 255)
            else:
                bias = bias + weight.sum((2, 3)) @ added
            mine.load(weight, bias)
            added = bias
        self._last_bias.copy_(added)

    def see(self, images: Sequence[Image]) -> None:
        """Write the features of `images`."""
        for rows, hand_on in self._strips:
            for image, groups in zip(images, self._pixels, strict=True):
                strip = image[rows]
                for remainder, target in enumerate(groups):
                    np.copyto(target, strip[remainder :: len(groups)])
            self._layers[0].run()
            for sums, negative_bias, target in hand_on:
                torch.maximum(sums, negative_bias, out=target)
        for layer, hand_on in self._further:
            layer.run()
            for sums, negative_bias, target in hand_on:
                torch.maximum(sums, negative_bias, out=target)
        torch.add(self._last_sums, self._last_bias, out=self._maps)
        torch.mm(self._grid, torch.softmax(self._by_place, 0), out=self._where)
        if self._presence:
            torch.tanh(self._by_place.amax(0).div_(4), out=self._present)


class _Convolution:
    """A 3x3 convolution of stride s as matrix products, over N channels of the sum and C of each of the frames.

    A window's row, 3 pixels by C channels, lies in memory as it is needed; only its neighbours overlap it. Of every
    p-th window none overlap if `p * s >= 3`: those are rows of a matrix, `p * s * C` apart, and BLAS takes them where
    they lie. This goes on over the ends of image rows, if these are a whole number of such steps wide and those that
    are s apart in the image lie one after the other. So image rows are kept in s groups, and the convolution is p
    results times 3 kernel rows times the frames of products `(places / p, 3C) @ (3C, N)`, p * N apart in the output.
    """

    def __init__(self, layer: nn.Conv2d, image_hw: tuple[int, int], frames: int) -> None:
        height, width = self.image_hw = image_hw
        stride = layer.stride[0]
        self.channels = layer.out_channels
        self.out_hw = feature_size(image_hw, [stride])
        depth = layer.in_channels // frames
        phases = -(-KERNEL // stride)
        steps = -(-width // (phases * stride))  # of a row
        pitch = phases * stride * depth
        rows = -(-height // stride) + 1  # one more: windows over a row's end are summed too, and nobody reads that
        kept = torch.zeros(frames, stride, rows, steps * pitch)
        pixels = kept.view(frames, stride, rows, -1, depth)[..., :width, :]
        # (frames, stride) of (rows, width, C)
        self.input = [[group[: -(-(height - y) // stride)] for y, group in enumerate(frame)] for frame in pixels]

        self._weight = torch.zeros(frames, KERNEL, KERNEL * depth, self.channels)
        self.negative_bias = torch.zeros(self.channels)
        self._sums = torch.zeros(self.out_hw[0], steps * phases, self.channels)
        places = self.out_hw[0] * steps
        sums = self._sums.view(places, phases * self.channels)
        self._first: list[tuple[Tensor, Tensor, Tensor]] = []
        self._further: list[tuple[Tensor, Tensor, Tensor]] = []
        for phase in range(phases):
            target = sums[:, phase * self.channels : (phase + 1) * self.channels]
            for frame in range(frames):
                for y in range(KERNEL):
                    start = kept[frame, y % stride, y // stride].storage_offset() + phase * stride * depth
                    windows = kept.as_strided((places, KERNEL * depth), (pitch, 1), start)
                    terms = self._further if frame or y else self._first
                    terms.append((target, windows, self._weight[frame, y]))

    @property
    def maps(self) -> Tensor:
        """The sums `(height, width, N)`, without the bias."""
        return self._sums[:, : self.out_hw[1]]

    def load(self, weight: Tensor, bias: Tensor) -> None:
        """Weights `(N, frames * C, 3, 3)` and biases `(N,)`."""
        frames = len(self._weight)
        by_frame = weight.view(self.channels, frames, -1, KERNEL, KERNEL)  # (N, frame, C, y, x)
        shape = (frames, KERNEL, KERNEL, -1, self.channels)
        self._weight.view(shape).copy_(by_frame.permute(1, 3, 4, 2, 0))
        torch.neg(bias, out=self.negative_bias)

    def run(self) -> None:
        """Fill the sums from the input."""
        for target, windows, weight in self._first:
            torch.mm(windows, weight, out=target)
        for target, windows, weight in self._further:
            target.addmm_(windows, weight)
