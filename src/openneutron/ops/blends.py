"""Decompositions of addcmul, addcdiv and lerp."""

from __future__ import annotations

import torch
from torch.fx import Node

from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.graph_builder import add, mul
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.sign_analysis import is_never_negative
from openneutron.ops.spec import constraint

__all__ = ["DECOMPOSED"]

aten = torch.ops.aten


def _add_term(rewriting: Rewriting, term: Node) -> Node:
    """Computes self + value * term."""
    value = float(rewriting.args["value"])
    if value == 0:
        return rewriting.call(aten.expand.default, rewriting.args["self"], list(rewriting.shape))
    return add(rewriting, rewriting.args["self"], term, alpha=value)


def _addcmul(rewriting: Rewriting) -> Node:
    args = rewriting.args
    return _add_term(rewriting, mul(rewriting, args["tensor1"], args["tensor2"]))


def _addcdiv(rewriting: Rewriting) -> Node:
    args = rewriting.args
    return _add_term(rewriting, rewriting.call(aten.div.Tensor, args["tensor1"], args["tensor2"]))


@constraint
def divides_by_positive_values(instance: OpInstance) -> bool:
    """The divisor is a constant without zeros, or is never negative (an output of relu, abs, exp or a clamp from 0)."""
    divisor = instance.constant("tensor2")
    return is_never_negative(instance, instance.args["tensor2"]) if divisor is None else bool((divisor != 0).all())


def _lerp_by_number(rewriting: Rewriting) -> Node:
    start, end, weight = (rewriting.args[name] for name in ("self", "end", "weight"))
    if weight in (0, 1):
        return rewriting.call(aten.expand.default, end if weight else start, list(rewriting.shape))
    return add(rewriting, mul(rewriting, start, 1.0 - weight), end, alpha=float(weight))


def _lerp(rewriting: Rewriting) -> Node:
    start, end, weight = (rewriting.args[name] for name in ("self", "end", "weight"))
    rest = rewriting.call(aten.rsub.Scalar, weight, 1.0)
    return add(rewriting, mul(rewriting, start, rest), mul(rewriting, end, weight))


DECOMPOSED = (
    Decomposition(
        name="addcmul",
        targets=("aten.addcmul.default",),
        rewrite=_addcmul,
        becomes="mul, add",
    ),
    Decomposition(
        name="addcdiv",
        targets=("aten.addcdiv.default",),
        rewrite=_addcdiv,
        constraints=(divides_by_positive_values,),
        becomes="div, add",
    ),
    Decomposition(
        name="lerp by a number",
        targets=("aten.lerp.Scalar",),
        rewrite=_lerp_by_number,
        becomes="mul, add",
        notes="Computed as (1 - weight) * start + weight * end. torch's form rounds the difference end - start too.",
    ),
    Decomposition(
        name="lerp",
        targets=("aten.lerp.Tensor",),
        rewrite=_lerp,
        becomes="sub, mul, mul, add",
        notes="Computed as (1 - weight) * start + weight * end. torch's form rounds the difference end - start too.",
    ),
)
