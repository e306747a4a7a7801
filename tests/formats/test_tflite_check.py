"""The check of TFLite models before LiteRT: valid models pass, each kind of damage is refused."""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Callable
from typing import Any

import flatbuffers  # noqa: TID251  the files are damaged below the level of the package
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema  # noqa: TID251  as above
from tests.kind_graphs import GRAPHS
from tests.net import NO_ACTIVATION, Net, Q
from tests.runtime_models import litert
from tests.structured_mutants import mutated_bytes, mutated_tflite

from openneutron.errors import FormatError
from openneutron.formats import tflite
from openneutron.formats.flatbuffer import Source
from openneutron.formats.flatbuffer_tables import tables_at
from openneutron.formats.tflite.operator_rules import RULES
from openneutron.ir.graph import Graph, Op, Tensor
from openneutron.ir.kinds import KINDS, RESHAPE

Change = Callable[[Any], None]


def changed(name: str, change: Change) -> bytes:
    model = schema.ModelT.InitFromPackedBuf(tflite.write(GRAPHS[name]), 0)
    change(model)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def operator(model: Any) -> Any:
    return model.subgraphs[0].operators[0]


def output(model: Any) -> Any:
    return model.subgraphs[0].tensors[operator(model).outputs[0]]


def set_input(position: int, **fields: Any) -> Change:
    """Changes fields of the tensor at an input of the operator."""

    def change(model: Any) -> None:
        for name, value in fields.items():
            setattr(model.subgraphs[0].tensors[operator(model).inputs[position]], name, value)

    return change


def set_option(**fields: Any) -> Change:
    def change(model: Any) -> None:
        for name, value in fields.items():
            assert hasattr(operator(model).builtinOptions, name)
            setattr(operator(model).builtinOptions, name, value)

    return change


def set_operand(position: int, *values: int) -> Change:
    """Changes the values of an int32 constant."""

    def change(model: Any) -> None:
        tensor = model.subgraphs[0].tensors[operator(model).inputs[position]]
        data = np.array(values, np.int32).view(np.uint8)
        assert len(data) == len(model.buffers[tensor.buffer].data)
        model.buffers[tensor.buffer].data = data

    return change


def set_qparams(scale: list[float], zero_point: list[int], axis: int = 0) -> Change:
    def change(model: Any) -> None:
        table = model.subgraphs[0].tensors[0].quantization
        table.scale, table.zeroPoint = np.array(scale, np.float32), np.array(zero_point, np.int64)
        table.quantizedDimension = axis

    return change


def larger_output(model: Any) -> None:
    output(model).shape = np.array([size + 1 for size in output(model).shape], np.int32)


def missing_input(model: Any) -> None:
    operator(model).inputs = operator(model).inputs[:-1]


def other_options(model: Any) -> None:
    operator(model).builtinOptionsType = schema.BuiltinOptions.LSTMOptions
    operator(model).builtinOptions = schema.LSTMOptionsT()


def output_is_a_constant(model: Any) -> None:
    model.buffers.append(schema.BufferT())
    model.buffers[-1].data = np.zeros(int(np.prod(output(model).shape)), np.uint8)
    output(model).buffer = len(model.buffers) - 1


def other_operator(model: Any) -> None:
    model.operatorCodes[0].builtinCode = schema.BuiltinOperator.GATHER
    model.operatorCodes[0].deprecatedBuiltinCode = schema.BuiltinOperator.GATHER


def input_as_output(model: Any) -> None:
    operator(model).outputs = operator(model).inputs[:1]


def variable_input(model: Any) -> None:
    operator(model).inputs = [operator(model).inputs[0], len(model.subgraphs[0].tensors)]
    model.subgraphs[0].tensors.append(schema.TensorT())
    new = model.subgraphs[0].tensors[-1]
    new.shape, new.type, new.name = np.array([2], np.int32), schema.TensorType.INT32, "variable"


def set_graph(**fields: Any) -> Change:
    def change(model: Any) -> None:
        for name, value in fields.items():
            setattr(model.subgraphs[0], name, value)

    return change


def set_in_operator(**fields: Any) -> Change:
    def change(model: Any) -> None:
        for name, value in fields.items():
            setattr(operator(model), name, value)

    return change


def second_subgraph(model: Any) -> None:
    model.subgraphs.append(model.subgraphs[0])


def metadata(model: Any) -> None:
    model.metadata = [schema.MetadataT()]


def operator_twice(model: Any) -> None:
    model.subgraphs[0].operators *= 2


def several_scales(model: Any) -> None:
    size = output(model).shape[-1]
    table = output(model).quantization
    table.scale, table.zeroPoint = np.full(size, 0.5, np.float32), np.zeros(size, np.int64)
    table.quantizedDimension = len(output(model).shape) - 1


DAMAGE_OF_EVERY_KIND: dict[str, tuple[Change, str]] = {
    "output of another shape": (larger_output, "expected"),
    "one input less": (missing_input, "inputs of|an output of shape"),
    "options of another operator": (other_options, "expected options of type"),
    "unknown tensor": (set_in_operator(inputs=[1000]), "expected tensors below"),
    "omitted input": (set_in_operator(inputs=[-1]), "expected tensors below"),
    "no output": (set_in_operator(outputs=[]), "expected one output"),
    "constant output": (output_is_a_constant, "an output of .* that was not written before"),
    "output is an input": (input_as_output, "not written before"),
    "other operator": (other_operator, "an operator that OpenNeutron writes, found builtin operator 36"),
    "unknown code": (set_in_operator(opcodeIndex=7), "an operator code below 1"),
    "two outputs": (set_in_operator(outputs=[0, 0]), "expected one output"),
    "no graph input": (set_graph(inputs=[]), "that were written before"),
    "input twice": (set_graph(inputs=[0, 0]), "neither constants nor listed twice"),
    "no graph output": (set_graph(outputs=[]), "outputs that an operator writes"),
    "unknown graph output": (set_graph(outputs=[99]), "expected tensors below"),
    "written twice": (operator_twice, "not written before"),
    "two subgraphs": (second_subgraph, "expected one subgraph"),
    "metadata": (metadata, "no other fields"),
    "state": (set_input(0, isVariable=True), "no other fields"),
    "unknown type": (set_input(0, type=schema.TensorType.STRING), "a tensor of INT8 or INT32"),
    "int32 data": (lambda model: setattr(output(model), "type", schema.TensorType.INT32), "an int8 output"),
    "unknown buffer": (set_input(0, buffer=99), "a buffer below"),
    "infinite scale": (set_qparams([float("inf")], [0]), "scales of all tensors from"),
    "scale of which a kernel's multiple overflows": (set_qparams([2.0**108], [0]), "scales of all tensors from"),
    "scale of zero": (set_qparams([0.0], [0]), "scales of all tensors from"),
    "scale is no number": (set_qparams([float("nan")], [0]), "scales of all tensors from"),
    "zero point out of range": (set_qparams([0.5], [128]), "zero points of all tensors from -128 to 127"),
    "a zero point too few": (set_qparams([0.5, 0.5], [0]), "2 zero points"),
    "scales of no dimension": (set_qparams([0.5] * 9, [0] * 9, 9), "9 scales for one dimension"),
    "scales of a tensor": (several_scales, "an int8 output with one scale"),
    "no qparams": (lambda model: setattr(output(model), "quantization", None), "with one scale"),
    "negative size": (set_input(0, shape=np.array([1, -1], np.int32)), "dimensions of 1 or more"),
    "too many dimensions": (set_input(0, shape=np.ones(65, np.int32)), "at most 64 dimensions"),
    "size overflows": (set_input(0, shape=np.full(4, 2**30, np.int32)), "at most 2 GB"),
}  # fmt: skip

DAMAGE_OF_ONE_KIND: tuple[tuple[str, Change, str], ...] = (
    ("ADD", set_option(fusedActivationFunction=9), "a fused activation"),
    ("ADD", set_option(potScaleInt16=False), "options with no other fields"),
    ("ADD", set_qparams([0.5] * 3, [0] * 3, 3), "INT8 with one scale as input 0"),
    ("MAXIMUM", set_input(1, shape=np.array([4, 1], np.int32)), "shapes that broadcast"),
    ("SOFTMAX", set_option(beta=float("nan")), "a positive beta"),
    ("LEAKY_RELU", set_option(alpha=float("inf")), "a finite slope"),
    ("LEAKY_RELU", set_option(alpha=float("nan")), "a finite slope"),
    ("CONV_2D", set_option(strideH=0), "strides, dilations and windows"),
    ("CONV_2D", set_option(strideW=-1), "strides, dilations and windows"),
    ("CONV_2D", set_option(dilationHFactor=2**31 - 1), "strides, dilations and windows"),
    ("CONV_2D", set_option(padding=2), "padding SAME or VALID"),
    ("CONV_2D", set_option(padding=1), "an output of shape"),
    ("CONV_2D", set_option(quantizedBiasType=4), "options with no other fields"),
    ("CONV_2D", set_input(2, shape=np.array([6, 1], np.int32)), "a bias for each output"),
    ("CONV_2D", set_input(1, shape=np.array([6, 3, 1, 9], np.int32)), "groups of channels"),
    ("CONV_2D", set_input(2, quantization=None, type=schema.TensorType.INT8), "a buffer of 6 bytes"),
    ("DEPTHWISE_CONV_2D", set_option(depthMultiplier=1), "filters"),
    ("DEPTHWISE_CONV_2D", set_option(depthMultiplier=0), "strides, dilations and windows"),
    ("TRANSPOSE_CONV", set_operand(0, 1, 80, 10, 2), "an output of which"),
    ("TRANSPOSE_CONV", set_operand(0, 1, -8, 10, 2), "an output of which"),
    ("TRANSPOSE_CONV", set_operand(0, 2, 8, 10, 2), "batch 1"),
    ("TRANSPOSE_CONV", set_option(strideH=1), "an output of which"),
    ("FULLY_CONNECTED", set_option(keepNumDims=True), "an output of shape"),
    ("FULLY_CONNECTED", set_option(weightsFormat=1), "options with no other fields"),
    ("FULLY_CONNECTED", set_input(1, shape=np.array([4, 5], np.int32)), "rows of 5 values|a bias for each"),
    ("BATCH_MATMUL", set_option(adjX=True), "matrices of equal inner size"),
    ("AVERAGE_POOL_2D", set_option(filterHeight=0), "strides, dilations and windows"),
    ("MAX_POOL_2D", set_option(filterWidth=2**30), "strides, dilations and windows"),
    ("MAX_POOL_2D", set_option(padding=1), "an output of shape"),
    ("RESIZE_BILINEAR", set_operand(1, 8, 11), "an output of shape"),
    ("RESIZE_NEAREST_NEIGHBOR", set_operand(1, -8, 10), "an output of shape"),
    ("MEAN", set_operand(1, 1, 4), "dimensions below 4"),
    ("MEAN", set_operand(1, 1, -3), "dimensions below 4"),
    ("SUM", set_operand(1, 1, 1), "dimensions listed once"),
    ("REDUCE_MAX", set_option(keepDims=False), "an output of shape"),
    ("CONCATENATION", set_option(axis=4), "a dimension below 4"),
    ("CONCATENATION", set_option(axis=-2), "a dimension below 4"),
    ("CONCATENATION", set_option(axis=1), "agree in other dimensions"),
    ("PAD", set_operand(1, 0, 0, -1, 3, 2, 1), "paddings of 0 or more"),
    ("PADV2", set_operand(1, 0, 0, 2**30, 1, 2, 1), "an output of shape"),
    ("MIRROR_PAD", set_operand(1, 0, 0, 0, 2, 2, 1), "paddings of at most 1"),
    ("MIRROR_PAD", set_option(mode=5), "a mode of padding"),
    ("RESHAPE", set_operand(1, 5, 12), "an output of shape"),
    ("SLICE", set_operand(1, 0, 3, 2, 0), "a part of"),
    ("SLICE", set_operand(1, 0, -1, 2, 0), "a part of"),
    ("SLICE", set_operand(2, 1, 2, -1, 3), "a part of"),
    ("TRANSPOSE", set_operand(1, 0, 3, 1, 1), "a permutation of 4 dimensions"),
    ("TRANSPOSE", set_operand(1, 0, 4, 1, 2), "a permutation of 4 dimensions"),
    ("TRANSPOSE", variable_input, "that were written before"),
)  # fmt: skip


def test_each_kind_has_a_rule_and_a_graph() -> None:
    assert set(RULES) == set(KINDS)
    assert set(GRAPHS) == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_valid_models_pass_and_run(name: str) -> None:
    model = tflite.write(GRAPHS[name])
    tflite.check(model)
    tflite.check(tflite.with_more_outputs(model, []))
    (result,) = litert(model, *(np.zeros(tensor.shape, np.int8) for tensor in GRAPHS[name].inputs))
    assert result.shape == GRAPHS[name].outputs[0].shape


def test_a_shape_of_many_large_sizes_is_refused_at_once() -> None:
    sizes = np.full(50_000, 2**30, np.int32)
    with pytest.raises(FormatError, match="at most 64 dimensions, found 50000"):
        tflite.check(changed("RELU", set_input(0, shape=sizes)))


def test_a_vtable_of_many_fields() -> None:
    count = 65
    vtable = struct.pack(f"<HH{count}H", 4 + 2 * count, 8, 4, *([0] * (count - 1)))
    data = vtable + struct.pack("<iI", len(vtable), 7)
    with pytest.raises(FormatError, match="at most 64 fields, found 65"):
        tables_at(Source(memoryview(data), "the file"), np.array([len(vtable)], np.int64))


def test_each_reference_to_a_table_counts_the_bytes_of_the_table() -> None:
    """Without the count, a small file with many references to a table of many fields takes long to check."""
    vtable, size = struct.pack("<HHHH", 8, 1000, 4, 996), 1000
    data = vtable + struct.pack(f"<i{size - 4}x", len(vtable))

    def read(references: int) -> list[Any]:
        tables = tables_at(Source(memoryview(data), "the file"), np.full(references, len(vtable), np.int64))
        return [tables.scalars(row, (("i", 7), ("i", 7)))[1] for row in range(len(tables))]

    assert read(10) == [0] * 10
    with pytest.raises(FormatError, match="many references to the same parts"):
        read(100)


@pytest.mark.parametrize("kind", ["ADD", "MAXIMUM", "MUL"])
def test_operands_of_many_dimensions_that_broadcast(kind: str) -> None:
    net = Net()
    shape = (2,) * 8
    thinner = Tensor((1, 2) * 4, np.dtype(np.int8), Q, np.ones((1, 2) * 4, np.int8))
    output = net.op(KINDS[kind], [net.input(*shape), thinner], shape, **({} if kind == "MAXIMUM" else NO_ACTIVATION))
    model = tflite.write(net.returns(output))
    tflite.check(model)
    litert(model, np.zeros(shape, np.int8))


@pytest.mark.parametrize("damage", DAMAGE_OF_EVERY_KIND)
def test_damage_of_every_kind(damage: str) -> None:
    change, message = DAMAGE_OF_EVERY_KIND[damage]
    for name in KINDS:
        with pytest.raises(FormatError, match=message):
            tflite.check(changed(name, change))


@pytest.mark.parametrize("index", range(len(DAMAGE_OF_ONE_KIND)))
def test_damage_of_one_kind(index: int) -> None:
    name, change, message = DAMAGE_OF_ONE_KIND[index]
    with pytest.raises(FormatError, match=rf"byte \d+: expected .*({message})"):
        tflite.check(changed(name, change))


@pytest.mark.parametrize("name", KINDS)
def test_operators_at_once_and_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of all operators at once accepts no other models than the rules of single operators."""
    model, chance = tflite.write(GRAPHS[name]), random.Random(name)
    models = [mutated_tflite(model, chance) for _ in range(60)]
    at_once = [fault_of(one) for one in models]
    module = sys.modules["openneutron.formats.tflite.check"]  # the package has the function of this name
    monkeypatch.setattr(module, "are_usual", lambda _, numbers, *__: np.zeros(len(numbers), bool))
    assert [fault_of(one) for one in models] == at_once
    assert {bool(fault) for fault in at_once} == {False, True}


def fault_of(model: bytes) -> str:
    try:
        tflite.check(model)
    except FormatError as error:
        return str(error)
    return ""


def test_an_empty_operand_is_a_constant() -> None:
    inputs = Tensor((1, 1), np.dtype(np.int8), Q)
    output = Tensor((), np.dtype(np.int8), Q)
    model = tflite.write(Graph((inputs,), (output,), (Op(RESHAPE, (inputs,), output, {"new_shape": ()}),)))
    tflite.check(model)
    (result,) = litert(model, np.full((1, 1), 5, np.int8))
    assert result.shape == ()
    assert result == 5


def test_a_name_without_its_zero_byte() -> None:
    model = tflite.write(GRAPHS["ADD"])
    at = model.index(b"main\0")
    with pytest.raises(FormatError, match="the zero byte after a text"):
        tflite.check(model[: at + 4] + b"x" + model[at + 5 :])


def test_a_name_that_is_not_utf_8() -> None:
    model = tflite.write(GRAPHS["ADD"])
    at = model.index(b"t0\0")
    with pytest.raises(FormatError, match="a text in UTF-8"):
        tflite.check(model[:at] + b"\xff\xff" + model[at + 2 :])


def test_damaged_bytes_give_typed_errors() -> None:
    rng = random.Random(0)
    models = [tflite.write(graph) for graph in GRAPHS.values()]
    refused = 0
    for number in range(2000):
        try:
            tflite.check(mutated_bytes(models[number % len(models)], rng))
        except FormatError:
            refused += 1
    assert refused > 1000
