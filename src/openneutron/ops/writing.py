"""Short names for the ATen operators that decompositions write most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from openneutron.ops.decomposition import Rewriting

__all__ = ["Operand", "add", "exp", "log", "mean", "mul", "relu", "rsqrt", "sigmoid", "sub"]

aten = torch.ops.aten
Operand = Node | float


def add(rewriting: Rewriting, first: Node, second: Operand, *, alpha: float = 1) -> Node:
    """first + alpha * second."""
    return rewriting.call(aten.add.Tensor, first, second, **({} if alpha == 1 else {"alpha": alpha}))


def sub(rewriting: Rewriting, first: Node, second: Operand) -> Node:
    """first - second."""
    return rewriting.call(aten.sub.Tensor, first, second)


def mul(rewriting: Rewriting, first: Node, second: Operand) -> Node:
    """first * second."""
    return rewriting.call(aten.mul.Tensor, first, second)


def mean(rewriting: Rewriting, value: Node, dims: Sequence[int]) -> Node:
    """The mean over `dims`, which stay with size 1."""
    return rewriting.call(aten.mean.dim, value, list(dims), True)


def exp(rewriting: Rewriting, value: Node) -> Node:
    """e to the power of `value`."""
    return rewriting.call(aten.exp.default, value)


def log(rewriting: Rewriting, value: Node) -> Node:
    """The natural logarithm."""
    return rewriting.call(aten.log.default, value)


def rsqrt(rewriting: Rewriting, value: Node) -> Node:
    """One over the square root."""
    return rewriting.call(aten.rsqrt.default, value)


def relu(rewriting: Rewriting, value: Node) -> Node:
    """The value, or zero where it is negative."""
    return rewriting.call(aten.relu.default, value)


def sigmoid(rewriting: Rewriting, value: Node) -> Node:
    """The logistic function."""
    return rewriting.call(aten.sigmoid.default, value)
