"""Small TFLite models, and `.pte` files with delegate payloads, for tests of the payload and the host runtime.

They do not use OpenNeutron's lowering; the tests write all files directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers  # noqa: TID251  the runtime is tested without the room that writes TFLite
import numpy as np
import numpy.typing as npt
import torch
from ai_edge_litert import schema_py_generated as schema  # noqa: TID251  as above
from ai_edge_litert.interpreter import Interpreter
from executorch.exir import to_edge
from executorch.exir.delegate import executorch_call_delegate
from executorch.exir.lowered_backend_module import LoweredBackendModule

from openneutron.formats.payload import PayloadHeader

Int8 = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Value:
    """A tensor of a TFLite model, with a scale that no other tensor has. `kind` is TFLite's type."""

    name: str
    shape: tuple[int, ...]
    scale: float
    kind: str = "INT8"


@dataclass(frozen=True)
class Binary:
    """`result = left op right`. `op` is "ADD", "SUB" or "MUL"."""

    op: str
    left: str
    right: str
    result: str


def tflite_model(
    values: Sequence[Value], operators: Sequence[Binary], inputs: Sequence[str], outputs: Sequence[str]
) -> bytes:
    """Returns the TFLite flatbuffer of a graph of elementwise operators."""
    index = {value.name: i for i, value in enumerate(values)}
    kinds = sorted({operator.op for operator in operators})

    model = schema.ModelT()
    model.version = 3
    model.buffers = [schema.BufferT()]
    model.operatorCodes = [_operator_code(kind) for kind in kinds]
    graph = schema.SubGraphT()
    graph.tensors = [_tensor(value) for value in values]
    graph.inputs = [index[name] for name in inputs]
    graph.outputs = [index[name] for name in outputs]
    graph.operators = [_operator(operator, kinds, index) for operator in operators]
    model.subgraphs = [graph]

    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _operator_code(kind: str) -> Any:
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, kind)
    code.version = 2
    return code


def _tensor(value: Value) -> Any:
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.buffer = value.name, list(value.shape), 0
    tensor.type = getattr(schema.TensorType, value.kind)
    tensor.quantization = schema.QuantizationParametersT()
    tensor.quantization.scale, tensor.quantization.zeroPoint = [value.scale], [0]
    return tensor


def _operator(operator: Binary, kinds: list[str], index: dict[str, int]) -> Any:
    result = schema.OperatorT()
    result.opcodeIndex = kinds.index(operator.op)
    result.inputs, result.outputs = [index[operator.left], index[operator.right]], [index[operator.result]]
    options = operator.op.capitalize() + "Options"
    result.builtinOptionsType = getattr(schema.BuiltinOptions, options)
    result.builtinOptions = getattr(schema, options + "T")()
    return result


def add_sub_model(shape: tuple[int, ...]) -> bytes:
    """Two inputs of `shape`, two outputs: a + b and a - b. All scales differ, so exchanged tensors
    change the result.
    """
    scales = {"a": 0.5, "b": 0.25, "sum": 1.0, "difference": 0.7}
    values = [Value(name, shape, scale) for name, scale in scales.items()]
    operators = [Binary("ADD", "a", "b", "sum"), Binary("SUB", "a", "b", "difference")]
    return tflite_model(values, operators, ["a", "b"], ["sum", "difference"])


def double_model(shape: tuple[int, ...], kind: str = "INT8") -> bytes:
    """One input x of `shape`, one output 2x, saturating."""
    values = [Value("x", shape, 1.0, kind), Value("y", shape, 1.0, kind)]
    return tflite_model(values, [Binary("ADD", "x", "x", "y")], ["x"], ["y"])


def litert(tflite: bytes, *inputs: Int8) -> list[Int8]:
    """Runs a model in LiteRT directly."""
    interpreter = Interpreter(model_content=tflite, num_threads=1)
    interpreter.allocate_tensors()
    for details, value in zip(interpreter.get_input_details(), inputs, strict=True):
        interpreter.set_tensor(details["index"], value)
    interpreter.invoke()
    return [interpreter.get_tensor(details["index"]) for details in interpreter.get_output_details()]


def straight_header(inputs: int, outputs: int) -> PayloadHeader:
    """Returns a header that maps arguments to inputs and outputs in order, without formats."""
    return PayloadHeader(
        input_formats=(0,) * inputs,
        output_formats=(0,) * outputs,
        input_map=tuple(range(inputs)),
        output_map=tuple(range(outputs)),
        argument_count=inputs,
    )


@dataclass(frozen=True)
class Call:
    """A delegate call: the payload, the numbers of the values that it reads, and the shapes and dtype of its outputs.

    The values are the program's inputs, followed by the results of earlier calls.
    """

    payload: bytes
    takes: tuple[int, ...]
    returns: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.int8


def pte(calls: Sequence[Call], inputs: Sequence[torch.Tensor], returns: Sequence[int]) -> bytes:
    """Returns a program of delegate calls on int8 inputs; `returns` are the values that it returns.

    It does not use the partitioner and the backend: each call becomes a LoweredBackendModule with the id
    "NeutronBackend" and the payload.
    """
    shapes = [tuple(tensor.shape) for tensor in inputs] + [shape for call in calls for shape in call.returns]
    formats = [_memory_format(tensor) for tensor in inputs]
    formats += [torch.contiguous_format] * (len(shapes) - len(inputs))
    blanks = [
        torch.zeros(shape, dtype=torch.int8).to(memory_format=memory_format)
        for shape, memory_format in zip(shapes, formats, strict=True)
    ]
    lowered = [_lowered(call, [blanks[i] for i in call.takes]) for call in calls]

    class Program(torch.nn.Module):
        def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            known = list(values)
            for call, module in zip(calls, lowered, strict=True):
                known += executorch_call_delegate(module, *(known[i] for i in call.takes))
            return tuple(known[i] for i in returns)

    # Clones, because export merges two inputs that are the same tensor.
    exported = torch.export.export(Program(), tuple(tensor.clone() for tensor in inputs))
    return bytes(to_edge(exported).to_executorch().buffer)


def _memory_format(tensor: torch.Tensor) -> torch.memory_format:
    if tensor.dim() == 4 and not tensor.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def _lowered(call: Call, inputs: Sequence[torch.Tensor]) -> LoweredBackendModule:
    class Results(torch.nn.Module):
        def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(values[0].new_zeros(shape, dtype=call.dtype) for shape in call.returns)

    exported = torch.export.export(Results(), tuple(tensor.clone() for tensor in inputs))
    return LoweredBackendModule(exported, "NeutronBackend", call.payload, [])
