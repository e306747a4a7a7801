"""Files appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from openneutron.errors import InputError, OutputError

__all__ = ["read_file", "write_file"]


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file. Raises `InputError` where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read '{os.fspath(path)}': {error.strerror or error}.") from error


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` beside `path`, then rename. Raises `OutputError` where that cannot be done; nothing is left then."""
    path = Path(path)
    beside = None
    try:
        descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        Path(beside).chmod(0o666 & ~umask)
        Path(beside).replace(path)
    except OSError as error:
        if beside is not None:
            Path(beside).unlink(missing_ok=True)
        raise OutputError(
            f"Cannot write '{path}': {error.strerror or error}. Give a path in a folder that exists and can be written."
        ) from error
