"""Observers: the statistics that they keep of a stream, the merging of statistics, and errors."""

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
from openneutron.core.fx import is_quantize
from openneutron.errors import CalibrationError, OptionError
from openneutron.ops.masks import HIDDEN
from openneutron.quantizer import observers, ranges
from openneutron.quantizer.observers import (
    DistributionObserver,
    PerChannelWeightObserver,
    RangeObserver,
    WeightObserver,
)
from openneutron.quantizer.ranges import Codes, bounds_by_error
from openneutron.quantizer.sample import (
    SMALLEST_PEAK,
    VALUES_OF_A_TENSOR,
    SampleState,
    StreamSample,
    count_of_tensors,
    flattened,
    positions,
)
from openneutron.quantizer.wrapping_observers import MaskedObserver

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


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, ...]]:
    """Records the arguments of each later call of `name` of `owner`."""
    calls: list[tuple[Any, ...]] = []
    function = getattr(owner, name)

    def counting(*args: Any) -> Any:
        calls.append(args)
        return function(*args)

    monkeypatch.setattr(owner, name, counting)
    return calls


def int8_error(values: Tensor, scale: Tensor, zero_point: Tensor) -> float:
    """Returns the mean squared error of quantized values."""
    codes = torch.fake_quantize_per_tensor_affine(values, float(scale), int(zero_point), -128, 127)
    return float((codes - values).square().mean())


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
    def test_samples_do_not_follow_strides(self, channels: int) -> None:
        """In channels-last format, the channel is the position modulo the number of channels. Samples must not follow
        this stride.
        """
        shares = torch.bincount(positions(channels * 112 * 112) % channels, minlength=channels) / VALUES_OF_A_TENSOR
        assert shares.max() < 2.5 / channels
        assert shares.min() > 0

    def test_dense_values_are_not_copied(self) -> None:
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
        whole = StreamSample(capacity)
        for tensor in stream:
            whole.add(tensor)
        places = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
        merged = StreamSample(capacity)
        for start, stop in itertools.pairwise(places):
            part = StreamSample(capacity)
            for tensor in stream[start:stop]:
                part.add(tensor)
            merged.merge(part.state())
        one, other = whole.state(), merged.state()
        assert torch.equal(one.values, other.values)
        assert torch.equal(one.sizes, other.sizes)
        assert torch.equal(one.extremes, other.extremes)
        assert one.extremes.tolist() == [[float(tensor.min()), float(tensor.max())] for tensor in stream]
        assert (one.level, whole.tensors) == (other.level, merged.tensors)
        assert len(one.values) <= max(capacity, len(sizes))
        values, weights = one.weighted()
        assert (float(values.min()), float(values.max())) == (
            float(torch.cat(stream).min()),
            float(torch.cat(stream).max()),
        )
        assert len(values) == len(weights)
        counted_beside = 2 * int((one.counts < one.sizes).sum())
        assert float(weights.sum()) == pytest.approx(sum(sizes) + counted_beside, rel=1e-4)

    def test_sampling_continues_after_a_merge(self) -> None:
        stream = [random(700, seed=index) for index in range(9)]
        whole, first, second = StreamSample(1500), StreamSample(1500), StreamSample(1500)
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
        sample = StreamSample(2048)
        levels = []
        for index in range(5):
            sample.add(random(5000, seed=index))
            levels.append(sample.state().level)
        assert levels == [0, 0, 1, 1, 2]

    def test_a_share_of_each_tensor_is_kept(self) -> None:
        sample = StreamSample(1024)
        for index in range(4):
            sample.add(torch.full((4000,), float(index)))
        assert torch.bincount(sample.state().values.long()).tolist() == [256] * 4

    def test_each_value_of_a_whole_tensor_counts_once(self) -> None:
        sample = StreamSample()
        sample.add(random(1000))
        values, weights = sample.state().weighted()
        assert torch.equal(values.sort().values, random(1000).sort().values)
        assert torch.equal(weights, torch.ones(1000))

    def test_weights_make_errors_relative_to_the_peak_of_a_tensor(self) -> None:
        sample = StreamSample()
        for factor in (1.0, -4.0, 0.5):
            sample.add(factor * torch.linspace(0, 1, 3000))
        state = sample.state()
        factors = state.inverse_squared_peaks()
        assert (factors / factors[0]).tolist() == [1, 1 / 16, 4]
        values, weights = state.weighted(relative=True)
        weight_of_each = weights[:-6].view(3, VALUES_OF_A_TENSOR).sum(1)
        assert (weight_of_each / weight_of_each[0]).tolist() == pytest.approx([1, 1 / 16, 4])
        assert torch.equal(values[-6:], state.extremes.flatten())
        assert torch.equal(weights[-6:], factors.repeat_interleave(2))

    def test_tensors_near_zero_have_a_limited_weight(self) -> None:
        sample = StreamSample()
        for factor in (1.0, 0.0, 1e-6, 1e-30):
            sample.add(torch.full((8,), factor))
        factors = sample.state().inverse_squared_peaks()
        assert factors.tolist() == pytest.approx([1, *[4 / SMALLEST_PEAK] * 3])

    @pytest.mark.parametrize("value", [0.0, 1e-38, 1e38])
    def test_weights_of_tensors_are_finite(self, value: float) -> None:
        sample = StreamSample()
        sample.add(torch.full((8,), value))
        assert sample.state().inverse_squared_peaks().tolist() == [1]

    def test_rows_are_tensors_of_their_own(self) -> None:
        rows = random(6, 5000)
        one, other = StreamSample(3000), StreamSample(3000)
        one.add(rows)
        for row in rows:
            other.add(row)
        assert one.extremes == other.extremes == (rows.min(), rows.max())
        assert one.tensors == other.tensors == 6
        assert all(
            torch.equal(getattr(one.state(), name), getattr(other.state(), name)) for name in ("values", "extremes")
        )

    @pytest.mark.parametrize(
        ("shape", "rows"),
        [((), 1), ((64,), 1), ((1, 64), 1), ((7, 64), 7), ((32, 4), 32), ((50, 4), 25), ((512, 4), 32), ((37, 4), 1)],
    )
    def test_a_batch_counts_as_several_tensors(self, shape: tuple[int, ...], rows: int) -> None:
        assert count_of_tensors(shape) == rows

    def test_in_channels_last_a_row_is_an_image(self) -> None:
        images = random(4, 3, 5, 5)
        sample = StreamSample()
        sample.add(images.to(memory_format=torch.channels_last))
        assert torch.equal(sample.state().values.view(4, -1).sort(1).values, images.flatten(1).sort(1).values)


class TestDistributionObserver:
    def test_one_large_tensor_does_not_dominate_the_range(self) -> None:
        """The sum of errors would favor the large tensor over finer steps for all others. Errors relative to a tensor's
        size do not.
        """
        tensors = [random(4096, seed=seed).clamp(-1, 1) for seed in range(63)] + [random(4096) * 4]
        scale, _ = observed(*tensors, range_by="relative").calculate_qparams()
        seen = torch.cat(tensors)
        summed = ranges.distribution(seen, torch.ones_like(seen))
        low, high = ranges.range_by("mse", summed, ranges.Codes(-128, 127))
        assert float(scale) < 0.75 * (high - low) / 255

    @pytest.mark.parametrize("rule", ["mse", "percentile", "kl"])
    def test_other_rules_count_all_values_alike(self, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = counted(monkeypatch, SampleState, "inverse_squared_peaks")
        observed(random(100), random(100) * 9, range_by=rule).calculate_qparams()
        assert not calls

    def test_extremes_are_exact(self) -> None:
        tensors = [random(1, 7, 50, 50, seed=seed) for seed in range(5)]
        tensors[2][0, 3, 17, 5] = 99.0
        tensors[4][0, 0, 0, 1] = -77.0
        observer = observed(*tensors, range_by="minmax")
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
    def test_a_copy_has_the_same_state(self, duplicate: Callable[..., Any] | str) -> None:
        observer = observed(torch.cat([random(1999), torch.tensor([50.0])]), range_by="percentile", percentile=99.0)
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

    def test_the_cost_of_a_search_does_not_depend_on_the_values(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """torchao's histogram observer takes up to 1e5 steps of a Python loop if an end bin has many values."""
        calls = counted(monkeypatch, Codes, "qparams")
        counts = []
        for values in (random(9000), random(9000).clamp(0, 0.1), (random(9000) > 0).float(), 1e6 * random(9000).relu()):
            calls.clear()
            observed(values).calculate_qparams()
            counts.append((len(calls), sum(len(lows) for _, lows, _ in calls)))
        assert max(steps for steps, _ in counts) <= 6
        assert max(candidates for _, candidates in counts) <= 300

    @pytest.mark.parametrize("together", [1, 10])
    def test_rare_values_count_with_their_frequency(self, together: int) -> None:
        """40 of 2,000,000 values are large; about one of them is among the 40,960 values of the sample."""
        values = random(together * (40 // together), 50000) * 0.5
        values[:, 777] = torch.linspace(6, 12, len(values))
        observer = observed(*values.view(-1, together, 50000))
        found = int8_error(values, *observer.calculate_qparams())
        errors = []
        for high in torch.linspace(2, 12, 101):
            plain = RangeObserver(**INT8_AFFINE)
            plain(torch.stack([values.min(), high]))
            errors.append(int8_error(values, *plain.calculate_qparams()))
        assert found <= 1.02 * min(errors)
        assert errors[0] > 1.3 * min(errors) < errors[-1]

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
    def test_values_that_are_not_finite_are_errors(self, number: float) -> None:
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
            ({"range_by": "max"}, "range_by is one of mse, relative, percentile, kl, minmax, not 'max'"),
            ({"percentile": 0.9999}, "percentile is above 50"),
            ({"percentile": "high"}, "percentile is above 50"),
        ],
    )
    def test_invalid_options_are_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            observed(**options)
        with pytest.raises(OptionError, match=message):
            NeutronQuantizer(observer=DistributionObserver.with_args(**options))

    def test_a_scheme_per_channel_is_refused(self) -> None:
        with pytest.raises(OptionError, match=r"one range for a tensor, which .*per_channel_affine cannot use"):
            observed(qscheme=torch.per_channel_affine)

    def test_masked_observers_widen_for_masked_scores(self) -> None:
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
    def test_the_weight_observer_reads_a_parameter_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
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
    """A quantizer of another project: uint8 activations after each linear, with OpenNeutron's observer."""

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


def test_any_quantizer_of_torchao_can_use_the_observer() -> None:
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
