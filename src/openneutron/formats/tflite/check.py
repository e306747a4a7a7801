"""Checks the TFLite model of a portable payload before LiteRT reads it.

LiteRT trusts the flatbuffer: a wrong offset, index, shape or option can end the process. So a payload may contain only
what this project writes: one subgraph of the operators in `ir/kinds.py`, with static shapes, and no other fields of
TFLite's schema. `operator_rules.py` has the rule of each operator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema  # noqa: TID251

from openneutron.formats.flatbuffer import Source, Table, root
from openneutron.formats.flatbuffer_tables import Tables, read_tables, tables_at
from openneutron.formats.tflite.operator_rules import ITEM_BYTES, RULES, Call, Operand, Rule
from openneutron.formats.tflite.read import MAX_RANK, Model, read
from openneutron.formats.tflite.write import FILE_IDENTIFIER
from openneutron.ir.kinds import KINDS
from openneutron.ir.scales import LARGEST_SCALE, LEAST_SCALE

__all__ = ["LARGEST_TENSOR", "check", "read_checked"]

LARGEST_TENSOR = 1 << 31
"""The limit of the size of a tensor, in bytes."""
# Fields by their numbers in the schema: version, operator codes, subgraphs, description, buffers.
_MODEL_FIELDS = (0, 1, 2, 3, 4)
_SUBGRAPH_FIELDS = (0, 1, 2, 3, 4)  # tensors, inputs, outputs, operators, name
_TENSOR_FIELDS = (0, 1, 2, 3, 4)  # shape, type, buffer, name, quantization
_QUANTIZATION_FIELDS = (2, 3, 6)  # scale, zero point, quantized dimension
_CODE_FIELDS = (0, 2, 3)  # deprecated code, version, code
_OPERATOR_FIELDS = (0, 1, 2, 3, 4)  # code, inputs, outputs, type of options, options
_BUFFER_FIELDS = (0,)  # data
_TYPES = {schema.TensorType.INT8: "INT8", schema.TensorType.INT32: "INT32"}
_NAMES = {getattr(schema.BuiltinOperator, name): name for name in KINDS}
_OPTIONS = {
    name: 0 if kind.options is None else getattr(schema.BuiltinOptions, kind.options) for name, kind in KINDS.items()
}


def check(data: bytes | memoryview, what: str = "the TFLite model of a payload") -> None:
    """Raises `FormatError`, with the offset, unless LiteRT can safely read and run the model.

    Checks every offset; that there are no tables and fields besides those that `write` writes; the shape, dtype,
    qparams and data of each tensor; that operators read only tensors that were written before, and write each tensor
    once; the operands, options and output shape of each operator, by its rule. Linear in bytes.
    """
    source = Source(data, what)
    model = root(source, (FILE_IDENTIFIER,))
    _allow_only(model, _MODEL_FIELDS)
    codes = _check_codes(read_tables(model, 1))
    buffers = read_tables(model, 4)
    buffers.allow_only(*_BUFFER_FIELDS)
    subgraphs = list(model.tables(2))
    if len(subgraphs) != 1:
        raise source.error(model.at, "one subgraph", len(subgraphs))
    (graph,) = subgraphs
    _allow_only(graph, _SUBGRAPH_FIELDS)
    _check_text(graph, 4)
    operands = _check_tensors(read_tables(graph, 0), *buffers.vectors(0, 1))
    _check_operators(source, graph, codes, operands)


def read_checked(data: bytes | memoryview, what: str = "the TFLite model of a payload") -> Model:
    """Parses the TFLite model of a portable payload. Raises `FormatError` as `check`."""
    check(data, what)
    return read(data, what)


def _allow_only(table: Table, fields: Sequence[int]) -> None:
    other = next((field for field, place in enumerate(table.fields) if place and field not in fields), None)
    if other is not None:
        raise table.source.error(table.at, f"a table with no other fields than {fields}", f"field {other}")


def _check_text(table: Table, field: int) -> None:
    """Raises `FormatError` unless a text is followed by a zero byte. A text may be absent."""
    start, text = table.data_at(field), table.data(field)
    if start is not None and text is not None:
        table.source.integer(start + len(text), "B", "the zero byte after a text")
        if table.source.view[start + len(text)]:
            raise table.source.error(
                start + len(text), "the zero byte after a text", table.source.view[start + len(text)]
            )


def _check_codes(tables: Tables) -> list[tuple[str, Rule]]:
    """Returns the name and the rule of each operator code."""
    tables.allow_only(*_CODE_FIELDS)
    older, newer = tables.numbers(0, "<i1"), tables.numbers(3, "<i4")
    codes = []
    for at, number in zip(tables.at.tolist(), np.maximum(older, newer).tolist(), strict=True):
        name = _NAMES.get(number)
        if name is None:
            raise tables.source.error(at, "an operator that OpenNeutron writes", f"builtin operator {number}")
        codes.append((name, RULES[name]))
    return codes


def _check_tensors(tables: Tables, data_at: Sequence[int], data_bytes: Sequence[int]) -> list[Operand]:
    """Returns the tensors of the graph. `data_at` and `data_bytes` are the offset and size of each buffer."""
    source = tables.source
    tables.allow_only(*_TENSOR_FIELDS)
    tables.check_texts(3)
    qparams = _check_quantization(tables)
    types, buffers = tables.numbers(1, "<i1").tolist(), tables.numbers(2, "<u4").tolist()
    operands = []
    for index, (at, sizes) in enumerate(zip(tables.at.tolist(), tables.lists(0, "<i4"), strict=True)):
        shape, rank = tuple(sizes), len(sizes)
        dtype = _TYPES.get(types[index], "")
        if not dtype:
            raise source.error(at, f"a tensor of {' or '.join(_TYPES.values())}", f"type {types[index]}")
        if rank > MAX_RANK:  # before the product, whose time is quadratic in the rank
            raise source.error(at, f"at most {MAX_RANK} dimensions", rank)
        size = ITEM_BYTES[dtype] * math.prod(shape)
        least = 0 if dtype == "INT32" else 1  # the new shape of a RESHAPE to a scalar is an empty int32 constant
        if (rank and min(shape) < least) or size > LARGEST_TENSOR:
            raise source.error(at, "dimensions of 1 or more, and at most 2 GB", shape)
        buffer = buffers[index]
        if buffer >= max(1, len(data_at)):
            raise source.error(at, f"a buffer below {len(data_at)}", buffer)
        stored = data_bytes[buffer] if data_bytes else 0
        if stored and stored != size:
            raise source.error(at, f"a buffer of {size} bytes for {dtype} {shape}", stored)
        scales, smallest, largest, axis = qparams[index]
        if scales > 1 and not (0 <= axis < rank and shape[axis] == scales):
            raise source.error(at, f"{scales} scales for one dimension of {shape}", f"dimension {axis}")
        values = data_at[buffer] if stored else (None if size else 0)
        operands.append(Operand(index, shape, dtype, source, values, scales, smallest, largest, axis))
    return operands


def _check_quantization(tensors: Tables) -> list[tuple[int, float, float, int]]:
    """Returns, for each tensor, the number of scales, the smallest and largest scale, and the quantized dimension."""
    source = tensors.source
    at = tensors.targets(4)
    (present,) = np.nonzero(at)
    result = [(0, 0.0, 0.0, 0)] * len(at)
    tables = tables_at(source, at[present])
    tables.allow_only(*_QUANTIZATION_FIELDS)
    scales, counts = tables.values(2, "<f4")
    zero_points, zero_point_counts = tables.values(3, "<i8")
    (unequal,) = np.nonzero(counts != zero_point_counts)
    if len(unequal):
        row = unequal[0]
        raise source.error(int(tables.at[row]), f"{counts[row]} zero points, one a scale", zero_point_counts[row])
    if not len(scales):
        return result
    if not (scales.min() >= LEAST_SCALE and scales.max() <= LARGEST_SCALE):  # false for NaN, too
        found = f"{scales.min()} to {scales.max()}"
        raise source.error(int(tables.at[0]), "scales of all tensors from 2^-126 to 2^126", found)
    if zero_points.min() < -128 or zero_points.max() > 127:
        found = f"{zero_points.min()} to {zero_points.max()}"
        raise source.error(int(tables.at[0]), "zero points of all tensors from -128 to 127", found)
    (rows,) = np.nonzero(counts)
    starts = (np.cumsum(counts) - counts)[rows]
    smallest, largest = np.minimum.reduceat(scales, starts).tolist(), np.maximum.reduceat(scales, starts).tolist()
    axes = tables.numbers(6, "<i4")[rows].tolist()
    read = zip(counts[rows].tolist(), smallest, largest, axes, strict=True)
    for index, qparams in zip(present[rows].tolist(), read, strict=True):
        result[index] = qparams
    return result


def _check_operators(source: Source, graph: Table, codes: Sequence[tuple[str, Rule]], operands: list[Operand]) -> None:
    written = bytearray(operand.values_at is not None for operand in operands)
    for index in _indices(source, graph.at, graph.integers(1), len(operands)):
        if written[index]:
            raise source.error(graph.at, "inputs that are neither constants nor listed twice", f"tensor {index}")
        written[index] = True
    tables = read_tables(graph, 3)
    tables.allow_only(*_OPERATOR_FIELDS)
    numbers, kinds = tables.numbers(0, "<u4"), tables.numbers(3, "<u1")
    _check_kinds(tables, codes, numbers, kinds)
    inputs, outputs = (_operand_lists(tables, field, len(operands)) for field in (1, 2))
    options_at = tables.targets(4)
    (present,) = np.nonzero(options_at)
    options = tables_at(source, options_at[present])
    rows: list[int | None] = [None] * len(tables)
    for row, position in enumerate(present.tolist()):
        rows[position] = row
    read = zip(tables.at.tolist(), numbers.tolist(), kinds.tolist(), inputs, outputs, rows, strict=True)
    for at, number, kind, sources, results, row in read:
        name, rule = codes[number]
        if len(results) != 1:
            raise source.error(at, f"one output of {name}", len(results))
        for index in sources:
            if not written[index]:
                raise source.error(at, f"inputs of {name} that were written before", f"tensors {sources}")
        (result,) = results
        if written[result]:
            raise source.error(at, f"an output of {name} that was not written before", f"tensor {result}")
        written[result] = True
        if row is None and kind:
            raise source.error(at, f"the options of {name}", "none")
        rule.check(Call(source, at, name, [operands[index] for index in sources], operands[result], options, row))
    returned = _indices(source, graph.at, graph.integers(2), len(operands))
    unwritten = next((index for index in returned if not written[index] or operands[index].values_at is not None), None)
    if unwritten is not None or not returned:
        raise source.error(graph.at, "outputs that an operator writes", f"tensor {unwritten}")


def _check_kinds(
    tables: Tables, codes: Sequence[tuple[str, Rule]], numbers: npt.NDArray[Any], kinds: npt.NDArray[Any]
) -> None:
    """Raises `FormatError` for a number of an operator code, or a type of options, that is wrong."""
    (outside,) = np.nonzero(numbers >= len(codes))
    if len(outside):
        row = outside[0]
        raise tables.source.error(int(tables.at[row]), f"an operator code below {len(codes)}", numbers[row])
    if not codes:
        return  # and no operators
    expected = np.array([_OPTIONS[name] for name, _ in codes])[numbers]
    (wrong,) = np.nonzero(kinds != expected)
    if len(wrong):
        row = wrong[0]
        name = codes[numbers[row]][0]
        raise tables.source.error(int(tables.at[row]), f"options of type {expected[row]} for {name}", kinds[row])


def _operand_lists(tables: Tables, field: int, count: int) -> list[list[int]]:
    """Returns the tensors in a field of each operator. Raises `FormatError` for a number that is not below `count`."""
    lists = tables.lists(field, "<i4")
    for at, numbers in zip(tables.at.tolist(), lists, strict=True):
        _indices(tables.source, at, numbers, count)
    return lists


def _indices(source: Source, at: int, numbers: Sequence[int], count: int) -> Sequence[int]:
    if numbers and not (min(numbers) >= 0 and max(numbers) < count):
        raise source.error(at, f"tensors below {count}", f"{min(numbers)} to {max(numbers)}")
    return numbers
