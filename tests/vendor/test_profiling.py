"""Maps the NPU's kernels to the user's source lines, from output that the double prints like the vendor's converter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from executorch.devtools.etrecord import parse_etrecord
from executorch.devtools.inspector._inspector_utils import (
    EDGE_DIALECT_GRAPH_KEY,
    create_debug_handle_to_op_node_mapping,
    gen_graphs_from_etrecord,
)
from executorch.exir import to_edge_transform_and_lower
from tests.flow_support import names_of_inputs
from tests.vendor.test_sdk import DOUBLES
from torch import nn

from openneutron import NeutronPartitioner, QuantizedModel, generate_neutron_compile_spec, lower, quantize
from openneutron.compile_spec import CompileOptions
from openneutron.formats import pte, tflite
from openneutron.formats.payload import parse
from openneutron.vendor import sdk
from openneutron.vendor.device import compile_payloads, converter_flags
from openneutron.vendor.profiling import Kernel, kernels_of, node_of
from openneutron.vendor.sdk import Conversion, ConverterWarning


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 3, padding=1)
        self.narrow = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.sigmoid(self.wide(x))
        z: torch.Tensor = self.narrow(y)
        return torch.tanh(z) + y[:, :4]


@pytest.fixture(autouse=True)
def _doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOUBLES))
    monkeypatch.delenv("NEUTRON_DOUBLE", raising=False)
    monkeypatch.setenv("OPENNEUTRON_CACHE", "")


@pytest.fixture(scope="module")
def quantized() -> QuantizedModel:
    torch.manual_seed(0)
    samples = [(torch.randn(1, 3, 8, 8),)]
    return quantize(Net().eval(), samples[0], samples)


def portable_model(quantized: QuantizedModel) -> bytes:
    program = lower(quantized, use_profiling=True, payload="portable")
    return parse(pte.read(program.buffer).methods[0].delegates[0].payload).tflite


def log_of(model: bytes) -> str:
    flags = converter_flags(CompileOptions(use_profiling=True))
    return sdk.convert(Conversion(model, "imxrt700", flags), sdk.choose_converter(None)).log


def test_each_kernel_has_its_operators_and_their_source_lines(quantized: QuantizedModel) -> None:
    program = lower(quantized, use_profiling=True, payload="device")
    (kernels,) = program.kernels
    lines = {row.node: row.source for row in program.placement}
    convolutions = [kernel for kernel in kernels if kernel.name == "Conv2DStandardV2"]
    assert [kernel.nodes for kernel in convolutions] == [("conv2d",), ("conv2d_1",)]
    assert {str(lines[node]).rpartition(":")[0] for kernel in convolutions for node in kernel.nodes} == {__file__}


def test_kernel_names_equal_executorch(quantized: QuantizedModel, tmp_path: Path) -> None:
    model = portable_model(quantized)
    log = log_of(model)
    (tmp_path / "log").write_text(log)
    (graph,) = nodes_of(model)
    script = Path(__file__).parents[1] / "profile_oracle.py"
    command = [sys.executable, str(script), str(tmp_path / "log"), str(len(graph))]
    environment = {**os.environ, "PYTHONPATH": str(DOUBLES)}
    theirs = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    ours = [kernel.nodes for kernel in kernels_of(log, model)]
    assert [{graph[index] for index in kernel} for kernel in theirs[:-1]] == [set(nodes) for nodes in ours]
    assert theirs[-1] == [], "the last stands for writing the profile"


def nodes_of(model: bytes) -> list[list[str | None]]:
    return [
        [node_of(operator.outputs[0].name) for operator in graph.operators] for graph in tflite.read(model).subgraphs
    ]


def test_the_inspectors_debug_handles_have_the_users_lines(quantized: QuantizedModel, tmp_path: Path) -> None:
    specs = generate_neutron_compile_spec("imxrt700", use_profiling=True, payload="device")
    exported = torch.export.export(quantized.module, quantized.example_inputs)
    edge = to_edge_transform_and_lower(
        exported,
        partitioner=[NeutronPartitioner(specs)],
        constant_methods=names_of_inputs(exported),
        generate_etrecord=True,
    )
    lowered = edge.to_executorch()
    lowered.get_etrecord().save(str(tmp_path / "etrecord.bin"))
    record = parse_etrecord(str(tmp_path / "etrecord.bin"))
    nodes = create_debug_handle_to_op_node_mapping(gen_graphs_from_etrecord(record)[EDGE_DIALECT_GRAPH_KEY])
    (delegate,) = record._delegate_map["forward"].values()
    kernels = lower(quantized, use_profiling=True, payload="device").kernels[0]
    handles = [delegate["delegate_map"][str(number)] for number in range(len(kernels) + 1)]
    assert handles[-1] == []
    for kernel, found in zip(kernels, handles, strict=False):
        computed = [node for node in kernel.nodes if node != "output"]  # if a format is converted at the end
        assert len(found) == len(computed)
        assert all(__file__ in node.metadata["stack_trace"] for handle in found for node in nodes[handle])
    assert lowered.buffer == lower(quantized, use_profiling=True, payload="device").buffer


def test_without_profiling_names_cost_nothing(quantized: QuantizedModel) -> None:
    plain = lower(quantized, payload="device")
    assert plain.kernels == ((),)
    assert len(plain.portable) < len(lower(quantized, use_profiling=True).portable)


LONG = "1" * 5000  # digits of an integer that Python's `int` refuses
LOGS = [
    "", "Graphs:", "Graphs: Graphs:", "Graphs: = Extract Graphs = Neutron Graphs:",
    f'Graphs: = Extract Graphs =\nNeutronOperator "subgraph_{LONG}":\nKernels:\n A\nGenerate code for Graphs:',
    f"Graphs:\nGraphs:\nName: subgraph_{LONG}\n",
]  # fmt: skip


@pytest.mark.parametrize("log", LOGS)
def test_other_logs_say_nothing(log: str, quantized: QuantizedModel) -> None:
    assert kernels_of(log, portable_model(quantized)) == ()


def test_parts_of_names_and_unknown_operators(quantized: QuantizedModel) -> None:
    model = portable_model(quantized)
    tensors = [operator.outputs[0].name for operator in tflite.read(model).subgraphs[0].operators]
    tensor = next(name for name in tensors if node_of(name) == "conv2d")
    log = (
        'Graphs: = Extract Graphs =\nNeutronOperator "subgraph_1":\nKernels:\n A\n B\n\nNeutronOperator "subgraph_7":\n'
        "Kernels:\n C\n= next\nGenerate code for NeutronGraph\nGraphs:\nName: subgraph_1\nInputs:\nOutputs:\nTensors:\n"
        f"Type: CONV_2D\nInputs:\n [0]: x\nOutputs:\n [0]: {tensor}/tiled\nLocation: 0\n"
    )
    assert kernels_of(log, model) == (Kernel("A", ("conv2d",)), Kernel("B", ("conv2d",)), Kernel("C", ()))


def test_a_converter_that_prints_something_else_is_a_warning(
    quantized: QuantizedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    delegate = pte.read(lower(quantized, payload="portable").buffer).methods[0].delegates[0]
    options = CompileOptions(use_profiling=True, extra_flags="verbose=False")
    with pytest.warns(ConverterWarning, match="not the operators that they compute"):
        compile_payloads([parse(delegate.payload)], options, sdk.choose_converter(None))
