"""The actor of a process that gets its policies from a box in shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..algos.agent import TorchActor, bind_policy
from ..algos.checked import find_algorithm
from ..algos.inference import Plans
from ..config import Section
from ..seeds import random_stream
from ..types import FloatArray, Observation, TaskSpec
from .plan import Start
from .policy import PolicyBox, PolicyReader
from .recording import save_policy

__all__ = ["BoxActor", "BoxHost", "warm_up"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxActor:
    """Builds the actor's host in the control process; pickles into it."""

    algorithm: str  # "module:attribute"
    spec: TaskSpec
    settings: Section  # the algorithm's
    box: PolicyBox
    seed: int
    start: Start
    record_to: Path | None  # folder for every policy that acts

    def __call__(self) -> BoxHost:
        return BoxHost(self)


class BoxHost:
    """`control.ActorHost` over a `PolicyReader`."""

    actor: TorchActor

    def __init__(self, job: BoxActor) -> None:
        torch.set_num_threads(1)  # one image at a time: more threads only wake each other up
        algorithm = find_algorithm(job.algorithm)

        def bound(flat: FloatArray) -> nn.Module:
            return bind_policy(algorithm.build_actor(job.spec, job.settings), flat)

        self._reader = PolicyReader(job.box, bound)
        self._record_to, self._box = job.record_to, job.box
        needs = algorithm.needs(job.spec, job.settings)
        self._plans = Plans(needs.window.out_hw)
        warm_up_rng, rng = np.random.default_rng(), random_stream(job.seed, job.start.stream("actor"))
        act = partial(TorchActor, self._reader, job.spec, needs, plans=self._plans)
        warm_up(act(warm_up_rng, deterministic=True), job.spec)
        self.actor = act(rng, steps_done=job.start.step)

    @property
    def version(self) -> tuple[int, int]:
        """Version of the policy that acts now."""
        return self._reader.version

    def poll(self) -> bool:
        """Take the newest policy if there is a newer one."""
        if not self._reader.poll():
            return False
        module = self._reader.module
        self._plans.follow(module, self.version)  # now, as there is time, and not when the next action is due
        if self._record_to is not None:
            flat = np.concatenate([p.detach().numpy().ravel() for p in module.parameters()])
            save_policy(self._record_to, self.version, flat)
        return True


def warm_up(actor: TorchActor, spec: TaskSpec) -> None:
    """The first inference allocates and chooses kernels, 20 to 50 ms: not on the first deadline, or question."""
    image = np.zeros((*spec.image_hw, 3), np.uint8)
    observation = Observation(
        frame_ids=tuple(range(spec.frames)),
        images=(image,) * spec.frames,
        proprio=np.zeros(spec.proprio_dim, np.float32),
        now_ns=0,
    )
    for _ in range(10):
        actor.act(observation)
