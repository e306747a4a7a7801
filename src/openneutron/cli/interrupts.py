"""Remembers Ctrl-C, and the signals that ask a process to end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from openneutron.core.ctrl_c import end_process

__all__ = ["LONGEST_WAIT", "Interrupts", "restored_signals"]

LONGEST_WAIT = 3.0
"""The seconds that a signal waits for the end of an import."""
_RETRY_SECONDS = 0.05
_IMPORT = "<frozen importlib._bootstrap>"

_ENDING = ("SIGTERM", "SIGHUP")
"""The signals that end a process: of `kill`, and of a terminal that is closed. Windows has only the first."""


def _handlers() -> dict[int, Any]:
    """Returns the handlers of the signals; none in another thread than the main one, which cannot set them."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = [int(getattr(signal, name)) for name in ("SIGINT", *_ENDING) if hasattr(signal, name)]
    return {number: signal.getsignal(number) for number in numbers}


@contextmanager
def restored_signals() -> Iterator[None]:
    """Restores the handlers of the signals at the end of the context."""
    before = _handlers()
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # a handler that was not set by Python
                signal.signal(number, handler)


class Interrupts:
    """Remembers whether Ctrl-C was pressed within the context, or the process was asked to end by a signal.

    Both raise `KeyboardInterrupt` where Python happens to be, so that temporary files are removed and other processes
    end. Python ignores it in callbacks of weak references and in destructors, and NumPy and torch turn it into other
    errors while they are imported.

    While a module is imported, the exception waits for the end of the import, at most `LONGEST_WAIT` seconds. One of 31
    tries with `profile` in a terminal ended with SIGABRT. An exception in the initialization of a native module is a
    possible cause, but not a proven one.

    Only the main thread can handle signals. If the process ignores one, or has a handler of its own, that is kept.
    After a signal, further ones are ignored when the context has ended (see `restored_signals`).
    """

    def __init__(self) -> None:
        self.number: int | None = None
        """The number of the first signal; None if there was none."""
        self._before: dict[int, Any] = {}
        self._since = 0.0
        self._retry: threading.Timer | None = None

    @property
    def seen(self) -> bool:
        """Whether there was a signal."""
        return self.number is not None

    def __enter__(self) -> Self:
        for number, handler in _handlers().items():
            if handler in ((signal.default_int_handler, end_process) if number == signal.SIGINT else (signal.SIG_DFL,)):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._retry is not None:
            self._retry.cancel()
        for number, handler in self._before.items():
            # After a signal, the process ends, and a second one would interrupt its end.
            signal.signal(number, signal.SIG_IGN if self.seen else handler)

    def check(self) -> None:
        """Raises `KeyboardInterrupt` if there was a signal."""
        if self.seen:
            raise KeyboardInterrupt

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
            self._since = time.monotonic()
        main = threading.main_thread().ident
        waits = _is_importing(frame) and time.monotonic() - self._since < LONGEST_WAIT
        if main is None or not waits or not hasattr(signal, "pthread_kill"):  # Windows has no pthread_kill
            signal.default_int_handler(number, frame)
        self._retry = threading.Timer(_RETRY_SECONDS, signal.pthread_kill, (main, number))
        self._retry.daemon = True
        self._retry.start()


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a module is imported in `frame` or in one of its callers."""
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT:
            return True
        frame = frame.f_back
    return False
