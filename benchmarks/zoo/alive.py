"""Random weights with which a network is alive, and inputs that it can tell apart.

A network is alive if its output depends on its input all the way through. With PyTorch's defaults many are not: the
activations of layers without batch norm shrink with depth, batch norms that never saw data normalize nothing, and some
heads begin at zero. So weights are drawn with a variance that keeps that of the activations, and batch norms see data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["awaken", "smooth"]

Shape = tuple[int, ...]

BATCHES, BATCH = 4, 8  # that batch norms see
COARSE = 8  # elements of an input, along each of its axes, between two independent ones
GRAIN = 0.1  # standard deviation of the white noise beside a smooth signal of about 1

_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Linear)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)


def smooth(shape: Shape, count: int, seed: int) -> list[Tensor]:
    """Random inputs of `shape` [1, C, ...]: smooth along the axes behind the channels, each of another mean.

    Of white noise all inputs look the same to a network that averages over it.
    """
    generator = torch.Generator().manual_seed(seed)
    _, channels, *sizes = shape
    coarse = torch.randn(count, channels, *(1 + size // COARSE for size in sizes), generator=generator)
    offset = torch.randn(count, channels, *(1 for _ in sizes), generator=generator)
    signal = interpolate(coarse + offset, size=sizes, mode="linear" if len(sizes) == 1 else "bilinear")
    return list(torch.split(signal + GRAIN * torch.randn(signal.shape, generator=generator), 1))


@torch.no_grad()
def awaken(model: nn.Module, shape: Shape, seed: int = 0) -> nn.Module:
    """Return `model` in eval mode, with random weights drawn from `seed`.

    Rule 1: weights of convolutions and linears are normal with variance 2 / fan-in, their biases normal with deviation
    0.1, those of transposed convolutions likewise with the fan-in of an output element.
    Rule 2: batch norms take the mean and variance of smooth inputs of `shape`, everything else in eval mode.
    Rule 3: all else, as layer norms and recurrent weights, stays as its module initialized it.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (*_WEIGHTED, *_TRANSPOSED)):
            module.weight.normal_(0, (2 / _fan_in(module)) ** 0.5, generator=generator)
            if module.bias is not None:
                module.bias.normal_(0, 0.1, generator=generator)
    norms = [module for module in model.eval().modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = None  # the plain mean over all batches
    for batch in range(BATCHES if norms else 0):
        model(torch.cat(smooth(shape, BATCH, seed=1000 + batch)))
    return model.eval()


def _fan_in(module: nn.Module) -> float:
    """Return how many products are summed up to one output element."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if not isinstance(module, _TRANSPOSED):
        return weight[0].numel()
    strides: Sequence[int] = module.stride
    return weight[:, 0].numel() / torch.tensor(strides).prod().item()
