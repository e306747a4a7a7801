"""GPTQ rounding: rounds weights so that the error of the layer's outputs is small, instead of the error of the weights.

Rounding to nearest is optimal for a single weight. As the inputs of a layer are correlated, other weights can
compensate the rounding error of one weight. With H the covariance of the inputs, a change D of the weights has the
output error trace(D H D'). The method rounds the weights one by one and distributes each error over the weights not yet
rounded, in closed form (optimal brain quantization, Frantar and Alistarh 2022; with the order and the Cholesky factor
of GPTQ, Frantar et al. 2023). It also tries smaller scales, which clip a few weights and have finer steps. The same
pass corrects the biases, which compensate the mean errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from openneutron.core.fx import arguments
from openneutron.core.overflow import without_overflow
from openneutron.ops.windows import of_each_dim
from openneutron.quantizer.sample import positions
from openneutron.recovery.batches import batches_that_run
from openneutron.recovery.correct_biases import PooledBiases, correct_bias
from openneutron.recovery.layerwise import LayerIO, Samples, SharedMeasurement, run_layerwise, samples_within_memory
from openneutron.recovery.shared_layers import SharedLayer
from openneutron.recovery.weighted_layers import WeightedLayer, shrink

__all__ = ["MOST_INPUTS", "InputRows", "gptq_codes", "round_weights_by_gptq"]

# H is estimated from max(POSITIONS, POSITIONS_PER_INPUT x inputs of a group) positions of the layer's inputs, or from
# all positions if there are fewer.
POSITIONS = 32768
POSITIONS_PER_INPUT = 16
# Damping of H: this multiple of the mean of H's diagonal is added to the diagonal. A smaller value relies more on the
# samples.
DAMPING = 0.01
# Damping of the least-squares weights, as a multiple of the same mean. It is larger, because the errors of earlier
# layers are only partly predictable.
LEAST_SQUARES_DAMPING = 0.3
# This number of positions counts as one independent position for the least-squares weights. Positions of a sample are
# correlated, and the errors of earlier layers differ between samples. Weights that fit them too well generalize worse
# to other inputs.
CORRELATED_POSITIONS = 100.0
# Candidates for this number where several layers read a weight. The one with the least error on held-out samples is
# selected: every `STRIDE`th sample is held out, if there are at least `FEWEST_SAMPLES`.
CORRELATED_POSITIONS_OF_SHARED = (10.0, 30.0, CORRELATED_POSITIONS)
STRIDE, FEWEST_SAMPLES = 4, 16
# Candidates for the scale, as multiples of the scale that the observer chose.
SHRINKING = (1.0, 0.9, 0.8, 0.7, 0.6)
# Share of the mean square of the inputs that is always added to the diagonal of H. It is the accuracy of sums of
# products in float32, and keeps H positive definite for inputs that hardly vary.
FLOAT_ROUNDING = 1e-5
# GPTQ rounds only layers with at most this number of inputs per group; other layers are rounded to nearest. The memory
# for H is quadratic and the time is cubic in this number.
MOST_INPUTS = 4608
# Limit on the number of weights that are rounded in one pass, summed over the candidates for the scale. A pass holds a
# few copies of these weights in double.
WEIGHTS_AT_ONCE = 2**24
_BLOCK = 64
# Positions of layers that share a weight are multiplied at least this many at once.
ROWS_AT_ONCE = 512
# Limit of the weight of a layer's moments among those of layers that share its weight, and of its reciprocal.
MOST_SHARE = 100.0
IMAGE_RANK = 4


@dataclass(frozen=True)
class _Moments:
    """Second moments of a layer's inputs, [groups, inputs, inputs] in double.

    `own` is the covariance of the quantized inputs, `cross` is the cross-covariance of float and quantized inputs.
    `trust` is positions / (positions + inputs). Below 1/2, there are more inputs than positions, and the estimated
    correlations are mostly chance.
    """

    own: torch.Tensor
    cross: torch.Tensor
    trust: float

    @property
    def shrunk(self) -> torch.Tensor:
        """The covariance, shrunk towards the covariance of uncorrelated inputs by 1 - `trust`."""
        size = self.own.shape[-1]
        even = _mean_of_diagonal(self.own) * torch.eye(size, dtype=self.own.dtype)
        return self.trust * self.own + (1 - self.trust) * even


def round_weights_by_gptq(
    converted: GraphModule,
    reference: GraphModule,
    samples: Samples,
    *,
    most_inputs: int = MOST_INPUTS,
    progress: bool | None = False,
) -> GraphModule:
    """Rounds the weights of a converted module by GPTQ and corrects its biases, in place.

    `reference` is the float graph before `prepare_pt2e`, `samples` are calibration inputs. `progress` shows a progress
    bar; None shows it if stderr is a terminal. Skips the weights of transposed convolutions, of 3-D convolutions, and
    of layers with more than `most_inputs` weights per output channel.

    Makes one pass over both graphs. For a layer with n weights per output channel, time grows with n^3, plus n^2 for
    each output channel. Raises `ModelError` if the two graphs are not of the same model.
    """

    def visit(layer: WeightedLayer, layer_io: LayerIO) -> list[torch.Tensor] | None:
        if _is_rounded(layer, most_inputs):
            _round_weight([layer], layer_io.weight, _estimate_moments(layer, layer_io), CORRELATED_POSITIONS)
        return correct_bias(layer, layer_io)

    def pool(shared: SharedLayer) -> SharedMeasurement:
        if shared.is_adjustable and _is_rounded(shared.first, most_inputs):
            return _PooledRounding(shared)
        return PooledBiases(shared)

    used = samples_within_memory(reference, samples)
    form = batches_that_run(reference, used)
    run_layerwise(reference, converted, used, visit, pool, form=form, progress=progress)
    converted.recompile()  # scales are part of the code
    return converted


def _is_rounded(layer: WeightedLayer, most_inputs: int) -> bool:
    codes = layer.codes
    return not layer.is_transposed and codes.dim() <= IMAGE_RANK and codes[0].numel() <= most_inputs


class _PooledRounding:
    """Rounds a weight by the inputs of all layers that read it, and corrects their biases."""

    def __init__(self, shared: SharedLayer) -> None:
        self._shared = shared
        self._biases = PooledBiases(shared)
        self._sums = _MomentSums(shared.first)
        self._held_out = _MomentSums(shared.first, self._sums.origins)
        self._weight: torch.Tensor | None = None
        self._energy = 0.0  # of the outputs of the first layer

    def add(self, layer: WeightedLayer, layer_io: LayerIO) -> None:
        """Adds the inputs of `layer` at evenly spread positions, and its mean error."""
        self._weight = layer_io.weight
        rows = InputRows(layer, self._weight, len(layer_io.real) * len(self._shared.uses))
        share = self._moment_weight(layer_io)
        holds_out = len(layer_io.real) >= FEWEST_SAMPLES
        for index, values in enumerate(zip(layer_io.quantized, layer_io.real, strict=True)):
            sums = self._held_out if holds_out and index % STRIDE == STRIDE - 1 else self._sums
            sums.add(*map(rows, values))
            if sums.pending_rows >= ROWS_AT_ONCE:
                sums.accumulate(share)
        self._sums.accumulate(share)
        self._held_out.accumulate(share)
        self._biases.add(layer, layer_io)

    def _moment_weight(self, layer_io: LayerIO) -> float:
        """Returns the weight of a layer's moments: the first layer's output energy, divided by this layer's."""
        energy = sum(
            float(torch.linalg.vector_norm(wanted, dtype=torch.float64)) ** 2 / wanted.numel()
            for wanted in layer_io.wanted
        )
        self._energy = self._energy or energy
        ratio = self._energy / energy if energy else 1.0
        return min(max(ratio, 1 / MOST_SHARE), MOST_SHARE)

    def apply(self) -> None:
        """Replaces the codes and the scale of the weight, and the biases."""
        assert self._weight is not None
        correlated_positions = CORRELATED_POSITIONS
        if self._held_out.count:
            correlated_positions = _select_correlated_positions(
                self._weight, self._shared.first, self._sums.moments(), self._held_out.moments()
            )
            self._sums.merge(self._held_out)
        _round_weight(self._shared.uses, self._weight, self._sums.moments(), correlated_positions)
        self._biases.apply()


def _select_correlated_positions(real: torch.Tensor, layer: WeightedLayer, seen: _Moments, held_out: _Moments) -> float:
    """Returns the one of `CORRELATED_POSITIONS_OF_SHARED` with the least output error on held-out samples.

    Compares the least-squares weights of the other samples before rounding.
    """
    rows = real.reshape(layer.groups, real.shape[0] // layer.groups, -1).double()

    def error(correlated_positions: float) -> float:
        wanted = _least_squares_weights(rows, seen, correlated_positions)
        # The mean squared error of the outputs, without the term that does not depend on the weights.
        return float(((wanted @ held_out.own - 2 * rows @ held_out.cross) * wanted).sum())

    return min(reversed(CORRELATED_POSITIONS_OF_SHARED), key=error)


def _round_weight(
    layers: Sequence[WeightedLayer], real: torch.Tensor, moments: _Moments, correlated_positions: float
) -> None:
    """Rounds the float weight `real`, which all of `layers` read."""
    layer = layers[0]
    groups, outputs = layer.groups, real.shape[0]
    rows = real.reshape(groups, outputs // groups, -1).double()
    wanted, covariance = _least_squares_weights(rows, moments, correlated_positions), moments.shrunk
    scale = layer.scale.expand(outputs, *layer.scale.shape[1:]) if layer.scale.dim() else layer.scale.expand(outputs)
    scale = scale.reshape(groups, -1, 1).double()
    at_once = max(1, WEIGHTS_AT_ONCE // wanted.numel())
    candidates: list[tuple[float, float, torch.Tensor]] = []
    for start in range(0, len(SHRINKING), at_once):
        factors = SHRINKING[start : start + at_once]
        # Rows are rounded independently, so the rows of several candidates are rounded in one pass.
        scales, rows = torch.cat([scale * factor for factor in factors], 1), wanted.repeat(1, len(factors), 1)
        codes = gptq_codes(rows, covariance, scales, layer.code_range)
        change = codes * scales - rows
        errors = ((change @ covariance) * change).reshape(groups, len(factors), -1).sum((0, 2)).tolist()
        by_candidate = codes.to(layer.codes.dtype).reshape(groups, len(factors), outputs // groups, -1).unbind(1)
        candidates += zip(errors, factors, by_candidate, strict=True)
    _, factor, chosen = min(candidates, key=lambda candidate: candidate[0])
    layer.codes.copy_(chosen.reshape(real.shape))
    if factor != 1:
        shrink(layers, factor)


def _least_squares_weights(rows: torch.Tensor, moments: _Moments, correlated_positions: float) -> torch.Tensor:
    """Returns the weights whose outputs on the quantized inputs are nearest to the float outputs (ridge regression).

    The damping, towards `rows`, grows with the number of inputs per position; `correlated_positions` count as one.
    """
    size = rows.shape[-1]
    damping = (LEAST_SQUARES_DAMPING + correlated_positions * (1 / moments.trust - 1)) * _mean_of_diagonal(moments.own)
    system = moments.own + damping * torch.eye(size, dtype=torch.float64)
    wanted: torch.Tensor = torch.linalg.solve(system, rows @ moments.cross + damping * rows, left=False)
    return wanted


def _mean_of_diagonal(matrices: torch.Tensor) -> torch.Tensor:
    """Returns the mean of each diagonal, [groups, 1, 1], at least 1e-12."""
    return matrices.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)[:, None, None]


def gptq_codes(
    weight: torch.Tensor, covariance: torch.Tensor, scale: torch.Tensor, code_range: tuple[int, int]
) -> torch.Tensor:
    """Returns the GPTQ codes of `weight` [groups, outputs, inputs], in the same shape and in double.

    `covariance` is [groups, inputs, inputs], `scale` broadcasts to [groups, outputs, 1]. The inputs with the largest
    variance are rounded first: their errors have the most weight, and later inputs can still compensate them.
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


def _estimate_moments(layer: WeightedLayer, layer_io: LayerIO) -> _Moments:
    """Estimates the moments from evenly spread positions."""
    rows, sums = InputRows(layer, layer_io.weight, sum(layer_io.counts)), _MomentSums(layer)
    for quantized, real, count in zip(layer_io.quantized, layer_io.real, layer_io.counts, strict=True):
        sums.add(rows(quantized, count), rows(real, count))
        sums.accumulate()
    return sums.moments()


class _MomentSums:
    """Sums up the moments of a layer's inputs. Subtracts the means, which the bias compensates.

    Several layers may read the weight. Their moments are added up with weights of their own.
    """

    def __init__(self, layer: WeightedLayer, origins: list[torch.Tensor] | None = None) -> None:
        self._layer, groups, size = layer, layer.groups, layer.codes[0].numel()
        self._own, self._cross = (torch.zeros(groups, size, size, dtype=torch.float64) for _ in range(2))
        self._mean, self._real_mean = (torch.zeros(groups, size, dtype=torch.float64) for _ in range(2))
        self.origins: list[torch.Tensor] = [] if origins is None else origins
        """The values that are subtracted from both kinds of inputs. Sums with the same list can be merged."""
        self.count, self._total = 0, 0.0
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, inputs: torch.Tensor, real_inputs: torch.Tensor) -> None:
        """Adds rows [groups, positions, inputs] of the quantized and of the float inputs at the same positions."""
        # Subtracting the first rows' mean avoids cancellation for values far from zero. Quantized and float inputs have
        # separate means, because a constant differs from its quantized value.
        if not self.origins:
            self.origins += [without_overflow(_mean_row, rows).to(rows.dtype) for rows in (inputs, real_inputs)]
        self._waiting.append((inputs - self.origins[0], real_inputs - self.origins[1]))

    @property
    def pending_rows(self) -> int:
        """The number of rows since the last `accumulate`."""
        return sum(rows.shape[1] for rows, _ in self._waiting)

    def accumulate(self, weight: float = 1.0) -> None:
        """Adds the moments of the rows that were added since the last call, multiplied by `weight`."""
        if not self._waiting:
            return
        pending_rows = zip(*self._waiting, strict=True)
        inputs, real_inputs = (torch.cat(rows, 1) if len(rows) > 1 else rows[0] for rows in pending_rows)
        self._waiting = []
        self._own.add_(without_overflow(_products, inputs, inputs), alpha=weight)
        self._cross.add_(without_overflow(_products, real_inputs, inputs), alpha=weight)
        self._mean += weight * without_overflow(_sums, inputs)
        self._real_mean += weight * without_overflow(_sums, real_inputs)
        self.count += inputs.shape[1]
        self._total += weight * inputs.shape[1]

    def merge(self, other: _MomentSums) -> None:
        """Adds the sums of `other`, which has the same `origins`."""
        self._own += other._own
        self._cross += other._cross
        self._mean += other._mean
        self._real_mean += other._real_mean
        self.count += other.count
        self._total += other._total

    def moments(self) -> _Moments:
        """Returns the moments of all rows that were added. Raises `CalibrationError` if a row is not finite."""
        size = self._own.shape[-1]
        self._layer.require_finite(self._own, self._cross)
        own, cross, mean, real_mean = (
            sums / self._total for sums in (self._own, self._cross, self._mean, self._real_mean)
        )
        rounding = FLOAT_ROUNDING * _mean_of_diagonal(own) * torch.eye(size, dtype=torch.float64)
        trust = self.count / (self.count + size)
        return _Moments(own - _batched_outer(mean, mean) + rounding, cross - _batched_outer(real_mean, mean), trust)


def _mean_row(rows: torch.Tensor) -> torch.Tensor:
    return rows.mean(1, keepdim=True)


def _sums(rows: torch.Tensor) -> torch.Tensor:
    return rows.sum(1)


def _products(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return rows.transpose(1, 2) @ others


def _batched_outer(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return first[:, :, None] * second[:, None]


class InputRows:
    """Reads the inputs that `layer` multiplies with its weight, at evenly spread positions of each sample.

    The layers that share `weight` read `samples` samples in all, which determines the number of positions. The
    positions are computed once for each shape. A call returns [groups, positions, weights per output channel].
    """

    def __init__(self, layer: WeightedLayer, weight: torch.Tensor, samples: int) -> None:
        self._layer, self._weight = layer, weight
        self._most = max(POSITIONS, POSITIONS_PER_INPUT * weight[0].numel()) // samples + 1
        self._places: dict[torch.Size, _Places] = {}

    def __call__(self, values: torch.Tensor, count: int = 1) -> torch.Tensor:
        """Returns the inputs in `values`, a tensor of `count` samples that the layer reads."""
        if self._layer.is_linear:
            rows = values.flatten(0, -2)
            return rows[_positions_of_samples(len(rows), count, self._most)][None]
        if values.shape not in self._places:
            self._places[values.shape] = _places(self._layer, values.shape, self._weight, count, self._most)
        places = self._places[values.shape]
        found = _channels_at(values, places.index)
        found.flatten(0, -2).index_fill_(0, places.outside, 0)
        groups, count = self._layer.groups, len(found)
        # Matrix products of other orders take several times as long.
        if groups == 1:
            return found.movedim(-1, 1).reshape(1, count, -1)
        by_tap = found.reshape(count, -1).t().contiguous()
        by_group = by_tap.reshape(-1, groups, values.shape[1] // groups, count).permute(1, 2, 0, 3)
        return by_group.reshape(groups, -1, count).transpose(1, 2)


@dataclass(frozen=True)
class _Places:
    """The places of the inputs of a convolution's outputs: an index of each dimension except channels.

    Their shapes broadcast to [positions, taps, ... taps]. `outside` are the places in the padding, in the flattened
    shape; their indices are those of the nearest input.
    """

    index: tuple[torch.Tensor, ...]
    outside: torch.Tensor


def _positions_of_samples(size: int, count: int, wanted: int) -> torch.Tensor:
    """Returns at most `wanted` positions in each of `count` equal parts of `size` values, in order."""
    part = size // count
    chosen = positions(part, wanted).sort().values
    return (part * torch.arange(count)[:, None] + chosen).flatten()


def _places(layer: WeightedLayer, shape: torch.Size, weight: torch.Tensor, count: int, wanted: int) -> _Places:
    """Returns the places at no more than `wanted` positions of each sample's outputs for `count` inputs of `shape`."""
    axes = _convolution_axes(layer, shape[2:], weight)
    outputs = [axis.outputs for axis in axes]
    area = math.prod(outputs)
    chosen = _positions_of_samples(shape[0] * area, count, wanted)
    sample, places = chosen // area, torch.unravel_index(chosen % area, outputs)
    # [positions, taps] of each axis, broadcast to [positions, taps, ... taps].
    taps = [
        axis.taps(place).reshape(-1, *(axis.kernel if other is axis else 1 for other in axes))
        for axis, place in zip(axes, places, strict=True)
    ]
    inside = torch.ones((), dtype=torch.bool)
    for axis, inputs in zip(axes, taps, strict=True):
        inside = inside & axis.holds(inputs)
    clamped = (inputs.clamp(0, axis.size - 1) for axis, inputs in zip(axes, taps, strict=True))
    return _Places((sample.reshape(-1, *[1] * len(axes)), *clamped), (~inside).flatten().nonzero()[:, 0])


def _channels_at(values: torch.Tensor, index: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the channels of `values` [samples, channels, ...] at places, with channels in the last dimension.

    `index` has a tensor for each other dimension, which broadcast to the shape of the places.
    """
    last = values.movedim(1, -1)
    if not last.is_contiguous():
        return last[tuple(index)]
    place = index[0]
    for size, more in zip(last.shape[1:-1], index[1:], strict=True):
        place = place * size + more
    return last.flatten(0, -2).index_select(0, place.flatten()).reshape(*place.shape, -1)


@dataclass(frozen=True, eq=False)
class _Axis:
    """A spatial dimension of a convolution: `size` inputs with `before` and `after` zeros of padding."""

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
        """Returns the input indices of each of `outputs`, [outputs, kernel].

        Indices outside of 0..size-1 are padding.
        """
        return outputs[:, None] * self.stride - self.before + torch.arange(self.kernel) * self.dilation

    def holds(self, inputs: torch.Tensor) -> torch.Tensor:
        return (inputs >= 0) & (inputs < self.size)


def _convolution_axes(layer: WeightedLayer, sizes: Sequence[int], weight: torch.Tensor) -> list[_Axis]:
    """Returns the spatial dimensions of a convolution."""
    args = arguments(layer.node)
    kernel = weight.shape[2:]
    stride, dilation = (of_each_dim(args[name], len(kernel)) for name in ("stride", "dilation"))
    if args["padding"] == "same":  # an odd number of zeros has one more at the end
        totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        padding = [(total // 2, total - total // 2) for total in totals]
    else:
        padding = [(one, one) for one in of_each_dim(0 if args["padding"] == "valid" else args["padding"], len(kernel))]
    shapes = zip(sizes, kernel, stride, dilation, padding, strict=True)
    return [_Axis(size, taps, step, apart, *ends) for size, taps, step, apart, ends in shapes]
