"""Writes a summary as one self-contained HTML page."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from openneutron.core.files import write_file
from openneutron.errors import OptionError

if TYPE_CHECKING:
    from openneutron.page.content import Summary

__all__ = ["page_of", "write_page"]


def write_page(path: str | os.PathLike[str], summary: Summary, other: Summary | None = None) -> None:
    """Writes `page_of(summary, other)` to a file.

    Raises `OutputError` if the file cannot be written, and `OptionError` if an optional package is not installed.
    """
    write_file(path, page_of(summary, other).encode())


def page_of(summary: Summary, other: Summary | None = None) -> str:
    """Returns the page of a build. With `other`, it also shows the differences to that build.

    Raises `OptionError` if jinja2 is not installed.
    """
    return str(_environment().get_template("report.html").render(summary=summary, other=other))


def _environment() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise OptionError(
            f"The report page needs {error.name}, which is not installed: pip install 'openneutron[report]'. "
            "summary.json does not need it."
        ) from error
    loader = jinja2.PackageLoader("openneutron.page")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
