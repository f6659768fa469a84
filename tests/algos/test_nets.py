"""The networks' arithmetic against torch.distributions, plain conv2d and hand-computed cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from torch.nn import functional

from relod.algos.nets import (
    Encoder,
    channel_convolution,
    coordinate_grid,
    ensemble,
    feature_size,
    mlp,
    soft_argmax,
    squashed_log_std,
    stack_convolution,
    tanh_log_prob,
)


def test_tanh_log_prob_equals_torch_distributions_in_float64():
    u = torch.linspace(-8, 8, 321, dtype=torch.float64)[:, None]
    mean, log_std = torch.full_like(u, 0.3), torch.full_like(u, -0.4)
    reference = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
    action = TanhTransform(cache_size=1)(u)
    base = Normal(mean, log_std.exp()).log_prob(u)
    expected = base - TanhTransform().log_abs_det_jacobian(u, action)
    assert torch.allclose(tanh_log_prob(u, mean, log_std), expected.sum(-1), atol=1e-12)
    near = u.abs() < 3  # where the inverse of tanh is still exact
    assert torch.allclose(
        tanh_log_prob(u, mean, log_std)[near[:, 0]], reference.log_prob(torch.tanh(u))[near], atol=1e-9
    )


def test_tanh_log_prob_has_exact_gradients_and_no_infinities():
    u = torch.tensor([[-20.0, -1.0], [0.5, 20.0]], dtype=torch.float64, requires_grad=True)
    mean = torch.zeros_like(u).requires_grad_()
    log_std = torch.full_like(u, 0.2).requires_grad_()
    assert torch.isfinite(tanh_log_prob(u, mean, log_std)).all()
    assert torch.autograd.gradcheck(tanh_log_prob, (u, mean, log_std))


def test_tanh_log_prob_computes_bfloat16_in_float32():
    u = torch.tensor([[4.0]])
    zero = torch.zeros_like(u)
    assert tanh_log_prob(u.bfloat16(), zero.bfloat16(), zero.bfloat16()).dtype == torch.float32
    assert tanh_log_prob(u.bfloat16(), zero.bfloat16(), zero.bfloat16()).item() == tanh_log_prob(u, zero, zero).item()


def test_log_std_stays_within_its_bounds():
    values = squashed_log_std(torch.tensor([-50.0, 0.0, 50.0]), -5.0, 2.0)
    assert torch.allclose(values, torch.tensor([-5.0, -1.5, 2.0]))


def test_soft_argmax_of_a_peak_is_its_place_with_x_along_the_width():
    features = torch.zeros(1, 2, 5, 7)
    features[0, 0, 1, 6] = 100.0  # row 1 of 5, column 6 of 7
    features[0, 1, 4, 3] = 100.0
    expected = torch.tensor([[1.0, -0.5, 0.0, 1.0]])  # x0, y0, x1, y1
    assert torch.allclose(soft_argmax(features, coordinate_grid((5, 7))), expected, atol=1e-5)


def test_both_first_layers_are_conv2d_over_stacked_channels():
    images = torch.randint(0, 256, (2, 3, 9, 11, 3)).float()
    weight, bias = torch.randn(4, 9, 3, 3) * 0.01, torch.randn(4)
    stacked = images.permute(0, 1, 4, 2, 3).reshape(2, 9, 9, 11)
    expected = functional.conv2d(stacked, weight, bias, 2)
    for convolution in (channel_convolution, stack_convolution):
        assert torch.allclose(convolution(images, weight, bias, 2, rectify=False), expected, atol=1e-3)
        assert torch.allclose(convolution(images, weight, bias, 2, rectify=True), expected.relu(), atol=1e-3)


@pytest.mark.parametrize(("centred", "offset"), [(True, 0.5), (False, 0.0)])
def test_encoder_scales_pixels_inside_its_first_layer(centred, offset):
    torch.manual_seed(0)
    encoder = Encoder(frames=2, image_hw=(20, 24), channels=4, strides=(2, 1), centred=centred, init="orthogonal")
    images = torch.randint(0, 256, (3, 2, 20, 24, 3), dtype=torch.uint8)
    pixels = images.permute(0, 1, 4, 2, 3).reshape(3, 6, 20, 24) / 255 - offset
    features = encoder.rest[0](torch.relu(encoder.first(pixels)))
    assert torch.allclose(encoder(images), soft_argmax(features, coordinate_grid(encoder.feature_hw)), atol=1e-5)
    assert encoder(images).shape == (3, 8)


def test_feature_sizes_are_the_papers():
    assert feature_size((118, 156), (2, 2, 2, 1)) == (11, 16)
    assert feature_size((88, 156), (2, 2, 2, 1)) == (8, 16)
    with pytest.raises(ValueError, match="too few"):
        feature_size((12, 12), (2, 2, 2, 1))


def test_delta_orthogonal_is_orthogonal_at_the_centre_and_zero_around():
    encoder = Encoder(frames=1, image_hw=(9, 9), channels=3, strides=(1,), centred=False, init="delta_orthogonal")
    weight = encoder.first.weight.detach()
    centre = weight[:, :, 1, 1]
    assert torch.allclose(centre @ centre.T, 2 * torch.eye(3), atol=1e-5)
    assert weight.abs().sum() == centre.abs().sum()


def test_an_ensemble_is_its_members_side_by_side():
    torch.manual_seed(0)
    critics = ensemble(2, 5, (8, 8), layer_norm=True)
    features, actions = torch.randn(4, 3), torch.randn(4, 2)
    values = critics(features, actions)
    assert values.shape == (2, 4)
    for member in (0, 1):
        single = mlp(5, (8, 8), 1, layer_norm=True)
        sources = [layer for layer in critics.layers if list(layer.parameters())]
        targets = [layer for layer in single if list(layer.parameters())]
        with torch.no_grad():
            for source, target in zip(sources, targets, strict=True):
                weight = source.weight[member]
                target.weight.copy_(weight.T if target.weight.dim() == 2 else weight[0])
                target.bias.copy_(source.bias[member, 0])
        assert torch.allclose(single(torch.cat([features, actions], -1))[:, 0], values[member], atol=1e-5)


def test_ensemble_members_start_different():
    critics = ensemble(2, 5, (8,), layer_norm=False)
    values = critics(torch.randn(4, 3), torch.randn(4, 2)).detach().numpy()
    assert not np.allclose(values[0], values[1])


def test_presence_tells_a_feature_in_the_middle_from_none_at_all():
    plain, telling = (
        Encoder(
            frames=1, image_hw=(21, 21), channels=3, strides=(1,), centred=False, init="delta_orthogonal", presence=on
        )
        for on in (False, True)
    )
    telling.load_state_dict(plain.state_dict())
    nothing = torch.zeros(1, 1, 21, 21, 3, dtype=torch.uint8)
    middle = nothing.clone()
    middle[0, 0, 10, 10] = 255
    assert torch.allclose(plain(nothing), plain(middle), atol=1e-5)
    assert (telling(middle) - telling(nothing)).abs().max() > 0.1
    assert torch.equal(telling(middle)[:, :6], plain(middle))
    assert telling.out_dim == 9
