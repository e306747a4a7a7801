"""Selects the limits of the cell states of LSTMs by the error of the hidden states.

A narrow range clips large cell states, a wide one rounds all of them coarsely, and each step adds to both errors. The
error of a single value does not show this. The cell states of all steps are therefore computed again, rounded with each
of the `LIMITS`, from the gates of the float graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from openneutron.core.evaluation import GraphRun
from openneutron.model.state import sample_nodes
from openneutron.ops.declared import is_op
from openneutron.ops.decomposition import RANGE_LIMIT, SHARED_QPARAMS
from openneutron.ops.intervals import Interval
from openneutron.ops.recurrent import CELL_LIMIT, is_cell_state
from openneutron.recovery.layerwise import Samples, evenly_spaced

__all__ = ["LIMITS", "select_cell_limits"]

LIMITS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.3, CELL_LIMIT)
MOST_SAMPLES = 24
CODES = 255  # number of steps of a range


@dataclass(frozen=True)
class _Step:
    """The nodes of one step of an LSTM: `cell` = `kept` + `written`, and `kept` = `forget_gate` * `before`."""

    layer: str
    cell: Node
    kept: Node
    written: Node
    forget_gate: Node
    before: Node
    output_gate: Node | None
    """The gate that multiplies the tanh of `cell`; None if there is none."""


class _Replay(GraphRun):
    """A run of the float graph that also computes the cell states with each of `LIMITS`, and sums up the errors."""

    def __init__(
        self, module: GraphModule, given: Mapping[Node, Any], steps: Sequence[_Step], errors: dict[str, torch.Tensor]
    ) -> None:
        super().__init__(module, given)
        self.by_kept = {step.kept: step for step in steps}
        self.by_cell = {step.cell: step for step in steps}
        self.errors = errors
        self.kept: dict[Node, torch.Tensor] = {}
        self.cells: dict[Node, torch.Tensor] = {}

    def compute(self, node: Node) -> Any:
        value = super().compute(node)
        if node in self.by_kept:
            step = self.by_kept[node]
            before = self.cells.pop(step.before, None)  # with each limit, [limits, ...]; None in the first step
            self.kept[node] = _rounded(
                self.operand(step.forget_gate)
                * (_rounded(self.operand(step.before)[None]) if before is None else before)
            )
        if node in self.by_cell:
            step = self.by_cell[node]
            self.cells[node] = cell = _rounded(self.kept.pop(step.kept) + self.operand(step.written))
            error = cell.tanh() - value.tanh()
            if step.output_gate is not None:
                error = error * self.operand(step.output_gate)
            self.errors[step.layer] = self.errors[step.layer] + error.flatten(1).square().sum(1, dtype=torch.float64)
        return value


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """Rounds `values` [limits, ...] to int8 codes of a range from minus to plus each of `LIMITS`."""
    limits = torch.tensor(LIMITS).reshape(-1, *[1] * (values.dim() - 1))
    step = 2 * limits / CODES
    return (torch.round(values / step) * step).clamp(-limits, limits)


@torch.no_grad()
def select_cell_limits(module: GraphModule, samples: Samples) -> None:
    """Sets the limits of the cell states of the LSTMs in `module`, in place, to those with the least error on samples.

    `module` is a float graph from `NeutronQuantizer.prepare_graph`. Leaves cell states without a limit unchanged. Does
    nothing for a graph without LSTMs. Linear in nodes and samples, of which it uses at most `MOST_SAMPLES`.
    """
    steps = [step for node in module.graph.nodes if (step := _step_of(node)) is not None]
    if not steps:
        return
    errors = dict.fromkeys((step.layer for step in steps), torch.zeros(len(LIMITS), dtype=torch.float64))
    for sample in evenly_spaced(samples, MOST_SAMPLES):
        _Replay(module, dict(zip(sample_nodes(module.graph), sample, strict=True)), steps, errors).run()
    limits = {layer: LIMITS[int(of_layer.argmin())] for layer, of_layer in errors.items()}
    for step in steps:
        RANGE_LIMIT.write(step.kept, Interval(-limits[step.layer], limits[step.layer]))
    for node in module.graph.nodes:  # with the first steps from zeros, which are no sums
        if _is_limited_cell_state(node) and (limit := limits.get(_layer_of(node))) is not None:
            RANGE_LIMIT.write(node, Interval(-limit, limit))


def _is_limited_cell_state(node: Node) -> bool:
    return is_cell_state(node) and RANGE_LIMIT.read(node) == Interval(-CELL_LIMIT, CELL_LIMIT)


def _layer_of(cell: Node) -> str:
    return str(cell.meta[SHARED_QPARAMS])


def _step_of(cell: Node) -> _Step | None:
    """Returns the step that computes `cell`; None if it is no cell state with the limit of a decomposition."""
    if not _is_limited_cell_state(cell) or not is_op(cell, "add"):
        return None
    kept, written = cell.all_input_nodes
    forget_gate, before = kept.all_input_nodes
    return _Step(_layer_of(cell), cell, kept, written, forget_gate, before, _output_gate(cell))


def _output_gate(cell: Node) -> Node | None:
    """Returns the gate that multiplies the tanh of `cell`."""
    for tanh in cell.users:
        for product in tanh.users if is_op(tanh, "tanh") else ():
            if is_op(product, "mul"):
                return next((factor for factor in product.all_input_nodes if factor is not tanh), None)
    return None
