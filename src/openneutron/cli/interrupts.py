"""Remembers Ctrl-C."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

__all__ = ["Interrupts"]


class Interrupts:
    """Remembers whether Ctrl-C was pressed within the context.

    Ctrl-C raises `KeyboardInterrupt` where Python happens to be. Python ignores it in callbacks of weak references and
    in destructors, and NumPy and torch turn it into other errors while they are imported.

    Only the main thread can handle Ctrl-C. If the process ignores it, or has a handler of its own, that is kept.
    """

    def __init__(self) -> None:
        self.seen = False
        self._handles = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._handles = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._handles:
            signal.signal(signal.SIGINT, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handles:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        """Raises `KeyboardInterrupt` if Ctrl-C was pressed."""
        if self.seen:
            raise KeyboardInterrupt

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        signal.default_int_handler(number, frame)
