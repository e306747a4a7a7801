"""Random weights with which a network is alive, and inputs that it can tell apart.

A network is alive if its output depends on its input, and if a small change of the input is a small change of the
output. With PyTorch's defaults many are not. Without batch norms activations shrink with depth. Batch norms that
never saw data normalize nothing. Batch norms that did, with weight 1 and bias 0, make a network chaotic: behind a ReLU
they take out the mean and leave all noise, which costs 10 log10(pi / (pi - 1)) = 1.7 dB a layer. MobileNetV1 in float
then turns white noise 37 dB below its input into noise 6 dB below its output; no int8 could do better. So batch norms
here have a bias of 1, with which most of what comes behind is linear, and scale a layer as a whole, which spares its
channels scales by chance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Shape", "awaken", "smooth"]

Shape = tuple[int, ...]

BATCH, BATCH_SEED = 32, 1000  # of the inputs that batch norms see
COARSE = 8  # elements of an input, along each of its axes, between two independent ones
GRAIN = 0.1  # standard deviation of the white noise beside a smooth signal of about 1

_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}  # of interpolation, by the axes behind the channels
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)


def smooth(shape: Shape, count: int, seed: int) -> list[Tensor]:
    """Return random inputs of `shape` [1, C, ...], smooth along the axes behind the channels, each of another mean.

    Of white noise all inputs look the same to a network that averages over it.
    """
    generator = torch.Generator().manual_seed(seed)
    _, channels, *sizes = shape
    coarse = torch.randn(count, channels, *(1 + size // COARSE for size in sizes), generator=generator)
    offset = torch.randn(count, channels, *(1 for _ in sizes), generator=generator)
    signal = interpolate(coarse + offset, size=sizes, mode=_MODES[len(sizes)])
    return list(torch.split(signal + GRAIN * torch.randn(signal.shape, generator=generator), 1))


@torch.no_grad()
def awaken(model: nn.Module, shape: Shape, seed: int = 0) -> nn.Module:
    """Return `model` in eval mode, with random weights drawn from `seed`.

    Rule 1: weights of convolutions and linears are normal with variance 2 / fan-in, their biases normal with deviation
    0.1.
    Rule 2: a batch norm takes mean and variance of its channels from smooth inputs of `shape`; its weights scale all
    channels alike, to variance 1 in all; its bias is 1.
    Rule 3: all else, as layer norms and recurrent weights, stays as its module initialized it.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.eval().modules():
        if isinstance(module, (*_WEIGHTED, *_TRANSPOSED)):
            module.weight.normal_(0, (2 / _fan_in(module)) ** 0.5, generator=generator)
            if module.bias is not None:
                module.bias.normal_(0, 0.1, generator=generator)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    hooks = [norm.register_forward_pre_hook(_fit) for norm in norms]
    if hooks:
        model(torch.cat(smooth(shape, BATCH, BATCH_SEED)))
    for hook in hooks:
        hook.remove()
    return model


def _fan_in(module: nn.Module) -> float:
    """Return how many products are summed up to one output element."""
    weight: Any = module.weight
    if not isinstance(module, _TRANSPOSED):
        return float(weight[0].numel())
    return float(weight[:, 0].numel() / torch.tensor(module.stride).prod())


def _fit(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Fit a batch norm to what it is about to see."""
    (values,) = inputs
    assert isinstance(norm, _BatchNorm)
    axes = [axis for axis in range(values.dim()) if axis != 1]
    variance = values.var(axes, correction=0)
    norm.running_mean, norm.running_var = values.mean(axes), variance
    norm.weight.copy_(((variance + norm.eps) / variance.mean()).sqrt())
    norm.bias.fill_(1)
