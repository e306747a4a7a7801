"""Finds the layers of LSTMs in a float graph, with the nodes of their steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from openneutron.core.constants import constant_value
from openneutron.core.fx import note, note_of
from openneutron.ops.declared import is_op
from openneutron.ops.decomposition import RANGE_LIMIT, SHARED_QPARAMS
from openneutron.ops.intervals import Interval
from openneutron.ops.recurrent import CELL_LIMIT, is_cell_state

__all__ = ["CellLayer", "CellStep", "cell_layers", "has_limit", "is_scaled_cell", "note_scaled", "note_selected"]

_SCALED = "openneutron.scaled_cell"
_SELECTED = "openneutron.selected_cell"


@dataclass(frozen=True)
class CellStep:
    """The nodes of one step of an LSTM: `cell` = `kept` + `written`, and `kept` = `forget_gate` * `before`."""

    layer: str
    cell: Node
    kept: Node
    written: Node
    forget_gate: Node
    before: Node
    output_gate: Node | None
    """The gate that multiplies the tanh of `cell`; None if there is none."""
    hidden: Node
    """The product of the output gate and the tanh of `cell`; `cell` if there is none."""


@dataclass(frozen=True)
class CellLayer:
    """The steps of a layer, and all of its cell states, including those before the first step."""

    steps: list[CellStep]
    cells: list[Node]

    @property
    def is_limited(self) -> bool:
        """Whether the decomposition limits the cell states."""
        return any(has_limit(step.cell) for step in self.steps)

    @property
    def has_unlimited_steps(self) -> bool:
        """Whether the layer has several steps whose ranges neither a decomposition nor a selection has limited."""
        given = any(RANGE_LIMIT.read(cell).has_limit or is_scaled_cell(cell) for cell in self.cells)
        return len(self.steps) > 1 and not given

    @property
    def is_connected(self) -> bool:
        """Whether each step reads one of these cell states, or a constant."""
        cells = set(self.cells)
        return all(step.before in cells or constant_value(step.before) is not None for step in self.steps)


def cell_layers(module: GraphModule) -> dict[str, CellLayer]:
    """Returns the layers of the LSTMs by name. Linear in nodes.

    Leaves out single steps without a limit, such as an `LSTMCell`, and layers whose ranges are selected already.
    """
    found: dict[str, CellLayer] = {}
    for node in filter(is_cell_state, module.graph.nodes):
        layer = found.setdefault(str(node.meta[SHARED_QPARAMS]), CellLayer([], []))
        layer.cells.append(node)
        if (step := _step_of(node)) is not None:
            layer.steps.append(step)
    return {
        name: layer
        for name, layer in found.items()
        if (layer.is_limited or layer.has_unlimited_steps) and not any(note_of(cell, _SELECTED) for cell in layer.cells)
    }


def has_limit(cell: Node) -> bool:
    """Returns whether a cell state has the limit of a decomposition. An initial state that is given has none."""
    return RANGE_LIMIT.read(cell) == Interval(-CELL_LIMIT, CELL_LIMIT)


def is_scaled_cell(node: Node) -> bool:
    """Returns whether `node` is a cell state whose units have ranges of their own."""
    return bool(note_of(node, _SCALED))


def note_scaled(node: Node) -> None:
    """Notes on a cell state that its units have ranges of their own."""
    note(node, _SCALED, True)


def note_selected(layer: CellLayer) -> None:
    """Notes on the cell states of a layer that their ranges are selected."""
    for cell in layer.cells:
        note(cell, _SELECTED, True)


def _step_of(cell: Node) -> CellStep | None:
    """Returns the step that computes `cell`; None for a cell state before the first step, or of another form."""
    if not is_op(cell, "add") or len(cell.all_input_nodes) != 2:
        return None
    kept, written = cell.all_input_nodes
    if not is_op(kept, "mul") or len(kept.all_input_nodes) != 2:
        return None
    forget_gate, before = kept.all_input_nodes
    output_gate, hidden = _hidden_state(cell) or (None, cell)
    name = str(cell.meta[SHARED_QPARAMS])
    return CellStep(name, cell, kept, written, forget_gate, before, output_gate, hidden)


def _hidden_state(cell: Node) -> tuple[Node, Node] | None:
    """Returns the gate that multiplies the tanh of `cell`, and the product."""
    for tanh in cell.users:
        for product in tanh.users if is_op(tanh, "tanh") else ():
            gates = [factor for factor in product.all_input_nodes if factor is not tanh]
            if is_op(product, "mul") and gates:
                return gates[0], product
    return None
