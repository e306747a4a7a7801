"""Selects the ranges of the cell states of LSTMs by the error of the hidden states.

A narrow range clips large cell states, a wide one rounds all of them coarsely, and each step adds to both errors. The
error of a single value does not show this. The cell states of all steps are therefore computed again, rounded with each
of the `LIMITS`, from the gates of the float graph.

The units of a layer often differ in range by a factor of ten or more. `scale_cells` then gives each unit a range of its
own in the same int8 tensor (see `cell_scales`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from openneutron.core.evaluation import GraphRun
from openneutron.model.state import sample_nodes
from openneutron.ops.declared import is_op
from openneutron.ops.decomposition import RANGE_LIMIT
from openneutron.ops.intervals import Interval
from openneutron.ops.recurrent import CELL_LIMIT, is_cell_state
from openneutron.recovery.cell_scales import CellStep, is_scaled_cell, layer_of, scale_cells
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
    """The energy of the errors of a layer's hidden states, by limit of `REPLAYED` and unit; and that of the states.

    The limits are those of `REPLAYED` times `factor`, which is not 1 for a layer without a limit.
    """

    factor: float = 1.0
    of_units: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
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
            factor = self.errors[step.layer].factor
            before = self.cells.pop(step.before, None)  # with each limit, [limits, ...]; None in the first step
            self.kept[node] = _rounded(
                self.operand(step.forget_gate)
                * (_rounded(self.operand(step.before)[None], factor) if before is None else before),
                factor,
            )
        if node in self.by_cell:
            step = self.by_cell[node]
            factor = self.errors[step.layer].factor
            self.cells[node] = cell = _rounded(self.kept.pop(step.kept) + self.operand(step.written), factor)
            hidden, found = value.tanh(), cell.tanh()
            if step.output_gate is not None:
                hidden, found = (each * self.operand(step.output_gate) for each in (hidden, found))
            self.errors[step.layer].add(found - hidden, hidden)
        return value


def _rounded(values: torch.Tensor, factor: float) -> torch.Tensor:
    """Rounds `values` [limits, ...] to int8 codes of a range from minus to plus each of `REPLAYED` times `factor`."""
    limits = (torch.tensor(REPLAYED) * factor).reshape(-1, *[1] * (values.dim() - 1))
    step = 2 * limits / CODES
    return (torch.round(values / step) * step).clamp(-limits, limits)


@torch.no_grad()
def select_cell_limits(module: GraphModule, samples: Samples) -> None:
    """Selects the ranges of the cell states of the LSTMs in `module`, in place, by the least error on samples.

    Sets their limits to one of `LIMITS`, or gives each unit a range of its own, if that is worthwhile. A cell state
    without a limit, because the model reads the last one, gets no limit. `module` is a float graph from
    `NeutronQuantizer.prepare_graph`. Does nothing for a graph without LSTMs. Linear in nodes and samples, of which it
    uses at most `MOST_SAMPLES`.
    """
    layers = _layers(module)
    if not layers:
        return
    steps = [step for layer in layers.values() for step in layer.steps]
    chosen = evenly_spaced(samples, MOST_SAMPLES)
    largest = _largest_values(module, chosen, [step for step in steps if not _has_limit(step.cell)])
    errors = {name: _Errors(largest.get(name, CELL_LIMIT) / CELL_LIMIT) for name in layers}
    for sample in chosen:
        _Replay(module, dict(zip(sample_nodes(module.graph), sample, strict=True)), steps, errors).run()
    for name, layer in layers.items():
        ranges = errors[name].ranges_of_units() if layer.is_connected else None
        if layer.is_limited:
            limit = errors[name].limit if ranges is None else ranges[0]
            for value in (*filter(_has_limit, layer.cells), *(step.kept for step in layer.steps)):
                RANGE_LIMIT.write(value, Interval(-limit, limit))
        if ranges is not None:
            scale_cells(module, layer.steps, layer.cells, ranges[1])


@dataclass(frozen=True)
class _Layer:
    """The steps of a layer, and all of its cell states, including those before the first step."""

    steps: list[CellStep]
    cells: list[Node]

    @property
    def is_limited(self) -> bool:
        """Whether the decomposition limits the cell states."""
        return any(_has_limit(step.cell) for step in self.steps)

    @property
    def has_unlimited_steps(self) -> bool:
        """Whether these are several steps, and neither a decomposition nor a selection gave them ranges."""
        given = any(RANGE_LIMIT.read(cell).has_limit or is_scaled_cell(cell) for cell in self.cells)
        return len(self.steps) > 1 and not given

    @property
    def is_connected(self) -> bool:
        """Whether each step reads one of these cell states. The first step may read a constant instead."""
        cells = set(self.cells)
        return all(step.before in cells for step in self.steps)


def _layers(module: GraphModule) -> dict[str, _Layer]:
    """Returns the layers of the LSTMs by name.

    Leaves out single steps without a limit, such as an `LSTMCell`, and layers whose ranges are selected already.
    """
    found: dict[str, _Layer] = {}
    for node in filter(is_cell_state, module.graph.nodes):
        layer = found.setdefault(layer_of(node), _Layer([], []))
        layer.cells.append(node)
        if (step := _step_of(node)) is not None:
            layer.steps.append(step)
    return {name: layer for name, layer in found.items() if layer.is_limited or layer.has_unlimited_steps}


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


def _has_limit(cell: Node) -> bool:
    """Returns whether a cell state has the limit of a decomposition. An initial state that is given has none."""
    return RANGE_LIMIT.read(cell) == Interval(-CELL_LIMIT, CELL_LIMIT)


def _step_of(cell: Node) -> CellStep | None:
    """Returns the step that computes `cell`; None for a cell state before the first step, or of another form."""
    if not is_op(cell, "add") or len(cell.all_input_nodes) != 2:
        return None
    kept, written = cell.all_input_nodes
    if not is_op(kept, "mul") or len(kept.all_input_nodes) != 2:
        return None
    forget_gate, before = kept.all_input_nodes
    return CellStep(layer_of(cell), cell, kept, written, forget_gate, before, _output_gate(cell))


def _output_gate(cell: Node) -> Node | None:
    """Returns the gate that multiplies the tanh of `cell`."""
    for tanh in cell.users:
        for product in tanh.users if is_op(tanh, "tanh") else ():
            if is_op(product, "mul"):
                return next((factor for factor in product.all_input_nodes if factor is not tanh), None)
    return None
