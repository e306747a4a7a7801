"""Short names for the ATen operators that decompositions and passes write most.

Each function writes one call through a `Writer`: a `Rewriting` or a `Spot`. Those that begin with `become_` turn an
existing call into another one in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.fx import Node, map_arg

from openneutron.core.fx import shape_of

__all__ = [
    "Operand", "Spot", "Writer", "add", "amax", "become_cat", "become_conversion", "become_linear",
    "become_reshape", "become_slice", "clone", "convert", "detach", "exp", "expand", "gelu", "hardsigmoid",
    "hardswish", "linear", "log", "logical_and", "logical_not", "mean", "mul", "permute", "relu", "relu6",
    "reshape", "rsqrt", "rsub", "select_scatter", "sigmoid", "slice_", "slice_scatter", "squeeze", "sub", "sum_",
    "transpose", "trunc", "unsqueeze", "zeros_like",
]  # fmt: skip

aten = torch.ops.aten
Operand = Node | float


class Writer(Protocol):
    """Writes calls at one place of a graph."""

    def call(self, target: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Node:
        """A call of `target`, with its metadata."""


@dataclass(frozen=True)
class Spot:
    """Writes calls in front of `before`, with the metadata of `origin`, the operator that they stand for."""

    before: Node
    origin: Node

    def call(self, target: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Node:
        """A call of `target`."""
        with self.before.graph.inserting_before(self.before):
            written = self.before.graph.call_function(target, args, kwargs)
        written.meta = {key: value for key, value in self.origin.meta.items() if key != "val"}
        written.meta["val"] = target(*map_arg(args, _value), **map_arg(kwargs, _value))
        return written


def _value(node: Node) -> Any:
    return node.meta["val"]


def add(writer: Writer, first: Node, second: Operand, *, alpha: float = 1) -> Node:
    """first + alpha * second."""
    return writer.call(aten.add.Tensor, first, second, **({} if alpha == 1 else {"alpha": alpha}))


def sub(writer: Writer, first: Node, second: Operand) -> Node:
    """first - second."""
    return writer.call(aten.sub.Tensor, first, second)


def mul(writer: Writer, first: Node, second: Operand) -> Node:
    """first * second."""
    return writer.call(aten.mul.Tensor, first, second)


def mean(writer: Writer, value: Node, dims: Sequence[int]) -> Node:
    """The mean over `dims`, which stay with size 1."""
    return writer.call(aten.mean.dim, value, list(dims), True)


def sum_(writer: Writer, value: Node, dims: Sequence[int]) -> Node:
    """The sum over `dims`, which stay with size 1."""
    return writer.call(aten.sum.dim_IntList, value, list(dims), True)


def amax(writer: Writer, value: Node, dims: Sequence[int]) -> Node:
    """The maximum over `dims`, which stay with size 1."""
    return writer.call(aten.amax.default, value, list(dims), True)


def linear(writer: Writer, value: Node, weight: Node) -> Node:
    """The product of the last dimension with a weight [outputs, inputs]."""
    return writer.call(aten.linear.default, value, weight)


def gelu(writer: Writer, value: Node, approximate: str) -> Node:
    """Gelu; `approximate` is "none" or "tanh"."""
    return writer.call(aten.gelu.default, value, approximate=approximate)


def hardsigmoid(writer: Writer, value: Node) -> Node:
    """relu6(value + 3) / 6."""
    return writer.call(aten.hardsigmoid.default, value)


def hardswish(writer: Writer, value: Node) -> Node:
    """value * relu6(value + 3) / 6."""
    return writer.call(aten.hardswish.default, value)


def relu6(writer: Writer, value: Node) -> Node:
    """The value, limited to 0 to 6."""
    return writer.call(aten.relu6.default, value)


def reshape(writer: Writer, value: Node, shape: Sequence[Any]) -> Node:
    """The value in another shape; the value itself where it has that shape."""
    return value if shape_of(value) == tuple(shape) else writer.call(aten.reshape.default, value, list(shape))


def expand(writer: Writer, value: Node, shape: Sequence[int]) -> Node:
    """The value broadcast to `shape`; the value itself where it has that shape."""
    return value if shape_of(value) == tuple(shape) else writer.call(aten.expand.default, value, list(shape))


def permute(writer: Writer, value: Node, dims: Sequence[int]) -> Node:
    """Dimension i of the output is dimension dims[i] of `value`."""
    return writer.call(aten.permute.default, value, list(dims))


def transpose(writer: Writer, value: Node, first: int, second: int) -> Node:
    """Two dimensions swapped."""
    return writer.call(aten.transpose.int, value, first, second)


def squeeze(writer: Writer, value: Node, dim: int) -> Node:
    """Without a dimension of size 1."""
    return writer.call(aten.squeeze.dim, value, dim)


def unsqueeze(writer: Writer, value: Node, dim: int) -> Node:
    """With a new dimension of size 1."""
    return writer.call(aten.unsqueeze.default, value, dim)


def slice_(writer: Writer, value: Node, dim: int, indices: range) -> Node:
    """Some indices of a dimension, in rising order."""
    step = [] if indices.step == 1 else [indices.step]
    return writer.call(aten.slice.Tensor, value, dim, indices.start, indices[-1] + 1, *step)


def slice_scatter(writer: Writer, value: Node, part: Node, dim: int, *indices: Any) -> Node:
    """`value` with `part` at the indices (start, end, step) of a dimension."""
    return writer.call(aten.slice_scatter.default, value, part, dim, *indices)


def select_scatter(writer: Writer, value: Node, part: Node, dim: int, index: int) -> Node:
    """`value` with `part` at one index of a dimension."""
    return writer.call(aten.select_scatter.default, value, part, dim, index)


def zeros_like(writer: Writer, value: Node) -> Node:
    """Zeros of the shape and dtype of `value`."""
    return writer.call(aten.zeros_like.default, value)


def rsub(writer: Writer, first: Node, second: Operand) -> Node:
    """second - first."""
    return writer.call(aten.rsub.Scalar, first, second)


def trunc(writer: Writer, value: Node) -> Node:
    """The value rounded towards zero."""
    return writer.call(aten.trunc.default, value)


def logical_and(writer: Writer, first: Node, second: Node) -> Node:
    """Whether both truth values are true."""
    return writer.call(aten.logical_and.default, first, second)


def logical_not(writer: Writer, value: Node) -> Node:
    """Whether a truth value is false."""
    return writer.call(aten.logical_not.default, value)


def convert(writer: Writer, value: Node, dtype: torch.dtype) -> Node:
    """The value in another dtype."""
    return writer.call(aten.to.dtype, value, dtype)


def clone(graph: torch.fx.Graph, value: Node, **options: Any) -> Node:
    """A copy of `value`, without metadata, at the insertion point of `graph`."""
    return graph.call_function(aten.clone.default, (value,), options)


def detach(graph: torch.fx.Graph, value: Node) -> Node:
    """`value` without its gradient, without metadata, at the insertion point of `graph`."""
    return graph.call_function(aten.detach.default, (value,))


def become_conversion(node: Node, value: Any, dtype: Any) -> None:
    """Turn `node` into the conversion of `value` to a dtype."""
    node.target, node.args, node.kwargs = aten.to.dtype, (value, dtype), {}


def become_cat(node: Node, parts: Sequence[Node], dim: int) -> None:
    """Turn `node` into the concatenation of `parts`."""
    node.target, node.args, node.kwargs = aten.cat.default, (list(parts), dim), {}


def become_linear(node: Node, value: Node, *constants: Node) -> None:
    """Turn `node` into a linear of `value` with a weight and, perhaps, a bias."""
    node.target, node.args, node.kwargs = aten.linear.default, (value, *constants), {}


def become_reshape(node: Node, value: Node, shape: Any) -> None:
    """Turn `node` into a reshape of `value`."""
    node.target, node.args, node.kwargs = aten.reshape.default, (value, shape), {}


def become_slice(node: Node, value: Node, dim: int, start: int, end: int) -> None:
    """Turn `node` into a slice of `value`, indices `start` to `end` - 1."""
    node.target, node.args, node.kwargs = aten.slice.Tensor, (value, dim, start, end), {}


def exp(writer: Writer, value: Node) -> Node:
    """e to the power of `value`."""
    return writer.call(aten.exp.default, value)


def log(writer: Writer, value: Node) -> Node:
    """The natural logarithm."""
    return writer.call(aten.log.default, value)


def rsqrt(writer: Writer, value: Node) -> Node:
    """One over the square root."""
    return writer.call(aten.rsqrt.default, value)


def relu(writer: Writer, value: Node) -> Node:
    """The value, or zero where it is negative."""
    return writer.call(aten.relu.default, value)


def sigmoid(writer: Writer, value: Node) -> Node:
    """The logistic function."""
    return writer.call(aten.sigmoid.default, value)
