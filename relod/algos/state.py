"""A learner's tensors as a checkpoint keeps them: networks by name, Adam's moments beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..errors import SettingsError
from ..seeds import random_stream

__all__ = ["load_tensors", "module_tensors", "save_tensors", "torch_seed"]

Optimizers = Mapping[str, torch.optim.Optimizer]


def module_tensors(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers as `(module.tensor, tensor)`."""
    for name, module in modules.items():
        for key, tensor in module.state_dict().items():
            yield f"{name}.{key}", tensor


def save_tensors(own: Iterable[tuple[str, Tensor]], optimizers: Optimizers) -> dict[str, Tensor]:
    """Copies on the CPU of a learner's own tensors and of its optimisers' moments."""
    tensors = {name: tensor.detach() for name, tensor in own}
    for name, optimizer in optimizers.items():
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{name}.{index}.{key}": value for key, value in moments.items()}
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def load_tensors(own: Iterable[tuple[str, Tensor]], optimizers: Optimizers, state: Mapping[str, Tensor]) -> None:
    """Copy a state's tensors into a learner's own. `SettingsError`: one is missing, or has another shape."""
    named = dict(own)
    wrong = [name for name, tensor in named.items() if name not in state or state[name].shape != tensor.shape]
    if wrong:
        hint = "use the task and agent settings of its run"
        raise SettingsError(f"the checkpoint belongs to another network: {wrong[0]} does not fit", hint)
    with torch.no_grad():
        for name, tensor in named.items():
            tensor.copy_(state[name])
    for name, optimizer in optimizers.items():
        _load_moments(optimizer, f"optimizer.{name}.", state)


def torch_seed(seed: int, name: str) -> int:
    """Seed of torch's generator for the random stream of that name."""
    return int(random_stream(seed, name).integers(2**63))


def _load_moments(optimizer: torch.optim.Optimizer, prefix: str, state: Mapping[str, Tensor]) -> None:
    """Load Adam's moments, laid out in memory as their parameters are: the fused step takes that for granted."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            index, key = name.removeprefix(prefix).split(".")
            like = parameters[int(index)] if key != "step" else tensor
            moments.setdefault(int(index), {})[key] = torch.empty_like(like).copy_(tensor).detach()
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
