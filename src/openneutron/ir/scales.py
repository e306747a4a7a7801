"""Limits of the scales that LiteRT's kernels support. For other scales, LiteRT rejects the model, ends the process, or
returns wrong codes.

A kernel multiplies its accumulator by a factor to get the codes of its output. `Kind.accumulator` has the limit of this
factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from openneutron.ir.graph import Op, QParams, Tensor
from openneutron.ir.kinds import KINDS, LARGEST_PRODUCT, REJECTED_FACTOR_OF_SUMS, Accumulator

__all__ = [
    "LARGEST_SCALE", "LEAST_SCALE", "factor_fault", "is_unusual_scale",
    "may_break_scale_limits", "scale_fault",
]  # fmt: skip

_MOST_TERMS = (2**31 - 1) // LARGEST_PRODUCT
"""The most products that an accumulator of 32 bits adds without overflow, whatever the values are."""


_ACCUMULATORS = {kind.accumulator for kind in KINDS.values() if kind.accumulator is not None}
LEAST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**107
"""The least normal number of float32, the type of scales in TFLite files, and the largest scale of a sum's output.

LiteRT's kernels of sums multiply the scale of the output by 2^20 in float32, and end the process if this overflows
(`tests/formats/test_scale_limits.py`)."""
# The product of two scales within these bounds, such as the scale of a bias, is a normal number.
LEAST_ORDINARY_SCALE, LARGEST_ORDINARY_SCALE = 2.0**-60, 2.0**40


ZEROS = QParams((1.0,), (-128,))


def may_break_scale_limits(inputs: Sequence[QParams], output: QParams, largest_dim: int) -> bool:
    """Whether `scale_fault` might find a fault for these qparams. A fast test, False for nearly all operators.

    `largest_dim` is the largest dimension of the operands, and so at least the number of products in a sum.
    """
    scales = [scale for qparams in inputs for scale in qparams.scale]
    widest = sorted(max(qparams.scale) for qparams in inputs)[-2:]
    # Half the limit, because padding may double a dimension of more than `_MOST_TERMS`.
    limit_of_products, limit_of_sums = (
        _least_limit(max(largest_dim, _MOST_TERMS), is_sum=is_sum) / 2 * output.scale[0] for is_sum in (False, True)
    )
    exceeds = math.prod(widest) >= limit_of_products or max(widest, default=0.0) >= limit_of_sums
    return exceeds or not all(map(_is_supported, (*scales, *output.scale)))


def _least_limit(terms: int, *, is_sum: bool) -> float:
    """Returns the least limit of all accumulators; with `terms`, of accumulators that add so many products."""
    return min(one.limit(terms) for one in _ACCUMULATORS if one.is_sum is is_sum)


def scale_fault(op: Op) -> str:
    """Returns the fault of an operator's scales, as the end of a sentence that begins with its name; "" for none."""
    for tensor in (*op.inputs, op.output):
        for scale in tensor.qparams.scale:
            if not _is_supported(scale):
                return (
                    f"has a scale of {scale:.3g}, which is not between 2^-126, the least normal float32, and 2^107, "
                    "above which LiteRT's sums overflow; multiply the tensor by a constant in the model so that its "
                    "scale is within these bounds"
                )
    if op.kind.accumulator is None:
        return ""
    accumulator, output = op.kind.accumulator, op.output.qparams.scale[0]
    operands, terms = op.inputs[:2], op.inputs[0].shape[-1] if accumulator.is_shifted else 1
    if accumulator.is_sum and len(operands) == 2 and any(map(_is_zero, operands)):
        # Zeros add nothing, so their scale must not end the process, but may be too large for other values.
        largest = max(max(tensor.qparams.scale) for tensor in operands)
        if largest >= REJECTED_FACTOR_OF_SUMS * output:
            return factor_fault(accumulator, [largest], output, terms)
        operands = tuple(tensor for tensor in operands if not _is_zero(tensor))
    scales = [max(tensor.qparams.scale) for tensor in operands]
    return factor_fault(accumulator, scales, output, terms) if operands else ""


def _is_zero(tensor: Tensor) -> bool:
    """Whether the qparams belong to a value that is zero in all calibration data, such as the state before a loop.

    `quantizer.observers` gives it scale 1, and the zero point of a range that begins at zero.
    """
    return tensor.qparams == ZEROS


def factor_fault(accumulator: Accumulator, inputs: Sequence[float], output: float, terms: int) -> str:
    """Returns the fault of the scales of the accumulated inputs and of the output; "" for none.

    `terms` is the number of products that a shifted accumulator adds; it has no effect on others.
    """
    accumulated, limit = max(inputs) if accumulator.is_sum else math.prod(inputs), accumulator.limit(terms)
    if accumulated < limit * output:
        return ""
    overflows = accumulator.is_shifted and terms > _MOST_TERMS
    return (
        f"accumulates in steps of {accumulated:.3g} and has an output scale of {output:.3g}; the ratio must be below "
        f"{limit:g}{f', because a sum of {terms} products may exceed 32 bits' if overflows else ''}"
    )


def is_unusual_scale(op: Op) -> bool:
    """Whether a scale is outside the range for which LiteRT's kernels are known to run."""
    scales = [scale for tensor in (*op.inputs, op.output) for scale in tensor.qparams.scale]
    return not all(LEAST_ORDINARY_SCALE <= scale <= LARGEST_ORDINARY_SCALE for scale in scales)


def _is_supported(scale: float) -> bool:
    return math.isfinite(scale) and LEAST_SCALE <= scale <= LARGEST_SCALE
