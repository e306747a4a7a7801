"""Decompositions of writes to any constant positions of a tensor: scatter, put, index_add and the like.

A write that replaces values is first run on numbers: value i of the operands is replaced by the number i. The result
has the number of the copied source value at each output position.

A write that accumulates gives pairs of an output value and a source value that is combined with it. The pairs are split
into layers, in which each output value occurs at most once. Each layer is then a write that replaces values, and the
layers are added, multiplied, or compared by maximum or minimum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from openneutron.core.fx import iterate_nodes, op_name, shape_of
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.graph_builder import Operand, add, mul, reshape, sum_
from openneutron.ops.indexing import MAX_PICKING_WEIGHTS, MAX_RUNS, kept_dimensions, multiply_along  # noqa: F401 (messages)
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import constraint
from openneutron.ops.value_origins import Plan, Step, bind_sources, origin_from_numbers, plan_move, positions_of

__all__ = ["DECOMPOSED", "MAX_LAYERS", "plan_of_write"]

aten = torch.ops.aten

# The largest number of source values that are combined with one output value.
MAX_LAYERS = 8

_SOURCES = ("src", "source", "values", "value")
_SUM, _MEAN, _PRODUCT, _LARGEST, _SMALLEST = "sum", "mean", "prod", "amax", "amin"
_REDUCTIONS = {"add": _SUM, "multiply": _PRODUCT}
_COMBINATIONS = {_PRODUCT: aten.mul.Tensor, _LARGEST: aten.maximum.default, _SMALLEST: aten.minimum.default}


def _source_of(instance: OpInstance) -> tuple[str, Operand] | None:
    """Returns the name and value of the argument with the written values; None for another operator."""
    return next(((name, instance.args[name]) for name in _SOURCES if name in instance.args), None)


def _has_constant_indices(instance: OpInstance) -> bool:
    written = _source_of(instance)
    values = [instance.args["self"], *([] if written is None else [written[1]])]
    indices = [node for node in iterate_nodes(list(instance.args.values())) if node not in values]
    return all(instance.constant_of(index) is not None for index in indices)


def _has_fixed_sizes(instance: OpInstance) -> bool:
    nodes = [instance.node, *instance.node.all_input_nodes]
    return all(isinstance(size, int) for node in nodes for size in shape_of(node))


def _arguments_with_constants(instance: OpInstance) -> dict[str, Any]:
    """Returns the arguments, with the values of constants in place of their nodes."""

    def value(argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return [value(each) for each in argument]
        return instance.constant_of(argument) if isinstance(argument, Node) else argument

    return {name: value(argument) for name, argument in instance.args.items()}


def plan_of_write(instance: OpInstance) -> Plan | None:
    """Returns a function that adds the operators of a write to constant positions; None if there is none.

    Handles writes that replace values and writes that accumulate, if all sizes are fixed and the indices are constants.
    """
    if not _has_fixed_sizes(instance) or not _has_constant_indices(instance) or 0 in instance.shape:
        return None
    reduction = _reduction_name(instance)
    return _plan_replacement(instance) if reduction is None else _plan_accumulation(instance, reduction)


def _reduction_name(instance: OpInstance) -> str | None:
    args, name = instance.args, op_name(instance.node)
    if "reduce" in args:
        return _REDUCTIONS.get(args["reduce"], str(args["reduce"]))
    return _SUM if args.get("accumulate") or name in ("aten.scatter_add.default", "aten.index_add.default") else None


def _plan_replacement(instance: OpInstance) -> Plan | None:
    """Returns the plan of a write that replaces values: runs the operator on numbers, and reads the origin from the
    result.
    """
    args, shape = _arguments_with_constants(instance), instance.shape
    found, count = _source_of(instance), math.prod(shape)
    arguments: dict[str, Any] = {**args, "self": positions_of(shape)}
    sources, shapes = [instance.args["self"]], [shape]
    if found is not None:
        name, source = found
        sources.append(source)
        shapes.append(_with_leading_ones(args, shape, shape_of(source)) if isinstance(source, Node) else ())
        arguments[name] = positions_of(shapes[1], count) if isinstance(source, Node) else count
    named = instance.node.target(**{key: arguments[key] for key in _argument_names(instance)})  # type: ignore[operator]
    return bind_sources(plan_move(sources, origin_from_numbers(named, shapes)), sources)


def _with_leading_ones(args: dict[str, Any], shape: Sequence[int], given: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of values that index_put writes, with as many dimensions as the indexed part of the tensor."""
    if "indices" not in args:
        return given
    rank = int(aten.index.Tensor(positions_of(shape), args["indices"]).dim())
    return (1,) * (rank - len(given)) + given


def _argument_names(instance: OpInstance) -> list[str]:
    overload = instance.node.target
    assert isinstance(overload, torch._ops.OpOverload)
    return [argument.name for argument in overload._schema.arguments]


@dataclass(frozen=True)
class _Pairs:
    """A write that accumulates: output value `written[i]` is combined with source value `taken[i]`, for each i.

    Both are positions in the flattened tensors. An output value may occur several times.
    """

    written: torch.Tensor
    taken: torch.Tensor

    def layers(self) -> list[_Pairs]:
        """Splits the pairs into layers. In a layer, each output value occurs at most once."""
        order = torch.argsort(self.written, stable=True)
        written, taken = self.written[order], self.taken[order]
        starts = torch.searchsorted(written, written)
        turn = torch.arange(len(written)) - starts
        return [_Pairs(written[turn == each], taken[turn == each]) for each in range(int(turn.max()) + 1)]


def _accumulated_pairs(instance: OpInstance) -> _Pairs:
    args, shape = _arguments_with_constants(instance), instance.shape
    found = _source_of(instance)
    assert found is not None
    given, positions = found[1], positions_of(shape)
    if "indices" in args:
        written = torch.ops.aten.index.Tensor(positions, args["indices"])
    elif "dim" not in args:
        written = args["index"]
        written = torch.where(written < 0, written + math.prod(shape), written)
    elif op_name(instance.node).startswith("aten.scatter"):
        written = positions.gather(args["dim"], args["index"])
    else:
        written = positions.index_select(args["dim"], args["index"])
    if not isinstance(given, Node):
        return _Pairs(written.flatten(), torch.zeros(written.numel(), dtype=torch.int64))
    taken = positions_of(shape_of(given))
    if op_name(instance.node).startswith("aten.scatter"):
        taken = taken[tuple(slice(size) for size in written.shape)]
    elif "dim" in args:
        taken = taken.expand(written.shape)
    else:
        taken = taken.expand(written.shape) if "indices" in args else taken.reshape(written.shape)
    return _Pairs(written.flatten(), taken.flatten())


def _plan_accumulation(instance: OpInstance, reduction: str) -> Plan | None:
    pairs = _accumulated_pairs(instance)
    if not len(pairs.written):
        return lambda rewriting: rewriting.args["self"]
    if reduction in (_SUM, _MEAN):
        total = _plan_sum(instance, pairs)
        return None if total is None else partial(_scatter_sum, pairs=pairs, total=total, takes_mean=reduction == _MEAN)
    found = _source_of(instance)
    assert found is not None
    layers, includes, base = pairs.layers(), instance.args.get("include_self", True), instance.args["self"]
    if len(layers) > MAX_LAYERS:
        return None
    filler = 1.0 if reduction == _PRODUCT else base
    fillers = [filler if includes or number else base for number in range(len(layers))]
    steps = [_place_layer(instance, found[1], *each) for each in zip(layers, fillers, strict=True)]
    known = [step for step in steps if step is not None]
    if len(known) < len(layers):
        return None
    return partial(_combine_layers, steps=known, target=_COMBINATIONS[reduction], includes=includes, source=found[1])


def _combine_layers(
    rewriting: Rewriting, steps: Sequence[Step], target: torch._ops.OpOverload, includes: bool, source: Operand
) -> Node:
    """Combines the values before the write with all layers, one after the other.

    Where a layer writes nothing, it has a value that changes nothing: 1 for a product, and the value before the write
    for a maximum or minimum.
    """
    value: Node = rewriting.args["self"]
    for number, step in enumerate(steps):
        base: Operand = 1.0 if target is aten.mul.Tensor and (number or includes) else value
        layer = step(rewriting, (base, source))
        value = rewriting.call(target, value, layer) if number or includes else layer
    return value


def _place_layer(instance: OpInstance, source: Operand, pairs: _Pairs, base: Operand) -> Step | None:
    """Returns a step that copies the source values of `pairs` into `base`; None if that takes too many operators."""
    shape = instance.shape
    given = shape_of(source) if isinstance(source, Node) else ()
    numbers = positions_of(shape).flatten()
    numbers[pairs.written] = math.prod(shape) + pairs.taken
    return plan_move((base, source), origin_from_numbers(numbers.reshape(shape), [shape, given]))


def _plan_sum(instance: OpInstance, pairs: _Pairs) -> Plan | None:
    """Returns a plan that computes, for each output value, the sum of the source values that are added to it; None if
    that takes too many operators.
    """
    found = _source_of(instance)
    assert found is not None
    source, shape = found[1], instance.shape
    if not isinstance(source, Node):
        counts = torch.zeros(math.prod(shape)).index_add(0, pairs.written, torch.ones(len(pairs.written)))
        return lambda rewriting: rewriting.constant(counts.reshape(shape) * float(source))
    layers = pairs.layers()
    matrix = _plan_sum_by_matrix(shape, shape_of(source), pairs) if len(layers) > 1 else None
    if matrix is not None:
        return matrix
    if len(layers) > MAX_LAYERS:
        return None
    steps = [_place_layer(instance, source, layer, 0.0) for layer in layers]
    known = [step for step in steps if step is not None]
    return partial(_add_layers, steps=known, source=source) if len(known) == len(layers) else None


def _add_layers(rewriting: Rewriting, steps: Sequence[Step], source: Node) -> Node:
    first, *others = [step(rewriting, (0.0, source)) for step in steps]
    for other in others:
        first = add(rewriting, first, other)
    return first


def _plan_sum_by_matrix(shape: tuple[int, ...], given: tuple[int, ...], pairs: _Pairs) -> Plan | None:
    """Returns a plan that computes the sums by one product with a constant matrix, along the flattened dimension.

    An element of the matrix counts how often the output value of its row adds the source value of its column. Returns
    None if the values do not move along one dimension, or if the matrix is large.
    """
    for before, after in kept_dimensions(shape, [given]):
        outer, inner = math.prod(shape[:before]), math.prod(shape[len(shape) - after :])
        rows, columns = (math.prod(each) // (outer * inner) for each in (shape, given))
        if rows * columns > MAX_PICKING_WEIGHTS or len(pairs.written) % (outer * inner):
            continue
        places = [
            (each // (inner * middle), each // inner % middle, each % inner)
            for each, middle in ((pairs.written, rows), (pairs.taken, columns))
        ]
        (block, row, last), (other_block, column, other_last) = places
        if not torch.equal(block, other_block) or not torch.equal(last, other_last):
            continue
        entries = torch.sort(((block * inner + last) * rows + row) * columns + column)[0] % (rows * columns)
        blocks = entries.reshape(outer * inner, -1)
        if not torch.equal(blocks, blocks[:1].expand_as(blocks)):
            continue
        counts = torch.zeros(rows * columns).index_add(0, blocks[0], torch.ones(blocks.shape[1]))
        return partial(_multiply_by_counts, before=before, after=after, counts=counts.reshape(rows, columns))
    return None


def _multiply_by_counts(rewriting: Rewriting, before: int, after: int, counts: torch.Tensor) -> Node:
    found = _source_of(rewriting.instance)
    assert found is not None
    assert isinstance(found[1], Node)
    shape = rewriting.shape
    flat = (*shape[:before], counts.shape[1], *shape[len(shape) - after :])
    product = multiply_along(rewriting, reshape(rewriting, found[1], flat), before, rewriting.constant(counts))
    return reshape(rewriting, product, shape)


def _scatter_sum(rewriting: Rewriting, pairs: _Pairs, total: Plan, takes_mean: bool) -> Node:
    base, summed, shape = rewriting.args["self"], total(rewriting), rewriting.shape
    includes, alpha = rewriting.args.get("include_self", True), float(rewriting.args.get("alpha", 1))
    counts = torch.zeros(math.prod(shape)).index_add(0, pairs.written, torch.ones(len(pairs.written))).reshape(shape)
    if not includes:
        base = mul(rewriting, base, rewriting.constant((counts == 0).float()))
    if rewriting.instance.number("self") == 0:
        result = summed if alpha == 1 else mul(rewriting, summed, alpha)
    else:
        result = add(rewriting, base, summed, alpha=alpha)
    if not takes_mean:
        return result
    divisors = (counts + includes).clamp_min(1)
    return mul(rewriting, result, rewriting.constant(1 / divisors))


@constraint
def writes_to_constant_positions(instance: OpInstance) -> bool:
    """The indices are constants and all sizes are fixed. The values move in at most {MAX_RUNS} runs of consecutive
    values, or by a one-hot matrix of at most {MAX_PICKING_WEIGHTS} values. A product, maximum or minimum combines at
    most {MAX_LAYERS} values.
    """
    return plan_of_write(instance) is not None


def _decompose_write(rewriting: Rewriting) -> Node:
    plan = plan_of_write(rewriting.instance)
    assert plan is not None  # writes_to_constant_positions holds
    return plan(rewriting)


def _diagonal_plan(instance: OpInstance) -> Plan | None:
    """Returns the plan of an operator that writes its input to a diagonal of zeros."""
    if not _has_fixed_sizes(instance) or 0 in instance.shape:
        return None
    given, args = instance.shape_of("self"), {**instance.args, "self": positions_of(instance.shape_of("self"), 1)}
    numbers = instance.node.target(**{name: args[name] for name in _argument_names(instance)})  # type: ignore[operator]
    sources = (0.0, instance.args["self"])
    return bind_sources(plan_move(sources, origin_from_numbers(numbers, [(), given])), sources)


@constraint
def has_a_small_diagonal(instance: OpInstance) -> bool:
    """All sizes are fixed, and the diagonal is written by at most {MAX_RUNS} runs of consecutive values, or by a
    one-hot matrix of at most {MAX_PICKING_WEIGHTS} values.
    """
    return _diagonal_plan(instance) is not None


def _write_diagonal(rewriting: Rewriting) -> Node:
    plan = _diagonal_plan(rewriting.instance)
    assert plan is not None  # has_a_small_diagonal holds
    return plan(rewriting)


def _trace(rewriting: Rewriting) -> Node:
    diagonal = rewriting.call(aten.diagonal.default, rewriting.args["self"])
    return reshape(rewriting, sum_(rewriting, diagonal, [0]), ())


DECOMPOSED = (
    Decomposition(
        name="write to constant positions",
        targets=(
            "aten.scatter.src",
            "aten.scatter.value",
            "aten.index_fill.int_Tensor",
            "aten.masked_scatter.default",
            "aten.diagonal_scatter.default",
            "aten.as_strided_scatter.default",
            "aten.put.default",
            "aten.scatter_add.default",
            "aten.scatter.reduce",
            "aten.scatter.value_reduce",
            "aten.scatter_reduce.two",
            "aten.index_add.default",
            "aten.index_reduce.default",
        ),
        rewrite=_decompose_write,
        constraints=(writes_to_constant_positions,),
        becomes="slice for each run of values, and cat; linear with a one-hot matrix for many runs; then add, mul, "
        "maximum or minimum for a write that accumulates",
        notes="index_put is such a write if it has indices of several dimensions, or accumulates.",
    ),
    Decomposition(
        name="diag, diag_embed, diagflat",
        targets=("aten.diag.default", "aten.diag_embed.default", "aten.diagflat.default"),
        rewrite=_write_diagonal,
        constraints=(has_a_small_diagonal,),
        becomes="slice and cat with zeros; linear with a one-hot matrix for large diagonals",
    ),
    Decomposition(name="trace", targets=("aten.trace.default",), rewrite=_trace, becomes="slice, cat, sum"),
)
