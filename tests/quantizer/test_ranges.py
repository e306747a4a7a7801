"""The rules for ranges, compared with brute force, for zero, outliers, weights and large samples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openneutron.quantizer import DistributionObserver, ranges
from openneutron.quantizer.ranges import Codes, Distribution, bounds_by_error, distribution, range_by
from openneutron.recovery import Recipe

INT8 = Codes(-128, 127)
SYMMETRIC = Codes(-128, 127, 0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seen(values: Tensor) -> Distribution:
    return distribution(values, torch.ones(len(values)))


def quantized(values: Tensor, low: float, high: float, codes: Codes) -> Tensor:
    """Returns `values` quantized with a range, in double precision."""
    values = values.double()
    if codes.zero is not None:
        scale, zero = max(-low, high) / ((codes.high - codes.low) / 2), float(codes.zero)
    else:
        scale = (high - low) / (codes.high - codes.low)
        zero = codes.low - round(low / scale)
    return ((values / scale).round() + zero).clamp(codes.low, codes.high).sub(zero) * scale


def error(values: Tensor, low: float, high: float, codes: Codes) -> float:
    return float((quantized(values, low, high, codes) - values.double()).square().mean())


def brute_force(values: Tensor, codes: Codes) -> float:
    """Returns the smallest error over a dense grid of ranges."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    shares = np.concatenate([np.linspace(0.02, 1, 50), np.geomspace(1 / 300, 0.02, 20)])
    if codes.zero is not None or low == 0 or high == 0:
        return min(error(values, low * share, high * share, codes) for share in np.geomspace(1 / 300, 1, 600))
    return min(error(values, low * one, high * other, codes) for one in shares for other in shares)


def outliers(values: Tensor, count: int, size: float) -> Tensor:
    values = values.clone()
    values[:count] = size
    return values


STREAMS: dict[str, Tensor] = {
    "normal": random(3000),
    "after a relu": random(3000).relu(),
    "after a relu6": (random(3000) * 4).clamp(0, 6),
    "negative": -random(3000).abs(),
    "skewed": random(3000).exp() - 1.5,
    "an outlier": outliers(random(3000), 1, 40.0),
    "a far outlier": outliers(random(3000), 1, 3000.0),
    "far outliers on one side": outliers(random(3000).abs() * 0.1 - 3, 2, 100.0),
    "few values": random(3000).mul(2).round(),
    "heavy tails": random(3000) / random(3000, seed=1).abs().clamp(min=0.01),
}


class TestRanges:
    @pytest.mark.parametrize("codes", [INT8, SYMMETRIC, Codes(0, 255, 127), Codes(0, 255), Codes(-7, 7, 0)], ids=str)
    @pytest.mark.parametrize("name", STREAMS)
    def test_mse_is_as_good_as_brute_force(self, name: str, codes: Codes) -> None:
        values = STREAMS[name]
        found = error(values, *range_by("mse", seen(values), codes), codes)
        extremes = error(values, *range_by("minmax", seen(values), codes), codes)
        assert found <= (1.05 if codes.steps > 20 else 1.12) * brute_force(values, codes) + 1e-12
        assert found <= extremes * (1 + 1e-4)

    @pytest.mark.parametrize("name", STREAMS)
    @pytest.mark.parametrize("rule", ranges.RULES)
    def test_zero_is_exact_and_no_range_is_wider_than_the_values(self, name: str, rule: str) -> None:
        values = STREAMS[name]
        low, high = range_by(rule, seen(values), INT8)
        least, largest = min(0.0, float(values.min())), max(0.0, float(values.max()))
        assert least * (1 + 1e-6) <= low <= 0 <= high <= largest * (1 + 1e-6)
        assert float(quantized(torch.zeros(1), low, high, INT8)) == 0

    def test_a_condensed_sample_leads_to_the_same_range(self) -> None:
        for make in (Tensor.relu, Tensor.exp, Tensor.clone):
            values = make(random(60000))
            condensed = seen(values)
            assert len(condensed.values) < 10000
            assert float(condensed.weights.sum()) == len(values)
            found = error(values, *range_by("mse", condensed, INT8), INT8)
            plain = Distribution(values.sort().values, torch.ones(len(values)))
            assert found <= 1.04 * error(values, *range_by("mse", plain, INT8), INT8)

    def test_a_condensed_zero_is_zero(self) -> None:
        condensed = seen(random(60000).relu())
        assert float(condensed.weights[condensed.values == 0].sum()) > 0.49 * 60000

    def test_an_outlier_counts_with_its_share(self) -> None:
        """The range includes one outlier among few values, and excludes one among many."""
        values = torch.cat([random(2000), torch.tensor([40.0])])
        for total, kept in ((2000.0, True), (2e8, False)):
            weights = torch.cat([torch.full((2000,), total / 2000), torch.ones(1)])
            _, high = range_by("mse", distribution(values, weights), INT8)
            assert (high > 8) == kept

    @pytest.mark.parametrize("name", STREAMS)
    def test_the_rule_relative_is_mse_on_weighted_values(self, name: str) -> None:
        assert range_by("relative", seen(STREAMS[name]), INT8) == range_by("mse", seen(STREAMS[name]), INT8)

    def test_weights_of_values_change_the_range(self) -> None:
        values = torch.cat([random(2000), 30 * random(100, seed=1)])
        few = torch.cat([torch.ones(2000), torch.full((100,), 1e-4)])
        narrow = range_by("mse", distribution(values, 1e4 * few), INT8)
        wide = range_by("mse", seen(values), INT8)
        assert narrow[1] < 0.5 * wide[1]

    @pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100])
    def test_percentile_equals_the_sorted_values(self, percentile: float) -> None:
        values = random(4001)
        low, high = range_by("percentile", seen(values), INT8, percentile)
        every = values.sort().values
        above = math.ceil(percentile / 100 * len(every) - 1e-6) - 1
        below = max(math.ceil((100 - percentile) / 100 * len(every) - 1e-6) - 1, 0)
        assert (low, high) == (float(every[below]), float(every[above]))

    @pytest.mark.parametrize("name", ["normal", "after a relu", "an outlier", "heavy tails", "skewed"])
    def test_kl_is_as_good_as_brute_force(self, name: str) -> None:
        values = STREAMS[name]
        low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
        found = divergence(values, *range_by("kl", seen(values), INT8), INT8)
        candidates = (divergence(values, low * share, high * share, INT8) for share in np.geomspace(1 / 100, 1, 60))
        assert found <= 1.02 * min(candidates) + 1e-4

    @pytest.mark.parametrize("rule", ["mse", "kl", "minmax"])
    def test_zeros_after_a_relu_do_not_narrow_the_range(self, rule: str) -> None:
        values = random(60000).relu()
        signal, noise = values.square().mean(), error(values, *range_by(rule, seen(values), INT8), INT8)
        assert 10 * math.log10(signal / noise) > 40

    def test_rules_differ_on_values_with_outliers(self) -> None:
        values = STREAMS["heavy tails"]
        widths = [np.ptp(range_by(rule, seen(values), INT8, 97.0)) for rule in ranges.RULES]
        assert len({round(float(width), 3) for width in widths}) >= 3
        assert max(widths) == widths[ranges.RULES.index("minmax")]


def divergence(values: Tensor, low: float, high: float, codes: Codes) -> float:
    """Computes the divergence by loops over bins, after NVIDIA's description of TensorRT's calibration."""
    every = torch.cat([values, values.min()[None], values.max()[None]]).double()
    every = every / max(-min(low, float(every.min()), 0.0), float(every.max()))
    bound = max(-min(float(values.min()), 0.0), float(values.max()))
    low, high = low / bound, high / bound
    edges = np.linspace(float(every.min()), float(every.max()), ranges.BINS + 1)
    every = every[every != 0]  # zeros have their own code
    mass = np.histogram(every.numpy(), edges)[0] / len(every)
    scale = (high - low) / (codes.high - codes.low)
    zero = codes.low - round(low / scale)
    code = [round(float(centre / scale)) + zero for centre in (edges[1:] + edges[:-1]) / 2]
    inside = [index for index in range(len(code)) if codes.low <= code[index] <= codes.high]
    clipped = np.zeros_like(mass)
    clipped[inside] = mass[inside]
    clipped[inside[0]] += mass[: inside[0]].sum()
    clipped[inside[-1]] += mass[inside[-1] + 1 :].sum()
    spread = np.zeros_like(mass)
    for one in set(code):
        bins = [index for index in inside if code[index] == one and mass[index] > 0]
        if bins:
            spread[bins] = mass[bins].sum() / len(bins)
    spread = np.maximum(spread / spread.sum(), 1 / len(every))
    return float(sum(p * math.log(p / q) for p, q in zip(clipped, spread, strict=True) if p > 0))


class TestBoundsOfWeights:
    @pytest.mark.parametrize("bits", [8, 4, 3])
    @pytest.mark.parametrize("name", ["normal", "an outlier", "heavy tails", "negative", "skewed"])
    def test_rules_are_as_good_as_brute_force(self, name: str, bits: int) -> None:
        codes = Codes(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1, 0)
        bound = float(bounds_by_error(STREAMS[name][None], codes)[0])
        assert error(STREAMS[name], -bound, bound, codes) <= 1.05 * brute_force(STREAMS[name], codes)

    def test_each_channel_is_searched_on_its_own(self) -> None:
        rows = torch.stack([STREAMS[name] for name in STREAMS])
        codes = Codes(-127, 127, 0)
        alone = torch.cat([bounds_by_error(row[None], codes) for row in rows])
        torch.testing.assert_close(bounds_by_error(rows, codes), alone)

    def test_zeros_and_tiny_values_keep_their_extremes(self) -> None:
        rows = torch.tensor([[0.0, 0.0], [1e-40, -1e-41], [1e-9, 1e-10], [3e38, 1.0]])
        bounds = bounds_by_error(rows, Codes(-127, 127, 0))
        assert torch.equal(bounds[:3], rows.abs().amax(1)[:3])
        assert float(bounds[3]) == pytest.approx(3e38)


@pytest.mark.parametrize(("former", "rule"), [("error", "mse"), ("entropy", "kl"), ("extremes", "minmax")])
def test_former_names_of_rules_are_deprecated(former: str, rule: str) -> None:
    options: Any = {"dtype": torch.int8, "quant_min": -128, "quant_max": 127, "qscheme": torch.per_tensor_affine}
    with pytest.warns(DeprecationWarning, match=f"write range_by='{rule}'"):
        assert DistributionObserver(**options, range_by=former).range_by == rule
    with pytest.warns(DeprecationWarning, match=f"write range_by='{rule}'"):
        assert Recipe(range_by=former).range_by == rule


def test_the_search_of_a_large_weight_ends_when_clipping_alone_costs_more(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = 0
    rounding_errors = ranges._rounding_errors

    def counted(scaled: Tensor, shares: Tensor, codes: Codes) -> Tensor:
        nonlocal tried
        tried += len(shares)
        return rounding_errors(scaled, shares, codes)

    monkeypatch.setattr(ranges, "_rounding_errors", counted)
    values = random(1, 100_000)
    bound = float(bounds_by_error(values, Codes(-127, 127, 0))[0])
    assert tried <= len(ranges.SHARES) // 2
    assert error(values[0], -bound, bound, Codes(-127, 127, 0)) <= 1.05 * brute_force(values[0], Codes(-127, 127, 0))


@pytest.mark.parametrize("block", [64, 1 << 18])
def test_bounds_do_not_depend_on_the_size_of_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random(5, 300) * torch.arange(1, 6)[:, None]
    expected = bounds_by_error(rows, Codes(-127, 127, 0))
    monkeypatch.setattr(ranges, "BLOCK", block)
    torch.testing.assert_close(bounds_by_error(rows, Codes(-127, 127, 0)), expected)


CODES_OF_EARLY_ENDS = [INT8, SYMMETRIC, Codes(0, 255, 127), Codes(-7, 7, 0), Codes(0, 127, 0), Codes(-2, 1)]


@pytest.mark.parametrize("codes", CODES_OF_EARLY_ENDS, ids=str)
@pytest.mark.parametrize("name", STREAMS)
def test_the_search_that_ends_early_finds_the_range_of_the_whole_search(
    name: str, codes: Codes, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = STREAMS[name]
    found = range_by("mse", seen(values), codes)
    monkeypatch.setattr(ranges, "_clipping_error", lambda *_: lambda *_: -math.inf)
    assert found == range_by("mse", seen(values), codes)


def test_the_search_of_a_normal_distribution_ends_when_clipping_alone_costs_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = 0
    squared_error = ranges._squared_error

    def counted(*args: Any) -> ranges.Cost:
        cost = squared_error(*args)

        def count(lows: Tensor, highs: Tensor) -> Tensor:
            nonlocal tried
            tried += len(lows)
            return cost(lows, highs)

        return count

    monkeypatch.setattr(ranges, "_squared_error", counted)
    range_by("mse", seen(random(10000)), INT8)
    steps = 3  # both ends, the lower one, the upper one
    assert steps * len(ranges._fine_factors()) < tried < steps * len(ranges.SHARES)
