"""Channels that may be scaled. Only one of the two factors of a product may be scaled."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from openneutron import NeutronQuantizer
from openneutron.core.fx import op_name
from openneutron.passes import scalable_channels
from openneutron.passes.scalable_channels import PINNED, ScalableLayer, scaling_of

SHAPE = (1, 4, 6, 6)


class Excited(nn.Module):
    """Squeeze-and-excite with hardsigmoid. Its relu6 keeps scaled values up to its clip."""

    def __init__(self, gate_first: bool) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.gate_first = gate_first

    def forward(self, x: Tensor) -> Tensor:
        y = self.widen(x).relu()
        gate = nn.functional.hardsigmoid(self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()))
        narrow: Tensor = self.narrow(gate * y if self.gate_first else y * gate)
        return narrow


class Squared(nn.Module):
    """The output would be scaled by the square of a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.widen(x).relu()
        narrow: Tensor = self.narrow(y * y)
        return narrow


def layers_of(model: nn.Module) -> list[ScalableLayer]:
    exported = torch.export.export(model.eval(), (torch.zeros(SHAPE),)).module()
    assert isinstance(exported, GraphModule)
    return list(scaling_of(NeutronQuantizer().transform_for_annotation(exported)).layers)


@pytest.mark.parametrize("gate_first", [False, True])
def test_gates_of_products_are_not_scaled(gate_first: bool) -> None:
    widen, squeeze, excite, narrow = layers_of(Excited(gate_first))
    assert [op_name(layer.node) for layer in (widen, narrow)] == ["aten.conv2d.default"] * 2
    assert bool((widen.output_numbers != PINNED).all())
    assert torch.equal(narrow.input_numbers[0], widen.output_numbers)
    assert torch.equal(squeeze.input_numbers[0], widen.output_numbers)
    assert torch.equal(excite.input_numbers[0], squeeze.output_numbers)
    assert bool((squeeze.output_numbers != PINNED).all())
    assert bool((excite.output_numbers == PINNED).all())


def test_a_square_is_not_scaled() -> None:
    widen, narrow = layers_of(Squared())
    assert bool((widen.output_numbers == PINNED).all())
    assert bool((narrow.input_numbers == PINNED).all())


class Residual(nn.Module):
    """The outputs of two convolutions, which an addition joins."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        sums: Tensor = self.third(y + self.second(y))
        return sums


@pytest.mark.parametrize("size", [2, 64])
def test_channels_are_joined_once_for_images_of_any_size(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    to_list = Tensor.tolist

    def counted(values: Tensor) -> object:
        sizes.append(values.numel())
        return to_list(values)

    monkeypatch.setattr(Tensor, "tolist", counted)
    exported = torch.export.export(Residual().eval(), (torch.zeros(1, 4, size, size),)).module()
    assert isinstance(exported, GraphModule)
    sizes.clear()
    first, second, third = scaling_of(exported).layers
    assert max(sizes) == 4
    assert torch.equal(first.output_numbers, second.output_numbers)
    assert torch.equal(first.output_numbers, third.input_numbers[0])
    assert bool((first.output_numbers != PINNED).all())


GROUPS: dict[str, tuple[list[list[int]], list[set[int]]]] = {
    "no layer": ([], [{1}, {2}]),
    "a number of one layer": ([[1, 2], [3]], [{1, 2}, {3}]),
    "a pinned output": ([[1, PINNED, 2], [PINNED]], [{1, 2}]),
    "a shared number": ([[1, 2], [2, 3], [4]], [{1, 2, 3}, {4}]),
    "a later layer joins two": ([[1, 2], [3, 4], [5], [5, 4, 1]], [{1, 2, 3, 4, 5}]),
    "a number that no layer writes": ([[1, 3]], [{1, 3}, {2}]),
}


@pytest.mark.parametrize("name", GROUPS)
def test_layers_that_share_a_channel_are_in_one_group(name: str) -> None:
    written, expected = GROUPS[name]
    layers = [Mock(output_numbers=torch.tensor(numbers)) for numbers in written]
    count = 1 + max(number for group in expected for number in group)
    found = scalable_channels._layer_groups(count, layers).tolist()
    groups = [{number for number in range(count) if found[number] == group} for group in sorted({*found})]
    assert sorted(groups, key=min) == [{PINNED}, *expected]
