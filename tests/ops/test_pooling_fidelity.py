"""Accuracy in dB of quantized pools, resizes, variances and transposed convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.case import Shape
from tests.fidelity import signal_to_noise
from tests.oracle import Function, samples_like
from torch import nn

from openneutron import quantize
from openneutron.quantizer import RangeObserver

IMAGE = (1, 16, 28, 28)


def resize(to: Any, mode: str, *, corners: bool = False) -> nn.Module:
    return Function(lambda x: F.interpolate(x, to, mode=mode, align_corners=corners))


TABLE: dict[str, tuple[Callable[[], nn.Module], Shape, float]] = {
    "average of what is there": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGE, 35),
    "average of what is there, wide": (lambda: nn.AvgPool2d(7, 3, 3, count_include_pad=False), (1, 16, 30, 30), 35),
    "average, other divisor": (lambda: nn.AvgPool2d(2, divisor_override=3), IMAGE, 37),
    "adaptive average, one matrix": (lambda: nn.AdaptiveAvgPool2d(7), (1, 16, 12, 12), 37),
    "adaptive average, two matrices": (lambda: nn.AdaptiveAvgPool2d(6), IMAGE, 35.5),
    "bilinear twice the size with corners": (lambda: resize((56, 56), "bilinear", corners=True), IMAGE, 33.5),
    "bilinear 16": (lambda: resize((448, 448), "bilinear"), IMAGE, 33),
    "bilinear down": (lambda: resize((15, 20), "bilinear"), IMAGE, 33.5),
    "bicubic": (lambda: resize((50, 60), "bicubic"), IMAGE, 33.5),
    "variance of images": (lambda: Function(lambda x: x.var((2, 3))), IMAGE, 46),
    "variance of channels": (lambda: Function(lambda x: x.var(1)), IMAGE, 40),
    "transposed convolution by phases": (lambda: nn.ConvTranspose2d(16, 8, 8, 4, 2), IMAGE, 35.5),
}


@pytest.mark.parametrize("deviation", [1.0, 3.0])
@pytest.mark.parametrize("name", TABLE)
def test_quantized_outputs_have_enough_sqnr(name: str, deviation: float) -> None:
    """The test uses the calibration inputs, so no value saturates."""
    build, shape, floor = TABLE[name]
    torch.manual_seed(0)
    model, samples = build().eval(), samples_like((shape,), 4, 7, (0.0, deviation))
    # "minmax" ranges, because this test compares decompositions, not rules for ranges on a few samples
    found = signal_to_noise(quantize(model, samples[0], samples, observer=RangeObserver), model, samples)
    assert found >= floor, f"{found:.1f} dB"
