"""Runs operators with axes on stored tensors that differ from the operands by dimensions of size 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openneutron.ir.graph import Op
from openneutron.ir.views import View

__all__ = ["UnitDimensionMap", "map_unit_dimensions"]

Shape = tuple[int, ...]

# The entries of the attributes with one entry per dimension, for a dimension that the operator leaves as it is.
_UNCHANGED: Mapping[str, Any] = {"begin": 0, "size": 1, "paddings": (0, 0)}


@dataclass(frozen=True)
class UnitDimensionMap:
    """Maps the dimensions of an operator's operands to dimensions of the stored tensors, whose rank is `rank`."""

    where: Mapping[int, int]
    """The stored dimension for each dimension that the operator changes or that is larger than 1."""
    rank: int

    def shape(self, shape: Sequence[int]) -> Shape:
        """Returns the stored shape of an operand or of the output."""
        stored = [1] * self.rank
        for dim, position in self.where.items():
            stored[position] = shape[dim]
        return tuple(stored)

    def attributes(self, op: Op) -> dict[str, object]:
        """Returns the attributes of the operator that refer to dimensions, renumbered for the stored tensors."""
        attrs: dict[str, object] = {}
        for name in op.kind.axes:
            axes = op.attrs[name]
            attrs[name] = self.where[axes] if isinstance(axes, int) else tuple(self.where[axis] for axis in axes)
        for name in op.kind.dimensions:
            entries = [_UNCHANGED[name]] * self.rank
            for dim, position in self.where.items():
                entries[position] = op.attrs[name][dim]
            attrs[name] = tuple(entries)
        return attrs


def map_unit_dimensions(op: Op, views: Sequence[View]) -> UnitDimensionMap | None:
    """Returns the map by which `op` can compute on the stored tensors of its operands `views`.

    Returns None if `op` already reads stored tensors, if a view differs from its stored tensor by more than dimensions
    of size 1, or if no map holds for all operands.
    """
    shapes = [view.shape for view in views] + [op.output.shape]
    is_viewed = any(not view.is_identity for view in views)
    if not is_viewed or len(set(map(len, shapes))) > 1 or any(view.stored.data is not None for view in views):
        return None
    axes = {int(axis) for name in op.kind.axes for axis in np.atleast_1d(op.attrs[name])}
    changed = [dim for dim in range(len(shapes[0])) if dim in axes or any(shape[dim] > 1 for shape in shapes)]
    first = max(views, key=lambda view: sum(size > 1 for size in view.shape))
    where = _stored_positions(first.shape, changed, first.stored.shape)
    if where is None:
        return None
    found = UnitDimensionMap(where, len(first.stored.shape))
    same = all(view.in_stored_order and view.stored.shape == found.shape(view.shape) for view in views)
    return found if same else None


def _stored_positions(shape: Sequence[int], dims: Sequence[int], stored: Sequence[int]) -> dict[int, int] | None:
    """Returns an increasing stored position for each of `dims` with the same size; None if there is none.

    A dimension of size 1 keeps its position if possible.
    """
    where: dict[int, int] = {}
    last = -1
    for dim in dims:
        rest = range(last + 1, len(stored))
        larger = next((position for position in rest if stored[position] > 1), len(stored))
        if shape[dim] > 1:
            last = larger
        else:
            units = range(last + 1, larger)
            last = dim if dim in units else next(iter(units), len(stored))
        if last == len(stored) or stored[last] != shape[dim]:
            return None
        where[dim] = last
    return where
