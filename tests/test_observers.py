"""Observers: what they keep of a stream, how that merges, the ranges by each rule against brute force, and errors."""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flow_support import seeded
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

from openneutron import NeutronQuantizer
from openneutron.errors import CalibrationError, OptionError
from openneutron.fx import is_quantize
from openneutron.ops.masks import HIDDEN
from openneutron.quantizer import observers, ranges
from openneutron.quantizer.observers import (
    DistributionObserver,
    MaskedObserver,
    PerChannelWeightObserver,
    RangeObserver,
    WeightObserver,
)
from openneutron.quantizer.ranges import Codes, Distribution, bounds_by_error, distribution, range_by
from openneutron.quantizer.sample import VALUES_OF_A_TENSOR, Sample, flattened, positions

INT8 = Codes(-128, 127)
SYMMETRIC = Codes(-128, 127, 0)
INT8_AFFINE: dict[str, Any] = {
    "dtype": torch.int8, "quant_min": -128, "quant_max": 127, "qscheme": torch.per_tensor_affine,
}  # fmt: skip


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def observed(*tensors: Tensor, **options: Any) -> DistributionObserver:
    observer = DistributionObserver(**{**INT8_AFFINE, **options})
    for tensor in tensors:
        assert observer(tensor) is tensor
    return observer


def seen(values: Tensor) -> Distribution:
    return distribution(values, torch.ones(len(values)), values.min(), values.max())


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, ...]]:
    """The arguments of each call of `name` of `owner`, from now on."""
    calls: list[tuple[Any, ...]] = []
    function = getattr(owner, name)

    def counting(*args: Any) -> Any:
        calls.append(args)
        return function(*args)

    monkeypatch.setattr(owner, name, counting)
    return calls


class TestPositions:
    @pytest.mark.parametrize("size", [1, 2, 3, 100, 1023, 1024])
    def test_a_small_tensor_is_taken_whole(self, size: int) -> None:
        assert sorted(positions(size).tolist()) == list(range(size))

    @pytest.mark.parametrize("size", [1024, 1025, 4096, 150528, 1204224])
    def test_any_prefix_is_evenly_spread(self, size: int) -> None:
        taken = positions(size)
        assert len(taken) == VALUES_OF_A_TENSOR
        for count in (16, 33, 128, 1000):
            gaps = np.diff(np.sort(taken[:count].numpy()), prepend=0, append=size)
            assert gaps.max() <= 3 * size / count + 1

    @pytest.mark.parametrize("channels", [2, 3, 8, 24, 64, 96])
    def test_no_stride_is_met(self, channels: int) -> None:
        """In channels-last, the channel is the position modulo the number of channels."""
        shares = torch.bincount(positions(channels * 112 * 112) % channels, minlength=channels) / VALUES_OF_A_TENSOR
        assert shares.max() < 2.5 / channels
        assert shares.min() > 0

    def test_what_is_dense_is_not_copied(self) -> None:
        image = random(2, 3, 4, 5)
        for tensor in (image, image.to(memory_format=torch.channels_last), random(6, 5).t(), torch.tensor(2.0)):
            assert flattened(tensor).data_ptr() == tensor.data_ptr()
            assert sorted(flattened(tensor).tolist()) == sorted(tensor.flatten().tolist())
        assert flattened(random(8, 8)[:, ::2]).shape == (32,)


class TestSample:
    @settings(deadline=None, max_examples=60)
    @given(
        sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=30),
        cuts=st.lists(st.integers(0, 30), max_size=3),
        capacity=st.integers(1, 5000),
    )
    def test_parts_add_up_to_the_whole(self, sizes: list[int], cuts: list[int], capacity: int) -> None:
        stream = [random(size, seed=index) for index, size in enumerate(sizes)]
        whole = Sample(capacity)
        for tensor in stream:
            whole.add(tensor)
        places = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
        merged = Sample(capacity)
        for start, stop in itertools.pairwise(places):
            part = Sample(capacity)
            for tensor in stream[start:stop]:
                part.add(tensor)
            merged.merge(part.state())
        one, other = whole.state(), merged.state()
        assert torch.equal(one.values, other.values)
        assert torch.equal(one.sizes, other.sizes)
        assert (one.level, whole.calls) == (other.level, merged.calls)
        assert len(one.values) <= max(capacity, len(sizes))
        assert len(one.weights) == len(one.values)
        assert float(one.weights.sum()) == pytest.approx(sum(sizes), rel=1e-4)

    def test_it_goes_on_after_a_merge(self) -> None:
        stream = [random(700, seed=index) for index in range(9)]
        whole, first, second = Sample(1500), Sample(1500), Sample(1500)
        for tensor in stream:
            whole.add(tensor)
        for tensor in stream[:4]:
            first.add(tensor)
        for tensor in stream[4:6]:
            second.add(tensor)
        first.merge(second.state())
        for tensor in stream[6:]:
            first.add(tensor)
        assert torch.equal(whole.state().values, first.state().values)

    def test_the_level_is_the_lowest_that_fits(self) -> None:
        sample = Sample(2048)
        levels = []
        for index in range(5):
            sample.add(random(5000, seed=index))
            levels.append(sample.state().level)
        assert levels == [0, 0, 1, 1, 2]

    def test_a_share_of_each_tensor_is_kept(self) -> None:
        sample = Sample(1024)
        for index in range(4):
            sample.add(torch.full((4000,), float(index)))
        assert torch.bincount(sample.state().values.long()).tolist() == [256] * 4


# --------------------------------------------------------------------------------------------------------------- ranges


def quantized(values: Tensor, low: float, high: float, codes: Codes) -> Tensor:
    """`values` as a range leaves them, in double precision."""
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
    """The least error over a dense grid of ranges."""
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
    "behind a relu": random(3000).relu(),
    "behind a relu6": (random(3000) * 4).clamp(0, 6),
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
    def test_error_is_as_good_as_brute_force(self, name: str, codes: Codes) -> None:
        values = STREAMS[name]
        found = error(values, *range_by("error", seen(values), codes), codes)
        extremes = error(values, *range_by("extremes", seen(values), codes), codes)
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
            assert float(condensed.weights.sum()) == len(values) + 2
            found = error(values, *range_by("error", condensed, INT8), INT8)
            plain = Distribution(values.sort().values, torch.ones(len(values)))
            assert found <= 1.04 * error(values, *range_by("error", plain, INT8), INT8)

    def test_a_condensed_zero_is_zero(self) -> None:
        condensed = seen(random(60000).relu())
        assert float(condensed.weights[condensed.values == 0].sum()) > 0.49 * 60000

    def test_extremes_count_with_their_share(self) -> None:
        """The sample has missed an outlier: one among few values is worth its codes, one among many is not."""
        values, outlier = random(2000), torch.tensor(40.0)
        for total, kept in ((2000.0, True), (2e8, False)):
            weights = torch.full((2000,), total / 2000)
            _, high = range_by("error", distribution(values, weights, values.min(), outlier), INT8)
            assert (high > 8) == kept

    def test_weights_count(self) -> None:
        values = torch.cat([random(2000), 30 * random(100, seed=1)])
        few = torch.cat([torch.ones(2000), torch.full((100,), 1e-4)])
        narrow = range_by("error", distribution(values, 1e4 * few, values[:2000].min(), values[:2000].max()), INT8)
        wide = range_by("error", seen(values), INT8)
        assert narrow[1] < 0.5 * wide[1]

    @pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100])
    def test_percentile_is_that_of_the_sorted_values(self, percentile: float) -> None:
        values = random(4000)
        low, high = range_by("percentile", seen(values), INT8, percentile)
        every = torch.cat([values, values.min()[None], values.max()[None]]).sort().values
        above = math.ceil(percentile / 100 * len(every) - 1e-6) - 1
        below = max(math.ceil((100 - percentile) / 100 * len(every) - 1e-6) - 1, 0)
        assert (low, high) == (float(every[below]), float(every[above]))

    @pytest.mark.parametrize("name", ["normal", "behind a relu", "an outlier", "heavy tails", "skewed"])
    def test_entropy_is_as_good_as_brute_force(self, name: str) -> None:
        values = STREAMS[name]
        low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
        found = divergence(values, *range_by("entropy", seen(values), INT8), INT8)
        candidates = (divergence(values, low * share, high * share, INT8) for share in np.geomspace(1 / 100, 1, 60))
        assert found <= 1.02 * min(candidates) + 1e-4

    def test_rules_differ_where_there_are_outliers(self) -> None:
        values = STREAMS["heavy tails"]
        widths = [np.ptp(range_by(rule, seen(values), INT8, 97.0)) for rule in ranges.RULES]
        assert len({round(float(width), 3) for width in widths}) >= 3
        assert max(widths) == widths[ranges.RULES.index("extremes")]


def divergence(values: Tensor, low: float, high: float, codes: Codes) -> float:
    """The same by loops over bins, after NVIDIA's description of TensorRT's calibration."""
    every = torch.cat([values, values.min()[None], values.max()[None]]).double()
    every = every / max(-min(low, float(every.min()), 0.0), float(every.max()))
    bound = max(-min(float(values.min()), 0.0), float(values.max()))
    low, high = low / bound, high / bound
    edges = np.linspace(float(every.min()), float(every.max()), ranges.BINS + 1)
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
    def test_they_are_as_good_as_brute_force(self, name: str, bits: int) -> None:
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


# ------------------------------------------------------------------------------------------------------------ observers


class TestDistributionObserver:
    def test_extremes_are_exact(self) -> None:
        tensors = [random(1, 7, 50, 50, seed=seed) for seed in range(5)]
        tensors[2][0, 3, 17, 5] = 99.0
        tensors[4][0, 0, 0, 1] = -77.0
        observer = observed(*tensors, range_by="extremes")
        assert (float(observer.min_val), float(observer.max_val)) == (-77.0, 99.0)
        plain = RangeObserver(**INT8_AFFINE)
        for tensor in tensors:
            plain(tensor)
        assert [value.item() for value in observer.calculate_qparams()] == [
            value.item() for value in plain.calculate_qparams()
        ]

    @pytest.mark.parametrize("rule", ranges.RULES)
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_parts_merge_into_the_whole(self, rule: str, layout: torch.memory_format) -> None:
        tensors = [random(2, 8, 40, 40, seed=seed).to(memory_format=layout) for seed in range(80)]
        whole = observed(*tensors, range_by=rule)
        first = observed(*tensors[:7], range_by=rule)
        first.merge(observed(*tensors[7:50], range_by=rule).state())
        first.merge(observed(*tensors[50:], range_by=rule).state())
        merged = first.state()
        assert all(torch.equal(value, merged[name]) for name, value in whole.state().items())
        assert whole.calculate_qparams() == first.calculate_qparams()

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, "state_dict"], ids=["copied", "state_dict"])
    def test_a_copy_knows_what_it_knew(self, duplicate: Callable[..., Any] | str) -> None:
        observer = observed(outliers(random(2000), 1, 50.0), range_by="percentile", percentile=99.0)
        if callable(duplicate):
            other = duplicate(observer)
        else:
            file = io.BytesIO()
            torch.save(observer.state_dict(), file)
            file.seek(0)
            other = observed(random(3), range_by="percentile", percentile=99.0)
            other.load_state_dict(torch.load(file, weights_only=True))
        assert other.calculate_qparams() == observer.calculate_qparams()
        other(1000 * random(5000))
        assert other.calculate_qparams() != observer.calculate_qparams()

    def test_qparams_are_searched_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = counted(monkeypatch, observers, "range_by")
        observer = observed(random(100))
        first = observer.calculate_qparams()
        assert observer.calculate_qparams() == first
        assert len(calls) == 1
        observer(5 * random(100, seed=1))
        assert observer.calculate_qparams() != first
        assert len(calls) == 2

    def test_what_a_search_costs_does_not_depend_on_the_values(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """torchao's histogram observer takes up to 1e5 steps of a Python loop where an end bin holds mass."""
        calls = counted(monkeypatch, Codes, "qparams")
        counts = []
        for values in (random(9000), random(9000).clamp(0, 0.1), (random(9000) > 0).float(), 1e6 * random(9000).relu()):
            calls.clear()
            observed(values).calculate_qparams()
            counts.append((len(calls), sum(len(lows) for _, lows, _ in calls)))
        assert max(steps for steps, _ in counts) <= 6
        assert max(candidates for _, candidates in counts) <= 300

    def test_a_constant(self) -> None:
        for number in (3.0, -0.25, 1e-3, 1e30):
            scale, zero_point = observed(torch.full((5000,), number)).calculate_qparams()
            code = (torch.tensor(number) / scale).round().add(zero_point).clamp(-128, 127)
            assert float((code - zero_point) * scale) == pytest.approx(number, rel=1e-6)

    def test_nothing_but_zeros_or_denormals(self) -> None:
        for values in (torch.zeros(10), torch.full((10,), 1e-42), torch.tensor([1e-42, -1e-43])):
            scale, zero_point = observed(values).calculate_qparams()
            plain = RangeObserver(**INT8_AFFINE)
            plain(values)
            assert (scale, zero_point) == plain.calculate_qparams()
            assert float(scale) > 0

    @pytest.mark.parametrize("sign", [1, -1])
    def test_one_sided_values_use_all_codes(self, sign: int) -> None:
        _, zero_point = observed(sign * random(5000).abs()).calculate_qparams()
        assert int(zero_point) == (-128 if sign > 0 else 127)

    def test_symmetric_schemes_keep_their_zero_point(self) -> None:
        for dtype, low, high, expected in ((torch.int8, -128, 127, 0), (torch.uint8, 0, 255, 127)):
            observer = observed(
                random(5000).exp(), dtype=dtype, quant_min=low, quant_max=high, qscheme=torch.per_tensor_symmetric
            )
            assert int(observer.calculate_qparams()[1]) == expected

    def test_halves_are_observed_as_floats(self) -> None:
        values = random(5000)
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            found = observed(values.to(dtype)).calculate_qparams()[0]
            assert float(found) == pytest.approx(float(observed(values).calculate_qparams()[0]), rel=0.05)

    def test_nothing_seen_is_an_error(self) -> None:
        for observer in (observed(), observed(torch.empty(0, 3))):
            with pytest.raises(CalibrationError, match="never reached"):
                observer.calculate_qparams()

    @pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_is_an_error(self, number: float) -> None:
        values = random(5000)
        values[4321] = number
        with pytest.raises(CalibrationError, match="NaN or infinite"):
            observed(values).calculate_qparams()
        merged = observed(random(10))
        merged.merge(observed(values).state())
        with pytest.raises(CalibrationError, match="NaN or infinite"):
            merged.calculate_qparams()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"range_by": "mse"}, "range_by is one of error, percentile, entropy, extremes, not 'mse'"),
            ({"percentile": 0.9999}, "percentile is above 50"),
            ({"percentile": "high"}, "percentile is above 50"),
        ],
    )
    def test_nonsense_is_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            observed(**options)
        with pytest.raises(OptionError, match=message):
            NeutronQuantizer(observer=DistributionObserver.with_args(**options))

    def test_it_works_behind_a_mask(self) -> None:
        masked = MaskedObserver(DistributionObserver, **INT8_AFFINE)
        values = random(2, 3000)
        masked(values)
        without = masked.calculate_qparams()
        assert without == observed(values.flatten()).calculate_qparams()
        masked(values.masked_fill(values > 2, HIDDEN))
        scale, zero_point = masked.calculate_qparams()
        assert float(scale) > float(without[0])
        assert float((-128 - zero_point) * scale) < -8


class TestWeightObservers:
    def test_it_looks_at_a_parameter_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = counted(monkeypatch, observers, "bounds_by_error")
        observer = WeightObserver(dtype=torch.int8, quant_min=-127, quant_max=127, qscheme=torch.per_tensor_symmetric)
        weight = nn.Parameter(random(8, 9))
        for _ in range(3):
            assert observer(weight) is weight
        first = observer.calculate_qparams()
        observer(weight)
        assert observer.calculate_qparams() is first
        assert len(calls) == 1
        with torch.no_grad():
            weight.mul_(2)
        observer(weight)
        assert float(observer.calculate_qparams()[0]) == pytest.approx(2 * float(first[0]))
        assert len(calls) == 2
        assert not list(observer.parameters())

    @pytest.mark.parametrize("axis", [0, 1])
    def test_per_channel(self, axis: int) -> None:
        weight = random(4, 6, 3, 3)
        weight[2] *= 50
        observer = PerChannelWeightObserver(
            dtype=torch.int8, quant_min=-127, quant_max=127, qscheme=torch.per_channel_symmetric, ch_axis=axis
        )
        observer(weight)
        scales, zero_points = observer.calculate_qparams()
        assert not zero_points.any()
        expected = bounds_by_error(weight.movedim(axis, 0).flatten(1), Codes(-127, 127, 0)) / 127
        torch.testing.assert_close(scales, expected)

    def test_errors(self) -> None:
        for kind, scheme in (
            (WeightObserver, torch.per_tensor_symmetric), (PerChannelWeightObserver, torch.per_channel_symmetric),
        ):  # fmt: skip
            observer = kind(dtype=torch.int8, quant_min=-127, quant_max=127, qscheme=scheme)
            with pytest.raises(CalibrationError, match="never reached"):
                observer.calculate_qparams()
            observer(torch.tensor([[1.0, math.nan]]))
            with pytest.raises(CalibrationError, match="NaN or infinite"):
                observer.calculate_qparams()

    def test_under_inference_mode(self) -> None:
        observer = WeightObserver(dtype=torch.int8, quant_min=-127, quant_max=127, qscheme=torch.per_tensor_symmetric)
        with torch.inference_mode():
            observer(random(5))
            observer(random(5))
        assert float(observer.calculate_qparams()[0]) > 0


class Uint8Everywhere(Quantizer):  # type: ignore[misc]
    """A quantizer of another's: uint8 activations behind each linear, by our observer."""

    def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        spec = QuantizationSpec(
            dtype=torch.uint8,
            quant_min=0,
            quant_max=255,
            qscheme=torch.per_tensor_affine,
            observer_or_fake_quant_ctr=DistributionObserver.with_args(range_by="percentile", percentile=99.0),
        )
        for node in model.graph.nodes:
            if node.target is torch.ops.aten.linear.default:
                node.meta["quantization_annotation"] = QuantizationAnnotation({}, spec, _annotated=True)
        return model

    def validate(self, model: torch.fx.GraphModule) -> None:
        pass


def test_any_quantizer_of_torchao_can_use_it() -> None:
    model = seeded(lambda: nn.Linear(16, 16)).eval()
    inputs = (random(64, 16),)
    prepared = prepare_pt2e(torch.export.export(model, inputs).module(), Uint8Everywhere())
    prepared(*inputs)
    converted = convert_pt2e(prepared)
    (quantize,) = (node for node in converted.graph.nodes if is_quantize(node))
    expected = observed(
        model(*inputs), range_by="percentile", percentile=99.0, dtype=torch.uint8, quant_min=0, quant_max=255
    )
    assert quantize.args[1] == pytest.approx(float(expected.calculate_qparams()[0]))
