"""Removes LiteRT's notices from the error stream of the process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from openneutron.core.error_stream import ERROR_STREAM, captured_error_stream

__all__ = ["without_notices"]

_NOTICE = b"INFO: Created TensorFlow Lite XNNPACK delegate"


@contextmanager
def without_notices() -> Iterator[None]:
    """Removes the notice that LiteRT writes when it makes its first interpreter. No log level hides it.

    All other text that the process writes to its error stream in the block is written at the end of the block.
    """
    if sys.stderr is None or sys.stderr.closed:
        yield
        return
    lines: list[bytes] = []
    try:
        with captured_error_stream() as file:
            try:
                yield
            finally:
                file.seek(0)
                lines = file.readlines()
    finally:
        for line in lines:
            if not line.startswith(_NOTICE):
                os.write(ERROR_STREAM, line)
