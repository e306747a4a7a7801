"""Checks those contents of a `.pte` that ExecuTorch's runtime does not check itself.

ExecuTorch verifies the flatbuffer of a program. It does not verify that an instruction has the arguments that its
kernel reads, that these arguments have memory, or that a method ends. A damaged file can therefore crash the process.
The numbers of fields and of union members are defined by ExecuTorch's schema/program.fbs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from openneutron.formats.flatbuffer import Source, Table, root
from openneutron.formats.pte import FILE_IDENTIFIERS, NO_TENSOR, InstructionKind, ValueKind

__all__ = ["KernelSignature", "check"]


_LISTS_OF_VALUES = (ValueKind.INT_LIST, ValueKind.TENSOR_LIST, ValueKind.OPTIONAL_TENSOR_LIST)
# The vectors and texts of an ExecutionPlan and a Chain that the runtime reads even if the file lacks them.
_PLAN_FIELDS = (0, 2, 3, 4, 5, 6, 7, 8)
_INSTRUCTIONS = 2

# Bytes of an element by the number of ScalarType (runtime/core/portable_type/scalar_type.h). The runtime's kernels
# support no other type.
_ELEMENT_BYTES = {
    0: 1, 1: 1, 2: 2, 3: 4, 4: 8, 5: 2, 6: 4, 7: 8, 11: 1, 12: 1, 13: 1, 14: 4, 15: 2, 16: 1, 17: 2, 23: 1, 24: 1,
    25: 1, 26: 1, 27: 2, 28: 4, 29: 8,
}  # fmt: skip
_FLOATS = frozenset({5, 6, 7})
# The smallest and largest integer of the dtypes of quantized tensors.
_INTEGER_LIMITS = {0: (0, 255), 1: (-128, 127), 2: (-(1 << 15), (1 << 15) - 1), 3: (-(1 << 31), (1 << 31) - 1)}
_QUANT_MIN, _QUANT_MAX, _DTYPE, _OUT_DTYPE = 3, 4, 5, 6  # positions of arguments
LARGEST_UNUSED_SHARE = 4
"""A memory buffer may be larger than the part that its tensors use by this factor, plus `SMALL_BUFFER` bytes."""
SMALL_BUFFER = 1 << 20
LARGEST_TENSOR = 1 << 31
"""Bytes. ExecuTorch's strides are int32, and the runtime ends the process if a size overflows."""
LARGEST_RANK = 16
"""The largest rank of a tensor in ExecuTorch (`kTensorDimensionLimit`)."""


@dataclass(frozen=True)
class KernelSignature:
    """The arguments that a CPU kernel reads."""

    kinds: tuple[frozenset[int], ...]
    """For each argument, the kinds of values (`ValueKind`) that the kernel accepts."""
    written: frozenset[int] = frozenset()
    """The positions of the arguments that the kernel writes to."""
    quantized: int | None = None
    """The position of the integer tensor of a kernel that quantizes or dequantizes per tensor.

    Such a kernel has the arguments (input, scale, zero point, smallest and largest integer, dtype, ..., out). It aborts
    the process if the integers are not in the range of the dtype.
    """


Signatures = Callable[[str], KernelSignature | None]
"""Returns the signature of a kernel ("aten::add.out"); None if it is unknown."""


def check(data: bytes | memoryview | Source, signatures: Signatures, what: str = "the program") -> None:
    """Raises `FormatError`, with the offset, if ExecuTorch's runtime could access memory outside of its buffers.

    Checks, for each method: the indices of values, operators, delegates, segments and buffers; the shape, dtype and dim
    order of each tensor; that each tensor lies within its planned buffer or segment; that each kernel call has the
    arguments of its signature, with memory, and writes only to planned memory or an input; that each jump goes forward.
    For the arguments of a kernel without a signature, checks only the indices. `pte.read` checks the segments and
    the payloads of delegates. Time is linear in the file's size.
    """
    source = data if isinstance(data, Source) else Source(data, what)
    program = root(source, FILE_IDENTIFIERS)
    storage = _Storage.of(source, program)
    for plan in program.tables(1):
        _MethodCheck(source, plan, storage, signatures).run()


@dataclass(frozen=True)
class _Storage:
    """For each constant and each initial value: the bytes from its start to the end of its segment."""

    constants: tuple[int, ...]
    initial_values: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, source: Source, program: Table) -> _Storage:
        segments = tuple(segment.integer(1, "Q") for segment in program.tables(4))
        inline = tuple(len(buffer.data(0) or b"") for buffer in program.tables(2))
        constants = program.table(5)
        offsets = () if constants is None else _subsegments(source, constants, segments)
        return cls(offsets or inline, tuple(_subsegments(source, table, segments) for table in program.tables(6)))


def _subsegments(source: Source, table: Table, segments: Sequence[int]) -> tuple[int, ...]:
    """Returns the bytes from each offset of a SubsegmentOffsets to the end of its segment."""
    offsets = table.integers(1, "uint64")
    if not offsets:
        return ()
    index = table.integer(0, "I")
    if index >= len(segments):
        raise source.error(table.at, f"a segment below {len(segments)}", index)
    size = segments[index]
    outside = next((offset for offset in offsets if offset > size), None)
    if outside is not None:
        raise source.error(table.at, f"an offset within the segment's {size} bytes", outside)
    return tuple(size - offset for offset in offsets)


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a method."""

    dtype: int
    sizes: tuple[int, ...]
    has_memory: bool
    is_constant: bool


class _MethodCheck:
    """The check of one method."""

    def __init__(self, source: Source, plan: Table, storage: _Storage, signatures: Signatures) -> None:
        self._source, self._plan, self._storage, self._signatures = source, plan, storage, signatures
        self._require(plan, *_PLAN_FIELDS)
        self._values = list(plan.tables(2))
        self._kinds = [value.integer(0, "B") for value in self._values]
        self._buffers = plan.integers(8, "int64")
        self._inputs = frozenset(self._indices(plan, plan.integers(3)))
        self._tensors: dict[int, _Tensor] = {}
        self._ends: dict[int, int] = {}  # by memory buffer, the end of its last tensor

    def run(self) -> None:
        """Raises `FormatError` for the first fault."""
        self._indices(self._plan, self._plan.integers(4))
        if any(size < 0 for size in self._buffers):
            raise self._source.error(self._plan.at, "sizes of memory buffers", self._buffers)
        checked: dict[int, _Tensor] = {}
        for index, (table, kind) in enumerate(zip(self._values, self._kinds, strict=True)):
            if kind == ValueKind.TENSOR:
                if table.at not in checked:
                    checked[table.at] = self._check_tensor(self._content(table))
                self._tensors[index] = checked[table.at]
            elif kind in _LISTS_OF_VALUES:
                self._check_list(self._content(table), kind, index)
            elif not ValueKind.NULL <= kind <= ValueKind.OPTIONAL_TENSOR_LIST:
                raise self._source.error(table.at, "a kind of value from 1 to 11", kind)
            elif kind > ValueKind.TENSOR:
                self._require(self._content(table), 0)
            else:
                self._content(table)
        self._text(self._plan, 0)
        self._check_buffers()
        operators = [f"{self._text(name, 0)}.{self._text(name, 1)}".removesuffix(".") for name in self._plan.tables(6)]
        delegates = [self._check_delegate(delegate) for delegate in self._plan.tables(7)]
        for chain in self._plan.tables(5):
            self._require(chain, _INSTRUCTIONS)
            instructions = list(chain.tables(2))
            for position, instruction in enumerate(instructions):
                self._check_instruction(instruction, position, len(instructions), operators, len(delegates))

    def _require(self, table: Table, *fields: int) -> Table:
        """Returns `table`. Raises `FormatError` if one of its vectors or texts is absent."""
        absent = next((field for field in fields if table.where(field) is None), None)
        if absent is not None:
            raise self._source.error(table.at, f"a table with field {absent}", "none")
        return table

    def _check_delegate(self, delegate: Table) -> str:
        """Checks the compile specs of a delegate. Returns the name of its backend."""
        for spec in self._require(delegate, 0, 1, 2).tables(2):
            self._text(self._require(spec, 0, 1), 0)
        return self._text(delegate, 0)

    def _check_buffers(self) -> None:
        """Checks that no memory buffer is much larger than its tensors: the runtime allocates and clears it."""
        for memory, size in enumerate(self._buffers[1:], 1):
            limit = LARGEST_UNUSED_SHARE * self._ends.get(memory, 0) + SMALL_BUFFER
            if size > limit:
                raise self._source.error(
                    self._plan.at, f"a memory buffer of at most {limit} bytes for its tensors", size
                )

    def _text(self, table: Table, field: int) -> str:
        """Returns a text. Raises `FormatError` if it is not UTF-8, which Python requires."""
        data = bytes(self._require(table, field).data(field) or b"")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self._source.error(table.at, "a text in UTF-8", data) from error

    def _content(self, value: Table) -> Table:
        content = value.table(1)
        if content is None:
            raise self._source.error(value.at, "the content of a value", "none")
        return content

    def _indices(self, at: Table, numbers: Sequence[int], expected: int | None = None) -> Sequence[int]:
        """Returns `numbers`. Raises `FormatError` if one is not the index of a value (of kind `expected`, if given)."""
        for number in numbers:
            if not 0 <= number < len(self._values):
                raise self._source.error(at.at, f"a value below {len(self._values)}", number)
            if expected is not None and self._kinds[number] != expected:
                raise self._source.error(at.at, f"a value of kind {expected}", f"kind {self._kinds[number]}")
        return numbers

    def _check_list(self, content: Table, kind: int, index: int) -> None:
        """Checks the items of the list that is value `index`.

        The runtime makes the values in order, and a list of tensors copies its items from those made before it.
        """
        self._require(content, 0)
        if kind == ValueKind.INT_LIST:
            self._indices(content, content.integers(0, "int64"), ValueKind.INT)
            return
        items = content.integers(0)
        if kind == ValueKind.OPTIONAL_TENSOR_LIST:
            items = tuple(item for item in items if item != NO_TENSOR)
        self._indices(content, items)
        late = next((item for item in items if item >= index), None)
        if late is not None:
            raise self._source.error(content.at, f"a list of tensors before value {index}", f"value {late}")
        allowed = {ValueKind.TENSOR} if kind == ValueKind.TENSOR_LIST else {ValueKind.TENSOR, ValueKind.NULL}
        wrong = next((item for item in items if self._kinds[item] not in allowed), None)
        if wrong is not None:
            raise self._source.error(content.at, "a list of tensors", f"value {wrong} of kind {self._kinds[wrong]}")

    def _check_tensor(self, tensor: Table) -> _Tensor:
        dtype = tensor.integer(0, "b")
        if dtype not in _ELEMENT_BYTES:
            raise self._source.error(tensor.at, "a dtype of ExecuTorch", dtype)
        self._require(tensor, 2, 3)
        sizes, order = tensor.integers(2), tensor.integers(3, "uint8")
        if len(sizes) > LARGEST_RANK:
            raise self._source.error(tensor.at, f"at most {LARGEST_RANK} dimensions", len(sizes))
        if any(size < 0 for size in sizes):
            raise self._source.error(tensor.at, "sizes of dimensions, 0 or more", sizes)
        if math.prod(max(size, 1) for size in sizes) * _ELEMENT_BYTES[dtype] > LARGEST_TENSOR:
            raise self._source.error(tensor.at, f"a tensor of at most {LARGEST_TENSOR} bytes", sizes)
        if sorted(order) != list(range(len(sizes))):
            raise self._source.error(tensor.at, f"a dim order of {len(sizes)} dimensions", order)
        if tensor.integer(1, "i"):
            raise self._source.error(tensor.at, "a storage offset of 0", tensor.integer(1, "i"))
        if tensor.integer(8, "b") not in (0, 1):
            raise self._source.error(tensor.at, "a tensor of bounded shape", f"dynamism {tensor.integer(8, 'b')}")
        size = math.prod(sizes) * _ELEMENT_BYTES[dtype]
        allocation, constant = tensor.table(6), tensor.integer(5, "I")
        if allocation is not None:
            self._check_allocation(allocation, size, _ELEMENT_BYTES[dtype])
        if constant:
            self._check_constant(tensor, constant, size, is_state=allocation is not None)
        return _Tensor(
            dtype, sizes, allocation is not None or constant > 0 or size == 0, allocation is None and constant > 0
        )

    def _check_allocation(self, allocation: Table, size: int, alignment: int) -> None:
        memory = allocation.integer(0, "I")
        offset = allocation.integer(1, "I") | allocation.integer(2, "I") << 32
        if not 1 <= memory < len(self._buffers):
            raise self._source.error(allocation.at, f"a memory buffer from 1 to {len(self._buffers) - 1}", memory)
        if offset + size > self._buffers[memory]:
            found = f"{size} bytes at {offset}"
            raise self._source.error(allocation.at, f"a tensor within {self._buffers[memory]} bytes", found)
        self._ends[memory] = max(self._ends.get(memory, 0), offset + size)
        if offset % alignment:
            raise self._source.error(allocation.at, f"an offset that is a multiple of {alignment}", offset)

    def _check_constant(self, tensor: Table, index: int, size: int, *, is_state: bool) -> None:
        extra = tensor.table(9)
        if extra is not None and extra.integer(2, "b"):
            raise self._source.error(extra.at, "a constant in this file", "an external constant")
        known = self._storage.constants
        if is_state:
            group = 0 if extra is None else extra.integer(0, "Q")
            if group >= len(self._storage.initial_values):
                raise self._source.error(tensor.at, f"initial values below {len(self._storage.initial_values)}", group)
            known = self._storage.initial_values[group]
        if index >= len(known) or size > known[index]:
            room = f"{known[index]} bytes" if index < len(known) else "no buffer"
            raise self._source.error(tensor.at, f"{size} bytes in buffer {index}", room)

    def _check_instruction(
        self, instruction: Table, position: int, count: int, operators: Sequence[str], delegates: int
    ) -> None:
        kind, call = instruction.integer(0, "B"), instruction.table(1)
        if call is None or not InstructionKind.KERNEL <= kind <= InstructionKind.FREE:
            raise self._source.error(instruction.at, "an instruction of kind 1 to 5", kind)
        if kind in (InstructionKind.KERNEL, InstructionKind.DELEGATE):
            self._require(call, 1)
        if kind == InstructionKind.KERNEL:
            self._check_kernel_call(call, operators)
        elif kind == InstructionKind.DELEGATE:
            self._index_below(call, delegates, "a delegate")
            self._indices(call, call.integers(1))
        elif kind == InstructionKind.MOVE:
            self._check_move(call)
        elif kind == InstructionKind.JUMP:
            self._indices(call, (call.integer(0, "i"),))
            if not position < call.integer(1, "i") <= count:
                expected = f"a jump forward, to an instruction from {position + 1} to {count}"
                raise self._source.error(call.at, expected, call.integer(1, "i"))
        else:
            raise self._source.error(call.at, "a tensor that keeps its memory", "an instruction that frees it")

    def _check_move(self, call: Table) -> None:
        source, target = self._indices(call, (call.integer(0, "i"), call.integer(1, "i")))
        if self._kinds[source] != self._kinds[target]:
            raise self._source.error(call.at, "a move between values of one kind", "two kinds")
        if self._kinds[source] != ValueKind.TENSOR:
            return
        self._check_operand(call, "a move", source, is_written=False)
        if self._tensors[source] != self._tensors[target]:
            raise self._source.error(call.at, "a move between tensors of one shape and dtype", "two kinds of tensors")

    def _index_below(self, call: Table, count: int, expected: str) -> int:
        index = call.integer(0, "i")
        if not 0 <= index < count:
            raise self._source.error(call.at, f"the index of {expected}, below {count}", index)
        return index

    def _check_kernel_call(self, call: Table, operators: Sequence[str]) -> None:
        name = operators[self._index_below(call, len(operators), "an operator")]
        arguments = self._indices(call, call.integers(1))
        signature = self._signatures(name)
        if signature is None:
            return
        if len(arguments) < len(signature.kinds):
            raise self._source.error(call.at, f"{len(signature.kinds)} arguments of {name}", len(arguments))
        for position, (argument, kinds) in enumerate(zip(arguments, signature.kinds, strict=False)):
            if self._kinds[argument] not in kinds:
                expected = f"argument {position} of {name} of kind {' or '.join(map(str, sorted(kinds)))}"
                raise self._source.error(call.at, expected, f"kind {self._kinds[argument]}")
            for tensor in self._tensors_of(argument):
                self._check_operand(call, name, tensor, is_written=position in signature.written)
        if signature.quantized is not None:
            self._check_quantized(call, name, arguments, signature.quantized, len(signature.kinds) - 1)

    def _tensors_of(self, index: int) -> Sequence[int]:
        """Returns the indices of the tensors in a value: a tensor, or a list of them."""
        if self._kinds[index] in (ValueKind.TENSOR_LIST, ValueKind.OPTIONAL_TENSOR_LIST):
            items = self._content(self._values[index]).integers(0)
            return [item for item in items if item != NO_TENSOR and self._kinds[item] == ValueKind.TENSOR]
        return [index] if self._kinds[index] == ValueKind.TENSOR else []

    def _check_operand(self, call: Table, name: str, index: int, *, is_written: bool) -> None:
        tensor = self._tensors[index]
        if not tensor.has_memory and index not in self._inputs:
            raise self._source.error(call.at, f"a tensor with memory for {name}", f"value {index} without memory")
        if is_written and tensor.is_constant:
            raise self._source.error(call.at, f"memory that {name} may write to", f"constant {index}")

    def _check_quantized(self, call: Table, name: str, arguments: Sequence[int], quantized: int, out: int) -> None:
        """Checks the dtypes of a kernel that quantizes or dequantizes. `out` is the position of its output."""
        dtype = self._tensors[arguments[quantized]].dtype
        real = self._tensors[arguments[0 if quantized == out else out]].dtype
        if self._tensors[arguments[0]].sizes != self._tensors[arguments[out]].sizes:
            raise self._source.error(call.at, f"tensors of one shape for {name}", "two shapes")
        if quantized != out and self._kinds[arguments[_OUT_DTYPE]] == ValueKind.INT:
            given_out = self._content(self._values[arguments[_OUT_DTYPE]]).integer(0, "q")
            if given_out != real:
                raise self._source.error(call.at, f"the dtype {real} of the output of {name}", given_out)
        if dtype not in _INTEGER_LIMITS or real not in _FLOATS:
            raise self._source.error(call.at, f"an integer and a float tensor of {name}", f"dtypes {dtype} and {real}")
        smallest, largest, given = (
            self._content(self._values[arguments[position]]).integer(0, "q")
            for position in (_QUANT_MIN, _QUANT_MAX, _DTYPE)
        )
        low, high = _INTEGER_LIMITS[dtype]
        in_range = low <= smallest and largest <= high if quantized == out else smallest <= largest
        if given != dtype or not in_range:
            expected = f"integers of dtype {dtype} for {name}"
            raise self._source.error(call.at, expected, f"{smallest} to {largest} of dtype {given}")
