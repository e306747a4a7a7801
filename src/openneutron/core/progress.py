"""A progress bar on stderr, with the expected time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["counting_bar", "progress_bar"]


@contextmanager
def progress_bar(title: str, total: int, shown: bool | None) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar of `total` steps, and yields a function that advances it by a number of steps.

    `shown` is True, False, or None, which shows the bar if stderr is a terminal.
    """
    completed = 0

    def advance(count: int) -> None:
        nonlocal completed
        completed += count
        update(completed, total)

    with counting_bar(title, shown) as update:
        update(0, total)
        yield advance


@contextmanager
def counting_bar(title: str, shown: bool | None) -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar, and yields a function that sets the number of completed steps and of all steps.

    A total of 0 is an unknown total. `shown` is as in `progress_bar`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    shown = sys.stderr.isatty() if shown is None else shown
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total or None)
