"""The actor: warm-up, noise, cropping, and policies that are views of flat buffers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from relod.algos.agent import (
    FixedPolicy,
    Minibatches,
    Needs,
    TorchActor,
    bind_policy,
    flatten_policy,
    policy_from_state,
    policy_size,
)
from relod.algos.batch import Window, centre_window, crop_window
from relod.algos.sac import SAC, SacSettings
from relod.errors import SettingsError
from relod.types import Observation, TaskSpec

HW = (20, 24)
SPEC = TaskSpec(
    name="small",
    robot="none",
    cycle_ns=45_000_000,
    frames=2,
    camera_hw=HW,
    camera_fps=30.0,
    image_hw=HW,
    proprio_names=("p",),
    action_names=("a0", "a1"),
    max_steps=100,
    sensor_window=1,
)
SETTINGS = SacSettings(conv_channels=4, conv_strides=(2, 1), hidden=(16,), shift_px=1)


NOISE_SCALE = 8.0


class Echo(nn.Module):
    """Shows what it was given: the corner pixel of the newest frame and the noise, in [-1, 1]."""

    def forward(self, images, proprio, noise):
        self.shape = tuple(images.shape)
        return torch.stack([images[:, -1, 0, 0, 0].float() / 256, noise[:, 0] / NOISE_SCALE], -1), proprio


def make_needs(window: Window, init_steps: int = 0, init_hold: int = 1, noise_cycles: float = 0.0) -> Needs:
    return Needs(
        memory=Minibatches(size=4, n_step=1, gamma=0.9, update_after=init_steps, max_updates_per_step=1.0),
        window=window,
        extras=1,
        init_steps=init_steps,
        init_hold=init_hold,
        noise_cycles=noise_cycles,
    )


def make_actor(module: nn.Module | None = None, **kwargs) -> TorchActor:
    needs = kwargs.pop("needs", make_needs(centre_window(HW)))
    source = FixedPolicy(module=module or Echo(), version=kwargs.pop("version", (1, 7)))
    return TorchActor(source, SPEC, needs, np.random.default_rng(kwargs.pop("seed", 0)), **kwargs)


def observe(value: int = 5) -> Observation:
    image = np.arange(HW[0] * HW[1] * 3, dtype=np.uint32).reshape(*HW, 3).astype(np.uint8)
    image[0, 0, 0] = value
    return Observation(frame_ids=(1, 2), images=(image, image), proprio=np.array([0.5], np.float32), now_ns=0)


def test_warm_up_is_uniform_held_and_ends_after_its_steps():
    actor = make_actor(needs=make_needs(centre_window(HW), init_steps=600, init_hold=3))
    actions = [actor.act(observe()) for _ in range(601)]
    values = np.array([action.values for action in actions[:600]])
    assert np.array_equal(values[0::3], values[2::3])
    assert not np.array_equal(values[0], values[3])
    assert values.min() < -0.95
    assert values.max() > 0.95
    assert {action.policy_version for action in actions[:600]} == {(0, 0)}
    assert actions[600].policy_version == (1, 7)
    assert actions[600].values[0] == 5 / 256


def test_steps_done_before_count_as_warm_up():
    actor = make_actor(needs=make_needs(centre_window(HW), init_steps=10), steps_done=10)
    assert actor.act(observe()).policy_version == (1, 7)


def test_without_any_policy_actions_stay_random():
    action = make_actor(version=(0, 0)).act(observe())
    assert np.abs(action.values).max() <= 1.0
    assert action.policy_version == (0, 0)


def test_noise_comes_from_the_generator_and_not_at_all_when_deterministic():
    same = [make_actor(seed=3).act(observe()).values[1] for _ in range(2)]
    assert same[0] == same[1] == np.random.default_rng(3).standard_normal(2, np.float32)[0] / NOISE_SCALE
    assert make_actor(deterministic=True).act(observe()).values[1] == 0.0


@pytest.mark.parametrize("cycles", [0.0, 10.0])
def test_noise_is_standard_normal_and_remembers_for_as_long_as_asked(cycles):
    actor = make_actor(needs=make_needs(centre_window(HW), noise_cycles=cycles))
    noise = NOISE_SCALE * np.array([actor.act(observe()).values[1] for _ in range(20_000)])
    assert abs(noise.mean()) < 0.15
    assert abs(noise.std() - 1.0) < 0.1
    wanted = np.exp(-1 / cycles) if cycles else 0.0
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1] - wanted) < 0.03


@pytest.mark.parametrize("acted", [0, 2, 9])
def test_an_actor_goes_on_from_its_state_exactly(acted):
    needs = make_needs(centre_window(HW), init_steps=5, init_hold=3, noise_cycles=4.0)
    actor, other = (make_actor(needs=needs, seed=seed) for seed in (1, 2))
    for _ in range(acted):
        actor.act(observe())
    other.load_state(json.loads(json.dumps(actor.state())))
    for _ in range(12):
        one, same = actor.act(observe()), other.act(observe())
        assert one.values.tobytes() == same.values.tobytes()
        assert one.policy_version == same.policy_version


def test_extras_are_handed_through():
    assert make_actor().act(observe()).extras.tolist() == [0.5]


def test_the_actor_cuts_the_windows_centre():
    echo = Echo()
    make_actor(echo, needs=make_needs(crop_window(HW, 0.1))).act(observe())
    assert echo.shape == (1, 2, 16, 20, 3)


def test_a_bound_policy_follows_its_buffer_and_acts_the_same():
    torch.manual_seed(0)
    policy = SAC.build_actor(SPEC, SETTINGS)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    flat = np.zeros(policy_size(policy), np.float32)
    bound = bind_policy(SAC.build_actor(SPEC, SETTINGS), flat)
    flat[:] = flatten_policy(policy)
    needs = SAC.needs(SPEC, SETTINGS)
    actors = [make_actor(module, needs=needs, deterministic=True) for module in (policy, bound)]
    expected, got = (actor.act(observe()).values for actor in actors)
    assert np.allclose(expected, got, atol=1e-6)
    assert np.abs(expected).max() > 0
    assert np.array_equal(flatten_policy(bound), flat)


def test_a_policy_of_another_size_is_refused():
    policy = SAC.build_actor(SPEC, SETTINGS)
    with pytest.raises(SettingsError, match="does not fit"):
        bind_policy(policy, np.zeros(3, np.float32))
    with pytest.raises(SettingsError, match="another network"):
        policy_from_state(policy, {"policy.other": torch.zeros(1)})


def test_a_learners_state_contains_its_policy():
    learner = SAC.build_learner(SPEC, SETTINGS, seed=0, device=torch.device("cpu"))
    policy = policy_from_state(SAC.build_actor(SPEC, SETTINGS), learner.state())
    assert np.array_equal(flatten_policy(policy), flatten_policy(learner.policy()))
