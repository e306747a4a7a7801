"""Reads the outputs that a board printed or dumped: raw bytes, .npy, .npz, or the log of its serial line.

A serial line has the form

    OUTPUT <vector> <output> <byte offset> <hex bytes>

Vectors and outputs are counted from 0. The output's memory is printed with two hexadecimal digits for each byte. Text
before `OUTPUT` and lines of other forms are ignored. docs/howto/board-outputs.md describes the formats for users.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from openneutron.core.archives import check_expansion
from openneutron.core.files import read_file
from openneutron.core.logs import text_of_log
from openneutron.data.arrays import arrays_in, typed_damage
from openneutron.errors import InputError

__all__ = ["BoardTensor", "Dump", "Pair", "place_bytes", "quantized", "read_dump"]

Pair = tuple[int, int]
"""The index of a vector and the index of an output."""
Array = npt.NDArray[Any]

_LINE = re.compile(r"\bOUTPUT\s+(?P<vector>\d{1,9})\s+(?P<output>\d{1,9})\s+(?P<at>\d{1,12})\s(?P<rest>.*)", re.ASCII)
_STARTS_LINE = re.compile(r"\bOUTPUT\s+\d", re.ASCII)
_FORM = "OUTPUT <vector> <output> <byte offset> <hex bytes>"
_HEX = re.compile(r"(?:[0-9a-fA-F]{2}\s*)*")
_SLACK = 64
_TEXT_SUFFIXES = (".txt", ".log")


@dataclass(frozen=True)
class BoardTensor:
    """An input or output in the memory of a program."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    dim_order: tuple[int, ...]
    """The dimensions from the outermost to the innermost in memory."""
    scale: float | None = None
    """The scale of its codes, or of the codes from which the program dequantizes a float tensor; None if unknown."""
    zero_point: int = 0
    number: int = 0
    """Its index among all inputs or outputs of the program, including those that are not tensors."""
    name: str = ""
    """Its name, as in all results of a program: "boxes", "output0"."""

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The number of bytes."""
        return self.size * self.dtype.itemsize

    @property
    def holds_codes(self) -> bool:
        """Whether the tensor holds quantized integers."""
        return self.dtype.kind in "iu" and self.scale is not None

    @property
    def memory_shape(self) -> tuple[int, ...]:
        """The sizes of the dimensions from the outermost to the innermost in memory."""
        return tuple(self.shape[dim] for dim in self.dim_order)

    def in_memory(self, values: Array) -> Array:
        """Returns values of the logical shape in the order of memory, in one dimension."""
        return values.reshape(self.shape).transpose(self.dim_order).reshape(-1)

    def from_memory(self, values: Array) -> Array:
        """Returns values in the order of memory as an array of the logical shape."""
        inverse = np.argsort(self.dim_order) if self.dim_order else ()
        return values.reshape(self.memory_shape).transpose(inverse)

    def codes_of(self, values: Array) -> Array:
        """Quantizes floats with the scale and the zero point of the tensor to the integers of its dtype."""
        return quantized(values, self, self.dtype)

    def index_of(self, position: int) -> tuple[int, ...]:
        """Returns the logical index of a position in memory."""
        found = np.unravel_index(position, self.memory_shape)
        by_dimension = dict(zip(self.dim_order, found, strict=True))
        return tuple(int(by_dimension[dim]) for dim in range(len(self.shape)))


@dataclass(frozen=True)
class Dump:
    """The outputs of a board: bytes by vector and output, or the bytes of all outputs in one."""

    form: str
    """"raw", "npy", "npz" or "serial"."""
    outputs: Mapping[Pair, bytes] = field(default_factory=dict)
    raw: bytes | None = None
    """The bytes of a raw dump, which is not split into outputs yet."""
    notes: tuple[str, ...] = ()
    """Sentences about unusable lines or arrays, and about conversions."""


def read_dump(source: str | os.PathLike[str] | bytes, outputs: Sequence[BoardTensor]) -> Dump:
    """Reads a dump from a file, or from its bytes.

    A .npy file holds the only output of the program, for one vector or with a first dimension of vectors. A .npz file
    holds an array for each output, in the order of the outputs. A text with lines of the form above is a serial log.
    All other bytes are raw: the outputs of the first vector in order, then those of the second, and so on.

    Raises `InputError` for a file that cannot be read, is empty, is a text without outputs, or holds arrays that do
    not fit the program.
    """
    data = source if isinstance(source, bytes) else read_file(source)
    name = "The dump" if isinstance(source, bytes) else f"'{os.fspath(source)}'"
    if not data:
        raise InputError(f"{name} is empty. Give the file with the outputs of the board.")
    if data.startswith((b"\x93NUMPY", b"PK\x03\x04")):
        return _read_arrays(data, name, outputs)
    text = text_of_log(data)
    if text is not None and _STARTS_LINE.search(text):
        return _read_log(text, name, outputs)
    suffix = "" if isinstance(source, bytes) else os.path.splitext(os.fspath(source))[1].lower()
    if text is not None and suffix in _TEXT_SUFFIXES:
        raise InputError(
            f"{name} is a text without a line of the form '{_FORM}'. Give the whole log of the serial line, or name a "
            "file of raw bytes .bin."
        )
    return Dump("raw", raw=data)


def _read_log(text: str, name: str, outputs: Sequence[BoardTensor]) -> Dump:
    positions = {tensor.number: position for position, tensor in enumerate(outputs)}
    found: dict[Pair, bytearray] = {}
    written: dict[Pair, bytearray] = {}
    notes: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        match = _LINE.search(line)
        if match is None:
            if _STARTS_LINE.search(line):
                notes.append(f"Line {number} is not of the form '{_FORM}'.")
            continue
        vector, output, start = (int(match[group]) for group in ("vector", "output", "at"))
        if output not in positions:
            raise InputError(
                f"Line {number} of {name} holds output {output}, but the program has {len(outputs)} outputs. Give the "
                "program that runs on the board."
            )
        digits = match["rest"].strip()
        if not _HEX.fullmatch(digits):
            notes.append(f"Line {number} (vector {vector}, output {output}) is damaged: it has other characters "
                         "than pairs of hexadecimal digits.")  # fmt: skip
            continue
        pair = vector, positions[output]
        content, known = found.setdefault(pair, bytearray()), written.setdefault(pair, bytearray())
        piece, size = bytes.fromhex(digits), outputs[pair[1]].bytes
        place_bytes(content, known, piece, start, name=f"Line {number} of {name}", size=size)
    complete = {pair: bytes(found[pair]) for pair in found if all(written[pair])}
    notes += [
        f"The lines of vector {vector}, output {output} leave out bytes, the first of which is byte {known.index(0)}."
        for (vector, output), known in written.items()
        if not all(known)
    ]
    return Dump("serial", complete, notes=tuple(notes))


def place_bytes(content: bytearray, known: bytearray, piece: bytes, start: int, *, name: str, size: int) -> None:
    """Writes `piece` to `content` at the offset `start`, and marks its bytes with ones in `known`.

    `size` is the expected number of bytes. Up to eight times `size` is accepted, because the board may print another
    dtype. Raises `InputError` for an offset beyond that.
    """
    end = start + len(piece)
    if end > 8 * size + _SLACK:
        raise InputError(f"{name} has the offset {start}, but {size} bytes are expected. Correct or delete the line.")
    for buffer in (content, known):
        buffer.extend(bytes(max(0, end - len(buffer))))
    content[start:end] = piece
    known[start:end] = b"\1" * len(piece)


def _read_arrays(data: bytes, name: str, outputs: Sequence[BoardTensor]) -> Dump:
    check_expansion(data, name)
    with typed_damage(f"{name} cannot be read as arrays", data):
        loaded = np.load(io.BytesIO(data), allow_pickle=False)
        arrays = [loaded] if isinstance(loaded, np.ndarray) else list(arrays_in(loaded).values())
    if len(arrays) != len(outputs):
        raise InputError(
            f"{name} holds {len(arrays)} arrays, but the program has {len(outputs)} outputs. Give an array for each "
            "output, in their order, in a .npz file."
        )
    notes: list[str] = []
    found: dict[Pair, bytes] = {}
    for number, (array, tensor) in enumerate(zip(arrays, outputs, strict=True)):
        for vector, values in enumerate(_per_vector(array, tensor, f"Array {number} of {name}")):
            found[vector, number] = _bytes_of(values, tensor)
        if tensor.holds_codes and array.dtype.kind == "f":
            notes.append(f"Array {number} holds floats. They are quantized with the scale of the output.")
    return Dump("npy" if data.startswith(b"\x93") else "npz", found, notes=tuple(notes))


def _per_vector(array: Array, tensor: BoardTensor, name: str) -> Iterator[Array]:
    """Returns the values of each vector in the order of memory."""
    shapes = {tensor.shape: True, tensor.memory_shape: False, (tensor.size,): False}
    if array.dtype.kind not in "iufb":
        raise InputError(f"{name} has the dtype {array.dtype}. Give numbers.")
    for vectors in ([array], array):
        if array.ndim == 0 or (vectors is array and not len(array)):
            continue
        shape = np.shape(vectors[0])
        if shape in shapes:
            yield from (tensor.in_memory(one) if shapes[shape] else one.reshape(-1) for one in vectors)
            return
        if vectors is array and tensor.shape[:1] == (1,) and shape == tensor.shape[1:]:
            yield from (tensor.in_memory(one) for one in vectors)
            return
    if not tensor.shape and array.ndim == 0:
        yield array.reshape(-1)
        return
    raise InputError(
        f"{name} has the shape {array.shape}. The output has {tensor.shape}; give that shape, or that shape after a "
        "dimension of vectors."
    )


def quantized(values: Array, tensor: BoardTensor, dtype: npt.DTypeLike) -> Array:
    """Quantizes floats with the scale and the zero point of a tensor to integers of a dtype. NaN becomes 0."""
    limits = np.iinfo(dtype)
    codes = np.rint(np.nan_to_num(values.astype(np.float64)) / float(tensor.scale or 1)) + tensor.zero_point
    found: Array = codes.clip(limits.min, limits.max).astype(dtype)
    return found


def _bytes_of(values: Array, tensor: BoardTensor) -> bytes:
    are_integers = values.dtype.kind in "iu" and tensor.dtype.kind in "iu"
    if tensor.holds_codes and values.dtype.kind == "f":
        values = tensor.codes_of(values)
    elif are_integers and values.dtype.itemsize != tensor.dtype.itemsize:
        limits = np.iinfo(tensor.dtype)  # type: ignore[type-var]
        values = values.clip(limits.min, limits.max).astype(tensor.dtype)
    elif not are_integers:
        values = values.astype(tensor.dtype)
    return bytes(values.tobytes())  # keep the bits of integers of the same size, so that uint8 for int8 is recognized
