"""Tables of numbers, and tables of paths and labels."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openneutron.core.files import is_file, read_file
from openneutron.core.messages import listed
from openneutron.data.files import LISTS, SAMPLE_TYPES
from openneutron.data.labels import MOST_DIGITS
from openneutron.errors import InputError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["LABEL_NAMES", "PathTable", "Table", "TableHeaderWarning", "numbers_in", "paths_in", "read_table"]

LABEL_NAMES = frozenset({"class", "label", "labels", "target", "targets"})
PATH_NAMES = frozenset({"file", "filename", "file_name", "filepath", "image", "path"})
DELIMITERS = ",;\t"
INDEX_NAMES = ("", "Unnamed: 0")
"""The names that pandas gives to the column of row numbers."""
CLEAR_COUNT = 4
"""A row that counts fewer columns than these may well be a row of values."""
_SHOWN = 5  # files that a message lists

Row = tuple[int, tuple[str, ...]]
"""The number of a line, and its cells."""


class TableHeaderWarning(UserWarning):
    """The first line of a table of integers, or of few columns, was read as the numbers of its columns."""


@dataclass(frozen=True)
class Table:
    """The cells of a CSV file: the names of the columns, if it has a header, and the rows with their line numbers."""

    path: Path
    header: tuple[str, ...] | None
    rows: tuple[Row, ...]

    @property
    def is_numeric(self) -> bool:
        """Whether the first row has numbers only, except for the column of labels."""
        label = self.label_column
        return all(_is_number(cell) for index, cell in enumerate(self.rows[0][1]) if index != label)

    @property
    def label_column(self) -> int | None:
        """The column whose name in the header is one of `LABEL_NAMES`."""
        return self._column(LABEL_NAMES)

    @property
    def path_column(self) -> int | None:
        """The column whose name in the header is one of `PATH_NAMES`."""
        return self._column(PATH_NAMES)

    def _column(self, names: frozenset[str]) -> int | None:
        header = [name.lower() for name in self.header or ()]
        return next((index for index, name in enumerate(header) if name in names), None)


@dataclass(frozen=True)
class PathTable:
    """The files that a table lists, and the text of each label, if the table has labels."""

    paths: tuple[Path, ...]
    labels: tuple[str, ...] | None


def read_table(path: Path) -> Table:
    """Reads a CSV file, separated by commas, semicolons or tabs, or a list of lines of a path and a label.

    The first row is a header in one of these cases, unless a cell of it is the name of a file of data, such as a.wav:

    - One of its cells is in `LABEL_NAMES` or `PATH_NAMES`, and not a label of other rows.
    - It has no number, and the second row has numbers only.
    - All its cells are in quotes, and the second row has numbers without quotes.
    - It counts the columns (0, 1, 2, ... or from another number, as pandas writes it) in digits, and a number of
      another row is not written in digits. If all rows have digits only, the table needs at least three columns, and
      the second row must not continue the count. Then, and for fewer than four columns, a `TableHeaderWarning` reports
      the decision.

    A first column that counts the rows and has no name is the index that pandas writes. It is left out. Empty lines
    are left out. Raises `InputError` for a file without rows, with rows of different lengths, or of another encoding
    than UTF-8.
    """
    lines = _text_of(path).splitlines()
    if path.suffix.lower() in LISTS:
        # The label is what follows the last space, so that paths may have spaces.
        cells = [(number, tuple(line.strip().rsplit(None, 1))) for number, line in enumerate(lines, 1)]
    else:
        cells = _cells(path, lines)
    rows = [(number, tuple(cell.strip() for cell in row)) for number, row in cells if any(map(str.strip, row))]
    header = _header_of(path, lines, rows)
    rows = rows[1:] if header is not None else rows
    if not rows:
        raise InputError(f"'{path}' has no rows.")
    width = len(header or rows[0][1])
    for number, row in rows:
        if len(row) != width:
            raise InputError(f"'{path}', line {number}, has {len(row)} columns; the lines before it have {width}.")
    if header is not None and _has_index(header, rows):
        header, rows = header[1:], [(number, row[1:]) for number, row in rows]
    return Table(path, header, tuple(rows))


def _text_of(path: Path) -> str:
    try:
        return read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is not UTF-8 text: {error.reason} at byte {error.start}.") from error


def _header_of(path: Path, lines: Sequence[str], rows: Sequence[Row]) -> tuple[str, ...] | None:
    """Returns the first row if it is a header by the rules of `read_table`, else None."""
    if not rows:
        return None
    header = rows[0][1]
    names_files = any(Path(cell).suffix.lower() in SAMPLE_TYPES for cell in header)
    if not names_files and (_is_header(rows) or _is_quoted_header(lines, rows)):
        return header
    if len(rows) < 2 or not _counts_columns(rows):
        return None
    if len(header) < CLEAR_COUNT or all(cell.isdecimal() for _, row in rows[1:] for cell in row):
        warnings.warn(
            f"The first line of '{path}', {listed(header, 3)}, is taken for the numbers of the columns, and not "
            "for a row. If it is a row, write names of columns above it.",
            TableHeaderWarning,
            stacklevel=3,
        )
    return header


def _cells(path: Path, lines: Sequence[str]) -> list[Row]:
    first = next((line for line in lines if line.strip()), "")
    delimiter = max(DELIMITERS, key=first.count)
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    try:
        return [(reader.line_num, tuple(row)) for row in reader]
    except csv.Error as error:
        raise InputError(f"'{path}', line {reader.line_num}, is not valid CSV: {error}.") from error


def _is_header(rows: Sequence[Row]) -> bool:
    first = rows[0][1]
    named = [index for index, cell in enumerate(first) if cell.lower() in LABEL_NAMES | PATH_NAMES]
    if any(all(row[index : index + 1] != (first[index],) for _, row in rows[1:]) for index in named):
        return True
    if first[0] not in INDEX_NAMES and any(map(_is_number, first)):
        return False
    return len(rows) > 1 and all(map(_is_number, rows[1][1]))


def _is_quoted_header(lines: Sequence[str], rows: Sequence[Row]) -> bool:
    """Whether all cells of the first row are in quotes, and the second row has numbers without quotes, as R writes."""
    first, second = (*filter(str.strip, lines), "", "")[:2]
    return (
        len(rows) > 1
        and first.count('"') == 2 * len(rows[0][1])
        and '"' not in second
        and all(map(_is_number, rows[1][1]))
    )


def _counts_columns(rows: Sequence[Row]) -> bool:
    """Whether the first row has the numbers of the columns instead of values."""
    first, second = rows[0][1], rows[1][1]
    if len(first) < 2 or not _counts(first):
        return False
    if any(_is_number(cell) and not cell.isdecimal() for _, row in rows[1:] for cell in row):
        return True
    return len(first) > 2 and not (_counts(second) and int(second[0]) == int(first[-1]) + 1)


def _counts(cells: Sequence[str]) -> bool:
    if not all(cell.isascii() and cell.isdecimal() and len(cell) <= MOST_DIGITS for cell in cells):
        return False
    return all(int(cell) == int(cells[0]) + index for index, cell in enumerate(cells))


def _has_index(header: Sequence[str], rows: Sequence[Row]) -> bool:
    return len(header) > 1 and header[0] in INDEX_NAMES and _counts([row[0] for _, row in rows])


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def numbers_in(table: Table) -> tuple[np.ndarray[Any, Any], tuple[str, ...] | None]:
    """Returns the numbers as float32 [rows, columns], without the column of labels, and the texts of the labels.

    Raises `InputError`, with line and column, for a cell that is not a finite number.
    """
    import numpy as np

    label = table.label_column
    columns = [index for index in range(len(table.rows[0][1])) if index != label]
    if not columns:
        raise InputError(f"'{table.path}' has labels only.")
    values = np.empty((len(table.rows), len(columns)), np.float32)
    for row, (number, cells) in enumerate(table.rows):
        try:
            with np.errstate(over="ignore"):  # infinity is refused below
                values[row] = [float(cells[column]) for column in columns]
        except ValueError as error:
            column = next(column for column in columns if not _is_number(cells[column]))
            raise InputError(
                f"'{table.path}', line {number}, column {column + 1}: {cells[column]!r} is not a number."
            ) from error
        if not all(map(math.isfinite, values[row])):
            raise InputError(f"'{table.path}', line {number}, has a number that is not finite in float32.")
    labels = None if label is None else tuple(cells[label] for _, cells in table.rows)
    return values, labels


def paths_in(table: Table) -> PathTable:
    """Returns the files of a table of paths, which are relative to the folder of the table, and their labels.

    Without names of columns, the first is the path and the second the label. Raises `InputError` if files do not exist.
    """
    width = len(table.rows[0][1])
    path = table.path_column
    label = table.label_column
    if path is None:
        path = 0 if label != 0 else 1
    if label is None and width > 1:
        label = 1 if path != 1 else 0
    if path >= width or (table.header is None and width > 2):
        raise InputError(
            f"'{table.path}' has {width} columns of which the first is not a number. Give a table of path and label, "
            "with a header 'path,label' if it has more columns, or a table of numbers."
        )
    folder = table.path.parent
    paths = [(number, folder / cells[path]) for number, cells in table.rows]
    missing = [f"{file} (line {number})" for number, file in paths if not is_file(file)]
    if missing:
        raise InputError(
            f"'{table.path}' names {len(missing)} files that do not exist: {listed(missing, _SHOWN)}. Paths are "
            f"relative to the folder '{folder}'."
        )
    labels = None if label is None else tuple(cells[label] for _, cells in table.rows)
    return PathTable(tuple(file for _, file in paths), labels)
