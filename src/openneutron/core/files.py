"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from openneutron.errors import InputError, OutputError

__all__ = ["read_file", "reason_of", "write_file"]


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file. Raises `InputError` where it cannot be read, and for what is no path."""
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"A file is given by its path, not by a {type(path).__name__}.")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read '{os.fspath(path)}': {reason_of(error)}.") from error


def reason_of(error: OSError) -> str:
    """Why a file could not be read, without the full stop."""
    reason = error.strerror or str(error)
    return f"{reason}. Give a file in it" if isinstance(error, IsADirectoryError) else reason


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` beside `path`, then rename. Raises `OutputError` where that cannot be done; nothing is left then."""
    if not isinstance(path, (str, os.PathLike)):
        raise OutputError(f"A file is given by its path, not by a {type(path).__name__}.")
    path = Path(path)
    beside = None
    if path.is_dir():
        raise OutputError(f"Cannot write '{path}': it is a folder. Give a path of a file in it.")
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
        raise OutputError(f"Cannot write '{path}': {_why(error, path)}") from error


def _why(error: OSError, path: Path) -> str:
    reason = error.strerror or error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{reason}. Free some space, or give a path on another disk."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{reason}. Give a path in a folder in which you may write, or change that of '{path.parent}'."
    if error.errno == errno.ENOENT:
        return f"the folder '{path.parent}' does not exist. Give a path in one that does."
    return f"{reason}. Give a path in a folder that exists and can be written."
