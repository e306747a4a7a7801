"""Writes `model_config.h`: sizes of memory, inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from openneutron.firmware.ports import Port
from openneutron.firmware.templates import filled
from openneutron.formats.method_memory import CONTEXT_FUNCTION

__all__ = ["PoolSizes", "c_float", "c_string", "config_header"]


@dataclass(frozen=True)
class PoolSizes:
    """Bytes of memory that a program needs. A pair has the bytes on this host and on a 32-bit processor."""

    planned: tuple[int, ...]
    """Bytes of each planned buffer."""
    method: tuple[int, int]
    """Bytes that are allocated from the method allocator when the program is loaded."""
    temporary: tuple[int, int]
    """The most bytes that an instruction allocates from the temporary allocator."""
    delegates: int = 0
    """The number of NPU delegates, each of which has a context of the driver."""
    unknown_method: tuple[str, ...] = ()
    """Names of allocations from the method allocator on the board that have no known size; `method` lacks them."""
    unknown_temporary: tuple[str, ...] = ()
    """The same for the temporary allocator."""
    scratch_is_estimated: bool = False
    """Whether `temporary` on the board contains an estimate of the NPU's scratch instead of that of microcode."""
    kernels_are_measured: bool = False
    """Whether CPU kernels take temporary memory, which was measured on this 64-bit host."""


def config_header(title: str, name: str, pools: PoolSizes, inputs: Sequence[Port], outputs: Sequence[Port]) -> str:
    """Returns the text of the header."""
    upper = name.upper()
    tensors = [f"#define {upper}_INPUTS {len(inputs)}", f"#define {upper}_OUTPUTS {len(outputs)}", ""]
    for kind, ports in (("INPUT", inputs), ("OUTPUT", outputs)):
        for index, port in enumerate(ports):
            tensors += [*_tensor(f"{upper}_{kind}_{index}", kind.lower(), index, port), ""]
    return filled(
        "model_config.h",
        title=title,
        NAME=upper,
        pools="\n".join(_pools(upper, pools)),
        tensors="\n".join(tensors).rstrip(),
    )


def c_float(value: float) -> str:
    """Returns the float32 nearest to the value, as a C literal that a compiler reads as exactly this float32."""
    text = str(np.float32(value))
    return f"{text}f" if any(mark in text for mark in ".en") else f"{text}.0f"


def _pools(upper: str, pools: PoolSizes) -> Iterator[str]:
    yield "/* The planned buffers: memory of tensors, at any address that is a multiple of 16. */"
    yield f"#define {upper}_PLANNED_BUFFERS {len(pools.planned)}"
    for index, size in enumerate(pools.planned):
        yield from _guarded(f"{upper}_PLANNED_{index}_BYTES", f"{size}u")
    yield ""
    host, target = (f"{one}u" for one in pools.method)
    if pools.delegates:
        yield "/* The context of NXP's driver, for each delegate. Where NeutronBackend.cpp is compiled with"
        yield f"   NO_HEAP_USAGE=1, set it to what {CONTEXT_FUNCTION}() returns; otherwise the driver uses the heap. */"
        yield from _guarded(f"{upper}_DELEGATE_CONTEXT_BYTES", "0u")
        yield ""
        target = f"({target} + {pools.delegates}u * {upper}_DELEGATE_CONTEXT_BYTES)"
    yield "/* The method allocator, used when the program is loaded, and the temporary allocator, used in a run. */"
    yield "#if UINTPTR_MAX > 0xFFFFFFFFu /* a 64-bit host */"
    yield from _guarded(f"{upper}_METHOD_POOL_BYTES", host)
    yield from _guarded(f"{upper}_TEMPORARY_POOL_BYTES", f"{pools.temporary[0]}u")
    yield "#else /* a 32-bit processor: the method pool is computed from ExecuTorch's sources */"
    yield from _not_counted(pools.unknown_method)
    yield from _guarded(f"{upper}_METHOD_POOL_BYTES", target)
    yield from _not_counted(pools.unknown_temporary)
    if pools.scratch_is_estimated:
        yield "/* With an estimate of the NPU's scratch: the microcode of `openneutron compile` has its size. */"
    if pools.kernels_are_measured:
        yield "/* With memory of CPU kernels that was measured on a 64-bit host. */"
    yield from _guarded(f"{upper}_TEMPORARY_POOL_BYTES", f"{pools.temporary[1]}u")
    yield "#endif"


def _not_counted(unknown: tuple[str, ...]) -> Iterator[str]:
    if unknown:
        yield f"/* Not counted, because its size is unknown here: {_plain(', '.join(unknown))}. */"


def _guarded(macro: str, value: str) -> Iterator[str]:
    yield from (f"#ifndef {macro}", f"#define {macro} {value}", "#endif")


def _tensor(macro: str, kind: str, index: int, port: Port) -> Iterator[str]:
    if port.dtype is None:
        yield f"/* {kind} {index}, '{_plain(port.name)}', is not a tensor: {_plain(repr(port.constant))} */"
        return
    last = ", channels last" if port.is_channels_last else ""
    shape = "x".join(map(str, port.shape)) or "scalar"
    yield f"/* {kind} {index}, '{_plain(port.name)}': {port.dtype} {shape}{last} */"
    yield f'#define {macro}_NAME {c_string(port.name)}'
    yield f"#define {macro}_TYPE {port.c_type}"
    yield f"#define {macro}_RANK {len(port.shape)}"
    if port.shape:
        yield f"#define {macro}_SHAPE {{{', '.join(map(str, port.shape))}}}"
        yield f"#define {macro}_DIM_ORDER {{{', '.join(map(str, port.dim_order))}}}"
    yield f"#define {macro}_ELEMENTS {port.elements}u"
    yield f"#define {macro}_BYTES {port.bytes}u"
    if port.scale is not None:
        yield f"#define {macro}_SCALE {c_float(port.scale)}"
        yield f"#define {macro}_ZERO_POINT {_c_integer(port.zero_point or 0)}"


def _c_integer(value: int) -> str:
    """Returns the value as an expression of C that any operator may precede."""
    return str(value) if value >= 0 else f"({value})"


def c_string(text: str) -> str:
    """Returns a string literal of C for the bytes of `text` in UTF-8.

    Bytes that are not ASCII are octal escapes, so that the literal does not depend on the character set that the
    compiler assumes; so are quotes, backslashes, control characters, and question marks, which may begin a trigraph.
    """
    data = text.encode("utf-8", "backslashreplace")  # for surrogates, which no UTF-8 has
    return '"' + "".join(chr(byte) if _is_plain(byte) else f"\\{byte:03o}" for byte in data) + '"'


def _is_plain(byte: int) -> bool:
    return ord(" ") <= byte <= ord("~") and byte not in b'"\\?'


def _plain(text: str) -> str:
    """Returns the text for a comment of C, with "_" for characters that could end it, and for invisible ones."""
    return "".join(char if char.isprintable() and char not in '"\\*?' else "_" for char in text)
