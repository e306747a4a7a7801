"""Facts that declarations state for passes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.fx import Node
from torch.nn import functional as F

from openneutron.ops import LayerKind, Movement, facts_of, is_op, layer_kind
from openneutron.ops.declared import overload_of
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.sign_analysis import is_never_negative
from openneutron.targets import TARGETS

aten = torch.ops.aten
VALUES = torch.zeros(2, 4, 6, 6)


class Called(torch.nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.function(values)


def last_call(function: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor = VALUES) -> Node:
    graph = torch.export.export(Called(function), (values,)).module().graph
    found: Node = [node for node in graph.nodes if node.op == "call_function" and "guard" not in str(node.target)][-1]
    return found


@pytest.mark.parametrize(
    ("function", "movement"),
    [
        (lambda x: x.reshape(2, -1), Movement.RESHAPE),
        (lambda x: x.unsqueeze(0), Movement.RESHAPE),
        (lambda x: x.clone(), Movement.COPY),
        (lambda x: x[:, :1].expand(2, 4, 6, 6), Movement.EXPAND),
        (lambda x: x.transpose(1, 2), Movement.PERMUTE),
        (lambda x: x[:, 1:3], Movement.PART),
        (lambda x: x.select(1, 0), Movement.PART),
        (lambda x: torch.cat([x, x]), Movement.JOIN),
        (lambda x: x.roll(1, 0), Movement.REARRANGE),
        (lambda x: x + 1, None),
        (lambda x: F.dropout(x, 0.5), None),
    ],
)
def test_movement(function: Callable[[torch.Tensor], torch.Tensor], movement: Movement | None) -> None:
    assert facts_of(last_call(function)).movement is movement


@pytest.mark.parametrize(
    ("function", "limits"),
    [
        (F.relu, (0, math.inf)),
        (F.relu6, (0, 6)),
        (lambda x: F.hardtanh(x, -2, 3), (-2, 3)),
        (lambda x: x.clamp(min=1), (1, math.inf)),
        (lambda x: x.clamp_max(1), (-math.inf, 1)),
        (lambda x: torch.clip(x, 0, 4), (0, 4)),
        (torch.abs, None),
    ],
)
def test_clamp_range(function: Callable[[torch.Tensor], torch.Tensor], limits: tuple[float, float] | None) -> None:
    node = last_call(function)
    assert facts_of(node).clamp_range(node) == limits


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.relu(), True),
        (lambda x: x, False),
        (lambda x: x.abs().mean(1), True),
        (lambda x: x * x, True),
        (lambda x: x * x.exp(), False),
        (lambda x: torch.cat([x.exp(), x.abs()]), True),
        (lambda x: torch.cat([x.exp(), x]), False),
        (lambda x: x.relu().clamp(max=-1), False),
        (lambda x: x.relu().clamp(max=1), True),
        (lambda x: torch.minimum(x.exp(), x.abs()), True),
        (lambda x: torch.maximum(x, x.abs()), True),
        (lambda x: F.pad(x.relu(), (1, 1), value=-1.0), False),
        (lambda x: F.pad(x.relu(), (1, 1)), True),
        (lambda x: x.relu().flip(0), True),
        (lambda x: torch.add(x.relu(), x.relu(), alpha=-1), False),
    ],
)
def test_sign(function: Callable[[torch.Tensor], torch.Tensor], expected: bool) -> None:
    node = last_call(lambda x: function(x).neg())
    assert is_never_negative(OpInstance(node, TARGETS["imxrt700"]), node.args[0]) is expected


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        (aten.conv1d.default, LayerKind.CONVOLUTION),
        (aten.conv2d.padding, LayerKind.CONVOLUTION),
        (aten.conv3d.default, LayerKind.CONVOLUTION),
        (aten.conv_transpose2d.input, LayerKind.TRANSPOSED),
        (aten.conv_transpose3d.input, LayerKind.TRANSPOSED),
        (aten.linear.default, LayerKind.LINEAR),
        (aten.mm.default, None),
        (aten.prelu.default, None),
    ],
)
def test_layer_kind(target: torch._ops.OpOverload, kind: LayerKind | None) -> None:
    graph = torch.fx.Graph()
    value = graph.placeholder("value")
    assert layer_kind(graph.call_function(target, (value, value))) is kind


def test_operators_go_by_the_name_of_their_declaration() -> None:
    graph = torch.fx.Graph()
    value = graph.placeholder("value")
    product = graph.call_function(aten.mul.Scalar, (value, 2))
    assert is_op(product, "add", "mul")
    assert not is_op(product, "add")
    assert not is_op(value, "mul")
    assert not is_op(None, "mul")
    assert overload_of("mul") is aten.mul.Tensor
    with pytest.raises(KeyError, match="times"):
        is_op(product, "times")
