"""The handler of Ctrl-C before a verb runs. Imports nothing, because it is set before the command line is imported."""

from __future__ import annotations

import os
from types import FrameType

__all__ = ["INTERRUPTED", "end_process"]

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells define it."""


def end_process(_number: int, _frame: FrameType | None) -> None:
    """Ends the process at once, without a traceback. Nothing is written before a verb runs."""
    os._exit(INTERRUPTED)
