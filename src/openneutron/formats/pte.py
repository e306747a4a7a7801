"""Reads ExecuTorch programs (`.pte`) and replaces the payloads of their delegates. Checks every offset.

A `.pte` consists of a flatbuffer (schema/program.fbs of ExecuTorch, identifier "ET12") and segments, which hold
constants, payloads of delegates and named data. An extended header (schema/extended_header.h) lies between the
flatbuffer's first eight bytes and its tables: "eh00", the length of the header, the size of the flatbuffer, the offset
of the segments, and the size of the segments.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from openneutron.core.numbers import rounded_up
from openneutron.errors import FormatError
from openneutron.formats.flatbuffer import Source, Table, root

__all__ = [
    "NO_TENSOR",
    "Backend",
    "DelegateCall",
    "Instruction",
    "InstructionKind",
    "KernelCall",
    "Method",
    "Program",
    "ProgramValue",
    "Slot",
    "ValueKind",
    "read",
    "replace_payloads",
]

FILE_IDENTIFIERS = (b"ET12",)
HEADER_AT = 8
HEADER_MAGIC = b"eh00"
HEADER = struct.Struct("<4sIQQ")
HEADER_SEGMENT_SIZE_AT = HEADER_AT + HEADER.size
HEADER_LENGTH_WITH_SEGMENT_SIZE = HEADER.size + 8
INLINE, SEGMENT = 0, 1
LARGEST_ALIGNMENT = 4096

SCALAR_TYPES = {
    0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64", 11: "bool",
    15: "bfloat16",
}  # fmt: skip
"""Names by ExecuTorch's ScalarType (runtime/core/portable_type/scalar_type.h)."""

ITEM_BYTES = {"int16": 2, "int32": 4, "int64": 8, "float16": 2, "float32": 4, "float64": 8, "bfloat16": 2}
"""Bytes of an element by dtype; 1 for any other dtype."""


class ValueKind:
    """Members of the union KernelTypes, by their numbers in the schema."""

    NULL, INT, BOOL, DOUBLE, TENSOR, STRING = 1, 2, 3, 4, 5, 6
    INT_LIST, DOUBLE_LIST, BOOL_LIST, TENSOR_LIST, OPTIONAL_TENSOR_LIST = 7, 8, 9, 10, 11


class InstructionKind:
    """Members of the union InstructionArguments, by their numbers in the schema."""

    KERNEL, DELEGATE, MOVE, JUMP, FREE = 1, 2, 3, 4, 5


NO_TENSOR = -1
"""The index in a list of optional tensors that stands for None."""

_SCALARS = {ValueKind.INT: ("int", "q"), ValueKind.BOOL: ("bool", "?"), ValueKind.DOUBLE: ("float", "d")}
_LISTS = {
    ValueKind.INT_LIST: "ints", ValueKind.DOUBLE_LIST: "doubles", ValueKind.BOOL_LIST: "bools",
    ValueKind.TENSOR_LIST: "tensors", ValueKind.OPTIONAL_TENSOR_LIST: "optional tensors",
}  # fmt: skip
# The dtypes of the items of lists. Those of the other lists are indices of values, int32.
_ITEM_DTYPES = {ValueKind.INT_LIST: np.int64, ValueKind.DOUBLE_LIST: np.float64, ValueKind.BOOL_LIST: np.bool_}
_LISTS_OF_TENSORS = (ValueKind.TENSOR_LIST, ValueKind.OPTIONAL_TENSOR_LIST)
_INSTRUCTIONS = {
    InstructionKind.KERNEL: "kernel", InstructionKind.DELEGATE: "delegate", InstructionKind.MOVE: "move",
    InstructionKind.JUMP: "jump", InstructionKind.FREE: "free",
}  # fmt: skip
_STATIC = 0  # TensorShapeDynamism
_EXTERNAL = 1  # TensorDataLocation


@dataclass(frozen=True)
class ProgramValue:
    """A tensor or constant that a method or a delegate takes or returns."""

    shape: tuple[int, ...]
    dtype: str
    dim_order: tuple[int, ...]
    constant: int | float | bool | str | None = None
    """The value of a constant; its `dtype` is then "int", "bool", "float" or "str"."""


@dataclass(frozen=True)
class KernelCall:
    """A call of a CPU kernel. `name` is that of the operator ("quantized_decomposed::dequantize_per_tensor.out")."""

    name: str
    numbers: tuple[int, ...] = ()
    """Indices of the values in `arguments`, each index once, with the tensors of a list instead of the list."""
    arguments: tuple[int, ...] = ()
    """Indices of the arguments in the order of the operator's schema, then of the results. A list has one index."""


@dataclass(frozen=True)
class DelegateCall:
    """A call of a delegate. `segment` is the segment of its payload; None for a payload in the flatbuffer."""

    backend: str
    compile_specs: Mapping[str, bytes]
    payload: memoryview = field(repr=False)
    segment: int | None
    arguments: tuple[ProgramValue, ...]
    """Inputs of the delegate, followed by its outputs."""
    numbers: tuple[int, ...] = ()
    """Indices of the arguments among the method's values."""
    index: int = 0
    """Index of the delegate in `Method.backends`."""


@dataclass(frozen=True)
class Slot:
    """A value of a method. A tensor has a rank, a dtype and a size, and may lie in planned memory."""

    rank: int | None = None
    """None for a value that is not a tensor."""
    sizes: tuple[int, ...] = ()
    """The shape of a tensor."""
    dtype: str = ""
    bytes: int = 0
    place: tuple[int, int] | None = None
    """The number of a memory buffer and the offset in it; None for a tensor outside of planned memory."""
    has_data: bool = False
    """Whether the program holds values of a tensor: it is a constant, or a state with initial values."""
    kind: str = ""
    """ "tensor", "text", "ints", "doubles", "bools", "tensors" or "optional tensors"; empty for any other value."""
    items: int = 0
    """The length of a list."""
    members: tuple[int, ...] = ()
    """The indices of the tensors of a list, -1 for none."""
    is_resizable: bool = False
    """Whether the shape of a tensor is dynamic; `bytes` is then the upper bound."""
    is_external: bool = False
    """Whether a tensor is a constant that another file holds."""
    constant: int | float | bool | None = None
    """The value of a number or bool; None for any other value."""

    @property
    def is_planned(self) -> bool:
        """Whether a tensor lies in memory that the runtime allocates for the method."""
        return self.place is not None

    @property
    def is_state(self) -> bool:
        """Whether a tensor is a state with initial values, which the program may overwrite."""
        return self.has_data and self.is_planned


@dataclass(frozen=True)
class Instruction:
    """A step of a method. `arguments` are the indices of the values that its call lists, repeated ones too."""

    kind: str
    """ "kernel", "delegate", "move", "jump" or "free"."""
    arguments: tuple[int, ...] = ()


@dataclass(frozen=True)
class Backend:
    """A delegate that the runtime loads with the method."""

    name: str
    compile_specs: int
    payload: memoryview = field(repr=False)


@dataclass(frozen=True)
class Method:
    """A method of the program. `calls` has the order of execution."""

    name: str
    inputs: tuple[ProgramValue, ...]
    outputs: tuple[ProgramValue, ...]
    calls: tuple[KernelCall | DelegateCall, ...]
    delegates: tuple[DelegateCall, ...]
    planned_bytes: tuple[int, ...]
    """Size of each memory buffer that the runtime allocates for the method's tensors."""
    has_state: bool = False
    """Whether the method has states: tensors in planned memory with an initial value."""
    slots: tuple[Slot, ...] = ()
    """All values of the method, by index."""
    input_numbers: tuple[int, ...] = ()
    output_numbers: tuple[int, ...] = ()
    backends: tuple[Backend, ...] = ()
    """The delegates, by the index that calls refer to."""
    chains: tuple[tuple[Instruction, ...], ...] = ()
    """All instructions, by chain."""
    inputs_tree: str | None = None
    """The tree of the model's arguments, as torch.export serializes it."""
    outputs_tree: str | None = None
    """The tree of what the model returns, in the same form."""


@dataclass(frozen=True)
class Segment:
    """A section of the file after the flatbuffer. `offset` is relative to the first segment."""

    offset: int
    size: int
    entry: Table = field(repr=False, compare=False)


@dataclass(frozen=True)
class Program:
    """The contents of a `.pte`."""

    methods: tuple[Method, ...]
    segments: tuple[Segment, ...]
    flatbuffer_bytes: int
    segment_base: int
    """Offset of the first segment in the file."""


def read(data: bytes | memoryview | Source, what: str = "the program") -> Program:
    """Parses a `.pte`. Error messages call the file `what`. A `Source` keeps its parsed tables for other readers.

    Raises `FormatError` with the offset of the first error. Time and memory are bounded by the file's size.
    """
    source = data if isinstance(data, Source) else Source(data, what)
    program = root(source, FILE_IDENTIFIERS)
    flatbuffer_bytes, base = _extended_header(source)
    segments = tuple(_read_segment(source, base, table) for table in program.tables(4))
    reader = _Reader(source, program, segments, base, [table.data(0) for table in program.tables(3)])
    methods = tuple(reader.method(table) for table in program.tables(1))
    if not methods:
        raise source.error(program.at, "a program with a method", "none")
    return Program(methods, segments, flatbuffer_bytes, base)


def replace_payloads(data: bytes, payloads: Mapping[int, bytes], what: str = "the program") -> bytes:
    """Returns the file with new bytes in the segments of `payloads`, by segment index.

    Updates the offsets and sizes of the segments, and copies everything else unchanged. Raises `FormatError` for a
    damaged file and for an unknown segment.
    """
    program = read(data, what)
    segments = program.segments
    if unknown := set(payloads) - set(range(len(segments))):
        raise FormatError(f"{what} has {len(segments)} segments, but no segment {min(unknown)}")
    result = bytearray(data[: program.segment_base])
    alignment = _segment_alignment(program)
    order = sorted(range(len(segments)), key=lambda number: (segments[number].offset, number))
    moved: dict[tuple[int, int], tuple[int, int]] = {}
    end = program.segment_base
    for number in order:
        segment = segments[number]
        key = (segment.offset, segment.size)
        if key not in moved:  # several entries may refer to the same bytes
            start = program.segment_base + segment.offset
            content = payloads.get(number, data[start : start + segment.size])
            at = program.segment_base + rounded_up(end - program.segment_base, alignment)
            result += bytes(at - len(result)) + content
            moved[key] = (at - program.segment_base, len(content))
            end = at + len(content)
        _patch_segment(result, segment.entry, *moved[key])
    _patch_header(result, end - program.segment_base)
    return bytes(result)


def _segment_alignment(program: Program) -> int:
    """Returns the alignment of the segments: the largest power of two that divides all of their offsets."""
    offsets = [program.segment_base, *(segment.offset for segment in program.segments)]
    alignment = LARGEST_ALIGNMENT
    while any(offset % alignment for offset in offsets):
        alignment //= 2
    return alignment


def _patch_segment(result: bytearray, entry: Table, offset: int, size: int) -> None:
    """Sets the fields of a DataSegment. A flatbuffer may omit a field whose value is zero."""
    for number, value in ((0, offset), (1, size)):
        at = entry.where(number)
        if at is None:
            if value:
                raise entry.source.error(entry.at, f"a field for the segment's {('offset', 'size')[number]}", "none")
            continue
        struct.pack_into("<Q", result, at, value)


def _patch_header(result: bytearray, segment_bytes: int) -> None:
    _, length, _, _ = HEADER.unpack_from(result, HEADER_AT)
    if length >= HEADER_LENGTH_WITH_SEGMENT_SIZE:
        struct.pack_into("<Q", result, HEADER_SEGMENT_SIZE_AT, segment_bytes)


def _extended_header(source: Source) -> tuple[int, int]:
    """Returns the size of the flatbuffer and the offset of the segments.

    A file without segments may have no extended header; both numbers are then the file's size.
    """
    size = len(source.view)
    if bytes(source.view[HEADER_AT : HEADER_AT + 4]) != HEADER_MAGIC:
        return size, size
    source.require(HEADER_AT, HEADER.size, "the extended header")
    _, _, flatbuffer_bytes, base = HEADER.unpack_from(source.view, HEADER_AT)
    base = base or flatbuffer_bytes
    if not flatbuffer_bytes <= base <= size:
        raise source.error(HEADER_AT, f"a flatbuffer and segments within the {size} bytes", (flatbuffer_bytes, base))
    return flatbuffer_bytes, base


def _read_segment(source: Source, base: int, table: Table) -> Segment:
    segment = Segment(table.integer(0, "Q"), table.integer(1, "Q"), table)
    if base + segment.offset + segment.size > len(source.view):
        raise source.error(table.at, f"a segment within the file's {len(source.view)} bytes", segment)
    return segment


def _is_state(value: Table) -> bool:
    """Whether a value is a tensor with an initial value in planned memory."""
    tensor = value.table(1) if value.integer(0, "B") == ValueKind.TENSOR else None
    return tensor is not None and tensor.integer(5, "I") > 0 and tensor.table(6) is not None


def _read_slots(values: Sequence[Table]) -> tuple[Slot, ...]:
    """Returns the slots of `values`. Linear in bytes, even if a damaged file has many values at one offset."""
    known: dict[int, Slot] = {}
    return tuple(known.get(table.at) or known.setdefault(table.at, _read_slot(table)) for table in values)


def _read_slot(table: Table) -> Slot:
    kind, value = table.integer(0, "B"), table.table(1)
    if kind in _SCALARS and value is not None:
        return Slot(constant=value.number(0, _SCALARS[kind][1]))
    if value is None or kind != ValueKind.TENSOR:
        items = value.count(0, _ITEM_DTYPES.get(kind, np.int32)) if value is not None and kind in _LISTS else 0
        members = value.integers(0) if value is not None and kind in _LISTS_OF_TENSORS else ()
        return Slot(kind="text" if kind == ValueKind.STRING else _LISTS.get(kind, ""), items=items, members=members)
    sizes, place, extra = value.integers(2), _read_place(value.table(6)), value.table(9)
    dtype = SCALAR_TYPES.get(value.integer(0, "b"), "")
    return Slot(
        rank=len(sizes),
        sizes=sizes,
        dtype=dtype,
        bytes=math.prod(sizes) * ITEM_BYTES.get(dtype, 1),
        place=place,
        has_data=value.integer(5, "I") > 0,
        kind="tensor",
        is_resizable=value.integer(8, "b") != _STATIC,
        is_external=extra is not None and extra.integer(2, "b") == _EXTERNAL and place is None,
    )


def _read_place(allocation: Table | None) -> tuple[int, int] | None:
    """Returns the buffer and the offset of an AllocationDetails; None if there is none."""
    if allocation is None:
        return None
    return allocation.integer(0, "I"), allocation.integer(1, "I") | allocation.integer(2, "I") << 32


def _read_instructions(tables: Iterable[Table]) -> tuple[Instruction, ...]:
    """Returns the instructions of a chain. Linear in bytes, even if a damaged file has many of them at one offset."""
    known: dict[int, Instruction] = {}
    return tuple(known.get(table.at) or known.setdefault(table.at, _read_instruction(table)) for table in tables)


def _read_instruction(table: Table) -> Instruction:
    kind, arguments = table.integer(0, "B"), table.table(1)
    is_call = arguments is not None and kind in (InstructionKind.KERNEL, InstructionKind.DELEGATE)
    return Instruction(_INSTRUCTIONS.get(kind, ""), arguments.integers(1) if arguments is not None and is_call else ())


@dataclass(frozen=True)
class _Reader:
    source: Source
    program: Table
    segments: tuple[Segment, ...]
    base: int
    inline: list[memoryview | None]

    def method(self, plan: Table) -> Method:
        values = list(plan.tables(2))
        operators = [f"{table.text(0) or ''}.{table.text(1) or ''}".removesuffix(".") for table in plan.tables(6)]
        backends = list(plan.tables(7))
        calls = list(self._read_calls(plan, values, operators, backends))
        called = tuple(call for call in calls if isinstance(call, DelegateCall))
        containers = plan.table(1)
        return Method(
            name=plan.text(0) or "",
            inputs=tuple(self._read_values(plan, plan.integers(3), values)),
            outputs=tuple(self._read_values(plan, plan.integers(4), values)),
            calls=tuple(calls),
            delegates=called,
            planned_bytes=plan.integers(8, "int64")[1:],  # the first entry is reserved for constants
            has_state=any(map(_is_state, values)),
            slots=_read_slots(values),
            input_numbers=plan.integers(3),
            output_numbers=plan.integers(4),
            backends=tuple(map(self._read_backend, backends)),
            chains=tuple(_read_instructions(chain.tables(2)) for chain in plan.tables(5)),
            inputs_tree=None if containers is None else containers.text(0),
            outputs_tree=None if containers is None else containers.text(1),
        )

    def _read_calls(
        self, plan: Table, values: list[Table], operators: list[str], backends: list[Table]
    ) -> Iterator[KernelCall | DelegateCall]:
        for chain in plan.tables(5):
            for instruction in chain.tables(2):
                kind, arguments = instruction.integer(0, "B"), instruction.table(1)
                if arguments is None or kind not in (InstructionKind.KERNEL, InstructionKind.DELEGATE):
                    continue
                number = arguments.integer(0, "i")
                known = operators if kind == InstructionKind.KERNEL else backends
                if not 0 <= number < len(known):
                    raise self.source.error(arguments.at, f"an index below {len(known)}", number)
                if kind == InstructionKind.KERNEL:
                    given = arguments.integers(1)
                    yield KernelCall(operators[number], tuple(self._flatten_indices(plan, given, values)), given)
                else:
                    yield self._read_delegate(number, backends, plan, arguments.integers(1), values)

    def _flatten_indices(self, plan: Table, numbers: tuple[int, ...], values: list[Table]) -> Iterator[int]:
        """Returns the value indices `numbers` without duplicates. Replaces a list by the indices of its tensors."""
        self._check_indices(plan, numbers, values)
        for number in dict.fromkeys(numbers):
            value = values[number].table(1)
            if value is not None and values[number].integer(0, "B") in _LISTS_OF_TENSORS:
                items = tuple(item for item in value.integers(0) if item != NO_TENSOR)
                self._check_indices(plan, items, values)
                yield from items
            else:
                yield number

    def _check_indices(self, plan: Table, numbers: tuple[int, ...], values: list[Table]) -> None:
        for number in numbers:
            if not 0 <= number < len(values):
                raise self.source.error(plan.at, f"a value below {len(values)}", number)

    def _read_backend(self, table: Table) -> Backend:
        payload, _ = self._read_payload(table)
        return Backend(table.text(0) or "", table.count(2, np.int32), payload)

    def _read_payload(self, table: Table) -> tuple[memoryview, int | None]:
        """Returns the payload of a delegate, and its segment."""
        reference = table.table(1)
        if reference is None:
            raise self.source.error(table.at, "a payload", "none")
        location, index = reference.integer(0, "b"), reference.integer(1, "I")
        known = len(self.segments) if location == SEGMENT else len(self.inline)
        if location not in (INLINE, SEGMENT) or index >= known:
            raise self.source.error(reference.at, f"a payload below {known}", (location, index))
        if location == INLINE:
            return self.inline[index] or memoryview(b""), None
        start = self.base + self.segments[index].offset
        return self.source.view[start : start + self.segments[index].size], index

    def _read_delegate(
        self, index: int, backends: list[Table], plan: Table, numbers: tuple[int, ...], values: list[Table]
    ) -> DelegateCall:
        table = backends[index]
        specs = {spec.text(0) or "": bytes(spec.data(1) or b"") for spec in table.tables(2)}
        payload, segment = self._read_payload(table)
        arguments = tuple(self._read_values(plan, numbers, values))
        return DelegateCall(table.text(0) or "", specs, payload, segment, arguments, numbers, index)

    def _read_values(self, plan: Table, indices: tuple[int, ...], values: list[Table]) -> Iterator[ProgramValue]:
        self._check_indices(plan, indices, values)
        for index in indices:
            yield self._read_value(values[index])

    def _read_value(self, table: Table) -> ProgramValue:
        kind, value = table.integer(0, "B"), table.table(1)
        if value is None or kind == ValueKind.NULL:
            return ProgramValue((), "none", ())
        if kind == ValueKind.TENSOR:
            dtype = SCALAR_TYPES.get(value.integer(0, "b"), f"type {value.integer(0, 'b')}")
            return ProgramValue(value.integers(2), dtype, value.integers(3, "uint8"))
        if kind == ValueKind.STRING:
            return ProgramValue((), "str", (), value.text(0) or "")
        if kind in _SCALARS:
            name, code = _SCALARS[kind]
            return ProgramValue((), name, (), value.number(0, code))
        return ProgramValue((), "list", ())
