"""How much of the float model int8 keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tests.flow_support import flat

__all__ = ["signal_to_noise"]


@torch.no_grad()
def signal_to_noise(
    found: Callable[..., Any], expected: Callable[..., Any], samples: Sequence[tuple[torch.Tensor, ...]]
) -> float:
    """SQNR in dB over all outputs: the power of what is expected over that of the difference."""
    signal = noise = 0.0
    for inputs in samples:
        for got, want in zip(flat(found(*inputs)), flat(expected(*inputs)), strict=True):
            signal += float(want.double().square().sum())
            noise += float((got.double() - want.double()).square().sum())
    return 10 * math.log10(signal / noise) if noise else math.inf
