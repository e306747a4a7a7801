"""The files of a package for firmware that verbs read. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openneutron.core.files import is_file, read_file
from openneutron.core.json_values import parsed_json
from openneutron.errors import FormatError

__all__ = ["MANIFEST", "VECTORS", "is_package", "manifest_of", "program_of_package"]

MANIFEST, VECTORS = "manifest.json", "test_vectors.bin"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def is_package(folder: Path) -> bool:
    """Whether a folder holds a package."""
    return is_file(folder / MANIFEST) and is_file(folder / VECTORS)


def program_of_package(folder: Path) -> Path:
    """Returns the program of a package that this machine can run, which is the portable program.

    Raises `FormatError` for a damaged manifest.
    """
    manifest = manifest_of(folder)
    name = manifest.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):  # it must not lead to another folder
        raise FormatError(
            f"In {folder / MANIFEST}, the name of the program is not an identifier of C. Write the package again."
        )
    portable = folder / f"{name}_portable.pte"
    return portable if is_file(portable) else folder / f"{name}.pte"


def manifest_of(folder: Path) -> Mapping[str, Any]:
    """Returns the manifest of a package. Raises `FormatError` if it is damaged."""
    try:
        found = parsed_json(read_file(folder / MANIFEST))
    except ValueError as error:
        raise FormatError(f"{folder / MANIFEST} is not valid JSON: {error}. Write the package again.") from error
    if not isinstance(found, dict):
        raise FormatError(f"{folder / MANIFEST} is not a JSON object. Write the package again.")
    return found
