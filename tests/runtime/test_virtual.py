"""Virtual time: the whole run in one process, and the same seed gives the same run, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from relod.robots.create2.world import VirtualCreate
from relod.robots.simcamera import SimFrame
from relod.runtime import session
from relod.runtime.checkpoint import newest_readable
from relod.runtime.clock import NS_PER_MS, NS_PER_S
from relod.runtime.cycle import Inputs, Phase, Tick
from relod.runtime.host import Result
from relod.runtime.modes import resolve
from relod.runtime.virtual import WRITE_NS, VirtualRun
from relod.runtime.virtualsession import run_virtual
from relod.types import Command, Frame
from tests.fakes import CYCLE_NS, FULL_SPEED, SENSORS, SPEC, STOP, Bench, small_request


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Networks of this size are slower on two threads; and no picture of the curve, which takes half a second."""
    torch.set_num_threads(1)
    monkeypatch.setattr(session, "write_curve", lambda path, title: path)


# -- the driver, with fakes --------------------------------------------------------------------------------------------


class FakeWorld:
    """A packet 5 ms and a frame 10 ms before each cycle; keeps what it is told."""

    def __init__(self) -> None:
        self.asked_ns: list[int] = []
        self.commands: list[tuple[int, Command]] = []
        self.episodes = 0

    def advance(self, now_ns: int) -> tuple[list[tuple[int, Any]], list[SimFrame]]:
        self.asked_ns.append(now_ns)
        image = np.full((*SPEC.camera_hw, 3), len(self.asked_ns) % 256, np.uint8)
        frame = SimFrame(captured_ns=now_ns - 10 * NS_PER_MS, available_ns=now_ns - NS_PER_MS, image=image)
        return [(now_ns - 5 * NS_PER_MS, np.array([len(self.asked_ns), 1.0]))], [frame]

    def execute(self, command: Command, now_ns: int) -> None:
        self.commands.append((now_ns, command))

    def begin_episode(self) -> None:
        self.episodes += 1


@dataclass
class Driven:
    """A finished virtual run of the fake task."""

    world: FakeWorld
    ticks: list[Tick]
    frames: list[Frame]
    told: list[tuple[int, Inputs, Tick]]


def driven(max_steps: int) -> Driven:
    world = FakeWorld()
    found = Driven(world=world, ticks=[], frames=[], told=[])
    run = VirtualRun(
        cycle=Bench(max_steps=max_steps).cycle,
        world=world,
        spec=SPEC,
        sensor_names=SENSORS,
        on_frames=found.frames.extend,
        on_tick=lambda now_ns, inputs, tick: found.told.append((now_ns, inputs, tick)),
    )
    found.ticks = list(run.ticks())
    return found


def test_every_cycle_is_one_period_after_the_last_until_the_run_is_over():
    run = driven(max_steps=7)
    assert run.world.asked_ns == [NS_PER_S + n * CYCLE_NS for n in range(1, len(run.ticks) + 1)]
    assert [t.phase for t in run.ticks][-1] is Phase.OVER
    assert sum(t.step is not None for t in run.ticks) == 7
    assert run.world.episodes == sum(t.end is not None for t in run.ticks) == 2


def test_commands_reach_the_robot_after_the_time_a_write_takes_and_the_last_is_a_stop():
    run = driven(max_steps=3)
    assert [at_ns for at_ns, _ in run.world.commands] == [ns + WRITE_NS for ns in run.world.asked_ns]
    assert [command for _, command in run.world.commands] == [t.command for t in run.ticks]
    assert run.world.commands[-1][1] == STOP
    assert any(command.values == (0.5 * FULL_SPEED,) for _, command in run.world.commands)


def test_frames_and_packets_are_numbered_from_one_and_only_the_newest_are_seen():
    run = driven(max_steps=7)
    assert [frame.id for frame in run.frames] == list(range(1, len(run.ticks) + 1))
    for number, (now_ns, inputs, _) in enumerate(run.told, 1):
        assert inputs.window.seq.tolist() == [n for n in (number - 1, number) if n > 0]
        assert inputs.window.newest("x") == number
        assert [frame.id for frame in inputs.frames] == [n for n in (number - 1, number) if n > 0]
        assert inputs.frames[-1].captured_ns == now_ns - 10 * NS_PER_MS


# -- whole runs of the real task ---------------------------------------------------------------------------------------


class TracedCreate(VirtualCreate):
    """The simulated Create 2, with all commands and captures of the newest run."""

    commands: ClassVar[list[tuple[int, tuple[float, ...], int]]] = []
    captures_ns: ClassVar[list[int]] = []

    def execute(self, command: Command, now_ns: int) -> None:
        self.commands.append((now_ns, command.values, command.request))
        super().execute(command, now_ns)

    def advance(self, now_ns: int) -> tuple[list[tuple[int, Any]], list[SimFrame]]:
        packets, frames = super().advance(now_ns)
        self.captures_ns.extend(frame.captured_ns for frame in frames)
        return packets, frames


@dataclass
class Ran:
    """A run and everything that should repeat."""

    result: Result
    commands: list[tuple[int, tuple[float, ...], int]]
    captures_ns: list[int]
    checkpoint: dict[str, bytes]
    log: list[bytes]
    episodes: list[str]

    def repeats(self) -> tuple[object, ...]:
        keys = ("steps", "episodes", "returns", "lengths", "updates", "policy_version", "replay_steps")
        told = {key: self.result.summary[key] for key in keys}
        return told, self.commands, self.captures_ns, self.checkpoint, self.log


def run(folder: Path, *assignments: str, **fields: Any) -> Ran:
    plan = resolve(small_request(folder, *assignments, **fields))
    plan = replace(plan, entry=replace(plan.entry, world=f"{__name__}:TracedCreate"))
    TracedCreate.commands.clear()
    TracedCreate.captures_ns.clear()
    result = run_virtual(plan, (), None)
    path = Path(result.summary["run_dir"])
    found = newest_readable(path / "checkpoints").checkpoint
    checkpoint = {name: tensor.numpy().tobytes() for name, tensor in found.tensors.items()} if found else {}
    log = [file.read_bytes() for file in sorted((path / "log").iterdir())]
    episodes = (path / "episodes.jsonl").read_text().splitlines()
    return Ran(result, TracedCreate.commands[:], TracedCreate.captures_ns[:], checkpoint, log, episodes)


@pytest.mark.slow
def test_the_same_seed_is_the_same_run_and_another_seed_is_another(tmp_path):
    one, same, other = (run(tmp_path, seed=seed) for seed in (5, 5, 6))
    assert one.repeats() == same.repeats()
    assert one.commands != other.commands
    assert one.checkpoint != other.checkpoint
    summary = one.result.summary
    assert (summary["steps"], summary["updates"], summary["seed"], summary["exit_code"]) == (150, 110, 5, 0)
    assert summary["policy_version"][1] > 0  # learned policies acted
    assert len(one.episodes) == summary["episodes"] == len(summary["returns"]) > 2
    assert one.commands[-1][1] == (0.0, 0.0)
    assert summary["stopped_cleanly"]


@pytest.mark.parametrize("world", ["ideal", "harsh"])
def test_every_world_can_be_run(tmp_path, world):
    assert run(tmp_path, world=world, steps=30).result.summary["steps"] == 30


def test_the_arena_may_change_its_look_with_each_episode(tmp_path):
    summary = run(tmp_path, "sim.look=episode", steps=60).result.summary
    assert (summary["steps"], summary["episodes"], summary["exit_code"]) == (60, 2, 0)


def test_there_may_be_one_frame_a_step(tmp_path):
    ran = run(tmp_path, "sim.frame_per_step=true", steps=40)
    assert {after - before for before, after in pairwise(ran.captures_ns)} == {45 * NS_PER_MS}
    assert ran.result.summary["steps"] == 40


def test_a_camera_that_never_answers_ends_the_run_with_a_safety_stop(tmp_path):
    result = run(tmp_path, "sim.camera.latency_ms=1000", "safety.stall_limit_s=2", steps=40).result
    assert result.error is not None
    assert (result.exit_code, result.summary["exit_code"], result.summary["steps"]) == (4, 4, 0)
    assert "no camera image for 2 s" in result.summary["error"]
