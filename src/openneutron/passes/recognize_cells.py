"""Recognizes the cell states of LSTMs that the model computes itself, step by step."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from openneutron.core.constants import constant_value, number_of
from openneutron.core.fx import finish_rewrite, shape_of
from openneutron.ops.declared import facts_of, is_op
from openneutron.ops.decomposition import RANGE_LIMIT, SHARED_QPARAMS
from openneutron.ops.intervals import Interval
from openneutron.ops.recurrent import CELL_LIMIT, CELL_ROLE

__all__ = ["recognize_cells"]

LEAST_STEPS = 2


@dataclass(frozen=True)
class _Step:
    """`cell` = `kept` + `written`, `kept` = gate * `before`, and a tanh reads `cell`."""

    cell: Node
    kept: Node
    written: Node
    before: Node


def recognize_cells(module: GraphModule, keeps_float: Callable[[Node], bool] = lambda _: False) -> bool:
    """Marks the cell states of each LSTM layer as states of one layer, as the decomposition of an LSTM does.

    A chain of two or more steps, cell = gate * before + written, is a layer if each gate is a sigmoid, or one minus a
    sigmoid, and a tanh reads each cell. Rules, linear in nodes:

    1. The cell states of a layer share qparams.
    2. Their ranges, and those of the products with the gates, end at `CELL_LIMIT` if only these operators read them.
    3. A first state of zeros is removed: gate * 0 + written becomes written.

    Layers that a decomposition has marked, and operators for which `keeps_float` is true, are not changed.
    """
    layers: dict[Node, list[_Step]] = {}
    for node in module.graph.nodes:
        step = None if keeps_float(node) else _step_of(node, layers)
        if step is not None:
            layer = layers.pop(step.before, [])
            layer.append(step)
            layers[node] = layer
    found = [steps for steps in layers.values() if len(steps) >= LEAST_STEPS and not _is_noted(steps)]
    for steps in found:
        _note_layer(steps)
    return finish_rewrite(module, changed=bool(found))


def _step_of(cell: Node, states: Container[Node]) -> _Step | None:
    """Returns the step that computes `cell`; None for another sum. Prefers a step that reads one of `states`."""
    if not is_op(cell, "add") or cell.kwargs or len(cell.all_input_nodes) != 2:
        return None
    if not any(is_op(reader, "tanh") for reader in cell.users):
        return None
    found: list[_Step] = []
    for kept, written in (operands := cell.all_input_nodes, operands[::-1]):
        before = _state_of(kept) if set(kept.users) == {cell} and shape_of(kept) == shape_of(cell) else None
        if before is not None and shape_of(written) == shape_of(cell):
            found.append(_Step(cell, kept, written, before))
    return next((step for step in found if step.before in states), found[0] if found else None)


def _state_of(kept: Node) -> Node | None:
    """Returns the factor that is not a gate, if `kept` is a product of a gate and a state."""
    if not is_op(kept, "mul") or len(kept.all_input_nodes) != 2:
        return None
    first, second = kept.all_input_nodes
    for gate, state in ((first, second), (second, first)):
        if _is_gate(gate) and not _is_gate(state) and not is_op(state, "tanh"):
            return state
    return None


def _is_gate(value: Node) -> bool:
    """Returns whether `value` consists of values of a sigmoid, or of one minus a sigmoid."""
    while facts_of(value).movement is not None and value.all_input_nodes:
        value = value.all_input_nodes[0]
    if is_op(value, "sub", "rsub") and len(value.args) == 2 and not value.kwargs:
        one, gate = value.args if is_op(value, "sub") else value.args[::-1]
        return number_of(one) == 1 and isinstance(gate, Node) and _is_gate(gate)
    return is_op(value, "sigmoid", "hardsigmoid")


def _is_noted(steps: list[_Step]) -> bool:
    """Returns whether the states share qparams already."""
    names = {step.cell.meta.get(SHARED_QPARAMS) for step in steps}
    return len(names) == 1 and names != {None}


def _note_layer(steps: list[_Step]) -> None:
    name = f"{steps[0].cell.name} {CELL_ROLE}"
    kept = {step.kept for step in steps}
    limits_cell = all(_only_steps_read(step.cell, kept) for step in steps)
    initial = steps[0].before
    cells = [step.cell for step in steps]
    for step in steps:  # readers of the notes expect the operands in this order
        step.kept.args = (next(node for node in step.kept.all_input_nodes if node is not step.before), step.before)
        step.cell.args = (step.kept, step.written)
    value = constant_value(initial)
    if value is None:
        initial.meta[SHARED_QPARAMS] = name
        if any(is_op(reader, "tanh") for reader in initial.users):  # the first state of a decomposed cell
            cells.insert(0, initial)
            limits_cell = limits_cell and _only_steps_read(initial, kept)
    elif not value.any():
        cells[0] = steps[0].written
        steps[0].cell.replace_all_uses_with(cells[0])
    for cell in cells:
        cell.meta[SHARED_QPARAMS] = name
    if limits_cell:
        for limited in (*cells, *(step.kept for step in steps)):
            RANGE_LIMIT.write(limited, Interval(-CELL_LIMIT, CELL_LIMIT))


def _only_steps_read(cell: Node, kept: Container[Node]) -> bool:
    return all(reader in kept or is_op(reader, "tanh") for reader in cell.users)
