"""Copies values of tensors from constant positions, by slices and a cat, or by a product with a one-hot matrix.

An origin gives the source and the position of each value. The values move in runs along one dimension, with as many
unchanged first and last dimensions as possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from openneutron.core.fx import shape_of
from openneutron.ops.decomposition import Rewriting
from openneutron.ops.graph_builder import Operand, reshape
from openneutron.ops.index_runs import IndexRun, index_runs
from openneutron.ops.indexing import MAX_PICKING_WEIGHTS, MAX_RUNS, kept_dimensions, multiply_along

__all__ = ["Plan", "Step", "bind_sources", "origin_from_numbers", "plan_move", "positions_of"]

aten = torch.ops.aten

Plan = Callable[[Rewriting], Node]
"""Adds the operators of a write."""
Step = Callable[[Rewriting, Sequence[Operand]], Node]
"""Adds operators that move the values of the given sources, which are nodes and numbers."""


@dataclass(frozen=True)
class _Origin:
    """Where each output value is copied from. `source` and `position` have the shape of the output.

    `source` is the number of the source tensor, `position` the position in that tensor, flattened.
    """

    source: torch.Tensor
    position: torch.Tensor
    shapes: tuple[tuple[int, ...], ...]
    """The shapes of the sources."""


@dataclass(frozen=True)
class _DimensionOrigin:
    """An origin along one dimension: it is the same for all indices of the first `before` and the last `after`
    dimensions.

    These dimensions have the same sizes in the output and in all sources, and values move only along the dimensions
    between them, which are flattened into one.
    """

    before: int
    after: int
    runs: tuple[IndexRun, ...]
    sizes: tuple[int, ...]
    """For each source, its size along the flattened dimension."""

    @property
    def is_cheap(self) -> bool:
        """Whether few slices, or a small matrix, can move the values."""
        return len(self.runs) <= MAX_RUNS or self.written * sum(self.sizes) <= MAX_PICKING_WEIGHTS

    @property
    def written(self) -> int:
        """The size of the output along the flattened dimension."""
        return sum(run.count for run in self.runs)


def _along_one_dimension(origin: _Origin) -> _DimensionOrigin:
    """Returns `origin` with as many unchanged first and last dimensions as possible."""
    shape, used = tuple(origin.source.shape), sorted(set(origin.source.flatten().tolist()))
    for before, after in kept_dimensions(shape, [origin.shapes[source] for source in used]):
        outer, inner = math.prod(shape[:before]), math.prod(shape[len(shape) - after :])
        sizes = torch.tensor([math.prod(each) // (outer * inner) for each in origin.shapes])
        source, position = (each.reshape(outer, -1, inner) for each in (origin.source, origin.position))
        chosen, index = source[0, :, 0], position[0, :, 0] // inner
        first, last = torch.arange(outer).reshape(-1, 1, 1), torch.arange(inner)
        expected = (first * sizes[chosen].reshape(-1, 1) + index.reshape(-1, 1)) * inner + last
        if torch.equal(source, chosen.reshape(-1, 1).expand_as(source)) and torch.equal(position, expected):
            runs = index_runs(zip(chosen.tolist(), index.tolist(), strict=True))
            return _DimensionOrigin(before, after, tuple(runs), tuple(sizes.tolist()))
    raise AssertionError("without unchanged dimensions, each value has an origin of its own")


def _move_values(
    rewriting: Rewriting, sources: Sequence[Operand], origin: _Origin, along_dim: _DimensionOrigin
) -> Node:
    """Adds slices of the sources and a cat if there are few runs, else a product with a one-hot matrix.

    A source that is a number becomes a constant tensor.
    """
    shape = tuple(origin.source.shape)
    head, tail = shape[: along_dim.before], shape[len(shape) - along_dim.after :]
    used = sorted({run.source for run in along_dim.runs})
    given: dict[int, Node] = {}
    for number in used:
        source = sources[number]
        if isinstance(source, Node):
            given[number] = reshape(rewriting, source, (*head, along_dim.sizes[number], *tail))
    if len(along_dim.runs) <= MAX_RUNS:
        parts = [
            _slice_of_source(rewriting, given.get(run.source, sources[run.source]), run, head, tail)
            for run in along_dim.runs
        ]
        joined = parts[0] if len(parts) == 1 else rewriting.call(aten.cat.default, parts, along_dim.before)
        return reshape(rewriting, joined, shape)
    whole = [
        given.get(number) or _constant_source(rewriting, sources[number], (*head, along_dim.sizes[number], *tail))
        for number in used
    ]
    starts = dict(
        zip(used, [sum(along_dim.sizes[each] for each in used[:place]) for place in range(len(used))], strict=True)
    )
    columns = torch.cat([torch.arange(run.count) + starts[run.source] + run.first for run in along_dim.runs])
    matrix = torch.eye(sum(along_dim.sizes[number] for number in used))[columns]
    joined = whole[0] if len(whole) == 1 else rewriting.call(aten.cat.default, whole, along_dim.before)
    return reshape(rewriting, multiply_along(rewriting, joined, along_dim.before, rewriting.constant(matrix)), shape)


def _slice_of_source(
    rewriting: Rewriting, source: Operand, run: IndexRun, head: tuple[int, ...], tail: tuple[int, ...]
) -> Node:
    if not isinstance(source, Node):
        return _constant_source(rewriting, source, (*head, run.count, *tail))
    if run.count == shape_of(source)[len(head)]:
        return source
    return rewriting.call(aten.slice.Tensor, source, len(head), run.first, run.end)


def _constant_source(rewriting: Rewriting, number: Operand, shape: Sequence[int]) -> Node:
    assert not isinstance(number, Node)
    return rewriting.constant(torch.full(tuple(shape), float(number)))


def positions_of(shape: Sequence[int], first: int = 0) -> torch.Tensor:
    """Returns the numbers from `first` on in a tensor of this shape."""
    return torch.arange(first, first + math.prod(shape)).reshape(tuple(shape))


def origin_from_numbers(numbers: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> _Origin:
    """Returns the origin of each value in `numbers`, the result of a write on numbers.

    The numbers enumerate the values of all sources, one source after the other.
    """
    starts = torch.tensor([sum(math.prod(shape) for shape in shapes[:index]) for index in range(len(shapes))])
    source = torch.bucketize(numbers, starts, right=True) - 1
    return _Origin(source, numbers - starts[source], tuple(shapes))


def plan_move(sources: Sequence[Operand], origin: _Origin) -> Step | None:
    """Returns a step that copies values by `origin`; None if it needs too many operators.

    The step takes sources of the same kinds (node or number) and shapes as `sources`.
    """
    origin = _with_number_sources(origin, sources)
    along_dim = _along_one_dimension(origin)
    if along_dim.is_cheap:
        return lambda rewriting, given: _move_values(rewriting, given, origin, along_dim)
    if len(sources) == 2 and not isinstance(sources[1], Node):
        return lambda rewriting, given: _select_by_constant_mask(rewriting, given, origin.source == 1)
    return None


def _select_by_constant_mask(rewriting: Rewriting, given: Sequence[Operand], mask: torch.Tensor) -> Node:
    value, number = given
    assert not isinstance(number, Node)
    filler = rewriting.constant(torch.tensor(float(number)))
    return rewriting.call(aten.where.self, rewriting.constant(mask), filler, value)


def bind_sources(step: Step | None, sources: Sequence[Operand]) -> Plan | None:
    """Returns the plan of a step with these sources; None for no step."""
    return None if step is None else lambda rewriting: step(rewriting, sources)


def _with_number_sources(origin: _Origin, sources: Sequence[Operand]) -> _Origin:
    """Returns `origin` with each source that is a number replaced by a tensor of the output's shape.

    Values of such a source keep their position.
    """
    numbers = torch.tensor([not isinstance(source, Node) for source in sources])
    here = positions_of(origin.source.shape)
    shapes = [
        shape if isinstance(source, Node) else tuple(here.shape)
        for source, shape in zip(sources, origin.shapes, strict=True)
    ]
    return _Origin(origin.source, torch.where(numbers[origin.source], here, origin.position), tuple(shapes))
