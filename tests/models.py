"""Small models, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["IMAGE", "Model", "bn", "bn1", "conv", "conv_bn_relu", "image", "small", "trained", "with_dropout"]

IMAGE = (1, 4, 8, 8)


class Model(nn.Module):
    """A function of modules, constants and the inputs."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


def conv(channels_in: int = 4, channels_out: int = 4, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, **options)


def trained(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Module:
    """Returns the model with statistics and weights as after a training, far from 0 and 1."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.weight.data.uniform_(0.5, 1.5)
    norm.bias.data.normal_()
    return norm


def bn(channels: int = 4) -> nn.Module:
    return trained(nn.BatchNorm2d(channels))


def bn1(channels: int) -> nn.Module:
    return trained(nn.BatchNorm1d(channels))


def conv_bn_relu() -> Model:
    return Model(lambda m, x: m.d(F.relu(m.b(m.c(x)))), c=conv(bias=False), b=bn(), d=conv())


def small() -> Model:
    return Model(
        lambda m, x: m.l(m.p(F.relu(m.b(m.c(x)))).flatten(1)),
        c=conv(4, 8), b=bn(8), p=nn.AdaptiveAvgPool2d(1), l=nn.Linear(8, 5),
    )  # fmt: skip


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape or IMAGE, generator=torch.Generator().manual_seed(seed))


def with_dropout(m: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = m.l(m.d(m.b(m.c(x))).flatten(1))
    return result
