"""Reads the list of CPU kernels of ExecuTorch's runtime, and the runtime's log, which has the cause of a failure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from executorch.extension.pybindings import _C

from openneutron.core.error_stream import captured_error_stream, captured_python_errors
from openneutron.core.locks import ForkSafeLock, Order
from openneutron.formats import pte

__all__ = ["RUNTIME", "cause_in", "kernel_names", "missing_kernels", "native_log"]

_LINE = re.compile(r"^\[[\w.]+:\d+\] (?P<text>.+)$", re.MULTILINE)
_OPERATOR = re.compile(r"in operator (?P<name>[\w:.]+): 0x")
_CHECK = re.compile(r"^Check failed \((?P<condition>.*)\): ?(?P<message>.*)$")


RUNTIME = ForkSafeLock(Order.RUNTIME)
"""Held during each call of ExecuTorch's Python module.

The module redirects `std::cout` and `std::cerr` for the length of a call, and restores what was there before. If calls
of two threads overlap, the later one restores the buffer of the earlier one, which does not exist anymore. The process
then ends with a segmentation fault at its next output. Calls overlap because LiteRT releases Python's lock.
"""


def kernel_names() -> frozenset[str]:
    """Returns the kernels of ExecuTorch's portable, optimized and quantized libraries ("aten::sin.out")."""
    with RUNTIME:
        return frozenset(_C._get_operator_names())


def missing_kernels(program: bytes) -> list[str]:
    """Returns the kernels that a `.pte` calls and this machine's runtime lacks.

    Raises `FormatError` for other files.
    """
    calls = [call for method in pte.read(program).methods for call in method.calls]
    return sorted({call.name for call in calls if isinstance(call, pte.KernelCall)} - kernel_names())


@contextmanager
def native_log() -> Iterator[Callable[[], str]]:
    """Captures the process's error stream in the block, and provides a function that returns the captured text.

    Output of other threads is captured, too, and lost. Use this only to repeat code that has failed.
    """
    # ExecuTorch's Python module writes to `sys.stderr`, but its libraries write to the file descriptor.
    with captured_error_stream() as file, captured_python_errors() as written:

        def text() -> str:
            file.seek(0)
            return written.getvalue() + file.read().decode(errors="replace")

        yield text


def cause_in(log: str) -> tuple[str | None, str | None]:
    """Returns the operator whose kernel failed, and the check that failed, from ExecuTorch's log.

    None stands for unknown.
    """
    operator = _OPERATOR.search(log)
    checks = [_CHECK.match(line) for line in _LINE.findall(log)]
    causes = [match["message"] or match["condition"] for match in checks if match]
    return (operator["name"] if operator else None), (causes[0].rstrip(".") if causes else None)
