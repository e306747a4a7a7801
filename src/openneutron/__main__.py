"""`python -m openneutron` is the command line, as is the script `openneutron`."""

from __future__ import annotations

import signal

from openneutron.core.ctrl_c import end_process

__all__ = ["main"]


def main() -> None:
    """Imports and runs the command line. Ctrl-C ends the process without a traceback until a verb handles it, too."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_process)
    from openneutron.cli import main as run

    run(ends_process=True)


if __name__ == "__main__":
    main()
