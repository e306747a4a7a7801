"""The time of a program on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from openneutron.errors import OptionError
from openneutron.runtime.program import HostProgram

__all__ = ["time_on_host"]


def time_on_host(program: HostProgram, inputs: Sequence[Any] | Mapping[str, Any], repeat: int = 20) -> float:
    """Returns the median of the seconds of `repeat` runs, after one run that does not count.

    This is the time of LiteRT and of ExecuTorch's kernels on this machine, which tells nothing about the time on the
    NPU. The state of a program is reset at the end.

    Raises `OptionError` for a `repeat` below 1, and the errors of `HostProgram.seconds`.
    """
    if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 1:
        raise OptionError(f"repeat must be a positive number of runs, not {repeat!r}.")
    args, named = ((), inputs) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    seconds = program.seconds(args, named, repeat)
    if program.has_state:
        program.reset()
    return statistics.median(seconds)
