"""`python -m openneutron` is the command line, as is the script `openneutron`."""

from __future__ import annotations

import os
import signal
from types import FrameType

__all__ = ["main"]

INTERRUPTED = 130


def main() -> None:
    """Imports and runs the command line. Ctrl-C ends the process without a traceback during the import, too."""
    handles = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if handles:
        signal.signal(signal.SIGINT, _end)
    from openneutron.cli import main as run

    if handles:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run(ends_process=True)


def _end(_number: int, _frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
