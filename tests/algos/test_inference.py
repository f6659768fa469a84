"""Plans against the networks that define them, policies that change under them, and networks that they do not cover."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from relod.algos.agent import FixedPolicy, TorchActor, bind_policy, flatten_policy, policy_size
from relod.algos.inference import Plans, make_plan
from relod.algos.ppo import PPO
from relod.algos.sac import SAC
from relod.config import load
from relod.runtime.policy import PolicyBox, PolicyReader, PolicyWriter
from relod.types import Observation, TaskSpec

TOLERANCE = 1e-5  # of actions in [-1, 1]
SMALL = {"conv_channels": 4, "conv_strides": (2, 1), "hidden": (16,)}


def make_spec(hw, frames=3, actions=2) -> TaskSpec:
    return TaskSpec(
        name="small",
        robot="none",
        cycle_ns=45_000_000,
        frames=frames,
        camera_hw=hw,
        camera_fps=30.0,
        image_hw=hw,
        proprio_names=tuple(f"p{number}" for number in range(7)),
        action_names=tuple(f"a{number}" for number in range(actions)),
        max_steps=100,
        sensor_window=1,
    )


def settings_of(algorithm, preset, **changes):
    agent = {**algorithm.presets[preset].get("agent", {}), **changes}
    return load({"agent": algorithm.settings_type}, presets=[{"agent": agent}]).agent


def stir(policy: nn.Module, seed: int, by: float = 0.05) -> nn.Module:
    """Weights and biases as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return policy


def draw(spec, hw, rng):
    """Images, proprioception and noise."""
    images = [rng.integers(0, 256, (*hw, 3), dtype=np.uint8) for _ in range(spec.frames)]
    return images, rng.standard_normal(spec.proprio_dim, np.float32), rng.standard_normal(spec.action_dim, np.float32)


def call(policy, images, proprio, noise):
    with torch.inference_mode():
        found = policy(*(torch.from_numpy(array[None]) for array in (np.stack(images), proprio, noise)))
    return tuple(tensor[0].numpy() for tensor in found)


def assert_same(plan, policy, given, tolerance=TOLERANCE):
    for ours, theirs in zip(plan(*given), call(policy, *given), strict=True):
        assert ours.dtype == np.float32
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max(initial=0.0) < tolerance * max(1.0, np.abs(theirs).max(initial=0.0))


@pytest.mark.parametrize("hw", [(48, 64), (120, 160), (90, 160)])
@pytest.mark.parametrize(
    ("algorithm", "preset"), [(a, preset) for a in (SAC, PPO) for preset in a.presets], ids=lambda x: str(x)[:9]
)
def test_a_plan_acts_as_its_network_with_every_preset_and_size(algorithm, preset, hw):
    spec, settings = make_spec(hw), settings_of(algorithm, preset)
    out_hw, rng = algorithm.needs(spec, settings).window.out_hw, np.random.default_rng(0)
    torch.manual_seed(0)
    policy = algorithm.build_actor(spec, settings)
    plan = make_plan(policy, out_hw)
    assert plan is not None
    for seed in range(2):
        plan.load(stir(policy, seed))
        for _ in range(2):
            assert_same(plan, policy, draw(spec, out_hw, rng))


@pytest.mark.parametrize(
    ("hw", "strides", "frames"),
    [
        ((9, 9), (1,), 1),
        ((9, 8), (2,), 2),
        ((21, 17), (3, 2), 1),
        ((23, 30), (1, 2, 1), 2),
        ((31, 44), (4, 3), 1),
        ((23, 26), (2, 2, 1), 4),
        ((33, 26), (5,), 2),
    ],
)
@pytest.mark.parametrize("by_state", [False, True])
def test_any_strides_and_odd_sizes(hw, strides, frames, by_state):
    spec = make_spec(hw, frames=frames, actions=3)
    settings = settings_of(
        PPO, "ppo", **SMALL | {"conv_strides": strides}, augment="none", std_by_state=by_state, last_scale=1.0
    )
    policy = stir(PPO.build_actor(spec, settings), 1, by=0.2)
    plan, rng = make_plan(policy, hw), np.random.default_rng(1)
    for _ in range(3):
        assert_same(plan, policy, draw(spec, hw, rng))


def test_a_task_without_images_has_a_plan_too():
    spec = make_spec((1, 1), frames=1)
    policy = stir(SAC.build_actor(spec, settings_of(SAC, "sac-lite", augment="none")), 0)
    assert_same(make_plan(policy, (1, 1)), policy, draw(spec, (1, 1), np.random.default_rng(0)))


def test_what_a_plan_returned_stays_and_repeats_bit_by_bit():
    spec, settings = make_spec((24, 32)), settings_of(PPO, "ppo", **SMALL)
    plan = make_plan(PPO.build_actor(spec, settings), (24, 32))
    given, other = (draw(spec, (24, 32), np.random.default_rng(seed)) for seed in (0, 1))
    first = plan(*given)
    kept = [array.tobytes() for array in first]
    plan(*other)
    assert [array.tobytes() for array in first] == kept
    assert [array.tobytes() for array in plan(*given)] == kept


def test_an_actor_follows_the_policies_of_a_box():
    spec, settings = make_spec((24, 32)), settings_of(SAC, "sac-lite", **SMALL)
    needs = SAC.needs(spec, settings)
    rng = np.random.default_rng(0)
    images, proprio, _ = draw(spec, (24, 32), rng)
    seen = Observation(frame_ids=(0, 1, 2), images=tuple(images), proprio=proprio, now_ns=0)
    policy = SAC.build_actor(spec, settings)
    box = PolicyBox(policy_size(policy))
    writer = PolicyWriter(box)
    reader = PolicyReader(box, lambda flat: bind_policy(SAC.build_actor(spec, settings), flat))
    actor = TorchActor(reader, spec, needs, rng, deterministic=True)
    (top, left), (height, width) = needs.window.centre, needs.window.out_hw
    windows = [image[top : top + height, left : left + width] for image in images]
    acted = []
    for updates in range(1, 8):  # each of the three buffers twice at least
        writer.publish(flatten_policy(stir(policy, updates)), (1, updates))
        before = actor.act(seen)
        assert before.policy_version == (1 if updates > 1 else 0, updates - 1)
        if acted:
            assert before.values.tobytes() == acted[-1].tobytes(), "acted by a policy it had not taken"
        assert reader.poll()
        action = actor.act(seen)
        assert action.policy_version == (1, updates)
        expected, _ = call(policy, windows, proprio, np.zeros(2, np.float32))
        assert np.abs(action.values - expected).max() < TOLERANCE
        acted.append(action.values)
    assert all(np.abs(one - other).max() > 1e-4 for one, other in pairwise(acted))


class Doubled(nn.Linear):
    """A layer that is not what it seems."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_networks_that_plans_do_not_cover_are_called_themselves():
    spec, settings = make_spec((24, 32)), settings_of(SAC, "sac-lite", **SMALL)

    def build():
        return SAC.build_actor(spec, settings)

    strange, half, plain = build(), build().double(), nn.Module()
    strange.head[-1] = Doubled(16, 4)
    unbiased = build()
    unbiased.head[0] = nn.Linear(unbiased.feature_dim, 16, bias=False)
    headless = build()
    headless.head = nn.Sequential(nn.ReLU())
    for module in (strange, half, plain, unbiased, headless):
        assert make_plan(module, (24, 32)) is None
    plans = Plans((24, 32))
    assert plans.follow(strange, (1, 0)) is None
    assert plans.follow(strange, (1, 1)) is None
    rng = np.random.default_rng(0)
    images, proprio, noise = draw(spec, (24, 32), rng)
    seen = Observation(frame_ids=(0, 1, 2), images=tuple(images), proprio=proprio, now_ns=0)
    needs = SAC.needs(spec, settings)
    assert needs.window.out_hw == (24, 32)
    actor = TorchActor(FixedPolicy(module=strange), spec, needs, rng, deterministic=True)
    expected, _ = call(strange, images, proprio, 0 * noise)
    assert np.array_equal(actor.act(seen).values, actor.act(seen).values)
    assert actor.act(seen).values == pytest.approx(expected, abs=1e-6)
