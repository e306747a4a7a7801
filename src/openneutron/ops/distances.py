"""Similarities and distances of vectors, and logarithms of sums of exponentials."""

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

# The least squared norm in a division. Below it, int8 has lost the vector's direction, and the inverse of a zero norm
# in one sample would take the whole range of codes.
LEAST_SQUARE = 1e-8


def _unit(rewriting: Rewriting, vectors: Node, dim: int, size: int, least: float) -> Node:
    """Divide vectors of `size` values along `dim`, which is negative, by their lengths.

    A vector of one value that is broadcast along `dim` has the length of all its copies.
    """
    shape = shape_of(vectors)
    squares = mul(rewriting, vectors, vectors)
    if len(shape) >= -dim and shape[dim] == size:
        squares = rewriting.call(aten.sum.dim_IntList, squares, [dim], True)
    else:
        squares = mul(rewriting, squares, float(size))
    return mul(rewriting, vectors, rsqrt(rewriting, add(rewriting, squares, least)))


def _cosine(rewriting: Rewriting) -> Node:
    args = rewriting.args
    shape = torch.broadcast_shapes(shape_of(args["x1"]), shape_of(args["x2"]))
    rank, least = len(shape), max(float(args["eps"]) ** 2, LEAST_SQUARE)
    dim = args["dim"] % rank - rank
    first, second = (_unit(rewriting, args[name], dim, shape[dim], least) for name in ("x1", "x2"))
    return rewriting.call(aten.sum.dim_IntList, mul(rewriting, first, second), [dim], False)


@constraint
def has_a_simple_order(instance: OpInstance) -> bool:
    """p is 1, 2, inf or -inf."""
    return float(instance.args["p"]) in SIMPLE_ORDERS


def _distance(rewriting: Rewriting) -> Node:
    args = rewriting.args
    difference = add(rewriting, sub(rewriting, args["x1"], args["x2"]), float(args["eps"]))
    return rewriting.call(aten.linalg_vector_norm.default, difference, float(args["p"]), [-1], bool(args["keepdim"]))


def _distances(rewriting: Rewriting) -> Node:
    """The distance of each of the first vectors from each of the second ones."""
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
    """The larger one, and log(1 + exp(-|difference|)), which lies between 0 and log(2)."""
    first, second = rewriting.args["self"], rewriting.args["other"]
    magnitude = rewriting.call(aten.abs.default, sub(rewriting, first, second))
    rest = log(rewriting, rewriting.call(aten.sigmoid.default, magnitude))
    return sub(rewriting, rewriting.call(aten.maximum.default, first, second), rest)


DECOMPOSED = (
    Decomposition(
        name="cosine_similarity",
        targets=("aten.cosine_similarity.default",),
        rewrite=_cosine,
        becomes="for each vector mul, sum, add, rsqrt, mul; mul, sum",
        notes=f"Squared lengths below {LEAST_SQUARE:g} are replaced by it. Each vector is divided by its length "
        "before the product: the product of two lengths would need the range of both.",
    ),
    Decomposition(
        name="pairwise_distance",
        targets=("aten.pairwise_distance.default",),
        rewrite=_distance,
        constraints=(has_a_simple_order,),
        becomes="sub, add, vector_norm",
    ),
    Decomposition(
        name="cdist",
        targets=("aten.cdist.default",),
        rewrite=_distances,
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
