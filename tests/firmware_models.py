"""Small programs of every kind of input and output, for tests of firmware packages."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from openneutron import NeutronProgram, lower, quantize

from .models import Model, conv
from .state_models import RingBuffer

__all__ = ["PROGRAMS", "program"]

IMAGE = (1, 4, 6, 6)


def _lowered(
    model: nn.Module, shapes: tuple[tuple[int, ...], ...], *, last: bool = False, **options: Any
) -> NeutronProgram:
    torch.manual_seed(0)
    samples = [tuple(torch.randn(shape) for shape in shapes) for _ in range(4)]
    if last:
        samples = [tuple(one.to(memory_format=torch.channels_last) for one in sample) for sample in samples]
    quantized = quantize(model.eval(), samples[0], samples, recover=None)
    return lower(quantized, payload="portable", **options)


def _images(**options: Any) -> NeutronProgram:
    torch.manual_seed(0)
    model = nn.Sequential(conv(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))
    return _lowered(model, (IMAGE,), **options)


def _segmentation() -> NeutronProgram:
    torch.manual_seed(0)
    return _lowered(nn.Sequential(conv(), nn.ReLU(), conv(4, 3)), (IMAGE,), last=True, int8_io=True)


def _two_of_each() -> NeutronProgram:
    torch.manual_seed(0)
    model = Model(lambda m, x, y: (m.a(x) + y, F.relu(m.b(y))), a=conv(), b=conv())
    return _lowered(model, (IMAGE, IMAGE), int8_io=True)


def _streaming() -> NeutronProgram:
    return _lowered(RingBuffer(), (RingBuffer.frame,), int8_io=True)


def _two_delegates() -> NeutronProgram:
    torch.manual_seed(0)
    model = Model(lambda m, x: m.b(torch.cos(m.a(x))), a=conv(), b=conv())
    return _lowered(model, (IMAGE,))


def _none_output() -> NeutronProgram:
    torch.manual_seed(0)
    return _lowered(Model(lambda m, x: (m.a(x), None, m.a(x).mean((2, 3))), a=conv()), (IMAGE,))


class _Outputs(nn.Module):
    """Returns a view of a dequantized tensor, a constant, and float16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = conv()
        self.register_buffer("constant", torch.tensor([1.0, -0.0, float("nan")]))

    def forward(self, x: torch.Tensor) -> Any:
        found = self.a(x)
        return found.flatten(2), self.constant, found.half()


class _Constants(nn.Module):
    """Returns tensors, an integer, numbers, a truth value and None that are constants."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = conv()
        self.weight = nn.Parameter(torch.randn(1, 4))

    def forward(self, x: torch.Tensor) -> Any:
        return self.a(x), self.weight.relu(), 3, 2.5, True, None


def _index_output() -> NeutronProgram:
    torch.manual_seed(0)
    return _lowered(Model(lambda m, x: (m.a(x), m.a(x).argmax(1)), a=conv()), (IMAGE,))


def _on_the_cpu() -> NeutronProgram:
    torch.manual_seed(0)
    names = ["aten::convolution", "aten::conv2d", "aten::relu"]
    return _lowered(nn.Sequential(conv(), nn.ReLU()), (IMAGE,), operators_not_to_delegate=names)


class _Arguments(nn.Module):
    """Takes tensors, numbers, a truth value and None, by their names."""

    COUNT = 2**60 + 1
    """An integer that a double cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = conv()

    def forward(self, x: torch.Tensor, mask: torch.Tensor, scale: float, on: bool, none: None, *, count: int) -> Any:
        found = self.a(x) * scale
        return {"image": torch.where(mask, found, 0.0) if on and none is None and count else found, "mask": mask}


def _arguments() -> NeutronProgram:
    torch.manual_seed(0)
    samples = [
        {
            "x": torch.randn(IMAGE),
            "mask": torch.rand(IMAGE) < 0.5,
            "scale": 0.5,
            "on": True,
            "none": None,
            "count": _Arguments.COUNT,
        }
        for _ in range(4)
    ]
    return lower(quantize(_Arguments().eval(), samples[0], samples, recover=None), payload="portable")


PROGRAMS: dict[str, Callable[[], NeutronProgram]] = {
    "int8": lambda: _images(int8_io=True, last=True),
    "floats": _images,
    "segmentation": _segmentation,
    "two": _two_of_each,
    "stream": _streaming,
    "delegates": _two_delegates,
    "nothing": _none_output,
    "indices": _index_output,
    "outputs": lambda: _lowered(_Outputs(), (IMAGE,)),
    "constants": lambda: _lowered(_Constants(), (IMAGE,), int8_io=True),
    "cpu": _on_the_cpu,
    "arguments": _arguments,
}
"""Programs by a short name, which is an identifier of C."""


@cache
def program(name: str) -> NeutronProgram:
    return PROGRAMS[name]()
