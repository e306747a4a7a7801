"""Paths of source files in a form that does not depend on where the project and the packages are."""

from __future__ import annotations

import os
import re
import sysconfig
from pathlib import Path

__all__ = ["FRAME", "portable_trace", "short_source"]

Root = str | os.PathLike[str] | None
FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
"""A frame in the text of a stack trace."""
_PACKAGES = ("site-packages", "dist-packages")
_OWN_PARENT = Path(__file__).resolve().parents[2].as_posix()
_LIBRARY_PARENT = Path(sysconfig.get_paths()["stdlib"]).parent.as_posix()


def short_source(source: str, root: Root = None) -> str:
    """Returns "file:line" with the path relative to the folder of installed packages, or to `root`.

    The path does not then depend on where the project is. Without `root`, a path in the current folder is relative to
    it, and a path elsewhere is unchanged.
    """
    source = source.replace("\\", "/")
    for folder in _PACKAGES:
        if (parts := f"/{source}".rpartition(f"/{folder}/"))[1]:
            return parts[2]
    own = (Path.cwd() if root is None else Path(root).resolve()).as_posix()
    if root is None or source.startswith(f"{own}/") or not source.startswith("/"):
        return source.removeprefix(f"{own}/")
    return os.path.relpath(source, own)


def portable_trace(trace: str, root: Root = None) -> str:
    """Returns a stack trace with the paths of `short_source`. Paths of packages begin with "site-packages/"."""
    return FRAME.sub(lambda found: f'File "{_portable(found["file"], root)}", line {found["line"]}', trace)


def _portable(file: str, root: Root) -> str:
    file = file.replace("\\", "/")
    if file.startswith("<"):
        return file
    if file.startswith(f"{_OWN_PARENT}/openneutron/"):
        return f"{_PACKAGES[0]}/{file.removeprefix(f'{_OWN_PARENT}/')}"
    if any(f"/{folder}/" in file for folder in _PACKAGES):
        return f"{_PACKAGES[0]}/{short_source(file)}"
    if file.startswith(f"{_LIBRARY_PARENT}/"):
        return file.removeprefix(f"{_LIBRARY_PARENT}/")
    return short_source(file, root)
