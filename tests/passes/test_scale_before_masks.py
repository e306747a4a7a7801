"""A scaling moves before an attention mask, and only there."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from tests.oracle import Function
from torch import Tensor
from torch.fx import GraphModule

from openneutron.core.fx import op_name
from openneutron.passes import fold_constants, scale_before_masks

SLOPE, FILL = torch.linspace(-1, 1, 4), torch.tensor(-1e4)
KEEP = torch.tensor([True, True, False, True])
Masked = Callable[[Tensor, Tensor], Tensor]

MOVED: dict[str, Masked] = {
    "fill": lambda s, m: (s.masked_fill(~m, -1e4) * 0.5).softmax(-1),
    "fill of minus infinity": lambda s, m: (s.masked_fill(~m, -math.inf) / 8).softmax(-1),
    "constant fill": lambda s, m: (s.masked_fill(~KEEP, -1e9) / 8).softmax(-1) * m,
    "where scores": lambda s, m: (torch.where(m, s, -1e4) / 3).softmax(-1),
    "where number": lambda s, m: (torch.where(~m, FILL, s) / 3).softmax(-1),
    "views": lambda s, m: (s.masked_fill(~m, -1e4).flatten(0, 1)[None] * 0.5).softmax(-1),
    "computed sum": lambda s, m: ((s + (1 - m.float()) * -1e4) / 8).softmax(-1),
    "constant sum": lambda s, m: ((s + (~KEEP) * -1e4) * 0.25).softmax(-1) * m,
    "mask after it": lambda s, m: (s.masked_fill(~m, -1e4) / 8).masked_fill(~KEEP, -1e4).softmax(-1),
}
KEPT: dict[str, Masked] = {
    "no softmax": lambda s, m: s.masked_fill(~m, -1e4) * 0.5,
    "another reader": lambda s, m: (y := s.masked_fill(~m, -1e4)).sum() + (y * 0.5).softmax(-1),
    "negative factor": lambda s, m: (s.masked_fill(~m, -1e4) * -0.5).softmax(-1),
    "factor of more values": lambda s, m: (s.masked_fill(~m, -1e4) * s).softmax(-1),
    "a number that hides nothing": lambda s, m: (s.masked_fill(~m, -20.0) * 0.5).softmax(-1),
    "sum of equals": lambda s, m: ((s + s.flip(0)) * 0.5).softmax(-1) * m,
    "sum with a small constant": lambda s, m: ((s + SLOPE) * 0.5).softmax(-1) * m,
}


def exported(function: Masked) -> tuple[GraphModule, tuple[Tensor, Tensor]]:
    inputs = (torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), KEEP.clone())
    module = torch.export.export(Function(function), inputs).module()
    assert isinstance(module, GraphModule)
    return module, inputs


def order(module: GraphModule) -> list[str]:
    names = [op_name(node).split(".")[1] for node in module.graph.nodes if node.op == "call_function"]
    return [name for name in names if name in ("mul", "div", "masked_fill", "where", "add", "softmax")]


@pytest.mark.parametrize("name", MOVED)
def test_scaling_moves_before_masks(name: str) -> None:
    module, inputs = exported(MOVED[name])
    expected, before = module(*inputs), order(module)
    assert scale_before_masks(module)
    assert torch.allclose(module(*inputs), expected, atol=1e-6)
    assert order(module) != before
    last_mask = max(order(module).index(one) for one in ("masked_fill", "where", "add") if one in order(module))
    assert not {"mul", "div"} & set(order(module)[last_mask : order(module).index("softmax")])
    assert not scale_before_masks(module)
    module.graph.lint()


@pytest.mark.parametrize("name", KEPT)
def test_scaling_stays_after_other_masks(name: str) -> None:
    module, _ = exported(KEPT[name])
    before = order(module)
    assert not scale_before_masks(module)
    assert order(module) == before


def test_scales_of_float_operators_are_not_moved() -> None:
    module, _ = exported(MOVED["fill"])
    assert not scale_before_masks(module, lambda node: op_name(node).startswith("aten.mul"))


def test_a_factor_may_be_defined_after_the_mask() -> None:
    module, inputs = exported(lambda s, m: (s.masked_fill(~m, -1e4) / torch.sqrt(SLOPE.abs().sum())).softmax(-1))
    expected = module(*inputs)
    fold_constants(module)
    assert scale_before_masks(module)
    module.graph.lint()
    assert torch.allclose(module(*inputs), expected, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_a_trained_factor_stays_while_training(training: bool) -> None:
    temperature = torch.nn.Parameter(torch.tensor(0.5))
    model = Function(lambda k, s, m: (s.masked_fill(~m, -1e4) * k.weight).softmax(-1), Weight(temperature))
    module = torch.export.export(model, (torch.randn(2, 3, 4), KEEP.clone())).module()
    assert isinstance(module, GraphModule)
    assert scale_before_masks(module, training=training) is not training


class Weight(torch.nn.Module):
    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
