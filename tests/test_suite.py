"""Small versions of whole networks with random weights: one delegate, nothing on the CPU, and the SQNR of int8."""

from __future__ import annotations

import math

import pytest
import torch
from benchmarks.layer_losses import largest_loss, sqnr
from benchmarks.suite import Result, measure
from benchmarks.zoo import ZOO, Member, MissingTorchvisionError, smooth
from tests.oracle import Function, quantized
from torch import nn

from openneutron import passes
from openneutron.targets import TARGETS

# Each operator may differ by one step; these differences add up in a network. The SQNR shows whether they matter.
MAX_LSB = 24  # after a hundred layers, each of which may round a tie differently
LESS_THAN_THE_MODULE = 1.0  # dB


def measured(member: Member) -> Result:
    try:
        return measure(member, member.small)
    except MissingTorchvisionError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("member", ZOO.values(), ids=lambda member: member.name)
def test_networks_run_on_the_npu_with_enough_sqnr(member: Member) -> None:
    result = measured(member)
    assert not result.on_cpu
    assert result.delegates == 1
    assert result.sqnr >= member.least_sqnr, str(result.largest_loss)
    for output in result.outputs:
        assert output.sqnr_pte >= output.sqnr_module - LESS_THAN_THE_MODULE
        assert output.agreement.worst <= MAX_LSB


@pytest.mark.parametrize("member", ZOO.values(), ids=lambda member: member.name)
@torch.no_grad()
def test_network_outputs_depend_on_the_input(member: Member) -> None:
    """The output depends on the input, and noise does not grow much. Otherwise, accuracy figures would mean nothing."""
    try:
        model = member.build(member.small)
    except MissingTorchvisionError as error:
        pytest.skip(str(error))
    inputs = torch.cat(smooth(member.small, 8, seed=3))
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(4)) * inputs.square().mean().sqrt() / 100
    for found, disturbed in zip(member.parts(model(inputs)), member.parts(model(inputs + noise)), strict=True):
        assert found.std(0).mean() >= member.least_variation * found.square().mean().sqrt()
        assert sqnr(found, disturbed) >= 30


class TestWalk:
    def test_the_walk_names_the_layer_with_the_largest_loss(self) -> None:
        """One channel has 300 added to it, so the other channels of the same tensor have few int8 codes."""

        def forward(first: nn.Module, second: nn.Module, x: torch.Tensor) -> torch.Tensor:
            wide = first(x) + torch.tensor([300.0, 0.0, 0.0]).view(1, 3, 1, 1)
            narrow: torch.Tensor = second(wide)
            return narrow

        torch.manual_seed(0)
        first, second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        nn.init.zeros_(second.weight.data[:, 0])
        model = Function(forward, first, second)
        x = torch.randn(1, 3, 8, 8)
        converted = quantized(model, ((1, 3, 8, 8),)).module
        reference = passes.prepare(torch.export.export(model, (x,)).module(), TARGETS["imxrt700"])
        loss = largest_loss(reference, converted, (x,))
        assert loss is not None
        assert loss.node == "conv2d_1"
        assert loss.before > 40
        assert loss.after < 20

    def test_sqnr(self) -> None:
        values = torch.tensor([3.0, -4.0])
        assert sqnr(values, values + torch.tensor([0.5, 0.0])) == pytest.approx(20.0)
        assert sqnr(values, values) == math.inf
        assert sqnr(torch.zeros(2), values) == -math.inf
