"""Selects the ranges of the cell states of LSTMs by the error of the hidden states, before calibration.

The errors are those of `quantizer.cell_errors`. A layer gets one range, or each unit gets a range of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from openneutron.core.evaluation import GraphRun
from openneutron.model.state import sample_nodes
from openneutron.ops.decomposition import RANGE_LIMIT
from openneutron.ops.intervals import Interval
from openneutron.ops.recurrent import CELL_LIMIT
from openneutron.quantizer.cell_errors import MOST_SAMPLES, CellErrors, CellReplay
from openneutron.quantizer.cell_scales import scale_cells
from openneutron.quantizer.cell_states import CellLayer, CellStep, cell_layers, has_limit, note_selected
from openneutron.recovery.layerwise import Samples, evenly_spaced

__all__ = ["layers_with_ranges_of_units", "select_cell_limits"]


class _Replay(GraphRun):
    """A run of the float graph that also computes the cell states with each range, and sums up the errors."""

    def __init__(
        self,
        module: GraphModule,
        given: Mapping[Node, Any],
        steps: Sequence[CellStep],
        errors: Mapping[str, CellErrors],
    ) -> None:
        super().__init__(module, given)
        self.by_hidden = {step.hidden: step for step in steps}
        self.operands = {node: node.all_input_nodes for step in steps for node in (step.kept, step.cell)}
        self.factors: dict[Node, tuple[Any, ...]] = {}
        self.errors = errors
        self.replays = {layer: CellReplay(found.factor) for layer, found in errors.items()}

    def compute(self, node: Node) -> Any:
        value = super().compute(node)
        if node in self.operands:  # a run forgets values after their last reader
            self.factors[node] = (*map(self.operand, self.operands[node]), value)
        if (step := self.by_hidden.get(node)) is not None:
            gate = None if step.output_gate is None else self.operand(step.output_gate)
            (forget_gate, before, _), (_, written, cell) = (self.factors.pop(one) for one in (step.kept, step.cell))
            self.errors[step.layer].add(*self.replays[step.layer].step(cell, forget_gate, before, written, gate))
        return value


@torch.no_grad()
def select_cell_limits(module: GraphModule, samples: Samples) -> None:
    """Selects the ranges of the cell states of the LSTMs in `module`, in place, by the least error on samples.

    Sets their limits to one of `cell_errors.LIMITS`, or gives each unit a range of its own, if that is worthwhile. A
    cell state without a limit, because the model reads the last one, gets no limit. `module` is a float graph from
    `Int8Quantizer.prepare_graph`. Does nothing for a graph without LSTMs. Linear in nodes and samples, of which it
    uses at most `MOST_SAMPLES`.
    """
    layers = cell_layers(module)
    errors = _measured_errors(module, samples, layers)
    for name, layer in layers.items():
        note_selected(layer)
        ranges = errors[name].ranges_of_units() if layer.is_connected else None
        if layer.is_limited:
            limit = errors[name].limit if ranges is None else ranges[0]
            for value in (*filter(has_limit, layer.cells), *(step.kept for step in layer.steps)):
                RANGE_LIMIT.write(value, Interval(-limit, limit))
        if ranges is not None:
            scale_cells(module, layer.steps, layer.cells, ranges[1])


@torch.no_grad()
def layers_with_ranges_of_units(module: GraphModule, samples: Samples) -> set[str]:
    """Returns the names of the layers whose units `select_cell_limits` would give ranges of their own."""
    layers = cell_layers(module)
    errors = _measured_errors(module, samples, layers)
    return {name for name, layer in layers.items() if layer.is_connected and errors[name].ranges_of_units() is not None}


def _measured_errors(module: GraphModule, samples: Samples, layers: Mapping[str, CellLayer]) -> dict[str, CellErrors]:
    """Returns the errors of each layer on at most `MOST_SAMPLES` of `samples`."""
    steps = [step for layer in layers.values() for step in layer.steps]
    chosen = evenly_spaced(samples, MOST_SAMPLES) if steps else ()
    largest = _largest_values(module, chosen, [step for step in steps if not has_limit(step.cell)])
    errors = {name: CellErrors(largest.get(name, CELL_LIMIT) / CELL_LIMIT) for name in layers}
    for sample in chosen:
        _Replay(module, dict(zip(sample_nodes(module.graph), sample, strict=True)), steps, errors).run()
    return errors


def _largest_values(module: GraphModule, samples: Samples, steps: Sequence[CellStep]) -> dict[str, float]:
    """Returns the largest magnitude of the cell states of `steps`, by layer."""
    layers, found = {step.cell: step.layer for step in steps}, dict[str, float]()

    class Largest(GraphRun):
        def compute(self, node: Node) -> Any:
            value = super().compute(node)
            if node in layers:
                found[layers[node]] = max(found.get(layers[node], 0.0), float(value.abs().max()))
            return value

    for sample in samples if steps else ():
        Largest(module, dict(zip(sample_nodes(module.graph), sample, strict=True))).run()
    return {layer: value for layer, value in found.items() if value > 0}
