"""Functions on nodes of torch.fx: `openneutron.core.fx`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from openneutron.core.fx import arguments, op_name

aten = torch.ops.aten


def call(target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Node:
    return Graph().call_function(target, args, kwargs or {})


ARGUMENTS: dict[str, tuple[Node, dict[str, Any]]] = {
    "no arguments": (
        call(aten.avg_pool2d.default),
        {"self": None, "kernel_size": None, "stride": [], "padding": [0, 0], "ceil_mode": False,
         "count_include_pad": True, "divisor_override": None},
    ),
    "by position": (call(aten.add.Tensor, (1, 2)), {"self": 1, "other": 2, "alpha": 1}),
    "by name": (call(aten.add.Tensor, (1,), {"alpha": 3, "other": 2}), {"self": 1, "other": 2, "alpha": 3}),
    "no operator of torch": (call(max, (1, 2)), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_are_named_and_in_the_order_of_the_schema(name: str) -> None:
    node, expected = ARGUMENTS[name]
    assert list(arguments(node).items()) == list(expected.items())


def test_lists_among_the_defaults_belong_to_the_caller() -> None:
    node = call(aten.avg_pool2d.default)
    arguments(node)["padding"].append(7)
    assert arguments(node)["padding"] == [0, 0]


def test_names_of_operators_and_other_functions() -> None:
    assert op_name(call(aten.add.Tensor)) == "aten.add.Tensor"
    assert op_name(call(aten.add.out)) == "aten.add.out"
    assert op_name(call(max)) == "max"
    assert op_name(Graph().placeholder("x")) == "placeholder"
