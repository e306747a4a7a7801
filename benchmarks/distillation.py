"""Trains a module from `prepare_training` towards the outputs of its float model, on inputs without labels."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["distill"]

FOREVER = 10**9  # steps
CHECKS = 10


def distill(
    module: nn.Module,
    model: nn.Module,
    inputs: Tensor,
    seconds: float,
    steps: int = FOREVER,
    *,
    batch: int = 32,
    rate: float = 3e-4,
) -> int:
    """Trains `module` on random batches of `inputs` [N, ...] until `seconds` or `steps` have passed.

    The loss is the sum over the outputs of noise energy / signal energy, against the outputs of `model`. The learning
    rate decreases from `rate` to 0 by a half cosine. One batch is held out: it measures the loss before training and
    `CHECKS` times, and the parameters with the least loss are kept. Returns the number of steps.
    """
    with torch.no_grad():
        found = [tree_leaves(model(part)) for part in torch.split(inputs, batch)]
        wanted = [torch.cat(parts) for parts in zip(*found, strict=True)]
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)
    held_out, trained = torch.arange(batch), len(inputs) - batch
    best, kept = float(loss_of(module, inputs, wanted, held_out)), copy_of(module)
    begun, step, checks = time.perf_counter(), 0, 0
    with torch.enable_grad():
        while (done := max((time.perf_counter() - begun) / seconds, step / steps)) < 1:
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * done)) / 2
            optimizer.zero_grad()
            chosen = batch + torch.randint(trained, (batch,), generator=generator)
            torch.autograd.backward(loss_of(module, inputs, wanted, chosen))
            optimizer.step()
            step += 1
            if done * CHECKS >= checks + 1:
                checks += 1
                best, kept = better(module, float(loss_of(module, inputs, wanted, held_out)), best, kept)
    _, kept = better(module, float(loss_of(module, inputs, wanted, held_out)), best, kept)
    module.load_state_dict(kept)
    return step


def loss_of(module: nn.Module, inputs: Tensor, wanted: Sequence[Tensor], chosen: Tensor) -> Tensor:
    """Returns the sum over the outputs of noise energy / signal energy, on the `chosen` inputs."""
    pairs = zip(tree_leaves(module(inputs[chosen])), (one[chosen] for one in wanted), strict=True)
    return sum((noise_ratio(*pair) for pair in pairs), torch.zeros(()))


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    """Returns a copy of the parameters and buffers of `module`."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def better(module: nn.Module, loss: float, best: float, kept: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Returns the least loss so far, and the parameters and buffers that have it."""
    return (loss, copy_of(module)) if loss < best else (best, kept)


def noise_ratio(found: Any, wanted: Tensor) -> Tensor:
    """Returns the energy of `found` - `wanted`, divided by that of `wanted`."""
    ratio: Tensor = (found - wanted).square().sum() / wanted.square().sum()
    return ratio
