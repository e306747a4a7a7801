"""Removes LiteRT's notices from the error stream of the process."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_notices"]

_ERROR_STREAM = 2
_NOTICE = b"INFO: Created TensorFlow Lite XNNPACK delegate"
_LOCK = threading.Lock()


@contextmanager
def without_notices() -> Iterator[None]:
    """Removes the notice that LiteRT writes when it makes its first interpreter, which has no level that hides it.

    All other text that the process writes to its error stream in the block is written at the end of the block.
    """
    if sys.stderr is None or sys.stderr.closed:
        yield
        return
    with _LOCK, tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        original = os.dup(_ERROR_STREAM)
        os.dup2(file.fileno(), _ERROR_STREAM)
        try:
            yield
        finally:
            os.dup2(original, _ERROR_STREAM)
            os.close(original)
            file.seek(0)
            for line in file:
                if not line.startswith(_NOTICE):
                    os.write(_ERROR_STREAM, line)
