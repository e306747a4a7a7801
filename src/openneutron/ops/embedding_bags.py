"""Decomposition of embedding_bag: a lookup, and sums, means or maxima of the looked-up rows of each bag."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.fx import Node

from openneutron.core.fx import shape_of
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.graph_builder import amax, mean, mul, reshape, sum_, unsqueeze
from openneutron.ops.indexing import MAX_PICKING_WEIGHTS, MAX_RUNS, multiply_along
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import constraint

__all__ = ["DECOMPOSED"]

aten = torch.ops.aten
_SUM, _MEAN, _MAX = 0, 1, 2


def _bag_starts(instance: OpInstance) -> list[int] | None:
    """Returns the first index of each bag, followed by the number of indices; None unless all are known."""
    offsets, shape = instance.constant("offsets"), instance.shape_of("indices")
    if offsets is None or not all(isinstance(size, int) for size in shape):
        return None
    starts = [int(start) for start in offsets]
    return starts if instance.args["include_last_offset"] else [*starts, math.prod(shape)]


@constraint
def has_constant_bags(instance: OpInstance) -> bool:
    """`offsets` is a constant, as for indices [bags, indices of a bag], and the number of indices is fixed."""
    return _bag_starts(instance) is not None


@constraint
def has_few_indices(instance: OpInstance) -> bool:
    """All bags have the same number of indices, or bags times indices is at most {MAX_PICKING_WEIGHTS}. For the mode
    "max", there are at most {MAX_RUNS} bags of different sizes.
    """
    starts = _bag_starts(instance)
    if starts is None or _common_size(starts) is not None:
        return True
    bags = len(starts) - 1
    return bags <= MAX_RUNS if instance.args["mode"] == _MAX else bags * starts[-1] <= MAX_PICKING_WEIGHTS


def _common_size(starts: Sequence[int]) -> int | None:
    """Returns the number of indices of every bag; None if bags differ, are empty or begin later than at index 0."""
    sizes = {end - start for start, end in pairwise(starts)}
    return sizes.pop() if len(sizes) == 1 and starts[0] == 0 and min(sizes) > 0 else None


@constraint
def sums_without_padding(instance: OpInstance) -> bool:
    """There is no `padding_idx`, or the mode is "sum" and the weight is a constant."""
    padded = instance.args.get("padding_idx") is not None
    return not padded or (instance.args["mode"] == _SUM and instance.constant("weight") is not None)


def _embedding_bag(rewriting: Rewriting) -> tuple[Node, ...]:
    args, starts = rewriting.args, _bag_starts(rewriting.instance)
    assert starts is not None  # has_constant_bags holds
    weight, padding = args["weight"], args.get("padding_idx")
    if padding is not None:
        rows = rewriting.value_of("weight")
        assert rows is not None  # sums_without_padding holds
        weight = rewriting.constant(rows.index_fill(0, torch.tensor([int(padding)]), 0.0))
    indices = reshape(rewriting, args["indices"], (starts[-1],)) if not _is_flat(args["indices"], starts) else None
    values = rewriting.call(aten.embedding.default, weight, indices or args["indices"])
    if args["per_sample_weights"] is not None:
        values = mul(rewriting, values, unsqueeze(rewriting, args["per_sample_weights"], 1))
    return (_reduce_bags(rewriting, values, starts),) * 4


def _is_flat(indices: Node, starts: Sequence[int]) -> bool:
    return shape_of(indices) == (starts[-1],)


def _reduce_bags(rewriting: Rewriting, values: Node, starts: Sequence[int]) -> Node:
    mode, width, size = rewriting.args["mode"], shape_of(values)[1], _common_size(starts)
    if size is None and mode == _MAX:
        return rewriting.call(aten.cat.default, [_max_of_bag(rewriting, values, *bag) for bag in pairwise(starts)], 0)
    if size is None:
        matrix = torch.zeros(len(starts) - 1, starts[-1])
        for row, (start, end) in enumerate(pairwise(starts)):
            matrix[row, start:end] = 1.0 if mode == _SUM else 1.0 / max(1, end - start)
        return multiply_along(rewriting, values, 0, rewriting.constant(matrix))
    bags = reshape(rewriting, values, (len(starts) - 1, size, width))
    reduce = {_SUM: sum_, _MEAN: mean, _MAX: amax}[mode]
    return reshape(rewriting, reduce(rewriting, bags, [1]), (len(starts) - 1, width))


def _max_of_bag(rewriting: Rewriting, values: Node, start: int, end: int) -> Node:
    """Computes the largest values of one bag; zeros for an empty bag."""
    if start == end:
        return rewriting.constant(torch.zeros(1, shape_of(values)[1]))
    return amax(rewriting, rewriting.call(aten.slice.Tensor, values, 0, start, end), [0])


DECOMPOSED = (
    Decomposition(
        name="embedding_bag",
        targets=("aten.embedding_bag.padding_idx", "aten.embedding_bag.default"),
        rewrite=_embedding_bag,
        constraints=(has_constant_bags, has_few_indices, sums_without_padding),
        becomes="embedding on the CPU; sum, mean or amax for bags of the same size, else linear with the weights of "
        "each bag, or slice and amax; mul for per_sample_weights",
    ),
)
