"""Cell states of LSTMs that a model computes itself get the same ranges as in `nn.LSTM`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.flow_support import seeded
from tests.recovery.test_cell_scales import UNEQUAL, Sample, joined, sqnr
from torch import Tensor, nn
from torch.fx import GraphModule

from openneutron import NeutronQuantizer, lower, quantize
from openneutron.ops.decomposition import RANGE_LIMIT
from openneutron.ops.recurrent import is_cell_state
from openneutron.quantizer.cell_states import cell_layers

STEPS, FEATURES, UNITS = 10, 3, 8


class Cell(nn.Module):
    """An LSTM in a loop of Python, whose units have cell states in proportion to `ranges`."""

    def __init__(self, ranges: Tensor = UNEQUAL) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(FEATURES + UNITS, UNITS) for _ in range(4))
        self.head = nn.Linear(UNITS, 4)
        with torch.no_grad():
            for value in self.gates[2].parameters():
                value.mul_(ranges.reshape(UNITS, *[1] * (value.dim() - 1)))
            for gate in self.gates[:2]:
                gate.bias.add_(1.5)  # type: ignore[operator]
            self.head.weight /= ranges.clamp(max=1)

    def initial(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), UNITS)

    def products(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        joint = torch.cat([x, hidden], 1)
        return tuple(gate(joint) for gate in self.gates)

    def step(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = self.products(x, hidden)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(cell), cell

    def forward(self, x: Tensor) -> Any:
        hidden, cell = torch.zeros(len(x), UNITS), self.initial(x)
        for value in x.unbind(1):
            hidden, cell = self.step(value, hidden, cell)
        return self.head(hidden)


class OneProduct(Cell):
    """All gates are parts of one linear of input and state."""

    def products(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        weight, bias = (torch.cat([getattr(gate, name) for gate in self.gates]) for name in ("weight", "bias"))
        return nn.functional.linear(torch.cat([x, hidden], 1), weight, bias).chunk(4, 1)


class TwoProducts(Cell):
    """Input and state have linears of their own."""

    def products(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            nn.functional.linear(x, gate.weight[:, :FEATURES], gate.bias)  # type: ignore[index, arg-type]
            + nn.functional.linear(hidden, gate.weight[:, FEATURES:])  # type: ignore[index]
            for gate in self.gates
        )


class StateFirst(Cell):
    """The operands of sums and products are in the other order."""

    def step(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = self.products(x, hidden)
        cell = torch.tanh(g) * torch.sigmoid(i) + cell * torch.sigmoid(f)
        return torch.tanh(cell) * torch.sigmoid(o), cell


class Coupled(Cell):
    """The forget gate is one minus the input gate."""

    def step(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        i, _, g, o = self.products(x, hidden)
        i = torch.sigmoid(i - 3)
        cell = (1 - i) * cell + i * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(cell), cell


class LearnedState(Cell):
    """The first cell state is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, UNITS) * 0.05)

    def initial(self, x: Tensor) -> Tensor:
        return self.first.expand(len(x), UNITS)


class Peephole(Cell):
    """The gates also read the cell state."""

    def __init__(self) -> None:
        super().__init__()
        self.peeps = nn.Parameter(torch.randn(3, UNITS) * 0.3)

    def step(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = self.products(x, hidden)
        i, f = torch.sigmoid(i + self.peeps[0] * cell), torch.sigmoid(f + self.peeps[1] * cell)
        cell = f * cell + i * torch.tanh(g)
        return torch.sigmoid(o + self.peeps[2] * cell) * torch.tanh(cell), cell


class TorchCell(Cell):
    """A `nn.LSTMCell` in a loop of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(FEATURES, UNITS)
        weights = [gate.weight.detach() for gate in self.gates]  # type: ignore[operator]
        self.cell.weight_ih.data = torch.cat([weight[:, :FEATURES] for weight in weights])
        self.cell.weight_hh.data = torch.cat([weight[:, FEATURES:] for weight in weights])
        self.cell.bias_ih.data = torch.cat([gate.bias.detach() for gate in self.gates])  # type: ignore[operator]
        self.cell.bias_hh.data.zero_()

    def step(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        hidden, cell = self.cell(x, (hidden, cell))
        return hidden, cell


class LastCell(Cell):
    """Also returns the last cell state."""

    def forward(self, x: Tensor) -> Any:
        hidden, cell = torch.zeros(len(x), UNITS), self.initial(x)
        for value in x.unbind(1):
            hidden, cell = self.step(value, hidden, cell)
        return self.head(hidden), cell


class MinimalGatedUnit(Cell):
    """No tanh reads the state itself."""

    def step(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        _, f, g, _ = self.products(x, hidden)
        hidden = (1 - torch.sigmoid(f)) * hidden + torch.sigmoid(f) * torch.tanh(g)
        return hidden, cell


class OneStep(Cell):
    """A single step, whose states are inputs and outputs of the program."""

    def forward(self, x: Tensor) -> Any:
        return self.step(x[:, 0], x[:, 1, :1].expand(len(x), UNITS), x[:, 2, :1].expand(len(x), UNITS))


class UnboundedGate(Cell):
    """The factor of the state is not a sigmoid."""

    def step(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = self.products(x, hidden)
        cell = torch.relu(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(cell), cell


LIMITED = [Cell, OneProduct, TwoProducts, StateFirst, Coupled, LearnedState, TorchCell]
UNLIMITED = [Peephole, LastCell]
OTHERS = [MinimalGatedUnit, OneStep, UnboundedGate]


def samples_of(count: int = 24, seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(1, STEPS, FEATURES, generator=generator),) for _ in range(count)]


def float_graph(model: nn.Module) -> GraphModule:
    return NeutronQuantizer().transform_for_annotation(torch.export.export(model, samples_of(1)[0]).module())


@pytest.mark.parametrize("build", LIMITED)
def test_cell_states_are_noted_and_limited(build: Callable[[], nn.Module]) -> None:
    model = seeded(build).eval()
    graph = float_graph(model)
    (layer,) = cell_layers(graph).values()
    cells = [node for node in graph.graph.nodes if is_cell_state(node)]
    assert len(cells) == STEPS
    assert all(RANGE_LIMIT.read(cell).has_limit for cell in cells)
    assert layer.is_connected
    assert layer.is_limited
    for sample in samples_of(4):
        assert torch.allclose(joined(graph, [sample]), joined(model, [sample]), atol=1e-5)


@pytest.mark.parametrize("build", UNLIMITED)
def test_cell_states_with_other_readers_get_no_limit(build: Callable[[], nn.Module]) -> None:
    graph = float_graph(seeded(build).eval())
    (layer,) = cell_layers(graph).values()
    assert len(layer.cells) == STEPS
    assert not layer.is_limited


@pytest.mark.parametrize("build", OTHERS)
def test_other_states_are_not_noted(build: Callable[[], nn.Module]) -> None:
    assert not any(map(is_cell_state, float_graph(seeded(build).eval()).graph.nodes))


def test_cell_states_in_float_are_not_noted() -> None:
    exported = torch.export.export(seeded(Cell).eval(), samples_of(1)[0]).module()
    graph = NeutronQuantizer(layers={"aten.add.Tensor": "float"}).transform_for_annotation(exported)
    assert not any(map(is_cell_state, graph.graph.nodes))


@pytest.mark.parametrize("build", [Cell, OneProduct, LearnedState, TorchCell])
@pytest.mark.parametrize("recover", [None, "fast"])
def test_units_get_their_ranges(
    build: Callable[[], nn.Module], recover: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples, tests = seeded(build).eval(), samples_of(), samples_of(16, seed=1)
    with torch.no_grad():
        wanted = joined(model, tests)
    monkeypatch.setattr("openneutron.quantizer.cell_errors.WORTHWHILE", 1.0)
    quantized = quantize(model, samples[0], samples, recover=recover, progress=False)
    assert sum(node.name.endswith("_times_range") for node in quantized.module.graph.nodes) >= STEPS - 1
    program = lower(quantized)
    assert {row.where for row in program.placement} == {"npu"}
    assert sqnr(joined(quantized, tests[:4]), joined(program.run, tests[:4])) > 25
    assert quantized.reference is not None
    assert torch.allclose(joined(quantized.reference, tests), wanted, atol=1e-4)
