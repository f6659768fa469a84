"""PPO: advantages, densities and gradients against independent computations, and that it learns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relod.algos.agent import FixedPolicy, Rollouts, TorchActor
from relod.algos.batch import Rollout
from relod.algos.ppo import PPO, PpoLearner, PpoSettings, advantages, divergence, log_density
from relod.config import load
from relod.errors import SettingsError
from relod.types import Observation, TaskSpec

HW = (20, 24)
SPEC = TaskSpec(
    name="small",
    robot="none",
    cycle_ns=45_000_000,
    frames=2,
    camera_hw=HW,
    camera_fps=20.0,
    image_hw=HW,
    proprio_names=("p", "q"),
    action_names=("a", "b"),
    max_steps=100,
    sensor_window=1,
)
SMALL = {"conv_channels": 4, "conv_strides": (2, 1), "hidden": (16,), "minibatch": 8, "shift_px": 1}
CPU = torch.device("cpu")


def make_settings(**changes) -> PpoSettings:
    return PpoSettings(**{**SMALL, **changes})


def make_learner(settings: PpoSettings | None = None, seed: int = 0) -> PpoLearner:
    return PPO.build_learner(SPEC, settings or make_settings(), seed=seed, device=CPU)


class Scene:
    """Observations whose images say little and whose vector says all."""

    def __init__(self, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.images = rng.integers(0, 256, (count, SPEC.frames, *HW, 3)).astype(np.uint8)
        self.proprio = rng.uniform(-1, 1, (count, SPEC.proprio_dim)).astype(np.float32)

    def look(self, observations, corners=None):
        images = self.images[observations]
        if corners is None:
            return images
        padded = np.pad(images, ((0, 0), (0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
        places = [(y + 4, x + 4) for y, x in corners]
        return np.stack([p[:, y : y + HW[0], x : x + HW[1]] for p, (y, x) in zip(padded, places, strict=True)])


def make_rollout(
    learner: PpoLearner, lengths: tuple[int, ...], *, earlier: int = 0, reward=None, seed: int = 0
) -> Rollout:
    """Episodes of these lengths, acted by the learner's policy, the first so many with other densities."""
    steps = sum(lengths)
    scene = Scene(steps + len(lengths), seed)
    rng = np.random.default_rng(seed + 1)
    with torch.no_grad():
        noise = torch.from_numpy(rng.standard_normal((steps, SPEC.action_dim)).astype(np.float32))
        images, proprio = torch.from_numpy(scene.look(np.arange(steps))), torch.from_numpy(scene.proprio[:steps])
        actions, extras = (out.numpy() for out in learner.policy()(images, proprio, noise))
    rewards = rng.standard_normal(steps) if reward is None else reward(scene.proprio[:steps], actions)
    ends = np.zeros(steps, bool)
    ends[np.cumsum(lengths) - 1] = True
    early = sum(lengths[:earlier])
    extras[:early, -1] += rng.uniform(-1, 1, early)
    return Rollout(
        earlier=early,
        proprio=scene.proprio,
        actions=actions,
        extras=extras,
        rewards=rewards.astype(np.float32),
        terminated=ends & (rng.random(steps) < 0.5),
        ends=ends,
        look=scene.look,
    )


# -- advantages --------------------------------------------------------------------------------------------------------


def slow_advantages(rewards, values, lengths, terminated, trust, gamma, lam):
    """By the definition: an exponentially weighted sum of n-step advantages' one-step errors, episode by episode."""
    found, start = [], 0
    for number, length in enumerate(lengths):
        own = [*values[start : start + length], values[sum(lengths) + number]]
        if terminated[start + length - 1]:
            own[-1] = 0.0
        errors = [rewards[start + t] + gamma * own[t + 1] - own[t] for t in range(length)]
        own_trust = trust[start : start + length]
        for t in range(length):
            terms = [(gamma * lam) ** (k - t) * np.prod(own_trust[t + 1 : k + 1]) * errors[k] for k in range(t, length)]
            found.append(sum(terms))
        start += length
    return np.array(found)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
    gamma=st.floats(0.5, 1.0),
    lam=st.floats(0.0, 1.0),
)
def test_advantages_are_those_of_the_definition(lengths, seed, gamma, lam):
    rng = np.random.default_rng(seed)
    steps = sum(lengths)
    ends = np.zeros(steps, bool)
    ends[np.cumsum(lengths) - 1] = True
    terminated = ends & (rng.random(steps) < 0.5)
    rewards, values = rng.standard_normal(steps), rng.standard_normal(steps + len(lengths))
    trust = np.where(rng.random(steps) < 0.5, 1.0, rng.random(steps))
    rollout = Rollout(
        proprio=np.zeros((steps + len(lengths), 1), np.float32),
        actions=np.zeros((steps, 1), np.float32),
        extras=np.zeros((steps, 2), np.float32),
        rewards=rewards,
        terminated=terminated,
        ends=ends,
        look=lambda observations, corners=None: None,
    )
    found = advantages(
        rewards, values, rollout.successors(), terminated, ends, trust=trust, gamma=gamma, gae_lambda=lam
    )
    assert found == pytest.approx(slow_advantages(rewards, values, lengths, terminated, trust, gamma, lam), abs=1e-4)


# -- the policy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_state", [False, True])
def test_what_the_actor_says_of_an_action_is_what_the_learner_computes(by_state):
    learner = make_learner(make_settings(std_by_state=by_state, last_scale=1.0))
    needs = PPO.needs(SPEC, make_settings())
    actor = TorchActor(FixedPolicy(module=learner.policy()), SPEC, needs, np.random.default_rng(3))
    scene = Scene(1, 5)
    seen = Observation(frame_ids=(1, 2), images=tuple(scene.images[0]), proprio=scene.proprio[0], now_ns=0)
    action = actor.act(seen)
    drawn, density = torch.from_numpy(action.extras[:2]), action.extras[2]
    assert action.values.tolist() == pytest.approx(drawn.clamp(-1, 1).tolist())
    with torch.no_grad():
        policy = learner.policy()
        features = policy.features(torch.from_numpy(scene.images), torch.from_numpy(scene.proprio))
        mean, log_std = policy.distribution(features)
    normal = torch.distributions.Normal(mean.double(), log_std.detach().double().exp())
    assert density == pytest.approx(float(normal.log_prob(drawn.double()).sum()), abs=1e-4)
    assert needs.extras == len(action.extras)
    assert isinstance(needs.memory, Rollouts)


def test_densities_and_divergences_are_torchs():
    torch.manual_seed(0)
    old, new = ((torch.randn(7, 3), 0.5 * torch.randn(7, 3)) for _ in range(2))
    drawn = torch.randn(7, 3)
    first, second = (torch.distributions.Normal(mean, log_std.exp()) for mean, log_std in (old, new))
    assert log_density(drawn, old).tolist() == pytest.approx(first.log_prob(drawn).sum(-1).tolist(), abs=1e-4)
    expected = torch.distributions.kl_divergence(first, second).sum(-1)
    assert divergence(old, new).tolist() == pytest.approx(expected.tolist(), abs=1e-3)


# -- the update --------------------------------------------------------------------------------------------------------


def reference_gradient(learner: PpoLearner, rollout: Rollout, settings: PpoSettings) -> dict[str, torch.Tensor]:
    """Of the loss over a whole rollout, written down once more, in float64."""
    policy, value = learner.policy().double(), learner._value.double()
    policy.encoder.grid = policy.encoder.grid.double()
    steps = len(rollout.rewards)
    images = torch.from_numpy(rollout.look(np.arange(len(rollout.proprio))))

    def features(count):
        found = torch.cat([where(images[:count]), torch.from_numpy(rollout.proprio[:count]).double()], -1)
        return found

    def where(pixels):  # the encoder's convolutions in float64
        stacked = pixels.permute(0, 1, 4, 2, 3).reshape(len(pixels), -1, *HW).double() / 255 - 0.5
        first = policy.encoder.first
        maps = policy.encoder.rest[0](torch.relu(torch.nn.functional.conv2d(stacked, first.weight, first.bias, 2)))
        soft = maps.flatten(2).softmax(-1)
        place = torch.einsum("bcp,gp->bcg", soft, policy.encoder.grid).flatten(1)
        return torch.cat([place, torch.tanh(maps.amax((2, 3)) / 4)], -1)

    with torch.no_grad():
        values = value(features(len(rollout.proprio))).squeeze(-1).numpy()
    seen = features(steps)
    mean, log_std = policy.distribution(seen)
    drawn, said = torch.from_numpy(rollout.extras[:, :2]).double(), torch.from_numpy(rollout.extras[:, 2]).double()
    density = torch.distributions.Normal(mean, log_std.exp()).log_prob(drawn).sum(-1)
    mine = torch.arange(steps) >= rollout.earlier
    trust = torch.where(mine, 1.0, (density - said).exp().clamp(max=1)).detach()
    lengths = np.diff([-1, *np.flatnonzero(rollout.ends)])
    gains = slow_advantages(
        rollout.rewards, values, lengths, rollout.terminated, trust.numpy(), settings.gamma, settings.gae_lambda
    )
    targets = trust * torch.from_numpy(gains) + torch.from_numpy(values[:steps])
    gains = torch.from_numpy((gains - gains.mean()) / gains.std())
    ratio = (density - torch.where(mine, said, density.detach())).exp()
    surrogate = trust * torch.minimum(ratio * gains, ratio.clamp(1 - settings.clip, 1 + settings.clip) * gains)
    loss = -surrogate.mean() + settings.value_weight * 0.5 * (value(seen).squeeze(-1) - targets).square().mean()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}


@pytest.mark.parametrize("earlier", [0, 2])
def test_the_gradient_is_that_of_the_loss_written_down_once_more(earlier):
    settings = make_settings(
        minibatch=100,
        epochs=1,
        regularise=0.0,
        grad_clip=0.0,
        scale_rewards=False,
        layer_norm=False,
        last_scale=1.0,
    )
    learner, twin = make_learner(settings), make_learner(settings)
    rollout = make_rollout(learner, (5, 9, 3), earlier=earlier)
    learner._optimizer.step = lambda: None  # leave the weights; the gradients stay
    learner.update(rollout)
    found = {name: parameter.grad for name, parameter in learner.policy().named_parameters()}
    expected = reference_gradient(twin, rollout, settings)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name].double(), gradient, rtol=1e-3, atol=1e-5), name
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())


def test_before_anything_is_learned_the_ratio_is_one():
    learner = make_learner(make_settings(epochs=1, minibatch=100, last_scale=1.0))
    learner.update(make_rollout(learner, (20, 12)))
    metrics = learner.metrics()
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["clipped"] == 0
    augmented = make_learner(make_settings(epochs=1, minibatch=100, last_scale=1.0, augment_ratio=True))
    augmented.update(make_rollout(augmented, (20, 12)))
    assert augmented.metrics()["kl"] > 1e-5


def test_earlier_steps_count_as_far_as_the_policy_would_do_them():
    learner = make_learner(make_settings(epochs=1, minibatch=100, last_scale=1.0))
    learner.update(make_rollout(learner, (20, 12)))
    assert learner.metrics()["trust"] == 1
    rollout = make_rollout(learner, (20, 12), earlier=1)
    rollout.extras[:20, -1] += 50  # they were as good as certain then, and are not now
    learner.update(rollout)
    assert learner.metrics()["trust"] == pytest.approx(12 / 32)
    assert learner.metrics()["kl"] == pytest.approx(0.0, abs=1e-5)


def test_epochs_end_when_the_policy_has_moved_enough():
    def epochs(target_kl: float) -> float:
        learner = make_learner(make_settings(epochs=20, target_kl=target_kl, actor_lr=3e-2))
        learner.update(make_rollout(learner, (40, 24)))
        return learner.metrics()["epochs"]

    assert epochs(0.0) == 20
    assert epochs(1e-4) < 5


def test_every_step_is_used_once_an_epoch():
    learner = make_learner(make_settings(minibatch=8))
    parts = list(learner._minibatches(30))
    assert sorted(np.concatenate(parts).tolist()) == list(range(30))
    assert {len(part) for part in parts} == {7, 8}


def test_it_learns_which_action_pays():
    learner = make_learner(make_settings(minibatch=32, actor_lr=3e-3, critic_lr=3e-3, gamma=0.1))
    earned = []
    for round_ in range(15):
        rollout = make_rollout(
            learner, (64, 64), seed=round_, reward=lambda proprio, actions: -np.abs(actions - 0.7).sum(-1)
        )
        earned.append(float(rollout.rewards.mean()))
        learner.update(rollout)
    assert earned[-1] > earned[0] + 0.4


def test_the_policy_alone_need_not_reach_the_encoder():
    settings = make_settings(policy_trains_encoder=False, value_weight=1e-12, regularise=0.0, grad_clip=0.0, epochs=1)
    learner = make_learner(settings)
    before = learner.policy().encoder.first.weight.detach().clone()
    gradients = []
    learner._optimizer.step = lambda: gradients.append(learner.policy().encoder.first.weight.grad.abs().max())
    learner.update(make_rollout(learner, (20, 12)))
    assert max(gradients) < 1e-9
    assert torch.equal(before, learner.policy().encoder.first.weight)


def test_rewards_are_scaled_by_the_spread_of_all_returns():
    learner = make_learner(make_settings(gamma=0.5))
    first, second = (make_rollout(learner, (3, 2), seed=seed) for seed in (1, 2))
    returns = []
    for rollout in (first, second):
        scale = learner._reward_scale(rollout)
        running = 0.0
        for reward, end in zip(rollout.rewards, rollout.ends, strict=True):
            returns.append(running := reward + 0.5 * running)
            running = 0.0 if end else running
        assert scale == pytest.approx(1 / np.std(returns), rel=1e-5)
    before = learner._returns.tolist()
    learner._reward_scale(make_rollout(learner, (3, 2), earlier=1, seed=3))
    assert learner._returns[0] == before[0] + 2, "an earlier policy's were counted when they were new"


# -- state -------------------------------------------------------------------------------------------------------------


def test_a_learner_goes_on_exactly():
    learner, other = make_learner(seed=1), make_learner(seed=2)
    learner.update(make_rollout(learner, (20, 12)))
    other.load_state(learner.state())
    rollout = make_rollout(learner, (15, 15), seed=4)
    learner.update(rollout)
    other.update(rollout)
    mine, theirs = learner.state(), other.state()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert learner.metrics() == other.metrics()


def test_a_state_of_another_network_is_refused():
    with pytest.raises(SettingsError, match="belongs to another network"):
        make_learner(make_settings(hidden=(8,))).load_state(make_learner().state())


@pytest.mark.parametrize("preset", sorted(PPO.presets))
def test_every_preset_loads_and_makes_an_update(preset):
    tree = {name: part for name, part in PPO.presets[preset].items() if name != "task"}
    settings = load({"agent": PpoSettings}, presets=[tree]).agent
    spec = SPEC
    size = {"image_hw": (48, 64), "camera_hw": (48, 64)}
    spec = TaskSpec(**{name: size.get(name, getattr(SPEC, name)) for name in TaskSpec.__dataclass_fields__})
    actor = PPO.build_actor(spec, settings)
    window = PPO.needs(spec, settings).window
    images = torch.zeros((1, 2, *window.out_hw, 3), dtype=torch.uint8)
    actions, extras = actor(images, torch.zeros(1, 2), torch.zeros(1, 2))
    assert (actions.shape, extras.shape) == ((1, 2), (1, 3))
    assert math.isfinite(float(extras.detach().sum()))
