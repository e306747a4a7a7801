"""Learned rounding: each weight goes up or down so that the layer's outputs, not its weights, change least.

Rounding to nearest is best for one weight alone. The inputs of a layer are correlated, though, so that the error of one
weight can be taken back by the next ones. With H the covariance of the inputs, a change D of the weights changes the
outputs by trace(D H D'), and rounding the weights one by one, each time spreading the error over those that are left,
makes that small in closed form (optimal brain quantization, Frantar and Alistarh 2022; in the order and with the
Cholesky factor of GPTQ, Frantar et al. 2023). Scales shrink where clipping a few weights costs less than the finer
steps win. Means are left to the bias, which is corrected in the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from openneutron.core.fx import arguments
from openneutron.quantizer.sample import positions
from openneutron.recovery.correct_biases import correct_bias
from openneutron.recovery.walk import Reading, Samples, samples_that_fit, walk
from openneutron.recovery.weighted_layers import Layer

__all__ = ["MOST_INPUTS", "round_weights", "rounded_with_feedback", "rows_of"]

# Positions of the inputs that H is made of: at least so many, and so many for each input of a group.
POSITIONS = 32768
POSITIONS_PER_INPUT = 16
# What is added to the diagonal of H, of its mean: the less, the more the samples are trusted.
DAMPING = 0.01
# The same for the weights that H and the float outputs ask for: upstream errors are only partly predictable.
PULL = 0.3
# So many positions are worth one there: those of a sample are alike, and errors upstream are its own for the most part.
# What fits them is nearer to float on the samples, and farther on others.
ALIKE = 100.0
# Candidates for the scale, of the one that the extremes or the squared error chose.
SHRINKING = (1.0, 0.9, 0.8, 0.7, 0.6)
# Of the mean square of the inputs, what is added to the diagonal of H in any case: sums of products in float32 are not
# more exact, and H must stay positive definite where its inputs hardly vary.
FLOAT_ROUNDING = 1e-5
# Layers with more inputs to a group than this are rounded to nearest: H takes its square in bytes, its cube in time.
MOST_INPUTS = 4608
# Candidates are rounded together as long as they have no more weights than this: a few copies of them, in double.
WEIGHTS_AT_ONCE = 2**24
_BLOCK = 64


@dataclass(frozen=True)
class _Moments:
    """Of the inputs, [groups, inputs, inputs] in double: covariance, and cross-covariance of real and quantized ones.

    `trust` is what a covariance of so many inputs, seen at so many positions, is worth: below one half, where there are
    more inputs than positions, most of what it says of their correlation is chance.
    """

    own: torch.Tensor
    cross: torch.Tensor
    trust: float

    @property
    def shrunk(self) -> torch.Tensor:
        """The covariance, drawn towards that of inputs without correlation as far as it is not to be trusted."""
        size = self.own.shape[-1]
        even = _mean_of_diagonal(self.own) * torch.eye(size, dtype=self.own.dtype)
        return self.trust * self.own + (1 - self.trust) * even


def round_weights(
    converted: GraphModule,
    reference: GraphModule,
    samples: Samples,
    *,
    most_inputs: int = MOST_INPUTS,
    progress: bool | None = False,
) -> GraphModule:
    """Round the weights of a converted module anew and correct its biases, in place.

    `reference` is the float graph that was prepared, `samples` are calibration inputs. `progress` shows a bar; None
    does in a terminal. One pass over both graphs. For each layer the cube of the inputs of an output, and their square
    for each output. Transposed convolutions, and layers with more than `most_inputs` inputs of an output, keep their
    rounding. Raises `ModelError` where the two graphs do not belong together.
    """

    def visit(layer: Layer, reading: Reading) -> None:
        if not layer.is_transposed and reading.weight[0].numel() <= most_inputs:
            _round(layer, reading)
        correct_bias(layer, reading)

    walk(reference, converted, samples_that_fit(reference, samples), visit, progress)
    converted.recompile()  # scales are part of the code
    return converted


def _round(layer: Layer, reading: Reading) -> None:
    real = reading.weight
    groups, outputs = layer.groups, real.shape[0]
    moments = _moments(layer, reading)
    rows = real.reshape(groups, outputs // groups, -1).double()
    wanted, covariance = _wanted(rows, moments), moments.shrunk
    scale = layer.scale.expand(outputs, *layer.scale.shape[1:]) if layer.scale.dim() else layer.scale.expand(outputs)
    scale = scale.reshape(groups, -1, 1).double()
    at_once = max(1, WEIGHTS_AT_ONCE // wanted.numel())
    candidates: list[tuple[float, float, torch.Tensor]] = []
    for start in range(0, len(SHRINKING), at_once):
        factors = SHRINKING[start : start + at_once]
        # Rows are rounded on their own, so that those for several candidates are rounded in one pass.
        scales, rows = torch.cat([scale * factor for factor in factors], 1), wanted.repeat(1, len(factors), 1)
        codes = rounded_with_feedback(rows, covariance, scales, layer.code_range)
        change = codes * scales - rows
        errors = ((change @ covariance) * change).reshape(groups, len(factors), -1).sum((0, 2)).tolist()
        by_candidate = codes.to(layer.codes.dtype).reshape(groups, len(factors), outputs // groups, -1).unbind(1)
        candidates += zip(errors, factors, by_candidate, strict=True)
    _, factor, chosen = min(candidates, key=lambda candidate: candidate[0])
    layer.codes.copy_(chosen.reshape(real.shape))
    if factor != 1:
        layer.shrink(factor)


def _wanted(rows: torch.Tensor, moments: _Moments) -> torch.Tensor:
    """The weights that bring the outputs nearest to the float ones, given the inputs as they are now.

    They are pulled towards `rows` the more, the more inputs there are for each position.
    """
    size = rows.shape[-1]
    pull = (PULL + ALIKE * (1 / moments.trust - 1)) * _mean_of_diagonal(moments.own)
    system = moments.own + pull * torch.eye(size, dtype=torch.float64)
    wanted: torch.Tensor = torch.linalg.solve(system, rows @ moments.cross + pull * rows, left=False)
    return wanted


def _mean_of_diagonal(matrices: torch.Tensor) -> torch.Tensor:
    """[groups, 1, 1], above zero also where all is zero."""
    return matrices.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)[:, None, None]


def rounded_with_feedback(
    weight: torch.Tensor, covariance: torch.Tensor, scale: torch.Tensor, code_range: tuple[int, int]
) -> torch.Tensor:
    """The codes [groups, outputs, inputs] of `weight` of the same shape, in double.

    `covariance` is [groups, inputs, inputs], `scale` broadcasts to [groups, outputs, 1]. The most active inputs are
    rounded first, as their errors weigh most and can then still be taken back.
    """
    groups, outputs, size = weight.shape
    weight, covariance, scale = weight.double(), covariance.double(), scale.double()
    damped = covariance + DAMPING * _mean_of_diagonal(covariance) * torch.eye(size, dtype=torch.float64)
    order = damped.diagonal(dim1=1, dim2=2).argsort(1, descending=True)
    left = weight.gather(2, order[:, None].expand(groups, outputs, size)).clone()
    ordered = damped.gather(1, order[:, :, None].expand_as(damped)).gather(2, order[:, None].expand_as(damped))
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(ordered)), upper=True)
    scale = scale.expand(groups, outputs, 1)[:, :, 0]
    codes = torch.empty_like(left)
    for start in range(0, size, _BLOCK):
        end = min(start + _BLOCK, size)
        errors = left.new_empty(groups, outputs, end - start)
        for index in range(start, end):
            column = left[:, :, index]
            codes[:, :, index] = torch.round(column / scale).clamp(*code_range)
            error = (column - codes[:, :, index] * scale) / factor[:, index, index, None]
            left[:, :, index:end] -= error[:, :, None] * factor[:, None, index, index:end]
            errors[:, :, index - start] = error
        left[:, :, end:] -= errors @ factor[:, start:end, end:]
    return torch.empty_like(codes).scatter_(2, order[:, None].expand_as(codes), codes)


def _moments(layer: Layer, reading: Reading) -> _Moments:
    """Of evenly spread positions; centred, as the bias takes care of the means."""
    weight = reading.weight
    groups, size = layer.groups, weight[0].numel()
    wanted = max(POSITIONS, POSITIONS_PER_INPUT * size) // len(reading.wanted) + 1
    own, cross = (torch.zeros(groups, size, size, dtype=torch.float64) for _ in range(2))
    mean, real_mean = (torch.zeros(groups, size, dtype=torch.float64) for _ in range(2))
    # Covariances of values far from zero cancel; those around the first sample's mean do not. Each has its own: a value
    # that never varies is not the same when quantized.
    read = reading.quantized, reading.real
    origins = [rows_of(layer, values[0], weight, wanted).mean(1, keepdim=True) for values in read]
    count = 0
    for sample in zip(*read, strict=True):
        inputs, real_inputs = (
            rows_of(layer, values, weight, wanted) - origin for values, origin in zip(sample, origins, strict=True)
        )
        own += inputs.transpose(1, 2) @ inputs
        cross += real_inputs.transpose(1, 2) @ inputs
        mean += inputs.sum(1)
        real_mean += real_inputs.sum(1)
        count += inputs.shape[1]
    own, cross, mean, real_mean = (sums / count for sums in (own, cross, mean, real_mean))
    rounding = FLOAT_ROUNDING * _mean_of_diagonal(own) * torch.eye(size, dtype=torch.float64)
    trust = count / (count + size)
    return _Moments(own - _outer(mean, mean) + rounding, cross - _outer(real_mean, mean), trust)


def _outer(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return first[:, :, None] * second[:, None]


def rows_of(layer: Layer, values: torch.Tensor, weight: torch.Tensor, wanted: int) -> torch.Tensor:
    """[groups, positions, inputs of an output]: what `layer` multiplies its weight with, at most `wanted` positions."""
    if layer.is_linear:
        rows = values.flatten(0, -2)
        return rows[positions(len(rows), wanted).sort().values][None]
    images = values if values.dim() == 4 else values[:, :, None]
    axes = _axes(layer, images.shape[2:], weight)
    area = axes[0].outputs * axes[1].outputs
    chosen = positions(len(images) * area, wanted).sort().values
    image, place = chosen // area, chosen % area
    # [positions, taps] of both axes, broadcast to [positions, taps, taps].
    down, across = axes[0].taps(place // axes[1].outputs)[:, :, None], axes[1].taps(place % axes[1].outputs)[:, None]
    inside = axes[0].holds(down) & axes[1].holds(across)
    found = images[image[:, None, None], :, down.clamp(0, axes[0].size - 1), across.clamp(0, axes[1].size - 1)]
    # [positions, channels, taps, taps] in memory, too: products of other orders take several times as long.
    patches = torch.where(inside[..., None], found, 0).movedim(3, 1).contiguous()
    return patches.reshape(len(chosen), layer.groups, -1).movedim(1, 0)


@dataclass(frozen=True)
class _Axis:
    """Height or width: `size` inputs with zeros `before` and `after` them, which a kernel walks over."""

    size: int
    kernel: int
    stride: int
    dilation: int
    before: int
    after: int

    @property
    def outputs(self) -> int:
        return (self.size + self.before + self.after - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    def taps(self, outputs: torch.Tensor) -> torch.Tensor:
        """[outputs, kernel]: the inputs that each of `outputs` is made of; zeros are outside of the inputs."""
        return outputs[:, None] * self.stride - self.before + torch.arange(self.kernel) * self.dilation

    def holds(self, inputs: torch.Tensor) -> torch.Tensor:
        return (inputs >= 0) & (inputs < self.size)


def _axes(layer: Layer, sizes: Sequence[int], weight: torch.Tensor) -> tuple[_Axis, _Axis]:
    """Of a convolution over images, or over rows, which are images one high."""
    args = arguments(layer.node)
    kernel = weight.shape[2:] if weight.dim() == 4 else (1, *weight.shape[2:])
    stride, dilation = (_of_both(args[name], weight, 1) for name in ("stride", "dilation"))
    if args["padding"] == "same":  # with one more behind where the number is odd
        totals = [dilation[axis] * (kernel[axis] - 1) for axis in (0, 1)]
        padding = [(total // 2, total - total // 2) for total in totals]
    else:
        each = (0, 0) if args["padding"] == "valid" else _of_both(args["padding"], weight, 0)
        padding = [(one, one) for one in each]
    first, second = (_Axis(sizes[axis], kernel[axis], stride[axis], dilation[axis], *padding[axis]) for axis in (0, 1))
    return first, second


def _of_both(numbers: Sequence[int], weight: torch.Tensor, of_height: int) -> tuple[int, int]:
    """An argument of a convolution for height and width; over rows, `of_height` stands for the former."""
    return numbers[0] if weight.dim() == 4 else of_height, numbers[-1]
