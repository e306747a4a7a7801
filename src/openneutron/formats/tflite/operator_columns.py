"""Finds operators of a TFLite model that follow their rules, for all operators at once.

A network has hundreds of operators, and numpy looks at all of them in a tenth of the time. `operator_rules.py` decides
on those that are not found here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema  # noqa: TID251

from openneutron.formats.tflite.operator_rules import (
    ACCUMULATORS,
    ACCUMULATORS_OF_TWO,
    KEEP_SHAPES,
    LARGEST_REACH,
    Operand,
    Rule,
)
from openneutron.ir.kinds import Accumulator

__all__ = ["ALIGNED", "Bools", "Columns", "Numbers", "Options", "Reads", "are_usual", "have_known_shapes"]

Bools = npt.NDArray[np.bool_]
Numbers = npt.NDArray[Any]

_NONE = np.zeros(0, np.int64)
_POSITIONS = 5
"""The last position of an int32 operand is below this number."""
ALIGNED = 4
"""The number of dimensions of images."""


@dataclass(frozen=True)
class Columns:
    """The tensors of the graph."""

    operand: Callable[[int], Operand]
    """Returns one tensor."""
    is_int8: Bools
    is_constant: Bools
    ranks: Numbers
    sizes: Numbers
    """Sizes [tensor, `ALIGNED`] of tensors of at most that many dimensions, after sizes of 1; zeros for others."""
    scales: Numbers
    """The number of scales."""
    axes: Numbers
    """The dimension of the scales."""
    smallest_scale: Numbers
    largest_scale: Numbers


@dataclass(frozen=True)
class Reads:
    """The inputs of all operators."""

    tensors: Numbers
    """Their indices."""
    operators: Numbers
    """The operator of each input."""
    begins: Numbers
    """The position in `tensors` of the first input of each operator."""
    counts: Numbers
    """The number of inputs of each operator."""


def are_usual(
    tensors: Columns, numbers: Numbers, codes: Sequence[tuple[str, Rule]], reads: Reads, written: Numbers
) -> Bools:
    """Returns, for each operator, whether its types and scales are known to be right.

    `numbers` has the index of each operator's rule in `codes`, and `written` its output.
    """
    if not codes:
        return np.zeros(0, bool)
    rules = [rule for _, rule in codes]
    least, most = (np.array([rule.inputs[end] for rule in rules])[numbers] for end in (0, 1))
    weight = np.array([-1 if rule.weight is None else rule.weight for rule in rules])[numbers]
    integers = np.array([[position in rule.integers for position in range(_POSITIONS)] for rule in rules])
    positions = np.arange(len(reads.tensors)) - reads.begins[reads.operators]
    is_int8, has_one_scale = tensors.is_int8[reads.tensors], tensors.scales[reads.tensors] == 1
    wants_int32 = integers[numbers[reads.operators], np.minimum(positions, _POSITIONS - 1)]
    fits = np.where(wants_int32, ~is_int8, is_int8 & (has_one_scale | (positions == weight[reads.operators])))
    usual = tensors.is_int8[written] & (tensors.scales[written] == 1)
    usual &= (reads.counts >= least) & (reads.counts <= most)
    usual[reads.operators[~fits]] = False
    found: Bools = usual & _have_usual_scales(tensors, numbers, codes, reads, written)
    return found


def _have_usual_scales(
    tensors: Columns, numbers: Numbers, codes: Sequence[tuple[str, Rule]], reads: Reads, written: Numbers
) -> Bools:
    """Returns, for each operator, whether the factor of its accumulator is known to be below the limit.

    An accumulator that is shifted has another limit for each number of products. It is not known.
    """
    limits, of_two = (
        np.array([_limit(accumulators.get(name)) for name, _ in codes])[numbers]
        for accumulators in (ACCUMULATORS, ACCUMULATORS_OF_TWO)
    )
    is_sum = np.array([name in ACCUMULATORS and ACCUMULATORS[name].is_sum for name, _ in codes])[numbers]
    scales = []
    for end in (0, 1):
        at = np.array([rule.accumulated[end] for _, rule in codes])[numbers]
        is_there = at < reads.counts
        positions = np.where(is_there, reads.begins + at, 0)
        largest = tensors.largest_scale[reads.tensors[positions]] if len(reads.tensors) else np.zeros(len(numbers))
        scales.append(np.where(is_there, largest, np.where(is_sum, 0.0, 1.0)))
    factors = np.where(is_sum, np.maximum(*scales), scales[0] * scales[1])
    limits = np.where(reads.counts == 2, of_two, limits)
    has_limit = np.array([name in ACCUMULATORS for name, _ in codes])[numbers]
    found: Bools = ~has_limit | (factors < limits * tensors.smallest_scale[written])
    return found


def _limit(accumulator: Accumulator | None) -> float:
    """Returns the number below which the factor of an accumulator must be; 0 if it depends on the operands."""
    return 0.0 if accumulator is None or accumulator.is_shifted else accumulator.largest_factor


@dataclass(frozen=True)
class Options:
    """The options of all operators."""

    values: Sequence[Sequence[Any]]
    """The different options, which are valid: the values of the fields of their rules."""
    of_operators: Numbers
    """The index in `values` for each operator."""

    def of(self, operators: Numbers) -> Numbers:
        """Returns the options [operator, field] of operators of one kind."""
        return np.array([self.values[index] for index in self.of_operators[operators].tolist()])


def have_known_shapes(
    tensors: Columns, operators_of: Mapping[str, Numbers], reads: Reads, written: Numbers, options: Options
) -> Bools:
    """Returns, for each operator that `are_usual`, whether `Rule.shapes` is known to accept it.

    Known are convolutions, concatenations of images, and elementwise operators. `operators_of` has the operators of
    each kind.
    """
    known = np.zeros(len(written), bool)

    def operators(*names: str) -> Numbers:
        of_kinds = np.concatenate([_NONE, *(operators_of[name] for name in names if name in operators_of)])
        found: Numbers = of_kinds[reads.counts[of_kinds] > 0]
        return found

    for name in ("CONV_2D", "DEPTHWISE_CONV_2D"):
        rows = operators(name)
        rows = rows[reads.counts[rows] == 3]
        if len(rows):
            known[rows] = _fit_convolutions(tensors, reads, rows, written[rows], options.of(rows))
    rows = operators("CONCATENATION")
    if len(rows):
        known[rows] = _fit_concatenations(tensors, reads, rows, written, options.of(rows)[:, 0])
    rows = operators(*KEEP_SHAPES)
    # There are at most two inputs; the only one is also the last one.
    first, last = (reads.tensors[reads.begins[rows] + position] for position in (0, reads.counts[rows] - 1))
    left, right, out = (tensors.sizes[operand] for operand in (first, last, written[rows]))
    fits = ((left == right) | (left == 1) | (right == 1)) & (np.maximum(left, right) == out) & (out > 0)
    ranks = np.maximum(tensors.ranks[first], tensors.ranks[last])
    known[rows] = fits.all(1) & (tensors.ranks[written[rows]] == ranks)
    return known


def _fit_concatenations(tensors: Columns, reads: Reads, rows: Numbers, written: Numbers, axes: Numbers) -> Bools:
    """Returns whether concatenations of images follow `_concatenation`. `written` has the output of each operator."""
    out = tensors.sizes[written]
    axis_of = np.full(len(out), -1)
    axis_of[rows] = axes
    (chosen,) = np.nonzero((axis_of[reads.operators] >= 0) & (axis_of[reads.operators] < 4))
    operators, images = reads.operators[chosen], tensors.sizes[reads.tensors[chosen]]
    along = np.arange(len(chosen)), axis_of[operators]
    agrees = images == out[operators]
    agrees[along] = tensors.ranks[reads.tensors[chosen]] == 4
    wrong = np.bincount(operators[~agrees.all(1)], minlength=len(out))
    totals = np.bincount(operators, images[along], len(out))
    fits = (axes >= 0) & (axes < 4) & (wrong[rows] == 0)
    found: Bools = fits & (totals[rows] == out[rows, np.clip(axes, 0, 3)]) & (tensors.ranks[written[rows]] == 4)
    return found


def _fit_convolutions(tensors: Columns, reads: Reads, rows: Numbers, written: Numbers, options: Numbers) -> Bools:
    """Returns whether convolutions of one kind follow `_conv_2d` or `_depthwise_conv_2d`, by the same formulas."""
    is_depthwise = options.shape[1] == 7
    read, weight, bias = (reads.tensors[reads.begins[rows] + position] for position in range(3))
    image, filters, out = (tensors.sizes[operand] for operand in (read, weight, written))
    padding, stride_w, stride_h, *_, dilation_w, dilation_h = options.T
    channels, depth = image[:, 3], np.maximum(filters[:, 3], 1)
    groups = np.maximum(channels // depth, 1)
    outputs = filters[:, 3 if is_depthwise else 0]
    if is_depthwise:
        fits = (filters[:, 0] == 1) & (channels * options[:, 3] == outputs)
    else:
        fits = (groups * depth == channels) & (outputs % groups == 0)
    for operand, rank in ((read, 4), (weight, 4), (written, 4), (bias, 1)):
        fits &= tensors.ranks[operand] == rank
    fits &= (image[:, 0] == out[:, 0]) & (outputs == out[:, 3]) & (tensors.sizes[bias, 3] == outputs)
    fits &= tensors.is_constant[weight] & tensors.is_constant[bias]
    along_outputs = (tensors.axes[weight] == (3 if is_depthwise else 0)) & (tensors.scales[weight] == outputs)
    fits &= (tensors.scales[weight] == 1) | along_outputs
    for dim, stride, dilation in ((1, stride_h, dilation_h), (2, stride_w, dilation_w)):
        reach = (filters[:, dim] - 1) * dilation + 1
        valid = (image[:, dim] - reach) // stride + 1
        windows = np.where(padding == schema.Padding.SAME, -(-image[:, dim] // stride), valid)
        fits &= (reach < LARGEST_REACH) & (windows == out[:, dim])
    found: Bools = fits
    return found
