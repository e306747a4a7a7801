"""Names of classes and their indices."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openneutron.core.files import read_file
from openneutron.core.json_values import parsed_json
from openneutron.core.messages import did_you_mean
from openneutron.errors import InputError

__all__ = ["ClassNames", "class_names_of", "read_labels"]

_SYNSET = re.compile(r"(n\d{8})\s+(.*)")


MOST_DIGITS = 18
"""The largest number of digits of an index in a text."""
LARGEST_PIPE = 1 << 24
"""The largest number of bytes of names that are read from a pipe."""
MOST_CLASSES = 1_000_000
"""The limit of indices of classes that names in the data may stand for."""


@dataclass(frozen=True)
class ClassNames:
    """The names of the classes of a model, by their indices.

    `are_complete` tells whether `names` are all classes that the model has. It is False for names that were found in
    the data.
    """

    names: tuple[str, ...]
    are_complete: bool = True

    def indices(self, given: Iterable[str], what: str) -> dict[str, int]:
        """Returns the index of each name in `given`.

        A name is an integer, or a name of the list in full, or its synset ("n01440764"), or one of its synonyms that no
        other class has. Capitals do not matter, and "_" is a space. Raises `InputError` for any other name; its message
        calls the list `what`.
        """
        known = self._by_any_name()
        found = {}
        for name in given:
            index = known.get(_normal(name))
            if index is None:
                index = _class_index(name)
            if index is None:
                raise InputError(
                    f"The class '{name}' is not in {what}.{did_you_mean(_normal(name), known)} Give the names of the "
                    "model's classes, or rename the class in the data."
                )
            if index >= len(self.names):
                raise InputError(
                    f"The class {index} is not in {what}, which has the classes 0 to {len(self.names) - 1}. Give the "
                    "names of all classes."
                )
            found[name] = index
        return found

    def _by_any_name(self) -> dict[str, int]:
        full = [(_normal(name), index) for index, name in enumerate(self.names)]
        parts = [(part, index) for index, name in enumerate(self.names) for part in {*map(_normal, _parts(name))}]
        return _of_one_class(parts) | _of_one_class(full)


def _of_one_class(names: Sequence[tuple[str, int]]) -> dict[str, int]:
    counts = Counter(name for name, _ in names)
    return {name: index for name, index in names if counts[name] == 1}


def _normal(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()


def _parts(name: str) -> list[str]:
    """Returns the synset of a line such as "n01440764 tench, Tinca tinca", the rest of it, and each synonym."""
    found = _SYNSET.fullmatch(name)
    synset, rest = ([found[1]], found[2]) if found else ([], name)
    return [*synset, rest, *rest.split(",")]


def read_labels(labels: str | Path | Sequence[str]) -> ClassNames:
    """Reads names of classes: a text file with one name on each line, a JSON file, or a sequence of names.

    JSON holds a list of names, or an object of index to name ({"0": "tench"}), of index to a list of names
    ({"0": ["n01440764", "tench"]}), or of name to index ({"tench": 0}). Empty lines at the end do not count. The file
    may be a pipe with at most 16 MiB, which is read until its writers end.

    Raises `InputError` for a file that cannot be read, or lacks the name of a class.
    """
    if not isinstance(labels, (str, Path)):
        return _checked([str(name) for name in labels], "The labels")
    path = Path(labels)
    try:
        text = read_file(path, pipe_limit=LARGEST_PIPE).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"The labels '{path}' are not text in UTF-8: {error.reason} at byte {error.start}.") from error
    if path.suffix.lower() != ".json":
        return _checked([line.strip() for line in text.rstrip().splitlines()], f"'{path}'")
    try:
        return _checked(_from_json(parsed_json(text)), f"'{path}'")
    except (KeyError, TypeError, ValueError, OverflowError) as error:  # the last for the index 1e999
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"The labels '{path}' are neither a list of names nor a mapping between indices and names: {error}. Give a "
            "text file with one name on each line."
        ) from error


def _from_json(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(name) for name in value]
    if not isinstance(value, dict):
        raise TypeError(f"the file holds a {type(value).__name__}")
    by_index = {int(key): name for key, name in value.items()} if all(map(str.isdecimal, value)) else None
    if by_index is None:
        by_index = {int(index): name for name, index in value.items()}
    return [_as_line(by_index[index]) for index in range(len(by_index))]


def _as_line(name: Any) -> str:
    return " ".join(map(str, name)) if isinstance(name, list) else str(name)


def _checked(names: list[str], what: str) -> ClassNames:
    if not names or not any(names):
        raise InputError(f"{what} has no names of classes. Write one name on each line.")
    empty = [index for index, name in enumerate(names) if not name]
    if empty:
        raise InputError(
            f"{what} has no name for class {empty[0]}: its line {empty[0] + 1} is empty. Write a name there."
        )
    return ClassNames(tuple(names))


def _class_index(name: str) -> int | None:
    """Returns the index that a name such as "3" or "3.0" stands for; None for another name.

    A name of more than `MOST_DIGITS` digits is no index, because Python does not read integers of any length.
    """
    whole, _, decimals = name.strip().partition(".")
    is_index = whole.isascii() and whole.isdecimal() and len(whole) <= MOST_DIGITS and not decimals.strip("0")
    return int(whole) if is_index else None


def class_names_of(found: Iterable[str]) -> tuple[ClassNames, dict[str, int]]:
    """Returns the classes that names in the data stand for, and the index of each name.

    If all names are integers, they are the indices. Otherwise, the sorted names are the classes 0, 1, ...
    """
    names = sorted(set(found))
    indices = {name: index for name in names if (index := _class_index(name)) is not None}
    if names and len(indices) == len(names):
        names_at = {index: name for name, index in indices.items()}
        if max(names_at) >= MOST_CLASSES:
            raise InputError(
                f"The class '{names_at[max(names_at)]}' is an index beyond {MOST_CLASSES:,}. Give names that are not "
                "integers, or a file of labels."
            )
        return ClassNames(tuple(names_at.get(i, str(i)) for i in range(max(names_at) + 1)), False), indices
    return ClassNames(tuple(names)), {name: index for index, name in enumerate(names)}
