"""The exported program of a converted module, made without a trace, is the one that torch.export makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.flow_support import seeded
from torch import Tensor, nn

from openneutron import QuantizedModel, flow, lower, quantize
from openneutron.core.fx import arguments, op_name
from openneutron.model.examples import Examples
from openneutron.model.exporting import export
from openneutron.model.lifting import lifted_program


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.lstm(x)[0][:, -1])
        return scores


class Branches(nn.Module):
    """Takes a keyword argument, computes on the CPU, and returns a dict with one value twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.register_buffer("offset", torch.linspace(0, 1, 4).reshape(1, 4, 1, 1))

    def forward(self, input: Tensor, *, other: Tensor) -> dict[str, Tensor]:
        y = self.conv(input) + self.offset
        first, second = torch.split(y.transpose(1, 2), 2, 1)
        return {"first": first.sin(), "again": first.sin(), "rest": second + other, "y": y}


class Stateful(nn.Module):
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("last", torch.zeros(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) + self.last
        self.last.copy_(y)
        return y


IMAGE = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "linear": (lambda: nn.Linear(4, 4), (IMAGE[0, 0],)),
    "image": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()), (IMAGE,)),
    "channels-last": (lambda: nn.Conv2d(4, 8, 3), (IMAGE.to(memory_format=torch.channels_last),)),
    "recurrent": (Recurrent, (IMAGE[:, 0],)),
    "branches": (Branches, {"input": IMAGE, "other": IMAGE[:, :, :2].transpose(1, 2).contiguous()}),
}


def quantized(name: str) -> QuantizedModel:
    build, inputs = MODELS[name]
    return quantize(seeded(build).eval(), inputs, [inputs], recover=None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_the_program_is_the_one_that_torch_export_makes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(name)
    lifted, traced = lifted_program(model.module, model.examples), export(model.module, model.examples)
    assert lifted is not None
    calls, expected = ([n for n in it.graph.nodes if n.op == "call_function"] for it in (lifted, traced))
    assert [(n.name, op_name(n)) for n in calls] == [(n.name, op_name(n)) for n in expected]
    for node, other in zip(calls, expected, strict=True):
        values = [it.meta["val"] for it in (node, other)]
        forms = [
            [(leaf.shape, leaf.dtype, leaf.stride()) for leaf in torch.utils._pytree.tree_leaves(value)]
            for value in values
        ]
        assert forms[0] == forms[1], node.name
        assert len(arguments(node)) == len(arguments(other))
    program = lower(model)
    monkeypatch.setattr(flow, "lifted_program", lambda *_: None)
    assert lower(model).buffer == program.buffer


def test_lower_traces_only_what_cannot_be_lifted(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = 0
    torchs_export = torch.export.export

    def counted(*args: Any, **named: Any) -> torch.export.ExportedProgram:
        nonlocal traced
        traced += 1
        return torchs_export(*args, **named)

    inputs = (torch.randn(1, 4),)
    models = [quantized("linear"), quantize(Stateful().eval(), inputs, [inputs], recover=None)]
    monkeypatch.setattr(torch.export, "export", counted)
    lower(models[0])
    assert traced == 0
    lower(models[1])
    assert traced == 1


@pytest.mark.parametrize(
    "examples",
    [
        pytest.param(Examples((torch.zeros(3, 4),)), id="shape"),
        pytest.param(Examples((torch.zeros(4, 4, dtype=torch.float64),)), id="dtype"),
        pytest.param(Examples((torch.zeros(4, 4),), {"more": None}), id="structure"),
    ],
)
def test_other_inputs_are_left_to_torch_export(examples: Examples) -> None:
    assert lifted_program(quantized("linear").module, examples) is None


def test_a_module_that_is_no_graph_is_left_to_torch_export() -> None:
    assert lifted_program(nn.Linear(4, 4), Examples((torch.zeros(4, 4),))) is None
