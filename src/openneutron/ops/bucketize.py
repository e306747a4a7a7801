"""Decompositions of bucketize and searchsorted, which ExecuTorch's CPU kernels lack, into comparisons on the CPU."""

from __future__ import annotations

import torch
from torch.fx import Node

from openneutron.core.fx import shape_of
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.graph_builder import unsqueeze
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import constraint

__all__ = ["DECOMPOSED"]

aten = torch.ops.aten

# The largest number of comparisons, whose results need one byte each at run time.
MAX_COMPARISONS = 1 << 20


def _bounds_of(instance: OpInstance) -> str:
    """Returns the name of the argument with the boundaries."""
    return "boundaries" if "boundaries" in instance.args else "sorted_sequence"


@constraint
def has_sorted_boundaries(instance: OpInstance) -> bool:
    """The boundaries are sorted: there is no `sorter`."""
    return instance.args.get("sorter") is None


@constraint
def makes_few_comparisons(instance: OpInstance) -> bool:
    """The number of values times the number of boundaries is at most {MAX_COMPARISONS}."""
    values, boundaries = torch.Size(instance.shape), torch.Size(instance.shape_of(_bounds_of(instance)))
    return values.numel() * boundaries[-1] <= MAX_COMPARISONS


def _counted_boundaries(rewriting: Rewriting) -> Node:
    """Counts the boundaries below each value; with `right`, the boundaries up to each value."""
    args = rewriting.args
    values, boundaries = args["self"], args[_bounds_of(rewriting.instance)]
    if len(shape_of(boundaries)) > 1:  # one row of boundaries for each row of values
        boundaries = unsqueeze(rewriting, boundaries, -2)
    includes_equal = args["right"] or args.get("side") == "right"
    compared = rewriting.call(
        aten.ge.Tensor if includes_equal else aten.gt.Tensor, unsqueeze(rewriting, values, -1), boundaries
    )
    dtype = torch.int32 if args["out_int32"] else torch.int64
    return rewriting.call(aten.sum.dim_IntList, compared, [-1], dtype=dtype)


DECOMPOSED = (
    Decomposition(
        name="bucketize, searchsorted",
        targets=("aten.bucketize.Tensor", "aten.searchsorted.Tensor"),
        rewrite=_counted_boundaries,
        returns_integers=True,
        constraints=(has_sorted_boundaries, makes_few_comparisons),
        becomes="comparisons with all boundaries and a sum, on the CPU",
    ),
)
