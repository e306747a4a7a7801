"""Compares the outputs of a board with expected outputs in LSBs, and computes the evidence of an agreement."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from openneutron.accuracy.board_dump import Array, BoardTensor, Pair
from openneutron.accuracy.lsb_rounding import FLOAT32_EPSILON, rounding_in_lsb

__all__ = [
    "NEEDED_BITS", "BoardCase", "ExplainedValues", "Explanation", "agreement", "explanation_of", "lsb_distance",
    "lsb_of", "mean_difference",
]  # fmt: skip

NEEDED_BITS = 16.0
"""The least evidence for an explanation: unrelated values must agree with a probability of at most 2^-16. About 200
explanations are tried, so random values of the smallest explainable size agree with one of them in about one of 300
dumps. For more elements, the probability is practically zero."""
_BITS_OF_A_PARAMETER = 8.0
"""A fitted parameter has about 2^8 distinguishable values."""
_LEAST_IMPROVEMENT = 2.0
_LEAST_IMPROVEMENT_OF_AN_APPROXIMATION = 4.0
_LARGEST_DIFFERENCE = 256.0
"""LSBs. Larger differences count as this one in means, so that a few of them do not decide."""
_LARGEST_SAMPLE = 4096


@dataclass(frozen=True)
class BoardCase:
    """The outputs of a board, the expected outputs, and the pairs of vector and output that disagree.

    All arrays have one dimension, in the order of the tensor's memory.
    """

    inputs: tuple[BoardTensor, ...]
    outputs: tuple[BoardTensor, ...]
    expected: tuple[tuple[Array, ...], ...]
    observed: dict[Pair, Array]
    failing: tuple[Pair, ...]
    limit: float
    """The largest difference of a value in LSBs that counts as agreement."""

    def failing_of(self, output: int) -> list[Pair]:
        """Returns the pairs of one output that disagree."""
        return [pair for pair in self.failing if pair[1] == output]


@dataclass(frozen=True)
class Explanation:
    """How well a mistake explains the values of a board."""

    is_exact: bool
    """Whether all values agree within the limit."""
    before: float
    """The root mean square of the differences from the expected values, in LSBs."""
    after: float
    """The root mean square of the differences that the mistake leaves, in LSBs."""


@dataclass(frozen=True)
class ExplainedValues:
    """Values of the board, and the values that an explanation predicts for them."""

    pair: Pair
    given: Array
    wanted: Array
    tensor: BoardTensor
    tolerance: float
    """The largest difference in LSBs that counts as agreement."""
    is_moved: bool = False
    """Whether the mistake only moves values, so that chance agreements have the shares of the values in the output."""


def lsb_distance(given: Array, wanted: Array, tensor: BoardTensor) -> npt.NDArray[np.float64]:
    """Returns the absolute differences in LSBs: integer steps, or steps of the scale for floats.

    Without a scale, the LSB of floats is 2^-8 of the largest magnitude of `wanted`. NaN equals only NaN.
    """
    with np.errstate(invalid="ignore"):  # signalling NaNs in garbage
        left, right = given.astype(np.float64), wanted.astype(np.float64)
    if tensor.dtype.kind != "f":
        return np.abs(left - right)
    with np.errstate(invalid="ignore", over="ignore"):
        found = np.abs(left - right) / lsb_of(wanted, tensor)
    found[left == right] = 0  # equal infinities
    found[np.isnan(left) & np.isnan(right)] = 0
    return np.nan_to_num(found, nan=np.inf, posinf=np.inf)


def agreement(given: Array, wanted: Array, tensor: BoardTensor, limit: float) -> npt.NDArray[np.bool_]:
    """Returns whether each difference is at most `limit` LSBs, and for floats the rounding of the values."""
    found: npt.NDArray[np.bool_] = lsb_distance(given, wanted, tensor) <= limit + _rounding(wanted, tensor, limit)
    return found


def _rounding(wanted: Array, tensor: BoardTensor, limit: float) -> float:
    """Returns the rounding of the largest value in LSBs; 0 for integers."""
    if tensor.dtype.kind != "f":
        return 0.0
    finite = wanted[np.isfinite(wanted)].astype(np.float64)
    steps = float(np.abs(finite).max(initial=0.0)) / lsb_of(wanted, tensor)
    return rounding_in_lsb(steps, limit, max(FLOAT32_EPSILON, float(np.finfo(tensor.dtype).eps)))  # type: ignore[type-var]


def lsb_of(wanted: Array, tensor: BoardTensor) -> float:
    """Returns the size of an LSB in units of the values."""
    if tensor.dtype.kind != "f":
        return 1.0
    if tensor.scale is not None:
        return tensor.scale
    finite = wanted.astype(np.float64)
    finite = np.abs(finite[np.isfinite(finite)])
    return float(finite.max()) / 256 if finite.size and finite.max() > 0 else 1.0


def mean_difference(given: Array, wanted: Array, tensor: BoardTensor) -> float:
    """Returns the root mean square of the differences in LSBs, of which each counts at most 256 LSBs."""
    return math.sqrt(_squares(given, wanted, tensor) / max(1, given.size))


def explanation_of(
    case: BoardCase, comparisons: Iterable[ExplainedValues], *, parameters: int = 0, needed_bits: float = NEEDED_BITS
) -> Explanation | None:
    """Returns how a mistake explains the compared values; None if it does not explain them.

    `parameters` is the number of fitted values. An exact explanation has these properties:

    - All values agree within their tolerances.
    - The mean difference is at most half of the difference from the expected outputs.
    - The evidence, less 8 bits for each parameter, is at least `needed_bits`.

    If values do not agree, for example because a mistake reads memory whose contents are unknown, the explanation is
    approximate. Its mean difference must be at most a quarter of the difference from the expected outputs, and of the
    difference from the best constant. Unrelated values come so near with a probability of about (after / before)^n,
    which gives the evidence in bits. n is the number of elements that make up most of the difference, that is the
    participation ratio of its squares.
    """
    compared = list(comparisons)
    if not compared or any(not one.given.size or one.given.size != one.wanted.size for one in compared):
        return None
    changed = sum(_changed_elements(case, one) for one in compared)
    if not changed:
        return None
    before = _before(case, compared)
    after = _root(sum(_squares(one.given, one.wanted, one.tensor) for one in compared), compared)
    penalty = parameters * _BITS_OF_A_PARAMETER
    if all(agreement(one.given, one.wanted, one.tensor, one.tolerance).all() for one in compared):
        is_clear = after * _LEAST_IMPROVEMENT <= before and _bits(case, compared) - penalty >= needed_bits
        return Explanation(True, before, after) if is_clear else None
    ratio = min(before, _spread(compared)) / after
    if ratio < _LEAST_IMPROVEMENT_OF_AN_APPROXIMATION:
        return None
    bits = _independent(case, compared) * min(math.log2(ratio), *map(_most_bits_of_a_move, compared)) - penalty
    return Explanation(False, before, after) if bits >= max(needed_bits, NEEDED_BITS) else None


def _independent(case: BoardCase, compared: Sequence[ExplainedValues]) -> float:
    """Returns the participation ratio of the squared differences: (sum of squares)^2 / (sum of fourth powers)."""
    squares = [
        np.square(lsb_distance(case.observed[pair], case.expected[pair[0]][pair[1]], case.outputs[pair[1]])).clip(
            max=_LARGEST_DIFFERENCE**2
        )
        for pair in {one.pair for one in compared}
        if case.observed[pair].size == case.expected[pair[0]][pair[1]].size
    ]
    total, fourth = sum(float(one.sum()) for one in squares), sum(float(np.square(one).sum()) for one in squares)
    return total**2 / fourth if fourth else 0.0


def _most_bits_of_a_move(one: ExplainedValues) -> float:
    """Returns the log2 of the number of positions of an output, if the mistake only moves values, else infinity."""
    return math.log2(one.given.size) if one.is_moved else math.inf


def _squares(given: Array, wanted: Array, tensor: BoardTensor) -> float:
    return float(np.square(lsb_distance(given, wanted, tensor).clip(max=_LARGEST_DIFFERENCE)).sum())


def _root(squares: float, compared: Sequence[ExplainedValues]) -> float:
    return math.sqrt(squares / sum(one.given.size for one in compared))


def _before(case: BoardCase, compared: Sequence[ExplainedValues]) -> float:
    """Returns the mean difference of the compared outputs from the expected outputs."""
    squares, elements = 0.0, 0
    for vector, output in {one.pair for one in compared}:
        observed, expected = case.observed[vector, output], case.expected[vector][output]
        if observed.size == expected.size:
            squares += _squares(observed, expected, case.outputs[output])
            elements += observed.size
    return math.sqrt(squares / elements) if elements else _LARGEST_DIFFERENCE


def _spread(compared: Sequence[ExplainedValues]) -> float:
    """Returns the mean difference of the values from their mean, for each output its own."""
    squares = 0.0
    for output in {one.pair[1] for one in compared}:
        own = [one for one in compared if one.pair[1] == output]
        with np.errstate(invalid="ignore", over="ignore"):
            values = np.concatenate([one.given.astype(np.float64) for one in own])
            finite = values[np.isfinite(values)]
            mean = np.full(values.size, finite.mean() if finite.size else 0.0)
        squares += _squares(mean, values, own[0].tensor)  # in LSBs of the values
    return _root(squares, compared)


def _bits(case: BoardCase, compared: Sequence[ExplainedValues]) -> float:
    """Returns the evidence of exact agreement in bits.

    It is a sum with a term for each changed element: -log2 of the probability that an element of another position
    agrees with it. If the mistake changes values, a second sum has a term for each distinct value: the log2 of the
    number of distinguishable values in the output's range. Then the evidence is the larger sum. No term is larger than
    the log2 of the ratio of the largest differences without and with the mistake, because noise is likely to be small.
    """
    bits, elements = 0.0, 0
    values: dict[int, set[float]] = {}
    most = _most_bits(case, compared)
    for one in compared:
        changed = _changed_elements(case, one)
        bits += changed * float((-np.log2(_chances(one))).clip(max=most).mean())
        elements += changed
        if changed and not one.is_moved:
            window = (2 * one.tolerance + 1) * lsb_of(one.wanted, one.tensor)
            values.setdefault(one.pair[1], set()).update(np.unique(np.floor(one.wanted.astype(np.float64) / window)))
    if not values:
        return bits
    by_value = min(most, sum(_range_bits(case, output) for output in values) / len(values))
    return max(bits, min(sum(map(len, values.values())), elements) * by_value)


def _most_bits(case: BoardCase, compared: Sequence[ExplainedValues]) -> float:
    """Returns the log2 of the ratio of the largest differences in whole LSBs, without and with the mistake."""
    after = max(float(lsb_distance(one.given, one.wanted, one.tensor).max()) for one in compared)
    before = 0.0
    for vector, output in {one.pair for one in compared}:
        observed, expected = case.observed[vector, output], case.expected[vector][output]
        if observed.size != expected.size:
            return math.inf
        before = max(before, float(lsb_distance(observed, expected, case.outputs[output]).max()))
    return math.log2(max(1.0, (2 * before + 1) / (2 * after + 1)))


def _range_bits(case: BoardCase, output: int) -> float:
    """Returns the log2 of the number of windows of 2 * limit + 1 LSBs in the range of an output."""
    tensor = case.outputs[output]
    values = np.concatenate([vector[output].astype(np.float64) for vector in case.expected])
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0
    steps = float(np.ptp(values)) / lsb_of(values, tensor)
    return math.log2(max(1.0, steps / (2 * case.limit + 1)))


def _changed_elements(case: BoardCase, one: ExplainedValues) -> int:
    vector, output = one.pair
    expected = case.expected[vector][output]
    observed = case.observed[one.pair]
    if expected.size != observed.size or one.tensor.dtype != expected.dtype:
        return one.given.size
    differing = int((~agreement(observed, expected, case.outputs[output], case.limit)).sum())
    return min(differing, one.given.size)


def _chances(one: ExplainedValues) -> npt.NDArray[np.float64]:
    """Returns the probability that a random element of `given` agrees, for each element of `wanted`, or for a part."""
    step = max(1, one.given.size // _LARGEST_SAMPLE)
    with np.errstate(invalid="ignore"):
        given = np.sort(one.given[::step].astype(np.float64))
    wanted = one.wanted[::step].astype(np.float64)
    reach = (one.tolerance + _rounding(one.wanted, one.tensor, one.tolerance)) * lsb_of(one.wanted, one.tensor)
    low = np.searchsorted(given, wanted - reach, "left")
    high = np.searchsorted(given, wanted + reach, "right")
    found: npt.NDArray[np.float64] = ((high - low) / given.size).clip(2.0**-10, 1.0)
    return found
