"""The rounding of floats in differences that are measured in LSBs (steps of a tensor's scale)."""

from __future__ import annotations

__all__ = ["FLOAT32_EPSILON", "LARGEST_CODE", "rounding_in_lsb"]

FLOAT32_EPSILON = 2.0**-23
LARGEST_CODE = 255.0
"""The largest distance of an int8 code from its zero point, in steps."""
_LARGEST_ZERO_POINT = 128.0


def rounding_in_lsb(steps: float, limit: float, epsilon: float = FLOAT32_EPSILON) -> float:
    """Returns by how much rounding may enlarge the difference of two floats of `limit` LSBs, in LSBs.

    `steps` is the magnitude of the expected value in LSBs, and `epsilon` that of the values' dtype. Each of the two
    values is rounded by up to half an epsilon of its magnitude. Code that multiplies the zero point by the scale first
    also rounds two products of up to 128 steps in float32. A limit of 0 requires equal values, so the result is 0.
    """
    return epsilon * (steps + limit) + FLOAT32_EPSILON * _LARGEST_ZERO_POINT if limit else 0.0
