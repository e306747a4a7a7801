"""Gives each unit of a cell state its own range, in one int8 tensor.

The cell states c of an LSTM are kept as c / r, with a range r for each unit, so that all units use all codes:

    c[t] = f * c[t-1] + w    becomes    c'[t] = f * c'[t-1] + w / r,    and the tanh reads r * c'[t].

This costs two products with constants at each step. The ranges are powers of two, because int8 constants represent
powers of two and their inverses with nearly equal relative errors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import constant_value, insert_constant
from openneutron.core.evaluation import value_of
from openneutron.core.fx import first_operand, is_dequantize
from openneutron.ops.decomposition import RANGE_LIMIT, SHARED_QPARAMS
from openneutron.ops.graph_builder import NodeBuilder, mul
from openneutron.ops.intervals import EVERYTHING
from openneutron.quantizer.cell_states import CellStep, cell_layers, note_scaled, note_selected

__all__ = ["enlarged_name", "factors_of", "reduced_name", "scale_as_converted", "scale_cells"]


def enlarged_name(value: str) -> str:
    """Returns the name of the node that divides a value by the ranges of the units."""
    return f"{value}_by_range"


def reduced_name(cell: str) -> str:
    """Returns the name of the node that multiplies a scaled cell state by the ranges of the units."""
    return f"{cell}_times_range"


def scale_cells(module: GraphModule, steps: Sequence[CellStep], cells: Sequence[Node], halvings: torch.Tensor) -> None:
    """Divides the cell states of one layer by 2^-`halvings` [units], in place. The outputs do not change.

    `steps` are the steps of the layer, `cells` are all of its cell states, including those before the first step. Each
    step reads one of `cells`, or a constant. All values have the limits that they get after the division. Linear in
    steps.
    """
    first = steps[0].kept
    enlarge = insert_constant(module, first, 2.0**halvings, "enlarge")
    reduce = insert_constant(module, first, 2.0**-halvings, "reduce")
    by_cell = {step.cell: step for step in steps}
    kept = {step.kept for step in steps}
    for cell in cells:
        step = by_cell.get(cell)
        readers = [reader for reader in cell.users if (reader in kept) is (step is None)]
        if step is None:  # the state before the first step
            scaled = cell
            if readers:
                scaled = mul(NodeBuilder(readers[0], cell), cell, enlarge)
                scaled._rename(enlarged_name(readers[0].name))
                note_scaled(scaled)
            RANGE_LIMIT.write(cell, EVERYTHING)
            del cell.meta[SHARED_QPARAMS]
        else:
            written = mul(NodeBuilder(cell, cell), step.written, enlarge)
            written._rename(enlarged_name(cell.name))
            cell.replace_input_with(step.written, written)
            note_scaled(cell)
            step.kept.meta[SHARED_QPARAMS] = cell.meta[SHARED_QPARAMS]  # sums of values with equal scales are exact
            scaled = mul(NodeBuilder(cell.next, readers[0]), cell, reduce) if readers else cell
            if readers:
                scaled._rename(reduced_name(cell.name))
        for reader in readers:
            reader.replace_input_with(cell, scaled)
    for step in steps:
        if (initial := constant_value(step.before)) is not None:
            scaled = insert_constant(module, first, initial * 2.0**halvings, "scaled")
            step.kept.replace_input_with(step.before, scaled)
    module.recompile()


def scale_as_converted(reference: GraphModule, converted: GraphModule) -> None:
    """Scales the cell states of the float graph `reference` in place, as conversion scaled those of `converted`.

    Does nothing for a layer that conversion did not scale (see `cell_ranges`). Linear in nodes.
    """
    names = {node.name: node for node in converted.graph.nodes}
    for layer in cell_layers(reference).values():
        product = names.get(enlarged_name(layer.steps[0].cell.name)) if layer.steps else None
        if product is not None:
            scale_cells(reference, layer.steps, layer.cells, factors_of(converted, product).log2().round())
            note_selected(layer)


def factors_of(converted: GraphModule, product: Node) -> torch.Tensor:
    """Returns the value of the quantized constant that `product` multiplies."""
    (factors,) = (value for value in map(_constant, product.all_input_nodes) if value is not None)
    value: torch.Tensor = value_of(converted, factors)
    return value


def _constant(operand: Node) -> Node | None:
    """Returns `operand` if it is a dequantized constant, else None."""
    return operand if is_dequantize(operand) and first_operand(operand).op == "get_attr" else None
