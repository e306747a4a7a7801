"""Progress bars on stderr, with the expected time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["counting_bar", "phase_bar", "progress_bar", "shown_step"]

_WIDTH_OF_TEXTS = 46
_BAR_WIDTHS = (5, 40)
_NARROW = 60
_STEP: ContextVar[tuple[Progress, int] | None] = ContextVar("openneutron step", default=None)
"""The display of the step that runs in this context, and the task of the step itself. Two displays on one terminal
would draw over each other, so that bars within a step are rows of its display."""


@contextmanager
def shown_step(title: str, console: Console) -> Iterator[None]:
    """Shows that a step runs, with its time. Bars within the step take its place while they exist."""
    with _display(console, is_shown=True, is_transient=True) as progress:
        token = _STEP.set((progress, progress.add_task(title, total=None)))
        try:
            yield
        finally:
            _STEP.reset(token)


@contextmanager
def progress_bar(title: str, total: int, shown: bool | None) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar of `total` steps, and yields a function that advances it by a number of steps.

    `shown` is True, False, or None, which shows the bar if stderr is a terminal that can move its cursor.
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
def phase_bar(title: str, shares: Sequence[float]) -> Iterator[Callable[[], None]]:
    """Shows a bar within a step, and yields a function that ends one of its phases.

    `shares` are the expected shares of the phases in the time, in any unit. Without a step, nothing is shown.
    """
    if _STEP.get() is None:
        yield lambda: None
        return
    done = 0

    def end_phase() -> None:
        nonlocal done
        done += 1
        update(round(100 * sum(shares[:done]) / sum(shares)), 100)

    with counting_bar(title, True) as update:
        update(0, 100)
        yield end_phase


@contextmanager
def counting_bar(title: str, shown: bool | None) -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar, and yields a function that sets the number of completed steps and of all steps.

    A total of 0 is an unknown total. `shown` is as in `progress_bar`.
    """
    step = _STEP.get()
    if step is not None and shown is not False:
        with _row(*step, title) as update:
            yield update
        return
    if shown is False or (shown is None and not sys.stderr.isatty()):
        yield lambda _done, _total: None
        return
    from rich.console import Console

    console = Console(stderr=True)
    is_shown = not console.is_dumb_terminal if shown is None else shown
    with _display(console, is_shown=is_shown, is_transient=False) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total or None)


@contextmanager
def _row(progress: Progress, step: int, title: str) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import TaskID

    task = progress.add_task(title, total=None)
    progress.update(TaskID(step), visible=False)
    try:
        yield lambda done, total: progress.update(task, completed=done, total=total or None)
    finally:
        progress.remove_task(task)
        progress.update(TaskID(step), visible=all(one.id == step for one in progress.tasks))


def _display(console: Console, *, is_shown: bool, is_transient: bool) -> Progress:
    from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    class Count(TextColumn):
        """The numbers of completed and of all steps, if these are known."""

        def render(self, task: Task) -> Text:
            return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}")

    class Remaining(TimeRemainingColumn):
        """The expected time, if the number of all steps is known."""

        def render(self, task: Task) -> Text:
            return Text("") if task.total is None else Text.assemble(super().render(task), " left")

    from rich.text import Text

    width = max(_BAR_WIDTHS[0], min(_BAR_WIDTHS[1], console.width - _WIDTH_OF_TEXTS))
    columns = [TextColumn("{task.description}", markup=False), BarColumn(width), Count("")]
    columns += [TimeElapsedColumn()] if console.width > _NARROW else []
    return Progress(*columns, Remaining(compact=True), console=console, disable=not is_shown, transient=is_transient)
