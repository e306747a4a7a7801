"""The help of a verb."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

__all__ = ["Command"]


class Command(TyperCommand):
    """A command whose help shows long names of options in several lines. By default, rich cuts them off."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints the help."""
        from typer import rich_utils  # slow to import, and needed for help only

        rich_utils.highlighter = _Folding(rich_utils.highlighter)  # type: ignore[assignment]
        rich_utils.negative_highlighter = _Folding(rich_utils.negative_highlighter)  # type: ignore[assignment]
        super().format_help(ctx, formatter)


class _Folding:
    """A highlighter of typer whose texts are folded, and not cut off, where a column is too narrow."""

    def __init__(self, highlighter: Any) -> None:
        self._highlighter = highlighter

    def __call__(self, text: Any) -> Any:
        """Returns the highlighted text."""
        found = self._highlighter(text)
        found.overflow = "fold"
        return found
