"""Selects the quantization range of a value from observed statistics, with pure functions.

The statistics are a weighted sample, and the exact extremes of each tensor, because a bounded sample may not contain
them. A range that is narrower than the extremes has a finer scale, and clips the values outside of it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["RULES", "Codes", "Distribution", "bounds_by_error", "distribution", "range_by", "rule_named"]

_FORMER_RULES = {"error": "mse", "entropy": "kl", "extremes": "minmax"}
RULES = ("mse", "relative", "percentile", "kl", "minmax")

# A larger sample is condensed: the SINGLE_VALUES outermost values on either side are kept, and MEANS means of
# neighboring values replace the others.
SINGLE_VALUES = 256
MEANS = 4096
# The search first tries these shares of the widest range, then shares between the two neighbors of the best one. A
# range of less than 1/256 of the widest range is narrower than one int8 step of the widest range.
SHARES = 256.0 ** -torch.linspace(0, 1, 81)
FINE_STEPS = 8
# The number of values that are quantized at once: the values that several shares give fit into a processor cache.
BLOCK = 1 << 18
SHARES_AT_ONCE = 9
# Bins of the histogram whose divergence is computed, as in TensorRT's calibration.
BINS = 2048
# torchao's observers raise scales to float32's eps, so a search below that has no effect.
SMALLEST_SCALE = torch.finfo(torch.float32).eps

# A function from the low ends [K] and the high ends [K] of K ranges to their costs [K].
Cost = Callable[[Tensor, Tensor], Tensor]
# A function from the ends of a range, which contains 0, to a number that no range within it costs less than.
LeastCost = Callable[[float, float], float]
# The computed costs of the same values differ by less than this share, because of rounding.
COST_ROUNDING = 1e-4


@dataclass(frozen=True)
class Codes:
    """The integers `low` to `high`. In a symmetric scheme, `zero` is the code of 0.0 for every range."""

    low: int
    high: int
    zero: int | None = None

    @property
    def steps(self) -> int:
        """Returns the number of steps into which the range is divided."""
        return self.high - self.low

    def qparams(self, lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns scales and zero points [K], both float, of ranges that contain 0, computed as torchao does."""
        if self.zero is not None:
            scales = torch.maximum(-lows, highs) / (self.steps / 2)
            return scales, torch.full_like(scales, float(self.zero))
        scales = (highs - lows) / self.steps
        return scales, (self.low - torch.round(lows / scales)).clamp(self.low, self.high)


@dataclass(frozen=True)
class Distribution:
    """Values [M] in ascending order, and the number of observed values that each represents, [M]."""

    values: Tensor
    weights: Tensor


def distribution(values: Tensor, weights: Tensor) -> Distribution:
    """Sorts a sample: `values` [N], finite, of which value i represents `weights[i]` observed values.

    Condenses a large sample: means of neighbors replace all but the outermost values.
    """
    order = torch.from_numpy(np.argsort(values.numpy()))  # five times as fast as torch's
    values, weights = values[order], weights[order]
    size = (len(values) - 2 * SINGLE_VALUES) // MEANS
    if size < 2:
        return Distribution(values, weights)
    inner = slice(SINGLE_VALUES, SINGLE_VALUES + size * MEANS)
    mass = weights[inner].view(MEANS, size)
    neighbours = values[inner].view(MEANS, size)
    total = mass.sum(1)
    # Relative to the first, so that the mean of equal values (the zeros after a relu) is exactly that value.
    means = neighbours[:, 0] + ((neighbours - neighbours[:, :1]) * mass).sum(1) / total
    return Distribution(
        torch.cat([values[: inner.start], means, values[inner.stop :]]),
        torch.cat([weights[: inner.start], total, weights[inner.stop :]]),
    )


def rule_named(name: str) -> str:
    """Returns the current name of the rule `name`. Warns with `DeprecationWarning` if `name` is a former name."""
    rule = _FORMER_RULES.get(name, name)
    if rule != name:
        warnings.warn(f"range_by={name!r} is deprecated: write range_by={rule!r}.", DeprecationWarning, stacklevel=3)
    return rule


def range_by(rule: str, seen: Distribution, codes: Codes, percentile: float = 99.99) -> tuple[float, float]:
    """Returns (low, high) of the range that `rule`, one of `RULES`, selects. The range contains 0, because 0.0 needs an
    exact code.

    - "mse": the least squared error of quantized values.
    - "relative": the same; `seen` weights the values of a tensor by the inverse square of its largest magnitude.
    - "percentile": the range from percentile 100 - `percentile` to percentile `percentile` of the values.
    - "kl": the least Kullback-Leibler divergence of the quantized histogram.
    - "minmax": the minimum and the maximum.
    """
    low, high = min(float(seen.values[0]), 0.0), max(float(seen.values[-1]), 0.0)
    bound = max(-low, high)
    if rule == "minmax" or (bound if codes.zero is not None else high - low) <= SMALLEST_SCALE * codes.steps:
        return low, high
    if rule == "percentile":
        found = _percentiles(seen, percentile)
        return min(found[0], 0.0), max(found[1], 0.0)
    scaled = Distribution(seen.values / bound, seen.weights / seen.weights.sum())  # squares of large values overflow
    cost = _divergence(scaled, codes) if rule == "kl" else _squared_error(scaled, codes)
    least = (lambda *_: -math.inf) if rule == "kl" else _clipping_error(scaled, codes)
    low, high = _search_range(cost, least, low / bound, high / bound, one_bound=codes.zero is not None)
    return low * bound, high * bound


def bounds_by_error(values: Tensor, codes: Codes) -> Tensor:
    """Returns, for each row of finite `values` [C, N], the bound [C] of the symmetric range with the least squared
    error.
    """
    rows_at_once = max(1, BLOCK // (SHARES_AT_ONCE * values.shape[1]))
    return torch.cat([_bounds_of_rows(rows, codes) for rows in values.split(rows_at_once)])


def _bounds_of_rows(values: Tensor, codes: Codes) -> Tensor:
    full = values.abs().amax(1)
    scaled = values / full.clamp(min=torch.finfo(values.dtype).tiny)[:, None]
    candidates, costs = SHARES.to(values)[:0, None].expand(-1, len(values)), scaled[:, :0].T
    for shares in SHARES.to(values)[:, None].expand(-1, len(values)).split(SHARES_AT_ONCE):
        candidates, costs = torch.cat([candidates, shares]), torch.cat([costs, _rounding_errors(scaled, shares, codes)])
        # Narrower ranges clip more, so their errors are at least the error by clipping of this range.
        if bool((_clipping_errors(scaled, shares[-1]) > costs.amin(0)).all()):
            break
    best = _cheapest_of_rows(candidates, costs)
    candidates = torch.cat([best[None], _fine_factors().to(values)[:, None] * best])
    best = _cheapest_of_rows(candidates, _rounding_errors(scaled, candidates, codes))
    return torch.where(full > SMALLEST_SCALE * codes.steps, best.clamp(max=1.0) * full, full)


def _cheapest_of_rows(candidates: Tensor, costs: Tensor) -> Tensor:
    """Returns for each row the first of its `candidates` [K, C] with the lowest of `costs` [K, C], as [C]."""
    return candidates.gather(0, costs.argmin(0, keepdim=True))[0]


def _rounding_errors(scaled: Tensor, shares: Tensor, codes: Codes) -> Tensor:
    """Returns the squared errors [K, C] of the rows of `scaled` [C, N], quantized with the bounds `shares` [K, C]."""
    zero, scales = codes.zero or 0, (shares / (codes.steps / 2))[:, :, None]
    errors = torch.zeros_like(shares)
    for part in scaled.split(max(1, BLOCK // len(scales)), 1):
        rounded = (part / scales).round_().clamp_(codes.low - zero, codes.high - zero)
        errors += rounded.mul_(scales).sub_(part).square_().sum(2)
    return errors


def _clipping_errors(scaled: Tensor, shares: Tensor) -> Tensor:
    """Returns the squared errors [C] of the rows of `scaled` [C, N], clipped to the bounds `shares` [C]."""
    bounds = shares[:, None]
    parts = scaled.split(BLOCK, 1)
    return torch.stack([part.abs().sub_(bounds).clamp_(min=0).square_().sum(1) for part in parts]).sum(0)


def _fine_factors() -> Tensor:
    """Returns factors, in geometric steps, from one of `SHARES` to the values between its two neighbors."""
    return (SHARES[0] / SHARES[1]) ** torch.linspace(1, -1, 2 * FINE_STEPS + 1)


def _search_range(cost: Cost, least: LeastCost, low: float, high: float, *, one_bound: bool) -> tuple[float, float]:
    """Returns the cheapest range found.

    The search first scales both ends of the widest range (`low` <= 0 <= `high`) by one share, then each end alone. Each
    step tries the `SHARES`, then finer ones. On a tie, the range that was tried first is returned. With `one_bound`
    the range is symmetric around 0. A coarse step ends when no narrower range can be cheaper.
    """
    if one_bound:
        low, high = -max(-low, high), max(-low, high)
    two_sided = low < 0 < high and not one_bound
    fine = _fine_factors()
    ends = torch.tensor([low, high])

    def cheapest(shares: Tensor, at_once: int) -> Tensor:
        """Returns the row [2] of `shares` [K, 2], the shares of both ends, with the lowest cost.

        Tries `at_once` rows at once. If these are not all, no share may be above that in the row before it, except for
        the first two rows.
        """
        best, lowest = shares[0], math.inf
        for tried in shares.split(at_once):
            ranges = tried * ends
            costs = cost(ranges[:, 0], ranges[:, 1])
            place = costs.argmin()
            if float(costs[place]) < lowest:
                best, lowest = tried[place], float(costs[place])
            if at_once < len(shares) and least(*ranges[-1].tolist()) > lowest * (1 + COST_ROUNDING):
                break
        return best

    both = SHARES[:, None].expand(-1, 2)
    best = cheapest(both, SHARES_AT_ONCE)
    best = cheapest(torch.cat([best[None], (best * fine[:, None]).clamp(max=1.0)]), len(fine) + 1)
    for end in (0, 1) if two_sided else ():
        for candidates in (SHARES, fine):
            shares = best.repeat(len(candidates) + 1, 1)
            scaled = candidates if candidates is SHARES else (best[end] * candidates).clamp(max=1.0)
            shares[1:, end] = scaled
            best = cheapest(shares, SHARES_AT_ONCE if candidates is SHARES else len(shares))
    return low * float(best[0]), high * float(best[1])


def _squared_error(seen: Distribution, codes: Codes) -> Cost:
    """Returns the cost function "mean squared error of the quantized values"."""

    def cost(lows: Tensor, highs: Tensor) -> Tensor:
        scales, zeros = (qparams[:, None] for qparams in codes.qparams(lows, highs))
        rounded = (seen.values / scales).round_().add_(zeros).clamp_(codes.low, codes.high).sub_(zeros).mul_(scales)
        return rounded.sub_(seen.values).square_() @ seen.weights

    return cost


def _clipping_error(seen: Distribution, codes: Codes) -> LeastCost:
    """Returns the function "mean squared error of the values that a range clips", a part of `_squared_error`.

    The zero point is rounded, so the outermost codes lie up to half a step outside of the range.
    """

    def least(low: float, high: float) -> float:
        step = (high - low) / codes.steps
        if codes.zero is not None:
            low, high = (codes.low - codes.zero) * step, (codes.high - codes.zero) * step
        return float((seen.values - seen.values.clamp(low - step, high + step)).square_() @ seen.weights)

    return least


def _divergence(seen: Distribution, codes: Codes) -> Cost:
    """Returns the cost function of the rule "kl": the divergence of two histograms of the nonzero values, as in
    TensorRT.

    1. The clipped histogram counts values outside of the range in its outermost bins.
    2. The quantized histogram counts values within the range only. It spreads the mass of each code evenly over the
       nonempty bins of the code. A bin that is empty in the quantized histogram, but not in the clipped one, gets the
       mass of the value with the least weight, because the divergence would otherwise be infinite.

    Zeros are not counted: every range has an exact code for them, and the many zeros after a relu would outweigh all
    other values.
    """
    histogram = _Histogram.from_distribution(seen)

    def cost(lows: Tensor, highs: Tensor) -> Tensor:
        scales, zeros = (qparams[:, None] for qparams in codes.qparams(lows, highs))
        code = (histogram.centres / scales).round_().add_(zeros)
        inside = ((code >= codes.low) & (code <= codes.high)).float()
        code = code.clamp_(codes.low, codes.high).sub_(codes.low).long()
        clipped, quantized = histogram.clipped(inside), histogram.quantized(code, inside, codes.steps + 1)
        divergence = clipped * (clipped.clamp(min=1e-30).log() - quantized.clamp(min=histogram.least).log())
        return divergence.sum(1)

    return cost


@dataclass(frozen=True)
class _Histogram:
    """A histogram of the nonzero values, with `BINS` bins of equal width. K is the number of ranges that are tried."""

    centres: Tensor
    """The centres of the bins, [BINS]."""
    mass: Tensor
    """The mass of each bin, [BINS]. The sum is 1."""
    least: float
    """The mass of the value with the least weight."""

    @classmethod
    def from_distribution(cls, seen: Distribution) -> _Histogram:
        """Returns the histogram of the values that an observer saw."""
        low, high = float(seen.values[0]), float(seen.values[-1])
        width = (high - low) / BINS
        places = ((seen.values - low) / width).long().clamp(0, BINS - 1)
        weights = torch.where(seen.values == 0, 0, seen.weights)
        weights = weights / weights.sum()
        mass = torch.zeros(BINS).index_add_(0, places, weights)
        return cls(low + (torch.arange(BINS) + 0.5) * width, mass, float(weights[weights > 0].min()))

    def quantized(self, code: Tensor, inside: Tensor, codes: int) -> Tensor:
        """Returns [K, BINS], the mass of each code spread evenly over its nonempty bins. The sum of each row is 1.

        `code` [K, BINS] is the code of each bin, from 0 to `codes` - 1. `inside` is 1 for bins within the range.
        """
        sums, filled = torch.zeros(len(code), codes), (self.mass > 0).float()
        inner = sums.scatter_add(1, code, self.mass * inside)
        counts = sums.scatter_add(1, code, filled * inside)
        spread = (inner / counts.clamp(min=1)).gather(1, code) * filled * inside
        return spread / spread.sum(1, keepdim=True).clamp(min=self.least)

    def clipped(self, inside: Tensor) -> Tensor:
        """Returns [K, BINS], the mass of each bin after values outside of a range are moved to its outermost bins."""
        outside = self.mass * (1 - inside)
        first = inside.argmax(1, keepdim=True)
        last = BINS - 1 - inside.flip(1).argmax(1, keepdim=True)
        below = (outside * (torch.arange(BINS) < first)).sum(1, keepdim=True)
        clipped = (self.mass * inside).scatter_add(1, first, below)
        return clipped.scatter_add(1, last, outside.sum(1, keepdim=True) - below)


def _percentiles(seen: Distribution, percentile: float) -> tuple[float, float]:
    """Returns the percentiles 100 - `percentile` and `percentile` of the weighted values, without interpolation."""
    share = seen.weights.double().cumsum(0)
    wanted = torch.tensor([100 - percentile, percentile], dtype=torch.float64) / 100 * share[-1]
    places = torch.searchsorted(share, wanted).clamp(max=len(share) - 1)
    low, high = seen.values[places].tolist()
    return low, high
