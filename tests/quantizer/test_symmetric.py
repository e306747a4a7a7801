"""Inputs that need zero point 0: which values get it, which are requantized, and which the partitioner rejects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.oracle import Function, everything_on_the_npu, lowered, quantized
from torch import nn
from torch.fx import GraphModule, Node

from openneutron import QuantizedModel, lower
from openneutron.core.fx import is_dequantize, is_quantize, op_name

SHAPE = (2, 4, 4)


def model(function: Callable[..., Any], *parts: nn.Module, inputs: int = 2) -> QuantizedModel:
    """Returns a model quantized on values around 3, for which zero points are usually not 0."""
    torch.manual_seed(0)
    return quantized(Function(function, *parts), (SHAPE,) * inputs, (3.0, 1.0))


def products(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if op_name(node) == "aten.bmm.default"]


def zero_points(node: Node) -> list[object]:
    """Returns the zero points of an operator's inputs."""
    return [operand.args[2] for operand in node.all_input_nodes]


def requantizations(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if is_quantize(node) and is_dequantize(node.args[0])]


def output_of(module: GraphModule, name: str) -> tuple[object, object]:
    """Returns scale and zero point of the output of operator `name`."""
    (found,) = {
        (node.args[1], node.args[2])
        for node in module.graph.nodes
        if is_quantize(node) and isinstance(node.args[0], Node) and op_name(node.args[0]) == name
    }
    return found


class TestZeroPoints:
    @pytest.mark.parametrize(
        ("function", "requantized"),
        [
            (torch.bmm, 0),
            (lambda x, y: torch.bmm(x.transpose(1, 2), y.reshape(2, 4, 4)), 0),
            (lambda x, y: torch.bmm(F.relu(x), y), 0),
            (lambda x, y: torch.bmm(torch.bmm(x, y), y), 0),
            (lambda x, y: torch.bmm(x.tanh(), y), 0),
            (lambda x, y: torch.bmm(x.sigmoid(), y), 1),
            (lambda x, y: torch.bmm(x.softmax(2), y.sigmoid()), 2),
            (lambda x, y: torch.bmm(torch.cat([x.sigmoid(), y.sigmoid()], 2), torch.cat([x, y], 1)), 2),
            (lambda x, y: torch.bmm(x := F.relu(x), y) + x, 1),
            (lambda x, y: (torch.bmm(x := F.relu(x), y), x), 1),
            (lambda x, y: (torch.bmm(x := F.relu(x), y), x.sin()), 1),
            (lambda x, y: torch.bmm(x := F.relu(x), y) + x.transpose(1, 2), 1),
            (lambda x, y: torch.bmm(x := F.relu(x), x.transpose(1, 2)) + y, 0),
        ],
    )
    def test_zero_points_are_zero_with_the_fewest_requantizations(
        self, function: Callable[..., Any], requantized: int
    ) -> None:
        found = model(function)
        assert all(zero_points(node) == [0] * len(node.all_input_nodes) for node in products(found.module))
        assert len(requantizations(found.module)) == requantized

    def test_a_group_is_symmetric_if_only_products_read_it(self) -> None:
        found = model(lambda layer, x, y: torch.bmm(layer(x).transpose(1, 2), y), nn.Linear(4, 4))
        assert output_of(found.module, "aten.linear.default")[1] == 0
        assert output_of(found.module, "aten.transpose.int") == output_of(found.module, "aten.linear.default")

    def test_values_with_other_readers_keep_their_resolution(self) -> None:
        found = model(lambda x, y: torch.bmm(x := F.relu(x), y) + x)
        scale, zero_point = output_of(found.module, "aten.relu.default")
        assert zero_point == -128
        (requantized,) = requantizations(found.module)
        assert requantized.args[1] == pytest.approx(2 * scale, rel=0.01)  # type: ignore[operator]

    def test_each_product_requantizes_for_itself(self) -> None:
        found = model(lambda x, y: torch.bmm(x := x.sigmoid(), y) + torch.bmm(y, x))
        assert len(requantizations(found.module)) == 2
        assert everything_on_the_npu(lowered(found))

    def test_a_constant(self) -> None:
        constant = torch.linspace(1, 2, 32).reshape(SHAPE)
        found = quantized(Function(torch.bmm, constant), (SHAPE,))
        (product,) = products(found.module)
        assert zero_points(product) == [0, 0]


class TestPartitioner:
    def test_another_zero_point_is_a_reason(self) -> None:
        found = model(torch.bmm)
        (product,) = products(found.module)
        dequantize = product.all_input_nodes[1]
        for node in (dequantize, dequantize.args[0]):
            assert isinstance(node, Node)
            node.args = (*node.args[:2], -7, *node.args[3:])
        found.module.recompile()
        (row,) = lower(found).placement
        assert (row.where, row.reason) == ("cpu", "Its input 'mat2' has zero point -7; the NPU supports only 0.")
