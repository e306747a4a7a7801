"""Compares the outputs of a board with expected outputs in LSBs, and computes the evidence of an agreement."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from openneutron.accuracy.board_dump import Array, BoardTensor, Pair

__all__ = ["NEEDED_BITS", "BoardCase", "ExplainedValues", "explains", "lsb_distance"]

NEEDED_BITS = 16.0
"""The least evidence for an explanation: unrelated values must agree with a probability of at most 2^-16. About 200
explanations are tried, so random values of the smallest explainable size agree with one of them in about one of 300
dumps. For more elements, the probability is practically zero."""
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
class ExplainedValues:
    """Values of the board, and the values that an explanation predicts for them."""

    pair: Pair
    given: Array
    wanted: Array
    tensor: BoardTensor
    tolerance: float
    """The largest difference in LSBs that counts as agreement."""
    is_changed: npt.NDArray[np.bool_] | None = None
    """The elements that the explanation changes; None for the elements that differ from the expected outputs."""


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


def lsb_of(wanted: Array, tensor: BoardTensor) -> float:
    """Returns the size of an LSB in units of the values."""
    if tensor.dtype.kind != "f":
        return 1.0
    if tensor.scale is not None:
        return tensor.scale
    finite = wanted.astype(np.float64)
    finite = np.abs(finite[np.isfinite(finite)])
    return float(finite.max()) / 256 if finite.size and finite.max() > 0 else 1.0


def explains(
    case: BoardCase, comparisons: Iterable[ExplainedValues], *, parameters: int = 0, needed_bits: float = NEEDED_BITS
) -> bool:
    """Whether all compared elements agree, with enough evidence to exclude chance.

    The evidence in bits is the larger of two sums. The first has a term for each changed element: -log2 of the
    probability that an element of another position agrees. The second has a term for each distinct value: the log2 of
    the number of distinguishable values in the output's range. `parameters` is the number of fitted values; each
    explains one term, which is left out.
    """
    bits, elements, cheapest = 0.0, 0, math.inf
    values: dict[int, set[float]] = {}
    for one in comparisons:
        if not one.given.size or one.given.size != one.wanted.size:
            return False
        if lsb_distance(one.given, one.wanted, one.tensor).max() > one.tolerance:
            return False
        changed = _changed_elements(case, one)
        if not changed:
            continue
        elements += changed
        information = -math.log2(_chance(one))
        bits += changed * information
        cheapest = min(cheapest, information)
        lsb = lsb_of(one.wanted, one.tensor)
        window = (2 * one.tolerance + 1) * lsb
        values.setdefault(one.pair[1], set()).update(np.unique(np.floor(one.wanted.astype(np.float64) / window)))
    if not elements:
        return False
    different = min(sum(map(len, values.values())), elements)
    by_value = sum(_range_bits(case, output) for output in values) / len(values)
    return (
        max(bits - parameters * cheapest, (different - parameters) * by_value) >= needed_bits and elements > parameters
    )


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
    if one.is_changed is not None:
        return int(one.is_changed.sum())
    vector, output = one.pair
    expected = case.expected[vector][output]
    observed = case.observed[one.pair]
    if expected.size != observed.size or one.tensor.dtype != expected.dtype:
        return one.given.size
    differing = int((lsb_distance(observed, expected, case.outputs[output]) > case.limit).sum())
    return min(differing, one.given.size)


def _chance(one: ExplainedValues) -> float:
    """Returns the probability that a random element of `given` agrees with a random element of `wanted`."""
    step = max(1, one.given.size // _LARGEST_SAMPLE)
    with np.errstate(invalid="ignore"):
        given = np.sort(one.given[::step].astype(np.float64))
    wanted = one.wanted[::step].astype(np.float64)
    reach = one.tolerance * lsb_of(one.wanted, one.tensor)
    low = np.searchsorted(given, wanted - reach, "left")
    high = np.searchsorted(given, wanted + reach, "right")
    share = float((high - low).mean()) / max(1, given.size)
    return min(1.0, max(share, 2.0**-10))
