"""A table that stays readable in narrow terminals."""

from __future__ import annotations

from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

__all__ = ["FittingTable"]

_COLUMN_WIDTH = 9
"""The average width of a column below which a table is a list."""


class FittingTable(Table):
    """A table of rich that breaks long cells instead of cutting them.

    In a terminal that is too narrow for its columns, each row is a list of the names of columns and the cells.
    """

    def add_column(self, *arguments: Any, **options: Any) -> None:
        """Adds a column, as `rich.table.Table` does."""
        super().add_column(*arguments, **{"overflow": "fold", **options})

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.show_header or options.max_width >= _COLUMN_WIDTH * len(self.columns):
            yield from super().__rich_console__(console, options)
            return
        for row in zip(*(column.cells for column in self.columns), strict=True):
            for number, (column, cell) in enumerate(zip(self.columns, row, strict=True)):
                if str(cell):
                    yield Text(f"{'  ' * (number > 0)}{column.header}: {cell}".removeprefix(": "))
