"""Computes the memory that ExecuTorch's runtime needs for a method of a `.pte`: planned buffers and two allocators.

The runtime allocates from pools that the application provides:

- *Planned buffers* hold tensors: inputs, outputs, results of CPU operators, states. The program states their sizes.
- The *method allocator* provides memory for the structures that the runtime creates when it loads the method, and that
  a delegate creates at its initialization. This memory is never freed.
- The *temporary allocator* provides memory that is freed soon: for the search for a kernel at load, and during one
  instruction for kernels and for the delegate, which allocates the NPU's scratch from it.

`memory_of` computes both allocators for a 32-bit processor (the board) and for a 64-bit one (this machine), from the
objects in the program and the sizes of ExecuTorch 1.5's classes. Sources of the order and sizes of the allocations:
ExecuTorch's runtime/executor/method.cpp and tensor_parser_portable.cpp, and NXP's backends/nxp/runtime/
NeutronBackend.cpp. `openneutron.runtime.memory` loads and runs the method on this machine and
counts the bytes. Both numbers are equal (`tests/runtime/test_memory.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from openneutron.compile_spec import CompileOptions
from openneutron.core.numbers import rounded_up
from openneutron.errors import FormatError, InputError
from openneutron.formats import pte, tflite
from openneutron.formats.arena import scratch_arena
from openneutron.formats.payload import Payload, PayloadHeader, microcode_header, parse

__all__ = [
    "ARM32",
    "CONTEXT_FUNCTION",
    "HOST64",
    "KERNELS",
    "POOL_ALIGNMENT",
    "Allocation",
    "DelegateMemory",
    "MeasuredPools",
    "MethodMemory",
    "PlannedBuffer",
    "Pool",
    "Pools",
    "memory_of",
    "method_memory",
]

POOL_ALIGNMENT = 16
"""Alignment of the start of each pool in bytes. NXP's delegate needs it, and sizes of pools are multiples of it."""

CONTEXT_FUNCTION = "neutronGetModelContextSize"
"""The function of NXP's driver that returns the bytes of a model's context (NeutronDriver.h).

The delegate allocates a context for each model: from the method allocator if the firmware is built with NO_HEAP_USAGE,
else the driver allocates it from the heap. Its size is not published.
"""

KERNELS = "CPU kernels"
"""The name of the memory that CPU kernels allocate in a run."""
NEUTRON_BACKEND = "NeutronBackend"
_MOST_DIMENSIONS = 16  # ExecuTorch's kTensorDimensionLimit


@dataclass(frozen=True)
class PlannedBuffer:
    """A planned buffer for tensors. `index` is its position in the list of buffers that the application passes."""

    index: int
    """Its position in the list of buffers that the application passes."""
    bytes: int
    """Its size."""


@dataclass(frozen=True)
class Allocation:
    """Bytes that are allocated for one purpose, with the padding for alignment before them."""

    name: str
    """The purpose."""
    bytes: int
    """Its size, with the padding before it."""


@dataclass(frozen=True)
class Pool:
    """The allocations from one pool, by purpose."""

    parts: tuple[Allocation, ...] = ()
    """The allocations of known size."""
    unknown: tuple[str, ...] = ()
    """Allocations of unknown size, which `parts` lack."""

    @property
    def used_bytes(self) -> int:
        """The bytes that are allocated, from the start of the pool to the end of the last allocation."""
        return sum(part.bytes for part in self.parts)

    @property
    def pool_bytes(self) -> int:
        """The smallest multiple of `POOL_ALIGNMENT` that suffices."""
        return rounded_up(self.used_bytes, POOL_ALIGNMENT)


@dataclass(frozen=True)
class Pools:
    """The two pools of a method at their peak."""

    method: Pool
    """The pool of the method allocator."""
    temporary: Pool
    """The pool of the temporary allocator."""


@dataclass(frozen=True)
class MeasuredPools:
    """Bytes that the runtime allocated on this machine in one load and one run."""

    method_bytes: int
    """Bytes from the method allocator."""
    load_bytes: int
    """The peak of the temporary allocator during the load."""
    run_bytes: int
    """The peak of the temporary allocator during the run, without the host's delegate, which uses other memory."""


@dataclass(frozen=True)
class DelegateMemory:
    """Bytes that NXP's delegate allocates on the board for one of its calls. None means unknown."""

    index: int
    """Index of the delegate in the program."""
    state_bytes: int
    """Its configuration, in the method allocator."""
    pointer_bytes: int
    """Lists of pointers to inputs and outputs. This and the following are in the temporary allocator."""
    scratch_bytes: int
    """Memory for intermediate tensors: read from microcode, estimated for a portable program."""
    profile_bytes: int | None
    """The buffer for the times of kernels."""
    debug_bytes: int | None
    """The debug buffer. It and the profile buffer are None for a portable program with `use_profiling`."""
    prefetch_bytes: int | None
    """Memory for weights that are copied from flash; None for a portable program with `fetch_constants_to_sram`."""
    transposed_bytes: int
    """Copies of inputs and outputs that the CPU transposes."""
    is_estimated: bool
    """Whether `scratch_bytes` is an estimate."""
    context_bytes: int | None = None
    """The driver's context. None, because only `CONTEXT_FUNCTION` returns its size."""


@dataclass(frozen=True)
class MethodMemory:
    """The memory of a method. All sizes are in bytes."""

    method: str
    """Name of the method."""
    planned: tuple[PlannedBuffer, ...]
    """The planned buffers for tensors."""
    device: Pools
    """On the board, with 32-bit pointers and NXP's delegate."""
    host: Pools
    """On this machine, with 64-bit pointers; the host's delegate uses other memory."""
    delegates: tuple[DelegateMemory, ...] = ()
    """The calls of NXP's delegate, in order of execution."""
    measured: MeasuredPools | None = None
    """The bytes that were counted on this machine; None if nothing was run."""
    given: tuple[PlannedBuffer, ...] = ()
    """Inputs and outputs without planned memory, which the application provides. `index` is the index of the value."""
    search_bytes: int = 0
    """The temporary memory on the board that the runtime uses to search for a kernel at load."""

    @property
    def planned_bytes(self) -> int:
        """The sum of the planned buffers, each aligned."""
        return sum(rounded_up(buffer.bytes, POOL_ALIGNMENT) for buffer in self.planned)


@dataclass(frozen=True)
class _Abi:
    """Sizes and alignments in bytes of the classes that the runtime allocates, by name."""

    sizes: Mapping[str, tuple[int, int]]

    def __getitem__(self, name: str) -> tuple[int, int]:
        return self.sizes[name]


_EQUAL = {"bool": (1, 1), "uint8": (1, 1), "int32": (4, 4), "int64": (8, 8), "EValue": (16, 8)}
ARM32 = _Abi({
    **_EQUAL, "pointer": (4, 4), "TensorImpl": (32, 4), "Tensor": (4, 4), "optional<Tensor>": (8, 4),
    "BoxedEvalueList": (12, 4), "ArrayRef": (8, 4), "InstructionArgs": (8, 4), "OpFunction": (4, 4), "Chain": (16, 4),
    "BackendDelegate": (40, 8), "CompileSpec": (12, 4), "TensorMeta": (12, 4), "NamedData": (40, 8),
    "NeutronExecutorchConfig": (80, 4),
})  # fmt: skip
"""32-bit Arm, AAPCS. `NeutronExecutorchConfig` is NXP's, built with EXTERNAL_MEM."""
HOST64 = _Abi({
    **_EQUAL, "pointer": (8, 8), "TensorImpl": (64, 8), "Tensor": (8, 8), "optional<Tensor>": (16, 8),
    "BoxedEvalueList": (24, 8), "ArrayRef": (16, 8), "InstructionArgs": (16, 8), "OpFunction": (8, 8), "Chain": (32, 8),
    "BackendDelegate": (56, 8), "CompileSpec": (24, 8), "TensorMeta": (24, 8), "NamedData": (48, 8),
})  # fmt: skip
"""64-bit processors with the LP64 data model. The host's delegate allocates nothing from the runtime's pools."""


def memory_of(data: bytes, method: str = "forward", *, measured: MeasuredPools | None = None) -> MethodMemory:
    """Computes the memory of a method of a `.pte`, as `method_memory` does.

    Raises `FormatError` for a damaged file, `PayloadError` for a damaged payload, and `InputError` if there is no such
    method.
    """
    methods = pte.read(data).methods
    plan = next((one for one in methods if one.name == method), None)
    if plan is None:
        names = ", ".join(one.name for one in methods) or "none"
        raise InputError(f"The program has no method '{method}'. Its methods are: {names}.")
    return method_memory(plan, measured)


def method_memory(plan: pte.Method, measured: MeasuredPools | None = None) -> MethodMemory:
    """Computes the memory of a method. Linear in its values and calls, plus the time of `arena.plan`.

    The NPU's scratch is read from microcode; for a portable program, it is estimated. `measured` has the temporary
    memory of CPU kernels (see `openneutron.runtime.memory.measure`). Without it, these count as 0 bytes: of
    ExecuTorch's own kernels, only topk allocates temporary memory.

    Raises `PayloadError` for a damaged payload, and `FormatError` if a payload does not match its call.
    """
    calls = [call for call in plan.calls if isinstance(call, pte.DelegateCall) and call.backend == NEUTRON_BACKEND]
    delegates = tuple(map(_delegate_memory, calls))
    kernels = Pool((Allocation(KERNELS, measured.run_bytes),) if measured and measured.run_bytes else ())
    search = _search_pool(plan, ARM32)
    runs = [_run_pool(call, memory) for call, memory in zip(calls, delegates, strict=True)]
    ends = dict.fromkeys((*plan.input_numbers, *plan.output_numbers))
    return MethodMemory(
        method=plan.name,
        planned=tuple(PlannedBuffer(index, size) for index, size in enumerate(plan.planned_bytes)),
        device=Pools(_load_pool(plan, ARM32), _largest([search, kernels, *runs])),
        host=Pools(_load_pool(plan, HOST64), _largest([_search_pool(plan, HOST64), kernels])),
        delegates=delegates,
        measured=measured,
        given=tuple(
            PlannedBuffer(number, plan.slots[number].bytes)
            for number in ends
            if plan.slots[number].bytes and not (plan.slots[number].is_planned or plan.slots[number].has_data)
        ),
        search_bytes=search.used_bytes,
    )


@dataclass
class _Cursor:
    """Adds up the allocations of a pool. `used` is the end of the last one; `bytes` has the sizes by purpose."""

    abi: _Abi
    used: int = 0
    bytes: dict[str, int] = field(default_factory=dict)

    def take(self, purpose: str, size: int, alignment: int) -> None:
        end = rounded_up(self.used, alignment) + size
        self.bytes[purpose] = self.bytes.get(purpose, 0) + end - self.used
        self.used = end

    def list(self, purpose: str, name: str, count: int = 1) -> None:
        size, alignment = self.abi[name]
        self.take(purpose, count * size, alignment)

    def pool(self, unknown: Iterable[str] = ()) -> Pool:
        return Pool(tuple(Allocation(name, size) for name, size in self.bytes.items() if size), tuple(unknown))


def _load_pool(plan: pte.Method, abi: _Abi) -> Pool:
    """Computes the allocations from the method allocator at load, in the order of Method::init."""
    cursor = _Cursor(abi)
    cursor.list("values", "EValue", len(plan.slots))
    if plan.input_numbers:
        cursor.list("values", "bool", len(plan.input_numbers))
    if external := sum(slot.is_external for slot in plan.slots):
        cursor.list("values", "NamedData", external)
    for slot in plan.slots:
        _take_value(cursor, slot)
    cursor.list("delegates", "BackendDelegate", len(plan.backends))
    for backend in plan.backends:
        cursor.list("delegates", "CompileSpec", backend.compile_specs)
        if backend.name == NEUTRON_BACKEND and "NeutronExecutorchConfig" in abi.sizes:
            cursor.list("delegates", "NeutronExecutorchConfig")
    cursor.list("instructions", "Chain", len(plan.chains))
    for chain in plan.chains:
        cursor.list("instructions", "OpFunction", len(chain))
        cursor.list("instructions", "InstructionArgs", len(chain))
        for instruction in chain:
            if instruction.kind in ("kernel", "delegate"):
                cursor.list("instructions", "pointer", len(instruction.arguments))
    return cursor.pool(_foreign_backends(plan))


def _foreign_backends(plan: pte.Method) -> Iterator[str]:
    """Returns a text for each delegate that is not NXP's, because its allocations are unknown."""
    names = dict.fromkeys(backend.name for backend in plan.backends if backend.name != NEUTRON_BACKEND)
    return (f"memory of {name}" for name in names)


def _take_value(cursor: _Cursor, slot: pte.Slot) -> None:
    """Adds the allocations of Method::parse_values and parseTensor for one value."""
    if slot.rank is not None:
        if slot.is_resizable:
            cursor.list("tensors", "int32", slot.rank)
            cursor.list("tensors", "uint8", slot.rank)
        cursor.list("tensors", "int32", slot.rank)
        cursor.list("tensors", "TensorImpl")
    elif slot.kind == "ints":
        cursor.list("lists", "pointer", slot.items)
        cursor.list("lists", "int64", slot.items)
        cursor.list("lists", "BoxedEvalueList")
    elif slot.kind in ("tensors", "optional tensors"):
        cursor.list("lists", "Tensor" if slot.kind == "tensors" else "optional<Tensor>", slot.items)
        cursor.list("lists", "pointer", slot.items)
        cursor.list("lists", "BoxedEvalueList")
    elif slot.kind in ("doubles", "bools", "text"):
        cursor.list("lists", "ArrayRef")


def _search_pool(plan: pte.Method, abi: _Abi) -> Pool:
    """Computes the temporary memory that the runtime uses at load to search for each kernel.

    If the temporary pool is smaller, the runtime allocates this memory from the method allocator, for each kernel.
    """
    counts = (len(one.arguments) for chain in plan.chains for one in chain if one.kind == "kernel")
    most = max(counts, default=0)
    parts = (Allocation("search for kernels", most * (abi["TensorMeta"][0] + _MOST_DIMENSIONS)),) if most else ()
    return Pool(parts, tuple(_foreign_backends(plan)))


def _run_pool(call: pte.DelegateCall, memory: DelegateMemory) -> Pool:
    """Computes the temporary memory of one call of NXP's delegate on the board, in the order of its `execute`."""
    header, cursor = parse(call.payload).header, _Cursor(ARM32)
    cursor.list("pointers of the delegate", "pointer", len(header.input_formats))
    cursor.list("pointers of the delegate", "pointer", len(header.output_formats) + 3)
    sizes = {
        "scratch of the NPU": memory.scratch_bytes,
        "profile of the NPU": memory.profile_bytes,
        "debug buffer of the NPU": memory.debug_bytes,
        "prefetched weights": memory.prefetch_bytes,
    }
    for name, size in sizes.items():
        cursor.take(name, size or 0, POOL_ALIGNMENT)
    for value in _transposed_values(call, header):
        cursor.take("transposed inputs and outputs", _value_bytes(value), POOL_ALIGNMENT)
    return cursor.pool(name for name, size in sizes.items() if size is None)


def _delegate_memory(call: pte.DelegateCall) -> DelegateMemory:
    payload = parse(call.payload)
    header = payload.header
    arguments = len(call.arguments)
    needed = header.argument_count + len(header.output_formats)
    if arguments < needed:
        raise FormatError(f"A call of the delegate has {arguments} arguments, but its payload needs {needed}.")
    sizes = _estimated_sizes(call, payload) if payload.is_portable else _sizes_in_microcode(payload)
    return DelegateMemory(
        index=call.index,
        state_bytes=ARM32["NeutronExecutorchConfig"][0],
        pointer_bytes=ARM32["pointer"][0] * (len(header.input_formats) + len(header.output_formats) + 3),
        scratch_bytes=sizes.scratch,
        profile_bytes=sizes.profile,
        debug_bytes=sizes.debug,
        prefetch_bytes=sizes.prefetch,
        transposed_bytes=sum(map(_value_bytes, _transposed_values(call, header))),
        is_estimated=payload.is_portable,
    )


class _NpuSizes(NamedTuple):
    scratch: int
    profile: int | None
    debug: int | None
    prefetch: int | None


def _sizes_in_microcode(payload: Payload) -> _NpuSizes:
    code = microcode_header(payload.microcode, payload.header.version)
    return _NpuSizes(code.scratch_bytes, code.profile_bytes, code.debug_bytes, code.sram_scratch_bytes)


def _estimated_sizes(call: pte.DelegateCall, payload: Payload) -> _NpuSizes:
    options = CompileOptions.from_values(call.compile_specs)
    graphs = tflite.read_checked(payload.tflite).subgraphs
    scratch = max((scratch_arena(graph.operators).size for graph in graphs), default=0)
    profile = None if options.use_profiling else 0
    return _NpuSizes(scratch, profile, profile, None if options.fetch_constants_to_sram else 0)


def _transposed_values(call: pte.DelegateCall, header: PayloadHeader) -> Iterator[pte.ProgramValue]:
    """Returns the inputs and then the outputs that NXP's delegate transposes on the CPU.

    These are contiguous tensors with several channels that are channels-last on the NPU.
    """
    arguments = [*header.input_map, *(header.argument_count + index for index in header.output_map)]
    for flag, number in zip((*header.input_formats, *header.output_formats), arguments, strict=True):
        value = call.arguments[number] if number < len(call.arguments) else None
        if not flag or value is None or len(value.shape) < 3 or value.shape[-3] == 1:
            continue
        if value.dim_order == tuple(range(len(value.shape))):
            yield value


def _value_bytes(value: pte.ProgramValue) -> int:
    return math.prod(value.shape) * pte.ITEM_BYTES.get(value.dtype, 1)


def _largest(pools: Sequence[Pool]) -> Pool:
    """Returns the largest pool, with the unknown parts of all pools."""
    largest = max(pools, key=lambda pool: pool.used_bytes)
    return Pool(largest.parts, tuple(dict.fromkeys(name for pool in pools for name in pool.unknown)))
