"""Decompositions of scans, which combine each value along a dimension with all values before it.

A scan of n values takes log2(n) rounds (Hillis and Steele, "Data parallel algorithms", 1986). In the round with
distance d, each value is combined with the value d positions before it, which by then holds the result of d values.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Node

from openneutron.core.fx import dtype_of, shape_of
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.graph_builder import convert, mul, slice_

__all__ = ["DECOMPOSED"]

aten = torch.ops.aten

_ROUND = "for each doubling of the distance: slice, slice, slice"


def _scanned(rewriting: Rewriting, combine: Callable[[Node, Node], Node]) -> Node:
    """Combines each value along the argument `dim` with all values before it, by an associative function."""
    values: Node = rewriting.args["self"]
    if dtype_of(values) != torch.float32:
        values = convert(rewriting, values, torch.float32)
    shape = shape_of(values)
    return _scanned_along(rewriting, values, rewriting.args["dim"] % len(shape), combine) if shape else values


def _scanned_along(rewriting: Rewriting, values: Node, dim: int, combine: Callable[[Node, Node], Node]) -> Node:
    size, distance = shape_of(values)[dim], 1
    while distance < size:
        first = slice_(rewriting, values, dim, range(distance))
        rest = slice_(rewriting, values, dim, range(distance, size))
        earlier = slice_(rewriting, values, dim, range(size - distance))
        values = rewriting.call(aten.cat.default, [first, combine(rest, earlier)], dim)
        distance *= 2
    return values


def _extremes(combine: torch._ops.OpOverload) -> Callable[[Rewriting], tuple[Node, ...]]:
    """Returns the rewrite of cummax or cummin."""

    def rewrite(rewriting: Rewriting) -> tuple[Node, ...]:
        values = _scanned(rewriting, lambda a, b: rewriting.call(combine, a, b))
        if not _returns_indices(rewriting.instance.node):
            return (values,)
        return values, _indices(rewriting, values)

    return rewrite


def _returns_indices(node: Node) -> bool:
    """Returns whether the second output of `node`, the indices, is read."""
    readers = (user for user in node.users if user.target is operator.getitem)
    return any(reader.args[1] == 1 and reader.users for reader in readers)


def _indices(rewriting: Rewriting, extremes: Node) -> Node:
    """The last position up to each position at which the value is the extreme. Computed on integers, by the CPU."""
    shape = shape_of(extremes)
    if not shape:
        return rewriting.constant(torch.tensor(0))
    dim = rewriting.args["dim"] % len(shape)
    positions = torch.arange(shape[dim]).reshape(-1, *(1,) * (len(shape) - 1 - dim))
    is_extreme = rewriting.call(aten.eq.Tensor, rewriting.args["self"], extremes)
    zero = rewriting.constant(torch.tensor(0))
    found = rewriting.call(aten.where.self, is_extreme, rewriting.constant(positions), zero)
    return _scanned_along(rewriting, found, dim, lambda a, b: rewriting.call(aten.maximum.default, a, b))


def _cumprod(rewriting: Rewriting) -> Node:
    return _scanned(rewriting, lambda a, b: mul(rewriting, a, b))


def _logcumsumexp(rewriting: Rewriting) -> Node:
    return _scanned(rewriting, lambda a, b: rewriting.call(aten.logaddexp.default, a, b))


DECOMPOSED = (
    Decomposition(
        name="cummax",
        targets=("aten.cummax.default",),
        rewrite=_extremes(aten.maximum.default),
        becomes=f"{_ROUND}, maximum, cat; for the indices also eq, where and the same rounds on the CPU",
    ),
    Decomposition(
        name="cummin",
        targets=("aten.cummin.default",),
        rewrite=_extremes(aten.minimum.default),
        becomes=f"{_ROUND}, minimum, cat; for the indices also eq, where and the same rounds on the CPU",
    ),
    Decomposition(
        name="cumprod",
        targets=("aten.cumprod.default",),
        rewrite=_cumprod,
        becomes=f"{_ROUND}, mul, cat",
        notes="Each round rounds to int8, with a scale of its own.",
    ),
    Decomposition(
        name="logcumsumexp",
        targets=("aten.logcumsumexp.default",),
        rewrite=_logcumsumexp,
        becomes=f"{_ROUND}, logaddexp, cat",
    ),
)
