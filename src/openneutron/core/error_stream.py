"""Captures what the process writes to its error stream, native libraries included."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import IO

from openneutron.core.locks import ForkSafeLock, Order

__all__ = ["ERROR_STREAM", "captured_error_stream", "captured_python_errors"]

ERROR_STREAM = 2
"""The descriptor of the error stream."""
_LOCK = ForkSafeLock(Order.ERROR_STREAM)


@contextmanager
def captured_error_stream() -> Iterator[IO[bytes]]:
    """Redirects the error stream of the process, for all threads, to a temporary file, and yields the file.

    Only one thread at a time can be in such a block. If the system has no space for the file, or the process has no
    error stream, nothing is captured and the file is empty.
    """
    with _LOCK:
        try:
            file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed below
        except OSError:
            yield io.BytesIO()
            return
        with file:
            original = _redirect(file)
            try:
                yield file
            finally:
                if original is not None:
                    os.dup2(original, ERROR_STREAM)
                    os.close(original)


def _redirect(file: IO[bytes]) -> int | None:
    """Redirects the error stream to `file`. Returns a descriptor of the original stream; None if that is closed."""
    if sys.stderr is not None and not sys.stderr.closed:
        sys.stderr.flush()
    try:
        original = os.dup(ERROR_STREAM)
    except OSError:
        return None
    os.dup2(file.fileno(), ERROR_STREAM)
    return original


@contextmanager
def captured_python_errors() -> Iterator[io.StringIO]:
    """Redirects `sys.stderr` to a `StringIO`, and yields it. Only one thread at a time can be in such a block."""
    with _LOCK, redirect_stderr(io.StringIO()) as written:
        yield written
