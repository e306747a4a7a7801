"""Reads all tables of a flatbuffer's vector at once, with numpy. Checks every offset, as `flatbuffer.py` does.

A file has thousands of small tables of a few layouts. Reading them together takes a tenth of the time.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from openneutron.formats.flatbuffer import FORMS, Source, Table, read_layout

__all__ = ["Offsets", "Scalars", "Tables", "read_tables", "tables_at"]

Offsets = npt.NDArray[np.int64]
"""Offsets in the file."""


Scalars = Sequence[tuple[str, int | float | bool]]
"""The format character of each field, from field 0 on, and its value if it is absent."""

MAX_FIELDS = 64
"""The largest number of fields of a table; the schemas of TFLite and ExecuTorch have fewer."""


@dataclass(frozen=True)
class Tables:
    """Tables of one kind. Fields have the numbers of the schema, counted from 0; a union takes two numbers."""

    source: Source
    at: Offsets
    """Offset of the first byte of each table."""
    _bytes: npt.NDArray[np.uint8]
    _layout_of: npt.NDArray[np.intp]
    _places: Offsets
    """Offset of each field in the table, [layout, field]; 0 for an absent field."""
    _sizes: list[int]
    """The bytes of a table of each layout."""

    @functools.cached_property
    def _rows(self) -> tuple[list[int], list[int], list[list[int]]]:
        """The offset and the layout of each table, and the fields of each layout."""
        return self.at.tolist(), self._layout_of.tolist(), self._places.tolist()

    @functools.cached_property
    def _present(self) -> list[frozenset[int]]:
        """The fields of each layout."""
        return [frozenset(np.nonzero(places)[0].tolist()) for places in self._places]

    def __len__(self) -> int:
        return len(self.at)

    def allow_only(self, *fields: int) -> None:
        """Raises `FormatError` if a table has another field than `fields`."""
        others = self._places.copy()
        others[:, [field for field in fields if field < others.shape[1]]] = 0
        layout, field = np.nonzero(others)
        if len(layout):
            at = int(self.at[self._layout_of == layout[0]][0])
            raise self.source.error(at, f"a table with no other fields than {fields}", f"field {field[0]}")

    def where(self, field: int) -> Offsets:
        """Returns the offset of a field of each table; 0 for an absent field."""
        if field >= self._places.shape[1]:
            return np.zeros(len(self.at), np.int64)
        place = self._places[self._layout_of, field]
        return np.where(place > 0, self.at + place, 0)

    def numbers(self, field: int, dtype: npt.DTypeLike, default: int = 0) -> npt.NDArray[Any]:
        """Reads a scalar field of each table."""
        at = self.where(field)
        values = np.full(len(at), default, dtype)
        (present,) = np.nonzero(at)
        if len(present):
            values[present] = _gather(self.source, self._bytes, at[present], np.dtype(dtype))
        return values

    def targets(self, field: int) -> Offsets:
        """Returns the offset that a field of each table refers to; 0 for an absent field."""
        at = self.where(field)
        (present,) = np.nonzero(at)
        if len(present):
            at[present] += _gather(self.source, self._bytes, at[present], np.dtype("<u4"))
        return at

    def vectors(self, field: int, itemsize: int) -> tuple[list[int], list[int]]:
        """Returns, for each table, the offset of the first element and the length of a vector; 0, 0 if it is absent.

        The elements have `itemsize` bytes. Raises `FormatError` if a vector is not within the file.
        """
        at, counts = self._vectors(field, itemsize)
        return at.tolist(), counts.tolist()

    def _vectors(self, field: int, itemsize: int) -> tuple[Offsets, Offsets]:
        at = self.targets(field)
        counts = np.zeros(len(at), np.int64)
        (present,) = np.nonzero(at)
        if len(present):
            counts[present] = _gather(self.source, self._bytes, at[present], np.dtype("<u4"))
            ends = at[present] + 4 + counts[present] * itemsize
            (outside,) = np.nonzero(ends > len(self._bytes))
            if len(outside):
                first = int(at[present][outside[0]])
                raise self.source.error(first, "a vector within the file", f"an end at byte {ends[outside[0]]}")
            self.source.count(int(counts.sum()) * itemsize, int(at[present][0]))
            at[present] += 4
        return at, counts

    def values(self, field: int, dtype: npt.DTypeLike) -> tuple[npt.NDArray[Any], Offsets]:
        """Reads a vector of numbers of each table: all values one after the other, and the length of each vector."""
        element = np.dtype(dtype)
        starts, counts = self._vectors(field, element.itemsize)
        ends = np.cumsum(counts)
        firsts = np.repeat(starts - element.itemsize * (ends - counts), counts)
        at = firsts + element.itemsize * np.arange(len(firsts))
        return _gather(self.source, self._bytes, at, element), counts

    def check_texts(self, field: int) -> None:
        """Raises `FormatError` if a string of the tables is not UTF-8, or is not followed by a zero byte."""
        starts, counts = self._vectors(field, 1)
        (present,) = np.nonzero(starts)
        starts, counts = starts[present], counts[present]
        ends = starts + counts
        (unended,) = np.nonzero(_gather(self.source, self._bytes, ends, np.dtype(np.uint8)))
        if len(unended):
            raise self.source.error(int(ends[unended[0]]), "the zero byte after a string")
        view = self.source.view
        texts = [view[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        try:
            str(b"\0".join(texts), "utf-8")  # all at once; no text in UTF-8 continues after a zero byte
        except UnicodeDecodeError:
            self._refuse_text(starts.tolist(), texts)

    def _refuse_text(self, starts: Sequence[int], texts: Sequence[memoryview]) -> None:
        """Raises `FormatError` for the first text that is not UTF-8."""
        for start, text in zip(starts, texts, strict=True):
            try:
                str(text, "utf-8")
            except UnicodeDecodeError as error:
                raise self.source.error(start, "a text in UTF-8", error.object[:40]) from error

    def fields_of(self, row: int) -> frozenset[int]:
        """Returns the numbers of the fields that one table has."""
        present: frozenset[int] = self._present[self._layout_of[row]]
        return present

    def content(self, row: int) -> tuple[int, bytes]:
        """Returns what two tables with equal scalar fields have in common: the layout, and the bytes of the fields."""
        offsets, layouts, _ = self._rows
        at, layout = offsets[row], layouts[row]
        return layout, self.source.view[at + 4 : at + self._sizes[layout]].tobytes()

    def scalars(self, row: int, fields: Scalars) -> list[Any]:
        """Reads scalar fields of one table: a value for each of `fields`, which have the numbers from 0 on."""
        offsets, layouts, places = self._rows
        at, view, own = offsets[row], self.source.view, places[layouts[row]]
        own = own + [0] * (len(fields) - len(own))
        try:
            return [
                FORMS[code].unpack_from(view, at + place)[0] if place else default
                for (code, default), place in zip(fields, own, strict=False)
            ]
        except struct.error as error:
            raise self.source.error(at, "a table within the file", f"the end at byte {len(view)}") from error


def read_tables(parent: Table, field: int) -> Tables:
    """Reads the tables of a vector of tables; none if the field is absent. Raises `FormatError` for an invalid one."""
    source = parent.source
    offsets = parent.numbers(field, np.uint32).astype(np.int64)
    start = parent.data_at(field) or 0
    return tables_at(source, start + 4 * np.arange(len(offsets)) + offsets)


def tables_at(source: Source, at: Offsets) -> Tables:
    """Reads the tables at the offsets `at`. Counts all bytes of each table as read, so that reads of its fields are not
    counted again.

    Raises `FormatError` for the first invalid table, and for too many references to the same tables.
    """
    data = np.frombuffer(source.view, np.uint8)
    if not len(at):
        return Tables(source, at, data, np.zeros(0, np.intp), np.zeros((0, 0), np.int64), [])
    source.count(16 * len(at), int(at[0]))
    vtables = at - _gather(source, data, at, np.dtype("<i4"))
    layouts, layout_of = np.unique(vtables, return_inverse=True)
    read = [read_layout(source, int(layout)) for layout in layouts]
    sizes = np.array([size for size, _ in read], np.int64)[layout_of]
    (outside,) = np.nonzero(at + sizes > len(data))
    if len(outside):
        raise source.error(int(at[outside[0]]), f"a table of {sizes[outside[0]]} bytes", f"the end at byte {len(data)}")
    source.count(int(sizes.sum()), int(at[0]))
    most = max(len(fields) for _, fields in read)
    if most > MAX_FIELDS:
        wide = next(row for row, (_, fields) in enumerate(read) if len(fields) == most)
        raise source.error(int(layouts[wide]), f"a vtable of at most {MAX_FIELDS} fields", most)
    source.count(8 * most * len(read), int(at[0]))
    places = np.zeros((len(read), most), np.int64)
    for row, (_, fields) in zip(places, read, strict=True):
        row[: len(fields)] = fields
    return Tables(source, at, data, layout_of, places, [size for size, _ in read])


def _gather(source: Source, data: npt.NDArray[np.uint8], at: Offsets, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Returns the number at each offset. Raises `FormatError` if one is not within the file."""
    size = dtype.itemsize
    (outside,) = np.nonzero((at < 0) | (at > len(data) - size))
    if len(outside):
        raise source.error(int(at[outside[0]]), f"a number of {size} bytes", f"the end at byte {len(data)}")
    little = dtype.newbyteorder("<")
    numbers: npt.NDArray[Any]
    if (at % size).any():
        numbers = data[at[:, None] + np.arange(size)].view(little)[:, 0]
    else:
        numbers = data[: len(data) // size * size].view(little)[at // size]
    return numbers
