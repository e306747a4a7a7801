"""Reads TFLite flatbuffers of any origin into dataclasses. Checks every offset."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema  # noqa: TID251

from openneutron.formats.flatbuffer import Source, Table, root

__all__ = ["MAX_RANK", "Buffer", "FileTensor", "Model", "Operator", "Quantization", "Subgraph", "read"]

FILE_IDENTIFIER = b"TFL3"
MAX_QPARAMS_SHOWN = 1
MAX_RANK = 64
"""The largest number of dimensions of a tensor, as in torch."""


@dataclass(frozen=True)
class Quantization:
    """real = scale * (integer - zero_point). Has one scale and zero point, or one of each per index of `axis`."""

    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    axis: int | None = None


@dataclass(frozen=True, eq=False)
class Buffer:
    """A buffer of the file. Tensors that share a buffer have the same `number`."""

    number: int
    data: memoryview = field(repr=False)


@dataclass(frozen=True, eq=False)
class FileTensor:
    """A tensor of a subgraph. `buffer` holds the values of a constant; None for a computed tensor."""

    index: int
    name: str
    dtype: str
    """The type's name in the schema ("INT8")."""
    shape: tuple[int, ...]
    """Sizes of the dimensions; -1 for a size that is only known at run time."""
    quantization: Quantization | None
    buffer: Buffer | None

    @property
    def elements(self) -> int:
        """Number of elements. A dimension of unknown size counts as 1."""
        return math.prod(max(1, size) for size in self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of all elements."""
        return self.elements * _ITEM_BYTES.get(self.dtype, 1)


@dataclass(frozen=True, eq=False)
class Operator:
    """An operator. `name` is its name in the schema, or its custom code. An omitted optional input is None."""

    name: str
    is_custom: bool
    inputs: tuple[FileTensor | None, ...]
    outputs: tuple[FileTensor, ...]
    attrs: Mapping[str, Any]
    """Options that affect the result, by their names in the schema. Enum values are given by name."""
    at: int = 0
    """Offset of its table in the file."""


@dataclass(frozen=True, eq=False)
class Subgraph:
    """A graph. `operators` has the order of execution."""

    name: str
    tensors: tuple[FileTensor, ...]
    inputs: tuple[FileTensor, ...]
    outputs: tuple[FileTensor, ...]
    operators: tuple[Operator, ...]


@dataclass(frozen=True, eq=False)
class Model:
    """The contents of a TFLite file."""

    version: int
    description: str
    subgraphs: tuple[Subgraph, ...]
    buffers: tuple[Buffer, ...]

    @cached_property
    def constant_bytes(self) -> int:
        """Total bytes of all buffers."""
        return sum(len(buffer.data) for buffer in self.buffers)


def _enum_names(enum: type) -> dict[int, str]:
    return {value: name for name, value in vars(enum).items() if isinstance(value, int)}


_BUILTINS = _enum_names(schema.BuiltinOperator)
_TYPES = _enum_names(schema.TensorType)
_ACTIVATIONS = _enum_names(schema.ActivationFunctionType)
_PADDINGS = _enum_names(schema.Padding)
_CUSTOM = schema.BuiltinOperator.CUSTOM
_ITEM_BYTES = {
    "FLOAT64": 8, "INT64": 8, "UINT64": 8, "COMPLEX64": 8, "COMPLEX128": 16, "FLOAT32": 4, "INT32": 4, "UINT32": 4,
    "RESOURCE": 4, "VARIANT": 4, "FLOAT16": 2, "BFLOAT16": 2, "INT16": 2, "UINT16": 2,
}  # fmt: skip

# Types with a fixed number of whole bytes per element.
_WHOLE_BYTES = {"INT8", "UINT8", "BOOL", "INT16", "INT32", "INT64", "FLOAT16", "FLOAT32", "FLOAT64"}

# Fields of the options tables: number in the schema, code of the struct module or the names of an enum, default.
_Field = tuple[int, "str | dict[int, str]", float]
_WINDOW: dict[str, _Field] = {"padding": (0, _PADDINGS, 0), "stride_w": (1, "i", 0), "stride_h": (2, "i", 0)}
_FUSED: dict[str, _Field] = {"fused_activation_function": (0, _ACTIVATIONS, 0)}
_POOL: dict[str, _Field] = {
    **_WINDOW, "filter_width": (3, "i", 0), "filter_height": (4, "i", 0),
    "fused_activation_function": (5, _ACTIVATIONS, 0),
}  # fmt: skip
_RESIZE: dict[str, _Field] = {"align_corners": (2, "?", False), "half_pixel_centers": (3, "?", False)}
_REDUCER: dict[str, _Field] = {"keep_dims": (0, "?", False)}
_OPTIONS: dict[str, dict[str, _Field]] = {
    "CONV_2D": {
        **_WINDOW, "fused_activation_function": (3, _ACTIVATIONS, 0), "dilation_w_factor": (4, "i", 1),
        "dilation_h_factor": (5, "i", 1),
    },
    "DEPTHWISE_CONV_2D": {
        **_WINDOW, "depth_multiplier": (3, "i", 0), "fused_activation_function": (4, _ACTIVATIONS, 0),
        "dilation_w_factor": (5, "i", 1), "dilation_h_factor": (6, "i", 1),
    },
    "TRANSPOSE_CONV": {**_WINDOW, "fused_activation_function": (3, _ACTIVATIONS, 0)},
    "AVERAGE_POOL_2D": _POOL,
    "MAX_POOL_2D": _POOL,
    "FULLY_CONNECTED": {**_FUSED, "keep_num_dims": (2, "?", False)},
    "ADD": _FUSED,
    "SUB": _FUSED,
    "MUL": _FUSED,
    "CONCATENATION": {"axis": (0, "i", 0), "fused_activation_function": (1, _ACTIVATIONS, 0)},
    "SOFTMAX": {"beta": (0, "f", 0.0)},
    "LEAKY_RELU": {"alpha": (0, "f", 0.0)},
    "BATCH_MATMUL": {"adj_x": (0, "?", False), "adj_y": (1, "?", False)},
    "RESIZE_BILINEAR": {**_RESIZE},
    "RESIZE_NEAREST_NEIGHBOR": {"align_corners": (0, "?", False), "half_pixel_centers": (1, "?", False)},
    "MEAN": _REDUCER,
    "SUM": _REDUCER,
    "REDUCE_MAX": _REDUCER,
    "REDUCE_MIN": _REDUCER,
}  # fmt: skip


def read(data: bytes | memoryview, what: str = "the TFLite file") -> Model:
    """Parses a TFLite file. Error messages call the file `what`.

    Raises `FormatError` with the offset of the first error. Time and memory are bounded by the file's size.
    """
    source = Source(data, what)
    model = root(source, (FILE_IDENTIFIER,))
    buffers = tuple(_read_buffer(source, number, table) for number, table in enumerate(model.tables(4)))
    codes = [_operator_name(table) for table in model.tables(1)]
    subgraphs = tuple(_read_subgraph(table, codes, buffers) for table in model.tables(2))
    return Model(model.integer(0, "I"), model.text(3) or "", subgraphs, buffers)


def _read_buffer(source: Source, number: int, table: Table) -> Buffer:
    """Reads a buffer. Its data lie in the table or, in files over 2 GB, after the flatbuffer."""
    offset, size = table.integer(1, "Q"), table.integer(2, "Q")
    if offset > 1:  # 0 and 1 mark data in the table
        source.require(offset, size, f"the {size} bytes of buffer {number}")
        return Buffer(number, source.view[offset : offset + size])
    data = table.data(0)
    return Buffer(number, memoryview(b"") if data is None else data)


def _operator_name(table: Table) -> tuple[str, bool]:
    """Returns the name of an operator, and whether it is a custom operator."""
    code = max(table.integer(0, "b"), table.integer(3, "i"))  # the older field has one byte
    if code == _CUSTOM:
        return table.text(1) or "CUSTOM", True
    if code not in _BUILTINS:
        raise table.source.error(table.at, "a builtin operator", code)
    return _BUILTINS[code], False


def _read_subgraph(table: Table, codes: list[tuple[str, bool]], buffers: tuple[Buffer, ...]) -> Subgraph:
    tensors = tuple(_read_tensor(index, tensor, buffers) for index, tensor in enumerate(table.tables(0)))
    operators = tuple(_read_operator(operator, codes, tensors) for operator in table.tables(3))
    inputs, outputs = (_read_tensors(table, number, tensors) for number in (1, 2))
    return Subgraph(table.text(4) or "", tensors, inputs, outputs, operators)


def _read_tensor(index: int, table: Table, buffers: tuple[Buffer, ...]) -> FileTensor:
    shape, kind, buffer = table.integers(0), table.integer(1, "b"), table.integer(2, "I")
    if kind not in _TYPES:
        raise table.source.error(table.at, "a tensor type", kind)
    if len(shape) > MAX_RANK or any(size < -1 for size in shape):
        raise table.source.error(table.at, f"at most {MAX_RANK} dimensions of -1 or more", shape)
    if buffer >= max(1, len(buffers)):
        raise table.source.error(table.at, f"a buffer below {len(buffers)}", buffer)
    stored = buffers[buffer] if buffers and len(buffers[buffer].data) else None
    info = FileTensor(
        index, table.text(3) or "", _TYPES[kind], shape, _read_quantization(table.table(4), len(shape)), stored
    )
    is_dense = info.dtype in _WHOLE_BYTES and table.table(6) is None
    if stored is not None and is_dense and len(stored.data) != info.bytes:
        raise table.source.error(table.at, f"a buffer of {info.bytes} bytes for {info.dtype} {shape}", len(stored.data))
    return info


def _read_quantization(table: Table | None, rank: int) -> Quantization | None:
    if table is None:
        return None
    scale = tuple(map(float, table.numbers(2, np.float32)))
    zero_point = table.integers(3, np.int64) or (0,) * len(scale)
    if not scale:
        return None
    if len(zero_point) != len(scale):
        raise table.source.error(table.at, f"{len(scale)} zero points, one for each scale", len(zero_point))
    axis = table.integer(6, "i")
    if len(scale) > MAX_QPARAMS_SHOWN and not 0 <= axis < rank:
        raise table.source.error(table.at, f"a quantized dimension below {rank}", axis)
    return Quantization(scale, zero_point, axis if len(scale) > MAX_QPARAMS_SHOWN else None)


def _read_operator(table: Table, codes: list[tuple[str, bool]], tensors: tuple[FileTensor, ...]) -> Operator:
    code = table.integer(0, "I")
    if code >= len(codes):
        raise table.source.error(table.at, f"an operator code below {len(codes)}", code)
    name, is_custom = codes[code]
    indices = table.integers(1)
    outside = [index for index in indices if not -1 <= index < len(tensors)]
    if outside:
        raise table.source.error(table.at, f"inputs of -1 to {len(tensors) - 1}", outside[0])
    inputs = tuple(None if index == -1 else tensors[index] for index in indices)
    options = table.table(4)
    fields = {} if is_custom or options is None else _OPTIONS.get(name, {})
    attrs = {key: _read_option(options, field) for key, field in fields.items()} if options is not None else {}
    return Operator(name, is_custom, inputs, _read_tensors(table, 2, tensors), attrs, table.at)


def _read_option(options: Table, declared: _Field) -> int | float | bool | str:
    number, form, default = declared
    if isinstance(form, str):
        return options.number(number, form, default)
    value = options.integer(number, "b", int(default))
    if value not in form:
        raise options.source.error(options.at, f"one of {', '.join(form.values())}", value)
    return form[value]


def _read_tensors(table: Table, number: int, tensors: tuple[FileTensor, ...]) -> tuple[FileTensor, ...]:
    indices = table.integers(number)
    outside = [index for index in indices if not 0 <= index < len(tensors)]
    if outside:
        raise table.source.error(table.at, f"tensors below {len(tensors)}", outside[0])
    return tuple(tensors[index] for index in indices)
