"""Reads the program and the test vectors of a package for firmware."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openneutron.accuracy.board_dump import Array, BoardTensor
from openneutron.accuracy.board_outputs import BoardInputs
from openneutron.accuracy.board_tensors import board_inputs, board_outputs
from openneutron.accuracy.board_transforms import as_type
from openneutron.core.files import read_file
from openneutron.errors import FormatError, InputError
from openneutron.runtime.program import HostProgram, load
from openneutron.settings.package_files import MANIFEST, VECTORS, manifest_of, program_of_package

__all__ = ["BoardPackage", "read_package"]

ALIGNMENT = 16
"""Each input and output of a vector is padded to a multiple of this number of bytes."""
LARGEST_TOLERANCE = 1e9


@dataclass(frozen=True)
class BoardPackage:
    """The program of a package, and the vectors that its main.cpp runs."""

    program: HostProgram
    vectors: BoardInputs
    tolerance: float
    """The difference in LSBs that main.cpp allows."""


def read_package(folder: Path, *, isolated: bool = False) -> BoardPackage:
    """Reads the program and the vectors of a package. See `load` for `isolated`.

    Raises `InputError` for a missing file and for a device program without the portable program that it was compiled
    from, and `FormatError` for a damaged manifest or vectors that do not fit the program.
    """
    manifest = manifest_of(folder)
    file = program_of_package(folder)
    if manifest.get("payload") == "device" and not file.stem.endswith("_portable"):
        raise InputError(
            f"The package '{folder}' holds a device program, which this machine cannot run. Write the package with the "
            "portable program, too."
        )
    host = load(file, isolated=isolated)
    count, tolerance = manifest.get("vectors"), manifest.get("tolerance_lsb")
    if not isinstance(count, int) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance <= LARGEST_TOLERANCE:
        raise FormatError(f"{folder / MANIFEST} has no number of vectors or no tolerance. Write the package again.")
    inputs, outputs = board_inputs(host), board_outputs(host)
    found = _read_vectors(read_file(folder / VECTORS), count, inputs, outputs, folder / VECTORS)
    return BoardPackage(host, found, float(tolerance))


def _read_vectors(
    data: bytes, count: int, inputs: Sequence[BoardTensor], outputs: Sequence[BoardTensor], file: Path
) -> BoardInputs:
    sizes = [-(-tensor.bytes // ALIGNMENT) * ALIGNMENT for tensor in (*inputs, *outputs)]
    if count < 1 or len(data) < count * sum(sizes):
        raise FormatError(
            f"{file} has {len(data)} bytes, but {count} vectors of the program take {count * sum(sizes)}. Write the "
            "package again."
        )
    rows: list[list[Array]] = []
    at = 0
    for _ in range(count):
        row = []
        for tensor, size in zip((*inputs, *outputs), sizes, strict=True):
            row.append(as_type(data[at : at + tensor.bytes], tensor.dtype))
            at += size
        rows.append(row)
    split = len(inputs)
    return BoardInputs(tuple(tuple(row[:split]) for row in rows), expected=tuple(tuple(row[split:]) for row in rows))
