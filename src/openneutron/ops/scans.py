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
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import constraint

__all__ = ["DECOMPOSED"]

aten = torch.ops.aten

_ROUND = "for each doubling of the distance slice, slice, slice"


def _scanned(rewriting: Rewriting, combine: Callable[[Node, Node], Node]) -> Node:
    """Combines each value along the argument `dim` with all values before it, by an associative function."""
    values: Node = rewriting.args["self"]
    if dtype_of(values) != torch.float32:
        values = convert(rewriting, values, torch.float32)
    shape = shape_of(values)
    if not shape:
        return values
    dim = rewriting.args["dim"] % len(shape)
    size, distance = shape[dim], 1
    while distance < size:
        first = slice_(rewriting, values, dim, range(distance))
        rest = slice_(rewriting, values, dim, range(distance, size))
        earlier = slice_(rewriting, values, dim, range(size - distance))
        values = rewriting.call(aten.cat.default, [first, combine(rest, earlier)], dim)
        distance *= 2
    return values


def _cummax(rewriting: Rewriting) -> tuple[Node]:
    return (_scanned(rewriting, lambda a, b: rewriting.call(aten.maximum.default, a, b)),)


def _cummin(rewriting: Rewriting) -> tuple[Node]:
    return (_scanned(rewriting, lambda a, b: rewriting.call(aten.minimum.default, a, b)),)


def _cumprod(rewriting: Rewriting) -> Node:
    return _scanned(rewriting, lambda a, b: mul(rewriting, a, b))


def _logcumsumexp(rewriting: Rewriting) -> Node:
    return _scanned(rewriting, lambda a, b: rewriting.call(aten.logaddexp.default, a, b))


@constraint
def returns_no_indices(instance: OpInstance) -> bool:
    """Nothing reads its second output, the indices."""
    readers = (user for user in instance.node.users if user.target is operator.getitem)
    return all(reader.args[1] == 0 or not reader.users for reader in readers)


DECOMPOSED = (
    Decomposition(
        name="cummax",
        targets=("aten.cummax.default",),
        rewrite=_cummax,
        constraints=(returns_no_indices,),
        becomes=f"{_ROUND}, maximum, cat",
    ),
    Decomposition(
        name="cummin",
        targets=("aten.cummin.default",),
        rewrite=_cummin,
        constraints=(returns_no_indices,),
        becomes=f"{_ROUND}, minimum, cat",
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
