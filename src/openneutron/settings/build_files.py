"""The names of the files of a build, and its files among the arguments of verbs. Does not import torch."""

from __future__ import annotations

from pathlib import Path

from openneutron.core.files import check_is_file, is_file, is_folder, reason_of
from openneutron.errors import InputError
from openneutron.settings.package_files import MANIFEST, VECTORS, is_package, program_of_package
from openneutron.settings.toml import FILE_NAME

__all__ = [
    "PAGE", "PROGRAM", "QUANTIZED", "SUMMARY", "check_program", "check_quantized", "files_read_in", "is_archive",
    "program_in", "quantized_in",
]  # fmt: skip

PROGRAM, QUANTIZED, PAGE, SUMMARY = "model.pte", "quantized.pt2", "report.html", "summary.json"
"""The names of the files of a build."""
_IDENTIFIERS = (b"ET", b"BP", b"TFL3")
"""Identifiers of programs, bundled programs and TFLite models, which lie behind the offset of a flatbuffer's root."""
_IDENTIFIERS_AT, _IDENTIFIED_BYTES = 4, 8
_ARCHIVE = b"PK"
"""The first bytes of a zip archive."""


def program_in(path: Path) -> Path:
    """Returns the program of the folder of a build or of a package, or `path` itself.

    Raises `InputError` for a folder without a program.
    """
    if is_folder(path) and not is_file(path / PROGRAM) and is_package(path):
        return program_of_package(path)
    return _file_in(path, PROGRAM, "of a package, or a program (.pte)")


def quantized_in(path: Path) -> Path:
    """Returns the quantized model of a folder, or `path` itself. Raises `InputError` for a folder without one."""
    return _file_in(path, QUANTIZED, "or a quantized model (.pt2)")


def files_read_in(folder: Path) -> list[Path]:
    """Returns the files that verbs read in the folder of a build or of a package; none for any other path.

    The report page is not among them, because no verb reads it. Raises `FormatError` for a damaged manifest.
    """
    if is_file(folder / PROGRAM) or is_file(folder / QUANTIZED):
        return [folder / name for name in (PROGRAM, QUANTIZED, SUMMARY, FILE_NAME)]
    if is_package(folder):
        return [program_of_package(folder), folder / MANIFEST, folder / VECTORS]
    return []


def check_quantized(path: Path) -> None:
    """Raises `InputError` for a file whose name or first bytes are not those of a quantized model (.pt2)."""
    if not is_archive(path) or path.suffix != ".pt2":
        raise InputError(
            f"'{path}' is not a quantized model (.pt2). Give the file that `openneutron quantize` writes, or "
            f"{QUANTIZED} in the folder of a build."
        )


def check_program(path: Path) -> None:
    """Raises `InputError` for a file that does not begin as a program (.pte), a bundled program or a TFLite model."""
    if not _beginning(path, _IDENTIFIED_BYTES)[_IDENTIFIERS_AT:].startswith(_IDENTIFIERS):
        raise InputError(
            f"'{path}' is not an ExecuTorch program (.pte): bytes 4 and 5 are not b'ET'. Give the folder of a build, "
            "or a file that `openneutron lower` writes."
        )


def is_archive(path: Path) -> bool:
    """Whether a file begins as a zip archive, such as a .pt2 or a .npz. Raises `InputError` if it cannot be read."""
    return _beginning(path, len(_ARCHIVE)) == _ARCHIVE


def _beginning(path: Path, count: int) -> bytes:
    """Returns the first `count` bytes of a file. Raises `InputError` for a device, a pipe and a file without rights."""
    check_is_file(path)
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise InputError(f"Cannot read '{path}': {reason_of(error)}.") from error


def _file_in(path: Path, name: str, kind: str) -> Path:
    if not is_folder(path):
        return path
    if not is_file(path / name):
        raise InputError(f"The folder '{path}' has no {name}. Give the folder of a build, {kind}.")
    return path / name
