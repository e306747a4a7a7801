"""Insertion and conversion of observers: the same modules as torchao's, in fewer steps."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.flow_support import seeded
from tests.models import Model, conv
from tests.state_models import Gru
from torch import nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from openneutron import NeutronQuantizer, quantize
from openneutron.quantizer.conversion import convert, insert_observers
from openneutron.quantizer.sum_ranges import AddendObserver

# Metadata that names objects of one conversion, or that torch.fx numbers for each graph.
IDENTITIES = ("from_node", "val", "quantization_annotation")


def recurrent(steps: int) -> nn.Module:
    return Model(
        lambda m, x: m.out(m.net(x[:, :steps])[0][:, -1]), net=nn.LSTM(4, 4, batch_first=True), out=nn.Linear(4, 2)
    )


def image_network() -> nn.Module:
    return Model(lambda m, x: (torch.cat([m.c(x).relu(), x], 1), m.c(x).exp().sin()), c=conv())


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "convolution, shared qparams, float operators, two readers": (image_network, (1, 4, 8, 8), {}),
    "per channel": (image_network, (1, 4, 8, 8), {"weight_granularity": "per_channel"}),
    "without bias correction": (lambda: nn.Linear(4, 4), (1, 4), {"correct_bias": False}),
    "attention with an added mask": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (1, 5, 8), {}),
    "LSTM": (lambda: recurrent(3), (1, 8, 4), {}),
    "a state": (Gru, (1, 6), {}),
}


def prepared_graph(build: Callable[[], nn.Module], shape: tuple[int, ...], quantizer: NeutronQuantizer) -> GraphModule:
    exported = torch.export.export(seeded(build), (torch.ones(shape),)).module()
    assert isinstance(exported, GraphModule)
    return quantizer.prepare_graph(exported, equalizes=True)


def described(module: GraphModule) -> list[tuple[Any, ...]]:
    """Returns what each node of a module is: its name, call, arguments and metadata that does not name objects."""
    return [
        (node.name, node.op, str(node.target), str(node.args), str(node.kwargs),
         {key: str(value) for key, value in node.meta.items() if key not in IDENTITIES})
        for node in module.graph.nodes
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_modules_equal_torchao(name: str) -> None:
    build, shape, options = CASES[name]
    quantizer = NeutronQuantizer(**options).replace(takes_prepared_graphs=True)
    graph = prepared_graph(build, shape, quantizer)
    theirs = prepare_pt2e(copy.deepcopy(graph), quantizer)
    ours = insert_observers(copy.deepcopy(graph), quantizer)
    assert described(ours) == described(theirs)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        inputs = torch.randn(shape, generator=generator)
        with torch.no_grad():
            theirs(inputs)
            ours(inputs)
    theirs, ours = convert_pt2e(theirs), convert(ours)
    assert described(ours) == described(theirs)
    assert ours.code == theirs.code
    assert graph.meta.keys() <= ours.meta.keys() <= theirs.meta.keys()
    values, expected = ours.state_dict(), theirs.state_dict()
    assert list(values) == list(expected)
    assert all(torch.equal(values[key], expected[key]) for key in values)
    with pytest.raises(NotImplementedError):
        ours.eval()


def generations_of_code(monkeypatch: pytest.MonkeyPatch, steps: int) -> int:
    """Returns how often `quantize` generates the code of a module with at least one node for each step."""
    count = 0
    recompile = GraphModule.recompile

    def counted(module: GraphModule) -> Any:
        nonlocal count
        count += len(module.graph.nodes) > steps
        return recompile(module)

    inputs = (torch.ones(1, steps, 4),)
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(GraphModule, "recompile", counted)
        quantize(seeded(lambda: recurrent(steps)), inputs, [inputs], recover=None)
    return count


def test_code_is_generated_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # the exported module, for its signature; the prepared float graph, its copy, and the converted module
    assert 0 < generations_of_code(monkeypatch, 40) <= 4


def test_names_of_observers_skip_names_of_the_model() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.activation_post_process_1 = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.activation_post_process_1(x)  # type: ignore[no-any-return]

    quantizer = NeutronQuantizer().replace(takes_prepared_graphs=True)
    graph = prepared_graph(Named, (1, 4), quantizer)
    prepared = insert_observers(graph, quantizer)
    names = [node.target for node in prepared.graph.nodes if node.op == "call_module" and "process" in str(node.target)]
    assert names
    assert "activation_post_process_1" not in names


def test_ranges_of_addends_are_limited_once_for_each_observer(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: dict[AddendObserver, int] = {}
    limit = AddendObserver._limited_qparams

    def counted(observer: AddendObserver) -> Any:
        counts[observer] = counts.get(observer, 0) + 1
        return limit(observer)

    monkeypatch.setattr(AddendObserver, "_limited_qparams", counted)
    inputs = (torch.ones(1, 20, 4),)
    quantize(seeded(lambda: recurrent(20)), inputs, [inputs], recover=None)
    assert counts
    assert set(counts.values()) == {1}
