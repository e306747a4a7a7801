"""Which scales the kernels take. LiteRT ends the process on some that they do not, or refuses the whole model.

Each kernel turns what it has accumulated into steps of its output by one factor. The limits were found by trying
scales from 2^-80 to 2^80 at inputs and output of each operator: products are rescaled by less than 2^8, a sum, kept in
steps of 2^-20 of twice its widest input, by less than 1, and hard swish by less than 2^7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from openneutron.ir.graph import Op, QParams

__all__ = ["is_doubtful", "may_be_out_of_reach", "scale_fault"]

LARGEST_FACTOR = {
    **dict.fromkeys(("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV"), 2.0**8),
    **dict.fromkeys(("ADD", "SUB"), 2.0**19),
    "HARD_SWISH": 2.0**7,
}
"""By which a kernel of LiteRT rescales at most what it accumulates, of those that have a limit."""
LEAST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**127
"""Of float32, as TFLite files hold scales: without those that are not normal."""
# A bias's scale is the product of two.
LEAST_ORDINARY_SCALE, LARGEST_ORDINARY_SCALE = 2.0**-60, 2.0**40

_ACCUMULATES_SUMS = {"ADD", "SUB", "HARD_SWISH"}


def may_be_out_of_reach(inputs: Sequence[QParams], output: QParams) -> bool:
    """Whether an operator of these qparams is to be looked at closely; False for nearly all. Cheap."""
    scales = [scale for qparams in inputs for scale in qparams.scale]
    widest = max(scales, default=1.0)
    factor = widest * max(1.0, widest) / output.scale[0]
    return factor >= min(LARGEST_FACTOR.values()) / 2 or not all(map(_is_normal, (*scales, *output.scale)))


def scale_fault(op: Op) -> str:
    """What is wrong with an operator's scales, as the end of a sentence that begins with its name; "" for nothing."""
    for tensor in (*op.inputs, op.output):
        for scale in tensor.qparams.scale:
            if not _is_normal(scale):
                return f"has a scale of {scale:.3g}, which float32 does not hold"
    limit = LARGEST_FACTOR.get(op.kind.name)
    if limit is None:
        return ""
    inputs = [max(tensor.qparams.scale) for tensor in op.inputs[:2]]
    accumulated = max(inputs) if op.kind.name in _ACCUMULATES_SUMS else math.prod(inputs)
    output = op.output.qparams.scale[0]
    if accumulated < limit * output:
        return ""
    return (
        f"accumulates in steps of {accumulated:.3g} and yields steps of {output:.3g}; its kernel rescales by less than "
        f"{limit:.0f}"
    )


def is_doubtful(op: Op) -> bool:
    """Whether an operator has scales that no data in ordinary units has: nothing is known of its kernel there."""
    scales = [scale for tensor in (*op.inputs, op.output) for scale in tensor.qparams.scale]
    return not all(LEAST_ORDINARY_SCALE <= scale <= LARGEST_ORDINARY_SCALE for scale in scales)


def _is_normal(scale: float) -> bool:
    return math.isfinite(scale) and LEAST_SCALE <= scale <= LARGEST_SCALE
