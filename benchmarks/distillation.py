"""Trains a module from `prepare_training` towards the outputs of its float model, on inputs without labels."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["distill"]

FOREVER = 10**9  # steps


def distill(
    module: nn.Module,
    model: nn.Module,
    inputs: Tensor,
    seconds: float,
    steps: int = FOREVER,
    *,
    batch: int = 32,
    rate: float = 1e-3,
) -> int:
    """Trains `module` on random batches of `inputs` [N, ...] until `seconds` or `steps` have passed.

    The loss is the sum over the outputs of noise energy / signal energy, against the outputs of `model`. The learning
    rate decreases from `rate` to 0 by a half cosine. Returns the number of steps.
    """
    with torch.no_grad():
        found = [tree_leaves(model(part)) for part in torch.split(inputs, batch)]
        wanted = [torch.cat(parts) for parts in zip(*found, strict=True)]
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)
    begun, step = time.perf_counter(), 0
    with torch.enable_grad():
        while (done := max((time.perf_counter() - begun) / seconds, step / steps)) < 1:
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * done)) / 2
            chosen = torch.randint(len(inputs), (batch,), generator=generator)
            optimizer.zero_grad()
            pairs = zip(tree_leaves(module(inputs[chosen])), (one[chosen] for one in wanted), strict=True)
            torch.autograd.backward(sum((noise_ratio(*pair) for pair in pairs), torch.zeros(())))
            optimizer.step()
            step += 1
    return step


def noise_ratio(found: Any, wanted: Tensor) -> Tensor:
    """Returns the energy of `found` - `wanted`, divided by that of `wanted`."""
    ratio: Tensor = (found - wanted).square().sum() / wanted.square().sum()
    return ratio
