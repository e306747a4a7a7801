"""Decompositions of writes to a part of a tensor into slices and a concatenation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Node

from openneutron.core.constants import constant_value
from openneutron.core.fx import arguments, iterate_nodes, op_name, operator_names, shape_of
from openneutron.ops.constant_writes import plan_of_write
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.index_runs import index_runs
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import constraint

__all__ = ["DECOMPOSED"]

aten = torch.ops.aten

_SLICE, _SELECT, _COPY = "aten.slice_scatter.default", "aten.select_scatter.default", "aten.index_copy.default"
_FILL, _PUT = "aten.index_fill.int_Scalar", "aten.index_put.default"
_WRITES = (_SLICE, _SELECT, _COPY, _FILL, _PUT)
# A slice of a concatenation along another dimension becomes slices of its parts, for at most this many parts.
_MOST_PARTS = 8


@dataclass(frozen=True)
class _Write:
    """A write of `values` to `indices` of dimension `dim`."""

    dim: int
    indices: tuple[int, ...]
    values: Node | float


def _match_write(node: object) -> _Write | None:
    """Returns the write that `node` performs; None unless `node` writes to constant indices of one dimension."""
    if not isinstance(node, Node) or op_name(node) not in _WRITES:
        return None
    name, args, shape = op_name(node), arguments(node), shape_of(node)
    if not shape:
        return None
    if name == _PUT:
        return _match_index_put(args, shape)
    dim = int(args["dim"]) % len(shape)
    size = shape[dim]
    if name == _SLICE:
        start, end = (args[end] if args[end] is None else int(args[end]) for end in ("start", "end"))
        indices = range(*slice(start, end, int(args["step"])).indices(size))
        return _Write(dim, tuple(indices), args["src"])
    if name == _SELECT:
        return _Write(dim, (int(args["index"]) % size,), args["src"])
    index = constant_value(args["index"])
    if index is None or index.numel() == 0:
        return None
    values = args["source"] if name == _COPY else float(args["value"])
    return _Write(dim, tuple(int(each) % size for each in index.flatten()), values)


def _match_index_put(args: dict[str, Any], shape: Sequence[int]) -> _Write | None:
    indexed = [(dim, index) for dim, index in enumerate(args["indices"]) if index is not None]
    if args["accumulate"] or len(indexed) != 1:
        return None
    (dim, index) = indexed[0]
    chosen = constant_value(index)
    if chosen is None or chosen.dim() != 1:
        return None
    chosen = chosen.nonzero().flatten() if chosen.dtype == torch.bool else chosen
    return _Write(dim, tuple(int(each) % shape[dim] for each in chosen), args["values"]) if len(chosen) else None


def _match_masked_write(node: Node) -> tuple[int, Node] | None:
    """Returns (dim, mask) if `node` is an index_put that writes one value to the true elements of a mask; else None.

    `dim` is the first dimension that the mask indexes.
    """
    args = arguments(node)
    indexed = [(dim, index) for dim, index in enumerate(args["indices"]) if index is not None]
    is_one = isinstance(args["values"], Node) and math.prod(shape_of(args["values"])) == 1
    if op_name(node) != _PUT or args["accumulate"] or len(indexed) != 1 or not is_one:
        return None
    dim, mask = indexed[0]
    return (dim, mask) if mask.meta["val"].dtype == torch.bool else None


def _is_merged_into_next(node: Node) -> bool:
    """Whether the only reader of this write is another write along the same dimension, so that one cat does both."""
    (user,) = node.users if len(node.users) == 1 else (None,)
    write, next_write = _match_write(node), _match_write(user)
    if write is None or next_write is None or write.dim != next_write.dim or user is None:
        return False
    return arguments(user)["self"] is node and next_write.values is not node


@constraint
def writes_to_constant_indices(instance: OpInstance) -> bool:
    """The indices are constants of one dimension, or the operator writes one value to the true elements of a mask, or
    the limits of "write to constant positions" hold.
    """
    node = instance.node
    if _match_write(node) is not None:
        return True
    return op_name(node) == _PUT and (_match_masked_write(node) is not None or plan_of_write(instance) is not None)


def _is_last_write(instance: OpInstance) -> bool:
    return not _is_merged_into_next(instance.node)


def _decompose_write(rewriting: Rewriting) -> Node:
    node = rewriting.instance.node
    write = _match_write(node)
    if write is None and _match_masked_write(node) is None:
        plan = plan_of_write(rewriting.instance)
        assert plan is not None  # writes_to_constant_indices holds
        return plan(rewriting)
    if write is None:
        return _write_by_where(rewriting)
    base, writes = arguments(node)["self"], [write]
    while _match_write(base) is not None and _is_merged_into_next(base):
        earlier = _match_write(base)
        assert earlier is not None
        writes.append(earlier)
        base = arguments(base)["self"]
    return _assemble_writes(rewriting, base, list(reversed(writes)))


def _write_by_where(rewriting: Rewriting) -> Node:
    args, rank = rewriting.args, len(rewriting.shape)
    found = _match_masked_write(rewriting.instance.node)
    assert found is not None  # writes_to_constant_indices holds
    dim, mask = found
    shape = shape_of(mask)
    trailing = rank - dim - len(shape)
    value = rewriting.call(aten.reshape.default, args["values"], [1] * rank) if shape_of(args["values"]) else None
    mask = rewriting.call(aten.reshape.default, mask, [*shape, *[1] * trailing]) if trailing else mask
    return rewriting.call(aten.where.self, mask, value or args["values"], args["self"])


def _assemble_writes(rewriting: Rewriting, base: Node, writes: Sequence[_Write]) -> Node:
    """Concatenates slices of `base`, which is source 0, and of the values of write n, which are source n."""
    dim, size = writes[0].dim, rewriting.shape[writes[0].dim]
    origin = [(0, index) for index in range(size)]
    for number, write in enumerate(writes, 1):
        for position, index in enumerate(write.indices):
            origin[index] = (number, position)
    used = sorted({number for number, _ in origin})
    sources = {number: base if number == 0 else _expanded_values(rewriting, writes[number - 1]) for number in used}
    runs = index_runs(origin)
    period = math.lcm(*(_index_distance(write) for write in writes))
    whole = size - size % period
    if 1 < period <= size and len(runs) > 2 * period and _is_periodic(origin[:whole], period):
        parts = [_interleave_slices(rewriting, sources, origin[:whole], dim, period)]
        runs = index_runs(origin[whole:])
    else:
        parts = []
    parts += [_insert_slice(rewriting, sources[run.source], dim, run.first, run.count) for run in runs]
    return _concatenate(rewriting, parts, dim)


def _expanded_values(rewriting: Rewriting, write: _Write) -> Node:
    """Returns the values of `write`, broadcast to the output's shape with one element per index along its `dim`."""
    shape = [*rewriting.shape]
    shape[write.dim] = len(write.indices)
    if not isinstance(write.values, Node):
        return rewriting.constant(torch.full(shape, write.values))
    given = list(shape_of(write.values))
    if given == shape:
        return write.values
    if len(write.indices) == 1 and given == shape[: write.dim] + shape[write.dim + 1 :]:
        return rewriting.call(aten.reshape.default, write.values, shape)
    return rewriting.call(aten.expand.default, write.values, shape)


def _index_distance(write: _Write) -> int:
    """Returns the distance between the indices of a write; 1 unless it is constant and positive."""
    steps = {after - before for before, after in pairwise(write.indices)}
    return steps.pop() if len(steps) == 1 and min(steps) > 0 else 1


def _is_periodic(origin: Sequence[tuple[int, int]], period: int) -> bool:
    """Whether the output consists of `period` interleaved strided slices of the sources.

    `origin` has the source and the source's index for each index of the output. The slice that gives the indices p, p +
    period, p + 2 * period ... of the output reads a single source in steps of equal, positive size.
    """
    return all(_source_distance(origin[phase::period]) is not None for phase in range(period))


def _source_distance(origin: Sequence[tuple[int, int]]) -> int | None:
    steps = {(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(origin)}
    if len(steps) != 1:
        return 1 if not steps else None
    ((source, step),) = steps
    return step if source == 0 and step > 0 else None


def _interleave_slices(
    rewriting: Rewriting, sources: dict[int, Node], origin: Sequence[tuple[int, int]], dim: int, period: int
) -> Node:
    """Interleaves `period` strided slices of the sources along `dim`."""
    count, phases = len(origin) // period, []
    for phase in range(period):
        source, first = origin[phase]
        step = _source_distance(origin[phase::period]) or 1
        value = sources[source]
        if step == 1:
            value = _insert_slice(rewriting, value, dim, first, count)
        else:
            value = rewriting.call(aten.slice.Tensor, value, dim, first, first + (count - 1) * step + 1, step)
        shape = list(shape_of(value))
        phases.append(rewriting.call(aten.reshape.default, value, [*shape[: dim + 1], 1, *shape[dim + 1 :]]))
    grouped = _concatenate(rewriting, phases, dim + 1)
    shape = list(shape_of(grouped))
    return rewriting.call(aten.reshape.default, grouped, [*shape[:dim], count * period, *shape[dim + 2 :]])


def _concatenate(rewriting: Rewriting, parts: Sequence[Node], dim: int) -> Node:
    return parts[0] if len(parts) == 1 else rewriting.call(aten.cat.default, list(parts), dim)


def _insert_slice(rewriting: Rewriting, value: Node, dim: int, first: int, count: int) -> Node:
    """Adds a slice of `count` indices from `first` on; returns `value` itself if the slice covers it.

    If `value` is a concatenation from an earlier write, slices the parts of the concatenation instead.
    """
    if count == shape_of(value)[dim]:
        return value
    if op_name(value) == "aten.cat.default" and not set(_WRITES).isdisjoint(operator_names(value)):
        parts, along = list(iterate_nodes(value.args[0])), int(value.args[1])  # type: ignore[arg-type]
        if along != dim and len(parts) <= _MOST_PARTS:
            return _concatenate(rewriting, [_insert_slice(rewriting, part, dim, first, count) for part in parts], along)
        if along == dim:
            begin = 0
            for part in parts:
                size = shape_of(part)[dim]
                if begin <= first and first + count <= begin + size:
                    return _insert_slice(rewriting, part, dim, first - begin, count)
                begin += size
    return rewriting.call(aten.slice.Tensor, value, dim, first, first + count)


DECOMPOSED = (
    Decomposition(
        name="slice_scatter, select_scatter, index_put",
        targets=_WRITES,
        applies=_is_last_write,
        constraints=(writes_to_constant_indices,),
        rewrite=_decompose_write,
        becomes="slice for the values that are kept, and cat with the written values; where for a mask",
        approximation=0.0,
        notes="Writes to slices (`x[:, :4] = y`) become these operators. Several writes along one dimension become one "
        "cat.",
    ),
)
