"""Units of a cell state with separate ranges: the same outputs in float, and less error in int8."""

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
from torch.utils._pytree import tree_leaves

from openneutron import NeutronQuantizer, lower, quantize
from openneutron.accuracy.analyze import analyze
from openneutron.core.fx import op_name
from openneutron.quantizer import cell_errors
from openneutron.quantizer.cell_states import is_scaled_cell
from openneutron.recovery import recover_exported
from openneutron.recovery.cell_limits import select_cell_limits
from openneutron.training.recurrent_layers import FEWEST_SAMPLES

STEPS, FEATURES, UNITS = 12, 3, 8
CANDIDATE = 2
UNEQUAL = torch.tensor([8.0, 4.0, 0.5, 0.2, 0.1, 0.05, 0.03, 0.02])
Sample = tuple[Tensor, ...]


class Network(nn.Module):
    """A layer whose units have cell states in proportion to `ranges` [units], and a head that reads all units alike."""

    def __init__(self, ranges: Tensor, layers: int = 1, **options: Any) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, UNITS, layers, batch_first=True, **options)
        self.head = nn.Linear(UNITS * (2 if options.get("bidirectional") else 1), 4)
        with torch.no_grad():
            for name, value in self.lstm.named_parameters():
                value.view(4, UNITS, -1)[CANDIDATE].mul_(ranges[:, None])
                if name.startswith("bias_ih"):
                    value.view(4, UNITS)[:2] += 1.5
            self.head.weight[:, :UNITS] /= ranges.clamp(max=1)

    def forward(self, x: Tensor, *state: Tensor) -> Any:
        return self.head(self.lstm(x, state or None)[0][:, -1])


class FromInitialState(Network):
    """Takes an initial state."""


class FromConstantState(Network):
    """Has a constant initial state, which is part of the model."""

    cell: Tensor

    def __init__(self, ranges: Tensor, layers: int = 1, **options: Any) -> None:
        super().__init__(ranges, layers, **options)
        count = layers * (2 if options.get("bidirectional") else 1)
        self.hidden = nn.Parameter(torch.randn(count, 1, UNITS) * 0.1)
        self.register_buffer("cell", torch.randn(count, 1, UNITS) * 0.02)

    def forward(self, x: Tensor, *_: Tensor) -> Any:
        return super().forward(x, self.hidden, self.cell)


class LastCell(Network):
    """Also returns the last cell state."""

    def forward(self, x: Tensor, *state: Tensor) -> Any:
        output, (_, cell) = self.lstm(x, state or None)
        return self.head(output[:, -1]), cell


class OneByOne(Network):
    """A cell in a loop of Python, which passes its state on in one tensor."""

    def __init__(self, ranges: Tensor) -> None:
        super().__init__(ranges)
        self.cell = nn.LSTMCell(FEATURES, UNITS)

    def forward(self, x: Tensor, *state: Tensor) -> Any:
        hidden = cell = state[0] if state else torch.zeros(len(x), UNITS)
        for step in x.unbind(1):
            hidden, cell = self.cell(step, (hidden, cell))
        return self.head(hidden)


def samples_of(build: Callable[[], nn.Module], count: int = 24, seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    state = (1, 1, UNITS)
    samples: list[Sample] = []
    for _ in range(count):
        x = torch.randn(1, STEPS, FEATURES, generator=generator)
        given = torch.randn(state, generator=generator) * 0.1, torch.randn(state, generator=generator) * 0.02
        samples.append((x, *given) if isinstance(seeded(build), FromInitialState) else (x,))
    return samples


def selected(model: nn.Module, samples: list[Sample], **options: Any) -> GraphModule:
    """Returns the float graph with the selected ranges of cell states."""
    exported = torch.export.export(model, samples[0]).module()
    graph = NeutronQuantizer(**options).prepare_graph(exported, equalizes=False)
    select_cell_limits(graph, samples)
    return graph


def scaled_cells(graph: GraphModule) -> int:
    return sum(map(is_scaled_cell, graph.graph.nodes))


SCALED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "one layer": (lambda: Network(UNEQUAL), STEPS),
    "initial state": (lambda: FromInitialState(UNEQUAL), STEPS + 1),
    "both directions": (lambda: Network(UNEQUAL, bidirectional=True), 2 * STEPS),
    "last cell state is read": (lambda: LastCell(UNEQUAL), STEPS),
    "constant state": (lambda: FromConstantState(UNEQUAL), STEPS),
    "constant state, both directions": (lambda: FromConstantState(UNEQUAL, bidirectional=True), 2 * STEPS),
    "two layers": (lambda: Network(UNEQUAL, 2), 2 * STEPS),
}
UNCHANGED: dict[str, Callable[[], nn.Module]] = {
    "equal ranges": lambda: Network(torch.full((UNITS,), 2.0)),
    "cell": lambda: OneByOne(UNEQUAL),
    "no LSTM": lambda: Function(torch.tanh),
}


@pytest.mark.parametrize("name", SCALED)
def test_outputs_do_not_change(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell_errors, "WORTHWHILE", 1.0)
    monkeypatch.setattr(cell_errors, "NEGLIGIBLE", 0.0)
    build, count = SCALED[name]
    model, samples = seeded(build).eval(), samples_of(build)
    graph = selected(model, samples)
    assert scaled_cells(graph) == count
    for sample in samples:
        for found, wanted in zip(tree_leaves(graph(*sample)), tree_leaves(model(*sample)), strict=True):
            assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("name", UNCHANGED)
def test_other_cell_states_keep_one_range(name: str) -> None:
    model, samples = seeded(UNCHANGED[name]).eval(), samples_of(UNCHANGED[name])
    assert scaled_cells(selected(model, samples)) == 0


def test_wide_cell_states_keep_their_two_tensors() -> None:
    build = SCALED["one layer"][0]
    assert scaled_cells(selected(seeded(build).eval(), samples_of(build), wide=[nn.LSTM])) == 0


@pytest.mark.parametrize("name", ["one layer", "last cell state is read"])
def test_a_second_selection_changes_nothing(name: str) -> None:
    build, count = SCALED[name]
    samples = samples_of(build)
    graph = selected(seeded(build).eval(), samples)
    nodes = len(graph.graph.nodes)
    select_cell_limits(graph, samples)
    assert scaled_cells(graph) == count
    assert len(graph.graph.nodes) == nodes


def sqnr(wanted: Tensor, found: Tensor) -> float:
    return 10 * math.log10(float(wanted.square().sum() / (found - wanted).square().sum()))


def joined(model: Callable[..., Any], samples: list[Sample]) -> Tensor:
    """Returns the first outputs for `samples`."""
    return torch.cat([tree_leaves(model(*sample))[0].reshape(1, -1) for sample in samples])


@pytest.mark.parametrize(
    ("name", "gain"), [("one layer", 0.7), ("initial state", 0.7), ("last cell state is read", 0.1)]
)
@pytest.mark.parametrize("recover", ["fast", "auto"])
def test_recipes_lose_less(name: str, gain: float, recover: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, _ = SCALED[name]
    # Fewer samples than training needs: "auto" would train both models, and this test compares ranges.
    model, samples, tests = seeded(build).eval(), samples_of(build, FEWEST_SAMPLES - 1), samples_of(build, 16, seed=1)
    with torch.no_grad():
        wanted = joined(model, tests)

    def measured() -> tuple[float, Any]:
        quantized = quantize(model, samples[0], samples, recover=recover, progress=False)
        return sqnr(wanted, joined(quantized, tests)), quantized

    with_ranges, quantized = measured()
    program = lower(quantized)
    assert {row.where for row in program.placement} == {"npu"}
    assert sqnr(joined(quantized, tests[:4]), joined(program.run, tests[:4])) > 30
    monkeypatch.setattr(cell_errors, "WORTHWHILE", 0.0)
    assert with_ranges > measured()[0] + gain


def test_documented_flow_with_recovery_as_a_function() -> None:
    build, _ = SCALED["one layer"]
    model, samples = seeded(build).eval(), samples_of(build)
    exported = NeutronQuantizer().transform_for_annotation(torch.export.export(model, samples[0]).module())
    assert scaled_cells(recover_exported(exported, samples)) == STEPS


def test_analysis_does_not_advise_wide_states_for_scaled_ones() -> None:
    build = SCALED["one layer"][0]
    samples = samples_of(build)
    quantized = quantize(seeded(build).eval(), samples[0], samples, recover="fast", progress=False)
    assert any(op_name(node) == "aten.mul.Tensor" for node in quantized.module.graph.nodes)
    assert "wide=" not in str(analyze(None, quantized, samples))
