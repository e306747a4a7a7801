"""Decompositions of recurrent networks, which are unrolled.

One linear multiplies the inputs of all steps, and one linear for each step multiplies its state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from openneutron.core.constants import constant_of
from openneutron.core.fx import iterate_nodes, op_name, shape_of
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import constraint

__all__ = ["DECOMPOSED"]

aten = torch.ops.aten

State = tuple[Node, ...]
"""The hidden state, [batch, features], and for an LSTM its cell state."""

FirstState = tuple[Node | None, ...]
"""The state before the first step; None for zeros."""


@constraint
def has_constant_weights(instance: OpInstance) -> bool:
    """The weights and biases are constants."""
    names = ("params",) if "params" in instance.args else ("w_ih", "w_hh", "b_ih", "b_hh")
    return instance.reads_constants(*names)


@constraint
def has_no_dropout(instance: OpInstance) -> bool:
    """The model is in eval mode, or the network has no dropout."""
    return not instance.args["train"] or instance.args["dropout"] == 0


@dataclass(frozen=True)
class _StepBuilder:
    """Adds the operators of a step to the graph."""

    rewriting: Rewriting

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
        return self.rewriting.call(aten.reshape.default, self.part(value, dim, number, number + 1), shape)

    def stacked(self, values: Sequence[Node], dim: int) -> Node:
        """Concatenates along a new dimension."""
        return self.joined([self.rewriting.call(aten.unsqueeze.default, value, dim) for value in values], dim)

    def swapped(self, value: Node) -> Node:
        """Swaps batch and steps."""
        return self.rewriting.call(aten.transpose.int, value, 0, 1)

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


def _with_one_bias(builder: _StepBuilder, weights: _Weights) -> _Weights:
    """Adds the state's bias to the input's bias. The step adds both to the same sum."""
    if weights.input_bias is None or weights.state_bias is None:
        return weights
    return replace(weights, input_bias=builder.add(weights.input_bias, weights.state_bias), state_bias=None)


def _with_gru_biases(builder: _StepBuilder, weights: _Weights) -> _Weights:
    """Moves the state's biases of the reset and update gates into the input's bias.

    The state's bias of the candidate is kept, because the reset gate multiplies it.
    """
    if weights.input_bias is None or weights.state_bias is None:
        return weights
    size = shape_of(weights.state_bias)[0] // 3
    gates, candidate = (
        builder.part(weights.state_bias, 0, 0, 2 * size),
        builder.part(weights.state_bias, 0, 2 * size, 3 * size),
    )
    more = builder.joined([gates, builder.rewriting.constant(torch.zeros(size))], 0)
    rest = builder.joined([builder.rewriting.constant(torch.zeros(2 * size)), candidate], 0)
    return replace(weights, input_bias=builder.add(weights.input_bias, more), state_bias=rest)


def _lstm_step(builder: _StepBuilder, product: Node, state: FirstState, weights: _Weights) -> State:
    hidden, cell = state
    sums = product if hidden is None else builder.add(product, builder.linear(hidden, weights.state))
    take_in, keep, _, put_out = builder.gates(builder.sigmoid(sums), 4)
    next_cell = builder.mul(take_in, builder.tanh(builder.gates(sums, 4)[2]))
    if cell is not None:
        next_cell = builder.add(builder.mul(keep, cell), next_cell)
    next_hidden = builder.mul(put_out, builder.tanh(next_cell))
    if weights.projection is not None:
        next_hidden = builder.linear(next_hidden, weights.projection)
    return next_hidden, next_cell


def _gru_step(builder: _StepBuilder, product: Node, state: FirstState, weights: _Weights) -> State:
    (hidden,) = state
    recurrent = weights.state_bias if hidden is None else builder.linear(hidden, weights.state, weights.state_bias)
    sums = product if hidden is None or recurrent is None else builder.add(product, recurrent)
    reset, update, _ = builder.gates(builder.sigmoid(sums), 3)
    candidate = builder.gates(product, 3)[2]
    if recurrent is not None:
        candidate = builder.add(candidate, builder.mul(reset, builder.gates(recurrent, 3)[2]))
    candidate = builder.tanh(candidate)
    if hidden is None:
        return (builder.sub(candidate, builder.mul(update, candidate)),)
    return (builder.add(candidate, builder.mul(update, builder.sub(hidden, candidate))),)


def _elman_step(activation: torch._ops.OpOverload) -> Callable[[_StepBuilder, Node, FirstState, _Weights], State]:
    def step(builder: _StepBuilder, product: Node, state: FirstState, weights: _Weights) -> State:
        (hidden,) = state
        sums = product if hidden is None else builder.add(product, builder.linear(hidden, weights.state))
        return (builder.rewriting.call(activation, sums),)

    return step


Step = Callable[[_StepBuilder, Node, FirstState, _Weights], State]


@dataclass(frozen=True)
class _Cell:
    """A kind of recurrent cell."""

    prepared: Callable[[_StepBuilder, _Weights], _Weights]
    """Prepares the weights: moves biases to the input's product where the step permits it."""
    step: Step
    """Computes the next state from the input's product and the state."""
    roles: tuple[str, ...] = ("hidden",)
    """The names of the tensors of its state."""


_CELLS = {
    "lstm": _Cell(_with_one_bias, _lstm_step, ("hidden", "cell")),
    "gru": _Cell(_with_gru_biases, _gru_step),
    "rnn_tanh": _Cell(_with_one_bias, _elman_step(aten.tanh.default)),
    "rnn_relu": _Cell(_with_one_bias, _elman_step(aten.relu.default)),
}


def _cell_of(instance: OpInstance) -> _Cell:
    _, name, _ = op_name(instance.node).split(".")
    return _CELLS[name.removesuffix("_cell")]


def _initial_states(rewriting: Rewriting) -> list[Node | None]:
    """Returns the nodes of the first state; None for a constant of zeros."""
    nodes = list(iterate_nodes(rewriting.args["hx"]))
    values = [constant_of(rewriting.module, node) for node in nodes]
    return [None if value is not None and not value.any() else node for node, value in zip(nodes, values, strict=True)]


def _share(rewriting: Rewriting, cell: _Cell, name: str, states: Iterable[FirstState]) -> None:
    """Requests the same qparams for the state at all steps, so that the steps share a weight without requantizing."""
    for role, values in zip(cell.roles, zip(*states, strict=True), strict=True):
        rewriting.share_qparams(f"{name} {role}", [value for value in values if value is not None])


def _one_step(rewriting: Rewriting) -> Node | State:
    """Adds one step of a cell, and returns the next state."""
    builder, cell, args = _StepBuilder(rewriting), _cell_of(rewriting.instance), rewriting.args
    weights = cell.prepared(builder, _Weights(args["w_ih"], args["w_hh"], args["b_ih"], args["b_hh"]))
    state = tuple(_initial_states(rewriting))
    product = builder.linear(args["input"], weights.input, weights.input_bias)
    following = cell.step(builder, product, state, weights)
    _share(rewriting, cell, "step", [state, following])
    return following if len(following) > 1 else following[0]


def _weights_of_layers(args: dict[str, Any]) -> list[_Weights]:
    """Returns the weights of each layer and direction in torch's order: by layer, forwards before backwards."""
    params, count = args["params"], args["num_layers"] * (2 if args["bidirectional"] else 1)
    size = len(params) // count
    layers = []
    for first in range(0, len(params), size):
        of_input, of_state, *others = params[first : first + size]
        biases = [others.pop(0), others.pop(0)] if args["has_biases"] else [None, None]
        layers.append(_Weights(of_input, of_state, *biases, *others))
    return layers


def _all_steps(rewriting: Rewriting) -> list[Node]:
    """Adds a whole network. Returns its outputs, then the last state of all layers and directions."""
    builder, cell, args = _StepBuilder(rewriting), _cell_of(rewriting.instance), rewriting.args
    initial = _initial_states(rewriting)
    values = args["input"] if args["batch_first"] else builder.swapped(args["input"])
    last: list[State] = []
    layers = _weights_of_layers(args)
    directions = 2 if args["bidirectional"] else 1
    for layer in range(args["num_layers"]):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            state = tuple(None if node is None else builder.index(node, 0, number) for node in initial)
            weights = cell.prepared(builder, layers[number])
            states = _run(builder, cell, values, weights, state, backwards=direction == 1)
            _share(rewriting, cell, f"layer {number}", [state, *states])
            last.append(states[0 if direction == 1 else -1])
            outputs.append(builder.stacked([hidden for hidden, *_ in states], 1))
        values = outputs[0] if directions == 1 else builder.joined(outputs, -1)
    final = [builder.stacked(of_role, 0) for of_role in zip(*last, strict=True)]
    return [values if args["batch_first"] else builder.swapped(values), *final]


def _run(
    builder: _StepBuilder, cell: _Cell, values: Node, weights: _Weights, state: FirstState, *, backwards: bool
) -> list[State]:
    """Unrolls `cell` over `values` [batch, steps, features]. Returns the state after each step, by step number."""
    products = builder.linear(values, weights.input, weights.input_bias)
    steps = range(shape_of(values)[1])
    states: list[State] = []
    for step in reversed(steps) if backwards else steps:
        state = cell.step(builder, builder.index(products, 1, step), state, weights)
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
    "The first step needs no linear if the first state is zero. The state has the same scale and zero point at all "
    "steps, and each weight is stored once. The tolerance is 2 because steep gates enlarge a difference of one LSB."
)
TOLERANCE = 2

DECOMPOSED = tuple(
    Decomposition(
        name=name,
        targets=(f"aten.{name}.input",),
        rewrite=_all_steps,
        becomes=becomes,
        constraints=(has_constant_weights, has_no_dropout),
        tolerance=TOLERANCE,
        notes=UNROLLED,
    )
    for name, becomes in _BECOMES.items()
) + tuple(
    Decomposition(
        name=f"{name}_cell",
        targets=(f"aten.{name}_cell.default",),
        rewrite=_one_step,
        becomes=becomes,
        constraints=(has_constant_weights,),
    )
    for name, becomes in _BECOMES.items()
)
