"""An algorithm and robots that are at fault in the way their name says; importable by every process of a run.

`tests.faulty:NAME` is the algorithm with the fault NAME, `tests.faulty:track_NAME` the task Track with it, as
`tests.faulty:create_NAME` is Create-Reacher.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from relod.algos.agent import Minibatches, Needs
from relod.algos.batch import centre_window
from relod.config import Section
from relod.robots.create2.reacher import CREATE_REACHER
from relod.robots.track.driver import TrackDriver
from relod.robots.track.task import TRACK, Track
from relod.robots.track.world import VirtualTrack
from relod.types import Command, Outcome

LATE = 30  # calls of a network, or updates, after which the late faults begin
NAN = float("nan")


class FaultySettings(Section, frozen=True):
    """Of the section `agent`."""

    size: int = 8
    init_steps: int = 10


class Demanding(Section, frozen=True, kw_only=True):
    """A section that cannot be built without arguments."""

    size: int


class Policy(nn.Module):
    def __init__(self, spec: Any, fault: str) -> None:
        super().__init__()
        self.fault, self.calls = fault, 0
        self.head = nn.Linear(spec.proprio_dim, spec.action_dim)

    def forward(self, images: Any, proprio: Any, noise: Any) -> Any:
        self.calls += 1
        late = self.calls > LATE
        action, extras = torch.tanh(self.head(proprio) + 0.3 * noise), noise[:, :0]
        match self.fault:
            case "act_none":
                return None
            case "act_without_extras":
                return action
            case "act_numpy":
                return action.numpy(), extras
            case "act_short":
                action = action[:, :1]
            case "act_flat":
                action = action[0]
            case "act_double":
                action = action.double()
            case "act_nan":
                action = action * NAN
            case "act_large":
                action = action * 0 + 7
            case "act_more_extras":
                extras = noise[:, :1]
            case "act_raises":
                raise ValueError("no such\nthing")
            case "act_nan_late" if late:
                action = action * NAN
            case "act_raises_late" if late:
                raise ValueError("no such thing")
            case "act_hangs_late" if late:
                time.sleep(1000)
            case "act_slow_late" if late:
                time.sleep(0.06)
        return action, extras


class Learner:
    def __init__(self, spec: Any, fault: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.fault, self.updates, self.newest = fault, 0, {}
        self.net = Policy(spec, fault)
        if fault == "policy_other":
            self.net.head = nn.Linear(spec.proprio_dim, spec.action_dim + 1)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)

    def update(self, batch: Any) -> None:
        self.updates += 1
        if self.fault == "update_raises" or (self.fault == "update_raises_late" and self.updates > LATE):
            raise RuntimeError("bad update")
        loss = (self.net.head(torch.from_numpy(batch.proprio)) ** 2).mean()
        if self.fault == "update_nan":
            loss = loss * NAN
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.newest = {"loss": loss.item()}

    def metrics(self) -> Any:
        match self.fault:
            case "metrics_none":
                return None
            case "metrics_text":
                return {"loss": "much"}
            case "metrics_vector":
                return {"loss": torch.zeros(3)}
            case "metrics_raise":
                raise KeyError("loss")
        return self.newest

    def policy(self) -> Any:
        return None if self.fault == "policy_none" else self.net

    def state(self) -> Any:
        match self.fault:
            case "state_none":
                return None
            case "state_number":
                return {"x": 1.0}
            case "state_without_policy":
                return dict(self.net.state_dict())
        state = {f"policy.{name}": tensor.clone() for name, tensor in self.net.state_dict().items()}
        if self.fault == "state_shared":  # two names for one memory, and not in a row: neither fits into a file
            weight = self.net.head.weight.detach()
            state |= {"one": weight, "other": weight.T}
        return state

    def load_state(self, state: Any) -> None:
        if self.fault == "load_raises":
            raise KeyError("weights")
        if self.fault != "load_nothing":
            own = {name.removeprefix("policy."): tensor for name, tensor in state.items() if name.startswith("policy.")}
            self.net.load_state_dict(own)


class Algorithm:
    settings_type: Any = FaultySettings
    presets: ClassVar[Any] = {"faulty": {"task": {"image_height": 24, "image_width": 32}}}
    profiles: ClassVar[Any] = {}

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def needs(self, spec: Any, settings: Any) -> Any:
        if self.fault == "needs_raises":
            raise AttributeError("no such setting")
        if self.fault == "needs_a_dict":
            return {}
        return Needs(
            memory=Minibatches(size=settings.size, n_step=1, gamma=0.9, update_after=40, max_updates_per_step=1.0),
            window=centre_window(spec.image_hw),
            init_steps=settings.init_steps,
            extras=3 if self.fault == "extras_missing" else 0,
        )

    def build_actor(self, spec: Any, settings: Any) -> Any:
        if self.fault == "actor_raises":
            raise TypeError("cannot build")
        return None if self.fault == "actor_none" else Policy(spec, self.fault)

    def build_learner(self, spec: Any, settings: Any, *, seed: int, device: Any) -> Any:
        if self.fault == "learner_raises":
            raise TypeError("cannot build")
        return object() if self.fault == "learner_lacks_methods" else Learner(spec, self.fault, seed)


def algorithm(fault: str) -> Any:
    made: Any = Algorithm(fault)
    match fault:
        case "a_class":
            return Algorithm
        case "a_text":
            return "sac"
        case "lacks_presets":
            made = type("Bare", (), {"settings_type": FaultySettings, "profiles": {}})()
        case "lacks_methods":
            made = type("Bare", (), {"settings_type": FaultySettings, "profiles": {}, "presets": Algorithm.presets})()
        case "other_signature":
            made.build_learner = lambda spec, settings: None
        case "presets_empty":
            made.presets = {}
        case "presets_a_list":
            made.presets = ["faulty"]
        case "presets_flat":
            made.presets = {"faulty": {"agent": 3}}
        case "settings_a_dict":
            made.settings_type = dict
        case "settings_demanding":
            made.settings_type = Demanding
    return made


# -- robots ------------------------------------------------------------------------------------------------------------


class FaultyTask(Track):
    fault = ""
    judged = 0

    def proprioception(self, window: Any, previous_actions: Any) -> Any:
        vector = super().proprioception(window, previous_actions)
        match self.fault:
            case "proprio_raises":
                return vector[99]
            case "proprio_nan":
                vector[1] = NAN
            case "proprio_short":
                return vector[1:]
            case "proprio_double":
                return vector.astype(float)
            case "proprio_a_list":
                return vector.tolist()
        return vector

    def judge(self, window: Any, image: Any, index: int) -> Any:
        self.judged += 1
        match self.fault:
            case "judge_raises" if self.judged > LATE:
                raise ZeroDivisionError("by nothing")
            case "judge_nan":
                return Outcome(reward=NAN)
            case "judge_none":
                return None
            case "judge_text":
                return Outcome(reward="much")  # type: ignore[arg-type]
            case "judge_slow":
                time.sleep(0.06)
            case "judge_numpy":
                over = np.bool_(index + 1 >= self.spec.max_steps)
                return Outcome(reward=np.float32(-1), truncated=over, reason="time")  # type: ignore[arg-type]
        return super().judge(window, image, index)

    def command(self, action: Any, window: Any) -> Any:
        match self.fault:
            case "command_raises":
                raise KeyError("speed")
            case "command_nan":
                return Command(values=(NAN, 0.0, 0.0))
            case "command_short":
                return Command(values=(0.0,))
            case "command_a_tuple":
                return (0.0, 0.0, 0.0)
        return super().command(action, window)

    def reset(self, rng: Any) -> Any:
        match self.fault:
            case "reset_none":
                return None
            case "reset_raises":
                return self._stumble()
            case "reset_yields_numbers":
                return (number for number in (0, 0, 0))
        return super().reset(rng)

    def _stumble(self) -> Any:
        yield self.stop()
        raise IndexError("no such place")


class FaultyWorld(VirtualTrack):
    def advance(self, now_ns: int) -> Any:
        packets, frames = super().advance(now_ns)
        return [(arrived_ns, values[1:]) for arrived_ns, values in packets], frames


class FaultyDriver(TrackDriver):
    fault = ""
    commands = 0

    def __init__(self, address: str, settings: Any, publish: Any, on_event: Any) -> None:
        def other(arrived_ns: int, values: Any) -> None:
            if self.fault == "driver_narrow":
                publish(arrived_ns, values[1:])
            elif self.fault != "driver_silent":
                publish(arrived_ns, values)

        if self.fault == "driver_unbuilt":
            raise TypeError("no SDK")
        super().__init__(address, settings, other, on_event)

    async def open(self) -> None:
        if self.fault == "driver_unopened":
            raise RuntimeError("SDK says 17")
        await super().open()

    async def run(self) -> None:
        if self.fault == "driver_ends":
            await asyncio.sleep(0.2)
            return
        await super().run()

    def command(self, values: Any) -> None:
        self.commands += 1
        if self.fault == "driver_refuses" and self.commands > LATE:
            raise KeyError("speed")
        super().command(values)


class Build:
    """Of a task with a fault; pickles into another process."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def __call__(self, settings: Any) -> Any:
        task = FaultyTask(settings)
        task.fault = self.fault
        match self.fault:
            case "build_raises":
                raise ValueError("no such task")
            case "build_none":
                return None
            case "limits_short":
                task.limits = replace(task.limits, low=(0.0,))
            case "lacks_judge":
                task.judge = None  # type: ignore[method-assign,assignment]
        return task


def __getattr__(name: str) -> Any:
    kind, _, fault = name.partition("_")
    if name.startswith("__"):
        raise AttributeError(name)
    if kind == "driver":
        return type(name, (FaultyDriver,), {"fault": name, "__module__": __name__})
    if kind == "track":
        entry = replace(TRACK, build=Build(fault))
        if fault.startswith("driver_"):
            entry = replace(entry, driver=f"{__name__}:{fault}")
        if fault == "world_narrow":
            entry = replace(entry, world=f"{__name__}:FaultyWorld")
        if fault == "without_sim":
            entry = replace(entry, settings={k: v for k, v in TRACK.settings.items() if k != "sim"})
        return entry
    if kind == "create":
        return CREATE_REACHER
    return algorithm(name)
