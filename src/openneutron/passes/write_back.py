"""Computes the new value of a tensor after a write to one of its views."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Node

from openneutron.core.constants import insert_constant
from openneutron.core.evaluation import evaluate_call
from openneutron.core.fx import arguments, first_operand, shape_of
from openneutron.ops.declared import is_op
from openneutron.ops.graph_builder import NodeBuilder, permute, put, reshape, select_scatter, slice_scatter
from openneutron.ops.shapes import permutation

__all__ = ["can_be_written_back", "write_back"]


def can_be_written_back(view: Node) -> bool:
    """Returns whether `write_back` handles this view. A getitem is represented by its multi-output operator."""
    if _is_written_by_one_operator(view):
        return True
    positions = _positions_in_source(view)
    return positions is not None and positions.unique().numel() == positions.numel()


def _is_written_by_one_operator(view: Node) -> bool:
    """Whether the view is a part or a rearrangement of its source that one operator can write."""
    if view.target is operator.getitem:
        split = first_operand(view)
        return is_op(split, "split", "unbind") and "dim" in arguments(split)
    return is_op(view, "reshape", "permute", "slice", "select")


def _positions_in_source(view: Node) -> torch.Tensor | None:
    """Returns the positions of the view's values in its flattened source, which is contiguous; None if unknown."""
    called = first_operand(view) if view.target is operator.getitem else view
    source = called.args[0]
    if not isinstance(source, Node) or called.all_input_nodes != [source] or "stride" in arguments(called):
        return None  # strides refer to the memory, which need not be contiguous
    shape, value = shape_of(source), view.meta["val"]
    if value.dtype != source.meta["val"].dtype or not all(isinstance(size, int) for size in (*shape, *value.shape)):
        return None
    found = evaluate_call(called, lambda _: torch.arange(math.prod(shape)).reshape(shape))
    positions = found if called is view else found[view.args[1]]
    assert isinstance(positions, torch.Tensor)
    return positions


def write_back(view: Node, source: Node, written: Node, builder: NodeBuilder) -> Node:
    """Returns the value of `source` after `written` is stored in `view`, a view of `source`."""
    if not _is_written_by_one_operator(view):
        return _write_by_index_put(view, source, written, builder)
    if view.target is operator.getitem:
        return _write_to_split_output(view, source, written, builder)
    args = arguments(view)
    if is_op(view, "reshape"):
        return reshape(builder, written, _reshape_sizes(source))
    if is_op(view, "permute"):
        places = permutation(view)
        return permute(builder, written, [places.index(dim) for dim in range(len(places))])
    if is_op(view, "select"):
        return select_scatter(builder, source, written, args["dim"], args["index"])
    if "length" in args:  # a narrow
        start, size = int(args["start"]), shape_of(source)[args["dim"]]
        start += size if start < 0 else 0
        return _write_to_slice(source, written, args["dim"], start, builder)
    return slice_scatter(builder, source, written, args["dim"], args["start"], args["end"], args["step"])


def _write_by_index_put(view: Node, source: Node, written: Node, builder: NodeBuilder) -> Node:
    positions, module = _positions_in_source(view), builder.before.graph.owning_module
    assert positions is not None
    assert module is not None
    index = insert_constant(module, builder.before, positions, "positions")
    return put(builder, source, index, written)


def _reshape_sizes(value: Node) -> list[Any]:
    """Returns the shape of `value` for a reshape, with -1 for the one size that may be dynamic."""
    sizes = list(shape_of(value))
    free = sum(not isinstance(size, int) for size in sizes)
    return [-1 if free == 1 and not isinstance(size, int) else size for size in sizes]


def _write_to_split_output(item: Node, source: Node, written: Node, builder: NodeBuilder) -> Node:
    split, index = first_operand(item), int(item.args[1])  # type: ignore[arg-type]
    dim = int(arguments(split)["dim"])
    if is_op(split, "unbind"):
        return select_scatter(builder, source, written, dim, index)
    start = sum(part.shape[dim] for part in split.meta["val"][:index])
    return _write_to_slice(source, written, dim, start, builder)


def _write_to_slice(source: Node, written: Node, dim: int, start: int, builder: NodeBuilder) -> Node:
    end = start + shape_of(written)[dim]
    return slice_scatter(builder, source, written, dim, start, end)
