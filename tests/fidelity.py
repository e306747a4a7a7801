"""Signal-to-noise ratio between a float model and its quantized program."""

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
    """Returns the SQNR in dB over all outputs: power of the expected values over power of the difference."""
    signal = noise = 0.0
    for inputs in samples:
        for got, want in zip(flat(found(*inputs)), flat(expected(*inputs)), strict=True):
            signal += float(want.double().square().sum())
            noise += float((got.double() - want.double()).square().sum())
    return 10 * math.log10(signal / noise) if noise else math.inf
