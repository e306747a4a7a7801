"""The exported program of a converted module, made without a trace, is the one that torch.export makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.flow_support import seeded
from tests.oracle import Function
from torch import Tensor, nn
from torch.fx import Node

from openneutron import QuantizedModel, flow, lower, quantize
from openneutron.core.evaluation import infer_meta
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


class Mask(nn.Module):
    """The buffer `mask` is lifted to `b_mask`, which is also the name of an input."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 2.0, 0.0]))

    def forward(self, x: Tensor, b_mask: Tensor) -> Tensor:
        return x * self.mask + b_mask


class Nested(nn.Module):
    """Two constants whose names differ in the place of a dot only: `a.b_c` and `a_b.c`."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ParameterDict({"b_c": torch.tensor([1.0, 2.0, 3.0, 4.0])})
        self.a_b = nn.ParameterDict({"c": torch.tensor([5.0, 6.0, 7.0, 8.0])})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x * self.a["b_c"] + self.a_b["c"]
        return y


class Builtin(nn.Module):
    """An input has the name of a function of Python, and an operator has the same name."""

    def forward(self, sum: Tensor) -> Tensor:
        return sum.sum(1, keepdim=True) + sum


class BatchStatistics(nn.Module):
    """A batch norm that writes its running statistics, which the operator's schema does not tell."""

    def __init__(self, norm: Callable[..., Tensor], **options: bool) -> None:
        super().__init__()
        self.norm, self.options = norm, options
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, self.mean, self.var, **self.options)


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
def test_the_program_equals_the_one_of_torch_export(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_lower_traces_only_modules_that_cannot_be_lifted(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_only_graph_modules_are_lifted() -> None:
    assert lifted_program(nn.Linear(4, 4), Examples((torch.zeros(4, 4),))) is None


@pytest.mark.parametrize(
    ("build", "count"), [(Mask, 2), (Nested, 1), (Builtin, 1)], ids=["input", "constants", "builtin"]
)
def test_inputs_and_constants_have_names_of_their_own(build: Callable[[], nn.Module], count: int) -> None:
    model, inputs = build().eval(), (IMAGE[0, 0], IMAGE[0, 1])[:count]
    graph, examples = torch.export.export(model, inputs).module(), Examples(inputs)
    lifted, traced = lifted_program(graph, examples), export(graph, examples)
    assert lifted is not None
    names, wanted = ([node.name for node in it.graph.nodes if node.op == "placeholder"] for it in (lifted, traced))
    assert names == wanted
    assert len({node.name for node in lifted.graph.nodes}) == len(lifted.graph.nodes)
    assert torch.allclose(lifted.module()(*inputs), model(*inputs))


@pytest.mark.parametrize(
    ("norm", "options", "is_copied"),
    [
        (nn.functional.batch_norm, {"training": True}, False),
        (nn.functional.batch_norm, {"training": False}, True),
        (nn.functional.instance_norm, {"use_input_stats": True}, False),
        (nn.functional.instance_norm, {"use_input_stats": False}, True),
    ],
)
def test_norms_that_write_statistics_are_left_to_torch_export(
    norm: Callable[..., Tensor], options: dict[str, bool], is_copied: bool
) -> None:
    graph = torch.export.export(BatchStatistics(norm, **options).eval(), (IMAGE,)).module()
    assert (lifted_program(graph, Examples((IMAGE,))) is not None) is is_copied


def test_calls_of_methods_are_left_to_torch_export() -> None:
    graph = torch.export.export(Builtin(), (IMAGE[0, 0],)).module()
    call = next(node for node in graph.graph.nodes if node.op == "call_function")
    call.op, call.target = "call_method", "exp"
    assert lifted_program(graph, Examples((IMAGE[0, 0],))) is None


@pytest.mark.filterwarnings("ignore")
def test_repeated_calls_are_inferred_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def inferences(steps: int) -> int:
        counts.clear()
        model = Function(lambda layer, x: layer(x[:, :steps])[0], nn.GRU(4, 4, batch_first=True)).eval()
        inputs = (torch.ones(1, 32, 4),)
        lower(quantize(model, inputs, [inputs], recover=None))
        return len(counts)

    counts: list[Node] = []
    infer = infer_meta

    def counted(node: Node) -> Any:
        counts.append(node)
        return infer(node)

    monkeypatch.setattr("openneutron.model.lifting.infer_meta", counted)
    few, many = inferences(8), inferences(32)
    assert few > 5
    assert many - few < 2 * 32  # a slice for each step, and the concatenation of the steps
