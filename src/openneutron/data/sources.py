"""Sequences of samples from files, from arrays, and from functions. A sample is read when it is accessed."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from openneutron.core.files import check_is_file, exists, is_file, similar_path
from openneutron.core.messages import as_sentence, listed
from openneutron.core.user_code import code_of_user
from openneutron.data.arrays import StoredRows, read_array, read_arrays, split_labels
from openneutron.data.audio import Waveform, read_waveform
from openneutron.data.files import ARRAYS, AUDIO, COMPRESSED_AUDIO, IMAGES, NAMED_ARRAYS, TABLES
from openneutron.data.images import open_image
from openneutron.data.tables import numbers_in, read_table
from openneutron.errors import InputError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ArraySource", "FileSource", "GivenSource", "Sample", "Source", "read_one_of", "read_value"]

MOST_NAMED = 10
"""The number of files that an error names, if several cannot be read."""
MOST_CHECKED = 1000
"""The number of files that are read after one that cannot be read."""
MOST_CHECKED_BYTES = 16_000_000
"""The size of these files together."""
MOST_CHECK_SECONDS = 0.5
"""The processor time after which no other file is read."""


@dataclass(frozen=True)
class Sample:
    """One sample: its inputs, its label (None if it has none), the file that it comes from, and its name in messages.

    `inputs` is a tensor, an array, an image of Pillow, a `Waveform`, or a mapping from names to arrays; after a
    transform, it is what the transform returns.
    """

    inputs: Any
    label: Any = None
    path: Path | None = None
    name: str = ""


class Source(Protocol):
    """A sequence of samples without a transform."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...
    def __iter__(self) -> Iterator[Sample]: ...


def read_value(path: Path) -> Any:
    """Reads a file that holds one sample: an image of Pillow, a `Waveform`, an array, or a mapping of arrays.

    A table of numbers is a float32 array [rows, columns], or [columns] if it has one row. Raises `InputError`, which
    names the file, for a damaged file, an unknown type, a device and a pipe.
    """
    suffix = path.suffix.lower()
    check_is_file(path)
    if not is_file(path):
        raise InputError(f"The file '{path}' does not exist.{similar_path(path)}")
    if suffix in IMAGES:
        return open_image(path)
    if suffix in AUDIO | COMPRESSED_AUDIO:
        return read_waveform(path)
    if suffix in ARRAYS:
        return read_array(path)
    if suffix in NAMED_ARRAYS:
        arrays, _ = split_labels(read_arrays(path), are_samples=False)
        return arrays if len(arrays) > 1 else next(iter(arrays.values()))
    if suffix in TABLES:
        table = read_table(path)
        if not table.is_numeric:
            raise InputError(
                f"'{path}' is not a table of numbers: its line {table.rows[0][0]} is {list(table.rows[0][1])}."
            )
        values, _ = numbers_in(table)
        return values[0] if len(values) == 1 else values
    known = ", ".join(sorted(IMAGES | ARRAYS | NAMED_ARRAYS | AUDIO | COMPRESSED_AUDIO | TABLES))
    raise InputError(f"The type of '{path}' is unknown. Give a file of one of these types: {known}.")


def read_one_of(
    paths: Sequence[Path],
    index: int,
    read: Callable[[Path], Any] = read_value,
    clock: Callable[[], float] = time.thread_time,
) -> Any:
    """Returns `read(paths[index])`.

    If that raises `InputError`, its message also names the files among the next of `paths` that `read` refuses: up to
    `MOST_CHECKED` files of `MOST_CHECKED_BYTES` together, for `MOST_CHECK_SECONDS` of `clock`, without files that have
    been deleted. They are not read if the cause is a missing package, which all files would need.
    """
    try:
        return read(paths[index])
    except InputError as error:
        if isinstance(error.__cause__, ImportError):
            raise
        end = clock() + MOST_CHECK_SECONDS
        after = takewhile(lambda _: clock() <= end, _within_bytes(paths[index + 1 : index + 1 + MOST_CHECKED]))
        checked = [(path, _is_refused(path, read)) for path in after]
        others = [path for path, is_refused in checked if is_refused]
        if not others:
            raise
        names = listed(map(str, others), MOST_NAMED - 1)
        count = f"{len(others)} of the next {len(checked):,} files"
        raise InputError(f"{as_sentence(error)} Also, {count} cannot be read: {names}.") from error


def _within_bytes(paths: Iterable[Path]) -> Iterator[Path]:
    """Returns the first of `paths` whose files have `MOST_CHECKED_BYTES` together, without files that do not exist."""
    left = MOST_CHECKED_BYTES
    for path in paths:
        size = _size(path)
        left -= size or 0
        if left < 0:
            return
        if size is not None:
            yield path


def _size(path: Path) -> int | None:
    """Returns the bytes of a file; None if it does not exist."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _is_refused(path: Path, read: Callable[[Path], Any]) -> bool:
    """Whether `read` refuses a file. A file that has been deleted is not refused."""
    try:
        read(path)
    except InputError:
        return exists(path)
    return False


@dataclass(frozen=True)
class FileSource:
    """Files with one sample each. `labels` has a class index for each file, or is None."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = self.paths[index]
        label = None if self.labels is None else self.labels[index]
        return Sample(read_one_of(self.paths, index, self._value), label, path, str(path))

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def _value(self, path: Path) -> Any:
        value = read_value(path)
        if isinstance(value, Waveform) and value.rate != self._rate[1]:
            raise InputError(
                f"{path} has {value.rate} frames per second, but {self._rate[0]} has {self._rate[1]}. Resample one of "
                f"them first: ffmpeg -i in.wav -ar {self._rate[1]} out.wav."
            )
        return value

    @functools.cached_property
    def _rate(self) -> tuple[Path, int]:
        """The first recording that can be read, and its rate. All other recordings must have this rate.

        Raises `InputError` if no recording can be read.
        """
        recordings = [path for path in self.paths if path.suffix.lower() in AUDIO | COMPRESSED_AUDIO]
        path = next((path for path in recordings if not _is_refused(path, read_value)), recordings[0])
        return path, read_waveform(path).rate


@dataclass(frozen=True)
class ArraySource:
    """Arrays whose first dimension counts samples. A single array gives the inputs. Several arrays become a mapping by
    name.

    `labels` has a class index for each sample, or is None.
    """

    path: Path
    arrays: Mapping[str, np.ndarray[Any, Any] | StoredRows]
    labels: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> Sample:
        values = {name: array[index] for name, array in self.arrays.items()}
        label = None if self.labels is None else self.labels[index]
        inputs = values if len(values) > 1 else next(iter(values.values()))
        return Sample(inputs, label, self.path, f"{self.path}[{index}]")

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class GivenSource:
    """The items that `make` returns: a data set, a DataLoader, an iterable, or a generator that is made anew each time.

    Batches of a DataLoader are split into their rows, which keep a first dimension of 1. If `are_pairs`, each item is a
    pair of inputs and label, or a `Stream` of pairs; otherwise an item is the inputs, which a label may follow.
    """

    make: Callable[[], Any]
    name: str
    are_pairs: bool

    @property
    def has_length(self) -> bool:
        """Whether the number of items is known without reading them."""
        return hasattr(self.make(), "__len__")

    def __len__(self) -> int:
        given = self.make()
        if _is_loader(given) or not hasattr(given, "__len__"):
            return sum(1 for _ in self.items())
        with code_of_user(f"The length of {self.name}"):
            return len(given)

    def __getitem__(self, index: int) -> Sample:
        given = self.make()
        if not _is_loader(given) and hasattr(given, "__getitem__") and hasattr(given, "__len__"):
            if not 0 <= index < len(self):
                raise IndexError(index)
            with code_of_user(f"Reading sample {index} of {self.name}"):
                return self._sample(index, given[index])
        for item in islice(self.items(), index, None):
            return self._sample(index, item)
        raise IndexError(index)

    def __iter__(self) -> Iterator[Sample]:
        return (self._sample(index, item) for index, item in enumerate(self.items()))

    def items(self) -> Iterator[Any]:
        """Returns the items as they are given. The items of a DataLoader are the rows of its batches."""
        with code_of_user(f"Reading {self.name}"):
            yield from _items(self.make(), self.name)

    def _sample(self, index: int, item: Any) -> Sample:
        name = f"sample {index} of {self.name}"
        if not self.are_pairs or hasattr(item, "steps"):
            return Sample(item, name=name)
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise InputError(
                f"{name[0].upper()}{name[1:]} is a {type(item).__name__} instead of a pair of inputs and label."
            )
        return Sample(item[0], item[1], name=name)


def _is_loader(given: Any) -> bool:
    torch_data = sys.modules.get("torch.utils.data")
    return torch_data is not None and isinstance(given, torch_data.DataLoader)


def _items(given: Any, name: str) -> Iterator[Any]:
    if _is_loader(given) and given.batch_size is not None:
        for batch in given:
            yield from _rows(batch)
    elif isinstance(given, Iterable) and not isinstance(given, (str, Mapping)):
        yield from given
    elif hasattr(given, "__getitem__") and hasattr(given, "__len__") and not isinstance(given, (str, Mapping)):
        yield from (given[index] for index in range(len(given)))
    else:
        raise InputError(
            f"{name} must be or return an iterable of inputs, a tensor of samples or a data set, not a "
            f"{type(given).__name__}."
        )


def _rows(batch: Any) -> Iterator[Any]:
    """Splits a batch along the first dimension of its tensors, and along its lists of labels."""
    from torch.utils import _pytree as pytree

    leaves, structure = pytree.tree_flatten(batch)
    count = min((len(leaf) for leaf in leaves if hasattr(leaf, "__len__") and not isinstance(leaf, str)), default=0)
    for row in range(count):
        yield pytree.tree_unflatten(
            [leaf[row : row + 1] if hasattr(leaf, "shape") else leaf for leaf in leaves], structure
        )
