"""Writes IR graphs as TFLite flatbuffers (schema version 3)."""

from __future__ import annotations

import re
from typing import Any

import flatbuffers  # noqa: TID251
import numpy as np
from ai_edge_litert import schema_py_generated as schema  # noqa: TID251

from openneutron.ir.graph import Array, Graph, Kind, Op, QParams, Tensor

__all__ = ["write"]

SCHEMA_VERSION = 3
FILE_IDENTIFIER = b"TFL3"
# The schema's force_align of Buffer.data, which the generated Python code ignores.
BUFFER_ALIGNMENT = 16
# Operator codes up to here fit the older one-byte field, which every reader supports.
LAST_DEPRECATED_CODE = 127

_TYPES = {np.dtype(np.int8): schema.TensorType.INT8, np.dtype(np.int32): schema.TensorType.INT32}
_ENUMS = {
    "fused_activation_function": schema.ActivationFunctionType,
    "padding": schema.Padding,
    "weights_format": schema.FullyConnectedOptionsWeightsFormat,
    "mode": schema.MirrorPadMode,
}


def write(graph: Graph, *, names: bool = False) -> bytes:
    """Returns the bytes of a TFLite file. Equal graphs give equal bytes. Equal constants are stored once.

    With `names`, the name of each operator's output contains the graph node that the operator came from ("conv2d.t12").
    Linear in operators and bytes.
    """
    writer = _Writer(names)
    inputs = [writer.tensor(tensor) for tensor in graph.inputs]
    operators = [writer.operator(op) for op in graph.ops]
    subgraph = schema.SubGraphT()
    subgraph.tensors = writer.tensors
    subgraph.inputs = inputs
    subgraph.outputs = [writer.tensor(tensor) for tensor in graph.outputs]
    subgraph.operators = operators
    subgraph.name = "main"
    model = schema.ModelT()
    model.version = SCHEMA_VERSION
    model.operatorCodes = list(writer.codes.values())
    model.subgraphs = [subgraph]
    model.description = "openneutron"
    model.buffers = writer.buffers
    builder = flatbuffers.Builder(1024 + sum(len(buffer.data) + 64 for buffer in writer.buffers))
    builder.Finish(model.Pack(builder), file_identifier=FILE_IDENTIFIER)
    return bytes(builder.Output())


class _AlignedBuffer(schema.BufferT):
    def __init__(self, data: bytes = b"") -> None:
        super().__init__()
        self.data = data

    def Pack(self, builder: Any) -> Any:  # noqa: N802
        vector = None
        if self.data:
            builder.StartVector(1, len(self.data), BUFFER_ALIGNMENT)
            head = builder.head = builder.head - len(self.data)
            builder.Bytes[head : head + len(self.data)] = self.data
            vector = builder.EndVector()
        schema.BufferStart(builder)
        if vector is not None:
            schema.BufferAddData(builder, vector)
        return schema.BufferEnd(builder)


class _Writer:
    """Collects the tables of the file. Adds each tensor, buffer and operator code once."""

    def __init__(self, names: bool) -> None:
        self._names = names
        self.tensors: list[Any] = []
        self.buffers: list[_AlignedBuffer] = [_AlignedBuffer()]  # the schema requires an empty first buffer
        self.codes: dict[Kind, Any] = {}
        self._tensor_index: dict[int, int] = {}
        self._buffer_index: dict[bytes, int] = {b"": 0}
        self._operand_index: dict[bytes, int] = {}
        self._code_index: dict[Kind, int] = {}

    def tensor(self, tensor: Tensor) -> int:
        """Returns the index of an IR tensor in the file. Adds the tensor if it is new."""
        if id(tensor) not in self._tensor_index:
            self._tensor_index[id(tensor)] = self._add_tensor(tensor.shape, tensor.dtype, tensor.data, tensor.qparams)
        return self._tensor_index[id(tensor)]

    def operator(self, op: Op) -> Any:
        """Returns the table of an operator. Adds its tensors, and its operands as constant tensors."""
        operator = schema.OperatorT()
        operator.opcodeIndex = self._add_operator_code(op.kind)
        operands = [self._add_operand(np.asarray(op.attrs[name], np.int32)) for name in op.kind.operands]
        inputs = [self.tensor(tensor) for tensor in op.inputs]
        inputs[op.kind.operands_at : op.kind.operands_at] = operands
        operator.inputs = inputs
        operator.outputs = [self.tensor(op.output)]
        if self._names:
            self.tensors[operator.outputs[0]].name = f"{op.origin}.t{operator.outputs[0]}"
        if op.kind.options is not None:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, op.kind.options)
            operator.builtinOptions = _options_table(op)
        return operator

    def _add_operand(self, value: Array) -> int:
        key = value.tobytes() + str(value.shape).encode()
        if key not in self._operand_index:
            self._operand_index[key] = self._add_tensor(value.shape, value.dtype, value, None)
        return self._operand_index[key]

    def _add_tensor(self, shape: tuple[int, ...], dtype: Any, data: Array | None, qparams: QParams | None) -> int:
        index = len(self.tensors)
        tensor = schema.TensorT()
        tensor.shape = np.asarray(shape, np.int32)
        tensor.type = _TYPES[dtype]
        tensor.buffer = self._add_buffer(b"" if data is None else data.tobytes())
        tensor.name = f"t{index}"
        tensor.quantization = None if qparams is None else _quantization_table(qparams)
        self.tensors.append(tensor)
        return index

    def _add_buffer(self, data: bytes) -> int:
        if data not in self._buffer_index:
            self._buffer_index[data] = len(self.buffers)
            self.buffers.append(_AlignedBuffer(data))
        return self._buffer_index[data]

    def _add_operator_code(self, kind: Kind) -> int:
        if kind not in self.codes:
            self._code_index[kind] = len(self.codes)
            builtin = getattr(schema.BuiltinOperator, kind.name)
            code = schema.OperatorCodeT()
            code.builtinCode = builtin
            code.deprecatedBuiltinCode = min(builtin, LAST_DEPRECATED_CODE)
            code.version = kind.version
            self.codes[kind] = code
        return self._code_index[kind]


def _quantization_table(qparams: QParams) -> Any:
    table = schema.QuantizationParametersT()
    table.scale = np.asarray(qparams.scale, np.float32)
    table.zeroPoint = np.asarray(qparams.zero_point, np.int64)
    table.quantizedDimension = qparams.axis or 0
    return table


def _options_table(op: Op) -> Any:
    table = getattr(schema, f"{op.kind.options}T")()
    for name, value in op.attrs.items():
        field = re.sub(r"_(\w)", lambda match: match.group(1).upper(), name)
        if hasattr(table, field):
            setattr(table, field, getattr(_ENUMS[name], value) if isinstance(value, str) else value)
        elif name not in op.kind.operands:
            raise AttributeError(f"{op.kind.options} has no field {field}")
    return table
