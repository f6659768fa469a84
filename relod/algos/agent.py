"""What an algorithm offers to the runtime, and the actor that runs its policy.

An algorithm is an object named by a "module:attribute" text and imported only when chosen. It declares what it needs
(`Needs`), builds the network that is shipped to robots (a policy) and the learner that improves it. It never sees
processes, links or files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..config import Section
from ..errors import PackageError, SettingsError
from ..packages import calling, full_name, shown
from ..types import Action, FloatArray, Observation, RawSettings, TaskSpec
from .batch import Window
from .inference import Plans

__all__ = [
    "Algorithm",
    "FixedPolicy",
    "Learner",
    "Minibatches",
    "Needs",
    "PolicySource",
    "Precision",
    "Rollouts",
    "TorchActor",
    "bind_policy",
    "check_answer",
    "flatten_policy",
    "policy_from_state",
    "policy_size",
]

ACTION_BOUND = 1.0 + 1e-5  # with what rounding may add
MAX_NOT_FINITE = 25  # answers in a row: a second in which the robot stood
POLICY_PREFIX = "policy."  # of the policy's own tensors in a learner's state

Precision: TypeAlias = Literal["float16", "float32"]
SectionT_contra = TypeVar("SectionT_contra", bound=Section, contravariant=True)
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatches:
    """An algorithm that learns from minibatches of a replay, while the robot acts; `update` is given a `Batch`."""

    size: int
    n_step: int
    gamma: float  # discount per action cycle
    update_after: int  # environment steps before the first update
    max_updates_per_step: float  # cap on the update-to-data ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """An algorithm that learns from whole episodes of its newest policy, while no robot acts; `update` is given a
    `Rollout`. Policies are taken between episodes only."""

    steps: int  # at least, before an update
    earlier_steps: int = 0  # that an update is given besides, at most: the newest whole episodes of earlier policies


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What the runtime must know of an algorithm's settings."""

    memory: Minibatches | Rollouts
    window: Window  # augmentation of the images, and what the actor cuts out
    extras: int = 0  # values that the policy gives beside each action and wants back
    init_steps: int = 0  # environment steps of uniform random actions
    init_hold: int = 1  # cycles for which one of those actions is held
    noise_cycles: float = 0.0  # correlation time of the policy's noise; 0 = white
    precision: Precision = "float16"  # in which its policies travel over links

    @property
    def between_episodes(self) -> bool:
        """Whether policies may be taken between episodes only."""
        return isinstance(self.memory, Rollouts)

    @property
    def lookahead(self) -> int:
        """Steps ahead that an update looks at, at most."""
        return self.memory.n_step if isinstance(self.memory, Minibatches) else 1


class Learner(Protocol):
    """Owns networks and optimisers. Deterministic for a seed, a device, a thread count and the same batches."""

    def update(self, batch: Any) -> None:
        """One update, with the `Batch` or the `Rollout` that the algorithm's memory gives."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Losses and the like of the newest update, empty before the first; the one call that waits for the device."""
        ...

    def policy(self) -> nn.Module:
        """The policy as it stands; its parameters change with the next update."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on: networks, targets, optimisers, random state. The policy's are `policy.*`.

        A floating-point value that is not finite means that learning diverged.
        """
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`; `SettingsError` when it belongs to other settings."""
        ...


class Algorithm(Protocol[SectionT_contra]):
    """An algorithm's entry in the registry."""

    @property
    def settings_type(self) -> type[Section]:
        """Type of the `agent` section."""
        ...

    @property
    def presets(self) -> Mapping[str, RawSettings]:
        """Trees of settings by preset name, for example `{"agent": {...}, "replay": {...}}`."""
        ...

    @property
    def profiles(self) -> Mapping[str, RawSettings]:
        """Trees of settings for kinds of machine, merged after a preset."""
        ...

    def needs(self, spec: TaskSpec, settings: SectionT_contra) -> Needs:
        """What the runtime must provide."""
        ...

    def build_actor(self, spec: TaskSpec, settings: SectionT_contra) -> nn.Module:
        """The policy network.

        Called with images `(B, k, h, w, 3) uint8` of the window's size, proprioception `(B, P) float32` and standard
        normal noise `(B, A) float32` (zeros for the deterministic action); gives actions `(B, A)` in [-1, 1] and
        extras `(B, E)`. Actors run it faster if it is an `inference.HeadedPolicy`, too.
        """
        ...

    def build_learner(self, spec: TaskSpec, settings: SectionT_contra, *, seed: int, device: torch.device) -> Learner:
        """A learner with freshly initialised networks."""
        ...


def policy_size(policy: nn.Module) -> int:
    """Number of float32 values that make up a policy."""
    return sum(parameter.numel() for parameter in policy.parameters())


def flatten_policy(policy: nn.Module) -> FloatArray:
    """The policy's parameters in one float32 vector, in the order of `parameters()`."""
    values = torch.cat([parameter.detach().reshape(-1).float() for parameter in policy.parameters()])
    flat: FloatArray = values.cpu().numpy()
    return flat


def bind_policy(policy: ModuleT, flat: FloatArray) -> ModuleT:
    """Make the policy's parameters views of `flat`, so that new values there need no decoding; for acting only."""
    if flat.size != policy_size(policy):
        raise SettingsError(
            f"a policy of {flat.size} values does not fit a network of {policy_size(policy)}",
            "robot and learner must use the same task and agent settings",
        )
    values, start = torch.from_numpy(flat), 0
    for parameter in policy.parameters():
        parameter.requires_grad_(False)
        parameter.data = values[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    return policy.eval()


def policy_from_state(policy: ModuleT, state: Mapping[str, Tensor]) -> ModuleT:
    """Load the policy's tensors out of a learner's state, for example from a checkpoint."""
    own = {name.removeprefix(POLICY_PREFIX): t for name, t in state.items() if name.startswith(POLICY_PREFIX)}
    try:
        policy.load_state_dict(own)
    except RuntimeError as error:
        hint = "use the task and agent settings of its run"
        raise SettingsError(f"the checkpoint belongs to another network: {error}", hint) from error
    return policy.eval()


class PolicySource(Protocol):
    """Where an actor finds the policy of the moment."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def version(self) -> tuple[int, int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedPolicy:
    """A policy that never changes, for evaluation."""

    module: nn.Module
    version: tuple[int, int] = (1, 0)


def check_answer(answer: Any, actions: int, extras: int, who: str) -> tuple[FloatArray, FloatArray]:
    """A policy's answer to one observation: the action `(A,)` and the extras `(E,)`, float32.

    Raises:
        PackageError: it has another form, type or shape, or an action lies outside [-1, 1]. One that is not finite
            passes: the cycle makes the robot stand.
    """
    hint = f"it must return actions (B, {actions}) in [-1, 1] and extras (B, {extras}), both float32"
    if not (isinstance(answer, tuple | list) and len(answer) == 2):
        raise PackageError(f"{who} returned {shown(answer)}, not actions and extras", hint)
    for name, value, size in (("actions", answer[0], actions), ("extras", answer[1], extras)):
        if not isinstance(value, Tensor):
            raise PackageError(f"{who} returned {shown(value)} as {name}, which is no tensor", hint)
        if value.shape != (1, size) or value.dtype != torch.float32:
            told = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
            raise PackageError(f"{who} returned {name} of {told}, not {(1, size)} float32", hint)
    values: FloatArray = answer[0][0].numpy()
    largest = float(np.abs(values).max(initial=0.0))
    if largest > ACTION_BOUND and math.isfinite(largest):
        raise PackageError(f"{who} returned an action of {largest:g}, outside [-1, 1]", hint)
    return values, answer[1][0].numpy()


class TorchActor:
    """Runs a policy on single observations; implements `types.Actor`.

    The first `needs.init_steps` actions are uniform in [-1, 1], each held for `needs.init_hold` cycles; so are those
    of steps without any policy. All randomness comes from `rng`, so a run can be repeated bit by bit.
    """

    def __init__(
        self,
        source: PolicySource,
        spec: TaskSpec,
        needs: Needs,
        rng: np.random.Generator,
        *,
        deterministic: bool = False,
        steps_done: int = 0,
        plans: Plans | None = None,
    ) -> None:
        """`plans` are those of other actors with the same source, in the same thread."""
        self.name = full_name(source.module, "forward")  # of what is asked for actions
        self.steps_done = steps_done  # environment steps of the run so far
        self._source = source
        self._needs = needs
        self._rng = rng
        self._deterministic = deterministic
        self._not_finite = 0  # answers in a row
        self._no_noise = np.zeros(spec.action_dim, np.float32)
        self._held = self._no_noise
        self._held_left = 0
        self._noise: FloatArray | None = None  # of the newest action
        self._keep = math.exp(-1 / needs.noise_cycles) if needs.noise_cycles > 0 else 0.0
        self._window = needs.window
        self._plans = plans or Plans(needs.window.out_hw)

    def act(self, observation: Observation) -> Action:
        """The action for `observation`, with the version of the policy it came from."""
        version = self._source.version
        warming_up = self.steps_done < self._needs.init_steps or version == (0, 0)
        self.steps_done += 1
        if warming_up and not self._deterministic:
            return Action(values=self._random_action(), policy_version=(0, 0))
        values, extras = self._run(observation)
        return Action(values=values, policy_version=version, extras=extras)

    def state(self) -> dict[str, Any]:
        """Plain values from which `load_state` makes another actor go on exactly as this one would."""
        return {
            "steps_done": self.steps_done,
            "rng": self._rng.bit_generator.state,
            "held": self._held.tolist(),
            "held_left": self._held_left,
            "noise": None if self._noise is None else self._noise.tolist(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.steps_done, self._held_left = state["steps_done"], state["held_left"]
        self._rng.bit_generator.state = state["rng"]
        self._held = np.array(state["held"], np.float32)
        self._noise = None if state["noise"] is None else np.array(state["noise"], np.float32)

    def _random_action(self) -> FloatArray:
        if self._held_left == 0:
            self._held = self._rng.uniform(-1.0, 1.0, self._no_noise.shape).astype(np.float32)
            self._held_left = self._needs.init_hold
        self._held_left -= 1
        return self._held.copy()

    def _run(self, observation: Observation) -> tuple[FloatArray, FloatArray]:
        (top, left), (height, width) = self._window.centre, self._window.out_hw
        images = [image[top : top + height, left : left + width] for image in observation.images]
        noise = self._no_noise
        if not self._deterministic:
            fresh = self._rng.standard_normal(noise.shape, np.float32)
            if self._noise is not None:  # a first-order process: each value is standard normal, as a fresh one is
                fresh = self._keep * self._noise + math.sqrt(1 - self._keep**2) * fresh
            noise = self._noise = fresh
        module = self._source.module
        who = full_name(module, "forward")
        plan = self._plans.follow(module, self._source.version)
        with calling(who):
            if plan is not None:
                values, extras = plan(images, observation.proprio, noise)
            else:
                with torch.inference_mode():
                    answer = module(
                        torch.from_numpy(np.stack(images)[None]),
                        torch.from_numpy(observation.proprio)[None],
                        torch.from_numpy(noise)[None],
                    )
                values, extras = check_answer(answer, noise.size, self._needs.extras, who)
        self._not_finite = 0 if np.isfinite(values).all() and np.isfinite(extras).all() else self._not_finite + 1
        if self._not_finite >= MAX_NOT_FINITE:
            raise PackageError(
                f"{who} returned {shown(values.tolist())} with extras {shown(extras.tolist())}: not finite"
                f" {MAX_NOT_FINITE} times in a row; the robot stood",
                "its parameters were finite: what does it do with them?",
            )
        return values, extras
