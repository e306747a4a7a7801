"""Outputs of a run: the classes with the largest values, files, and a summary."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from openneutron.core.files import check_output, write_file
from openneutron.data.labels import ClassNames
from openneutron.errors import InputError, OptionError

__all__ = ["ClassScore", "OutputSummary", "check_array_file", "save_outputs", "summarize_outputs", "top_classes"]

_SHOWN_VALUES = 6


@dataclass(frozen=True)
class ClassScore:
    """A class of an output: its index, its name (the index as text, if it has none), and its value."""

    index: int
    """Index of the class."""
    name: str
    """Name of the class; its index as text, if it has no name."""
    score: float
    """Value of the output for this class."""


def top_classes(output: Any, labels: ClassNames | Sequence[str] | None = None, k: int = 5) -> list[list[ClassScore]]:
    """Returns the `k` classes with the largest values of each row of an output [rows, classes], the largest first.

    An output with one dimension is one row; further dimensions of size 1 do not count. Among equal values, the lower
    index comes first. NaN comes last.

    Raises `InputError` for an output of another form and for a wrong number of `labels`, and `OptionError` for a `k`
    below 1.
    """
    import torch

    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise OptionError(f"k must be a positive number of classes, not {k!r}.")
    values = torch.as_tensor(output)
    rows = values.reshape(1, -1) if values.dim() < 2 else values.flatten(1)
    if values.dim() > 2 and any(size > 1 for size in values.shape[2:]):
        raise InputError(
            f"The output has shape {tuple(values.shape)}; class scores have shape [rows, classes]. Leave out the "
            "labels."
        )
    names = labels.names if isinstance(labels, ClassNames) else labels
    if names is not None and len(names) != rows.shape[1]:
        raise InputError(
            f"The labels name {len(names)} classes, but the output has {rows.shape[1]}. Give the names of all classes."
        )
    found = []
    for row in rows.double():
        ranked = torch.where(row.isnan(), torch.tensor(-torch.inf, dtype=torch.float64), row)
        order = ranked.argsort(descending=True, stable=True)[:k].tolist()
        found.append([ClassScore(i, names[i] if names is not None else str(i), float(row[i])) for i in order])
    return found


@dataclass(frozen=True)
class OutputSummary:
    """A row of a table of outputs: name, dtype and shape, extremes and mean, and the first values.

    For an output that is not a tensor, `dtype` is its type, and only `first` is set.
    """

    name: str
    """Name of the output."""
    dtype: str
    """Its dtype; the type of an output that is not a tensor."""
    shape: tuple[int, ...] | None
    """Its shape; None if it is not a tensor."""
    minimum: float | None
    """The smallest value; None if it has no numbers."""
    mean: float | None
    """The mean of the values; None if it has no numbers."""
    maximum: float | None
    """The largest value; None if it has no numbers."""
    first: tuple[Any, ...]
    """The first values."""


def summarize_outputs(outputs: Any, names: Sequence[str] | None = None) -> list[OutputSummary]:
    """Returns a row for each output of a run. `names` are "output0", "output1", ... by default."""
    return [_summary(name, value) for name, value in _named(outputs, names)]


def _summary(name: str, value: Any) -> OutputSummary:
    if not hasattr(value, "shape"):
        return OutputSummary(name, type(value).__name__, None, None, None, None, (value,))
    shape = tuple(value.shape)
    dtype = str(value.dtype).removeprefix("torch.")
    first = tuple(value.flatten()[:_SHOWN_VALUES].tolist())
    if not value.numel():
        return OutputSummary(name, dtype, shape, None, None, None, ())
    numbers = value.double()
    return OutputSummary(name, dtype, shape, float(numbers.min()), float(numbers.mean()), float(numbers.max()), first)


def _named(outputs: Any, names: Sequence[str] | None) -> list[tuple[str, Any]]:
    values = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    names = names or [f"output{index}" for index in range(len(values))]
    if len(names) != len(values):
        raise InputError(f"There are {len(values)} outputs, but {len(names)} names.")
    return list(zip(names, values, strict=True))


def check_array_file(path: str | os.PathLike[str]) -> None:
    """Raises `OptionError` unless the file is a .npy or .npz file, and the errors of `check_output`."""
    if Path(path).suffix.lower() not in (".npy", ".npz"):
        raise OptionError(f"'{path}' must be a .npy or a .npz file.")
    check_output(path)


def save_outputs(path: str | os.PathLike[str], outputs: Any, names: Sequence[str] | None = None) -> None:
    """Writes the outputs of a run to a .npy file, or to a .npz file with an array for each output.

    Numbers are arrays without dimensions. Outputs that are None or text are not in a .npz file. The file is written
    beside `path` and then renamed, so that no half-written file remains.

    Raises `OptionError` for another type of file and for several outputs in a .npy file, and `OutputError` if the file
    cannot be written.
    """
    import numpy as np

    arrays = {
        name: np.asarray(value)
        for name, value in _named(outputs, names)
        if value is not None and not isinstance(value, str)
    }
    check_array_file(path)
    suffix = Path(path).suffix.lower()
    buffer = io.BytesIO()
    if suffix == ".npz":
        _save_arrays(buffer, arrays)
    else:
        if len(arrays) != 1:
            raise OptionError(f"'{path}' holds one array, but there are {len(arrays)} outputs. Give a .npz file.")
        np.save(buffer, next(iter(arrays.values())))
    write_file(path, buffer.getvalue())


def _save_arrays(file: IO[bytes], arrays: Mapping[str, Any]) -> None:
    """Writes a .npz file. The bytes do not depend on the clock. `numpy.savez` fails if the clock is before 1980."""
    import numpy as np

    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            entry = io.BytesIO()
            np.save(entry, array)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), entry.getvalue())
