"""Checks the TFLite model of a portable payload before LiteRT reads it.

LiteRT trusts the flatbuffer: a wrong offset, index, shape or option can end the process. So a payload may contain only
what this project writes: one subgraph of the operators in `ir/kinds.py`, with static shapes, and no other fields of
TFLite's schema. `operator_rules.py` has the rule of each operator.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema  # noqa: TID251

from openneutron.formats.flatbuffer import Source, Table, root
from openneutron.formats.flatbuffer_tables import Tables, read_tables, tables_at
from openneutron.formats.tflite.operator_columns import (
    ALIGNED,
    Bools,
    Columns,
    Numbers,
    Options,
    Reads,
    are_usual,
    have_known_shapes,
)
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
_BEFORE, _NEVER = -1, np.iinfo(np.int64).max
"""Stand for the operator that writes a tensor: constants and inputs have values before the first one."""
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


def _check_tensors(tables: Tables, data_at: Sequence[int], data_bytes: Sequence[int]) -> Columns:
    """Returns the tensors of the graph. `data_at` and `data_bytes` are the offset and size of each buffer."""
    tables.allow_only(*_TENSOR_FIELDS)
    tables.check_texts(3)
    counts, smallest, largest, axes = _check_quantization(tables)
    types, buffers = tables.numbers(1, "<i1"), tables.numbers(2, "<u4")
    is_int8, is_int32 = types == schema.TensorType.INT8, types == schema.TensorType.INT32
    _refuse(tables, ~(is_int8 | is_int32), lambda row: (f"a tensor of {' or '.join(ITEM_BYTES)}", f"type {types[row]}"))
    sizes, ranks = tables.values(0, "<i4")
    # before the product, whose time is quadratic in the rank
    _refuse(tables, ranks > MAX_RANK, lambda row: (f"at most {MAX_RANK} dimensions", ranks[row]))
    flat, ends = sizes.tolist(), np.cumsum(ranks).tolist()

    def shape(row: int) -> tuple[int, ...]:
        return tuple(flat[ends[row] - int(ranks[row]) : ends[row]])

    aligned = _aligned(sizes, ranks)
    elements = aligned.astype(np.float64).prod(1)  # exact below 2^53
    for row in np.nonzero(ranks > ALIGNED)[0].tolist():
        elements[row] = float(min(math.prod(shape(row)), LARGEST_TENSOR + 1))
    bytes_of = np.minimum(elements, LARGEST_TENSOR + 1).astype(np.int64) * np.where(is_int32, 4, 1)
    # The new shape of a RESHAPE to a scalar is an empty int32 constant.
    below = np.zeros(len(tables), bool)
    below[np.repeat(np.arange(len(tables)), ranks)[sizes < np.repeat(np.where(is_int32, 0, 1), ranks)]] = True
    _refuse(
        tables,
        below | (bytes_of > LARGEST_TENSOR),
        lambda row: ("dimensions of 1 or more, and at most 2 GB", shape(row)),
    )
    _refuse(tables, buffers >= max(1, len(data_at)), lambda row: (f"a buffer below {len(data_at)}", buffers[row]))
    stored = np.array(data_bytes or [0], np.int64)[buffers]
    _refuse(
        tables,
        (stored > 0) & (stored != bytes_of),
        lambda row: (f"a buffer of {bytes_of[row]} bytes for {_TYPES[types[row]]} {shape(row)}", stored[row]),
    )
    for row in np.nonzero(counts > 1)[0].tolist():
        own, axis, scales = shape(row), int(axes[row]), int(counts[row])
        if not (0 <= axis < len(own) and own[axis] == scales):
            expected = f"{scales} scales for one dimension of {own}"
            raise tables.source.error(int(tables.at[row]), expected, f"dimension {axis}")
    starts = np.where(stored > 0, np.array(data_at or [0], np.int64)[buffers], np.where(bytes_of > 0, -1, 0))
    qparams = list(zip(*(column.tolist() for column in (counts, smallest, largest, axes)), strict=True))

    @functools.cache
    def operand(row: int) -> Operand:
        start = int(starts[row])
        dtype = "INT8" if is_int8[row] else "INT32"
        return Operand(row, shape(row), dtype, tables.source, None if start < 0 else start, *qparams[row])

    is_constant = (stored > 0) | (bytes_of == 0)
    return Columns(operand, is_int8, is_constant, ranks, aligned, counts, axes, smallest, largest)


def _aligned(sizes: Numbers, ranks: Numbers) -> Numbers:
    """Returns sizes [tensor, `ALIGNED`] of tensors of at most that many dimensions, after sizes of 1; zeros for others.

    `sizes` has the sizes of all tensors one after the other.
    """
    aligned = np.ones((len(ranks), ALIGNED), np.int64)
    aligned[ranks > ALIGNED] = 0
    few = np.repeat(ranks <= ALIGNED, ranks)
    from_end = np.repeat(np.cumsum(ranks), ranks) - np.arange(len(sizes))
    aligned[np.repeat(np.arange(len(ranks)), ranks)[few], ALIGNED - from_end[few]] = sizes[few]
    return aligned


def _refuse(tables: Tables, wrong: Bools, fault: Callable[[int], tuple[str, object]]) -> None:
    """Raises `FormatError` for the first table that is wrong. `fault` returns what is expected there, and found."""
    if wrong.any():
        row = int(wrong.argmax())
        raise tables.source.error(int(tables.at[row]), *fault(row))


def _check_quantization(tensors: Tables) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Returns, for each tensor, the number of scales, the smallest and largest scale, and the quantized dimension."""
    source = tensors.source
    at = tensors.targets(4)
    (present,) = np.nonzero(at)
    result = (np.zeros(len(at), np.int64), np.zeros(len(at)), np.zeros(len(at)), np.zeros(len(at), np.int64))
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
        raise source.error(int(tables.at[0]), "scales of all tensors from 2^-126 to 2^107", found)
    if zero_points.min() < -128 or zero_points.max() > 127:
        found = f"{zero_points.min()} to {zero_points.max()}"
        raise source.error(int(tables.at[0]), "zero points of all tensors from -128 to 127", found)
    (rows,) = np.nonzero(counts)
    starts = (np.cumsum(counts) - counts)[rows]
    columns = (counts[rows], np.minimum.reduceat(scales, starts), np.maximum.reduceat(scales, starts),
               tables.numbers(6, "<i4")[rows])  # fmt: skip
    for column, values in zip(result, columns, strict=True):
        column[present[rows]] = values
    return result


def _check_operators(source: Source, graph: Table, codes: Sequence[tuple[str, Rule]], tensors: Columns) -> None:
    count = len(tensors.is_int8)
    writers = np.where(tensors.is_constant, _BEFORE, _NEVER)  # for each tensor, the operator that writes it
    for index in _indices(source, graph.at, graph.integers(1), count):
        if writers[index] == _BEFORE:
            raise source.error(graph.at, "inputs that are neither constants nor listed twice", f"tensor {index}")
        writers[index] = _BEFORE
    tables = read_tables(graph, 3)
    tables.allow_only(*_OPERATOR_FIELDS)
    numbers, kinds = tables.numbers(0, "<u4"), tables.numbers(3, "<u1")
    _check_kinds(tables, codes, numbers, kinds)
    names = [codes[number][0] for number in numbers.tolist()]
    read, counts = _operand_indices(tables, 1, count)
    written, results = _operand_indices(tables, 2, count)
    _refuse(tables, results != 1, lambda row: (f"one output of {names[row]}", results[row]))
    _, first = np.unique(written, return_index=True)
    again = np.ones(len(tables), bool)
    again[first] = False
    _refuse(
        tables,
        again | (writers[written] == _BEFORE),
        lambda row: (f"an output of {names[row]} that was not written before", f"tensor {written[row]}"),
    )
    writers[written] = np.arange(len(tables))
    rows, ends = np.repeat(np.arange(len(tables)), counts), np.cumsum(counts)
    late = rows[writers[read] >= rows]
    if len(late):
        row = int(late[0])
        sources = read[ends[row] - counts[row] : ends[row]].tolist()
        raise source.error(
            int(tables.at[row]), f"inputs of {names[row]} that were written before", f"tensors {sources}"
        )
    reads = Reads(read, rows, ends - counts, counts)
    options = _options(tables, codes, numbers, kinds)
    operators_of = {name: np.nonzero(numbers == number)[0] for number, (name, _) in enumerate(codes)}
    usual = are_usual(tensors, numbers, codes, reads, written)
    known = usual & have_known_shapes(tensors, operators_of, reads, written, options)
    for operator in np.nonzero(~known)[0].tolist():
        name, rule = codes[numbers[operator]]
        inputs = list(map(tensors.operand, read[ends[operator] - counts[operator] : ends[operator]].tolist()))
        output, values = tensors.operand(int(written[operator])), options.values[options.of_operators[operator]]
        call = Call(source, int(tables.at[operator]), name, inputs, output, values)
        rule.check(call, is_usual=bool(usual[operator]))
    returned = _indices(source, graph.at, graph.integers(2), count)
    unwritten = next((index for index in returned if writers[index] == _NEVER or tensors.is_constant[index]), None)
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


def _options(tables: Tables, codes: Sequence[tuple[str, Rule]], numbers: Numbers, kinds: Numbers) -> Options:
    """Returns the options of all operators. Raises `FormatError` for the first ones that are wrong."""
    at = tables.targets(4)
    _refuse(tables, (at == 0) & (kinds != 0), lambda row: (f"the options of {codes[numbers[row]][0]}", "none"))
    (present,) = np.nonzero(at)
    options = tables_at(tables.source, at[present])
    rows = np.full(len(tables), -1)
    rows[present] = np.arange(len(present))
    known: dict[object, int] = {}
    found: list[Sequence[Any]] = []
    indices = []
    for operator, (number, row) in enumerate(zip(numbers.tolist(), rows.tolist(), strict=True)):
        key = number, None if row < 0 else options.content(row)
        index = known.setdefault(key, len(found))
        if index == len(found):  # others have different options
            name, rule = codes[number]
            values = rule.defaults if row < 0 else options.scalars(row, rule.fields)
            fault = rule.fault_of_options(values, frozenset() if row < 0 else options.fields_of(row))
            if fault is not None:
                expected, wrong = fault
                raise tables.source.error(int(tables.at[operator]), f"{expected} of {name}", wrong)
            found.append(values)
        indices.append(index)
    return Options(found, np.array(indices, np.int64))


def _operand_indices(tables: Tables, field: int, count: int) -> tuple[Numbers, Numbers]:
    """Returns the tensors in a field of all operators, and their number for each operator.

    Raises `FormatError` for an index that is not below `count`.
    """
    found, counts = tables.values(field, "<i4")
    outside = np.zeros(len(tables), bool)
    outside[np.repeat(np.arange(len(tables)), counts)[(found < 0) | (found >= count)]] = True
    ends = np.cumsum(counts)

    def fault(row: int) -> tuple[str, object]:
        own = found[ends[row] - counts[row] : ends[row]]
        return f"tensors below {count}", f"{own.min()} to {own.max()}"

    _refuse(tables, outside, fault)
    return found, counts


def _indices(source: Source, at: int, numbers: Sequence[int], count: int) -> Sequence[int]:
    if numbers and not (min(numbers) >= 0 and max(numbers) < count):
        raise source.error(at, f"tensors below {count}", f"{min(numbers)} to {max(numbers)}")
    return numbers
