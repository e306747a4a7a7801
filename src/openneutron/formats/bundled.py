"""Writes ExecuTorch's bundled programs (`.bpte`): a program with inputs and expected outputs.

The format is devtools/bundled_program/schema/bundled_program_schema.fbs of ExecuTorch 1.5, identifier "BP08".
executorch.devtools writes it, too, but importing that package takes ten seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import flatbuffers  # noqa: TID251  the schema is small, and ExecuTorch's

__all__ = ["BundledTensor", "bundle"]

IDENTIFIER = b"BP08"
VERSION = 2
_DATA_ALIGNMENT = 16
_PROGRAM_ALIGNMENT = 32
_TENSOR, _INT, _BOOL, _DOUBLE = 1, 2, 3, 4


@dataclass(frozen=True)
class BundledTensor:
    """A tensor: ExecuTorch's ScalarType, its sizes, its dim order, and its bytes in that order."""

    scalar_type: int
    sizes: tuple[int, ...]
    dim_order: tuple[int, ...]
    data: bytes


Value = BundledTensor | int | float | bool
Case = tuple[Sequence[Value], Sequence[Value]]


def bundle(program: bytes, method: str, cases: Sequence[Case]) -> bytes:
    """Returns the bytes of a bundled program. A case has a value for each input and for each output of the method."""
    builder = flatbuffers.Builder(len(program) + 1024)
    data = _byte_vector(builder, program, _PROGRAM_ALIGNMENT)
    tests = _vector(builder, [_table(builder, [_values(builder, one) for one in case]) for case in cases])
    name = builder.CreateString(method)
    suites = _vector(builder, [_table(builder, [name, tests])])
    builder.StartObject(3)
    builder.PrependUint32Slot(0, VERSION, 0)
    builder.PrependUOffsetTRelativeSlot(1, suites, 0)
    builder.PrependUOffsetTRelativeSlot(2, data, 0)
    builder.Finish(builder.EndObject(), IDENTIFIER)
    return bytes(builder.Output())


def _values(builder: flatbuffers.Builder, values: Sequence[Value]) -> int:
    return _vector(builder, [_value(builder, value) for value in values])


def _value(builder: flatbuffers.Builder, value: Value) -> int:
    """Writes a `Value`: the number of the member of the union, and the member."""
    if isinstance(value, BundledTensor):
        kind, member = _TENSOR, _tensor(builder, value)
    else:
        kind = _BOOL if isinstance(value, bool) else _INT if isinstance(value, int) else _DOUBLE
        builder.StartObject(1)
        if kind == _BOOL:
            builder.PrependBoolSlot(0, value, False)
        elif kind == _INT:
            builder.PrependInt64Slot(0, value, 0)
        else:
            builder.PrependFloat64Slot(0, value, 0.0)
        member = builder.EndObject()
    builder.StartObject(2)
    builder.PrependUint8Slot(0, kind, 0)
    builder.PrependUOffsetTRelativeSlot(1, member, 0)
    return int(builder.EndObject())


def _tensor(builder: flatbuffers.Builder, value: BundledTensor) -> int:
    data = _byte_vector(builder, value.data, _DATA_ALIGNMENT)
    order = _byte_vector(builder, bytes(value.dim_order), 1)
    builder.StartVector(4, len(value.sizes), 4)
    for size in reversed(value.sizes):
        builder.PrependInt32(size)
    sizes = builder.EndVector()
    builder.StartObject(4)
    builder.PrependInt8Slot(0, value.scalar_type, 0)
    for slot, offset in enumerate((sizes, data, order), 1):
        builder.PrependUOffsetTRelativeSlot(slot, offset, 0)
    return int(builder.EndObject())


def _table(builder: flatbuffers.Builder, offsets: Sequence[int]) -> int:
    """Writes a table whose fields are all offsets."""
    builder.StartObject(len(offsets))
    for slot, offset in enumerate(offsets):
        builder.PrependUOffsetTRelativeSlot(slot, offset, 0)
    return int(builder.EndObject())


def _vector(builder: flatbuffers.Builder, offsets: Sequence[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())


def _byte_vector(builder: flatbuffers.Builder, data: bytes, alignment: int) -> int:
    builder.StartVector(1, len(data), alignment)
    builder.head -= len(data)
    builder.Bytes[builder.head : builder.head + len(data)] = data
    return int(builder.EndVector())
