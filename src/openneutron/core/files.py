"""Reads files with typed errors, and writes files atomically."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from openneutron.errors import InputError, OutputError

__all__ = ["check_output", "read_file", "reason_of", "write_file"]


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Returns the bytes of a file. Raises `InputError` if the file cannot be read or `path` is not a path."""
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"A file must be given by its path, not by a {type(path).__name__}.")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read '{os.fspath(path)}': {reason_of(error)}.") from error


def reason_of(error: OSError) -> str:
    """Returns the reason why a file could not be read, without a full stop."""
    reason = error.strerror or str(error)
    return f"{reason}. Give a file in it" if isinstance(error, IsADirectoryError) else reason


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes `data` to a temporary file in the folder of `path`, then renames it to `path`.

    Raises `OutputError` if that fails; no temporary file remains then.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise OutputError(f"A file must be given by its path, not by a {type(path).__name__}.")
    path = Path(path)
    temporary = None
    if path.is_dir():
        raise OutputError(f"Cannot write '{path}': it is a folder. Give a path of a file in it.")
    if path.exists() and not path.is_file():
        raise OutputError(f"Cannot write '{path}': it is a device or a pipe. Give a path of a file.")
    path = path.resolve() if path.is_symlink() else path  # the link stays a link
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException as error:  # an interruption leaves no file behind, either
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise OutputError(f"Cannot write '{path}': {_with_remedy(error, path)}") from error


def check_output(path: str | os.PathLike[str]) -> None:
    """Raises `OutputError` if `path` is a folder, or if its folder does not exist. Writes nothing."""
    if Path(path).is_dir():
        raise OutputError(f"Cannot write '{path}': it is a folder. Give a path of a file in it.")
    if not Path(path).parent.is_dir():
        raise OutputError(f"Cannot write '{path}': the folder '{Path(path).parent}' does not exist.")


def _with_remedy(error: OSError, path: Path) -> str:
    reason = error.strerror or error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{reason}. Free some space, or give a path on another disk."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{reason}. Give a path in a folder in which you may write, or change that of '{path.parent}'."
    if error.errno == errno.ENOENT:
        return f"the folder '{path.parent}' does not exist. Give a path in an existing folder."
    return f"{reason}. Give a path in a folder that exists and can be written."
