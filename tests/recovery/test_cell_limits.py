"""Recipes select the limits of cell states by the error of the hidden states."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.flow_support import seeded
from tests.oracle import Function
from torch import Tensor, nn
from torch.fx import GraphModule

from openneutron import NeutronQuantizer, quantize
from openneutron.ops.decomposition import RANGE_LIMIT
from openneutron.ops.recurrent import CELL_LIMIT, is_cell_state
from openneutron.quantizer.cell_errors import LIMITS
from openneutron.recovery.cell_limits import select_cell_limits

STEPS, FEATURES, UNITS = 12, 3, 4
GATES, CANDIDATE = [0, 1, 3], 2


class Network(nn.Module):
    """An LSTM whose candidate is multiplied by `scale` and whose gates get `bias`: open gates sum up the inputs."""

    def __init__(self, scale: float, bias: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, UNITS, batch_first=True)
        values = {name: value.detach() for name, value in self.lstm.named_parameters()}
        values["bias_ih_l0"].view(4, UNITS)[GATES] += bias
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            values[name].view(4, UNITS, -1)[CANDIDATE] *= scale

    def forward(self, x: Tensor) -> Any:
        return self.lstm(x)[0]


class LastCell(Network):
    """Also returns the last cell state."""

    def forward(self, x: Tensor) -> Any:
        output, (_, cell) = self.lstm(x)
        return output, cell


def samples_of(count: int = 8) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(1, STEPS, FEATURES, generator=generator),) for _ in range(count)]


def limits_of(module: GraphModule) -> set[float]:
    return {RANGE_LIMIT.read(node).high for node in module.graph.nodes if RANGE_LIMIT.read(node).has_limit}


def selected(model: nn.Module, samples: list[tuple[Tensor]]) -> GraphModule:
    """Returns the prepared float graph with its selected limits."""
    exported = torch.export.export(model, samples[0]).module()
    graph = NeutronQuantizer().prepare_graph(exported, equalizes=False)
    select_cell_limits(graph, samples)
    return graph


MODELS: dict[str, tuple[Callable[[], nn.Module], set[float]]] = {
    "small states": (lambda: Network(0.05, 0.0), {LIMITS[0]}),
    "last cell state is read": (lambda: LastCell(0.05, 0.0), set()),
    "no LSTM": (lambda: Function(torch.tanh), set()),
}


@pytest.mark.parametrize("name", MODELS)
def test_limits(name: str) -> None:
    build, limits = MODELS[name]
    assert limits_of(selected(seeded(build), samples_of())) == limits


def test_large_states_have_a_large_limit() -> None:
    """States beyond 1 need a range beyond 1."""
    (limit,) = limits_of(selected(seeded(lambda: Network(8.0, 4.0)), samples_of()))
    assert limit > LIMITS[0]


def test_replay_is_the_recursion_of_the_cell() -> None:
    """The selected limit has the least error of the hidden states, computed here with the gates of torch's cell."""
    model, samples = seeded(lambda: Network(3.0, 1.0)), samples_of()
    graph = selected(model, samples)
    assert isinstance(model, Network)
    errors = {limit: sum(_error(model.lstm, x[0], limit) for (x,) in samples) for limit in LIMITS}
    assert limits_of(graph) == {min(errors, key=lambda limit: errors[limit])}


@torch.no_grad()
def _error(lstm: nn.LSTM, steps: Tensor, limit: float) -> float:
    def rounded(value: Tensor) -> Tensor:
        return (torch.round(value * 127.5 / limit) * limit / 127.5).clamp(-limit, limit)

    hidden, exact, cell, total = torch.zeros(UNITS), torch.zeros(UNITS), torch.zeros(UNITS), 0.0
    for number, x in enumerate(steps):
        weights = (getattr(lstm, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        of_input, of_state, *biases = weights
        sums = of_input @ x + of_state @ hidden + biases[0] + biases[1]
        input_gate, forget_gate, candidate, output_gate = sums.chunk(4)
        written, forget_gate = input_gate.sigmoid() * candidate.tanh(), forget_gate.sigmoid()
        exact = forget_gate * exact + written
        cell = rounded(rounded(forget_gate * rounded(cell)) + written) if number else exact
        hidden = output_gate.sigmoid() * exact.tanh()
        if number:
            total += float((output_gate.sigmoid() * cell.tanh() - hidden).square().sum())
    return total


@pytest.mark.parametrize(("recover", "limit"), [("auto", LIMITS[0]), ("fast", LIMITS[0]), (None, CELL_LIMIT)])
def test_recipes_select_the_limit(recover: str | None, limit: float) -> None:
    samples = samples_of()
    quantized = quantize(seeded(lambda: Network(0.05, 0.0)), samples[0], samples, recover=recover, progress=False)
    assert quantized.reference is not None
    cells = [node for node in quantized.reference.graph.nodes if is_cell_state(node)]
    assert {RANGE_LIMIT.read(node).high for node in cells if RANGE_LIMIT.read(node).has_limit} == {limit}


class ReadsInitialCell(nn.Module):
    """The model computes with the initial cell state itself, whose values exceed the limit of cell states."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, UNITS, batch_first=True)
        self.head = nn.Linear(UNITS, 2)

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor) -> Any:
        return self.lstm(x, (hidden, cell))[0], self.head(cell[0])


@pytest.mark.parametrize("recover", [None, "auto"])
def test_values_that_other_operators_read_have_no_limit(recover: str | None) -> None:
    generator = torch.Generator().manual_seed(0)
    state = (1, 1, UNITS)
    samples = [
        (*sample, torch.randn(state, generator=generator), 4 * torch.randn(state, generator=generator))
        for sample in samples_of(16)
    ]
    model = seeded(ReadsInitialCell).eval()
    quantized = quantize(model, samples[0], samples, recover=recover, progress=False)
    with torch.no_grad():
        wanted = torch.cat([model(*sample)[1] for sample in samples])
    given = torch.cat([quantized(*sample)[1] for sample in samples])
    assert 10 * math.log10(float(wanted.square().sum() / (given - wanted).square().sum())) > 20
