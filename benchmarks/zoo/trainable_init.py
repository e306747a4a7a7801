"""Random initialization with the signal propagation of trained networks, and inputs that give different outputs.

The output of a trained network depends on its input, and a small change of the input causes a small change of the
output. Random networks with PyTorch's defaults often lack this property:

- Without batch norms, activations shrink with depth.
- Batch norms without fitted statistics do not normalize.
- Fitted batch norms with weight 1 and bias 0 make a network chaotic. After a ReLU, they remove the mean and keep all
  noise, which costs 10 log10(pi / (pi - 1)) = 1.7 dB per layer. For example, a float MobileNetV1 amplifies white noise
  37 dB below its input to noise 6 dB below its output, which int8 cannot improve.

Therefore, batch norms here have a bias of 1, so that most operators after them are nearly linear. They scale a layer as
a whole, so that channels do not get random scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Shape", "initialize_trainable", "smooth"]

Shape = tuple[int, ...]

BATCH, BATCH_SEED = 32, 1000  # of the inputs to which batch norms are fitted
COARSE = 8  # distance of independent elements of an input, along each axis
GRAIN = 0.1  # standard deviation of the white noise that is added to a smooth signal of about 1

_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}  # of interpolation, by the number of axes after the channels
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)


def smooth(shape: Shape, count: int, seed: int) -> list[Tensor]:
    """Return random inputs of `shape` [1, C, ...] with different means, smooth along the axes after the channels.

    A network that averages over an input cannot distinguish inputs of white noise.
    """
    generator = torch.Generator().manual_seed(seed)
    _, channels, *sizes = shape
    coarse = torch.randn(count, channels, *(1 + size // COARSE for size in sizes), generator=generator)
    offset = torch.randn(count, channels, *(1 for _ in sizes), generator=generator)
    signal = interpolate(coarse + offset, size=sizes, mode=_MODES[len(sizes)])
    return list(torch.split(signal + GRAIN * torch.randn(signal.shape, generator=generator), 1))


@torch.no_grad()
def initialize_trainable(model: nn.Module, shape: Shape, seed: int = 0) -> nn.Module:
    """Initialize `model` with random weights from `seed`, and return it in eval mode.

    1. Weights of convolutions and linears are normal with variance 2 / fan-in, their biases normal with deviation 0.1.
    2. A batch norm takes mean and variance of its channels from smooth inputs of `shape`. Its weights scale all
       channels equally, to a mean variance of 1. Its bias is 1.
    3. Other parameters, such as those of layer norms and recurrent layers, keep their module's initialization.
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
    """Return the number of products that are summed for one output element."""
    weight: Any = module.weight
    if not isinstance(module, _TRANSPOSED):
        return float(weight[0].numel())
    return float(weight[:, 0].numel() / torch.tensor(module.stride).prod())


def _fit(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Fit a batch norm to its inputs."""
    (values,) = inputs
    assert isinstance(norm, _BatchNorm)
    axes = [axis for axis in range(values.dim()) if axis != 1]
    variance = values.var(axes, correction=0)
    norm.running_mean, norm.running_var = values.mean(axes), variance
    norm.weight.copy_(((variance + norm.eps) / variance.mean()).sqrt())
    norm.bias.fill_(1)
