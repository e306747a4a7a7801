"""Moves the division of wide softmaxes after the weighted sum that reads them, because single probabilities are too
small for int8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import constant_of
from openneutron.core.fx import arguments, finish_rewrite, first_operand, shape_of
from openneutron.ops.attention import WIDE_SOFTMAX, mark_difference_of_scores
from openneutron.ops.declared import is_op, is_view
from openneutron.ops.decomposition import Rewriting
from openneutron.ops.graph_builder import amax, exp, linear, mul, reshape, rsqrt, sub, sum_
from openneutron.ops.op_instance import OpInstance
from openneutron.targets import NeutronTarget

__all__ = ["divide_after_sums"]


@dataclass(frozen=True)
class _WeightedSum:
    """An operator `node` that sums over `probabilities`.

    The divisors (one per row) are reshaped to `rows`, which broadcasts to the output of `node`. `product` is the
    multiplication of the probabilities before the sum, or None. `weights` is the other operand of `product` if it is a
    constant [N], or None.
    """

    node: Node
    rows: tuple[int, ...]
    probabilities: Node
    product: Node | None = None
    weights: torch.Tensor | None = None


def divide_after_sums(
    module: GraphModule, target: NeutronTarget, keeps_float: Callable[[Node], bool] = lambda _: False
) -> bool:
    """Moves divisions. Rule, linear in nodes: sum(softmax(x) * y), matmul(softmax(x), y) and linear(softmax(x)) without
    a bias become the same operators on e = exp(x - amax(x)), and their output is multiplied by 1 / sum(e).

    The softmax is over the last dimension and has more than `WIDE_SOFTMAX` values. Views between softmax and sum may
    split that dimension, and the sum may be over a part of it. A softmax that has other readers, or for which
    `keeps_float` is true, is not changed.
    """
    changed = False
    for node in list(module.graph.nodes):
        if not is_op(node, "softmax") or keeps_float(node) or not _is_wide(node):
            continue
        sums = list(_weighted_sums(module, node, len(shape_of(node)) - 1))
        if sums and None not in sums and not any(keeps_float(found.node) for found in sums if found is not None):
            _move_division(module, target, node, [found for found in sums if found is not None])
            changed = True
    return finish_rewrite(module, changed=changed)


def _is_wide(softmax: Node) -> bool:
    shape, dim = shape_of(softmax), int(arguments(softmax)["dim"])
    is_float = softmax.meta["val"].dtype is torch.float32
    return is_float and len(shape) > 1 and dim % len(shape) == len(shape) - 1 and shape[-1] > WIDE_SOFTMAX


def _weighted_sums(module: GraphModule, value: Node, leading: int) -> Iterator[_WeightedSum | None]:
    """Returns the weighted sums that read the probabilities `value`, and None for each other reader.

    The first `leading` dimensions of `value` are the rows of the softmax.
    """
    shape = shape_of(value)
    for reader in value.users:
        if is_view(reader):
            viewed = _leading_dims(shape_of(reader), math.prod(shape[leading:]))
            if viewed is None or shape_of(reader)[viewed:] == ():
                yield None
            else:
                yield from _weighted_sums(module, reader, viewed)
        elif _multiplies_matrices(reader, value):
            yield _WeightedSum(reader, (*shape[:-1], 1), value) if leading == len(shape) - 1 else None
        elif is_op(reader, "mul") and len(reader.users) == 1 and shape_of(reader) == shape:
            yield _sum_of_product(module, value, reader, leading)
        elif _is_sum_over_dims(reader):
            yield _weighted_sum(reader, value, leading)
        else:
            yield None


def _multiplies_matrices(reader: Node, value: Node) -> bool:
    """Returns whether `reader` is a matrix product of `value`, on the left, and another value, without a bias."""
    if is_op(reader, "linear") and arguments(reader)["bias"] is not None:
        return False
    return is_op(reader, "bmm", "linear") and reader.args[0] is value and reader.args[1] is not value


def _leading_dims(shape: tuple[int, ...], last: int) -> int | None:
    """Returns the number of leading dimensions if the other dimensions hold exactly `last` values, otherwise None."""
    count, size = len(shape), 1
    while count and size < last:
        count -= 1
        size *= shape[count]
    return count if size == last else None


def _is_sum_over_dims(node: Node) -> bool:
    """Returns whether `node` is a sum over given dimensions."""
    return is_op(node, "sum") and "dim" in arguments(node)


def _weighted_sum(reader: Node, value: Node, leading: int) -> _WeightedSum | None:
    """Returns the weighted sum that the sum `reader` of `value` computes.

    Returns None if `reader` sums over one of the first `leading` dimensions, sums over no dimension, or has a dtype.
    """
    shape, args = shape_of(value), arguments(reader)
    dims = {dim % len(shape) for dim in args["dim"] or ()}
    if not dims or min(dims) < leading or args["dtype"] is not None:
        return None
    kept = [1 for dim in range(leading, len(shape)) if args["keepdim"] or dim not in dims]
    return _WeightedSum(reader, (*shape[:leading], *kept), value)


def _sum_of_product(module: GraphModule, value: Node, product: Node, leading: int) -> _WeightedSum | None:
    others = [operand for operand in product.all_input_nodes if operand is not value]
    (reader,) = product.users
    if len(others) != 1 or not _is_sum_over_dims(reader):
        return None
    found = _weighted_sum(reader, product, leading)
    if found is None:
        return None
    shape, constant = shape_of(value), constant_of(module, others[0])
    is_of_rows = leading == len(shape) - 1 and constant is not None and constant.numel() == shape[-1]
    weights = constant.reshape(-1) if is_of_rows and constant is not None else None
    return _WeightedSum(reader, found.rows, value, product, weights)


def _move_division(module: GraphModule, target: NeutronTarget, softmax: Node, sums: list[_WeightedSum]) -> None:
    before = Rewriting(module, OpInstance(softmax, target))
    scores = first_operand(softmax)
    differences = sub(before, scores, amax(before, scores, [-1]))
    mark_difference_of_scores(differences)
    numerators = exp(before, differences)
    root = rsqrt(before, sum_(before, numerators, [-1]))
    inverse = mul(before, root, root)
    softmax.replace_all_uses_with(numerators)
    for found in sums:
        values = numerators if found.probabilities is softmax else found.probabilities
        _divide_sum(Rewriting(module, OpInstance(found.node, target)), found, inverse, values)
    module.graph.erase_node(softmax)


def _divide_sum(rewriting: Rewriting, found: _WeightedSum, inverse: Node, numerators: Node) -> None:
    """Rewrites the sum to read the numerators, and multiplies its result by the inverse of their sum."""
    node = found.node
    if found.weights is not None:
        weight = rewriting.constant(found.weights[None])
        summed = reshape(rewriting, linear(rewriting, numerators, weight), shape_of(node))
    else:
        summed = rewriting.call(node.target, *node.args, **node.kwargs)  # type: ignore[arg-type]
    factor = reshape(rewriting, inverse, found.rows)
    node.replace_all_uses_with(mul(rewriting, summed, factor))
    node.graph.erase_node(node)
