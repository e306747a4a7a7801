"""Ranges of units of cell states without a recipe: calibration measures errors, and conversion selects ranges.

The prepared module calls a `CellObserver` after each step of an LSTM. Where ranges of units are worthwhile (see
`cell_errors`), conversion inserts the products of `cell_scales` with their quantize and dequantize operators. Where
they are not, it changes nothing. Recipes select ranges before calibration instead (`recovery.cell_limits`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torchao.quantization.pt2e import ObserverBase

from openneutron.core.constants import constant_of, free_name
from openneutron.core.fx import first_operand, is_quantize, shape_of
from openneutron.ops.declared import overload_of
from openneutron.ops.intervals import Interval
from openneutron.quantizer.cell_errors import CODES, MOST_SAMPLES, CellErrors, CellReplay
from openneutron.quantizer.cell_scales import enlarged_name, reduced_name
from openneutron.quantizer.cell_states import CellLayer, CellStep, cell_layers
from openneutron.quantizer.needed_ranges import NEEDED_RANGE
from openneutron.quantizer.quantized_constant import QuantizedConstant

__all__ = ["CellObserver", "select_cell_ranges_at_conversion"]

LOWEST_CODE = -128
CODE_RANGE = (LOWEST_CODE, 127)
# The positions of the operands of a step: cell = kept + written, kept = forget gate * before.
WRITTEN, BEFORE = 1, 1
# Metadata that a new product has from the cell state.
PROVENANCE = ("val", "stack_trace", "nn_module_stack")
MOST_DIMENSIONS = 3  # the last dimension of larger tensors holds positions, not units


@dataclass(frozen=True)
class _StepNames:
    """The names of the nodes of a step, which are the same in a copy of the prepared module."""

    cell: str
    kept: str
    follows_a_step: bool
    """Whether the state before the step is that of an earlier step."""

    @classmethod
    def of(cls, step: CellStep, cells_of_steps: set[Node]) -> _StepNames:
        return cls(step.cell.name, step.kept.name, step.before in cells_of_steps)


class _NodesByName:
    """The nodes of the module that is converted. All observers of a module share them, so that they are read once."""

    def __init__(self) -> None:
        self.graph: Graph | None = None
        self.found: dict[str, Node] = {}

    def of(self, model: GraphModule) -> dict[str, Node]:
        """Returns the nodes that the graph of `model` had at the first call, by name."""
        if self.graph is not model.graph:
            self.graph, self.found = model.graph, {node.name: node for node in model.graph.nodes}
        return self.found


class CellObserver(ObserverBase):
    """Measures the errors of a layer's hidden states by the ranges of its cell states, on the first `MOST_SAMPLES`.

    The prepared module calls it after each step, in the order of the steps. Each index of the first dimension counts
    as a sample. Conversion of the last step selects the ranges. Merging the observers of consecutive parts of a stream
    gives the observer of the whole stream.
    """

    def __init__(self, steps: list[CellStep], nodes: _NodesByName) -> None:
        super().__init__(dtype=torch.float32)
        self._nodes = nodes
        self._is_impure = True  # keeps the calls in the graph, although nothing reads their outputs
        cells_of_steps = {step.cell for step in steps}
        self.steps = [_StepNames.of(step, cells_of_steps) for step in steps]
        units = shape_of(steps[0].cell)[-1]
        self.lowest, self.highest = torch.zeros(units), torch.zeros(units)
        self._errors: list[Tensor] = []
        self._energies: list[Tensor] = []
        self._replay = CellReplay()

    @torch.no_grad()
    def forward(self, cell: Tensor, *factors: Tensor | None, number: int) -> Tensor:
        """Observes step `number`, and returns `cell` [samples, ..., units].

        `factors` are forget gate, state before the step, written values, and output gate or None.
        """
        low, high = torch.aminmax(cell.reshape(-1, cell.shape[-1]), dim=0)
        self.lowest, self.highest = torch.minimum(self.lowest, low.cpu()), torch.maximum(self.highest, high.cpu())
        if number == 0:
            self._replay = CellReplay()
        if len(self._energies) < MOST_SAMPLES * len(self.steps):
            taken = [None if factor is None else factor.detach() for factor in factors]
            errors, energy = self._replay.step(cell, *taken)  # type: ignore[arg-type]
            self._errors.append(errors.cpu())
            self._energies.append(energy.cpu())
        return cell

    def calculate_qparams(self, **_: Any) -> None:
        """Returns None, because conversion selects the ranges of all steps at once."""

    def state(self) -> dict[str, Tensor]:
        """Returns the errors of all observed steps and the extremes, for `merge`."""
        empty = torch.zeros(0, dtype=torch.float64)
        errors, energies = (torch.stack(each) if each else empty for each in (self._errors, self._energies))
        return {"errors": errors, "energies": energies, "lowest": self.lowest.clone(), "highest": self.highest.clone()}

    def merge(self, later: Mapping[str, Tensor]) -> None:
        """Adds the `state` of an observer that saw the next part of the stream."""
        room = max(0, MOST_SAMPLES * len(self.steps) - len(self._energies))
        self._errors.extend(later["errors"][:room])
        self._energies.extend(later["energies"][:room])
        self.lowest = torch.minimum(self.lowest, later["lowest"])
        self.highest = torch.maximum(self.highest, later["highest"])

    def get_extra_state(self) -> dict[str, Tensor]:
        """Returns the errors for `state_dict`, because no buffer holds them."""
        return self.state()

    def set_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores the errors from `load_state_dict`."""
        self._errors, self._energies = [], []
        self.lowest = self.highest = torch.zeros_like(self.lowest)
        self.merge(state)

    @torch.no_grad()
    def convert(self, model: GraphModule, node: Node) -> None:
        """Removes `node`, which calls this module. After the last step, gives the units their ranges."""
        is_last = node.kwargs["number"] == len(self.steps) - 1
        model.graph.erase_node(node)
        ranges = self._ranges() if is_last else None
        if ranges is not None:
            self._scale(model, *ranges)

    def _ranges(self) -> tuple[float, Tensor] | None:
        errors = CellErrors()
        for unit_errors, energy in zip(self._errors, self._energies, strict=True):
            errors.add(unit_errors, energy)
        return errors.ranges_of_units() if self._errors else None

    def _scale(self, model: GraphModule, base: float, halvings: Tensor) -> None:
        """Gives unit u of the cell states the range from -`base` to `base`, divided by 2^`halvings`[u].

        All values of a sum get equal qparams, so that the sum adds no rounding error. The readers of a cell state get
        its value in the qparams that it had before.
        """
        factors = 2.0 ** halvings.float()
        low = float((self.lowest * factors).clamp(min=-base).min())
        high = float((self.highest * factors).clamp(max=base).max())
        scale = (high - low) / CODES
        scaled = scale, round(LOWEST_CODE - low / scale)
        nodes = self._nodes.of(model)
        first = nodes[self.steps[0].kept]
        enlarge = _powers_of_two(model, first, factors, "enlarge")
        reduce = _powers_of_two(model, first, 1 / factors, "reduce")
        kept = {nodes[step.kept] for step in self.steps}
        for step in self.steps:
            cell, product = nodes[step.cell], nodes[step.kept]
            like = _Quantized.of(cell)
            readers = [reader for reader in like.dequantize.users if reader not in kept]
            qparams = like.qparams
            like.multiply_operand(cell, WRITTEN, enlarge, enlarged_name(cell.name), scaled)
            initial = None if step.follows_a_step else _constant(model, product.args[BEFORE])
            if initial is not None:
                product.args = (product.args[0], _constant_of_range(model, product, initial * factors))
            elif not step.follows_a_step:
                like.multiply_operand(product, BEFORE, enlarge, enlarged_name(product.name), scaled)
            for value in (_Quantized.of(product), like):
                value.set_qparams(scaled)
                NEEDED_RANGE.write(value.node, Interval(-base, base))
            if readers:
                own = like.multiplied(like.dequantize.next, like.dequantize, reduce, reduced_name(cell.name), qparams)
                for reader in readers:
                    reader.replace_input_with(like.dequantize, own)


def _powers_of_two(model: GraphModule, before: Node, values: Tensor, role: str) -> Node:
    """Inserts the quantized constant `values`, powers of two, which is exact if they span at most 2^7."""
    scale, zero_point = values.max() / -LOWEST_CODE, torch.tensor(LOWEST_CODE)
    return QuantizedConstant(values, scale, zero_point, None, CODE_RANGE, torch.int8).write(model, before, role)


def _constant(model: GraphModule, operand: Any) -> Tensor | None:
    """Returns the float value of a dequantized constant; None for any other operand."""
    source = first_operand(operand)
    return constant_of(model, first_operand(source)) if is_quantize(source) else None


def _constant_of_range(model: GraphModule, before: Node, value: Tensor) -> Node:
    """Inserts the quantized constant `value`, with the range of its values and zero."""
    low, high = float(value.min().clamp(max=0)), float(value.max().clamp(min=0))
    scale = (high - low) / CODES or 1.0
    qparams = torch.tensor(scale), torch.tensor(round(LOWEST_CODE - low / scale))
    return QuantizedConstant(value, *qparams, None, CODE_RANGE, torch.int8).write(model, before, "state")


@dataclass(frozen=True)
class _Quantized:
    """An operator of a converted module with the quantize and the dequantize that follow it."""

    node: Node
    quantize: Node
    dequantize: Node

    @classmethod
    def of(cls, node: Node) -> _Quantized:
        (quantize,) = node.users
        (dequantize,) = quantize.users
        return cls(node, quantize, dequantize)

    @property
    def qparams(self) -> tuple[Any, ...]:
        """Scale and zero point."""
        return self.quantize.args[1:3]

    def set_qparams(self, qparams: tuple[Any, ...]) -> None:
        for call in (self.quantize, self.dequantize):
            call.args = (call.args[0], *qparams, *call.args[3:])

    def multiply_operand(self, reader: Node, position: int, factor: Node, name: str, qparams: tuple[Any, ...]) -> None:
        """Multiplies an operand of `reader` by `factor`."""
        operands = list(reader.args)
        operands[position] = self.multiplied(reader, operands[position], factor, name, qparams)
        reader.args = tuple(operands)

    def multiplied(self, before: Node, value: Any, factor: Node, name: str, qparams: tuple[Any, ...]) -> Node:
        """Inserts `value` * `factor`, quantized like this value but with `qparams`, before the node `before`."""
        graph = before.graph
        with graph.inserting_before(before):
            result = graph.call_function(overload_of("mul"), (value, factor))
            result._rename(name)
            result.meta = {key: self.node.meta[key] for key in PROVENANCE if key in self.node.meta}
            for call in (self.quantize, self.dequantize):
                assert callable(call.target)
                result = graph.call_function(call.target, (result, *qparams, *call.args[3:]), call.kwargs)
                result.meta = dict(call.meta)
        return result


def select_cell_ranges_at_conversion(model: GraphModule, observers: Mapping[Any, Any]) -> None:
    """Inserts the calls by which conversion selects the ranges of cell states. Linear in nodes.

    `observers` maps nodes and edges (producer, consumer) to the observers that torchao will insert. Leaves out a
    layer if a recipe selected its ranges, if its cell states have no limit because the model reads them, or if one of
    them is not quantized.
    """
    order = {node: number for number, node in enumerate(model.graph.nodes)}
    nodes = _NodesByName()
    for layer in cell_layers(model).values():
        steps = layer.steps
        if layer.is_limited and len(shape_of(steps[0].cell)) <= MOST_DIMENSIONS and _is_quantized(layer, observers):
            name = free_name(model, f"cell_ranges_of_{steps[0].cell.name}")
            model.add_submodule(name, CellObserver(steps, nodes))
            latest = steps[0].cell
            for number, step in enumerate(steps):
                operands = step.cell, step.forget_gate, step.before, step.written, step.output_gate
                latest = max((latest, *filter(None, operands)), key=order.__getitem__)
                with model.graph.inserting_after(latest):
                    call = model.graph.call_module(name, operands, {"number": number})
                order[call], latest = order[latest], call


def _is_quantized(layer: CellLayer, observers: Mapping[Any, Any]) -> bool:
    """Returns whether the sums and products of all steps read values that are quantized once."""
    if not layer.is_connected:
        return False
    sums = [(value, step.cell) for step in layer.steps for value in (step.kept, step.written)]
    states = [(step.before, step.kept) for step in layer.steps]
    read_alone = all(set(step.kept.users) == {step.cell} for step in layer.steps)
    return (
        read_alone
        and all(step.cell in observers for step in layer.steps)
        and all(value in observers and observers.get((value, reader)) is observers[value] for value, reader in sums)
        and all(observers.get(edge) is observers.get(edge[0], observers.get(edge)) for edge in states)
        and all(edge in observers for edge in states)
    )
