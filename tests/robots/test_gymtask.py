"""Gymnasium environments as tasks."""

from __future__ import annotations

import pickle

import gymnasium
import numpy as np
import pytest

from relod.errors import SettingsError
from relod.robots import registry
from relod.robots.gymtask.simulation import Simulation
from relod.robots.gymtask.task import GymSettings, GymTask
from relod.robots.gymtask.world import SimSettings, VirtualGym
from relod.runtime.clock import NS_PER_MS
from relod.runtime.modes import run_robot
from relod.runtime.request import Request
from relod.types import Command

NAME = "Pendulum-v1"


def test_steps_rewards_and_observations_are_the_environments():
    simulation, env = Simulation(NAME), gymnasium.make(NAME)
    simulation.command((0.0, 0.0), request=7)
    observation, _ = env.reset(seed=7)
    packet = simulation.tick()
    assert packet[:3] == pytest.approx(observation.tolist())
    assert packet[3:] == [0.0, 0.0, 0.0, 0.0, 7.0, 0.0]  # it stands
    for number, action in enumerate((0.5, -1.0, 1.0, 3.0), start=1):
        simulation.command((action, 1.0))
        packet = simulation.tick()
        observation, reward, *_ = env.step(np.array([2 * min(action, 1.0)], np.float32))
        assert packet[:4] == pytest.approx([*observation.tolist(), reward])
        assert packet[-1] == number


def test_it_stands_after_its_end_and_when_it_is_told_to_or_nonsense():
    simulation = Simulation(NAME)
    simulation.command((1.0, 1.0), request=1)
    packets = [simulation.tick() for _ in range(203)]
    assert packets[199][4:7] == [0.0, 1.0, 1.0]  # truncated, while it went on
    assert packets[202] == [*packets[199][:6], 0.0, *packets[199][7:]]
    simulation.command((0.0, 0.0), request=2)
    assert simulation.tick()[-2:] == [2.0, 0.0]
    simulation.command((np.nan, 1.0))
    assert simulation.tick()[-1] == 0.0
    simulation.command((0.0, 1.0))
    assert simulation.tick()[-1] == 1.0
    simulation.stand()
    assert simulation.tick()[-1] == 1.0


def test_what_is_done_in_a_cycle_is_seen_at_the_next_ones_beginning():
    task = GymTask(NAME, GymSettings())
    world = VirtualGym(NAME, SimSettings(), 0, task.spec, 0)
    cycle_ns = task.spec.cycle_ns
    world.execute(Command(values=(0.0, 0.0), request=5), 1)
    (packet,), (frame,) = world.advance(cycle_ns)
    assert packet[0] == frame.captured_ns == cycle_ns
    assert packet[1][-3:].tolist() == [5.0, 0.0, 1.0]
    world.execute(Command(values=(1.0, 1.0)), cycle_ns + 2 * NS_PER_MS)
    packets, _ = world.advance(3 * cycle_ns)
    assert [values[-2] for _, values in packets] == [1.0, 2.0]


def test_pictures_are_the_environments_if_they_are_wanted():
    entry = registry.task("gym:Pendulum-v1")
    assert entry.build(GymSettings()).spec.image_hw == (1, 1)
    spec = entry.build(GymSettings(images=True)).spec
    assert (spec.image_hw, spec.frames) == ((48, 64), 3)
    pytest.importorskip("pygame", reason="Gymnasium draws with it")
    picture = Simulation(NAME, picture_hw=(48, 64)).render()
    assert picture.shape == (48, 64, 3)
    assert picture.std() > 5


def test_the_parts_are_found_by_name_in_any_process():
    entry = registry.task("gym:Pendulum-v1")
    again = pickle.loads(pickle.dumps(entry.build))(GymSettings())  # noqa: S301
    assert again.spec == entry.build(GymSettings()).spec
    assert entry.driver == "relod.robots.gymtask.made:driver_50656e64756c756d2d7631"
    assert registry.load_attribute(entry.driver, "the driver").command_names == ("action_0", "go")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gym:CartPole-v1", r"gym:CartPole-v1 has the actions Discrete\(2\).*; only bounded continuous ones"),
        ("gym:Nonsense-v0", r"gym:Nonsense-v0: .*doesn't exist"),
        ("gym:Blackjack-v1", "gym:Blackjack-v1 has the actions"),
    ],
)
def test_what_cannot_be_learned_is_refused(name, message):
    with pytest.raises(SettingsError, match=message):
        registry.task(name)


@pytest.mark.parametrize("algorithm", ["sac", "ppo"])
def test_a_run_in_virtual_time(tmp_path, algorithm):
    agent = {
        "sac": ("agent.init_steps=100", "agent.update_after=100", "agent.batch_size=8"),
        "ppo": ("agent.rollout_steps=200", "agent.epochs=1"),
    }[algorithm]
    result = run_robot(
        Request(
            task="gym:Pendulum-v1",
            algorithm=algorithm,
            preset=f"{algorithm}-lite",
            clock="virtual",
            environment={},
            assignments=("agent.hidden=[16]", "learner.threads=1", *agent),
            overrides={"run.steps": 450, "run.folder": str(tmp_path)},
        )
    )
    summary = result.summary
    assert result.exit_code == 0
    assert summary["lengths"] == [200, 200, 50]
    assert all(-2000 < total < -10 for total in summary["returns"])
    assert summary["updates"] == (350 if algorithm == "sac" else 2)
