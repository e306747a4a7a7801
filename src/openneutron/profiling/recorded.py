"""The times that a board recorded, before they are joined with a program."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BoardProfile", "CpuCall", "DelegateTimes", "median"]


def median(cycles: Sequence[int]) -> int:
    """Returns the median of the runs, rounded."""
    return round(statistics.median(cycles))


@dataclass(frozen=True)
class DelegateTimes:
    """The cycles of each kernel of one delegate on the NPU, in order of execution."""

    kernels: tuple[tuple[int, ...], ...]
    """For each kernel, the cycles of each run."""
    end: tuple[int, ...] = ()
    """The cycles after the last kernel in each run, in which the NPU writes the profile itself."""


@dataclass(frozen=True)
class CpuCall:
    """A call of a kernel on the CPU."""

    name: str
    ticks: tuple[int, ...]
    """The time of each run, in ticks of the clock of ExecuTorch's platform layer on that board."""


@dataclass(frozen=True)
class BoardProfile:
    """The times of a program on a board."""

    delegates: tuple[DelegateTimes, ...]
    """The delegates whose times the NPU measured, in order of execution."""
    cpu: tuple[CpuCall, ...] = ()
    """The calls on the CPU, in order of execution; empty if the profile has none."""

    @property
    def runs(self) -> int:
        """The number of runs."""
        counts = [len(cycles) for one in self.delegates for cycles in one.kernels] + [
            len(one.ticks) for one in self.cpu
        ]
        return max(counts, default=0)
