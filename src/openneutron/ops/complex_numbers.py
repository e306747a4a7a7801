"""Complex values as pairs of real values, and arithmetic on their parts."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from openneutron.core.fx import dtype_of, shape_of
from openneutron.ops.decomposition import Rewriting
from openneutron.ops.graph_builder import Operand, add, convert, expand, mul, sub, zeros_like

__all__ = ["ComplexRewriting", "Pair", "Rule", "product", "rules", "squared_length"]

Bilinear = Callable[[Operand | None, Operand | None], Operand | None]


@dataclass(frozen=True)
class Pair:
    """The real and the imaginary part of a complex value, both float32. `imag` is None for a real value."""

    real: Operand
    imag: Operand | None = None


@dataclass(frozen=True)
class ComplexRewriting:
    """Adds operators on real numbers, before a call that reads or returns complex numbers."""

    rewriting: Rewriting
    pairs: Mapping[Node, Pair]
    """The pairs of the complex values before the call."""

    @property
    def args(self) -> dict[str, Any]:
        """The arguments of the call by name."""
        return self.rewriting.args

    def pair(self, value: object) -> Pair:
        """Returns the pair of a complex value, a real value or a number."""
        if isinstance(value, Node):
            return self.pairs.get(value) or Pair(self._as_float32(value))
        number = complex(value)  # type: ignore[call-overload]
        return Pair(number.real, number.imag or None)

    def _as_float32(self, value: Node) -> Node:
        is_float = dtype_of(value) in (None, torch.float32)
        return value if is_float else convert(self.rewriting, value, torch.float32)

    def add(self, first: Operand | None, second: Operand | None) -> Operand | None:
        """Computes first + second; None is zero."""
        return self._sum(add, first, second)

    def sub(self, first: Operand | None, second: Operand | None) -> Operand | None:
        """Computes first - second; None is zero."""
        if first is None and second is not None:
            return self.mul(second, -1.0)
        return self._sum(sub, first, second)

    def mul(self, first: Operand | None, second: Operand | None) -> Operand | None:
        """Computes first * second; None is zero."""
        if first is None or second is None or 0.0 in (first, second):
            return None
        if not isinstance(first, Node):
            first, second = second, first
        if second == 1.0 or not isinstance(first, Node):
            return first if second == 1.0 else first * second  # type: ignore[operator]
        return mul(self.rewriting, first, second)

    def _sum(self, write: Callable[..., Node], first: Operand | None, second: Operand | None) -> Operand | None:
        if first is None or second is None:
            return first if second is None else second
        return write(self.rewriting, self.node(first), second)

    def node(self, value: Operand | None) -> Node:
        """Returns a part of a pair as a node: a number becomes a constant, None becomes zero."""
        return value if isinstance(value, Node) else self.rewriting.constant(torch.tensor(float(value or 0)))

    def item(self, values: Node, index: int) -> Node:
        """Returns one output of an operator with several outputs."""
        node = self.rewriting.instance.node
        with node.graph.inserting_before(node):
            item = node.graph.call_function(operator.getitem, (values, index))
        item.meta["val"] = values.meta["val"][index]
        return item

    def whole(self, value: object) -> Pair:
        """Returns the pair of a value with parts of the value's shape, for operators that do not broadcast.

        Raises `ModelError` if a part is a number and the shape is dynamic.
        """
        pair = self.pair(value)
        if not isinstance(value, Node):
            return pair
        real = self._filled(pair.real, shape_of(value))
        return Pair(real, None if pair.imag is None else self._filled(pair.imag, shape_of(value)))

    def _filled(self, part: Operand, shape: Sequence[int]) -> Node:
        """Returns a part that is broadcast to `shape`."""
        if isinstance(part, Node):
            return expand(self.rewriting, part, shape)
        if not all(isinstance(size, int) for size in shape):
            raise self.rewriting.needs_fixed_sizes()
        return self.rewriting.constant(torch.full(tuple(shape), part))

    def parts(self, value: object) -> tuple[Node, Node]:
        """Returns the real and the imaginary part of a value as tensors of the value's shape."""
        pair = self.whole(value)
        real = self.node(pair.real)
        return real, zeros_like(self.rewriting, real) if pair.imag is None else self.node(pair.imag)


Rule = Callable[[ComplexRewriting], Pair | Node]
"""Computes a call on parts. Returns the pair of a complex output, or the node of a real output."""


def rules(rule: Rule, names: str, overloads: Sequence[str] = ("default",)) -> dict[str, Rule]:
    """Returns `rule` for each overload of each ATen operator in `names`, a list separated by spaces."""
    return {f"aten.{name}.{overload}": rule for name in names.split() for overload in overloads}


def product(first: Pair, second: Pair, writing: ComplexRewriting, multiply: Bilinear) -> Pair:
    """(a + bi)(c + di) = (ac - bd) + (ad + bc)i, for any bilinear product."""
    real = writing.sub(multiply(first.real, second.real), multiply(first.imag, second.imag))
    imag = writing.add(multiply(first.real, second.imag), multiply(first.imag, second.real))
    return Pair(real or 0.0, imag)


def squared_length(writing: ComplexRewriting, pair: Pair) -> Operand | None:
    """The squared absolute value of a complex value."""
    return writing.add(writing.mul(pair.real, pair.real), writing.mul(pair.imag, pair.imag))
