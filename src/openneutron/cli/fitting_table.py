"""A table that stays readable in narrow terminals."""

from __future__ import annotations

from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table
from rich.text import Text

__all__ = ["FittingTable"]

_WORD_WIDTH = 12
"""The width of a cell from which its words may be broken, such as a path."""
_FRAME_WIDTH = 3
"""The width of the spaces of a column and its frame. The table has one more line at its left."""


class FittingTable(Table):
    """A table of rich that breaks long cells instead of cutting them.

    In a terminal that is too narrow for its columns, each row is a list of the names of columns and the cells.
    """

    def add_column(self, *arguments: Any, **options: Any) -> None:
        """Adds a column, as `rich.table.Table` does."""
        super().add_column(*arguments, **{"overflow": "fold", **options})

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.show_header or options.max_width > sum(_FRAME_WIDTH + _least_width(one) for one in self.columns):
            yield from super().__rich_console__(console, options)
            return
        for row in zip(*(column.cells for column in self.columns), strict=True):
            for number, (column, cell) in enumerate(zip(self.columns, row, strict=True)):
                if str(cell):
                    yield Text(f"{'  ' * (number > 0)}{column.header}: {cell}".removeprefix(": "))


def _least_width(column: Column) -> int:
    """Returns the width of the longest word in a column, at most `_WORD_WIDTH`."""
    words = (word for cell in (column.header, *column.cells) for word in str(cell).split())
    return min(_WORD_WIDTH, max(map(cell_len, words), default=0))
