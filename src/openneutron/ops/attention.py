"""Decompositions of attention, and of softmaxes that are too large for one operator of the NPU."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from openneutron.core.fx import note, note_of, op_name, shape_of
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.elementwise import (
    MAX_SOFTMAX_CHANNELS,
    MAX_SOFTMAX_ELEMENTS,
    MAX_SOFTMAX_POSITIONS,
    has_few_softmax_channels,
)
from openneutron.ops.masks import add_and_hide, hide_unless, hides_from_softmax, limit_scores
from openneutron.ops.op_instance import OpInstance

__all__ = ["DECOMPOSED", "WIDE_SOFTMAX", "is_difference_of_scores", "mark_difference_of_scores"]

aten = torch.ops.aten

WIDE_SOFTMAX = 256
"""A softmax over more values has an average probability below 1/256, which is the step of its int8 output."""

_DIFFERENCE_OF_SCORES = "openneutron.difference_of_scores"


def mark_difference_of_scores(node: Node) -> None:
    """Marks `node`, an input of exp, as scores from which the largest score of their row was subtracted."""
    note(node, _DIFFERENCE_OF_SCORES, True)


def is_difference_of_scores(node: Node) -> bool:
    """Whether `mark_difference_of_scores` marked `node`."""
    return bool(note_of(node, _DIFFERENCE_OF_SCORES))


def _constant_mask(rewriting: Rewriting) -> torch.Tensor | None:
    """Returns the constant that is added to the scores; None if no mask is given or the mask is computed."""
    mask = rewriting.value_of("attn_mask")
    if rewriting.args["is_causal"]:
        queries, keys = (rewriting.instance.shape_of(name)[-2] for name in ("query", "key"))
        mask = torch.ones(queries, keys, dtype=torch.bool).tril()
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape).masked_fill(~mask.bool(), -math.inf)


def _scaled_scores(rewriting: Rewriting) -> Node:
    """Computes scale * (query @ key.T). A mul applies the scale to the smaller of `query` and `key`."""
    query, key, scale = (rewriting.args[name] for name in ("query", "key", "scale"))
    features = shape_of(query)[-1]
    scale = 1 / math.sqrt(features) if scale is None else scale
    if math.prod(shape_of(key)) < math.prod(shape_of(query)):
        key = rewriting.call(aten.mul.Tensor, key, scale)
    else:
        query = rewriting.call(aten.mul.Tensor, query, scale)
    return _grouped_product(rewriting, query, rewriting.call(aten.transpose.int, key, -2, -1))


def _grouped_product(rewriting: Rewriting, left: Node, right: Node) -> Node:
    """Computes left @ right. With enable_gqa, consecutive heads of `left` share one head of `right`."""
    if not rewriting.args["enable_gqa"]:
        return rewriting.call(aten.matmul.default, left, right)
    *batch, heads, rows, columns = shape_of(left)
    shared = shape_of(right)[-3]
    grouped = rewriting.call(aten.reshape.default, left, [*batch, shared, heads // shared, rows, columns])
    product = rewriting.call(aten.matmul.default, grouped, rewriting.call(aten.unsqueeze.default, right, -3))
    return rewriting.call(aten.reshape.default, product, [*batch, heads, rows, shape_of(right)[-1]])


def _masked_at_run_time(rewriting: Rewriting, scores: Node, mask: Node) -> Node:
    if not mask.meta["val"].is_floating_point():
        return hide_unless(rewriting, scores, mask)
    masked = rewriting.call(aten.add.Tensor, scores, mask)
    return limit_scores(rewriting, masked)


def _attention(rewriting: Rewriting) -> Node:
    scores, mask = _scaled_scores(rewriting), _constant_mask(rewriting)
    blind = torch.tensor(False)
    if mask is not None:
        hidden = hides_from_softmax(mask)
        blind = (mask == -math.inf).all(-1, keepdim=True)
        numbers = mask.masked_fill(hidden, 0.0)
        scores = add_and_hide(rewriting, scores, numbers, hidden & ~hidden.all(-1, keepdim=True))
    elif (computed := rewriting.args["attn_mask"]) is not None:
        scores = _masked_at_run_time(rewriting, scores, computed)
    weights = rewriting.call(aten.softmax.int, scores, -1)
    if dropout := rewriting.args["dropout_p"]:
        weights = rewriting.call(aten.dropout.default, weights, dropout, True)
    if bool(blind.any()):  # torch returns zeros for a query whose keys are all masked
        weights = rewriting.call(aten.mul.Tensor, weights, rewriting.constant(1 - blind.float()))
    return _grouped_product(rewriting, weights, rewriting.args["value"])


_WEIGHTED_SUMS = {"aten.matmul.default", "aten.bmm.default", "aten.reshape.default", "aten.view.default"}


def _has_many_rows(instance: OpInstance) -> bool:
    channels = instance.shape[int(instance.args["dim"]) % len(instance.shape)]
    if channels > WIDE_SOFTMAX and any(op_name(reader) in _WEIGHTED_SUMS for reader in instance.node.users):
        return False  # passes.divide_after_sums replaces it by exp and a sum
    return channels <= MAX_SOFTMAX_CHANNELS and not has_few_softmax_channels.holds(instance)


def _split_softmax(rewriting: Rewriting) -> Node:
    """Splits the rows of the matrix [rows, channels] into parts that fit the limits of SOFTMAX."""
    dim = int(rewriting.args["dim"])
    values = rewriting.call(aten.transpose.int, rewriting.args["self"], dim, -1)
    channels = shape_of(values)[-1]
    rows = math.prod(rewriting.shape) // channels
    matrix = rewriting.call(aten.reshape.default, values, [rows, channels])
    at_once = min(MAX_SOFTMAX_POSITIONS, MAX_SOFTMAX_ELEMENTS // channels)
    parts = [
        rewriting.call(aten.softmax.int, rewriting.call(aten.slice.Tensor, matrix, 0, first, first + at_once), -1)
        for first in range(0, rows, at_once)
    ]
    joined = rewriting.call(aten.reshape.default, rewriting.call(aten.cat.default, parts, 0), list(shape_of(values)))
    return rewriting.call(aten.transpose.int, joined, dim, -1)


DECOMPOSED = (
    Decomposition(
        name="scaled_dot_product_attention",
        targets=("aten.scaled_dot_product_attention.default",),
        rewrite=_attention,
        becomes="mul, bmm, softmax, bmm; minimum for a mask that hides keys, add for other masks",
        notes="In quantization-aware training, a dropout follows the softmax.",
    ),
    Decomposition(
        name="softmax of many rows",
        targets=("aten.softmax.int", "aten._softmax.default"),
        rewrite=_split_softmax,
        applies=_has_many_rows,
        becomes="slices, softmaxes and a cat",
    ),
)
