"""Decompositions of reads at constant indices, diff, cumsum, tril and triu.

An operator with constant indices is run on the positions 0, 1, 2, ... of its input. The result has the source position
of each output value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from openneutron.core.evaluation import evaluate_call
from openneutron.core.fx import dtype_of, iterate_nodes, shape_of
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.facts import Facts
from openneutron.ops.graph_builder import convert, mul, sub
from openneutron.ops.index_runs import IndexRun, index_runs
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import constraint

__all__ = ["DECOMPOSED", "MAX_PICKING_WEIGHTS", "MAX_RUNS", "kept_dimensions", "multiply_along"]

aten = torch.ops.aten

# The largest number of runs of consecutive indices that one CONCATENATION of slices joins.
MAX_RUNS = 32
# The largest number of elements of a one-hot matrix that selects values by a product. It has one row for each index.
MAX_PICKING_WEIGHTS = 65536
MAX_SUMMED = 512
# Replaces a dynamic size, such as the batch in training. Dimensions with selected indices must not be dynamic.
ANY_SIZE = 2


@dataclass(frozen=True)
class _Selection:
    """A selection of values by constant indices of one dimension.

    The first `before` and the last `after` dimensions of the input remain. The dimensions between them are flattened
    into one, from which `indices` select.
    """

    shape: tuple[int, ...]
    """The shape of the input."""
    before: int
    after: int
    indices: torch.Tensor

    @property
    def flattened_size(self) -> int:
        """The size of the flattened dimension."""
        return math.prod(self.shape[self.before : len(self.shape) - self.after])

    @property
    def flat(self) -> tuple[int, ...]:
        """The shape with the middle dimensions flattened into dimension `before`."""
        return (*self.shape[: self.before], self.flattened_size, *self.shape[len(self.shape) - self.after :])

    @property
    def runs(self) -> list[IndexRun]:
        """The runs of consecutive ascending indices."""
        return index_runs((0, index) for index in self.indices.tolist())

    @property
    def is_cheap(self) -> bool:
        """Whether few slices, or a small matrix, can select the values."""
        return len(self.runs) <= MAX_RUNS or self.flattened_size * len(self.indices) <= MAX_PICKING_WEIGHTS


def _source_positions(instance: OpInstance, shape: Sequence[int]) -> torch.Tensor:
    """Returns the position in the flattened input for each output value, in the shape of the output."""
    source = instance.args["self"]
    positions = torch.arange(math.prod(shape)).reshape(tuple(shape))

    def value_of(node: Node) -> Any:
        return positions if node is source else instance.constant_of(node)

    found = evaluate_call(instance.node, value_of)
    assert isinstance(found, torch.Tensor)
    return found


def kept_dimensions(shape: Sequence[int], others: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """Returns pairs (before, after): the first `before` and the last `after` dimensions have the same sizes in all
    shapes.

    Pairs with larger `before` come first, then those with larger `after`.
    """
    rank = min(len(each) for each in (shape, *others))
    for before in range(rank, -1, -1):
        for after in range(rank - before, -1, -1):
            ends = {(*each[:before], *each[len(each) - after :]) for each in map(tuple, (shape, *others))}
            if len(ends) == 1:
                yield before, after


def _selection_of(instance: OpInstance) -> _Selection:
    """Returns the selection that an operator performs, with as many remaining dimensions as possible."""
    shape = tuple(size if isinstance(size, int) else ANY_SIZE for size in instance.shape_of("self"))
    positions = _source_positions(instance, shape)
    for before, after in kept_dimensions(shape, [positions.shape]):
        indices = _indices_between(positions, shape, before, after)
        if indices is not None:
            return _Selection(instance.shape_of("self"), before, after, indices)
    raise AssertionError("no dimensions are kept, so the indices describe any positions")


def _indices_between(positions: torch.Tensor, shape: tuple[int, ...], before: int, after: int) -> torch.Tensor | None:
    outer, inner = math.prod(shape[:before]), math.prod(shape[len(shape) - after :])
    picked = math.prod(shape) // (outer * inner)
    blocks = positions.reshape(outer, positions.numel() // (outer * inner), inner)
    indices = blocks[0, :, 0] // inner
    first, last = torch.arange(outer).reshape(-1, 1, 1), torch.arange(inner)
    expected = (first * picked + indices.reshape(-1, 1)) * inner + last
    return indices if torch.equal(blocks, expected) else None


@constraint
def has_constant_indices(instance: OpInstance) -> bool:
    """Its indices are constants."""
    indices = [node for node in iterate_nodes(list(instance.args.values())) if node is not instance.args["self"]]
    return all(instance.constant_of(index) is not None for index in indices)


@constraint
def has_few_index_runs(instance: OpInstance) -> bool:
    """Its indices form at most {MAX_RUNS} runs of consecutive indices, or the number of elements in the indexed
    dimensions times the number of indices is at most {MAX_PICKING_WEIGHTS}.
    """
    return not has_constant_indices.holds(instance) or _selection_of(instance).is_cheap


def _decompose_selection(rewriting: Rewriting) -> Node:
    """Adds slices and a cat if the indices form few consecutive runs, else a product with a one-hot matrix."""
    selection = _selection_of(rewriting.instance)
    dim, values = selection.before, rewriting.args["self"]
    if selection.flat != selection.shape:
        values = rewriting.call(aten.reshape.default, values, list(selection.flat))
    runs = selection.runs
    if len(runs) <= MAX_RUNS:
        parts = [rewriting.call(aten.slice.Tensor, values, dim, run.first, run.end) for run in runs]
        values = parts[0] if len(parts) == 1 else rewriting.call(aten.cat.default, parts, dim)
    else:
        matrix = rewriting.constant(torch.eye(selection.flattened_size)[selection.indices])
        values = multiply_along(rewriting, values, dim, matrix)
    if shape_of(values) == rewriting.shape:
        return values
    return rewriting.call(aten.reshape.default, values, list(rewriting.shape))


def multiply_along(rewriting: Rewriting, values: Node, dim: int, matrix: Node) -> Node:
    """Multiplies by a matrix along a dimension."""
    last = rewriting.call(aten.movedim.int, values, dim, -1)
    return rewriting.call(aten.movedim.int, rewriting.call(aten.linear.default, last, matrix), -1, dim)


def _diff(rewriting: Rewriting) -> Node:
    args = rewriting.args
    dim = args["dim"]
    parts = [args[name] for name in ("prepend", "self", "append") if args[name] is not None]
    values = parts[0] if len(parts) == 1 else rewriting.call(aten.cat.default, parts, dim)
    for _ in range(args["n"]):
        size = shape_of(values)[dim]
        first = rewriting.call(aten.slice.Tensor, values, dim, 0, size - 1)
        values = sub(rewriting, rewriting.call(aten.slice.Tensor, values, dim, 1, size), first)
    return values


def _tril_or_triu(rewriting: Rewriting) -> Node:
    """Multiplies by a constant matrix of ones and zeros."""
    instance = rewriting.instance
    ones = torch.ones(instance.shape[-2:])
    triangle = instance.node.target(ones, instance.args["diagonal"])  # type: ignore[operator]
    return mul(rewriting, instance.args["self"], rewriting.constant(triangle))


@constraint
def sums_few_values(instance: OpInstance) -> bool:
    """The dimension has at most {MAX_SUMMED} values."""
    return not instance.shape or instance.shape[instance.args["dim"]] <= MAX_SUMMED


def _cumsum(rewriting: Rewriting) -> Node:
    """Multiplies by a lower triangular matrix of ones."""
    values: Node = rewriting.args["self"]
    dim = rewriting.args["dim"]
    if dtype_of(values) != torch.float32:
        values = convert(rewriting, values, torch.float32)
    if not rewriting.shape:
        return values
    size = rewriting.shape[dim]
    triangle = rewriting.constant(torch.ones(size, size).tril())
    return multiply_along(rewriting, values, dim, triangle)


DECOMPOSED = (
    Decomposition(
        name="values at constant indices",
        targets=(
            "aten.index_select.default",
            "aten.index.Tensor",
            "aten.gather.default",
            "aten.take_along_dim.default",
            "aten.take.default",
            "aten.diagonal.default",
        ),
        rewrite=_decompose_selection,
        constraints=(has_constant_indices, has_few_index_runs),
        becomes="slice for each run of consecutive indices, and cat; linear with a one-hot matrix for many runs",
    ),
    Decomposition(
        name="diff",
        targets=("aten.diff.default",),
        rewrite=_diff,
        becomes="slice, slice, sub; cat for `prepend` and `append`",
    ),
    Decomposition(
        name="tril, triu",
        targets=("aten.tril.default", "aten.triu.default"),
        rewrite=_tril_or_triu,
        becomes="mul with ones and zeros",
    ),
    Decomposition(
        name="cumsum",
        targets=("aten.cumsum.default",),
        rewrite=_cumsum,
        constraints=(sums_few_values,),
        facts=Facts(computes_masks=True),
        becomes="linear with a triangular matrix of ones",
    ),
)
