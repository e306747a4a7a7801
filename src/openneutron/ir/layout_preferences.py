"""Layout preferences: the dimension orders in which the readers of a tensor need it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from openneutron.ir.graph import Graph, Layout, Op, Tensor
from openneutron.ir.kinds import RESHAPE, TRANSPOSE

__all__ = ["LayoutPreferences", "Order", "layout_preferences"]

# Dimension i of the stored tensor is dimension order[i] of the tensor.
Order = tuple[int, ...]


@dataclass
class LayoutPreferences:
    """Counts the readers that prefer each order, and the elements that these readers would otherwise transpose."""

    readers: Counter[Order] = field(default_factory=Counter)
    elements: Counter[Order] = field(default_factory=Counter)

    def add(self, order: Order, elements: int) -> None:
        """Adds a reader, which would otherwise transpose `elements` values."""
        self.readers[order] += 1
        self.elements[order] += elements

    @property
    def preferred_order(self) -> Order | None:
        """The order that most readers prefer; on a tie, the order that was added first; None without a preference."""
        return self.readers.most_common(1)[0][0] if self.readers else None

    def is_worth_a_transpose(self, order: Order, elements: int) -> bool:
        """Whether one TRANSPOSE of `elements` values replaces several that move at least `elements` values in total."""
        return self.readers[order] > 1 and self.elements[order] >= elements


def layout_preferences(graph: Graph) -> dict[int, LayoutPreferences]:
    """Returns the preferences of the readers of each tensor of `graph`, by the tensor's id. Linear in operators.

    `graph` is the input of `propagate_layouts`. Operators with a fixed order, and outputs of the graph, prefer the
    tensor's own order. An operator that supports any order prefers the order that its own readers prefer; a TRANSPOSE
    prefers that order, transposed. A RESHAPE has no preference.
    """
    found: dict[int, LayoutPreferences] = {}
    for tensor in graph.outputs:
        _add_preference(found, tensor, tuple(range(len(tensor.shape))), tensor.size)
    for op in reversed(graph.ops):
        for tensor in {id(tensor): tensor for tensor in op.inputs if tensor.data is None}.values():
            order = _preferred_by(op, tensor, found.get(id(op.output)))
            if order is not None:
                _add_preference(found, tensor, order, op.output.size)
    return found


def _preferred_by(op: Op, tensor: Tensor, output_preferences: LayoutPreferences | None) -> Order | None:
    wanted = output_preferences.preferred_order if output_preferences else None
    if op.kind is RESHAPE:
        return None
    if op.kind is TRANSPOSE:
        perm = op.attrs["perm"]
        return tuple(perm[dim] for dim in wanted or range(len(perm)))
    if op.kind.layout in (Layout.ELEMENTWISE, Layout.AXES):
        return wanted if wanted and len(wanted) == len(tensor.shape) else None
    return tuple(range(len(tensor.shape)))


def _add_preference(found: dict[int, LayoutPreferences], tensor: Tensor, order: Order, elements: int) -> None:
    found.setdefault(id(tensor), LayoutPreferences()).add(order, elements)
