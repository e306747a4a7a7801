"""Shows results as tables: as HTML in notebooks, and as text in terminals."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["ResultTable", "ShownAsTable"]

MOST_ROWS = 60


@dataclass(frozen=True)
class ResultTable:
    """A table with a title. It shows at most `MOST_ROWS` rows and tells how many are left out."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: Collection[int] = ()
    """Indices of the columns that are aligned to the right."""
    note: str = ""

    @property
    def caption(self) -> str:
        """The note, and the number of rows that are left out."""
        left_out = len(self.rows) - MOST_ROWS
        parts = (self.note, f"{left_out} more rows are not shown." if left_out > 0 else "")
        return " ".join(filter(None, parts))

    def as_html(self) -> str:
        """Returns the table as HTML for a notebook."""
        head = "".join(self._cell("th", number, text) for number, text in enumerate(self.headings))
        body = "".join(
            f"<tr>{''.join(self._cell('td', number, text) for number, text in enumerate(row))}</tr>"
            for row in self.rows[:MOST_ROWS]
        )
        caption = f"<p>{escape(self.caption)}</p>" if self.caption else ""
        return (
            f"<div><p><b>{escape(self.title)}</b></p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            f"{caption}</div>"
        )

    def _cell(self, tag: str, number: int, text: str) -> str:
        align = "right" if number in self.numeric else "left"
        return f'<{tag} style="text-align: {align}">{escape(text)}</{tag}>'

    def as_rich(self) -> Table:
        """Returns the table for a terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.title), title_justify="left", caption=Text(self.caption), caption_justify="left")
        for number, heading in enumerate(self.headings):
            table.add_column(Text(heading), justify="right" if number in self.numeric else "left", overflow="fold")
        for row in self.rows[:MOST_ROWS]:
            table.add_row(*map(Text, row))
        return table


class ShownAsTable:
    """A result that notebooks show as HTML, and `rich.print` as a table in a terminal.

    Each subclass defines `as_table`. Python raises `TypeError` where a subclass without it is defined: an abstract
    method would not be checked for subclasses of tuple.
    """

    __slots__ = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.as_table is ShownAsTable.as_table:
            raise TypeError(f"The class {cls.__name__} shows itself as a table, but has no as_table. Define as_table.")

    def as_table(self) -> ResultTable:
        """Returns the result as a table."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return self.as_table().as_html()

    def __rich__(self) -> Table:
        return self.as_table().as_rich()
