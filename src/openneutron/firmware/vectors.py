"""Test vectors: inputs, and the outputs that the host computes from them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.npyio import NpzFile

from openneutron.core.archives import check_expansion
from openneutron.core.files import check_is_file
from openneutron.core.options import check_size_of_random
from openneutron.data.arrays import arrays_in, typed_damage
from openneutron.errors import InputError
from openneutron.firmware.config import c_float
from openneutron.firmware.ports import Port, bytes_of
from openneutron.firmware.templates import filled
from openneutron.formats.bundled import BundledTensor, bundle
from openneutron.runtime import HostProgram, TensorInfo

__all__ = [
    "Vectors", "check_number_of_vectors", "computed_vectors", "largest_rank", "read_vectors", "vectors_header",
]  # fmt: skip

LARGEST_ARRAY = 1 << 26
"""The largest size of the array of random test vectors, in bytes. It is more than the memory of all known boards."""

ALIGNMENT = 16
_LARGEST_ERROR_OF_CODES = 255  # steps of an int8 tensor over the range of a float output of unknown scale
_KINDS: Mapping[type, int] = {int: 1, float: 2, bool: 3}
_NONE = 4


@dataclass(frozen=True)
class Vectors:
    """A value for each input and for each output, for each vector, in the order of execution."""

    inputs: tuple[tuple[Any, ...], ...]
    outputs: tuple[tuple[Any, ...], ...]

    def pack(self, inputs: Sequence[Port], outputs: Sequence[Port]) -> bytes:
        """Returns the bytes of all vectors: inputs, then outputs, each padded to 16 bytes."""
        return b"".join(
            _padded(bytes_of(value, port))
            for row in zip(self.inputs, self.outputs, strict=True)
            for ports, values in zip((inputs, outputs), row, strict=True)
            for port, value in zip(ports, values, strict=True)
            if port.dtype is not None
        )

    def bundle(self, program: bytes, method: str, inputs: Sequence[Port], outputs: Sequence[Port]) -> bytes | None:
        """Returns ExecuTorch's bundled program of these vectors.

        Returns None if an output is not a tensor, or an input is None or text, which the format does not support.
        """
        if any(port.dtype is None for port in outputs) or any(
            port.dtype is None and not isinstance(port.constant, (int, float)) for port in inputs
        ):
            return None
        cases = [
            tuple(
                [_bundled(value, port) for value, port in zip(values, ports, strict=True)]
                for values, ports in ((given, inputs), (expected, outputs))
            )
            for given, expected in zip(self.inputs, self.outputs, strict=True)
        ]
        return bundle(program, method, [(case[0], case[1]) for case in cases])


def _bundled(value: Any, port: Port) -> Any:
    if port.dtype is None:
        return value
    return BundledTensor(port.code, port.shape, port.dim_order, bytes_of(value, port))


def check_number_of_vectors(count: int, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
    """Raises `OptionError` if the array of `count` random test vectors is too large."""
    check_size_of_random(count, max(1, _offsets([*inputs, *outputs])[-1]), "test vectors", LARGEST_ARRAY)


def computed_vectors(program: HostProgram, samples: Iterable[Any] | None, count: int) -> Vectors:
    """Runs a program on samples from its initial state, and returns the vectors.

    If `samples` is None, `count` random samples with a fixed seed are used.

    A sample is a tensor or array, a tuple of arguments of `forward`, or a mapping from their names. Floats are
    quantized for inputs that take int8. Raises `InputError` for samples that do not fit, and if there are none.
    """
    rows = []
    for number, sample in enumerate(_random(program, count) if samples is None else samples):
        try:
            values = _values(program, sample)
            outputs = program.run(*values)
        except InputError as error:
            raise InputError(f"Test vector {number}: {error}") from error
        rows.append((values, outputs if isinstance(outputs, tuple) else (outputs,)))
    if not rows:
        raise InputError(
            "A package needs at least one test vector, but the samples are empty. Give at least one sample."
        )
    return Vectors(tuple(row[0] for row in rows), tuple(row[1] for row in rows))


def read_vectors(path: str | os.PathLike[str], inputs: Sequence[Port], outputs: Sequence[Port]) -> Vectors:
    """Reads vectors from a .npz file with the arrays input0, input1, ..., output0, ... of shape [vectors, *shape].

    The arrays may have the names of all inputs, or of all outputs, instead: those of `run_files` ("boxes"). If an input
    and an output have the same name, it is that of the output.

    Raises `InputError` if the file cannot be read, lacks an array, or if an array does not fit.
    """
    with typed_damage(f"Cannot read the test vectors in '{os.fspath(path)}'", Path(path), ". Give a .npz file."):
        arrays = _arrays_in(path)
    counts = {len(value) for value in arrays.values() if value.ndim}
    if len(counts) != 1 or not min(counts):
        raise InputError(
            f"'{os.fspath(path)}' contains no test vectors. Save arrays with equal first dimensions, the number of "
            "vectors."
        )
    names = {port.name for port in outputs}
    columns = _columns(arrays, "input", inputs, arrays.keys() - names, counts)
    results = _columns(arrays, "output", outputs, arrays.keys(), counts)
    return Vectors(tuple(zip(*columns, strict=True)), tuple(zip(*results, strict=True)))


def _columns(
    arrays: Mapping[str, Any], prefix: str, ports: Sequence[Port], names: Set[str], counts: set[int]
) -> list[list[Any]]:
    """Returns the values of inputs or outputs: the arrays with their names if `names` has all of these, else the
    arrays with `prefix` and their positions.
    """
    has_names = all(port.name in names for port in ports if port.dtype is not None)
    return [_column(arrays, port.name if has_names else f"{prefix}{i}", port, counts) for i, port in enumerate(ports)]


def _arrays_in(path: str | os.PathLike[str]) -> dict[str, Any]:
    check_is_file(path)
    check_expansion(Path(path), f"'{os.fspath(path)}'")
    loaded = np.load(path, allow_pickle=False)
    if not isinstance(loaded, NpzFile):
        raise TypeError("it holds one array without a name")
    with loaded:
        return arrays_in(loaded)


def vectors_header(
    title: str, name: str, vectors: Vectors, inputs: Sequence[Port], outputs: Sequence[Port], *, tolerance: float
) -> str:
    """Returns the text of `test_vectors.h`. `tolerance` is in steps of the outputs' scales."""
    ports = (*inputs, *outputs)
    offsets = _offsets(ports)
    steps = [0.0] * len(inputs) + [_step(port, [row[i] for row in vectors.outputs]) for i, port in enumerate(outputs)]
    rank = largest_rank(ports)
    rows = [_row(port, offset, step) for port, offset, step in zip(ports, offsets, steps, strict=False)]
    return filled(
        "test_vectors.h",
        title=title,
        NAME=name.upper(),
        name=name,
        count=len(vectors.inputs),
        stride=offsets[-1],
        total=max(offsets[-1] * len(vectors.inputs), 1),
        tolerance=f"{tolerance:g}",
        rank=rank,
        inputs=" \\\n".join(rows[: len(inputs)]) + " \\",
        outputs=" \\\n".join(rows[len(inputs) :]) + " \\",
    )


def largest_rank(ports: Sequence[Port]) -> int:
    """Returns the largest rank of ports, at least 1."""
    return max([1, *(len(port.shape) for port in ports)])


def _values(program: HostProgram, sample: Any) -> tuple[Any, ...]:
    """Returns a value for each input of the program."""
    named = sample if isinstance(sample, Mapping) else {}
    args = sample if isinstance(sample, (tuple, list)) else () if named else (sample,)
    return tuple(
        info.quantize(torch.as_tensor(value)) if _is_float_for_codes(value, info) else _as_tensor(value)
        for value, info in zip(program.values_of(*args, **named), program.inputs, strict=True)
    )


def _as_tensor(value: Any) -> Any:
    return torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value


def _is_float_for_codes(value: Any, info: Any) -> bool:
    if not isinstance(info, TensorInfo) or info.scale is None:
        return False
    return torch.as_tensor(value).is_floating_point()


def _random(program: HostProgram, count: int) -> Iterable[tuple[Any, ...]]:
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        yield tuple(_random_value(info, generator) for info in program.inputs)


def _random_value(info: Any, generator: torch.Generator) -> Any:
    """Returns normally distributed floats, random codes of a quantized input, random bools, or zeros for others."""
    if not isinstance(info, TensorInfo):
        return info.value
    if info.dtype.is_floating_point:
        return torch.randn(info.shape, generator=generator).to(info.dtype)
    if info.dtype == torch.bool:
        return torch.rand(info.shape, generator=generator) < 0.5
    if info.scale is None:
        return torch.zeros(info.shape, dtype=info.dtype)  # may be indices, and only 0 is always valid
    limits = torch.iinfo(info.dtype)
    return torch.randint(limits.min, limits.max + 1, info.shape, generator=generator, dtype=info.dtype)


def _column(arrays: Mapping[str, Any], name: str, port: Port, counts: set[int]) -> list[Any]:
    """Returns the values of one input or output, one for each vector."""
    (count,) = counts
    if port.dtype is None:
        return [port.constant] * count
    if name not in arrays:
        raise InputError(f"The test vectors lack the array '{name}' ({port.name}); they have {', '.join(arrays)}.")
    found = arrays[name]
    if found.shape[1:] != port.shape or str(found.dtype) != port.dtype:
        raise InputError(
            f"The test vectors' array '{name}' has shape {found.shape} and dtype {found.dtype}, but the program needs "
            f"{(count, *port.shape)} and {port.dtype}."
        )
    return list(torch.from_numpy(np.ascontiguousarray(found)))


def _step(port: Port, values: Sequence[Any]) -> float:
    """Returns the value of one LSB of an output; 0 for an output that has to equal the expected one."""
    if port.dtype in ("int8", "uint8", "int16"):
        return 1.0
    if port.dtype not in ("float32", "float64", "float16", "bfloat16"):
        return 0.0
    if port.step is not None:
        return port.step
    finite = [value[value.isfinite()].abs().max() for value in values if value.isfinite().any()]
    return float(max(finite, default=0.0)) / _LARGEST_ERROR_OF_CODES


def _row(port: Port, offset: int, step: float) -> str:
    if port.dtype is None:
        constant = port.constant
        kind = _KINDS.get(type(constant), _NONE)
        integer = _int64(int(constant)) if isinstance(constant, int) else "0"
        number = _double(constant) if isinstance(constant, float) else "0"
        return f"  {{{kind}, 0, 0, {{0}}, {{0}}, 0, 0, {integer}, {number}, 0.0f}},"
    order = ", ".join(map(str, port.dim_order)) or "0"
    shape = ", ".join(map(str, port.shape)) or "0"
    fields = f"{len(port.shape)}, {{{order}}}, {{{shape}}}, {offset}, {port.bytes}, 0, 0, {c_float(step)}"
    return f"  {{0, {port.code}, {fields}}},"


def _int64(value: int) -> str:
    """Returns an expression of C. The most negative number has no literal."""
    return "INT64_MIN" if value == -(1 << 63) else f"INT64_C({value})"


def _double(value: float) -> str:
    """Returns a literal of C. math.h defines the names of infinity and NaN."""
    if math.isnan(value):
        return "NAN"
    return repr(value) if math.isfinite(value) else "HUGE_VAL" if value > 0 else "-HUGE_VAL"


def _offsets(ports: Sequence[Port]) -> list[int]:
    """Returns the offset of each port in a vector, and the size of a vector."""
    offsets = [0]
    for port in ports:
        offsets.append(offsets[-1] + -(-port.bytes // ALIGNMENT) * ALIGNMENT)
    return offsets


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)
