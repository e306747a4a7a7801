"""Computes in float32, and again in float64 if float32 overflows."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["without_overflow"]


def without_overflow(function: Callable[..., torch.Tensor], *values: torch.Tensor) -> torch.Tensor:
    """Returns `function(*values)`, in float64 if the result of the given dtype is not finite.

    Values below the limit of float32 can have sums or products above it. Copies of the values in float64 cost time and
    memory, so they are made only in this case. The result is not finite if the values are not.
    """
    found = function(*values)
    return found if bool(found.sum().isfinite()) else function(*(value.double() for value in values))
