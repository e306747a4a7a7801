"""The TFLite writer: LiteRT accepts its files, and they contain nothing twice and nothing unused."""

from __future__ import annotations

import math
from typing import Any

import flatbuffers  # noqa: TID251  no room reads TFLite yet, and the file itself is what is tested
import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema  # noqa: TID251  as above
from tests.case import Case
from tests.operator_cases import CASES
from tests.oracle import Function, quantized
from tests.runtime_models import litert
from torch import nn

from openneutron import QuantizedModel
from openneutron.compile_spec import CompileOptions
from openneutron.formats import tflite
from openneutron.ir.graph import Graph, Op, QParams, Tensor
from openneutron.ir.kinds import ADD, PADV2, RELU
from openneutron.ops import OpSpec
from openneutron.partition.clusters import Constants
from openneutron.partition.compile import lower_partition
from openneutron.partition.placing import place

INT8 = np.dtype(np.int8)
Q = QParams.per_tensor(0.5, 0)
# The first version of each operator that supports int8. Readers reject versions that they do not know.
INT8_VERSIONS = {
    "ABS": 2, "ADD": 2, "AVERAGE_POOL_2D": 2, "BATCH_MATMUL": 2, "CONCATENATION": 2, "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3, "EXP": 2, "FULLY_CONNECTED": 4, "HARD_SWISH": 1, "LEAKY_RELU": 2, "LOG": 2, "LOGISTIC": 2,
    "MAX_POOL_2D": 2, "MAXIMUM": 2, "MEAN": 2, "MINIMUM": 2, "MIRROR_PAD": 2, "MUL": 2, "PAD": 2, "PADV2": 2,
    "PRELU": 1, "REDUCE_MAX": 2, "REDUCE_MIN": 2, "RELU": 2, "RELU6": 2, "RELU_0_TO_1": 1, "RELU_N1_TO_1": 1,
    "RESHAPE": 1, "RESIZE_BILINEAR": 3, "RESIZE_NEAREST_NEIGHBOR": 3, "RSQRT": 2, "SLICE": 2, "SOFTMAX": 2, "SUB": 2,
    "SUM": 2, "TANH": 2, "TRANSPOSE": 2, "TRANSPOSE_CONV": 3,
}  # fmt: skip
NAMES = {number: name for name, number in vars(schema.BuiltinOperator).items() if not name.startswith("_")}


def read(data: bytes) -> Any:
    """Parses the tables of a file."""
    assert schema.Model.ModelBufferHasIdentifier(data, 0)
    return schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))


def graph_of(model: QuantizedModel) -> Graph:
    program = torch.export.export(model.module, model.example_inputs)
    (partition,) = place(program, CompileOptions()).partitions
    return lower_partition(Constants(program), partition)


# A quick run builds one in this many cases.
STRIDE = 4
# Cases besides the first one of each declaration, for further TFLite operators and kinds of constants.
FURTHER = (
    "conv2d.default-groups_2", "conv2d.default-per_channel_3x3", "conv2d.default-depthwise", "pad.default-value",
    "pad.default-reflect_image", "avg_pool2d.default-2x2", "reshape.default-channel_shuffle",
    "hardtanh.default--2..3_0+-3.0_rank_3", "hardtanh.default--1..1_0+-3.0_rank_3", "clamp.Tensor-one_value",
)  # fmt: skip


def varied() -> list[Case]:
    """Returns the first case of each declaration with a lowering, and the cases `FURTHER`. Together, they cover all
    TFLite operators, kinds of constants and options; a decomposition only calls other declarations.
    """
    first = {case.spec.name: case for case in reversed(CASES) if isinstance(case.spec, OpSpec)}
    return [*first.values(), *(case for case in CASES if case.id in FURTHER and case is not first.get(case.spec.name))]


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.slow)])
def files(request: pytest.FixtureRequest) -> dict[str, tuple[Graph, bytes]]:
    """The graph and the file of each case, or of one in `STRIDE` cases."""
    cases = varied() if request.param == "all" else varied()[::STRIDE]
    graphs = {case.id: graph_of(quantized(case.build(), case.shapes, **dict(case.options))) for case in cases}
    return {name: (graph, tflite.write(graph)) for name, graph in graphs.items()}


class Twins(nn.Module):
    """Two layers that share a weight, and a third layer with equal values of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.second.load_state_dict(self.first.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(self.first(x)) + self.second(torch.relu(x))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def equal_weights() -> Any:
    return read(tflite.write(graph_of(quantized(Twins(), ((1, 4, 5, 5),)))))


def test_litert_runs_every_file(files: dict[str, tuple[Graph, bytes]]) -> None:
    for name, (graph, data) in files.items():
        outputs = litert(data, *(np.zeros(tensor.shape, np.int8) for tensor in graph.inputs))
        assert [output.shape for output in outputs] == [tensor.shape for tensor in graph.outputs], name


def test_writing_twice_gives_equal_bytes(files: dict[str, tuple[Graph, bytes]]) -> None:
    for name, (graph, data) in files.items():
        assert tflite.write(graph) == data, name


def test_lowering_twice_gives_equal_bytes() -> None:
    model = quantized(Twins(), ((1, 4, 5, 5),))
    assert tflite.write(graph_of(model)) == tflite.write(graph_of(model))


def test_no_buffer_is_written_twice(files: dict[str, tuple[Graph, bytes]]) -> None:
    for name, (_, data) in files.items():
        buffers = [bytes(buffer.data) for buffer in read(data).buffers if buffer.data is not None]
        assert len(set(buffers)) == len(buffers), name


def test_equal_weights_are_stored_once(equal_weights: Any) -> None:
    sizes = [len(buffer.data) for buffer in equal_weights.buffers if buffer.data is not None]
    assert sizes.count(4 * 3 * 3 * 4) == 1
    convolutions = [
        operator.inputs[1] for operator in equal_weights.subgraphs[0].operators if len(operator.inputs) == 3
    ]
    assert len(convolutions) == 3
    assert len({equal_weights.subgraphs[0].tensors[index].buffer for index in convolutions}) == 1


def test_first_buffer_is_empty_and_stands_for_computed_tensors(equal_weights: Any) -> None:
    assert equal_weights.buffers[0].data is None
    (graph,) = equal_weights.subgraphs
    computed = {*graph.inputs, *(index for operator in graph.operators for index in operator.outputs)}
    assert {index for index, tensor in enumerate(graph.tensors) if tensor.buffer == 0} == computed


def test_every_tensor_and_buffer_is_used(files: dict[str, tuple[Graph, bytes]]) -> None:
    for name, (_, data) in files.items():
        model = read(data)
        (graph,) = model.subgraphs
        lists = [graph.inputs, graph.outputs]
        lists += [indices for operator in graph.operators for indices in (operator.inputs, operator.outputs)]
        assert {int(index) for indices in lists for index in indices} == set(range(len(graph.tensors))), name
        assert {0, *(tensor.buffer for tensor in graph.tensors)} == set(range(len(model.buffers))), name
        assert {operator.opcodeIndex for operator in graph.operators} == set(range(len(model.operatorCodes))), name


def test_constants_lie_at_multiples_of_sixteen(files: dict[str, tuple[Graph, bytes]]) -> None:
    found = 0
    for name, (_, data) in files.items():
        model = schema.Model.GetRootAs(data, 0)
        for index in range(model.BuffersLength()):
            table = model.Buffers(index)._tab
            field = flatbuffers.number_types.UOffsetTFlags.py_type(table.Offset(4))
            if field:
                assert table.Vector(field) % 16 == 0, name
                found += 1
    assert found > len(files)


def test_tensors_equal_the_graph(files: dict[str, tuple[Graph, bytes]]) -> None:
    for name, (graph, data) in files.items():
        (written,) = read(data).subgraphs
        for indices, tensors in ((written.inputs, graph.inputs), (written.outputs, graph.outputs)):
            assert len(indices) == len(tensors)
            for index, tensor in zip(indices, tensors, strict=True):
                table = written.tensors[index]
                assert tuple(table.shape) == tensor.shape, name
                assert table.type == schema.TensorType.INT8, name
                assert table.quantization.scale[0] == np.float32(tensor.qparams.scale[0]), name
                assert table.quantization.zeroPoint[0] == tensor.qparams.zero_point[0], name


@pytest.mark.parametrize(("groups", "axis"), [(1, 0), (8, 3)], ids=["convolution", "depthwise"])
def test_per_channel_weights_name_their_axis(groups: int, axis: int) -> None:
    layer = nn.Conv2d(8, 8, 3, groups=groups)
    model = quantized(layer, ((1, 8, 5, 5),), weight_granularity="per_channel")
    (graph,) = read(tflite.write(graph_of(model))).subgraphs
    operator = next(operator for operator in graph.operators if len(operator.inputs) == 3)
    weight, bias = (graph.tensors[index] for index in operator.inputs[1:])
    assert (len(weight.quantization.scale), weight.quantization.quantizedDimension) == (8, axis)
    assert (len(bias.quantization.scale), bias.quantization.quantizedDimension) == (8, 0)
    source = graph.tensors[operator.inputs[0]].quantization.scale[0]
    np.testing.assert_allclose(bias.quantization.scale, source * np.asarray(weight.quantization.scale), rtol=1e-6)


def test_operators_have_their_int8_versions(files: dict[str, tuple[Graph, bytes]]) -> None:
    versions: dict[str, int] = {}
    for _, data in files.values():
        versions |= {NAMES[code.builtinCode]: code.version for code in read(data).operatorCodes}
    assert versions.items() <= INT8_VERSIONS.items()
    assert len(files) < len(varied()) or versions == INT8_VERSIONS


def test_every_operator_code_is_in_the_older_field_too(files: dict[str, tuple[Graph, bytes]]) -> None:
    for _, data in files.values():
        assert all(code.deprecatedBuiltinCode == min(code.builtinCode, 127) for code in read(data).operatorCodes)


def test_operands_follow_the_first_tensor() -> None:
    x, value = Tensor((2,), INT8, Q), Tensor((1,), INT8, Q, np.array([7], np.int8))
    output = Tensor((5,), INT8, Q)
    op = Op(PADV2, (x, value), output, {"paddings": ((1, 2),)})
    (padded,) = litert(tflite.write(Graph((x,), (output,), (op,))), np.array([3, 4], np.int8))
    np.testing.assert_array_equal(padded, [7, 3, 4, 7, 7])


def test_unknown_attribute_is_refused() -> None:
    x, output = Tensor((2,), INT8, Q), Tensor((2,), INT8, Q)
    op = Op(ADD, (x, x), output, {"fused_activation_function": "NONE", "speed": 3})
    with pytest.raises(AttributeError, match="AddOptions has no field speed"):
        tflite.write(Graph((x,), (output,), (op,)))


def test_bytes_grow_with_the_operators() -> None:
    """Twice as many operators take at most twice as many bytes."""

    def size(count: int) -> int:
        values = [Tensor((4,), INT8, Q) for _ in range(count + 1)]
        ops = [Op(RELU, (values[i],), values[i + 1]) for i in range(count)]
        return len(tflite.write(Graph((values[0],), (values[-1],), tuple(ops))))

    assert size(400) < 2.1 * size(200)


def test_model_with_a_function_is_named_openneutron() -> None:
    model = read(tflite.write(graph_of(quantized(Function(torch.relu), ((2, 3),)))))
    assert (model.version, bytes(model.description)) == (3, b"openneutron")
    assert math.prod(model.subgraphs[0].tensors[0].shape) == 6
