"""Zeroes inactive channels, and moves high biases into the next layer."""

from __future__ import annotations

import pytest
import torch
from tests.recovery_models import exported, images
from torch import nn

from openneutron.core.fx import op_name
from openneutron.recovery import absorb_biases, channel_ranges, zero_inactive_channels

# ------------------------------------------------------------------------------------------------- inactive channels


def network_with_an_inactive_channel() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model.get_parameter("0.bias")[1] = -50.0
        model.get_parameter("2.weight")[:, 1] = 1000.0
    return model


def test_inactive_channels_are_zeroed_with_the_weights_that_read_them() -> None:
    module, samples = exported(network_with_an_inactive_channel()), images()
    before = [module(*sample) for sample in samples]
    assert zero_inactive_channels(module, channel_ranges(module, samples)) == 1
    for sample, expected in zip(samples, before, strict=True):
        torch.testing.assert_close(module(*sample), expected, rtol=1e-5, atol=1e-5)
    weights = [getattr(module, str(node.args[1].target)) for node in module.graph.nodes if "conv2d" in op_name(node)]
    assert not weights[0][1].any()
    assert not weights[1][:, 1].any()


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.LeakyReLU(), nn.Identity()])
def test_channels_below_zero_are_not_inactive_without_a_relu(activation: nn.Module) -> None:
    model = network_with_an_inactive_channel()
    model[1] = activation
    module, samples = exported(model), images(4)
    assert zero_inactive_channels(module, channel_ranges(module, samples)) == 0


# ------------------------------------------------------------------------------------------------------ high biases


def high_network(activation: nn.Module, padding: int = 0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), activation, nn.Conv2d(6, 4, 3, padding=padding, groups=2))
    with torch.no_grad():
        model.get_parameter("0.bias")[:3] = 20.0
    return model


def test_high_biases_go_into_the_next_layer_and_the_ranges_follow() -> None:
    module, samples = exported(high_network(nn.ReLU())), images()
    before = [module(*sample) for sample in samples]
    ranges = channel_ranges(module, samples)
    now = absorb_biases(module, ranges)
    for sample, expected in zip(samples, before, strict=True):
        torch.testing.assert_close(module(*sample), expected, rtol=1e-4, atol=1e-4)
    first = next(iter(ranges))
    assert float(now[first][1].max()) < float(ranges[first][1].max()) / 2
    for node, (low, high) in channel_ranges(module, samples).items():
        torch.testing.assert_close(low, now[node][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(high, now[node][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("activation", "padding"), [(nn.ReLU6(), 0), (nn.ReLU(), 1), (nn.LeakyReLU(), 0)])
def test_high_biases_stay_before_padding_and_clips(activation: nn.Module, padding: int) -> None:
    module, samples = exported(high_network(activation, padding)), images(4)
    ranges = channel_ranges(module, samples)
    assert absorb_biases(module, ranges) == ranges
