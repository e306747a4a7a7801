"""Paths among the arguments of verbs, which are checked before anything is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import typer

from openneutron.core.files import exists, is_folder, similar_path
from openneutron.errors import InputError

__all__ = ["existing", "existing_file"]

Paths = TypeVar("Paths", Path, "Sequence[Path]", None)


def existing(parameter: typer.CallbackParam, value: Paths) -> Paths:
    """Raises `InputError` if a path does not exist. A callback of typer."""
    for path in _paths(value):
        if not exists(path):
            raise InputError(f"{_name(parameter)}: '{path}' does not exist.{similar_path(path)}")
    return value


def existing_file(parameter: typer.CallbackParam, value: Paths) -> Paths:
    """Raises `InputError` if a path does not exist or is a folder. A callback of typer."""
    for path in _paths(existing(parameter, value)):
        if is_folder(path):
            raise InputError(f"{_name(parameter)}: '{path}' is a folder. Give a file.")
    return value


def _name(parameter: typer.CallbackParam) -> str:
    """Returns the name that the help text shows."""
    shown: str | None = getattr(parameter, "metavar", None)
    return shown.lower() if shown else str(parameter.name)


def _paths(value: Path | Sequence[Path] | None) -> Sequence[Path]:
    return () if value is None else (value,) if isinstance(value, Path) else value
