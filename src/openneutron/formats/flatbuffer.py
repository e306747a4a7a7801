"""Reads flatbuffers from untrusted files. Checks every offset.

The layout follows flatbuffers' "Internals" document:

- A table starts with an int32, the distance back to its vtable.
- A vtable consists of u16 words: its own size, the size of the table, and for each field its position in the table, or
  0 for an absent field.
- A field that refers to a string, vector or table holds a u32 offset relative to the position of that offset.
- All numbers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from openneutron.errors import FormatError

__all__ = ["FORMS", "Layout", "Source", "Table", "read_layout", "read_table", "root"]

FILE_IDENTIFIER_AT = slice(4, 8)
# A valid file refers to each of its bytes about once. Without a limit, a small file whose offsets lead to the same
# table many times would take any amount of time and memory.
READS_PER_BYTE = 16


FORMS = {code: struct.Struct(f"<{code}") for code in "bBhHiIqQfd?"}
"""The formats of numbers, by their characters in the struct module."""

_FIELD, _REFERENCE = "a field of a table", "the offset in a field of a table"
# These texts name no numbers of fields: making a text for each number that is read would take most of the time.

Layout = tuple[int, tuple[int, ...]]
"""The size of tables with one vtable, and the offset of each field in the table (0 if absent)."""


class Source:
    """The bytes of a file. Error messages call the file `what` and end with `cure`. Counts the bytes that are read."""

    def __init__(self, data: bytes | memoryview, what: str, cure: str = "") -> None:
        self.view = memoryview(data).cast("B")
        self.what = what
        self.cure = f". {cure}" if cure else ""
        self.layouts: dict[int, Layout] = {}
        """The layouts of tables that were read, by the offset of the vtable."""
        self.tables: dict[int, Table] = {}
        """The tables that were read, by offset, so that a second reader of the file need not parse them."""
        self._bytes = len(self.view)
        self._allowance = READS_PER_BYTE * self._bytes + 1024

    def error(self, offset: int, expected: str, found: object = None) -> FormatError:
        """Returns the error for wrong contents at `offset`."""
        seen = "" if found is None else f", found {found}"
        return FormatError(f"{self.what}: byte {offset}: expected {expected}{seen}{self.cure}")

    def require(self, offset: int, size: int, expected: str) -> None:
        """Raises `FormatError` unless the file has `size` bytes at `offset`. Counts them as read."""
        if not 0 <= offset <= self._bytes - size:
            raise self.error(offset, expected, f"the end at byte {self._bytes}")
        self.count(size, offset)

    def count(self, size: int, offset: int) -> None:
        """Counts `size` bytes at `offset` as read. Raises `FormatError` if too many have been read."""
        self._allowance -= size
        if self._allowance < 0:
            raise self.error(offset, "a file that refers to each part once", "many references to the same parts")

    def number(self, offset: int, code: str, expected: str) -> int | float | bool:
        """Returns the number at `offset`. `code` is a format character of the struct module."""
        form = FORMS[code]
        size = form.size
        self._allowance -= size
        if self._allowance < 0 or not 0 <= offset <= self._bytes - size:  # here, because most of the time is spent here
            self._allowance += size
            self.require(offset, size, expected)
        value: int | float | bool = form.unpack_from(self.view, offset)[0]
        return value

    def integer(self, offset: int, code: str, expected: str) -> int:
        """Returns the integer at `offset`. `code` is the character of an integer."""
        return self.number(offset, code, expected)  # type: ignore[return-value]


@dataclass(frozen=True)
class Table:
    """A table of the file. Fields have the numbers of the schema, counted from 0; a union takes two numbers."""

    source: Source
    at: int
    """Offset of its first byte in the file."""
    size: int
    fields: tuple[int, ...]
    """Offset of each field in the table; 0 for an absent field."""

    def where(self, field: int) -> int | None:
        """Returns the offset of a field in the file; None if the field is absent."""
        place = self.fields[field] if field < len(self.fields) else 0
        return self.at + place if place else None

    def number(self, field: int, code: str, default: int | float | bool = 0) -> int | float | bool:
        """Reads a scalar field."""
        at = self.where(field)
        return default if at is None else self.source.number(at, code, _FIELD)

    def integer(self, field: int, code: str, default: int = 0) -> int:
        """Reads an integer field. `code` is the character of an integer."""
        return self.number(field, code, default)  # type: ignore[return-value]

    def table(self, field: int) -> Table | None:
        """Reads a field that refers to a table."""
        at = self._referenced_offset(field)
        return None if at is None else read_table(self.source, at)

    def text(self, field: int) -> str | None:
        """Reads a field that refers to a string. Bytes that are not UTF-8 become escape sequences."""
        data = self.data(field)
        return None if data is None else bytes(data).decode(errors="backslashreplace")

    def data(self, field: int) -> memoryview | None:
        """Reads a field that refers to a vector of bytes."""
        found = self._vector(field, 1)
        return None if found is None else self.source.view[found[0] : found[0] + found[1]]

    def data_at(self, field: int) -> int | None:
        """Returns the offset of the first element of a vector in the file."""
        found = self._vector(field, 1)
        return None if found is None else found[0]

    def numbers(self, field: int, dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
        """Reads a field that refers to a vector of numbers; empty if the field is absent."""
        element = np.dtype(dtype).newbyteorder("<")
        found = self._vector(field, element.itemsize)
        if found is None:
            return np.empty(0, dtype)
        return np.frombuffer(self.source.view, element, found[1], found[0]).astype(dtype)

    def count(self, field: int, dtype: npt.DTypeLike) -> int:
        """Returns the length of a vector of numbers, or of tables (as int32); 0 if the field is absent."""
        found = self._vector(field, np.dtype(dtype).itemsize)
        return 0 if found is None else found[1]

    def integers(self, field: int, dtype: npt.DTypeLike = np.int32) -> tuple[int, ...]:
        """Reads a field that refers to a vector of integers."""
        return tuple(self.numbers(field, dtype).tolist())

    def tables(self, field: int) -> Iterator[Table]:
        """Reads a field that refers to a vector of tables."""
        start, count = self._vector(field, 4) or (0, 0)
        for at in range(start, start + 4 * count, 4):
            yield read_table(self.source, at + self.source.integer(at, "I", "an offset to a table"))

    def _referenced_offset(self, field: int) -> int | None:
        at = self.where(field)
        if at is None:
            return None
        return at + self.source.integer(at, "I", _REFERENCE)

    def _vector(self, field: int, element: int) -> tuple[int, int] | None:
        """Returns the offset and the length of a vector whose elements have `element` bytes."""
        at = self._referenced_offset(field)
        if at is None:
            return None
        count = self.source.integer(at, "I", "the length of a vector")
        self.source.require(at + 4, element * count, f"a vector of {count} x {element} bytes")
        return at + 4, count


def read_table(source: Source, at: int) -> Table:
    """Reads the table at byte `at`. Raises `FormatError` if there is no valid table."""
    known = source.tables.get(at)
    if known is not None:
        source.count(known.size, at)
        return known
    back = source.integer(at, "i", "a table")
    vtable = at - back
    size, fields = read_layout(source, vtable)
    source.require(at, size, f"a table of {size} bytes")
    table = source.tables[at] = Table(source, at, size, fields)
    return table


def read_layout(source: Source, vtable: int) -> Layout:
    """Returns the layout at the offset `vtable`. Raises `FormatError` if there is no valid vtable."""
    if vtable not in source.layouts:
        source.layouts[vtable] = _read_layout(source, vtable)
    return source.layouts[vtable]


def _read_layout(source: Source, vtable: int) -> Layout:
    vtable_size = source.integer(vtable, "H", "the size of a vtable")
    size = source.integer(vtable + 2, "H", "the size of a table")
    if vtable_size < 4 or vtable_size % 2:
        raise source.error(vtable, "a vtable of an even number of bytes, at least 4", vtable_size)
    count = vtable_size // 2 - 2
    source.require(vtable + 4, 2 * count, f"a vtable of {count} fields")
    fields = struct.unpack_from(f"<{count}H", source.view, vtable + 4)
    outside = next((index for index, place in enumerate(fields) if place and not 4 <= place < size), None)
    if outside is not None:
        raise source.error(vtable + 4 + 2 * outside, f"a field within the table's {size} bytes", fields[outside])
    return size, fields


def root(source: Source, identifiers: tuple[bytes, ...]) -> Table:
    """Reads the root table of a file. Raises `FormatError` if the file has none of `identifiers`, or no valid table."""
    source.require(0, 8, "a file of at least 8 bytes")
    found = bytes(source.view[FILE_IDENTIFIER_AT])
    if found not in identifiers:
        wanted = " or ".join(repr(identifier.decode()) for identifier in identifiers)
        raise source.error(FILE_IDENTIFIER_AT.start, f"the identifier {wanted}", found)
    return read_table(source, source.integer(0, "I", "the offset of the root table"))
