"""The arguments and outputs of a model. A path identifies each leaf of them: a tensor, number, text or None."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from openneutron.core.names import distinct_names
from openneutron.errors import InputError

__all__ = [
    "INPUT_NAMES", "MISSING", "Leaf", "Path", "argument_names", "check_names", "input_names", "leaves_at",
    "leaves_from_text", "named_paths", "names_of_leaves", "output_names", "paths_from_tree", "positions_of",
    "text_of_leaves", "with_argument_names",
]  # fmt: skip

INPUT_NAMES = "input_names"
"""Name of the method of a `.pte` that returns, as text, the path of each input in the arguments of `forward`."""

Path = tuple[str | int, ...]
"""The name of an argument of `forward`, followed by the keys, indices and attributes that lead to one leaf."""


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"

    def __reduce__(self) -> str:
        return "MISSING"  # unpickles to the one instance of a process


MISSING: Final = _Missing()
"""The value of a leaf that the caller did not give."""


@dataclass(frozen=True)
class Leaf:
    """One input of a program, with its path in the arguments of `forward`.

    `is_tensor` is False for a number, a truth value, a text or None; torch.export writes its `constant` into the graph.
    """

    path: Path
    is_tensor: bool = True
    constant: int | float | bool | str | None = None

    @property
    def name(self) -> str:
        """The path as text: "batch.ids"."""
        return ".".join(map(str, self.path))


def argument_names(paths: Sequence[Path]) -> list[str]:
    """Returns the names of the arguments of `forward` in `paths`, in order."""
    return list(dict.fromkeys(str(path[0]) for path in paths))


def leaves_at(paths: Sequence[Path], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Returns the values at `paths` in positional and keyword arguments; `MISSING` for a path without a value.

    `kwargs` may also name the leaves by their positions, as `positions_of` returns them.
    """
    values = _values_by_name(paths, args, kwargs)
    positions = positions_of(paths, kwargs)
    for name, index in positions.items():
        values[index] = kwargs[name]
    return values


def positions_of(paths: Sequence[Path], names: Iterable[str]) -> dict[str, int]:
    """Returns the position of the leaf that each of `names` means: 1 for "input1".

    Names without such a leaf are left out; so are names that an argument or a key in `paths` has.
    """
    found = {name: int(name[len("input") :]) for name in names if re.fullmatch(r"input(0|[1-9][0-9]{0,8})", name)}
    if not found:
        return {}
    keys = {key for path in paths for key in path}
    return {name: index for name, index in found.items() if index < len(paths) and name not in keys}


def with_argument_names(paths: Sequence[Path], named: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments by name, with the names of arguments instead of the positions of their leaves ("input0").

    A position remains if its leaf is a part of an argument, or is given by its name, too.
    """
    positions = positions_of(paths, filter(lambda name: isinstance(name, str), named))
    names = {name: str(paths[index][0]) for name, index in positions.items() if len(paths[index]) == 1}
    return {name if names.get(name, name) in named else names[name]: value for name, value in named.items()}


def _values_by_name(paths: Sequence[Path], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    given = {**dict(zip(argument_names(paths), _with_leaves(args), strict=False)), **kwargs}
    return [_value_at(given, path) for path in paths]


def _with_leaves(args: Sequence[Any]) -> list[Any]:
    """Returns `args` without empty containers. These have no leaves, and therefore no names."""
    return [value for value in args if not isinstance(value, (Mapping, list, tuple)) or value]


def _value_at(value: Any, path: Path) -> Any:
    for key in path:
        if value is MISSING:
            break
        value = _descend(value, key)
    return value


def _descend(value: Any, key: str | int) -> Any:
    if isinstance(value, Mapping):
        return value.get(key, MISSING)
    if isinstance(key, str):
        return getattr(value, key, MISSING)
    return value[key] if isinstance(value, (list, tuple)) and key < len(value) else MISSING


def check_names(paths: Sequence[Path], args: Sequence[Any], kwargs: Mapping[str, Any], what: str) -> None:
    """Raises `InputError` for too many arguments, for an unknown name, and for an argument that is given twice.

    A leaf also has the name of its position. Messages begin with `what`, the name of the function or program.
    """
    positions = positions_of(paths, kwargs)
    values = _values_by_name(paths, args, kwargs) if positions else []
    for name, index in positions.items():
        if values[index] is not MISSING:
            raise InputError(f"{what} got its input '{Leaf(paths[index]).name}' twice: also as '{name}'. Give it once")
    kwargs = {name: value for name, value in kwargs.items() if name not in positions}
    names, args = argument_names(paths), _with_leaves(args)
    if len(args) > len(names):
        raise InputError(f"{what} takes {len(names)} inputs ({', '.join(names)}), got {len(args)}")
    for name, value in kwargs.items():
        if name not in names and _with_leaves([value]):
            raise InputError(f"{what} has no input '{name}'; its inputs are {', '.join(map(repr, names))}")
        if name in names[: len(args)]:
            raise InputError(f"{what} got its input '{name}' twice, by position and by name")


def text_of_leaves(leaves: Sequence[Leaf]) -> str:
    """Returns all leaves as JSON, the form in which a `.pte` stores them."""
    return json.dumps([[list(leaf.path), leaf.is_tensor, leaf.constant] for leaf in leaves])


def leaves_from_text(text: str) -> tuple[Leaf, ...]:
    """Reads the result of `text_of_leaves`. Raises `ValueError` for any other text."""
    try:
        leaves = tuple(Leaf(tuple(path), bool(is_tensor), constant) for path, is_tensor, constant in json.loads(text))
    except (TypeError, RecursionError) as error:  # deeply nested lists
        raise ValueError(f"no list of inputs: {text[:80]!r}") from error
    if not all(_is_path(leaf.path) for leaf in leaves):
        raise ValueError(f"no list of inputs: {text[:80]!r}")
    return leaves


def _is_path(path: tuple[Any, ...]) -> bool:
    return bool(path) and isinstance(path[0], str) and all(isinstance(key, (str, int)) for key in path)


def paths_from_tree(text: str) -> list[Path] | None:
    """Reads the path of each leaf from a tree of arguments that torch.export serialized. Each `.pte` has such a tree.

    The tree has no names of positional arguments, so they are called "argument 0" and so on. Returns None for a tree
    with containers other than tuples, lists, dicts and dataclasses.
    """
    try:
        _, whole = json.loads(text)
        positional, named = whole["children_spec"]
        arguments = [(f"argument {i}", tree) for i, tree in enumerate(positional["children_spec"])]
        arguments += zip(json.loads(named["context"]), named["children_spec"], strict=True)
        return [path for name, tree in arguments for path in _paths_in(tree, (name,))]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def named_paths(tree: str | None, are_tensors: Sequence[bool]) -> list[Path] | None:
    """Returns the path of each input from the `tree` of arguments; None if all of them are positional tensors.

    Positional arguments have no names in that tree. `are_tensors` has an item for each input of the program.
    """
    paths = None if tree is None else paths_from_tree(tree)
    if paths is None or len(paths) != len(are_tensors):
        return None
    is_flat = all(len(path) == 1 and path[0] == f"argument {index}" for index, path in enumerate(paths))
    return None if is_flat and all(are_tensors) else paths


def input_names(text: str | None, tree: str | None, are_tensors: Sequence[bool]) -> tuple[str, ...]:
    """Returns the name of each input of a `.pte`: its path as text, or "input0" and so on if the file has no paths.

    `text` is the result of the method `INPUT_NAMES`, None without it; see `named_paths` for the others. Raises
    `ValueError` if `text` is not a list of all inputs.
    """
    if text is None:
        leaves = tuple(map(Leaf, named_paths(tree, are_tensors) or ()))
    else:
        leaves = leaves_from_text(text)
        if len(leaves) != len(are_tensors):
            raise ValueError(f"it has {len(are_tensors)} inputs, but names for {len(leaves)}")
    return names_of_leaves(leaves, len(are_tensors))


def names_of_leaves(leaves: Sequence[Leaf], count: int) -> tuple[str, ...]:
    """Returns the names of `count` inputs: those of their `leaves`, or "input0" and so on if there are no leaves.

    Inputs of one name, such as the keys "a.b" and "b" within "a", have the names of their positions, too.
    """
    return distinct_names([leaf.name for leaf in leaves] or [""] * count, "input{}")


def output_names(text: str | None, count: int, unnamed: str = "output{}") -> tuple[str, ...]:
    """Returns a name for each of `count` outputs from the tree of outputs that torch.export serialized.

    An output within a dict or a dataclass has the name of its path: "boxes", "heads.0.scores". Every other output has
    the name `unnamed` with its position; so have all outputs if the tree is unknown, two outputs of one name, and an
    output whose name is the numbered name of another output. The names differ, unless `unnamed` has no place for the
    position. Takes linear time.
    """
    try:
        paths = [] if text is None else _paths_in(json.loads(text)[1], ())
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        paths = []
    if len(paths) != count:
        paths = [()] * count
    names = [".".join(map(str, path)) if any(isinstance(key, str) for key in path) else "" for path in paths]
    return distinct_names(names, unnamed)


def _paths_in(tree: Mapping[str, Any], path: Path) -> list[Path]:
    if tree["type"] is None:
        return [path]
    children = tree["children_spec"]
    keys = _container_keys(json.loads(tree["context"]), len(children))
    return [leaf for key, child in zip(keys, children, strict=True) for leaf in _paths_in(child, (*path, key))]


def _container_keys(context: Any, count: int) -> list[str | int]:
    """Returns the indices of a tuple or list, which has no context; the keys of a dict; the fields of a dataclass."""
    if context is None:
        return list(range(count))
    keys = context[0] if len(context) == 2 and all(isinstance(names, list) for names in context) else context
    if not all(isinstance(key, (str, int)) for key in keys):
        raise ValueError(f"containers with the keys {keys} are not known")
    return list(keys)
