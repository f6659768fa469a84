"""Fakes that many tests use: a task of one wheel, an actor that follows a script, senses made by hand.

Nothing here reads a clock: a `Bench` moves time by one cycle per tick.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from relod.config import SafetySettings
from relod.packages import Watch
from relod.robots.limits import symmetric
from relod.runtime.clock import NS_PER_MS, NS_PER_S
from relod.runtime.cycle import Cycle, Inputs, Tick
from relod.runtime.request import Request
from relod.types import Action, Command, Frame, Limits, Observation, Outcome, Reset, SensorWindow, TaskSpec

CYCLE_NS = 40 * NS_PER_MS
SENSORS = ("x", "connection_epoch")
FULL_SPEED = 100.0
RESET_SPEED = 50.0
STOP = Command(values=(0.0,))
SPEC = TaskSpec(
    name="fake",
    robot="none",
    cycle_ns=CYCLE_NS,
    frames=2,
    camera_hw=(4, 6),
    camera_fps=25.0,
    image_hw=(4, 6),
    proprio_names=("x", "speed_1_ago"),
    action_names=("speed",),
    max_steps=5,
    sensor_window=2,
)


class FakeTask:
    """One wheel. Every step earns -1 unless `outcomes` says otherwise; a reset drives for `reset_cycles`."""

    def __init__(
        self,
        *,
        spec: TaskSpec = SPEC,
        outcomes: Mapping[int, Outcome] | None = None,
        reset_cycles: int = 2,
        action_history: int = 1,
        limits: Limits | None = None,
    ) -> None:
        names = ("x", *(f"speed_{age}_ago" for age in range(action_history, 0, -1)))
        self.spec = replace(spec, proprio_names=names)
        self.action_history = action_history
        self.limits = limits or symmetric(FULL_SPEED, 1)
        self.reset_limits = symmetric(RESET_SPEED, 1)
        self.outcomes = dict(outcomes or {})
        self.reset_cycles = reset_cycles
        self.resets = 0
        self.judged: list[tuple[int, float, int]] = []  # (index, newest x, grey value of the newest image)
        self.seen_in_reset: list[int] = []  # stamps the reset was sent

    def proprioception(self, window: SensorWindow, previous_actions: np.ndarray) -> np.ndarray:
        return np.concatenate([[window.newest("x")], previous_actions.ravel()]).astype(np.float32)

    def judge(self, window: SensorWindow, image: np.ndarray, index: int) -> Outcome:
        self.judged.append((index, window.newest("x"), int(image[0, 0, 0])))
        timeout = Outcome(reward=-1.0, truncated=True, reason="time limit")
        default = timeout if index + 1 >= self.spec.max_steps else Outcome(reward=-1.0)
        return self.outcomes.get(index, default)

    def command(self, action: np.ndarray, window: SensorWindow) -> Command:
        return Command(values=(float(action[0]) * FULL_SPEED,))

    def stop(self) -> Command:
        return STOP

    def reset(self, rng: np.random.Generator) -> Reset:
        self.resets += 1
        for _ in range(self.reset_cycles):
            now_ns, _window = yield Command(values=(2 * RESET_SPEED,))
            self.seen_in_reset.append(now_ns)

    def status(self, window: SensorWindow) -> Mapping[str, float | str]:
        return {"x": window.newest("x")}


class ScriptedActor:
    """Gives one value after another, the last one for ever, and keeps what it was shown."""

    def __init__(self, values: Iterable[float] = (0.5,), *, policy_version: tuple[int, int] = (1, 7)) -> None:
        self.values = list(values)
        self.policy_version = policy_version
        self.observations: list[Observation] = []

    def act(self, observation: Observation) -> Action:
        value = self.values[min(len(self.observations), len(self.values) - 1)]
        self.observations.append(observation)
        return self.action(value)

    def action(self, value: float) -> Action:
        return Action(values=np.array([value], np.float32), policy_version=self.policy_version)


class DistantActor(ScriptedActor):
    """Answers later, when `Bench.answer` hands its actions over."""

    def act(self, observation: Observation) -> None:
        self.observations.append(observation)


@dataclass
class Senses:
    """What rings would hold: packets whose `x` is their number, frames whose grey value is their id."""

    spec: TaskSpec = SPEC
    packets: list[tuple[int, float]] = field(default_factory=list)  # (arrived_ns, connection epoch)
    frames: list[Frame] = field(default_factory=list)

    def packet(self, arrived_ns: int, epoch: float = 1.0) -> None:
        self.packets.append((arrived_ns, epoch))

    def frame(self, captured_ns: int) -> None:
        number = len(self.frames) + 1
        image = np.full((*self.spec.camera_hw, 3), number % 256, np.uint8)
        self.frames.append(Frame(id=number, captured_ns=captured_ns, arrived_ns=captured_ns + 1, image=image))

    def inputs(self) -> Inputs:
        first = max(0, len(self.packets) - self.spec.sensor_window)
        rows = [(number + 1.0, self.packets[number][1]) for number in range(first, len(self.packets))]
        window = SensorWindow(
            names=SENSORS,
            seq=np.arange(first + 1, len(self.packets) + 1, dtype=np.int64),
            arrived_ns=np.array([arrived_ns for arrived_ns, _ in self.packets[first:]], np.int64),
            values=np.array(rows, np.float64).reshape(-1, len(SENSORS)),
        )
        return Inputs(window=window, frames=tuple(self.frames[-self.spec.frames :]))


class Bench:
    """A cycle under test: each `tick` is one cycle later, by default with one new packet and one new frame."""

    def __init__(
        self,
        task: FakeTask | None = None,
        actor: ScriptedActor | None = None,
        *,
        max_steps: int = 0,
        safety: SafetySettings | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.task, self.actor = task or FakeTask(), actor or ScriptedActor()
        self.cycle = Cycle(
            task=self.task,
            actor=self.actor,
            safety=safety or SafetySettings(),
            rng=np.random.default_rng(0),
            shrink=lambda image: image,
            max_steps=max_steps,
            watch=watch,
        )
        self.senses = Senses(self.task.spec)
        self.now_ns = NS_PER_S
        self.epoch = 1.0
        self.ticks: list[Tick] = []

    def tick(self, *, packet: bool = True, frame: bool = True, age_ns: int = 5 * NS_PER_MS, hold: str = "") -> Tick:
        """The next cycle; what arrives is `age_ns` old."""
        self.now_ns += CYCLE_NS
        if packet:
            self.senses.packet(self.now_ns - age_ns, self.epoch)
        if frame:
            self.senses.frame(self.now_ns - age_ns)
        self.ticks.append(self.cycle.tick(self.now_ns, replace(self.senses.inputs(), hold=hold)))
        return self.ticks[-1]

    def answer(self, value: float, asked: int = -1, after_ms: float = 5.0) -> Command | None:
        """Hand over the answer to an observation, the newest one if not another, some time into the cycle."""
        asked_ns = self.actor.observations[asked].now_ns
        return self.cycle.answer(self.actor.action(value), asked_ns, self.now_ns + int(after_ms * NS_PER_MS))

    def go(self, cycles: int, **senses: Any) -> Tick:
        """That many ticks; returns the last."""
        return [self.tick(**senses) for _ in range(cycles)][-1]

    def until(self, phase: object, limit: int = 100, **senses: Any) -> Tick:
        """Ticks until one is in `phase`."""
        for _ in range(limit):
            tick = self.tick(**senses)
            if tick.phase is phase:
                return tick
        raise AssertionError(f"never {phase}")


# -- the real task, small ----------------------------------------------------------------------------------------------

SMALL = (
    *("task.camera_height=24", "task.camera_width=32", "task.image_height=24", "task.image_width=32"),
    *("task.frames=2", "task.episode_s=2", "task.reset_max_speed_mm_s=250"),
    *("agent.conv_channels=4", "agent.conv_strides=[2,1]", "agent.hidden=[16]", "agent.shift_px=1"),
    *("learner.threads=1", "replay.capacity=1024"),
)
SMALL_AGENTS = {
    "sac": ("agent.init_steps=40", "agent.batch_size=8"),
    "ppo": ("agent.rollout_steps=80", "agent.reuse_steps=160", "agent.minibatch=16", "agent.epochs=2"),
}


def small_request(
    folder: Path, *assignments: str, seed: int = 0, steps: int = 150, algorithm: str = "sac", **fields: Any
) -> Request:
    """A request for a short virtual run of Create-Reacher on tiny images and networks, recorded in `folder`."""
    request = Request(
        task="create",
        mode="local-only",
        algorithm=algorithm,
        preset=f"{algorithm}-lite",
        profile=None,
        robot=None,
        camera=None,
        allow_mixed=False,
        world="nominal",
        clock="virtual",
        resume=None,
        config=None,
        environment={},
        assignments=(*SMALL, *SMALL_AGENTS.get(algorithm, ()), f"run.folder={folder}", *assignments),
        overrides={"run.seed": seed, "run.steps": steps},
        arguments=("robot",),
    )
    return replace(request, **fields)
