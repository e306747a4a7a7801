"""Selects the ranges of the cell states of LSTMs by the error of the hidden states.

A narrow range clips large cell states, a wide one rounds all of them coarsely, and each step adds to both errors. The
error of a single value does not show this. The cell states of all steps are therefore computed again, rounded with each
of the `LIMITS`, from the gates of the float graph.

The units of a layer often differ in range by a factor of ten or more. `scale_cells` then gives each unit a range of its
own in the same int8 tensor (see `cell_scales`).
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
from openneutron.ops.decomposition import RANGE_LIMIT
from openneutron.ops.intervals import Interval
from openneutron.ops.recurrent import CELL_LIMIT, is_cell_state
from openneutron.recovery.cell_scales import CellStep, layer_of, scale_cells
from openneutron.recovery.layerwise import Samples, evenly_spaced

__all__ = ["LIMITS", "select_cell_limits"]

LIMITS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.3, CELL_LIMIT)
# The range of a unit is one of BASES, the same for all units, divided by a power of two up to 2^HALVINGS. Powers of two
# from 1 to 2^7, and their inverses, are exact in int8 within 0.4 %.
BASES, HALVINGS = (1.5, 1.75, 2.0, 2.3, CELL_LIMIT), 5
NARROW_LIMITS = tuple(base / 2**halvings for base in BASES for halvings in range(1, HALVINGS + 1))
REPLAYED = (*LIMITS, *NARROW_LIMITS)
# Ranges of units cost two products at each step. They are used if they reduce the error to less than this share, and if
# the error without them is more than this share of the energy of the hidden states (45 dB). The feedback of
# the hidden states, which the replay leaves out, multiplies this error.
WORTHWHILE, NEGLIGIBLE = 0.4, 3e-5
MOST_SAMPLES = 24
CODES = 255  # number of steps of a range


@dataclass
class _Errors:
    """The energy of the errors of a layer's hidden states, by limit of `REPLAYED` and unit; and that of the states."""

    of_units: torch.Tensor
    energy: float = 0.0

    def add(self, error: torch.Tensor, hidden: torch.Tensor) -> None:
        """Adds the errors [limits, ..., units] of the hidden states [..., units] of one step."""
        limits, units = error.shape[0], error.shape[-1]
        self.of_units = self.of_units + error.reshape(limits, -1, units).square().sum(1, dtype=torch.float64)
        self.energy += float(hidden.square().sum(dtype=torch.float64))

    @property
    def limit(self) -> float:
        """The one of `LIMITS` with the least error."""
        return LIMITS[int(self.of_units[: len(LIMITS)].sum(1).argmin())]

    def ranges_of_units(self) -> tuple[float, torch.Tensor] | None:
        """Returns one of `BASES`, and the number of halvings of each unit's range; None if they are not worthwhile."""
        one_range = float(self.of_units.sum(1).min())
        if one_range <= NEGLIGIBLE * self.energy:
            return None
        found = []
        for base in BASES:
            rows = [REPLAYED.index(base / 2**halvings) for halvings in range(HALVINGS + 1)]
            errors, halvings = self.of_units[rows].min(0)
            found.append((float(errors.sum()), base, halvings))
        error, base, halvings = min(found, key=lambda each: each[0])
        return (base, halvings) if error < WORTHWHILE * one_range else None


class _Replay(GraphRun):
    """A run of the float graph that also computes the cell states with each of `REPLAYED`, and sums up the errors."""

    def __init__(
        self, module: GraphModule, given: Mapping[Node, Any], steps: Sequence[CellStep], errors: Mapping[str, _Errors]
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
            hidden, found = value.tanh(), cell.tanh()
            if step.output_gate is not None:
                hidden, found = (each * self.operand(step.output_gate) for each in (hidden, found))
            self.errors[step.layer].add(found - hidden, hidden)
        return value


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """Rounds `values` [limits, ...] to int8 codes of a range from minus to plus each of `REPLAYED`."""
    limits = torch.tensor(REPLAYED).reshape(-1, *[1] * (values.dim() - 1))
    step = 2 * limits / CODES
    return (torch.round(values / step) * step).clamp(-limits, limits)


@torch.no_grad()
def select_cell_limits(module: GraphModule, samples: Samples) -> None:
    """Selects the ranges of the cell states of the LSTMs in `module`, in place, by the least error on samples.

    Sets their limits to one of `LIMITS`, or gives each unit a range of its own, if that is worthwhile. `module` is a
    float graph from `NeutronQuantizer.prepare_graph`. Leaves cell states without a limit unchanged. Does nothing for a
    graph without LSTMs. Linear in nodes and samples, of which it uses at most `MOST_SAMPLES`.
    """
    cells = [node for node in module.graph.nodes if is_cell_state(node)]
    steps = [step for node in cells if _has_limit(node) and (step := _step_of(node)) is not None]
    if not steps:
        return
    errors = {step.layer: _Errors(torch.zeros((), dtype=torch.float64)) for step in steps}
    for sample in evenly_spaced(samples, MOST_SAMPLES):
        _Replay(module, dict(zip(sample_nodes(module.graph), sample, strict=True)), steps, errors).run()
    steps_of: dict[str, list[CellStep]] = {}
    for step in steps:
        steps_of.setdefault(step.layer, []).append(step)
    cells_of: dict[str, list[Node]] = {}
    for cell in cells:
        cells_of.setdefault(layer_of(cell), []).append(cell)
    for layer, of_layer in errors.items():
        of_steps, of_cells = steps_of[layer], cells_of[layer]
        ranges = of_layer.ranges_of_units()
        limit = of_layer.limit if ranges is None else ranges[0]
        for value in (*filter(_has_limit, of_cells), *(step.kept for step in of_steps)):
            RANGE_LIMIT.write(value, Interval(-limit, limit))
        if ranges is not None:
            scale_cells(module, of_steps, of_cells, ranges[1])


def _has_limit(cell: Node) -> bool:
    """Returns whether a cell state has the limit of a decomposition. An initial state that is given has none."""
    return RANGE_LIMIT.read(cell) == Interval(-CELL_LIMIT, CELL_LIMIT)


def _step_of(cell: Node) -> CellStep | None:
    """Returns the step that computes `cell`, a cell state with the limit of a decomposition; None if there is none."""
    if not is_op(cell, "add"):
        return None
    kept, written = cell.all_input_nodes
    forget_gate, before = kept.all_input_nodes
    return CellStep(layer_of(cell), cell, kept, written, forget_gate, before, _output_gate(cell))


def _output_gate(cell: Node) -> Node | None:
    """Returns the gate that multiplies the tanh of `cell`."""
    for tanh in cell.users:
        for product in tanh.users if is_op(tanh, "tanh") else ():
            if is_op(product, "mul"):
                return next((factor for factor in product.all_input_nodes if factor is not tanh), None)
    return None
