"""Converts errors of the user's own functions to typed errors that name the user's file and line."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from openneutron.core.messages import first_line
from openneutron.errors import InputError, OpenNeutronError

__all__ = ["code_of_user", "line_of_user"]

_FOLDERS = (*(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib")), Path(__file__).parents[1])


def prefixes_of(folders: Iterable[Path]) -> tuple[str, ...]:
    """Returns the beginnings of the paths of files in `folders`.

    Python names a file by the path through which it was imported, which may contain links or not.
    """
    return tuple({f"{path}{os.sep}" for folder in folders for path in (folder, folder.resolve())})


_NOT_OF_USER = prefixes_of(_FOLDERS)


@contextmanager
def code_of_user(what: str, kind: type[OpenNeutronError] = InputError, *, place: str | None = None) -> Iterator[None]:
    """Converts exceptions of a function of the user to errors of `kind`, whose messages begin with `what`.

        with code_of_user("The transform of cat.png"):
            value = transform(picture)

    The message names the exception and the user's line. `SystemExit` is converted, too, because a function that is
    called for each sample must not end the process. Warnings of OpenNeutron and `MemoryError` pass, and so do errors of
    OpenNeutron, whose messages begin with `place` if that is given.
    """
    try:
        yield
    except MemoryError:
        raise
    except OpenNeutronError as error:
        if place is None:
            raise
        placed = type(error)(f"{place}: {error}")  # the text of the error has its node and its source line
        placed.node, placed.op, placed.source = error.node, error.op, error.source
        raise placed from error
    except (Exception, SystemExit) as error:
        if isinstance(error, Warning) and type(error).__module__.startswith("openneutron"):
            raise
        source = line_of_user(error.__traceback__)
        raise kind(f"{what} failed: {type(error).__name__}: {first_line(error)}", source=source) from error


def line_of_user(traceback: TracebackType | None) -> str | None:
    """Returns "file:line" of the innermost frame that is neither in an installed package nor in Python's library."""
    found = None
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if not file.startswith((*_NOT_OF_USER, "<")):
            found = f"{file}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return found
