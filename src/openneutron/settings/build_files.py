"""The names of the files of a build, and its files among the arguments of verbs. Does not import torch."""

from __future__ import annotations

from pathlib import Path

from openneutron.core.files import is_file, is_folder
from openneutron.errors import InputError

__all__ = ["PAGE", "PROGRAM", "QUANTIZED", "SUMMARY", "program_in", "quantized_in"]

PROGRAM, QUANTIZED, PAGE, SUMMARY = "model.pte", "quantized.pt2", "report.html", "summary.json"
"""The names of the files of a build."""


def program_in(path: Path) -> Path:
    """Returns the program of a folder, or `path` itself. Raises `InputError` for a folder without a program."""
    return _file_in(path, PROGRAM, "a program (.pte)")


def quantized_in(path: Path) -> Path:
    """Returns the quantized model of a folder, or `path` itself. Raises `InputError` for a folder without one."""
    return _file_in(path, QUANTIZED, "a quantized model (.pt2)")


def _file_in(path: Path, name: str, kind: str) -> Path:
    if not is_folder(path):
        return path
    if not is_file(path / name):
        raise InputError(f"The folder '{path}' has no {name}. Give the folder of a build, or {kind}.")
    return path / name
