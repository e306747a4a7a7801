"""Runs of consecutive indices. One slice reads one run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["IndexRun", "index_runs"]


@dataclass(frozen=True)
class IndexRun:
    """`count` consecutive indices of the tensor number `source`, from index `first`."""

    source: int
    first: int
    count: int

    @property
    def end(self) -> int:
        """The index after the last one."""
        return self.first + self.count


def index_runs(indices: Iterable[tuple[int, int]]) -> list[IndexRun]:
    """Splits a sequence of pairs (source, index) into runs of one source and consecutive ascending indices. Linear."""
    runs: list[IndexRun] = []
    for source, index in indices:
        last = runs[-1] if runs else None
        if last is not None and last.source == source and last.end == index:
            runs[-1] = IndexRun(source, last.first, last.count + 1)
        else:
            runs.append(IndexRun(source, index, 1))
    return runs
