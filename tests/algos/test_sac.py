"""SAC's targets by hand, where gradients go, and that its state is complete."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
import torch

from relod.algos.agent import flatten_policy
from relod.algos.augment import gather_windows
from relod.algos.batch import Batch, shift_window
from relod.algos.checked import find_algorithm
from relod.algos.sac import SAC, SacSettings
from relod.config import load
from relod.errors import SettingsError
from relod.types import TaskSpec

torch.set_num_threads(1)  # networks of this size are slower on two

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def make_spec(hw: tuple[int, int] = (20, 24)) -> TaskSpec:
    return TaskSpec(
        name="small",
        robot="none",
        cycle_ns=45_000_000,
        frames=3,
        camera_hw=hw,
        camera_fps=30.0,
        image_hw=hw,
        proprio_names=("p0", "p1"),
        action_names=("a0", "a1"),
        max_steps=100,
        sensor_window=1,
    )


def make_settings(**changes: object) -> SacSettings:
    small = {"conv_channels": 8, "conv_strides": (2, 1), "hidden": (32, 32), "batch_size": 4, "shift_px": 1}
    return SacSettings(**{**small, "actor_every": 1, **changes})


def make_batch(size: int = 4, seed: int = 0, hw: tuple[int, int] = (20, 24), **changes: object) -> Batch:
    rng = np.random.default_rng(seed)
    values: dict[str, object] = {
        "images": rng.integers(0, 256, (size, 3, *hw, 3), np.uint8),
        "next_images": rng.integers(0, 256, (size, 3, *hw, 3), np.uint8),
        "proprio": rng.standard_normal((size, 2), np.float32),
        "next_proprio": rng.standard_normal((size, 2), np.float32),
        "actions": rng.uniform(-1, 1, (size, 2)).astype(np.float32),
        "rewards": rng.standard_normal(size, np.float32),
        "discounts": np.full(size, 0.9, np.float32),
    }
    return Batch(**{**values, **changes})


def make_learner(seed: int = 0, **changes: object):
    return SAC.build_learner(make_spec(), make_settings(**changes), seed=seed, device=CPU)


def constant_target_critic(learner, value: float) -> None:
    """Make the target critics say `value` and `value + 1` whatever they see."""
    last = learner._target_critic.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([value, value + 1]).view(2, 1, 1))


def test_targets_of_a_terminated_and_a_truncated_transition():
    learner = make_learner()
    constant_target_critic(learner, -7.0)
    batch = make_batch(
        2,
        rewards=np.array([-1.0, -1.0 - 0.9 - 0.81], np.float32),  # one step; a window of three
        discounts=np.array([0.0, 0.9**3], np.float32),  # terminated; truncated, so bootstrapped
    )
    target = learner.critic_target(batch)
    assert target.tolist() == pytest.approx([-1.0, -2.71 + 0.729 * -7.0])


def test_the_entropy_is_backed_up_only_on_demand():
    plain, backed = (make_learner(backup_entropy=flag, initial_alpha=0.5) for flag in (False, True))
    for learner in (plain, backed):
        constant_target_critic(learner, 0.0)
    batch = make_batch(rewards=np.zeros(4, np.float32))
    features = backed._policy.features(torch.from_numpy(batch.next_images), torch.from_numpy(batch.next_proprio))
    state = backed._generator.get_state()
    _, log_prob = backed._sample(features)
    backed._generator.set_state(state)
    assert plain.critic_target(batch).abs().max() == 0
    assert torch.allclose(backed.critic_target(batch), -0.9 * 0.5 * log_prob.detach(), atol=1e-5)


def test_the_actors_loss_reaches_the_head_only():
    learner = make_learner()
    encoder, critic = learner._policy.encoder, learner._critic
    before = [p.detach().clone() for p in (*encoder.parameters(), *critic.parameters())]
    head = [p.detach().clone() for p in learner._policy.head.parameters()]
    for parameter in (*encoder.parameters(), *critic.parameters()):
        parameter.grad = None
    batch = make_batch()
    features = learner._policy.features(torch.from_numpy(batch.images), torch.from_numpy(batch.proprio))
    learner._update_actor(features)  # not detached: the gradient must stop by itself
    assert all(p.grad is None for p in (*encoder.parameters(), *critic.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(before, (*encoder.parameters(), *critic.parameters()), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(head, learner._policy.head.parameters(), strict=True))


def test_an_update_trains_the_encoder_through_the_critics():
    learner = make_learner(actor_every=1000)
    before = [p.detach().clone() for p in learner._policy.encoder.parameters()]
    head = [p.detach().clone() for p in learner._policy.head.parameters()]
    learner.update(make_batch())
    assert all(not torch.equal(a, b) for a, b in zip(before, learner._policy.encoder.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(head, learner._policy.head.parameters(), strict=True))


def reference_gradients(learner, batch: Batch, settings: SacSettings) -> dict[str, torch.Tensor]:
    """Of critic, actor and entropy losses for one minibatch, written down once more, in float64."""
    policy, generator = learner._policy, learner._generator
    weights = {name: value.detach().double().requires_grad_() for name, value in policy.named_parameters()}
    critics = [
        [(m.weight[n].detach().double().requires_grad_(), m.bias[n].detach().double().requires_grad_()) for m in layers]
        for layers in [[layer for layer in learner._critic.layers if hasattr(layer, "weight")]]
        for n in range(2)
    ]
    alpha = learner._log_alpha.detach().double().exp()
    grid = policy.encoder.grid.double()

    def see(images, proprio):
        pixels = torch.from_numpy(images).permute(0, 1, 4, 2, 3).flatten(1, 2).double() / 255 - 0.5
        first = torch.nn.functional.conv2d(pixels, weights["encoder.first.weight"], weights["encoder.first.bias"], 2)
        rest = (weights["encoder.rest.0.weight"], weights["encoder.rest.0.bias"])
        maps = torch.nn.functional.conv2d(first.relu(), *rest)
        place = torch.einsum("bcp,gp->bcg", maps.flatten(2).softmax(-1), grid).flatten(1)
        return torch.cat([place, torch.tanh(maps.amax((2, 3)) / 4), torch.from_numpy(proprio).double()], -1)

    def act(features):
        hidden = (features @ weights["head.0.weight"].T + weights["head.0.bias"]).relu()
        hidden = (hidden @ weights["head.2.weight"].T + weights["head.2.bias"]).relu()
        mean, raw = (hidden @ weights["head.4.weight"].T + weights["head.4.bias"]).chunk(2, -1)
        log_std = settings.log_std_min + (settings.log_std_max - settings.log_std_min) * (raw.tanh() + 1) / 2
        drawn = mean + log_std.exp() * torch.randn(mean.shape, generator=generator).double()
        density = torch.distributions.Normal(mean, log_std.exp()).log_prob(drawn) - torch.log1p(-(drawn.tanh() ** 2))
        return drawn.tanh(), density.sum(-1)

    def value(features, actions):
        found = []
        for layers in critics:
            x = torch.cat([features, actions], -1)
            for number, (weight, bias) in enumerate(layers):
                x = x @ weight + bias
                x = x.relu() if number < len(layers) - 1 else x
            found.append(x.squeeze(-1))
        return torch.stack(found)

    with torch.no_grad():  # targets are copies still
        seen = see(batch.next_images, batch.next_proprio)
        actions, density = act(seen)
        backed_up = value(seen, actions).amin(0) - alpha * density
        target = torch.from_numpy(batch.rewards) + torch.from_numpy(batch.discounts) * backed_up
    features = see(batch.images, batch.proprio)
    errors = value(features, torch.from_numpy(batch.actions).double()) - target
    encoder = {name: weight for name, weight in weights.items() if name.startswith("encoder")}
    of_critics = [tensor for layers in critics for pair in layers for tensor in pair]
    found = torch.autograd.grad((errors**2).sum(0).mean(), [*encoder.values(), *of_critics])
    gradients = dict(zip(encoder, found, strict=False))
    stacked = found[len(encoder) :]
    gradients |= {f"critic {n}": torch.stack([stacked[n], stacked[n + 6]]) for n in range(6)}
    features = features.detach()
    actions, density = act(features)
    head = {name: weight for name, weight in weights.items() if name.startswith("head")}
    actor_loss = (alpha * density - value(features, actions).amin(0)).mean()
    gradients |= dict(zip(head, torch.autograd.grad(actor_loss, list(head.values())), strict=True))
    gradients["log_alpha"] = alpha * (-density.mean() - 2 * settings.entropy_per_action)
    return gradients


def test_gradients_are_those_of_the_losses_written_down_once_more():
    changes = {"augment": "none", "layer_norm": False, "grad_clip": 0.0, "backup_entropy": True, "initial_std": 0.0}
    learner, twin = make_learner(**changes), make_learner(**changes)
    batch = make_batch(16)
    for optimizer in learner._optimizers.values():
        optimizer.step = lambda: None  # leave the weights; the gradients stay
    learner.update(batch)
    found = {name: parameter.grad for name, parameter in learner._policy.named_parameters()}
    critic = [layer for layer in learner._critic.layers if hasattr(layer, "weight")]
    of_critic = [tensor.grad for layer in critic for tensor in (layer.weight, layer.bias)]
    found |= {f"critic {n}": gradient for n, gradient in enumerate(of_critic)} | {"log_alpha": learner._log_alpha.grad}
    expected = reference_gradients(twin, batch, make_settings(**changes))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name].double(), gradient.detach(), rtol=1e-3, atol=1e-6), name
        assert gradient.abs().max() > 1e-4, name


@pytest.mark.parametrize("target_encoder", [False, True])
def test_targets_follow_by_their_share(target_encoder):
    learner = make_learner(target_encoder=target_encoder, critic_tau=0.1, encoder_tau=0.5)
    critic = [p.detach().clone() for p in learner._target_critic.parameters()]
    encoder = [p.detach().clone() for p in learner._target_encoder.parameters()]
    learner.update(make_batch())
    for old, new, source in zip(critic, learner._target_critic.parameters(), learner._critic.parameters(), strict=True):
        assert torch.allclose(new, old + 0.1 * (source - old), atol=1e-6)
    for old, new, source in zip(
        encoder, learner._target_encoder.parameters(), learner._policy.encoder.parameters(), strict=True
    ):
        share = 0.5 if target_encoder else 1.0  # without a target it is the encoder itself
        assert torch.allclose(new, old + share * (source - old), atol=1e-6)


def test_the_entropy_coefficient_falls_while_entropy_is_above_its_target():
    high, low = make_learner(entropy_per_action=-5.0), make_learner(entropy_per_action=5.0)
    for learner in (high, low):
        learner.update(make_batch())
    assert high._log_alpha.item() < math.log(0.1) < low._log_alpha.item()


def test_the_untrained_policy_explores_with_the_chosen_spread():
    policy = SAC.build_actor(make_spec(), make_settings(initial_std=0.8))
    batch = make_batch()
    features = policy.features(torch.from_numpy(batch.images), torch.from_numpy(batch.proprio))
    mean, log_std = policy.distribution(features)
    assert mean.abs().max() == 0
    assert torch.allclose(log_std.exp(), torch.full_like(log_std, 0.8), atol=1e-4)
    with pytest.raises(SettingsError, match="initial_std"):
        SAC.build_actor(make_spec(), make_settings(initial_std=9.0))


@pytest.mark.parametrize("device", DEVICES)
def test_same_seed_same_updates_and_another_seed_another_network(device):
    runs = []
    for seed in (3, 3, 4):
        learner = SAC.build_learner(make_spec(), make_settings(), seed=seed, device=torch.device(device))
        for number in range(5):
            learner.update(make_batch(seed=number))
        runs.append(flatten_policy(learner.policy()))
        assert all(math.isfinite(value) for value in learner.metrics().values())
    assert np.allclose(runs[0], runs[1], atol=0 if device == "cpu" else 1e-5)
    assert not np.allclose(runs[0], runs[2])


@pytest.mark.parametrize("device", DEVICES)
def test_whole_frames_and_corners_are_the_same_update_as_windows(device):
    rng = np.random.default_rng(0)
    corners = shift_window((20, 24), 3).offsets(rng, 4)
    whole = make_batch(corners=corners)
    images, next_images = (
        gather_windows(torch.from_numpy(frames), torch.from_numpy(corners), (20, 24)).numpy()
        for frames in (whole.images, whole.next_images)
    )
    assert not np.array_equal(images, whole.images)
    losses = []
    for batch in (whole, make_batch(images=images, next_images=next_images)):
        learner = SAC.build_learner(make_spec(), make_settings(shift_px=3), seed=0, device=torch.device(device))
        learner.update(batch)
        losses.append(learner.metrics())
    assert losses[0] == pytest.approx(losses[1], rel=0 if device == "cpu" else 1e-3)


def test_a_crop_is_cut_to_the_size_that_the_encoder_was_made_for():
    learner = SAC.build_learner(make_spec((100, 100)), make_settings(augment="crop"), seed=0, device=CPU)
    learner.update(make_batch(hw=(100, 100), corners=np.array([[0, 0], [1, 1], [0, 1], [1, 0]])))
    assert math.isfinite(learner.metrics()["critic_loss"])
    assert learner._kept_pixels.shape == (4, 3, 98, 98, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_batch_is_fenced_until_it_was_copied():
    learner = SAC.build_learner(make_spec(), make_settings(), seed=0, device=torch.device("cuda"))
    batch = make_batch()
    learner.update(batch)
    assert batch.fence.raised
    batch.fence.wait()
    assert not batch.fence.raised


def test_an_update_reads_nothing_back(monkeypatch):
    learner = make_learner(grad_clip=0.001)

    def refuse(*_: object) -> None:
        raise AssertionError("a value was read during an update")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__float__", "__bool__", "numpy"):
            patch.setattr(torch.Tensor, name, refuse)
        learner.update(make_batch())
    assert learner.metrics()["critic_loss"] > 0


def test_a_loaded_state_goes_on_as_if_never_interrupted():
    straight, first, second = make_learner(), make_learner(), make_learner(seed=9)
    for number in range(6):
        straight.update(make_batch(seed=number))
    for number in range(3):
        first.update(make_batch(seed=number))
    second.load_state(first.state())
    for number in range(3, 6):
        second.update(make_batch(seed=number))
    a, b = straight.state(), second.state()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_state_of_another_network_is_refused():
    state = make_learner(hidden=(16, 16)).state()
    with pytest.raises(SettingsError, match="another network"):
        make_learner().load_state(state)


def test_target_encoder_and_clipping_and_no_norm_work_together_as_in_the_paper():
    learner = make_learner(
        target_encoder=True, grad_clip=0.0, layer_norm=False, initial_std=0.0, augment="crop", n_step=1
    )
    before = flatten_policy(learner.policy()).copy()
    learner.update(make_batch())
    assert not np.allclose(before, flatten_policy(learner.policy()))


@pytest.mark.parametrize("name", sorted(SAC.presets))
def test_every_preset_resolves_through_the_settings(name):
    preset = {section: values for section, values in SAC.presets[name].items() if section != "task"}
    settings = load({"agent": SAC.settings_type}, presets=[preset])
    assert isinstance(settings.agent, SacSettings)
    msgspec.to_builtins(settings.agent)


def test_the_paper_preset_has_the_papers_sizes():
    agent = load({"agent": SacSettings}, presets=[{"agent": SAC.presets["paper"]["agent"]}]).agent
    spec = make_spec((120, 160))
    needs = SAC.needs(spec, agent)
    assert needs.window.out_hw == (118, 156)
    policy = SAC.build_actor(spec, agent)
    assert policy.encoder.out_dim == 64
    assert sum(p.numel() for p in policy.encoder.parameters()) == 30_368  # the original's count


def test_the_algorithm_is_found_by_name():
    assert find_algorithm("relod.algos.sac:SAC") is SAC
    with pytest.raises(SettingsError, match="TD3"):
        find_algorithm("relod.algos.sac:TD3")
