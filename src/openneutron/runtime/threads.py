"""Passes the number of LiteRT's threads to the engines that a program creates while it is loaded.

ExecuTorch's runtime creates the delegates, and has no argument for this number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["current_threads", "engine_threads"]

_THREADS = ContextVar("openneutron_engine_threads", default=1)


def current_threads() -> int:
    """Returns the number of threads for an engine that is created now; 1 outside `engine_threads`."""
    return _THREADS.get()


@contextmanager
def engine_threads(count: int) -> Iterator[None]:
    """Sets the number of threads of the engines that the block creates in this thread."""
    token = _THREADS.set(count)
    try:
        yield
    finally:
        _THREADS.reset(token)
