"""Operators that take sizes or positions from a tensor. If the tensor is a constant, numbers replace it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import insert_constant
from openneutron.core.fx import arguments
from openneutron.ops.graph_builder import NodeBuilder, reshape

__all__ = ["SIZED_BY_TENSORS", "SizedByTensor"]

aten = torch.ops.aten


@dataclass(frozen=True)
class SizedByTensor:
    """An operator with an argument that gives sizes or positions as a tensor."""

    argument: str
    """The name of the argument."""
    write: Callable[[GraphModule, Node, torch.Tensor], None]
    """Replaces the call of a node by a call with numbers, given the values of the argument."""
    advice: str
    """What to write instead if the argument is computed from inputs."""


def _tensor_split(_: GraphModule, node: Node, values: torch.Tensor) -> None:
    args = arguments(node)
    target = aten.tensor_split.indices if values.dim() else aten.tensor_split.sections
    node.target, node.args, node.kwargs = target, (args["self"], values.tolist(), args["dim"]), {}


def _narrow(_: GraphModule, node: Node, values: torch.Tensor) -> None:
    args = arguments(node)
    numbers = (args["dim"], int(values), args["length"])
    node.target, node.args, node.kwargs = aten.narrow.default, (args["self"], *numbers), {}


def _repeat_interleave(module: GraphModule, node: Node, values: torch.Tensor) -> None:
    args = arguments(node)
    value, dim = args["self"], args["dim"]
    if dim is None:
        value, dim = reshape(NodeBuilder(node, node), value, (-1,)), 0
    size = value.meta["val"].shape[dim]
    indices = torch.repeat_interleave(torch.arange(size), values.long().expand(size))
    constant = insert_constant(module, node, indices, "indices")
    node.target, node.args, node.kwargs = aten.index_select.default, (value, dim, constant), {}


SIZED_BY_TENSORS = {
    "aten.tensor_split.tensor_indices_or_sections": SizedByTensor(
        "tensor_indices_or_sections", _tensor_split, "Split at fixed positions: x.tensor_split([3], dim)."
    ),
    "aten.narrow.Tensor": SizedByTensor(
        "start",
        _narrow,
        "Select by indices, which may be computed: x.index_select(dim, start + torch.arange(length)).",
    ),
    "aten.repeat_interleave.self_Tensor": SizedByTensor(
        "repeats",
        _repeat_interleave,
        "Repeat by fixed numbers, or select by indices, which may be computed: x.index_select(dim, indices).",
    ),
}
"""The operators by their names."""
