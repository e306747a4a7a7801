"""Recipes select the limits of LSTM candidates by the error of the hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.flow_support import seeded
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from openneutron import NeutronQuantizer, quantize
from openneutron.core.fx import arguments, first_operand
from openneutron.ops.declared import is_op
from openneutron.ops.decomposition import RANGE_LIMIT
from openneutron.ops.recurrent import CELL_LIMIT
from openneutron.recovery.candidate_limits import LIMITS, select_candidate_limits

STEPS, FEATURES, UNITS = 12, 3, 8
FORGET, CANDIDATE = 1, 2


class Network(nn.Module):
    """An LSTM that hardly forgets. Its candidate has weights for the input that are multiplied by `scale`."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, UNITS, batch_first=True)
        values = {name: value.detach() for name, value in self.lstm.named_parameters()}
        values["weight_ih_l0"].view(4, UNITS, -1)[CANDIDATE] *= scale
        values["bias_ih_l0"].view(4, UNITS)[FORGET] += 4
        for name in ("bias_ih_l0", "bias_hh_l0"):
            values[name].view(4, UNITS)[CANDIDATE] = 0

    def forward(self, x: Tensor) -> Any:
        return self.lstm(x)[0]


class Steps(Network):
    """The same network with linears in a loop of Python."""

    def forward(self, x: Tensor) -> Any:
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        gates = list(zip(*(getattr(self.lstm, name).chunk(4) for name in names), strict=True))
        hidden = cell = torch.zeros(len(x), UNITS)
        found = []
        for value in x.unbind(1):
            linear = nn.functional.linear
            i, f, g, o = (linear(value, w, a) + linear(hidden, u, b) for w, u, a, b in gates)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            hidden = torch.sigmoid(o) * torch.tanh(cell)
            found.append(hidden)
        return torch.stack(found, 1)


class Joined(Network):
    """The same network with one product of the input for all gates, and one of the hidden state."""

    splits_sum = False

    def forward(self, x: Tensor) -> Any:
        linear: Any = nn.functional.linear
        cell = self.lstm
        hidden = state = torch.zeros(len(x), UNITS)
        found = []
        for value in x.unbind(1):
            own = linear(value, cell.weight_ih_l0, cell.bias_ih_l0)
            fed_back = linear(hidden, cell.weight_hh_l0, cell.bias_hh_l0)
            if self.splits_sum:
                i, f, g, o = (own + fed_back).chunk(4, 1)
            else:
                i, f, g, o = (a + b for a, b in zip(own.chunk(4, 1), fed_back.chunk(4, 1), strict=True))
            state = torch.sigmoid(f) * state + torch.sigmoid(i) * torch.tanh(g)
            hidden = torch.sigmoid(o) * torch.tanh(state)
            found.append(hidden)
        return torch.stack(found, 1)


class SplitSum(Joined):
    """`Joined` with one sum for all gates."""

    splits_sum = True


class WithoutLSTM(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.tanh(x)


def samples_of(rare: float, count: int = 16) -> list[tuple[Tensor]]:
    """Returns inputs near 0.02, of which one in 200 has a magnitude of about `rare`."""
    generator = torch.Generator().manual_seed(0)
    shape = count, 1, STEPS, FEATURES
    values = torch.randn(shape, generator=generator)
    large = torch.rand(shape, generator=generator) < 1 / 200
    return [(sample,) for sample in torch.where(large, rare * values, 0.02 + 0.01 * values)]


def limits_of(module: GraphModule) -> set[float]:
    """Returns the limits of the operands of tanhs that sums of candidates and their operands have."""
    sums = [node.all_input_nodes[0] for node in module.graph.nodes if is_op(node, "tanh")]
    read = [operand for total in sums for operand in (total, *_operands(total))]
    return {RANGE_LIMIT.read(node).high for node in read if RANGE_LIMIT.read(node).has_limit}


def _operands(total: Node) -> list[Node]:
    return total.all_input_nodes if is_op(total, "add") else []


def selected(model: nn.Module, samples: list[tuple[Tensor]]) -> GraphModule:
    graph = NeutronQuantizer().prepare_graph(torch.export.export(model, samples[0]).module(), equalizes=False)
    select_candidate_limits(graph, samples)
    return graph


CASES: dict[str, tuple[Callable[[], nn.Module], float, bool]] = {
    "rare large values": (lambda: Network(4.0), 3.0, True),
    "rare large values, in a loop": (lambda: Steps(4.0), 3.0, True),
    "large values": (lambda: Network(30.0), 30.0, False),
    "no LSTM": (WithoutLSTM, 3.0, False),
}


@pytest.mark.parametrize("name", CASES)
def test_limits(name: str) -> None:
    build, rare, is_limited = CASES[name]
    found = limits_of(selected(seeded(build).eval(), samples_of(rare))) - {CELL_LIMIT}
    assert bool(found) == is_limited
    assert found <= set(LIMITS[:-1])


@pytest.mark.parametrize("build", [lambda: Network(4.0), lambda: Steps(4.0)], ids=["LSTM", "loop"])
def test_replay_is_the_recursion_of_the_cell(build: Callable[[], Network]) -> None:
    """The selected limit has the least error of the hidden states, computed here with the gates of torch's cell."""
    model, samples = seeded(build), samples_of(3.0)
    assert isinstance(model, Network)
    errors = {limit: sum(_error(model.lstm, x[0], limit) for (x,) in samples) for limit in LIMITS}
    assert limits_of(selected(model.eval(), samples)) - {CELL_LIMIT} == {min(errors, key=lambda limit: errors[limit])}


@torch.no_grad()
def _error(lstm: nn.LSTM, steps: Tensor, limit: float) -> float:
    def rounded(value: Tensor) -> Tensor:
        return (torch.round(value * 127.5 / limit) * limit / 127.5).clamp(-limit, limit)

    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    of_input, of_state, *biases = (getattr(lstm, name) for name in names)
    hidden, exact, cell, total = torch.zeros(UNITS), torch.zeros(UNITS), torch.zeros(UNITS), 0.0
    for number, x in enumerate(steps):
        products = [of_input @ x + biases[0] + biases[1], of_state @ hidden]
        input_gate, forget_gate, candidate, output_gate = (products[0] + products[1]).chunk(4)
        of_candidate = [product.chunk(4)[CANDIDATE] for product in products]
        found = rounded(rounded(of_candidate[0]) + rounded(of_candidate[1])) if number else candidate
        exact = forget_gate.sigmoid() * exact + input_gate.sigmoid() * candidate.tanh()
        cell = forget_gate.sigmoid() * cell + input_gate.sigmoid() * found.tanh()
        hidden = output_gate.sigmoid() * exact.tanh()
        total += float((output_gate.sigmoid() * cell.tanh() - hidden).square().sum()) if number else 0.0
    return total


def test_recipes_limit_the_range() -> None:
    """The int8 range of the sums of the candidate ends at the limit in the converted module."""
    model, samples = seeded(lambda: Network(4.0)).eval(), samples_of(3.0)
    (limit,) = limits_of(selected(model, samples)) - {CELL_LIMIT}
    quantized = quantize(model, samples[0], samples, progress=False).module
    found = []
    for node in quantized.graph.nodes:
        if is_op(node, "tanh") and is_op(first_operand(first_operand(first_operand(node))), "add"):
            args = arguments(first_operand(first_operand(node)))
            found.append(args["scale"] * (args["quant_max"] - args["zero_point"]))
    assert min(found) <= limit * 1.01


@pytest.mark.parametrize("network", [Joined, SplitSum])
def test_a_limit_that_would_clip_the_gates_is_not_set(network: type[Network]) -> None:
    module = selected(seeded(lambda: network(4.0)), samples_of(3.0))
    assert limits_of(module) - {CELL_LIMIT} == set()
