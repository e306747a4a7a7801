"""Reads data of any form as a sequence of samples, with labels if they have them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from openneutron.core.files import check_is_file, exists, is_file, is_folder, names_in, similar_path
from openneutron.core.objects import check_object, is_reference, load_object, parse_reference
from openneutron.core.user_code import code_of_user
from openneutron.data.arrays import read_arrays, read_rows, split_labels
from openneutron.data.files import (
    ARRAYS,
    AUDIO,
    COMPRESSED_AUDIO,
    IMAGES,
    LISTS,
    NAMED_ARRAYS,
    TABLES,
    check_has_data,
    data_files,
    is_data_folder,
    warn_of_skipped,
)
from openneutron.data.labels import ClassNames, class_names_of, read_labels
from openneutron.data.sources import ArraySource, FileSource, GivenSource, Sample, Source
from openneutron.data.tables import numbers_in, paths_in, read_table
from openneutron.data.transforms import Transform
from openneutron.errors import InputError, OptionError

__all__ = ["Samples", "check_data", "read_data"]

FORMS_OF_LABELLED = (
    "Give a folder with one folder for each class, a CSV file of path and label, a .npz file with an array 'labels', "
    "or 'file.py:function' that yields pairs of inputs and label."
)


@dataclass(frozen=True)
class Samples(Sequence[Sample]):
    """A sequence of samples in a fixed order. Each access reads the sample again.

    `name` is the text that named the data. `classes` has the names of the classes by index, if the data or a file of
    labels name them. `transform` converts the inputs of each sample. `skipped` has the files that hold no samples.
    """

    source: Source
    name: str
    transform: Transform | None = None
    class_names: ClassNames | None = None
    skipped: tuple[Path, ...] = ()
    chosen: tuple[int, ...] | None = None
    """The indices of the samples of `source`; None for all."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes by index; None if unknown."""
        return None if self.class_names is None else self.class_names.names

    @property
    def is_given(self) -> bool:
        """Whether the samples are items of a Python object, such as what a function returned, and not of files."""
        return isinstance(self.source, GivenSource)

    @property
    def are_pairs(self) -> bool:
        """Whether each item of the Python object is a pair of inputs and label."""
        return isinstance(self.source, GivenSource) and self.source.are_pairs

    @property
    def given(self) -> Any:
        """The Python object with the samples, without the transform. A function is called anew.

        With `chosen`, this is an iterator over its items. Raises `OptionError` for samples of files.
        """
        if not isinstance(self.source, GivenSource):
            raise OptionError(f"{self.name} consists of files. Give samples that Python code makes.")
        if self.chosen is None:
            return self.source.make()
        wanted = frozenset(self.chosen)
        found = (item for index, item in enumerate(self.source.items()) if index in wanted)
        return islice(found, len(wanted))

    @property
    def labels(self) -> tuple[int, ...] | None:
        """The labels of files and arrays, without reading the samples; None if there are none, or for other sources."""
        labels = getattr(self.source, "labels", None)
        return labels if labels is None or self.chosen is None else tuple(labels[index] for index in self.chosen)

    @property
    def paths(self) -> tuple[Path, ...] | None:
        """The file of each sample, without reading it; None if the samples are not in files of their own."""
        if not isinstance(self.source, FileSource):
            return None
        paths = self.source.paths
        return paths if self.chosen is None else tuple(paths[index] for index in self.chosen)

    def __len__(self) -> int:
        if self.chosen is None:
            return len(self.source)
        if isinstance(self.source, GivenSource) and not self.source.has_length:
            return sum(1 for _ in self.given)  # a generator may end before the limit
        return len(self.chosen)

    def __getitem__(self, index: Any) -> Any:
        """Returns a `Sample`, or `Samples` for a slice. Raises `InputError` for a sample that cannot be read."""
        if isinstance(index, slice):
            return replace(self, chosen=tuple(self._numbers()[index]))
        number = self._numbers()[index] if index < 0 or self.chosen is not None else index
        return self._transformed(self.source[number])

    def __iter__(self) -> Iterator[Sample]:
        if self.chosen is None:
            return map(self._transformed, self.source)
        if not self.is_given:
            return (self[index] for index in range(len(self)))
        wanted = frozenset(self.chosen)
        found = (sample for index, sample in enumerate(self.source) if index in wanted)
        return map(self._transformed, islice(found, len(wanted)))

    def _numbers(self) -> Sequence[int]:
        return range(len(self.source)) if self.chosen is None else self.chosen

    def _transformed(self, sample: Sample) -> Sample:
        if self.transform is None:
            return sample
        return replace(sample, inputs=_apply(self.transform, sample))

    def with_transform(self, transform: Transform | None) -> Samples:
        """Returns the same samples with another transform. Raises `OptionError` if it cannot be called."""
        if transform is not None and not callable(transform):
            raise OptionError(f"transform must be a function of one item of the data, not {transform!r}.")
        return replace(self, transform=transform)

    def limited(self, limit: int | None) -> Samples:
        """Returns at most `limit` samples, evenly spread, in the same order. None keeps all.

        With labels, each class gets the same number of samples, or all that it has. The samples of one class, and
        samples without labels, are evenly spread: sample i of k has the index floor(i x n / k) among n. From a
        generator, whose length is unknown, the first samples are taken.
        """
        if limit is None:
            return self
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise OptionError(f"limit must be a positive number of samples, not {limit!r}.")
        if isinstance(self.source, GivenSource) and not self.source.has_length:
            return replace(self, chosen=tuple(range(limit)))
        if limit >= len(self):
            return self
        numbers = self._numbers()
        return replace(self, chosen=tuple(numbers[i] for i in _spread(len(self), limit, self.labels)))


def _apply(transform: Transform, sample: Sample) -> Any:
    with code_of_user(f"The transform of {sample.name}", place=sample.name):
        return transform(sample.inputs)


def _spread(count: int, limit: int, labels: Sequence[int] | None) -> list[int]:
    if labels is None:
        return _evenly(range(count), limit)
    members: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        members[label].append(index)
    classes = [members[label] for label in sorted(members)]
    if limit < len(classes):
        return sorted(classes[i][0] for i in _evenly(range(len(classes)), limit))
    chosen: list[int] = []
    # Small classes first: what they lack goes to the larger ones.
    for place, own in enumerate(sorted(classes, key=len)):
        share = min((limit - len(chosen)) // (len(classes) - place), len(own))
        chosen += _evenly(own, share)
    return sorted(chosen)


def _evenly(values: Sequence[int], count: int) -> list[int]:
    return [values[i * len(values) // count] for i in range(count)]


def read_data(
    source: Any,
    *,
    labelled: bool = False,
    labels: str | os.PathLike[str] | Sequence[str] | None = None,
    transform: Transform | None = None,
    limit: int | None = None,
) -> Samples:
    """Reads data of any form. At first, it reads only names of files, tables and headers of arrays.

    `source` is one of:

    - A folder. Each image, recording, .npy or .npz file in it or in its subfolders is a sample, in the order of the
      paths. A .npz file has arrays by the names of the model's inputs. Tables of numbers (.csv, .tsv) are samples if
      the folder has nothing else. With `labelled`, each folder in it is a class.
    - A .npy file: its first dimension counts samples.
    - A .npz file: the first dimension of each array counts samples. If there are several arrays, a one-dimensional
      array of integers called label, labels, target, targets, class or y holds the labels.
    - A CSV file of numbers: each row is a sample. A column with one of these names except y holds the labels.
    - A CSV file of path and label, or a text file of lines with both. Paths are relative to its folder.
    - `file.py:function` or `package.module:function`: a function without arguments that returns or yields the inputs,
      or pairs of inputs and label; or an iterable or a data set.
    - An iterable or a data set itself, or `Samples`.

    `labels` are the names of the classes in the order of the model's outputs, or a file of them (`read_labels`).
    Without them, names of classes that are all integers are the indices, and otherwise the sorted names are classes 0,
    1, ... `limit` is the number of samples to use (`Samples.limited`).

    Raises `InputError` for data that cannot be read, are empty, or lack labels if `labelled`, and `OptionError` for a
    wrong `transform` or `limit`. Warns with `SkippedFilesWarning` of files without data.
    """
    names = None if labels is None else read_labels(labels if not isinstance(labels, os.PathLike) else Path(labels))
    if isinstance(source, Samples):
        found = source
        if labelled and not found.is_given and found.labels is None:
            raise InputError(f"{found.name} has no labels. {FORMS_OF_LABELLED}")
    elif isinstance(source, (str, os.PathLike)):
        found = _of_text(os.fspath(source), names, labelled=labelled)
    else:
        found = Samples(GivenSource(lambda: source, "the data", labelled), "the data", class_names=names)
    if transform is not None:
        found = found.with_transform(transform)
    return found.limited(limit)


def check_data(source: str | os.PathLike[str]) -> None:
    """Raises the error of `read_data` for a path or a reference that does not exist, for a device and a pipe, and for a
    folder without samples. Reads no sample.
    """
    text = os.fspath(source)
    if is_reference(text) and not exists(text):
        check_object(text, "The data")
        return
    check_is_file(text)
    if not exists(text):
        raise InputError(_not_found(text))
    if is_folder(text):
        check_has_data(Path(text))


def _not_found(text: str) -> str:
    return (
        f"'{text}' does not exist.{similar_path(text)} Data are a folder, a .npy, .npz or .csv file, or a function: "
        "'file.py:function' or 'package.module:function'."
    )


def _of_text(text: str, names: ClassNames | None, *, labelled: bool) -> Samples:
    path = Path(text)
    if not text or path.suffix == ".py":
        parse_reference(text, "The data")
    check_is_file(path)
    if is_folder(path):
        return _of_folder(path, names, labelled=labelled)
    if is_file(path):
        return _of_file(path, names, labelled=labelled)
    if not is_reference(text):
        raise InputError(_not_found(text))
    found = load_object(text, "The data")
    make = _Made(text, found) if callable(found) and not hasattr(found, "__getitem__") else lambda: found
    return Samples(GivenSource(make, f"'{text}'", labelled), text, class_names=names)


@dataclass(frozen=True)
class _Made:
    """Calls a function of the user that has no arguments."""

    text: str
    function: Callable[[], Any]

    def __call__(self) -> Any:
        with code_of_user(f"The function '{self.text}', which is called without arguments to get the data,"):
            return self.function()


def _of_folder(folder: Path, names: ClassNames | None, *, labelled: bool) -> Samples:
    paths, skipped = data_files(folder)
    warn_of_skipped(folder, skipped)
    if not labelled:
        return Samples(FileSource(tuple(paths)), str(folder), class_names=names, skipped=tuple(skipped))
    inside = [path for path in paths if len(path.relative_to(folder).parts) > 1]
    if not inside:
        raise InputError(f"The folder '{folder}' has no folders of classes. {FORMS_OF_LABELLED}")
    outside = [path for path in paths if len(path.relative_to(folder).parts) == 1]
    warn_of_skipped(folder, outside, ("is in no folder of a class", "are in no folder of a class"))
    found = [path.relative_to(folder).parts[0] for path in inside]
    # A class without a file keeps its index.
    folders = {name for name in names_in(folder) if is_data_folder(name) and os.path.isdir(folder / name)}
    indices, names = _indices({*found, *folders}, found, names, f"of the folders in '{folder}'")
    labels = tuple(indices[name] for name in found)
    return Samples(FileSource(tuple(inside), labels), str(folder), class_names=names, skipped=(*skipped, *outside))


def _indices(
    all_names: Iterable[str], used: Iterable[str], names: ClassNames | None, what: str
) -> tuple[dict[str, int], ClassNames]:
    """Returns the index of each name of a class, and the names of all classes."""
    if names is None:
        found, indices = class_names_of(all_names)
        return indices, found
    try:
        return names.indices(dict.fromkeys(used), "the labels"), names
    except InputError as error:
        raise InputError(f"The names {what} do not fit the labels: {error}") from error


def _of_file(path: Path, names: ClassNames | None, *, labelled: bool) -> Samples:
    suffix = path.suffix.lower()
    if suffix in TABLES | LISTS:
        return _of_table(path, names, labelled=labelled)
    if suffix in IMAGES | AUDIO | COMPRESSED_AUDIO and not labelled:
        return Samples(FileSource((path,)), str(path), class_names=names)
    arrays: Mapping[str, Any]
    if suffix in ARRAYS:
        arrays, labels = {"array": read_rows(path)}, None
    elif suffix in NAMED_ARRAYS:
        arrays, labels = split_labels(read_arrays(path), are_samples=True)
    else:
        known = ", ".join(sorted({*ARRAYS, *NAMED_ARRAYS, *TABLES, *LISTS}))
        raise InputError(
            f"'{path}' is not a file of {'labelled ' * labelled}samples ({known})." + f" {FORMS_OF_LABELLED}" * labelled
        )
    _check_lengths(path, {**arrays, **({} if labels is None else {"labels": labels})})
    if labelled and labels is None:
        raise InputError(f"'{path}' has no array of labels among {', '.join(arrays)}. {FORMS_OF_LABELLED}")
    held = tuple(map(int, labels)) if labels is not None and labelled else None
    return Samples(ArraySource(path, arrays, held), str(path), class_names=names)


def _check_lengths(path: Path, arrays: Mapping[str, Any]) -> None:
    for name, array in arrays.items():
        if not array.ndim:
            raise InputError(
                f"'{path}' has the array '{name}' without dimensions. Save it with one row for each sample."
            )
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise InputError(
            f"'{path}' has arrays of different numbers of samples: {counts}. Save arrays with equal first dimensions."
        )
    if not all(lengths.values()):
        raise InputError(f"'{path}' has no samples.")


def _of_table(path: Path, names: ClassNames | None, *, labelled: bool) -> Samples:
    table = read_table(path)
    if table.is_numeric and table.path_column is None:
        values, texts = numbers_in(table)
        indices, names = _table_indices(path, texts, names, labelled=labelled)
        return Samples(ArraySource(path, {"row": values}, indices), str(path), class_names=names)
    listing = paths_in(table)
    indices, names = _table_indices(path, listing.labels, names, labelled=labelled)
    return Samples(FileSource(listing.paths, indices), str(path), class_names=names)


def _table_indices(
    path: Path, texts: Sequence[str] | None, names: ClassNames | None, *, labelled: bool
) -> tuple[tuple[int, ...] | None, ClassNames | None]:
    if not labelled:
        return None, names
    if texts is None:
        raise InputError(f"'{path}' has no column of labels. {FORMS_OF_LABELLED}")
    empty = sum(not text for text in texts)
    if empty:
        raise InputError(f"'{path}' has {empty} rows without a label. Write a label in each row, or delete these rows.")
    indices, names = _indices(set(texts), texts, names, f"in '{path}'")
    return tuple(indices[text] for text in texts), names
