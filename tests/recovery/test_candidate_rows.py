"""Rows of the weights of LSTM candidates with factors of their own: equal outputs in float, and less error in int8."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.flow_support import seeded
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from openneutron import NeutronQuantizer, lower, quantize
from openneutron.accuracy.analyze import analyze
from openneutron.core.fx import arguments
from openneutron.ops.declared import layer_kind
from openneutron.ops.decomposition import RANGE_LIMIT
from openneutron.recovery import candidate_rows
from openneutron.recovery.candidate_limits import select_candidate_limits
from openneutron.recovery.candidate_rows import scale_candidate_rows
from openneutron.recovery.candidates import limit_candidate, lstm_candidates
from openneutron.recovery.recipes import Recipe

STEPS, FEATURES, UNITS = 10, 5, 16
CANDIDATE = 2
UNEQUAL = torch.full((UNITS,), 0.1).index_fill(0, torch.tensor(3), 1.0)
UNTRAINED = Recipe(range_by="mse", trains_recurrent_layers=False)
LINEAR: Any = nn.functional.linear


class Network(nn.Module):
    """An LSTM whose candidate has rows with the magnitudes `rows` [units]. A head reads all units alike."""

    lstm: Any
    head: Any

    def __init__(self, rows: Tensor, **options: Any) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, UNITS, batch_first=True, **options)
        self.head = nn.Linear(UNITS * (2 if options.get("bidirectional") else 1), 4)
        with torch.no_grad():
            for name, value in self.lstm.named_parameters():
                value.view(4, UNITS, -1)[CANDIDATE].mul_(4 * rows[:, None] if name.startswith("weight") else 0.5)
            self.head.weight[:, :UNITS] /= rows

    def forward(self, x: Tensor) -> Any:
        return self.head(self.lstm(x)[0][:, -1])


class Steps(Network):
    """The same LSTM in a loop of Python, with linears for each gate."""

    def forward(self, x: Tensor) -> Any:
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        gates = list(zip(*(getattr(self.lstm, name).chunk(4) for name in names), strict=True))
        hidden = cell = torch.zeros(len(x), UNITS)
        for value in x.unbind(1):
            i, f, g, o = (LINEAR(value, w, a) + LINEAR(hidden, u, b) for w, u, a, b in gates)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            hidden = torch.sigmoid(o) * torch.tanh(cell)
        return self.head(hidden)


class JoinedInputs(Network):
    """The same LSTM in a loop of Python, with one linear over input and state for each gate."""

    def forward(self, x: Tensor) -> Any:
        lstm = self.lstm
        weights = torch.cat([lstm.weight_ih_l0, lstm.weight_hh_l0], 1).chunk(4)
        biases = (lstm.bias_ih_l0 + lstm.bias_hh_l0).chunk(4)
        hidden = cell = torch.zeros(len(x), UNITS)
        for value in x.unbind(1):
            both = torch.cat([value, hidden], 1)
            i, f, g, o = (LINEAR(both, weight, bias) for weight, bias in zip(weights, biases, strict=True))
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            hidden = torch.sigmoid(o) * torch.tanh(cell)
        return self.head(hidden)


class JoinedGates(Network):
    """The same LSTM in a loop of Python, with one linear for all gates."""

    def forward(self, x: Tensor) -> Any:
        lstm = self.lstm
        hidden = cell = torch.zeros(len(x), UNITS)
        for value in x.unbind(1):
            total = LINEAR(value, lstm.weight_ih_l0, lstm.bias_ih_l0) + LINEAR(hidden, lstm.weight_hh_l0)
            i, f, g, o = total.chunk(4, 1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            hidden = torch.sigmoid(o) * torch.tanh(cell)
        return self.head(hidden)


class NoRows(Network):
    """An LSTM whose candidate does not read the state."""

    def __init__(self) -> None:
        super().__init__(UNEQUAL)
        with torch.no_grad():
            self.lstm.weight_hh_l0.view(4, UNITS, -1)[CANDIDATE] = 0


class WithoutLSTM(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.tanh(x)


def samples_of(count: int = 24, seed: int = 0) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(1, STEPS, FEATURES, generator=generator) / 2,) for _ in range(count)]


def scaled(model: nn.Module, *, limits: bool = True) -> GraphModule:
    """Returns the float graph with the limits of the candidates and the factors of their rows."""
    samples = samples_of()
    graph = NeutronQuantizer().prepare_graph(torch.export.export(model, samples[0]).module(), equalizes=False)
    if limits:
        select_candidate_limits(graph, samples)
    scale_candidate_rows(graph)
    return graph


def divided_sums(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if node.name.endswith("_by_row_factors")]


def weights_of(module: GraphModule) -> set[str]:
    return {str(arguments(node)["weight"].target) for node in module.graph.nodes if layer_kind(node) is not None}


SCALED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "LSTM": (lambda: Network(UNEQUAL), STEPS),
    "both directions": (lambda: Network(UNEQUAL, bidirectional=True), 2 * STEPS),
    "without biases": (lambda: Network(UNEQUAL, bias=False), STEPS),
    "loop": (lambda: Steps(UNEQUAL), STEPS - 1),
    "one linear over input and state": (lambda: JoinedInputs(UNEQUAL), STEPS),
}
UNCHANGED: dict[str, Callable[[], nn.Module]] = {
    "equal rows": lambda: Network(torch.ones(UNITS)),
    "one linear for all gates": lambda: JoinedGates(UNEQUAL),
    "rows of zeros": NoRows,
    "no LSTM": WithoutLSTM,
}


@pytest.mark.parametrize("name", SCALED)
def test_outputs_do_not_change(name: str) -> None:
    build, count = SCALED[name]
    model = seeded(build).eval()
    graph = scaled(model)
    assert len(divided_sums(graph)) == count
    for sample in samples_of(8, seed=1):
        assert torch.allclose(graph(*sample), model(*sample), atol=1e-5)


@pytest.mark.parametrize("name", UNCHANGED)
def test_other_candidates_keep_their_rows(name: str) -> None:
    assert divided_sums(scaled(seeded(UNCHANGED[name]).eval())) == []


def test_candidates_without_a_limit_keep_their_rows() -> None:
    assert divided_sums(scaled(seeded(SCALED["LSTM"][0]).eval(), limits=False)) == []


def test_rows_of_the_weights_have_similar_ranges() -> None:
    module = scaled(seeded(SCALED["LSTM"][0]).eval())
    total = divided_sums(module)[-1].all_input_nodes[0]
    state_product = total.all_input_nodes[1]
    rows = module.get_buffer(str(arguments(state_product)["weight"].target)).abs().amax(1)
    assert float(rows.max() / rows.min()) < 6  # 16 before, and a factor of 4


@pytest.mark.parametrize("name", SCALED)
def test_steps_share_the_scaled_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(SCALED[name][0]).eval()
    found = weights_of(scaled(model))
    monkeypatch.setattr(candidate_rows, "WORTHWHILE", 0.0)
    assert len(found) == len(weights_of(scaled(model)))


def test_the_limit_of_the_sum_grows_with_the_factor() -> None:
    model, samples = seeded(SCALED["LSTM"][0]).eval(), samples_of()
    graph = NeutronQuantizer().prepare_graph(torch.export.export(model, samples[0]).module(), equalizes=False)
    for candidate in lstm_candidates(graph):
        limit_candidate(candidate, 0.5)
    scale_candidate_rows(graph)
    for product in divided_sums(graph):
        assert RANGE_LIMIT.read(product).high == 0.5
        assert RANGE_LIMIT.read(product.all_input_nodes[0]).high == 0.5 * 2**candidate_rows.MOST_DOUBLINGS


def test_weights_with_a_scale_for_each_row_are_not_scaled() -> None:
    model, samples = seeded(SCALED["LSTM"][0]).eval(), samples_of()
    for granularity, count in (("per_tensor", STEPS), ("per_channel", 0)):
        quantized = quantize(model, samples[0], samples, recover="fast", weight_granularity=granularity, progress=False)
        assert len(divided_sums(quantized.module)) == count


def sqnr(wanted: Tensor, found: Tensor) -> float:
    return 10 * math.log10(float(wanted.square().sum() / (found - wanted).square().sum()))


@pytest.mark.parametrize("name", ["LSTM", "loop"])
def test_recipes_lose_less(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = seeded(SCALED[name][0]).eval(), samples_of()
    tests = [x for (x,) in samples_of(16, seed=1)]
    with torch.no_grad():
        wanted = torch.cat([model(x) for x in tests])

    def measured() -> tuple[float, Any]:
        quantized = quantize(model, samples[0], samples, recover=UNTRAINED, weight_bits=4, progress=False)
        return sqnr(wanted, torch.cat([quantized(x) for x in tests])), quantized

    with_factors, quantized = measured()
    program = lower(quantized)
    assert {row.where for row in program.placement} == {"npu"}
    assert sqnr(torch.cat([quantized(x) for x in tests]), torch.cat([program.run(x) for x in tests])) > 30
    monkeypatch.setattr(candidate_rows, "WORTHWHILE", 0.0)
    assert with_factors > measured()[0] + 1


def test_analysis_of_the_documented_flow_scales_the_float_graph() -> None:
    """Each layer of the converted module is compared with a layer of the float graph that has the same factors."""
    model, samples = seeded(SCALED["LSTM"][0]).eval(), samples_of()
    prepared = prepare_pt2e(torch.export.export(model, samples[0]).module(), NeutronQuantizer())
    for sample in samples:
        prepared(*sample)
    converted: Any = convert_pt2e(prepared)
    assert len(divided_sums(converted)) == STEPS
    found = analyze(model, converted, samples[:4])
    assert min(layer.sqnr_db for layer in found.layers) > 15
