"""Fake quantization of weights and activations, with gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["FakeQuantizedWeight", "RangeFactors", "fake_quantize"]

HALF_STEP = 0.5001


def fake_quantize(values: Tensor, scale: Tensor, zero_point: int, low: int, high: int) -> Tensor:
    """Rounds `values` to multiples of `scale` (float32 [1]), limited to the codes `low` to `high` around `zero_point`.

    The gradient of `values` ignores the rounding (straight-through estimator), and is zero for values that are clipped
    by more than half a step. The gradient of `scale` is that of learned step sizes (Esser et al., "Learned Step Size
    Quantization", 2020, equation 3), divided by the root of the number of values times `high` (section 2.2 there).
    Within `torch.func.vmap`, this number is that of one sample, so the gradient of a mean over samples does not depend
    on their number.
    """
    # Operators of torch need half the time of an autograd.Function under vmap, which unpacks its arguments in Python.
    step = scale.detach()
    steps = values.detach() * step.reciprocal()
    codes = steps.round().clamp(low - zero_point, high - zero_point)
    errors = codes - steps
    # Rounding moves a value by at most half a step, and clipping moves it further.
    is_rounded = errors.abs() <= HALF_STEP
    # In steps: a rounded value counts with its rounding error, and a clipped value with its limit.
    slopes = torch.where(is_rounded, errors, codes) / math.sqrt(max(values.numel(), 1) * high)
    differentiable = torch.addcmul(torch.where(is_rounded, values, 0.0), scale, slopes)
    return codes * step + (differentiable - differentiable.detach())


class RangeFactors(nn.Module):
    """The scales of all activations with a learned range: each initial scale times the exponential of a parameter."""

    def __init__(self, scales: list[float]) -> None:
        super().__init__()
        self.register_buffer("initial", torch.tensor(scales))
        self.logarithms = nn.Parameter(torch.zeros(len(scales)))

    @property
    def scales(self) -> Tensor:
        """The current scales, float32 [groups]."""
        assert isinstance(self.initial, Tensor)
        return self.initial * self.logarithms.exp()

    def forward(self) -> tuple[Tensor, ...]:
        """Returns the current scales, one tensor [1] for each group of activations."""
        return torch.split(self.scales, 1)


class FakeQuantizedWeight(nn.Module):
    """A trained weight, which its layers read rounded to int8 codes.

    `codes` are the codes before training, `scale` is the scale in a shape that broadcasts to them, and `limits` are the
    lowest and the highest code. The scale is not trained. Values that training moves beyond the limits are clipped.
    """

    def __init__(self, codes: Tensor, scale: Tensor, limits: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("scale", scale.detach().clone())
        self.limits = limits
        self.value = nn.Parameter(codes * scale)

    def forward(self) -> Tensor:
        """Returns the rounded weight. The gradient ignores the rounding, and is zero for clipped values."""
        assert isinstance(self.scale, Tensor)
        # Unlike minimum and maximum, clamp passes the whole gradient of a value at the limit.
        clipped = torch.clamp(self.value, self.scale * self.limits[0], self.scale * self.limits[1])
        return clipped + (self.codes * self.scale - clipped).detach()

    @property
    def codes(self) -> Tensor:
        """The codes of the current weight, int8."""
        assert isinstance(self.scale, Tensor)
        return (self.value.detach() / self.scale).round().clamp(*self.limits).to(torch.int8)
