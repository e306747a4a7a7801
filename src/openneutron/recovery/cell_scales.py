"""Ranges of their own for the units of a cell state, in one int8 tensor.

The cell states c of an LSTM are kept as c / r, with a range r for each unit, so that all units use all codes:

    c[t] = f * c[t-1] + w    becomes    c'[t] = f * c'[t-1] + w / r,    and the tanh reads r * c'[t].

This costs two products with constants at each step. The ranges are powers of two, because int8 constants represent
powers of two and their inverses with nearly equal relative errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import insert_constant
from openneutron.core.fx import note, note_of
from openneutron.ops.decomposition import RANGE_LIMIT, SHARED_QPARAMS
from openneutron.ops.graph_builder import NodeBuilder, mul
from openneutron.ops.intervals import EVERYTHING

__all__ = ["CellStep", "is_scaled_cell", "layer_of", "scale_cells"]

_SCALED = "openneutron.scaled_cell"


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


def layer_of(cell: Node) -> str:
    """Returns the name of the layer of a cell state."""
    return str(cell.meta[SHARED_QPARAMS])


def is_scaled_cell(node: Node) -> bool:
    """Returns whether `node` is a cell state whose units have ranges of their own."""
    return bool(note_of(node, _SCALED))


def scale_cells(module: GraphModule, steps: Sequence[CellStep], cells: Sequence[Node], halvings: torch.Tensor) -> None:
    """Divides the cell states of one layer by 2^-`halvings` [units], in place. The outputs do not change.

    `steps` are the steps of the layer, `cells` are all of its cell states, including those before the first step. Each
    step reads one of `cells`. All values have the limits that they get after the division. Linear in steps.
    """
    first = cells[0].next
    enlarge = insert_constant(module, first, 2.0**halvings, "enlarge")
    reduce = insert_constant(module, first, 2.0**-halvings, "reduce")
    by_cell = {step.cell: step for step in steps}
    kept = {step.kept for step in steps}
    for cell in cells:
        step = by_cell.get(cell)
        readers = [reader for reader in cell.users if (reader in kept) is (step is None)]
        if step is None:  # the state before the first step, or after it
            scaled = mul(NodeBuilder(cell.next if cell is not cells[0] else first, cell), cell, enlarge)
            note(scaled, _SCALED, True)
            RANGE_LIMIT.write(cell, EVERYTHING)
            del cell.meta[SHARED_QPARAMS]
        else:
            written = mul(NodeBuilder(cell, cell), step.written, enlarge)
            cell.replace_input_with(step.written, written)
            note(cell, _SCALED, True)
            step.kept.meta[SHARED_QPARAMS] = cell.meta[SHARED_QPARAMS]  # sums of values with equal scales are exact
            scaled = mul(NodeBuilder(cell.next, readers[0]), cell, reduce) if readers else cell
        for reader in readers:
            reader.replace_input_with(cell, scaled)
    module.recompile()
