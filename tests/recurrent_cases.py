"""Table of the operator tests: recurrent networks and their cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tests.case import Case, Rejected, Shape, of
from tests.flow_support import flat
from tests.oracle import Function
from torch import nn

__all__ = ["CASES", "REJECTED"]

aten = torch.ops.aten

STEPS, BATCH, INPUTS, HIDDEN = 4, 2, 5, 6
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": nn.RNN}
CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn_tanh": nn.RNNCell, "rnn_relu": nn.RNNCell}


def _network(kind: str, *sizes: int, **options: Any) -> nn.Module:
    if kind.startswith("rnn"):
        options["nonlinearity"] = kind.removeprefix("rnn_")
    network: nn.Module = KINDS[kind](*sizes, **options)
    return network


def _all_outputs(layer: nn.Module, values: torch.Tensor, *states: torch.Tensor) -> list[torch.Tensor]:
    """Returns all outputs of a network or a cell. `states` are the first states, if any."""
    state = (states,) if len(states) > 1 else states
    return flat(layer(values, *state))


def _with_states(layer: nn.Module, values: torch.Tensor) -> list[torch.Tensor]:
    """Returns all outputs of a network. Layer states are used in a sum, because states that are only returned remain
    float.
    """
    outputs, *states = flat(layer(values))
    return [outputs, *(state.abs() for state in states)]


def _networks(kind: str) -> list[Case]:
    def case(
        label: str,
        shape: Shape = (STEPS, BATCH, INPUTS),
        states: tuple[Shape, ...] = (),
        function: Callable[..., Any] = _all_outputs,
        **options: Any,
    ) -> Case:
        def build() -> nn.Module:
            return Function(function, _network(kind, shape[-1], HIDDEN, **options))

        return Case(f"aten.{kind}.input", label, build, (shape, *states))

    batch_first = (BATCH, STEPS, INPUTS)
    states = ((1, BATCH, HIDDEN),) * (2 if kind == "lstm" else 1)
    more = ((4, BATCH, HIDDEN),) * (2 if kind == "lstm" else 1)
    return [
        case("outputs", function=lambda layer, x: layer(x)[0]),
        case("last state", batch_first, function=lambda layer, x: flat(layer(x)[1])[0], batch_first=True),
        case("everything", function=_with_states, num_layers=2, dropout=0.5),
        case("without bias", batch_first, bias=False, batch_first=True),
        case("both directions", batch_first, bidirectional=True, batch_first=True),
        case("given state", states=states),
        case("given states", states=more, num_layers=2, bidirectional=True, bias=False),
        case("without a batch", (STEPS, INPUTS)),
        case("one step", (1, BATCH, INPUTS)),
    ]


def _cells(kind: str) -> list[Case]:
    def case(label: str, *shapes: Shape, **options: Any) -> Case:
        def build() -> nn.Module:
            if kind.startswith("rnn"):
                options["nonlinearity"] = kind.removeprefix("rnn_")
            return Function(_all_outputs, CELLS[kind](INPUTS, HIDDEN, **options))

        return Case(f"aten.{kind}_cell.default", label, build, shapes)

    state = (BATCH, HIDDEN)
    states = (state, state) if kind == "lstm" else (state,)
    return [
        case("given state", (BATCH, INPUTS), *states),
        case("zero", (BATCH, INPUTS)),
        case("without bias", (BATCH, INPUTS), *states, bias=False),
        case("without a batch", (INPUTS,), *((HIDDEN,),) * len(states)),
    ]


def _constant_state(state: torch.Tensor, layer: nn.Module, values: torch.Tensor) -> Any:
    return layer(values, state)[0]


def _stack(first: nn.Module, second: nn.Module, values: torch.Tensor) -> Any:
    return second(first(values)[0])[0]


CASES: tuple[Case, ...] = (
    *(case for kind in KINDS for case in (*_networks(kind), *_cells(kind))),
    Case("aten.lstm.input", "projected", lambda: Function(_with_states, nn.LSTM(INPUTS, HIDDEN, 2, proj_size=3)),
         ((STEPS, BATCH, INPUTS),)),
    Case("aten.lstm.input", "projected, given state",
         lambda: Function(_all_outputs, nn.LSTM(INPUTS, HIDDEN, proj_size=3)),
         ((STEPS, BATCH, INPUTS), (1, BATCH, 3), (1, BATCH, HIDDEN))),
    Case("aten.gru.input", "constant state",
         lambda: Function(_constant_state, torch.linspace(-1, 1, HIDDEN).expand(1, BATCH, HIDDEN).contiguous(),
                          nn.GRU(INPUTS, HIDDEN)), ((STEPS, BATCH, INPUTS),)),
    Case("aten.gru.input", "after an LSTM", lambda: Function(_stack, nn.LSTM(INPUTS, HIDDEN), nn.GRU(HIDDEN, HIDDEN)),
         ((STEPS, BATCH, INPUTS),)),
    Case("aten.gru.input", "large inputs", lambda: Function(_all_outputs, nn.GRU(INPUTS, HIDDEN)),
         ((STEPS, BATCH, INPUTS),), (0.0, 30.0)),
)  # fmt: skip


def _computed_weights(values: torch.Tensor, state: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    return aten.gru.input(values, state, weights, False, 1, 0.0, False, False, False)[0]  # type: ignore[no-any-return]


REJECTED: tuple[Rejected, ...] = (
    Rejected("gru", "has_constant_weights", "", of(_computed_weights),
             ((STEPS, BATCH, INPUTS), (1, BATCH, HIDDEN), (3 * HIDDEN, INPUTS), (3 * HIDDEN, HIDDEN))),
)  # fmt: skip
