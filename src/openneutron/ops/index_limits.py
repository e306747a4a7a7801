"""Finds the range of indices that operators accept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from openneutron.core.fx import arguments, dtype_of, op_name, shape_of, source_of
from openneutron.ops.declared import facts_of

__all__ = ["IndexLimit", "index_limits"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class IndexLimit:
    """The indices `first` to `last` that an operator accepts: its node and name, and the user's source line."""

    first: int
    last: int
    node: str
    op: str
    source: str | None

    def accepts(self, values: torch.Tensor) -> bool:
        """Returns whether all values are within the limits."""
        return values.numel() == 0 or (int(values.min()) >= self.first and int(values.max()) <= self.last)


def index_limits(value: Node) -> tuple[IndexLimit, ...]:
    """Returns the limits of the operators that read `value` as indices: the one with the largest first index, and the
    one with the smallest last index. Indices that both accept are within the limits of all operators.

    Follows operators that only move values. Linear in the readers.
    """
    found: list[IndexLimit] = []
    pending, seen = [value], {value}
    while pending:
        moved = pending.pop()
        for reader in moved.users:
            found += [
                IndexLimit(first, last, reader.name, op_name(reader), source_of(reader))
                for first, last in _limits(reader, moved)
            ]
            if reader not in seen and _moves(reader, moved):
                seen.add(reader)
                pending.append(reader)
    if not found:
        return ()
    ends = max(found, key=lambda limit: limit.first), min(found, key=lambda limit: limit.last)
    return tuple(dict.fromkeys(ends))


def _moves(reader: Node, value: Node) -> bool:
    """Returns whether `reader` only moves the values of `value`, and returns integers."""
    output = reader.meta.get("val")
    is_integer = isinstance(output, torch.Tensor) and output.dtype in _INTEGERS
    movement = facts_of(reader).movement
    return is_integer and movement is not None and movement.is_view and reader.args[:1] == (value,)


def _limits(reader: Node, value: Node) -> Iterator[tuple[int, int]]:
    """Yields the first and the last index that `reader` accepts, for each use of `value` as indices."""
    find = _READERS.get(_name_without_overload(reader))
    if find is None or value.meta["val"].dtype not in _INTEGERS:
        return
    for indices, size, is_signed in find(arguments(reader)):
        if indices is value and isinstance(size, int):
            yield (-size if is_signed else 0), size - 1


def _name_without_overload(node: Node) -> str:
    """Returns the ATen name without the overload and without the final underscore of an in-place operator."""
    namespace, _, name = op_name(node).partition(".")
    return f"{namespace}.{name.split('.')[0].rstrip('_')}"


Reads = Iterator[tuple[object, object, bool]]


def _rows(args: dict[str, Any]) -> Reads:
    yield args["indices"], shape_of(args["weight"])[0], False


def _along_dimension(args: dict[str, Any]) -> Reads:
    shape = shape_of(args["self"])
    if shape:
        yield args["index"], shape[args["dim"]], False


def _filled_along_dimension(args: dict[str, Any]) -> Reads:
    """Returns the reads of index_fill, which takes negative indices, unlike the other operators with a dimension."""
    for indices, size, _ in _along_dimension(args):
        yield indices, size, True


def _along_optional_dimension(args: dict[str, Any]) -> Reads:
    shape = shape_of(args["self"])
    yield args["indices"], math.prod(shape) if args["dim"] is None else shape[args["dim"]], False


def _flattened(args: dict[str, Any]) -> Reads:
    yield args["index"], math.prod(shape_of(args["self"])), True


def _by_tensors(args: dict[str, Any]) -> Reads:
    """Returns the reads of an index by a list of tensors, for each tensor of integers.

    Each of them indexes one dimension. A mask (bool or uint8) selects from as many dimensions as it has.
    """
    shape, dim = shape_of(args["self"]), 0
    for index in args["indices"]:
        if dtype_of(index) in (torch.bool, torch.uint8):
            dim += len(shape_of(index))
        else:
            yield index, shape[dim], True
            dim += 1


def _classes(args: dict[str, Any]) -> Reads:
    if args["num_classes"] > 0:
        yield args["self"], args["num_classes"], False


_READERS: dict[str, Callable[[dict[str, Any]], Reads]] = {
    "aten.embedding": _rows,
    "aten.embedding_bag": _rows,
    "aten.gather": _along_dimension,
    "aten.index_select": _along_dimension,
    "aten.scatter": _along_dimension,
    "aten.scatter_add": _along_dimension,
    "aten.scatter_reduce": _along_dimension,
    "aten.index_add": _along_dimension,
    "aten.index_copy": _along_dimension,
    "aten.index_reduce": _along_dimension,
    "aten.index_fill": _filled_along_dimension,
    "aten.take": _flattened,
    "aten.put": _flattened,
    "aten.take_along_dim": _along_optional_dimension,
    "aten.index": _by_tensors,
    "aten.index_put": _by_tensors,
    "aten.one_hot": _classes,
}
"""The functions that find the indices that an operator reads, by its name without the overload."""
