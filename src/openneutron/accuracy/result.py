"""The result of `analyze`, which can be printed, and saved as JSON or as an HTML page."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from openneutron.core.files import write_file
from openneutron.core.json_values import without_infinite_numbers
from openneutron.core.tables import ResultTable, ShownAsTable
from openneutron.results.layerwise_accuracy import LayerwiseAccuracy

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Analysis"]


@dataclass(frozen=True)
class Analysis(LayerwiseAccuracy, ShownAsTable):
    """The accuracy of a quantized model, layer by layer. See `print(analysis)`, `table`, `to_json` and `save_html`."""

    def __str__(self) -> str:
        from openneutron.accuracy.text import text_of_analysis

        return text_of_analysis(self)

    def as_table(self) -> ResultTable:
        """Returns the layers, the worst first, with the verdict as title and the advice as note."""
        from openneutron.accuracy.text import result_table

        return result_table(self)

    def table(self, limit: int | None = None) -> Table:
        """Returns a table with a row for each layer, in the order of `layers`, of at most `limit` rows."""
        from openneutron.accuracy.text import table_of

        return table_of(self, limit)

    def to_json(self) -> str:
        """Returns all results as JSON. Infinite numbers become null."""
        return json.dumps(without_infinite_numbers(asdict(self)), indent=1, allow_nan=False)

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_json()` to a file. Raises `OutputError` if the file cannot be written."""
        write_file(path, self.to_json().encode())

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Writes a self-contained HTML page with the table and charts.

        Raises `OutputError` if the file cannot be written, and `OptionError` if jinja2 or vl-convert-python is not
        installed.
        """
        from openneutron.page.html import analysis_page
        from openneutron.page.summary import analysis_rows

        write_file(path, analysis_page(analysis_rows(self)).encode())
