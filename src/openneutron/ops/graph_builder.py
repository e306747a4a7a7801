"""Functions that add calls of common ATen operators to a graph.

Each function adds one call through a `Builder`, which is a `Rewriting` or a `NodeBuilder`. A function whose name begins
with `replace_with_` replaces an existing call in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.fx import Node

from openneutron.core.evaluation import infer_meta
from openneutron.core.fx import have_equal_sizes, shape_of

__all__ = [
    "MASKED_FILL", "Builder", "NodeBuilder", "Operand", "add", "amax", "clone", "convert", "detach", "exp", "expand",
    "gelu", "hardsigmoid", "hardswish", "linear", "log", "logical_and", "logical_not", "mean", "mul", "permute", "put",
    "relu", "relu6", "replace_with_cat", "replace_with_conversion", "replace_with_index", "replace_with_linear",
    "replace_with_reshape", "replace_with_slice", "reshape", "round_", "rsqrt", "rsub", "select_scatter", "sigmoid",
    "slice_", "slice_scatter", "squeeze", "sub", "sum_", "transpose", "trunc", "unsqueeze", "zeros_like",
]  # fmt: skip

aten = torch.ops.aten
Operand = Node | float

MASKED_FILL = aten.masked_fill.Scalar
"""torch.where(mask, number, value): called with a value, a mask and a number."""


class Builder(Protocol):
    """Adds calls at one place of a graph."""

    def call(self, target: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Node:
        """Adds a call of `target` with its metadata, and returns its node."""


@dataclass(frozen=True)
class NodeBuilder:
    """Adds calls before the node `before`, with the metadata of `origin`, the node that they replace."""

    before: Node
    origin: Node

    def call(self, target: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Node:
        """Adds a call of `target` and returns its node."""
        with self.before.graph.inserting_before(self.before):
            written = self.before.graph.call_function(target, args, kwargs)
        written.meta = {key: value for key, value in self.origin.meta.items() if key != "val"}
        written.meta["val"] = infer_meta(written)
        return written


def add(builder: Builder, first: Node, second: Operand, *, alpha: float = 1) -> Node:
    """first + alpha * second."""
    return builder.call(aten.add.Tensor, first, second, **({} if alpha == 1 else {"alpha": alpha}))


def sub(builder: Builder, first: Node, second: Operand) -> Node:
    """first - second."""
    return builder.call(aten.sub.Tensor, first, second)


def mul(builder: Builder, first: Node, second: Operand) -> Node:
    """first * second."""
    return builder.call(aten.mul.Tensor, first, second)


def mean(builder: Builder, value: Node, dims: Sequence[int]) -> Node:
    """The mean over `dims`, which are kept with size 1."""
    return builder.call(aten.mean.dim, value, list(dims), True)


def sum_(builder: Builder, value: Node, dims: Sequence[int]) -> Node:
    """The sum over `dims`, which are kept with size 1."""
    return builder.call(aten.sum.dim_IntList, value, list(dims), True)


def amax(builder: Builder, value: Node, dims: Sequence[int]) -> Node:
    """The maximum over `dims`, which are kept with size 1."""
    return builder.call(aten.amax.default, value, list(dims), True)


def linear(builder: Builder, value: Node, weight: Node) -> Node:
    """value @ weight.T, for a weight [outputs, inputs]."""
    return builder.call(aten.linear.default, value, weight)


def gelu(builder: Builder, value: Node, approximate: str) -> Node:
    """Gelu; `approximate` is "none" or "tanh"."""
    return builder.call(aten.gelu.default, value, approximate=approximate)


def hardsigmoid(builder: Builder, value: Node) -> Node:
    """relu6(value + 3) / 6."""
    return builder.call(aten.hardsigmoid.default, value)


def hardswish(builder: Builder, value: Node) -> Node:
    """value * relu6(value + 3) / 6."""
    return builder.call(aten.hardswish.default, value)


def relu6(builder: Builder, value: Node) -> Node:
    """The value, clamped to [0, 6]."""
    return builder.call(aten.relu6.default, value)


def reshape(builder: Builder, value: Node, shape: Sequence[Any]) -> Node:
    """`value` reshaped to `shape`; `value` itself if it already has this shape."""
    return (
        value
        if have_equal_sizes(shape_of(value), tuple(shape))
        else builder.call(aten.reshape.default, value, list(shape))
    )


def expand(builder: Builder, value: Node, shape: Sequence[int]) -> Node:
    """`value` broadcast to `shape`; `value` itself if it already has this shape."""
    return (
        value
        if have_equal_sizes(shape_of(value), tuple(shape))
        else builder.call(aten.expand.default, value, list(shape))
    )


def permute(builder: Builder, value: Node, dims: Sequence[int]) -> Node:
    """Dimension i of the output is dimension dims[i] of `value`."""
    return builder.call(aten.permute.default, value, list(dims))


def transpose(builder: Builder, value: Node, first: int, second: int) -> Node:
    """`value` with two dimensions swapped."""
    return builder.call(aten.transpose.int, value, first, second)


def squeeze(builder: Builder, value: Node, dim: int) -> Node:
    """`value` without a dimension of size 1."""
    return builder.call(aten.squeeze.dim, value, dim)


def unsqueeze(builder: Builder, value: Node, dim: int) -> Node:
    """`value` with a new dimension of size 1."""
    return builder.call(aten.unsqueeze.default, value, dim)


def slice_(builder: Builder, value: Node, dim: int, indices: range) -> Node:
    """`value` at the ascending `indices` of dimension `dim`."""
    step = [] if indices.step == 1 else [indices.step]
    return builder.call(aten.slice.Tensor, value, dim, indices.start, indices[-1] + 1, *step)


def slice_scatter(builder: Builder, value: Node, part: Node, dim: int, *indices: Any) -> Node:
    """A copy of `value` with `part` written to the indices (start, end, step) of dimension `dim`."""
    return builder.call(aten.slice_scatter.default, value, part, dim, *indices)


def select_scatter(builder: Builder, value: Node, part: Node, dim: int, index: int) -> Node:
    """A copy of `value` with `part` written to one index of dimension `dim`."""
    return builder.call(aten.select_scatter.default, value, part, dim, index)


def put(builder: Builder, value: Node, index: Node, written: Node) -> Node:
    """A copy of `value` with `written` at the positions `index` of the flattened values."""
    return builder.call(aten.put.default, value, index, written)


def zeros_like(builder: Builder, value: Node) -> Node:
    """Zeros of the shape and dtype of `value`."""
    return builder.call(aten.zeros_like.default, value)


def rsub(builder: Builder, first: Node, second: Operand) -> Node:
    """second - first."""
    return builder.call(aten.rsub.Scalar, first, second)


def round_(builder: Builder, value: Node) -> Node:
    """The value rounded to the nearest integer."""
    return builder.call(aten.round.default, value)


def trunc(builder: Builder, value: Node) -> Node:
    """The value rounded towards zero."""
    return builder.call(aten.trunc.default, value)


def logical_and(builder: Builder, first: Node, second: Node) -> Node:
    """Whether both truth values are true."""
    return builder.call(aten.logical_and.default, first, second)


def logical_not(builder: Builder, value: Node) -> Node:
    """Whether a truth value is false."""
    return builder.call(aten.logical_not.default, value)


def convert(builder: Builder, value: Node, dtype: torch.dtype) -> Node:
    """The value in another dtype."""
    return builder.call(aten.to.dtype, value, dtype)


def clone(graph: torch.fx.Graph, value: Node, **options: Any) -> Node:
    """Adds a clone of `value` at the insertion point of `graph`. The new node has no metadata."""
    return graph.call_function(aten.clone.default, (value,), options)


def detach(graph: torch.fx.Graph, value: Node) -> Node:
    """Adds a detach of `value` at the insertion point of `graph`. The new node has no metadata."""
    return graph.call_function(aten.detach.default, (value,))


def replace_with_conversion(node: Node, value: Any, dtype: Any) -> None:
    """Replaces the call of `node` by the conversion of `value` to a dtype."""
    node.target, node.args, node.kwargs = aten.to.dtype, (value, dtype), {}


def replace_with_cat(node: Node, parts: Sequence[Node], dim: int) -> None:
    """Replaces the call of `node` by the concatenation of `parts`."""
    node.target, node.args, node.kwargs = aten.cat.default, (list(parts), dim), {}


def replace_with_index(node: Node, value: Node, indices: Sequence[Node | None]) -> None:
    """Replaces the call of `node` by a selection of `value` by index tensors; None keeps a whole dimension."""
    node.target, node.args, node.kwargs = aten.index.Tensor, (value, list(indices)), {}


def replace_with_linear(node: Node, value: Node, *constants: Node) -> None:
    """Replaces the call of `node` by a linear of `value` with a weight and an optional bias."""
    node.target, node.args, node.kwargs = aten.linear.default, (value, *constants), {}


def replace_with_reshape(node: Node, value: Node, shape: Any) -> None:
    """Replaces the call of `node` by a reshape of `value`."""
    node.target, node.args, node.kwargs = aten.reshape.default, (value, shape), {}


def replace_with_slice(node: Node, value: Node, dim: int, start: int, end: int) -> None:
    """Replaces the call of `node` by a slice of `value`, indices `start` to `end` - 1."""
    node.target, node.args, node.kwargs = aten.slice.Tensor, (value, dim, start, end), {}


def exp(builder: Builder, value: Node) -> Node:
    """e to the power of `value`."""
    return builder.call(aten.exp.default, value)


def log(builder: Builder, value: Node) -> Node:
    """The natural logarithm."""
    return builder.call(aten.log.default, value)


def rsqrt(builder: Builder, value: Node) -> Node:
    """One over the square root."""
    return builder.call(aten.rsqrt.default, value)


def relu(builder: Builder, value: Node) -> Node:
    """max(value, 0)."""
    return builder.call(aten.relu.default, value)


def sigmoid(builder: Builder, value: Node) -> Node:
    """The logistic function."""
    return builder.call(aten.sigmoid.default, value)
