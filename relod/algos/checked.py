"""An algorithm of another package behind the same interface: every call is named, and what comes back is looked at.

Relod's own algorithms are not wrapped: their tests hold them to the interface.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import Section
from ..errors import PackageError, RelodError, SettingsError
from ..loading import load_attribute
from ..packages import calling, check_methods, full_name, ours, shown
from ..types import RawSettings, TaskSpec
from .agent import POLICY_PREFIX, Algorithm, Learner, Minibatches, Needs, check_answer
from .batch import Batch

__all__ = [
    "CheckedAlgorithm",
    "CheckedLearner",
    "find_algorithm",
    "policy_layout",
    "rehearse_learner",
    "rehearse_policy",
]

HINT = "docs/algos/write-your-own.md says what an algorithm offers"
SECTIONS_HINT = "a preset is a tree of settings, for example {'agent': {...}, 'replay': {...}}"
METHODS = {"needs": (2, ()), "build_actor": (2, ()), "build_learner": (2, ("seed", "device"))}
LEARNER_METHODS = {"update": (1, ()), "metrics": (0, ()), "policy": (0, ()), "state": (0, ()), "load_state": (1, ())}
REHEARSED_UPDATES = 2


def find_algorithm(name: str, what: str = "the algorithm") -> Algorithm[Any]:
    """Import the algorithm called "module:attribute"; `SettingsError` when there is none, or it is none."""
    found = load_attribute(name, what)
    return found if ours(found) else CheckedAlgorithm(found, f"{what} ({name})")


class CheckedAlgorithm:
    """See `agent.Algorithm`. `SettingsError` for whatever shows before anything runs."""

    def __init__(self, found: Any, what: str) -> None:
        if isinstance(found, type):
            raise SettingsError(f"{what} is the class {full_name(found)}, not an object of it", HINT)
        for name in ("settings_type", "presets", "profiles"):
            if not hasattr(found, name):
                raise SettingsError(f"{what}: {full_name(found)} has no attribute {name!r}", HINT)
        check_methods(found, METHODS, SettingsError, HINT)
        self._found = found
        self.settings_type: type[Section] = _settings_type(found, what)
        self.presets = _trees(found, "presets", what)
        self.profiles = _trees(found, "profiles", what)
        if not self.presets:
            raise SettingsError(f"{what}: {full_name(found, 'presets')} is empty", "there must be at least one preset")

    def needs(self, spec: TaskSpec, settings: Any) -> Needs:
        who = full_name(self._found, "needs")
        with calling(who, SettingsError):
            needs = self._found.needs(spec, settings)
        if not isinstance(needs, Needs):
            raise SettingsError(f"{who} returned {shown(needs)}, not relod.algos.agent.Needs", HINT)
        return needs

    def build_actor(self, spec: TaskSpec, settings: Any) -> nn.Module:
        who = full_name(self._found, "build_actor")
        with calling(who, SettingsError):
            policy = self._found.build_actor(spec, settings)
        return _policy(policy, who, SettingsError)

    def build_learner(self, spec: TaskSpec, settings: Any, *, seed: int, device: torch.device) -> Learner:
        with calling(full_name(self._found, "build_learner"), SettingsError):
            learner = self._found.build_learner(spec, settings, seed=seed, device=device)
        check_methods(learner, LEARNER_METHODS, SettingsError, HINT)
        return CheckedLearner(learner)


class CheckedLearner:
    """See `agent.Learner`. Values that are not finite pass: what becomes of them is not decided here."""

    def __init__(self, found: Learner) -> None:
        self._found = found

    def update(self, batch: Any) -> None:
        with calling(self._name("update")):
            self._found.update(batch)

    def metrics(self) -> dict[str, float]:
        who = self._name("metrics")
        with calling(who):
            figures = self._found.metrics()
        if not isinstance(figures, Mapping) or not all(isinstance(name, str) for name in figures):
            raise PackageError(f"{who} returned {shown(figures)}, not a dict of names and numbers", HINT)
        found = {}
        for name, value in figures.items():
            try:
                found[name] = float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise PackageError(f"{who} says that {name!r} is {shown(value)}, which is no number", HINT) from error
        return found

    def policy(self) -> nn.Module:
        who = self._name("policy")
        with calling(who):
            policy = self._found.policy()
        return _policy(policy, who, PackageError)

    def state(self) -> dict[str, Tensor]:
        """Tensors on the CPU, each with memory of its own, as a file needs them."""
        who = self._name("state")
        with calling(who):
            state = self._found.state()
        if not isinstance(state, Mapping):
            raise PackageError(f"{who} returned {shown(state)}, not a dict of names and tensors", HINT)
        for name, value in state.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise PackageError(f"{who} holds {shown(value)} as {name!r}, which is no tensor", HINT)
        for name, value in self.policy().state_dict().items():
            saved = state.get(POLICY_PREFIX + name)
            if saved is None or saved.shape != value.shape:
                told = "is missing" if saved is None else f"has the shape {tuple(saved.shape)}"
                raise PackageError(
                    f"{who}: {POLICY_PREFIX}{name}, a {tuple(value.shape)} tensor of the policy, {told}", HINT
                )
        places: set[int] = set()
        kept = {}
        for name, value in state.items():
            memory = value.untyped_storage().data_ptr()
            shared = memory in places or not value.is_contiguous() or value.device.type != "cpu"
            places.add(memory)
            kept[name] = value.detach().to("cpu", copy=True).contiguous().clone() if shared else value.detach()
        return kept

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        with calling(self._name("load_state"), SettingsError):
            self._found.load_state(state)

    def _name(self, method: str) -> str:
        return full_name(self._found, method)


def _settings_type(found: Any, what: str) -> type[Section]:
    kind: Any = found.settings_type
    name = full_name(found, "settings_type")
    if not (isinstance(kind, type) and issubclass(kind, Section)):
        raise SettingsError(f"{what}: {name} is {shown(kind)}, not a relod.config.Section", HINT)
    with calling(f"{what}: {name}, built without arguments,", SettingsError):
        kind()
    return kind


def _trees(found: Any, name: str, what: str) -> dict[str, RawSettings]:
    trees = getattr(found, name)
    wrong = not isinstance(trees, Mapping)
    wrong = wrong or not all(isinstance(key, str) and isinstance(tree, Mapping) for key, tree in trees.items())
    if wrong or not all(isinstance(part, Mapping) for tree in trees.values() for part in tree.values()):
        raise SettingsError(f"{what}: {full_name(found, name)} is {shown(trees)}", SECTIONS_HINT)
    return dict(trees)


def _policy(policy: Any, who: str, kind: type[RelodError]) -> nn.Module:
    if not isinstance(policy, nn.Module):
        raise kind(f"{who} returned {shown(policy)}, not a torch.nn.Module", HINT)
    return policy


# -- before anything moves ---------------------------------------------------------------------------------------------


def policy_layout(policy: nn.Module) -> str:
    """Digest of the names and shapes of a policy's parameters, in which its values travel."""
    layout = repr([(name, tuple(parameter.shape)) for name, parameter in policy.named_parameters()])
    return hashlib.blake2b(layout.encode(), digest_size=16).hexdigest()


def rehearse_policy(algorithm: Algorithm[Any], spec: TaskSpec, settings: Any) -> nn.Module:
    """A new policy that was asked once, about noise. `SettingsError`: its answer is not what an actor's must be."""
    rng = np.random.default_rng(0)
    with torch.random.fork_rng(_devices()):
        policy = algorithm.build_actor(spec, settings).eval()
        needs = algorithm.needs(spec, settings)
        who = full_name(policy, "forward")
        images = rng.integers(0, 256, (1, spec.frames, *needs.window.out_hw, 3)).astype(np.uint8)
        proprio = rng.uniform(-1, 1, (1, spec.proprio_dim)).astype(np.float32)
        noise = rng.standard_normal((1, spec.action_dim)).astype(np.float32)
        with calling(who, SettingsError), torch.inference_mode():
            answer = policy(*map(torch.from_numpy, (images, proprio, noise)))
        try:
            action, extras = check_answer(answer, spec.action_dim, needs.extras, who)
        except PackageError as error:
            raise SettingsError(error.message, error.hint) from error
    if not (np.isfinite(action).all() and np.isfinite(extras).all()):
        raise SettingsError(f"{who} returned values that are not finite for a random observation", HINT)
    return policy


def rehearse_learner(
    algorithm: Algorithm[Any], spec: TaskSpec, settings: Any, *, device: torch.device, whole_frames: bool
) -> None:
    """Try a learner of another package: updates from noise, its state, and what another learner makes of that.

    Costs two updates at start-up; an algorithm that learns from rollouts is spared them, for one may take minutes.

    Args:
        whole_frames: batches hold those, and the corners of the windows in them.

    Raises:
        SettingsError: it cannot learn here, or could not be resumed.
    """
    if not isinstance(algorithm, CheckedAlgorithm):
        return
    with torch.random.fork_rng(_devices()):
        try:
            _rehearse(algorithm, spec, settings, device, whole_frames)
        except PackageError as error:
            raise SettingsError(f"tried before anything moves: {error.message}", error.hint) from error


def _rehearse(
    algorithm: CheckedAlgorithm, spec: TaskSpec, settings: Any, device: torch.device, whole_frames: bool
) -> None:
    learner, heir = (algorithm.build_learner(spec, settings, seed=seed, device=device) for seed in (0, 1))
    shipped = [(name, tuple(p.shape)) for name, p in algorithm.build_actor(spec, settings).named_parameters()]
    taught = [(name, tuple(p.shape)) for name, p in learner.policy().named_parameters()]
    if shipped != taught:
        one, other = next(
            ((a, b) for a, b in zip(shipped, taught, strict=False) if a != b), (len(shipped), len(taught))
        )
        raise PackageError(
            f"{full_name(algorithm._found)}: build_actor's policy has {one}, and the learner's {other}",
            "both must be the same network: its parameters travel in one row",
        )
    learner.metrics()
    needs = algorithm.needs(spec, settings)
    if isinstance(needs.memory, Minibatches):
        rng = np.random.default_rng(0)
        for _ in range(REHEARSED_UPDATES):
            learner.update(_noise_batch(spec, needs, needs.memory, rng, whole_frames))
        learner.metrics()
    state = {name: tensor.clone() for name, tensor in learner.state().items()}
    heir.load_state(state)
    later = heir.state()
    for name in sorted({*state, *later}):
        if name not in state or name not in later or not _same(state[name], later[name]):
            raise PackageError(
                f"{heir._name('load_state')} does not restore {name!r}: the run could not be resumed",  # type: ignore[attr-defined]
                "what state() holds, load_state() must take over",
            )


def _noise_batch(
    spec: TaskSpec, needs: Needs, memory: Minibatches, rng: np.random.Generator, whole_frames: bool
) -> Batch:
    count, window = memory.size, needs.window
    corners = window.offsets(rng, count) if whole_frames else None
    image_hw = window.in_hw if whole_frames else window.out_hw

    def images() -> Any:
        return rng.integers(0, 256, (count, spec.frames, *image_hw, 3), dtype=np.uint8)

    def floats(*shape: int) -> Any:
        return rng.uniform(-1, 1, (count, *shape)).astype(np.float32)

    return Batch(
        images=images(),
        next_images=images(),
        proprio=floats(spec.proprio_dim),
        next_proprio=floats(spec.proprio_dim),
        actions=floats(spec.action_dim),
        rewards=floats(),
        discounts=np.full(count, memory.gamma**memory.n_step, np.float32),
        corners=corners,
    )


def _same(first: Tensor, second: Tensor) -> bool:
    return (
        first.shape == second.shape
        and first.dtype == second.dtype
        and torch.equal(first.nan_to_num(), second.nan_to_num())
    )


def _devices() -> list[int]:
    """CUDA devices whose generators are kept."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
