"""Streams whose reader may end before the verb does, such as stdout in `openneutron build ... | head -1`."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["EXIT_CODE", "closed_streams", "watch_streams"]

EXIT_CODE = 141
"""The exit code after output that nothing read: 128 plus the number of SIGPIPE, as shells define it."""


class _WatchedFile(io.FileIO):
    """A file for output. After its reader has closed the pipe, output goes nowhere, and `is_closed_pipe` is True."""

    is_closed_pipe = False

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            self.is_closed_pipe = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # child processes and native code write there, too
            os.close(nowhere)
            return memoryview(data).nbytes


def watch_streams() -> None:
    """Replaces stdout and stderr of the process, so that a closed pipe does not end a verb before its files."""
    sys.stdout = _watched(sys.stdout)
    sys.stderr = _watched(sys.stderr)


def _watched(stream: Any) -> Any:
    """Returns a text stream of the same descriptor; `stream` itself if it is not a file of the process."""
    buffer = getattr(stream, "buffer", None)
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(buffer, (io.BufferedWriter, io.FileIO)):
        return stream
    stream.flush()
    file = _WatchedFile(stream.fileno(), "wb", closefd=False)
    is_buffered = isinstance(buffer, io.BufferedWriter)  # not with PYTHONUNBUFFERED
    return io.TextIOWrapper(
        io.BufferedWriter(file) if is_buffered else file,
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def closed_streams() -> bool:
    """Writes what is buffered. Returns whether the reader of a watched stream has closed its pipe."""
    found = False
    for stream in (sys.stdout, sys.stderr):
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)
        if isinstance(raw, _WatchedFile):
            stream.flush()
            found = found or raw.is_closed_pipe
    return found
