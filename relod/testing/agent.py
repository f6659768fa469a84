"""What every algorithm must do.

from relod.testing import AgentContract

class TestMine(AgentContract):
    algorithm = "mylab.agents:DDPG"
    small = {"hidden": [16]}  # settings with which an update takes milliseconds
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from ..algos.agent import (
    Algorithm,
    FixedPolicy,
    Learner,
    Minibatches,
    Needs,
    TorchActor,
    bind_policy,
    flatten_policy,
    policy_from_state,
    policy_size,
)
from ..algos.inference import make_plan
from ..config import LearnerSettings, Section, load
from ..errors import SettingsError
from ..robots import registry
from ..runtime.checkpoint import Checkpoint, Counters, read_checkpoint, write_checkpoint
from ..runtime.modes import run_robot
from ..runtime.replay import ReplayLayout, ReplayTable, ReplayWriter
from ..runtime.request import Request
from ..runtime.sources import Source, open_source
from ..types import EpisodeEnd, Observation, Step, TaskSpec

__all__ = ["AgentContract"]

HW = (24, 32)
SPEC = TaskSpec(
    name="contract",
    robot="none",
    cycle_ns=40_000_000,
    frames=2,
    camera_hw=HW,
    camera_fps=25.0,
    image_hw=HW,
    proprio_names=("p0", "p1", "p2"),
    action_names=("a0", "a1"),
    max_steps=20,
    sensor_window=1,
)
CPU = torch.device("cpu")
EPISODE = 20  # steps
VERSION = (1, 0)
COUNTERS = Counters(
    updates=0, env_steps=0, epoch=1, published=0, published_ns=0, rate_ns=0, rollbacks=0, rng={}, extra={}
)


class AgentContract:
    """Inherit it and name the algorithm; every method is a test."""

    algorithm: str  # a registered name, or "module:attribute"
    small: ClassVar[Mapping[str, Any]] = {}  # settings of the section `agent` that make it small
    steps = 200  # of a whole run, enough for an update

    # What it says of itself.

    def test_its_settings_and_presets_load(self) -> None:
        algorithm = self._algorithm
        assert issubclass(algorithm.settings_type, Section)
        assert algorithm.presets, "there must be at least one preset"
        for tree in (*algorithm.presets.values(), *algorithm.profiles.values()):
            kept = {name: part for name, part in tree.items() if name != "task"}
            needs = algorithm.needs(SPEC, load({"agent": algorithm.settings_type}, presets=[kept]).agent)
            assert isinstance(needs, Needs)
            assert needs.lookahead >= 1
            assert needs.window.in_hw == SPEC.image_hw

    # Its policy.

    def test_its_policy_acts_within_bounds_and_says_what_was_promised(self) -> None:
        settings, needs = self._parts()
        policy = self._algorithm.build_actor(SPEC, settings)
        actor = TorchActor(FixedPolicy(module=policy), SPEC, needs, np.random.default_rng(0), steps_done=1 << 40)
        for observation in _observations(20, seed=1):
            action = actor.act(observation)
            assert action.values.shape == (SPEC.action_dim,)
            assert action.values.dtype == action.extras.dtype == np.float32
            assert np.abs(action.values).max() <= 1.0
            assert action.extras.shape == (needs.extras,), "Needs.extras and the policy disagree"
            assert np.isfinite(action.extras).all()

    def test_without_noise_it_repeats_itself_and_travels_flat(self) -> None:
        settings, needs = self._parts()
        policy = self._learner(1).policy()
        flat = flatten_policy(policy)
        assert flat.size == policy_size(self._algorithm.build_actor(SPEC, settings))
        copy = bind_policy(self._algorithm.build_actor(SPEC, settings), flat.copy())
        actors = [
            TorchActor(FixedPolicy(module=module), SPEC, needs, np.random.default_rng(seed), deterministic=True)
            for seed, module in enumerate((policy, policy, copy))
        ]
        for observation in _observations(5, seed=2):
            first, second, third = (actor.act(observation).values for actor in actors)
            assert first.tolist() == second.tolist()
            assert third == pytest.approx(first, abs=1e-6)

    def test_it_acts_by_a_plan_as_its_network_says(self) -> None:
        _, needs = self._parts()
        policy, rng = self._learner(1).policy(), np.random.default_rng(0)
        plan = make_plan(policy, needs.window.out_hw)
        if plan is None:
            pytest.skip("its network is none that a plan covers")
        (top, left), (height, width) = needs.window.centre, needs.window.out_hw
        for observation in _observations(5, seed=4):
            images = [image[top : top + height, left : left + width] for image in observation.images]
            noise = rng.standard_normal(SPEC.action_dim, np.float32)
            given = (torch.from_numpy(array[None]) for array in (np.stack(images), observation.proprio, noise))
            with torch.inference_mode():
                expected = policy(*given)
            for ours, theirs in zip(plan(images, observation.proprio, noise), expected, strict=True):
                assert ours.dtype == np.float32
                assert ours == pytest.approx(theirs[0].numpy(), abs=1e-5)

    # Its learner.

    def test_an_update_changes_the_policy_and_tells_finite_figures(self) -> None:
        learner = self._learner(1)
        assert not learner.metrics(), "there are no figures before the first update"
        before = flatten_policy(learner.policy()).copy()
        self._teach(learner, self._experience(learner, seed=3), updates=4)
        assert not np.array_equal(before, flatten_policy(learner.policy()))
        assert np.isfinite(flatten_policy(learner.policy())).all()
        figures = learner.metrics()
        assert figures
        assert all(isinstance(name, str) and math.isfinite(value) for name, value in figures.items())

    def test_a_seed_determines_it(self) -> None:
        first, second, other = (self._learner(seed) for seed in (1, 1, 2))
        source = [self._experience(first, seed=3) for _ in range(3)]
        for learner, own in zip((first, second, other), source, strict=True):
            self._teach(learner, own, updates=2)
        assert _equal(first.state(), second.state())
        assert not _equal(first.state(), other.state())

    def test_it_goes_on_exactly_from_a_checkpoint(self, tmp_path: Path) -> None:
        learner, heir = self._learner(1), self._learner(2)
        self._teach(learner, self._experience(learner, seed=3), updates=2)
        write_checkpoint(tmp_path, Checkpoint(tensors=learner.state(), counters=COUNTERS))
        heir.load_state(read_checkpoint(next(tmp_path.iterdir())).tensors)
        sources = [self._experience(learner, seed=4) for _ in range(2)]
        for each, source in zip((learner, heir), sources, strict=True):
            self._teach(each, source, updates=2)
        assert _equal(learner.state(), heir.state())

    def test_its_state_is_a_copy_with_the_policy_in_it(self) -> None:
        settings, _ = self._parts()
        learner = self._learner(1)
        state = learner.state()
        kept = {name: tensor.clone() for name, tensor in state.items()}
        self._teach(learner, self._experience(learner, seed=3), updates=2)
        assert _equal(state, kept), "a state must not change with the learner"
        policy = policy_from_state(self._algorithm.build_actor(SPEC, settings), learner.state())
        assert flatten_policy(policy).tolist() == flatten_policy(learner.policy()).tolist()

    def test_a_state_of_another_task_is_refused(self) -> None:
        settings, _ = self._parts()
        wider = TaskSpec(
            **{name: getattr(SPEC, name) for name in TaskSpec.__dataclass_fields__ if name != "proprio_names"},
            proprio_names=("p0", "p1", "p2", "p3"),
        )
        other = self._algorithm.build_learner(wider, settings, seed=1, device=CPU)
        with pytest.raises(SettingsError):
            self._learner(1).load_state(other.state())

    # In a run.

    def test_a_run_in_virtual_time_is_repeated_by_its_seed(self, tmp_path: Path) -> None:
        first, second = (self._run(tmp_path / name) for name in ("first", "second"))
        assert first["updates"] > 0, "not a single update in a run"
        assert first["policy_version"][1] > 0, "no policy of the learner ever acted"
        assert (first["returns"], first["updates"]) == (second["returns"], second["updates"])

    # How.

    @property
    def _algorithm(self) -> Algorithm[Any]:
        found: Algorithm[Any] = registry.algorithm(self.algorithm)
        return found

    def _parts(self) -> tuple[Any, Needs]:
        algorithm = self._algorithm
        settings = load({"agent": algorithm.settings_type}, presets=[{"agent": dict(self.small)}]).agent
        return settings, algorithm.needs(SPEC, settings)

    def _learner(self, seed: int) -> Learner:
        settings, _ = self._parts()
        torch.set_num_threads(1)
        return self._algorithm.build_learner(SPEC, settings, seed=seed, device=CPU)

    def _experience(self, learner: Learner, seed: int) -> Source:
        """Enough episodes for an update, acted by the learner's policy, and the way to draw from them."""
        _, needs = self._parts()
        steps = needs.memory.size if isinstance(needs.memory, Minibatches) else needs.memory.steps
        layout = ReplayLayout.for_task(
            SPEC, capacity=4 * (steps + EPISODE), lookahead=needs.lookahead, extras_dim=needs.extras
        )
        table = ReplayTable(layout)
        writer, source = ReplayWriter(table), open_source(table, needs, LearnerSettings())
        actor = TorchActor(
            FixedPolicy(module=learner.policy(), version=VERSION),
            SPEC,
            needs,
            np.random.default_rng(seed),
            steps_done=1 << 40,
        )
        rng = np.random.default_rng(seed)
        seen = _observations(2 * steps + 2 * EPISODE, seed)
        for episode in itertools.count():
            if writer.env_steps >= steps + EPISODE:
                return source
            for index, observation in enumerate(itertools.islice(seen, EPISODE)):
                action = actor.act(observation)
                step = Step(
                    episode=episode,
                    index=index,
                    frame_ids=observation.frame_ids,
                    proprio=observation.proprio,
                    action=action.values,
                    reward=float(rng.standard_normal()),
                    terminated=False,
                    truncated=index == EPISODE - 1,
                    extras=action.extras,
                    policy_version=action.policy_version,
                    observed_ns=0,
                    acted_ns=0,
                )
                images = dict(zip(observation.frame_ids, observation.images, strict=True))
                source.memory.apply(writer.append(step, images))
            last = next(seen)
            end = EpisodeEnd(
                episode=episode,
                length=EPISODE,
                frame_ids=last.frame_ids,
                proprio=last.proprio,
                return_=0.0,
                terminated=False,
                success=False,
                reason="time limit",
                observed_ns=0,
            )
            source.memory.apply(writer.close_episode(end, dict(zip(last.frame_ids, last.images, strict=True))))
        raise AssertionError("never reached")

    def _teach(self, learner: Learner, source: Source, updates: int) -> None:
        """Updates from a source: all of them for minibatches, one for rollouts, as the new policy has not acted yet."""
        rng = np.random.default_rng(5)
        for _ in range(1 if source.between_episodes else updates):
            learner.update(source.draw(VERSION, rng))

    def _run(self, folder: Path) -> dict[str, Any]:
        sizes = ("task.camera_height=24", "task.camera_width=32", "task.image_height=24", "task.image_width=32")
        agent = [f"agent.{name}={_toml(value)}" for name, value in self.small.items()]
        result = run_robot(
            Request(
                task="track",
                algorithm=self.algorithm,
                preset=next(iter(self._algorithm.presets)),
                clock="virtual",
                environment={},
                assignments=(*sizes, "task.episode_steps=20", "learner.threads=1", "replay.capacity=1024", *agent),
                overrides={"run.steps": self.steps, "run.seed": 1, "run.folder": str(folder)},
            )
        )
        assert result.exit_code == 0, result.error
        summary: dict[str, Any] = result.summary
        return summary


def _observations(count: int, seed: int) -> Any:
    """Random ones; consecutive ones share a frame, as a camera's do."""
    rng = np.random.default_rng(seed)
    before = rng.integers(0, 256, (*HW, 3)).astype(np.uint8)
    for number in range(1, count + 1):
        newest = rng.integers(0, 256, (*HW, 3)).astype(np.uint8)
        yield Observation(
            frame_ids=(number - 1, number),
            images=(before, newest),
            proprio=rng.uniform(-1, 1, SPEC.proprio_dim).astype(np.float32),
            now_ns=number,
        )
        before = newest


def _equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _toml(value: Any) -> str:
    return (
        str(list(value))
        if isinstance(value, tuple | list)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )
