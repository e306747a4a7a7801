"""The files for Model Explorer, read with the data classes of its package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from openneutron import NeutronProgram, QuantizedModel, lower, quantize
from openneutron.accuracy import analyze
from openneutron.errors import InputError, OutputError
from openneutron.page import summarize

dacite = pytest.importorskip("dacite")
graph_builder = pytest.importorskip("model_explorer.graph_builder")
node_data = pytest.importorskip("model_explorer.node_data_builder")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(8 * 36, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(x)
        return self.head(features.flatten(1)), features.argmax(1)


Built = tuple[QuantizedModel, NeutronProgram, list[torch.Tensor]]


@pytest.fixture(scope="module")
def built() -> Built:
    torch.manual_seed(0)
    data = [torch.randn(1, 3, 6, 6) for _ in range(4)]
    quantized = quantize(Net().eval(), (data[0],), data, recover=None)
    return quantized, lower(quantized), data


def graphs_in(folder: Path) -> dict[str, Any]:
    collection = dacite.from_dict(graph_builder.GraphCollection, json.loads((folder / "graphs.json").read_text()))
    return {graph.id: graph for graph in collection.graphs}


def results_in(folder: Path, name: str) -> dict[str, dict[str, float]]:
    """Returns the values of a file of node data, by graph and node."""
    content = json.loads((folder / name).read_text())
    found = {graph: dacite.from_dict(node_data.GraphNodeData, one) for graph, one in content.items()}
    return {graph: {node: one.value for node, one in data.results.items()} for graph, data in found.items()}


def test_graphs_and_node_data_agree_with_the_summary(built: Built, tmp_path: Path) -> None:
    quantized, program, data = built
    analysis = analyze(None, quantized, data)
    paths = program.to_model_explorer(tmp_path, quantized, analysis, "Net")
    assert {path.name for path in paths} == {
        "graphs.json", "cycles.json", "weight_bytes.json", "placement.json", "sqnr.json",
    }  # fmt: skip
    graphs = graphs_in(tmp_path)
    assert set(graphs) == {"model", "delegate0"}
    for graph in graphs.values():
        ids = [node.id for node in graph.nodes]
        assert len(ids) == len(set(ids))
        assert all(edge.sourceNodeId in ids for node in graph.nodes for edge in node.incomingEdges)
        assert [node for node in graph.nodes if node.label == "output" and not node.incomingEdges] == []
    labels = {node.label: node for node in graphs["model"].nodes}
    assert labels["aten.conv2d.default"].namespace == "body/0"
    assert labels["aten.linear.default"].namespace == "head"
    assert {one.key: one.value for one in labels["aten.argmax.default"].attrs}["runs on"] == "CPU"
    assert "CONV_2D" in {node.label for node in graphs["delegate0"].nodes}
    ends = [node.id for node in graphs["delegate0"].nodes if node.label in ("input", "output")]
    assert ends == ["input0", "output0", "output1"]

    summary = summarize("Net", program, quantized=quantized, analysis=analysis)
    cycles = results_in(tmp_path, "cycles.json")
    assert sum(cycles["delegate0"].values()) == summary.cycles
    assert results_in(tmp_path, "placement.json")["model"]["argmax"] == 0
    assert results_in(tmp_path, "placement.json")["model"]["conv2d"] == 1
    worst = summary.analysis.layers[0] if summary.analysis else None
    assert worst is not None
    assert results_in(tmp_path, "sqnr.json")["model"][worst.node] == worst.sqnr_db
    for name in ("cycles.json", "weight_bytes.json", "placement.json", "sqnr.json"):
        for graph, values in results_in(tmp_path, name).items():
            assert values.keys() <= {node.id for node in graphs[graph].nodes}


def test_the_converted_module_gives_the_same_operators(built: Built, tmp_path: Path) -> None:
    """Conversions to and from int8 are not nodes of the graph."""
    quantized, program, _ = built
    converted = QuantizedModel(quantized.module, quantized.example_inputs, quantized.target)
    program.to_model_explorer(tmp_path / "a", quantized)
    program.to_model_explorer(tmp_path / "b", converted)
    first, second = (graphs_in(tmp_path / name)["model"].nodes for name in "ab")
    assert [node.label for node in first] == [node.label for node in second]
    assert [len(node.incomingEdges) for node in first] == [len(node.incomingEdges) for node in second]


def test_a_program_alone_has_the_graphs_of_its_delegates(built: Built, tmp_path: Path) -> None:
    built[1].to_model_explorer(tmp_path)
    assert set(graphs_in(tmp_path)) == {"delegate0"}
    assert not (tmp_path / "placement.json").exists()


def test_a_program_without_a_delegate_is_refused(tmp_path: Path) -> None:
    data = [torch.randn(1, 4) for _ in range(2)]
    quantized = quantize(nn.Linear(4, 4).eval(), (data[0],), data, recover=None)
    with pytest.warns(UserWarning, match="Nothing of this program runs on the NPU"):
        program = lower(quantized, operators_not_to_delegate=["aten::linear"])
    with pytest.raises(InputError, match="no delegate for the NPU"):
        program.to_model_explorer(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_refused(built: Built, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="Cannot create the folder"):
        built[1].to_model_explorer(tmp_path / "out")
