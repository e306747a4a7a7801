"""Bias correction at conversion: it removes mean shifts, changes nothing else, and skips layers it cannot correct."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flow_support import seeded
from tests.models import Model
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.observer import HistogramObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

from openneutron import NeutronQuantizer, quantize
from openneutron.core.constants import constant_of
from openneutron.core.fx import arguments, op_name
from openneutron.errors import CalibrationError, InputError, OptionError
from openneutron.quantizer.bias_correction import ChannelMeans, _fake_quantized_weight
from openneutron.recovery.weighted_layers import WeightedLayer, layers_of

IMAGE = (1, 8, 6, 6)
COARSE = {"equalize": False, "weight_bits": 3}


def images(count: int = 8, shape: tuple[int, ...] = IMAGE, channels: int = 1) -> list[Tensor]:
    """Returns samples with a different mean, between -2 and 2, for each index of dimension `channels`."""
    generator = torch.Generator().manual_seed(1)
    means = torch.linspace(-2, 2, shape[channels]).reshape(-1, *[1] * (len(shape) - channels - 1))
    return [torch.randn(shape, generator=generator) * 0.5 + means for _ in range(count)]


def prepared(model: nn.Module, samples: list[Tensor], **options: Any) -> GraphModule:
    module: GraphModule = prepare_pt2e(torch.export.export(model, (samples[0],)).module(), NeutronQuantizer(**options))
    with torch.no_grad():
        for sample in samples:
            module(sample)
    return module


def converted(model: nn.Module, samples: list[Tensor], **options: Any) -> GraphModule:
    found: GraphModule = convert_pt2e(prepared(model, samples, **options))
    return found


def shift(layer: WeightedLayer, model: Any, samples: list[Tensor]) -> Tensor:
    """Returns [outputs]: the mean output of `layer` on float `samples`, minus that of `model`."""
    with torch.no_grad():
        errors = [
            layer.by_output(layer.run(x, layer.real_weight, layer.real_bias) - model(x)).reshape(-1, len(model.bias))
            for x in samples
        ]
    return torch.cat(errors).mean(0)


def half_a_code(layer: WeightedLayer) -> float:
    """Returns the largest shift that the rounding of a bias may cause."""
    assert layer.real_bias is not None
    args = arguments(layer.bias)  # type: ignore[arg-type]
    scale = args["scale"] if "scale" in args else constant_of(layer.module, args["scales"])
    return 0.51 * float(torch.as_tensor(scale).max())


def kinds(module: nn.Module) -> list[type]:
    return [type(child) for child in module.modules()]


# --------------------------------------------------------------------------------------------------- corrected layers

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, float]] = {
    "pointwise": (lambda: nn.Conv2d(8, 6, 1), IMAGE, 1, 0.01),
    "padded": (lambda: nn.Conv2d(8, 6, 3, padding=1), (1, 8, 12, 12), 1, 0.1),
    "padding same": (lambda: nn.Conv2d(8, 6, (2, 3), padding="same"), (1, 8, 12, 12), 1, 0.1),
    "strided": (lambda: nn.Conv2d(8, 6, 3, stride=2, dilation=2), (1, 8, 12, 12), 1, 0.2),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), (1, 8, 12, 12), 1, 0.1),
    "grouped": (lambda: nn.Conv2d(8, 4, 1, groups=2), IMAGE, 1, 0.01),
    "a batch": (lambda: nn.Conv2d(8, 6, 1), (3, 8, 5, 5), 1, 0.01),
    "one dimension": (lambda: nn.Conv1d(8, 6, 1), (1, 8, 9), 1, 0.01),
    "transposed": (lambda: nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2), IMAGE, 1, 0.1),
    "linear": (lambda: nn.Linear(8, 5), (1, 8), 1, 0.01),
    "linear of rows": (lambda: nn.Linear(8, 5), (2, 3, 8), 2, 0.01),
}


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_mean_of_each_output_equals_float(name: str, granularity: str) -> None:
    build, shape, channels, left = LAYERS[name]
    model, samples = seeded(build), images(8, shape, channels)
    options = {**COARSE, "weight_granularity": granularity}
    (plain,) = layers_of(converted(model, samples, correct_bias=False, **options))
    (layer,) = layers_of(converted(model, samples, **options))
    assert torch.equal(layer.codes, plain.codes)
    before, after = shift(plain, model, samples), shift(layer, model, samples)
    assert before.abs().max() > 0.02
    assert after.abs().max() < left * before.norm() + half_a_code(layer)


def test_a_corrected_bias_equals_a_computation_by_hand() -> None:
    model: Any = seeded(lambda: nn.Conv2d(8, 6, 3, padding=1))
    samples = images()
    (layer,) = layers_of(converted(model, samples, **COARSE))
    error = layer.real_weight - model.weight
    mean = torch.cat(samples).mean((0, 2, 3))
    everywhere = mean.reshape(1, -1, 1, 1).expand(IMAGE)
    expected = model.bias - F.conv2d(everywhere, error, padding=1).mean((0, 2, 3))
    assert layer.real_bias is not None
    torch.testing.assert_close(layer.real_bias, expected, rtol=0, atol=half_a_code(layer))


def network() -> Any:
    def function(m: Any, x: Tensor) -> Any:
        first = F.relu(m.a(x))
        both = m.b(first) + m.c(first)
        wide = torch.cat([both, first], 1)
        return m.l(F.relu6(m.d(F.max_pool2d(wide, 2))).mean((2, 3))), x * 2.0, m.e(x)

    def build() -> nn.Module:
        layers = {
            "a": nn.Conv2d(8, 8, 3, padding=1), "b": nn.Conv2d(8, 8, 1), "c": nn.Conv2d(8, 8, 3, padding=1, groups=8),
            "d": nn.Conv2d(16, 8, 3), "e": nn.Conv2d(8, 4, 1, bias=False), "l": nn.Linear(8, 3),
        }  # fmt: skip
        return Model(function, **{name: nn.Sequential(layer) for name, layer in layers.items()})

    return seeded(build)


def means(module: Any, samples: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([module(x)[0] for x in samples]).mean(0)


def test_recovery_improves_the_sqnr_and_keeps_the_operators() -> None:
    model, samples = network(), images(32)
    plain, corrected = (converted(model, samples, correct_bias=wanted, **COARSE) for wanted in (False, True))
    nodes = [
        [(node.name, op_name(node), node.all_input_nodes) for node in module.graph.nodes if node.op != "call_module"]
        for module in (plain, corrected)
    ]
    assert str(nodes[0]) == str(nodes[1])
    scales = [
        [node.args[1:3] for node in module.graph.nodes if "quantize_per_tensor" in op_name(node)]
        for module in (plain, corrected)
    ]
    assert scales[0] == scales[1]
    wanted = means(model, samples)
    assert (means(corrected, samples) - wanted).norm() < 0.7 * (means(plain, samples) - wanted).norm()


def test_bias_correction_with_another_observer() -> None:
    model, samples = seeded(lambda: nn.Conv2d(8, 6, 1)), images()
    (layer,) = layers_of(converted(model, samples, observer=HistogramObserver, **COARSE))
    assert shift(layer, model, samples).abs().max() < 0.005


def test_a_copied_prepared_module_uses_its_own_statistics() -> None:
    model, samples = seeded(lambda: nn.Conv2d(8, 6, 1)), images()
    module = prepared(model, [-x for x in samples], **COARSE)
    copied = copy.deepcopy(prepared(model, samples[:4], **COARSE))
    for sample in samples[4:]:
        copied(sample)
    (expected,), (found,) = (layers_of(one) for one in (converted(model, samples, **COARSE), convert_pt2e(copied)))
    (other,) = layers_of(convert_pt2e(module))
    assert expected.real_bias is not None
    assert found.real_bias is not None
    assert other.real_bias is not None
    assert torch.equal(found.real_bias, expected.real_bias)
    assert not torch.equal(other.real_bias, expected.real_bias)


def test_layers_that_read_one_bias_are_corrected_by_their_mean_shift() -> None:
    """The inputs of the first two have one scale, so they keep one bias. The third has a bias of its own."""

    def function(m: Any, x: Tensor) -> Any:
        return m.c(x), m.c(x.roll(2, 1)), m.c(x * 4)

    model: Any = seeded(lambda: Model(function, c=nn.Conv2d(8, 6, 1)))
    samples = images()
    layers = list(layers_of(converted(model, samples, **COARSE)))
    plain = list(layers_of(converted(model, samples, correct_bias=False, **COARSE)))
    biases = [layer.real_bias for layer in layers]
    assert torch.equal(biases[0], biases[1])  # type: ignore[arg-type]
    assert not torch.equal(biases[0], biases[2])  # type: ignore[arg-type]
    inputs = samples, [x.roll(2, 1) for x in samples], [x * 4 for x in samples]
    found, before = (
        [shift(layer, model.c, values) for layer, values in zip(group, inputs, strict=True)]
        for group in (layers, plain)
    )
    for after, without in ((found[:2], before[:2]), (found[2:], before[2:])):
        mean, mean_without = torch.stack(after).mean(0), torch.stack(without).mean(0)
        assert mean_without.abs().max() > 2 * half_a_code(layers[2])
        assert mean.abs().max() < half_a_code(layers[2])


# ----------------------------------------------------------------------------------------------------- skipped layers


def test_without_correction_biases_are_only_rounded() -> None:
    model: Any = seeded(lambda: nn.Conv2d(8, 6, 1))
    samples = images()
    module = prepared(model, samples, correct_bias=False, **COARSE)
    assert ChannelMeans not in kinds(module)
    (layer,) = layers_of(convert_pt2e(module))
    assert layer.real_bias is not None
    torch.testing.assert_close(layer.real_bias, model.bias.detach(), rtol=0, atol=half_a_code(layer))


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (nn.Conv2d(8, 6, 1, bias=False), {}),
        (nn.Linear(6, 3, bias=False), {}),
        (nn.Sequential(nn.Conv2d(8, 6, 1), nn.Sigmoid()), {"layers": {"0": "float"}}),
    ],
)
def test_operators_without_a_quantized_bias_are_not_changed(model: nn.Module, options: dict[str, Any]) -> None:
    assert ChannelMeans not in kinds(prepared(model.eval(), images(2), **options))


def test_biases_are_not_corrected_in_training() -> None:
    model = nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)).train()
    module = torch.export.export(model, (images(1)[0],)).module()
    assert ChannelMeans not in kinds(prepare_qat_pt2e(module, NeutronQuantizer(is_qat=True)))


def test_a_module_that_was_never_calibrated_is_refused() -> None:
    model = nn.Conv2d(8, 6, 1).eval()
    with pytest.raises(CalibrationError, match="never reached"):
        convert_pt2e(prepare_pt2e(torch.export.export(model, (images(1)[0],)).module(), NeutronQuantizer()))


def test_inputs_that_are_refused_are_not_counted() -> None:
    model, samples = seeded(lambda: nn.Conv2d(8, 6, 1)), images()
    module = prepared(model, samples[:4], **COARSE)
    for wrong in (torch.ones(IMAGE, dtype=torch.int32), torch.full((1, 4, 6, 6), 9.0)):
        with pytest.raises(InputError):
            module(wrong)
    (found,) = (child for child in module.modules() if isinstance(child, ChannelMeans))
    assert found.mean is not None
    torch.testing.assert_close(found.mean, torch.cat(samples[:4]).mean((0, 2, 3)))


def test_options_other_than_true_and_false_are_refused() -> None:
    with pytest.raises(OptionError, match="correct_bias takes True or False, not 1"):
        NeutronQuantizer(correct_bias=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", ["fast", "auto"])
def test_correct_bias_does_not_change_recovery(recipe: str) -> None:
    model, samples = network(), [(x,) for x in images(8)]
    first, second = (
        list(layers_of(quantize(model, samples[0], samples, recover=recipe, correct_bias=wanted).module))
        for wanted in (True, False)
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.codes, other.codes)
        assert one.real_bias is not None
        assert other.real_bias is not None
        assert torch.equal(one.real_bias, other.real_bias)


# ---------------------------------------------------------------------------------------------------------------- means


@pytest.mark.parametrize(
    ("axis", "zero_points"),
    [(None, [0]), (None, [3]), (0, [0, 0, 0, 0]), (0, [0, -5, 7, 1]), (-1, [2, 0])],
    ids=["tensor", "tensor, zero point", "channels", "channels, zero points", "last axis"],
)
def test_fake_quantized_weights_have_the_bits_of_torch(axis: int | None, zero_points: list[int]) -> None:
    weight = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0)) * 2  # some values are clipped
    weight[0, 0] = torch.tensor([-0.0, -1e-3])  # the result is 0, without a sign
    scales = torch.rand(len(zero_points), generator=torch.Generator().manual_seed(1)) / 50 + 0.01
    points = torch.tensor(zero_points)
    observer = SimpleNamespace(
        qscheme=torch.per_tensor_symmetric if axis is None else torch.per_channel_symmetric, ch_axis=axis,
        quant_min=-127, quant_max=127, calculate_qparams=lambda: (scales, points),
    )  # fmt: skip
    if axis is None:
        wanted = torch.fake_quantize_per_tensor_affine(weight, float(scales), int(points), -127, 127)
    else:
        wanted = torch.fake_quantize_per_channel_affine(weight, scales, points.int(), axis % 3, -127, 127)
    found = _fake_quantized_weight(weight, observer)
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


class TestMeans:
    @settings(max_examples=50, deadline=None)
    @given(
        sizes=st.lists(st.integers(1, 5), min_size=1, max_size=90), cuts=st.sets(st.integers(0, 90), max_size=4),
        exponent=st.integers(-12, 12), seed=st.integers(0, 1000),
    )  # fmt: skip
    def test_parts_of_a_stream_merge_to_the_bit(
        self, sizes: list[int], cuts: set[int], exponent: int, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        stream = [torch.randn(size, 3, 2, 2, generator=generator) * 2.0**exponent for size in sizes]
        whole, merged = ChannelMeans(-3, 3), ChannelMeans(-3, 3)
        for values in stream:
            assert whole(values) is values
        ends = sorted({0, len(stream)} | {cut for cut in cuts if cut < len(stream)})
        for start, end in pairwise(ends):
            part = ChannelMeans(-3, 3)
            for values in stream[start:end]:
                part(values)
            merged.merge(part.state())
        assert torch.equal(merged.state()["total"], whole.state()["total"])
        assert whole.mean is not None
        exact = torch.cat(stream).double().mean((0, 2, 3))
        assert (whole.mean - exact).abs().max() <= 1e-6 * max(1.0, 2.0**exponent)

    def test_means_without_samples_are_unknown(self) -> None:
        found = ChannelMeans(-1, 3)
        found(torch.empty(0, 3))
        assert found.mean is None

    def test_copies_and_saved_states_keep_the_statistics(self) -> None:
        found, loaded = ChannelMeans(-1, 3), ChannelMeans(-1, 3)
        found(torch.tensor([1.0, 2.0, 3.0]))
        loaded.load_state_dict(found.state_dict())
        copied = copy.deepcopy(found)
        found(torch.tensor([3.0, 2.0, 1.0]))
        for other in (loaded, copied):
            assert other.mean is not None
            assert other.mean.tolist() == [1.0, 2.0, 3.0]
        assert found.mean is not None
        assert found.mean.tolist() == [2.0, 2.0, 2.0]
