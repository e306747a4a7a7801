"""Computes a tensor after a write to one of its views."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node, map_arg

from openneutron.core.fx import arguments, op_name, shape_of
from openneutron.ops import OPERATORS
from openneutron.ops.shapes import permutation

__all__ = ["Spot", "can_be_written_back", "write_back"]

aten = torch.ops.aten

_SPLITS = {
    "aten.split.Tensor", "aten.split.sizes", "aten.split_with_sizes.default", "aten.chunk.default",
    "aten.tensor_split.sections", "aten.tensor_split.indices", "aten.unsafe_chunk.default",
}  # fmt: skip
_UNBIND = "aten.unbind.int"
_SHAPERS = {"reshape", "permute", "slice", "select"}


def can_be_written_back(view: Node) -> bool:
    """Whether `write_back` handles this view; for a getitem, the operator that yields several views."""
    if view.target is operator.getitem:
        return op_name(_split(view)) in {*_SPLITS, _UNBIND}
    spec = OPERATORS.get(op_name(view))
    return spec is not None and spec.name in _SHAPERS


@dataclass(frozen=True)
class Spot:
    """Where operators are inserted: in front of `before`, with the origin of the operator `origin`."""

    before: Node
    origin: Node

    def call(self, target: torch._ops.OpOverload, *args: Any) -> Node:
        """A call of `target`."""
        with self.before.graph.inserting_before(self.before):
            written = self.before.graph.call_function(target, args)
        written.meta = {key: value for key, value in self.origin.meta.items() if key != "val"}
        written.meta["val"] = target(*map_arg(args, lambda node: node.meta["val"]))
        return written


def write_back(view: Node, source: Node, written: Node, spot: Spot) -> Node:
    """`source` after `written` was stored in its part `view`."""
    if view.target is operator.getitem:
        return _into_parts(view, source, written, spot)
    args, kind = arguments(view), OPERATORS[op_name(view)].name
    if kind == "reshape":
        return spot.call(aten.reshape.default, written, _sizes(source))
    if kind == "permute":
        places = permutation(view)
        return spot.call(aten.permute.default, written, [places.index(dim) for dim in range(len(places))])
    if kind == "select":
        return spot.call(aten.select_scatter.default, source, written, args["dim"], args["index"])
    if op_name(view) == "aten.narrow.default":
        start, size = int(args["start"]), shape_of(source)[args["dim"]]
        start += size if start < 0 else 0
        return _into_slice(source, written, args["dim"], start, spot)
    rest = args["dim"], args["start"], args["end"], args["step"]
    return spot.call(aten.slice_scatter.default, source, written, *rest)


def _sizes(value: Node) -> list[Any]:
    """The shape of `value` for a reshape, with -1 for the one size that may be dynamic."""
    sizes = list(shape_of(value))
    free = sum(not isinstance(size, int) for size in sizes)
    return [-1 if free == 1 and not isinstance(size, int) else size for size in sizes]


def _split(item: Node) -> Node:
    split = item.args[0]
    assert isinstance(split, Node)
    return split


def _into_parts(item: Node, source: Node, written: Node, spot: Spot) -> Node:
    split, index = _split(item), int(item.args[1])  # type: ignore[arg-type]
    dim = int(arguments(split)["dim"])
    if op_name(split) == _UNBIND:
        return spot.call(aten.select_scatter.default, source, written, dim, index)
    start = sum(part.shape[dim] for part in split.meta["val"][:index])
    return _into_slice(source, written, dim, start, spot)


def _into_slice(source: Node, written: Node, dim: int, start: int, spot: Spot) -> Node:
    end = start + shape_of(written)[dim]
    return spot.call(aten.slice_scatter.default, source, written, dim, start, end)
