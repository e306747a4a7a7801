"""Push transposes and reshapes through the graph until they cancel or reach an edge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from openneutron.ir.graph import Graph, Kind, Layout, Op, Tensor
from openneutron.ir.kinds import TRANSPOSE
from openneutron.ir.layout_preferences import LayoutPreferences, Order, layout_preferences
from openneutron.ir.views import View

__all__ = ["propagate_layouts"]


def propagate_layouts(graph: Graph) -> Graph:
    """Rules, for each operator in order; linear in the number of operators:

    1. TRANSPOSE and RESHAPE become views and emit nothing.
    2. An elementwise operator works on what is stored and passes its first view on.
    3. An operator with axes does so too, its axes renumbered, where the view permutes whole dimensions, or what a
       reshape makes dimensions of.
       Not so where another input is in order, as many inputs would move, and the output after them.
    4. Where it permutes anything else, or where several operators that read a value want it in one other order, the
       operator works in the order that most readers of its output want.
    5. A FULLY_CONNECTED takes its features in stored order, the columns of its constant weight permuted.
    6. Any other operator, and each output of the graph, gets its values in order: the view is emitted, once.
    7. A view of a constant is a constant.
    """
    return _LayoutPropagation(graph, layout_preferences(graph)).run()


@dataclass(frozen=True)
class _Reads:
    """What an operator reads, as views of what is stored."""

    views: list[View]
    rank: int
    """The largest rank among them, which is that of the operator's axes."""
    leaders: list[View]
    """Those that have this rank and are no constants: the operator works in an order of theirs."""

    @classmethod
    def of(cls, views: list[View]) -> _Reads:
        """The operands that these views are."""
        rank = max(len(view.shape) for view in views)
        return cls(views, rank, [view for view in views if view.stored.data is None and len(view.shape) == rank])

    @property
    def viewed(self) -> list[View]:
        """The leaders that are not read as they are stored."""
        return [view for view in self.leaders if not view.is_identity]

    @property
    def moved(self) -> list[View]:
        """Those of them whose elements have another order than in memory."""
        return [view for view in self.viewed if not view.in_stored_order]


@dataclass
class _LayoutPropagation:
    graph: Graph
    preferences: dict[int, LayoutPreferences]  # by id of the tensor in the old graph, as everything here
    views: dict[int, View] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    emitted: dict[tuple[object, ...], Tensor] = field(default_factory=dict)
    origin: str = ""

    def run(self) -> Graph:
        for op in self.graph.ops:
            self.origin = op.origin
            self.views[id(op.output)] = self._rewrite(op)
        self.origin = "output"
        outputs = tuple(self._in_order(self._view(tensor)) for tensor in self.graph.outputs)
        return Graph(self.graph.inputs, outputs, tuple(self.ops))

    def _view(self, tensor: Tensor) -> View:
        return self.views.get(id(tensor)) or View.of(tensor)

    def _rewrite(self, op: Op) -> View:
        views = [self._view(tensor) for tensor in op.inputs]
        rewritten = None
        if op.kind.layout is Layout.VIEW:
            rewritten = self._compose(op, views[0])
        elif op.kind.layout in (Layout.ELEMENTWISE, Layout.AXES):
            rewritten = self._any_order(op, views)
        elif op.kind.layout is Layout.FEATURES:
            rewritten = self._permuted_features(op, views)
        return rewritten or View.of(self._append(op, [self._in_order(view) for view in views], op.output.shape, {}))

    def _append(self, op: Op, inputs: Sequence[Tensor], shape: tuple[int, ...], attrs: dict[str, object]) -> Tensor:
        output = Tensor(shape, op.output.dtype, op.output.qparams)
        self.ops.append(Op(op.kind, tuple(inputs), output, {**op.attrs, **attrs}, op.origin))
        return output

    def _compose(self, op: Op, view: View) -> View:
        if op.kind is TRANSPOSE:
            return view.permuted(op.attrs["perm"])
        return view.reshaped(op.output.shape) or _must(View.of(self._in_order(view)).reshaped(op.output.shape))

    def _any_order(self, op: Op, views: list[View]) -> View | None:
        """Rules 2 to 4: the operator in the order of the first strategy that finds one; None if that gains nothing."""
        reads = _Reads.of(views)
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
        """Whether no reader wants another order, an input is in order, and no fewer inputs would move for `order`."""
        if self._preferred_order(op.output) not in (None, tuple(range(len(op.output.shape)))):
            return False
        moved = sum(not view.in_stored_order for view in leaders)
        moved_for_order = sum(not view.permuted(order).in_stored_order for view in leaders)
        return moved <= moved_for_order and any(view.is_identity for view in leaders)

    def _preferred_order(self, tensor: Tensor) -> Order | None:
        preferences = self.preferences.get(id(tensor))
        return preferences.preferred_order if preferences else None

    def order_of_readers(self, op: Op, reads: _Reads) -> Order | None:
        """The order that the readers of `op` want, where it costs nothing, or one TRANSPOSE for several behind it."""
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
        """The order of the first view that permutes whole dimensions of what is stored."""
        return _first(View.dimension_order, reads.viewed)

    def order_of_blocks(self, _: Op, reads: _Reads) -> Order | None:
        """The order of the first view that permutes what a reshape makes dimensions of."""
        return _first(View.block_order, reads.moved)

    def order_of_other_readers(self, op: Op, reads: _Reads) -> Order | None:
        """The order that most readers of the first moved input want."""
        return self._preferred_order(op.inputs[reads.views.index(reads.moved[0])]) if reads.moved else None

    def order_of_atoms(self, _: Op, reads: _Reads) -> Order | None:
        """The order of the first atoms of the first moved input."""
        return reads.moved[0].atom_order() if reads.moved else None

    def _in_dimension_order(self, op: Op, views: list[View], order: Sequence[int]) -> View:
        """`op` on inputs whose dimension i is dimension order[i] of theirs; inputs of fewer elements broadcast."""
        rank, perm = len(order), np.argsort(order).tolist()
        inputs = []
        for view in views:
            units = (1,) * (rank - len(view.shape))
            full = _must(view.reshaped(units + view.shape)) if units else view
            inputs.append(self._in_order(full.permuted(order)))
        attrs: dict[str, object] = {name: _renumbered(op.attrs[name], perm) for name in op.kind.axes}
        attrs |= {name: tuple(op.attrs[name][dim] for dim in order) for name in op.kind.dimensions}
        kept = [dim for dim in range(rank) if len(op.output.shape) == rank or dim not in op.attrs[op.kind.axes[0]]]
        stored = sorted(perm[dim] for dim in kept)
        kept_perm = [stored.index(perm[dim]) for dim in kept]
        shape = tuple(op.output.shape[dim] for dim in np.argsort(kept_perm).tolist())
        return View.of(self._append(op, inputs, shape, attrs)).permuted(kept_perm)

    def _same_order(self, op: Op, views: list[View]) -> View | None:
        """Rule 2 for any other view, among inputs that all have the output's shape."""
        leader = next((view for view in views if view.stored.data is None and view.stored.shape != view.shape), None)
        if leader is None or any(view.shape != op.output.shape for view in views):
            return None
        aligned = [view.undo(leader) for view in views]
        if any(view is None for view in aligned):
            return None
        output = self._append(op, [self._in_order(_must(view)) for view in aligned], leader.stored.shape, {})
        return View(output, leader.atoms, leader.order, leader.shape)

    def _permuted_features(self, op: Op, views: list[View]) -> View | None:
        """Rule 5, where everything but the features already is in order."""
        features, weight = views[0], op.inputs[1]
        columns = features.groups[-1]
        outer = features.order[: len(features.order) - len(columns)]
        if weight.data is None or features.in_stored_order or outer != tuple(range(len(outer))):
            return None
        order = np.argsort(columns, kind="stable").tolist()
        blocks = weight.data.reshape(weight.shape[0], *(features.atoms[atom] for atom in columns))
        data = blocks.transpose(0, *(1 + position for position in order)).reshape(weight.shape)
        permuted = Tensor(weight.shape, weight.dtype, weight.qparams, np.ascontiguousarray(data))
        in_stored_order = View(features.stored, features.atoms, tuple(range(len(features.atoms))), features.shape)
        inputs = [self._in_order(in_stored_order), permuted, *(self._in_order(view) for view in views[2:])]
        return View.of(self._append(op, inputs, op.output.shape, {}))

    def _in_order(self, view: View) -> Tensor:
        """Rules 6 and 7."""
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
"""Which order an operator could work in: dimension i of its operands is dimension order[i] of theirs."""
_WHOLE_DIMENSIONS: tuple[Strategy, ...] = (_LayoutPropagation.order_of_readers, _LayoutPropagation.order_of_dimensions)
_PARTS_OF_DIMENSIONS: tuple[Strategy, ...] = (
    _LayoutPropagation.order_of_blocks,
    _LayoutPropagation.order_of_other_readers,
    _LayoutPropagation.order_of_atoms,
)


def _first(order: Callable[[View], tuple[int, ...] | None], views: Sequence[View]) -> tuple[int, ...] | None:
    return next(filter(None, map(order, views)), None)


def _renumbered(axes: int | tuple[int, ...], perm: Sequence[int]) -> int | tuple[int, ...]:
    """Logical axes as axes of what is stored."""
    return perm[axes] if isinstance(axes, int) else tuple(sorted(perm[axis] for axis in axes))


def _must(view: View | None) -> View:
    """A reshape that cannot fail: of values in order, or by dimensions of size 1."""
    if view is None:
        raise AssertionError("a contiguous tensor could not be reshaped")
    return view
