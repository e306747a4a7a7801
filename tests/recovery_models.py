"""Small networks that lose accuracy in int8, and inputs for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from openneutron import NeutronQuantizer

__all__ = ["IMAGE", "exported", "images", "network", "uneven"]

IMAGE = (1, 3, 8, 8)


def images(count: int = 16, shape: tuple[int, ...] = IMAGE) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(shape, generator=generator),) for _ in range(count)]


def exported(model: nn.Module, shape: tuple[int, ...] = IMAGE) -> GraphModule:
    module = torch.export.export(model.eval(), (torch.zeros(shape),)).module()
    return NeutronQuantizer(equalize=False).transform_for_annotation(module)


def uneven(layer: nn.Module) -> nn.Module:
    """Returns `layer` with output channels of very different ranges, which per-tensor weights represent badly."""
    with torch.no_grad():
        assert isinstance(layer.weight, Tensor)
        scales = torch.logspace(-2, 0, len(layer.weight))
        layer.weight.mul_(scales.reshape(-1, *[1] * (layer.weight.dim() - 1)))
    return layer


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        uneven(nn.Conv2d(3, 16, 3, padding=1)), nn.ReLU6(), uneven(nn.Conv2d(16, 16, 3, padding=1, groups=16)),
        nn.ReLU6(), uneven(nn.Conv2d(16, 8, 1)), uneven(nn.Conv2d(8, 16, 1)), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
