"""Decompositions of recurrent networks, which are unrolled.

One linear multiplies the inputs of all steps, and one linear for each step multiplies its state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from openneutron.core.constants import constant_of
from openneutron.core.fx import iterate_nodes, op_name, shape_of
from openneutron.ops.decomposition import SHARED_QPARAMS, Decomposition, Rewriting
from openneutron.ops.intervals import Interval
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import constraint

__all__ = ["CELL_LIMIT", "DECOMPOSED", "is_cell_state", "is_recurrent_network"]

aten = torch.ops.aten

State = tuple[Node, ...]
"""The hidden state, [batch, features], and for an LSTM its cell state."""

StepState = tuple[Node | None, ...]
"""The state before or after a step; None for a value of zeros. A wide cell state consists of two values."""

# Rows of the weights of an LSTM, in torch's order: input gate, forget gate, candidate, output gate.
LSTM_GATES, LSTM_CANDIDATE = (0, 1, 3), (2,)
# The index of the output of aten.lstm that holds the last cell states.
CELL_OUTPUT = 2
# The range of a cell state ends here, unless the model reads the last cell state. Beyond, the int8 output of tanh no
# longer changes; a larger state would only take more steps to forget.
CELL_LIMIT = 2.6
# The same for a wide cell state, whose values within -1..1 have a scale of their own.
WIDE_CELL_LIMIT = 4.0
_ZEROS = ("aten.zeros.default", "aten.new_zeros.default", "aten.zeros_like.default")
# Rows of the weights of a GRU: reset gate, update gate, candidate.
GRU_GATES, GRU_CANDIDATE = (0, 1), (2,)


@constraint
def has_constant_weights(instance: OpInstance) -> bool:
    """The weights and biases are constants."""
    names = ("params",) if "params" in instance.args else ("w_ih", "w_hh", "b_ih", "b_hh")
    return instance.reads_constants(*names)


@dataclass(frozen=True)
class _StepBuilder:
    """Adds the operators of a step to the graph."""

    rewriting: Rewriting
    layer: str = "step"
    """The name of the layer in one direction."""
    limits_cell: bool = False
    """Whether the range of the cell state is limited, because no operator outside the steps reads it."""

    def add(self, first: Node, second: Node) -> Node:
        return self.rewriting.call(aten.add.Tensor, first, second)

    def sub(self, first: Node, second: Node) -> Node:
        return self.rewriting.call(aten.sub.Tensor, first, second)

    def mul(self, first: Node, second: Node) -> Node:
        return self.rewriting.call(aten.mul.Tensor, first, second)

    def sigmoid(self, value: Node) -> Node:
        return self.rewriting.call(aten.sigmoid.default, value)

    def tanh(self, value: Node) -> Node:
        return self.rewriting.call(aten.tanh.default, value)

    def linear(self, value: Node, weight: Node, bias: Node | None = None) -> Node:
        return self.rewriting.call(aten.linear.default, value, weight, bias)

    def part(self, value: Node, dim: int, first: int, end: int) -> Node:
        return self.rewriting.call(aten.slice.Tensor, value, dim, first, end)

    def index(self, value: Node, dim: int, number: int) -> Node:
        """Selects one index of a dimension, and removes the dimension."""
        shape = [size for other, size in enumerate(shape_of(value)) if other != dim]
        return self.reshaped(self.part(value, dim, number, number + 1), shape)

    def reshaped(self, value: Node, shape: Sequence[int | torch.SymInt]) -> Node:
        return self.rewriting.call(aten.reshape.default, value, list(shape))

    def stacked(self, values: Sequence[Node], dim: int) -> Node:
        """Concatenates along a new dimension."""
        return self.joined([self.rewriting.call(aten.unsqueeze.default, value, dim) for value in values], dim)

    def swapped(self, value: Node) -> Node:
        """Swaps batch and steps."""
        return self.rewriting.call(aten.transpose.int, value, 0, 1)

    def dropped(self, value: Node, probability: float) -> Node:
        """Applies dropout in train mode."""
        return self.rewriting.call(aten.dropout.default, value, probability, True)

    def within_one(self, value: Node) -> Node:
        """Limits the values to -1..1."""
        return self.rewriting.call(aten.hardtanh.default, value, -1.0, 1.0)

    def add_coarsely(self, first: Node, second: Node) -> Node:
        """Adds two values. The sums of all steps of a layer share qparams, and cover values beyond -1..1."""
        total = self.limited(self.add(first, second), WIDE_CELL_LIMIT)
        self.share_qparams("coarse sums", [total])
        return total

    def share_qparams(self, role: str, values: Iterable[Node]) -> None:
        """Requests equal qparams for all values of the layer with this role."""
        self.rewriting.share_qparams(f"{self.layer} {role}", values)

    def limited(self, value: Node, limit: float) -> Node:
        """Returns `value`. With `limits_cell`, its int8 range is clipped to -`limit`..`limit`."""
        if self.limits_cell:
            self.rewriting.limit_range(value, Interval(-limit, limit))
        return value

    def joined(self, values: Sequence[Node], dim: int) -> Node:
        return self.rewriting.call(aten.cat.default, list(values), dim)

    def gates(self, value: Node, count: int) -> list[Node]:
        """Splits the features into `count` equal parts."""
        size = shape_of(value)[-1] // count
        return [self.part(value, -1, gate * size, (gate + 1) * size) for gate in range(count)]


@dataclass(frozen=True)
class _Weights:
    """The weights of one layer in one direction."""

    input: Node
    state: Node
    input_bias: Node | None
    state_bias: Node | None
    projection: Node | None = None


@dataclass(frozen=True)
class _Rows:
    """Rows of the weights of a layer, with the rows' biases. Their products get qparams of their own."""

    input: Node
    state: Node
    input_bias: Node | None
    state_bias: Node | None


@dataclass(frozen=True)
class _Layer:
    """The weights of one layer in one direction, split into the rows that share qparams."""

    rows: tuple[_Rows, ...]
    projection: Node | None


def _add_biases(builder: _StepBuilder, weights: _Weights | _Rows) -> _Rows:
    """Adds the state's bias to the input's bias. The step adds both to the same sum."""
    if weights.input_bias is None or weights.state_bias is None:
        return _Rows(weights.input, weights.state, weights.input_bias, weights.state_bias)
    return _Rows(weights.input, weights.state, builder.add(weights.input_bias, weights.state_bias), None)


def _split_rows(builder: _StepBuilder, weights: _Weights, parts: Sequence[int], count: int) -> _Rows:
    """Splits the rows of each weight and bias into `count` equal parts. Returns those with the numbers `parts`."""

    def chosen(value: Node) -> Node:
        size = shape_of(value)[0] // count
        values = [builder.part(value, 0, part * size, (part + 1) * size) for part in parts]
        return values[0] if len(values) == 1 else builder.joined(values, 0)

    biases = [None if bias is None else chosen(bias) for bias in (weights.input_bias, weights.state_bias)]
    return _Rows(chosen(weights.input), chosen(weights.state), *biases)


def _lstm_rows(builder: _StepBuilder, weights: _Weights) -> tuple[_Rows, ...]:
    """Returns the rows of the input, forget and output gates, then those of the candidate.

    The candidate has weights and sums of another range than the gates: tanh is flat beyond 2.6, sigmoid beyond 6.2.
    """
    gates, candidate = (_split_rows(builder, weights, parts, 4) for parts in (LSTM_GATES, LSTM_CANDIDATE))
    return _add_biases(builder, gates), _add_biases(builder, candidate)


def _gru_rows(builder: _StepBuilder, weights: _Weights) -> tuple[_Rows, ...]:
    """Returns the rows of the reset and update gates, then those of the candidate.

    The candidate keeps the state's bias, because the reset gate multiplies it.
    """
    gates, candidate = (_split_rows(builder, weights, parts, 3) for parts in (GRU_GATES, GRU_CANDIDATE))
    return _add_biases(builder, gates), candidate


def _elman_rows(builder: _StepBuilder, weights: _Weights) -> tuple[_Rows, ...]:
    return (_add_biases(builder, weights),)


Products = Sequence[Node]
"""The products of the input with the rows of a layer, in the order of `_Layer.rows`: [batch, rows] each."""


def _add_state_products(builder: _StepBuilder, products: Products, hidden: Node | None, layer: _Layer) -> list[Node]:
    """Adds the products of the hidden state to those of the input."""
    if hidden is None:
        return list(products)
    recurrent = [builder.linear(hidden, rows.state, rows.state_bias) for rows in layer.rows]
    return [builder.add(product, other) for product, other in zip(products, recurrent, strict=True)]


def _lstm_gates(
    builder: _StepBuilder, products: Products, hidden: Node | None, layer: _Layer
) -> tuple[Node, Node, Node]:
    """Returns the values that a step writes to the cell state, the forget gate, and the output gate."""
    gates, candidate = _add_state_products(builder, products, hidden, layer)
    input_gate, forget_gate, output_gate = builder.gates(builder.sigmoid(gates), 3)
    return builder.mul(input_gate, builder.tanh(candidate)), forget_gate, output_gate


def _lstm_output(builder: _StepBuilder, output_gate: Node, cell: Node, layer: _Layer) -> Node:
    hidden = builder.mul(output_gate, builder.tanh(cell))
    return hidden if layer.projection is None else builder.linear(hidden, layer.projection)


def _lstm_step(builder: _StepBuilder, products: Products, state: StepState, layer: _Layer) -> State:
    hidden, cell = state
    written, forget_gate, output_gate = _lstm_gates(builder, products, hidden, layer)
    following = written  # within -1..1, as the product of a sigmoid and a tanh
    if cell is not None:
        kept = builder.limited(builder.mul(forget_gate, cell), CELL_LIMIT)
        following = builder.add(kept, written)
    builder.limited(following, CELL_LIMIT)
    return _lstm_output(builder, output_gate, following, layer), following


def _wide_lstm_step(builder: _StepBuilder, products: Products, state: StepState, layer: _Layer) -> StepState:
    """Computes a step whose cell state is the sum of two values: the state limited to -1..1, and the excess.

    The limited value is computed from sums that saturate at -1 and 1. It is not affected by the coarse scale of the
    excess, because the excess of a state within -1..1 is exactly zero.
    """
    hidden, limited, excess = state
    written, forget_gate, output_gate = _lstm_gates(builder, products, hidden, layer)
    if limited is None:  # the product of sigmoid and tanh is within -1..1
        return _lstm_output(builder, output_gate, written, layer), written, None
    kept = builder.mul(forget_gate, limited)
    builder.share_qparams(LIMITED_ROLE, [kept, written])  # sums of values with equal scales are exact
    following, total = builder.within_one(builder.add(kept, written)), builder.add_coarsely(kept, written)
    if excess is not None:
        kept_excess = builder.limited(builder.mul(forget_gate, excess), WIDE_CELL_LIMIT - 1)
        following = builder.within_one(builder.add(following, kept_excess))
        total = builder.add_coarsely(total, kept_excess)
    excess = builder.limited(builder.sub(total, builder.within_one(total)), WIDE_CELL_LIMIT - 1)
    return _lstm_output(builder, output_gate, builder.add(following, excess), layer), following, excess


def _gru_step(builder: _StepBuilder, products: Products, state: StepState, layer: _Layer) -> State:
    (hidden,) = state
    gates, candidate = products
    gate_rows, candidate_rows = layer.rows
    recurrent = candidate_rows.state_bias
    if hidden is not None:
        gates = builder.add(gates, builder.linear(hidden, gate_rows.state))
        recurrent = builder.linear(hidden, candidate_rows.state, candidate_rows.state_bias)
    reset, update = builder.gates(builder.sigmoid(gates), 2)
    if recurrent is not None:
        candidate = builder.add(candidate, builder.mul(reset, recurrent))
    candidate = builder.tanh(candidate)
    if hidden is None:
        return (builder.sub(candidate, builder.mul(update, candidate)),)
    return (builder.add(candidate, builder.mul(update, builder.sub(hidden, candidate))),)


def _elman_step(activation: torch._ops.OpOverload) -> _Step:
    def step(builder: _StepBuilder, products: Products, state: StepState, layer: _Layer) -> State:
        (hidden,) = state
        (total,) = _add_state_products(builder, products, hidden, layer)
        return (builder.rewriting.call(activation, total),)

    return step


_Step = Callable[[_StepBuilder, Products, StepState, _Layer], StepState]


@dataclass(frozen=True)
class _Cell:
    """A kind of recurrent cell."""

    rows: Callable[[_StepBuilder, _Weights], tuple[_Rows, ...]]
    """Returns the rows of the weights whose products get qparams of their own."""
    step: _Step
    """Computes the next state from the input's products and the state."""
    roles: tuple[str, ...] = ("hidden",)
    """The names of the tensors of its state."""


CELL_ROLE = "cell"
_CELLS = {
    "lstm": _Cell(_lstm_rows, _lstm_step, ("hidden", CELL_ROLE)),
    "gru": _Cell(_gru_rows, _gru_step),
    "rnn_tanh": _Cell(_elman_rows, _elman_step(aten.tanh.default)),
    "rnn_relu": _Cell(_elman_rows, _elman_step(aten.relu.default)),
}
LIMITED_ROLE = "cell within one"
_WIDE_LSTM = _Cell(_lstm_rows, _wide_lstm_step, ("hidden", LIMITED_ROLE, "excess"))


def _cell_of(rewriting: Rewriting) -> _Cell:
    _, name, _ = op_name(rewriting.instance.node).split(".")
    return _CELLS[name.removesuffix("_cell")]


def _initial_states(rewriting: Rewriting) -> list[Node | None]:
    """Returns the nodes of the first state; None for zeros."""
    nodes = list(iterate_nodes(rewriting.args["hx"]))
    return [None if _is_zero(rewriting, node) else node for node in nodes]


def _is_zero(rewriting: Rewriting, node: Node) -> bool:
    """Whether `node` is a constant of zeros, or zeros of a dynamic size."""
    value = constant_of(rewriting.module, node)
    return op_name(node) in _ZEROS or (value is not None and not value.any())


def _state_from_torch(builder: _StepBuilder, cell: _Cell, state: StepState) -> StepState:
    """Converts the first state from torch's form. Splits the cell state of a wide LSTM into two values."""
    if cell is not _WIDE_LSTM:
        return state
    hidden, whole = state
    if whole is None:
        return hidden, None, None
    limited = builder.within_one(whole)
    return hidden, limited, builder.sub(whole, limited)


def _state_to_torch(builder: _StepBuilder, cell: _Cell, state: StepState) -> State:
    """Converts a state to torch's form. Adds the two values of a wide cell state."""
    if cell is not _WIDE_LSTM:
        return tuple(value for value in state if value is not None)
    hidden, limited, excess = state
    assert hidden is not None
    assert limited is not None
    return hidden, limited if excess is None else builder.add(limited, excess)


def _share_state_qparams(builder: _StepBuilder, cell: _Cell, states: Iterable[StepState]) -> None:
    """Requests the same qparams for the state at all steps, so that the steps share a weight without requantizing."""
    for role, values in zip(cell.roles, zip(*states, strict=True), strict=True):
        builder.share_qparams(role, [value for value in values if value is not None])


def _decompose_cell(rewriting: Rewriting) -> Node | State:
    """Adds one step of a cell, and returns the next state."""
    builder, cell, args = _StepBuilder(rewriting), _cell_of(rewriting), rewriting.args
    layer = _Layer(cell.rows(builder, _Weights(args["w_ih"], args["w_hh"], args["b_ih"], args["b_hh"])), None)
    state = tuple(_initial_states(rewriting))
    products = [builder.linear(args["input"], rows.input, rows.input_bias) for rows in layer.rows]
    following = cell.step(builder, products, state, layer)
    _share_state_qparams(builder, cell, [state, following])
    output = _state_to_torch(builder, cell, following)
    return output if len(output) > 1 else output[0]


def _weights_of_layers(args: dict[str, Any]) -> list[_Weights]:
    """Returns the weights of each layer and direction in torch's order: by layer, forwards before backwards."""
    params, count = args["params"], args["num_layers"] * (2 if args["bidirectional"] else 1)
    size = len(params) // count
    layers = []
    for first in range(0, len(params), size):
        input_weight, state_weight, *others = params[first : first + size]
        biases = [others.pop(0), others.pop(0)] if args["has_biases"] else [None, None]
        layers.append(_Weights(input_weight, state_weight, *biases, *others))
    return layers


def _decompose_network(rewriting: Rewriting) -> list[Node]:
    """Adds a whole network. Returns its outputs, then the last state of all layers and directions.

    Between layers, values are [steps * batch, features], so that the rows of a step are one slice.
    """
    whole, args = _StepBuilder(rewriting), rewriting.args
    cell = _cell_of(rewriting)
    if rewriting.is_wide and cell is _CELLS["lstm"]:
        cell = _WIDE_LSTM
    initial = _initial_states(rewriting)
    inputs = whole.swapped(args["input"]) if args["batch_first"] else args["input"]
    steps, batch, features = shape_of(inputs)
    if not isinstance(steps, int):
        raise rewriting.needs_fixed_sizes()
    values = whole.reshaped(inputs, [steps * batch, features])
    last: list[State] = []
    limits_cell = not _reads_output(rewriting, CELL_OUTPUT)
    weights = _weights_of_layers(args)
    directions = 2 if args["bidirectional"] else 1
    for first in range(0, len(weights), directions):
        outputs = []
        for number in range(first, first + directions):
            builder, is_backwards = _StepBuilder(rewriting, f"layer {number}", limits_cell), number > first
            given = tuple(None if node is None else builder.index(node, 0, number) for node in initial)
            state = _state_from_torch(builder, cell, given)
            layer = _Layer(cell.rows(builder, weights[number]), weights[number].projection)
            by_step = _products_by_step(builder, values, steps, batch, layer)
            states = _unroll(builder, cell, layer, by_step, state, backwards=is_backwards)
            _share_state_qparams(builder, cell, [state, *states])
            last.append(_state_to_torch(builder, cell, states[0 if is_backwards else -1]))
            outputs.append(builder.joined([hidden for hidden, *_ in states if hidden is not None], 0))
        values = outputs[0] if directions == 1 else whole.joined(outputs, -1)
        if args["train"] and args["dropout"] and first + directions < len(weights):
            values = whole.dropped(values, args["dropout"])
    hidden = whole.reshaped(values, [steps, batch, shape_of(values)[-1]])
    final = [whole.stacked(role_states, 0) for role_states in zip(*last, strict=True)]
    return [whole.swapped(hidden) if args["batch_first"] else hidden, *final]


def is_cell_state(node: Node) -> bool:
    """Returns whether `node` is the cell state of an LSTM, in one tensor, after or before a step."""
    return str(node.meta.get(SHARED_QPARAMS, "")).endswith(f" {CELL_ROLE}")


def is_recurrent_network(node: Node) -> bool:
    """Returns whether `node` calls a recurrent network of several steps, which no decomposition replaced."""
    return op_name(node) in {f"aten.{name}.input" for name in _BECOMES}


def _reads_output(rewriting: Rewriting, number: int) -> bool:
    """Returns whether the model reads an output of the replaced operator."""
    return any(user.args[1] == number and user.users for user in rewriting.instance.node.users)


def _products_by_step(
    builder: _StepBuilder, values: Node, steps: int, batch: int | torch.SymInt, layer: _Layer
) -> list[list[Node]]:
    """Multiplies the inputs of all steps [steps * batch, features]. Returns the products of each step."""
    products = [builder.linear(values, rows.input, rows.input_bias) for rows in layer.rows]
    if isinstance(batch, int):
        firsts = range(0, steps * batch, batch)
        return [[builder.part(product, 0, first, first + batch) for product in products] for first in firsts]
    by_step = [builder.reshaped(product, [steps, batch, shape_of(product)[-1]]) for product in products]
    return [[builder.index(product, 0, step) for product in by_step] for step in range(steps)]


def _unroll(
    builder: _StepBuilder,
    cell: _Cell,
    layer: _Layer,
    by_step: Sequence[Products],
    state: StepState,
    *,
    backwards: bool,
) -> list[StepState]:
    """Unrolls `cell` over the steps. `by_step` holds the products of the inputs of each step.

    Returns the state after each step, in the order of the inputs also if `backwards`.
    """
    states: list[StepState] = []
    for products in reversed(by_step) if backwards else by_step:
        state = cell.step(builder, products, state, layer)
        states.append(state)
    return states[::-1] if backwards else states


_BECOMES = {
    "lstm": "linears, slices, sigmoids, tanhs, muls and adds",
    "gru": "linears, slices, sigmoids, tanhs, muls, adds and subs",
    "rnn_tanh": "linears, slices, adds and tanhs",
    "rnn_relu": "linears, slices, adds and relus",
}

UNROLLED = (
    "It is unrolled: one linear multiplies the inputs of all steps, and one linear for each step multiplies its state. "
    "The candidate of an LSTM or a GRU has linears of its own, because its sums need a finer scale than the gates. "
    "The first step needs no linear if the first state is zero. The state has the same scale and zero point at all "
    "steps, and each weight is stored once. The tolerance is 2 because steep gates enlarge a difference of one LSB."
)
TOLERANCE = 2

DECOMPOSED = tuple(
    Decomposition(
        name=name,
        targets=(f"aten.{name}.input",),
        rewrite=_decompose_network,
        becomes=f"{becomes}; a wide cell state also clamps and subs" if name == "lstm" else becomes,
        constraints=(has_constant_weights,),
        tolerance=TOLERANCE,
        notes=UNROLLED,
        has_wide_form=name == "lstm",
    )
    for name, becomes in _BECOMES.items()
) + tuple(
    Decomposition(
        name=f"{name}_cell",
        targets=(f"aten.{name}_cell.default",),
        rewrite=_decompose_cell,
        becomes=becomes,
        constraints=(has_constant_weights,),
    )
    for name, becomes in _BECOMES.items()
)
