"""Decompositions of similarities and distances of vectors, logsumexp and logaddexp."""

from __future__ import annotations

import torch
from torch.fx import Node

from openneutron.core.fx import shape_of
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.graph_builder import add, exp, log, mul, rsqrt, sub
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.reductions import SIMPLE_ORDERS
from openneutron.ops.spec import constraint

__all__ = ["DECOMPOSED"]

aten = torch.ops.aten

# The smallest squared norm in a division. For smaller norms, int8 rounding removes the direction of the vector, and the
# inverse of a zero norm in one sample would widen the range of the tensor for all others.
LEAST_SQUARE = 1e-8


def _normalize_vectors(rewriting: Rewriting, vectors: Node, dim: int, size: int, least: float) -> Node:
    """Divides each vector along `dim` (a negative number) by its norm, sqrt(sum of squares + `least`).

    `size` is the number of values of a vector after broadcasting. If `vectors` has size 1 along `dim`, the norm of the
    broadcast vector is computed.
    """
    shape = shape_of(vectors)
    squares = mul(rewriting, vectors, vectors)
    if len(shape) >= -dim and shape[dim] == size:
        squares = rewriting.call(aten.sum.dim_IntList, squares, [dim], True)
    else:
        squares = mul(rewriting, squares, float(size))
    return mul(rewriting, vectors, rsqrt(rewriting, add(rewriting, squares, least)))


def _cosine_similarity(rewriting: Rewriting) -> Node:
    args = rewriting.args
    shape = torch.broadcast_shapes(shape_of(args["x1"]), shape_of(args["x2"]))
    rank, least = len(shape), max(float(args["eps"]) ** 2, LEAST_SQUARE)
    dim = args["dim"] % rank - rank
    first, second = (_normalize_vectors(rewriting, args[name], dim, shape[dim], least) for name in ("x1", "x2"))
    return rewriting.call(aten.sum.dim_IntList, mul(rewriting, first, second), [dim], False)


@constraint
def has_a_simple_order(instance: OpInstance) -> bool:
    """p is 1, 2, inf or -inf."""
    return float(instance.args["p"]) in SIMPLE_ORDERS


def _pairwise_distance(rewriting: Rewriting) -> Node:
    args = rewriting.args
    difference = add(rewriting, sub(rewriting, args["x1"], args["x2"]), float(args["eps"]))
    return rewriting.call(aten.linalg_vector_norm.default, difference, float(args["p"]), [-1], bool(args["keepdim"]))


def _cdist(rewriting: Rewriting) -> Node:
    """Computes the distance between each vector of `x1` and each vector of `x2`."""
    args = rewriting.args
    first = rewriting.call(aten.unsqueeze.default, args["x1"], -2)
    second = rewriting.call(aten.unsqueeze.default, args["x2"], -3)
    difference = sub(rewriting, first, second)
    return rewriting.call(aten.linalg_vector_norm.default, difference, float(args["p"]), [-1])


def _log_sum_exp(rewriting: Rewriting) -> Node:
    values, dims = rewriting.args["self"], list(rewriting.args["dim"])
    largest = rewriting.call(aten.amax.default, values, dims, True)
    total = rewriting.call(aten.sum.dim_IntList, exp(rewriting, sub(rewriting, values, largest)), dims, True)
    return rewriting.call(aten.reshape.default, add(rewriting, largest, log(rewriting, total)), list(rewriting.shape))


def _log_add_exp(rewriting: Rewriting) -> Node:
    """Computes max(a, b) + log(1 + exp(-|a - b|)); the second term lies between 0 and log(2)."""
    first, second = rewriting.args["self"], rewriting.args["other"]
    magnitude = rewriting.call(aten.abs.default, sub(rewriting, first, second))
    rest = log(rewriting, rewriting.call(aten.sigmoid.default, magnitude))
    return sub(rewriting, rewriting.call(aten.maximum.default, first, second), rest)


DECOMPOSED = (
    Decomposition(
        name="cosine_similarity",
        targets=("aten.cosine_similarity.default",),
        rewrite=_cosine_similarity,
        becomes="for each vector: mul, sum, add, rsqrt, mul; then mul, sum",
        notes=f"Squared lengths are at least {LEAST_SQUARE:g}. Each vector is divided by its length before the "
        "product, because a product of two lengths has a wider range than each length.",
    ),
    Decomposition(
        name="pairwise_distance",
        targets=("aten.pairwise_distance.default",),
        rewrite=_pairwise_distance,
        constraints=(has_a_simple_order,),
        becomes="sub, add, vector_norm",
    ),
    Decomposition(
        name="cdist",
        targets=("aten.cdist.default",),
        rewrite=_cdist,
        constraints=(has_a_simple_order,),
        becomes="unsqueeze, sub, vector_norm",
    ),
    Decomposition(
        name="logsumexp",
        targets=("aten.logsumexp.default",),
        rewrite=_log_sum_exp,
        becomes="amax, sub, exp, sum, log, add",
    ),
    Decomposition(
        name="logaddexp",
        targets=("aten.logaddexp.default",),
        rewrite=_log_add_exp,
        becomes="sub, abs, sigmoid, log, maximum, sub",
    ),
)
