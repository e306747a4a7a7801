"""Layout propagation: moves transposes and reshapes towards the outputs until they cancel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from openneutron.ir.graph import Graph, Kind, Layout, Op, Tensor
from openneutron.ir.kinds import TRANSPOSE
from openneutron.ir.layout_preferences import LayoutPreferences, Order, layout_preferences
from openneutron.ir.unit_dimensions import map_unit_dimensions
from openneutron.ir.views import View

__all__ = ["propagate_layouts"]

IMAGE_RANK = 4


def propagate_layouts(graph: Graph) -> Graph:
    """Applies these rules to each operator in order. Linear in the number of operators.

    Each tensor is a view of a stored tensor: the stored values in another order and shape. A value is "in order" if its
    view is the stored tensor itself.

    1. TRANSPOSE and RESHAPE change the view of their input and emit nothing.
    2. An elementwise operator computes on stored tensors; its output has the view of its first input.
    3. An operator with axes does the same, with renumbered axes, if the view permutes whole dimensions, or blocks that
       a reshape can turn into dimensions. Exception: it computes in order if another input is in order, the permuted
       order would require at least as many transposes of inputs, and the readers of its output prefer no other order.
    4. If the view permutes anything else, or if several readers of a value prefer one other order, the operator
       computes in the order that most readers of its output prefer.
    5. A FULLY_CONNECTED, or a linear's CONV_2D, reads its features in stored order. The columns of its constant weight
       are permuted to match.
    6. Any other operator, and each output of the graph, needs its values in order: the view is emitted, once.
    7. A view of a constant is a new constant.
    8. If the views of an operator with axes only add or remove dimensions of size 1, it computes on the stored tensors.
       This rule applies to graphs with a linear's CONV_2D, if it saves operators: such a linear reshapes its rows to
       images, and the operators between two linears of a recurrent network then compute on images, too.
    """
    preferences = layout_preferences(graph)
    propagated = _LayoutPropagation(graph, preferences).run()
    if not any(op.kind.layout is Layout.FEATURES and len(op.output.shape) == IMAGE_RANK for op in graph.ops):
        return propagated
    on_images = _LayoutPropagation(graph, preferences, keeps_units=True).run()
    return min(propagated, on_images, key=lambda result: len(result.ops))


@dataclass(frozen=True)
class _Reads:
    """The inputs of an operator as views of stored tensors."""

    views: list[View]
    rank: int
    """The largest rank of a view. The operator's axes are dimensions of a tensor of this rank."""
    leaders: list[View]
    """The computed inputs of this rank. They determine the order in which the operator computes."""

    @classmethod
    def from_views(cls, views: list[View]) -> _Reads:
        """Returns the inputs with these views."""
        rank = max(len(view.shape) for view in views)
        return cls(views, rank, [view for view in views if view.stored.data is None and len(view.shape) == rank])

    @property
    def viewed(self) -> list[View]:
        """The leaders whose view is not the stored tensor itself."""
        return [view for view in self.leaders if not view.is_identity]

    @property
    def moved(self) -> list[View]:
        """The leaders whose view reads the stored elements in another order."""
        return [view for view in self.viewed if not view.in_stored_order]


@dataclass
class _LayoutPropagation:
    graph: Graph
    preferences: dict[int, LayoutPreferences]  # by id of the tensor in the old graph
    keeps_units: bool = False
    """Whether rule 8 applies."""
    views: dict[int, View] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    emitted: dict[tuple[object, ...], Tensor] = field(default_factory=dict)
    origin: str = ""

    def run(self) -> Graph:
        for op in self.graph.ops:
            self.origin = op.origin
            self.views[id(op.output)] = self._rewrite_op(op)
        self.origin = "output"
        outputs = tuple(self._emit_in_order(self._view_of(tensor)) for tensor in self.graph.outputs)
        return Graph(self.graph.inputs, outputs, tuple(self.ops))

    def _view_of(self, tensor: Tensor) -> View:
        return self.views.get(id(tensor)) or View.identity(tensor)

    def _rewrite_op(self, op: Op) -> View:
        views = [self._view_of(tensor) for tensor in op.inputs]
        rewritten = None
        if op.kind.layout is Layout.VIEW:
            rewritten = self._apply_to_view(op, views[0])
        elif op.kind.layout in (Layout.ELEMENTWISE, Layout.AXES):
            rewritten = self._any_order(op, views)
        elif op.kind.layout is Layout.FEATURES:
            rewritten = self._permuted_features(op, views)
        return rewritten or View.identity(
            self._append_op(op, [self._emit_in_order(view) for view in views], op.output.shape, {})
        )

    def _append_op(self, op: Op, inputs: Sequence[Tensor], shape: tuple[int, ...], attrs: dict[str, object]) -> Tensor:
        output = Tensor(shape, op.output.dtype, op.output.qparams)
        self.ops.append(Op(op.kind, tuple(inputs), output, {**op.attrs, **attrs}, op.origin))
        return output

    def _apply_to_view(self, op: Op, view: View) -> View:
        if op.kind is TRANSPOSE:
            return view.permuted(op.attrs["perm"])
        return view.reshaped(op.output.shape) or _not_none(
            View.identity(self._emit_in_order(view)).reshaped(op.output.shape)
        )

    def _any_order(self, op: Op, views: list[View]) -> View | None:
        """Applies rules 2 to 4 and 8: emits `op` in the first order that a strategy finds. Returns the output.

        Returns None, and emits nothing, if no strategy finds another order, or if the exception of rule 3 applies.
        """
        if self.keeps_units and op.kind.layout is Layout.AXES and (units := map_unit_dimensions(op, views)):
            stored = self._append_op(
                op, [view.stored for view in views], units.shape(op.output.shape), units.attributes(op)
            )
            return View.identity(stored).reshaped(op.output.shape)
        reads = _Reads.from_views(views)
        order = self._order_by(_WHOLE_DIMENSIONS, op, reads)
        if order is None and op.kind.layout is Layout.ELEMENTWISE and (same := self._same_order(op, views)):
            return same
        order = order or self._order_by(_PARTS_OF_DIMENSIONS, op, reads)
        if order is None or order == tuple(range(reads.rank)):
            return None
        if self._moves_fewer_in_order(op, reads.leaders, order):
            return None
        return self._in_dimension_order(op, views, order)

    def _order_by(self, strategies: Sequence[Strategy], op: Op, reads: _Reads) -> Order | None:
        return next(filter(None, (strategy(self, op, reads) for strategy in strategies)), None)

    def _moves_fewer_in_order(self, op: Op, leaders: list[View], order: Sequence[int]) -> bool:
        """Whether the exception of rule 3 applies, so that `op` computes in order instead of in `order`."""
        if self._preferred_order(op.output) not in (None, tuple(range(len(op.output.shape)))):
            return False
        moved = sum(not view.in_stored_order for view in leaders)
        moved_for_order = sum(not view.permuted(order).in_stored_order for view in leaders)
        return moved <= moved_for_order and any(view.is_identity for view in leaders)

    def _preferred_order(self, tensor: Tensor) -> Order | None:
        preferences = self.preferences.get(id(tensor))
        return preferences.preferred_order if preferences else None

    def order_of_readers(self, op: Op, reads: _Reads) -> Order | None:
        """Returns the order that most readers of `op` prefer; None if this order saves no transposes.

        It saves transposes if an operator with axes already has its inputs in this order, or if one TRANSPOSE of the
        only computed input replaces several later ones.
        """
        wanted, rank = self._preferred_order(op.output), len(op.output.shape)
        if wanted is None or any(len(view.shape) != rank for view in reads.leaders):
            return None
        if all(view.permuted(wanted).in_stored_order for view in reads.leaders):
            return wanted if op.kind.layout is Layout.AXES else None
        computed, *others = {id(tensor): tensor for tensor in op.inputs if tensor.data is None}.values()
        if others or not self.preferences[id(computed)].is_worth_a_transpose(wanted, computed.size):
            return None
        return wanted

    def order_of_dimensions(self, _: Op, reads: _Reads) -> Order | None:
        """Returns the order of the first view that permutes whole dimensions of its stored tensor."""
        return _first_entries(View.dimension_order, reads.viewed)

    def order_of_blocks(self, _: Op, reads: _Reads) -> Order | None:
        """Returns the order of the first moved view whose dimensions are contiguous blocks of the stored tensor."""
        return _first_entries(View.block_order, reads.moved)

    def order_of_other_readers(self, op: Op, reads: _Reads) -> Order | None:
        """Returns the order that most readers of the first moved input prefer."""
        return self._preferred_order(op.inputs[reads.views.index(reads.moved[0])]) if reads.moved else None

    def order_of_atoms(self, _: Op, reads: _Reads) -> Order | None:
        """Returns the dimensions of the first moved input in the stored order of their first atoms."""
        return reads.moved[0].atom_order() if reads.moved else None

    def _in_dimension_order(self, op: Op, views: list[View], order: Sequence[int]) -> View:
        """Emits `op` on inputs whose dimension i is dimension order[i] of the originals. Smaller inputs broadcast."""
        rank, perm = len(order), np.argsort(order).tolist()
        inputs = []
        for view in views:
            units = (1,) * (rank - len(view.shape))
            full = _not_none(view.reshaped(units + view.shape)) if units else view
            inputs.append(self._emit_in_order(full.permuted(order)))
        attrs: dict[str, object] = {name: _renumber_axes(op.attrs[name], perm) for name in op.kind.axes}
        attrs |= {name: tuple(op.attrs[name][dim] for dim in order) for name in op.kind.dimensions}
        kept = [dim for dim in range(rank) if len(op.output.shape) == rank or dim not in op.attrs[op.kind.axes[0]]]
        stored = sorted(perm[dim] for dim in kept)
        kept_perm = [stored.index(perm[dim]) for dim in kept]
        shape = tuple(op.output.shape[dim] for dim in np.argsort(kept_perm).tolist())
        return View.identity(self._append_op(op, inputs, shape, attrs)).permuted(kept_perm)

    def _same_order(self, op: Op, views: list[View]) -> View | None:
        """Applies rule 2 to a view that does not permute whole dimensions. Returns the output.

        Returns None if no input is such a view, or if an input has another shape or cannot be read in its order.
        """
        leader = next((view for view in views if view.stored.data is None and view.stored.shape != view.shape), None)
        if leader is None or any(view.shape != op.output.shape for view in views):
            return None
        aligned = [view.unapplied(leader) for view in views]
        if any(view is None for view in aligned):
            return None
        output = self._append_op(
            op, [self._emit_in_order(_not_none(view)) for view in aligned], leader.stored.shape, {}
        )
        return View(output, leader.atoms, leader.order, leader.shape)

    def _permuted_features(self, op: Op, views: list[View]) -> View | None:
        """Rule 5, if all dimensions except the features are in order."""
        features, weight = views[0], op.inputs[1]
        columns = features.atoms_by_dim[-1]
        outer = features.order[: len(features.order) - len(columns)]
        if weight.data is None or features.in_stored_order or outer != tuple(range(len(outer))):
            return None
        order = np.argsort(columns, kind="stable").tolist()
        blocks = weight.data.reshape(weight.shape[0], *(features.atoms[atom] for atom in columns))
        data = blocks.transpose(0, *(1 + position for position in order)).reshape(weight.shape)
        permuted = Tensor(weight.shape, weight.dtype, weight.qparams, np.ascontiguousarray(data))
        in_stored_order = View(features.stored, features.atoms, tuple(range(len(features.atoms))), features.shape)
        inputs = [self._emit_in_order(in_stored_order), permuted, *(self._emit_in_order(view) for view in views[2:])]
        return View.identity(self._append_op(op, inputs, op.output.shape, {}))

    def _emit_in_order(self, view: View) -> Tensor:
        """Returns the values of `view` in order: the output of emitted operators (rule 6), or a constant (rule 7)."""
        if view.is_identity:
            return view.stored
        key = (id(view.stored), view.atoms, view.order, view.shape)
        if key not in self.emitted:
            if view.stored.data is not None:
                data = view.evaluate(view.stored.data)
                self.emitted[key] = Tensor(view.shape, view.stored.dtype, view.stored.qparams, data)
            else:
                self.emitted[key] = view.emit(self._emit)
        return self.emitted[key]

    def _emit(self, kind: Kind, operand: tuple[int, ...], tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        output = Tensor(shape, tensor.dtype, tensor.qparams)
        self.ops.append(Op(kind, (tensor,), output, {kind.operands[0]: operand}, self.origin))
        return output


Strategy = Callable[[_LayoutPropagation, Op, _Reads], Order | None]
"""Returns an order for an operator: dimension i of its new operands is dimension order[i] of the original ones."""
_WHOLE_DIMENSIONS: tuple[Strategy, ...] = (_LayoutPropagation.order_of_readers, _LayoutPropagation.order_of_dimensions)
_PARTS_OF_DIMENSIONS: tuple[Strategy, ...] = (
    _LayoutPropagation.order_of_blocks,
    _LayoutPropagation.order_of_other_readers,
    _LayoutPropagation.order_of_atoms,
)


def _first_entries(order: Callable[[View], tuple[int, ...] | None], views: Sequence[View]) -> tuple[int, ...] | None:
    return next(filter(None, map(order, views)), None)


def _renumber_axes(axes: int | tuple[int, ...], perm: Sequence[int]) -> int | tuple[int, ...]:
    """Returns the axes of the stored tensor for the given axes."""
    return perm[axes] if isinstance(axes, int) else tuple(sorted(perm[axis] for axis in axes))


def _not_none(view: View | None) -> View:
    """Returns `view`. A reshape of values in order is never None, nor is a reshape that adds dimensions of size 1."""
    if view is None:
        raise AssertionError("a contiguous tensor could not be reshaped")
    return view
