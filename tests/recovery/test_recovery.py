"""Each method of `openneutron.recovery`: its effect, and the layers that it must not change."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from examples.digits.network import load_digits_split, load_network
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fidelity import signal_to_noise
from tests.flow_support import seeded
from tests.recovery_models import exported, images, network
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import openneutron.recovery
from openneutron import NeutronQuantizer, quantize
from openneutron.calibration.bare_graph import Batches
from openneutron.core.fx import arguments
from openneutron.errors import CalibrationError, ModelError
from openneutron.recovery import (
    channel_ranges,
    correct_biases,
    give_biases,
    gptq_codes,
    round_weights_by_gptq,
    zero_inactive_channels,
)
from openneutron.recovery.gptq_rounding import (
    CORRELATED_POSITIONS,
    LEAST_SQUARES_DAMPING,
    InputRows,
    _least_squares_weights,
    _Moments,
)
from openneutron.recovery.layerwise import run_layerwise, samples_within_memory
from openneutron.recovery.weighted_layers import layers_of


def converted(reference: GraphModule, samples: list[tuple[Tensor]], **options: Any) -> GraphModule:
    quantizer = NeutronQuantizer(**{"equalize": False, "correct_bias": False, **options})
    prepared = prepare_pt2e(copy.deepcopy(reference), quantizer)
    for sample in samples:
        prepared(*sample)
    return convert_pt2e(prepared)  # type: ignore[no-any-return]


def noise(reference: GraphModule, quantized: GraphModule, samples: list[tuple[Tensor]]) -> float:
    """Returns the squared error of the outputs, relative to their variance."""
    with torch.no_grad():
        real = torch.cat([reference(*sample) for sample in samples]).double()
        error = torch.cat([quantized(*sample) for sample in samples]) - real
    return float(error.square().sum() / (real - real.mean(0)).square().sum())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.first, self.second = (nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(3))
        self.third, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x).relu()
        return self.head(self.third((stem + self.second(self.first(stem).relu())).relu()).relu())  # type: ignore[no-any-return]


# ----------------------------------------------------------------------------------------------------- layerwise run


def test_a_layerwise_run_visits_each_layer_once_with_its_inputs_and_wanted_outputs() -> None:
    reference, samples = exported(network()), images(3)
    quantized = converted(reference, samples)
    seen: list[str] = []

    def visit(layer: Any, layer_io: Any) -> None:
        seen.append(layer.node.name)
        assert len(layer_io.quantized) == len(layer_io.real) == len(layer_io.wanted) == 3
        for real, wanted in zip(layer_io.real, layer_io.wanted, strict=True):
            (reference_node,) = (node for node in reference.graph.nodes if node.name == layer.node.name)
            bias = getattr(reference, str(reference_node.args[2].target), None)
            if bias is not None:
                torch.testing.assert_close(layer.run(real, layer_io.weight, bias), wanted)

    real, quantized_outputs = run_layerwise(reference, quantized, samples, visit)
    assert seen == [layer.node.name for layer in layers_of(quantized)]
    assert len(seen) == 5
    with torch.no_grad():
        for sample, output, rounded in zip(samples, real, quantized_outputs, strict=True):
            torch.testing.assert_close(output[0], reference(*sample))
            torch.testing.assert_close(rounded[0], quantized(*sample), rtol=0, atol=0.05)


def test_a_layerwise_run_uses_the_constants_that_visit_changed() -> None:
    reference, samples = exported(network()), images(2)
    quantized = converted(reference, samples)

    def zero(layer: Any, layer_io: Any) -> None:  # the first layer returns zeros, so the second reads zeros
        if layer.node.name == "conv2d":
            layer.codes.zero_()
            layer.set_bias(torch.zeros_like(layer.real_bias))
        if layer.node.name == "conv2d_1":
            assert all(not values.any() for values in layer_io.quantized)

    run_layerwise(reference, quantized, samples, zero)


def test_graphs_that_do_not_belong_together_are_refused() -> None:
    quantized = converted(exported(network()), images(1))
    with pytest.raises(ModelError, match="The float graph has no such layer"):
        correct_biases(quantized, exported(nn.Sequential(nn.ReLU())), images(1))


def test_a_layerwise_run_uses_as_many_samples_as_fit_into_memory() -> None:
    reference, samples = exported(network()), images(8)
    assert len(samples_within_memory(reference, samples)) == 8
    assert len(samples_within_memory(reference, samples, memory=60_000)) in range(1, 8)
    assert len(samples_within_memory(reference, samples, memory=1)) == 1


# --------------------------------------------------------------------------------------------------------------- biases


def test_corrected_biases_leave_no_shift_on_average() -> None:
    reference, samples = exported(network()), images()
    quantized = correct_biases(converted(reference, samples, weight_bits=4), reference, samples)

    def visit(layer: Any, layer_io: Any) -> None:
        yielded = [layer.run(values, layer.real_weight, layer.real_bias) for values in layer_io.quantized]
        shifts = [layer.by_output(a - b).mean(0) for a, b in zip(yielded, layer_io.wanted, strict=True)]
        assert torch.stack(shifts).mean(0).abs().max() < 0.51 * arguments(layer.bias)["scale"]

    run_layerwise(reference, quantized, samples, visit)


def test_a_missing_bias_becomes_zeros_without_effect() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, groups=2, bias=False), nn.Flatten(),
        nn.Linear(4 * 49, 3, bias=False),
    )  # fmt: skip
    module = exported(model)
    before = module(*images(1)[0])
    give_biases(module)
    torch.testing.assert_close(module(*images(1)[0]), before, rtol=0, atol=0)
    quantized = converted(module, images(2))
    assert [layer.real_bias is not None for layer in layers_of(quantized)] == [True] * 3


# ------------------------------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=1), (1, 4, 9, 7)),
        (nn.Conv2d(4, 6, (1, 3), padding=(0, 2), dilation=(1, 2)), (1, 4, 5, 9)),
        (nn.Conv2d(4, 6, 1, stride=2), (1, 4, 5, 5)),
        (nn.Conv2d(4, 8, 3, groups=4, padding="same"), (1, 4, 5, 6)),
        (nn.Conv2d(4, 8, (2, 4), dilation=(2, 1), padding="same"), (1, 4, 7, 6)),
        (nn.Conv2d(4, 8, 3, padding="valid"), (1, 4, 5, 6)),
        (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (2, 4, 11)),
        (nn.Conv1d(4, 6, 4, padding="same"), (1, 4, 11)),
        (nn.Linear(7, 3), (1, 7)),
        (nn.Linear(7, 3), (2, 5, 7)),
    ],
)
def test_rows_of_inputs_times_the_weight_are_the_layer(layer: nn.Module, shape: tuple[int, ...]) -> None:
    samples = images(1, shape)
    reference = exported(nn.Sequential(layer), shape)
    (found,) = layers_of(converted(reference, samples))
    weight = found.real_weight
    rows = InputRows(found, weight, 1)(samples[0][0])
    products = rows @ weight.reshape(found.groups, len(weight) // found.groups, -1).transpose(1, 2)
    expected = found.by_output(found.run(samples[0][0], weight, None))
    torch.testing.assert_close(products.movedim(0, 1).flatten(1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (1, 4, 9, 7)),
        (nn.Conv2d(4, 8, 3, groups=4, padding="same"), (1, 4, 5, 6)),
        (nn.Conv1d(4, 6, 3, padding=2, dilation=2, groups=2), (2, 4, 11)),
        (nn.Linear(7, 3), (2, 5, 7)),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_batch_has_the_rows_of_its_samples(layer: nn.Module, shape: tuple[int, ...], channels_last: bool) -> None:
    samples = images(3, shape)
    (found,) = layers_of(converted(exported(nn.Sequential(layer), shape), samples[:1]))
    rows = InputRows(found, found.real_weight, 3000)  # at 11 positions
    (batch,) = Batches(3, channels_last).concatenate(samples)
    wanted = torch.cat([rows(value) for (value,) in samples], 1)
    assert wanted.shape[1] == 3 * min(11, len(found.by_output(found.run(samples[0][0], found.real_weight, None))))
    assert torch.equal(rows(batch, 3), wanted)


@pytest.mark.parametrize("at_once", [1, 2**9])
def test_large_layers_are_rounded_in_several_passes(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, samples = exported(network()), images(8)
    usual, bounded = converted(module, samples), converted(module, samples)
    round_weights_by_gptq(usual, module, samples)
    monkeypatch.setattr(sys.modules[InputRows.__module__], "WEIGHTS_AT_ONCE", at_once)
    round_weights_by_gptq(bounded, module, samples)
    pairs = list(zip(layers_of(usual), layers_of(bounded), strict=True))
    assert len(pairs) == 5
    assert all(torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale) for one, other in pairs)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(2, 24), st.integers(0, 10**6))
def test_gptq_rounding_is_better_than_rounding_to_nearest(groups: int, inputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, 200, inputs, generator=generator, dtype=torch.float64)
    mixed = torch.randn(groups, inputs, 4 * inputs, generator=generator, dtype=torch.float64)
    covariance = mixed @ mixed.transpose(1, 2)
    scale = torch.full((groups, 1, 1), 0.2, dtype=torch.float64)
    codes = gptq_codes(weight, covariance, scale, (-127, 127))
    assert torch.equal(codes, codes.round())

    def error(candidate: Tensor) -> float:
        change = candidate * scale - weight
        return float(((change @ covariance) * change).sum())

    assert error(codes) <= 1.02 * error(torch.round(weight / scale))
    identity = torch.eye(inputs).expand(groups, inputs, inputs)
    assert torch.equal(gptq_codes(weight, identity, scale, (-127, 127)), torch.round(weight / scale))


def test_learned_rounding_reduces_the_noise_of_coarse_weights() -> None:
    reference, samples = exported(Residual()), images(48)
    quantized = converted(reference, samples, weight_bits=4)
    corrected = correct_biases(copy.deepcopy(quantized), reference, samples)
    rounded = round_weights_by_gptq(copy.deepcopy(quantized), reference, samples)
    fresh = images(60)[48:]
    assert noise(reference, rounded, fresh) < 0.85 * noise(reference, corrected, fresh)
    assert noise(reference, corrected, fresh) < 0.85 * noise(reference, quantized, fresh)
    assert all(layer.codes.abs().max() <= 7 for layer in layers_of(rounded))


def test_learned_rounding_keeps_the_scales_of_each_channel() -> None:
    reference, samples = exported(Residual()), images(16)
    quantized = converted(reference, samples, weight_granularity="per_channel")
    rounded = round_weights_by_gptq(copy.deepcopy(quantized), reference, samples)
    for layer, before in zip(layers_of(rounded), layers_of(quantized), strict=True):
        assert layer.scale.numel() == before.scale.numel() == len(layer.codes)
        assert ((layer.real_weight - before.real_weight).abs() <= 4 * before.scale).all()


# -------------------------------------------------------------------------------------------------- constant channels


@pytest.mark.parametrize("level", [0.3, 30.0, 3000.0])
def test_channels_that_never_vary_are_rounded_too(level: float) -> None:
    """Their covariance is only rounding of float32. Their quantized values differ from the float values."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.ReLU(), nn.Conv2d(3, 4, 1))).eval()
    samples = [(torch.cat([image[:, :2] * level, torch.full_like(image[:, :1], level)], 1),) for (image,) in images(64)]
    module = exported(model)
    quantized = converted(module, samples)
    before = noise(module, quantized, samples)
    round_weights_by_gptq(quantized, module, samples)
    assert noise(module, quantized, samples) <= before


# ------------------------------------------------------------------------------------------------------- large values


class Siamese(nn.Module):
    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8, bias=bias)

    def forward(self, value: Tensor) -> Any:
        return self.shared(self.shared(value)) + value


@pytest.mark.parametrize("recover", ["fast", "auto"])
@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (lambda: nn.Linear(8, 4, bias=False), (1, 8)),
        (lambda: nn.Linear(8, 4, bias=False), (4, 8)),
        (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, bias=False), nn.ReLU()), (1, 4, 8, 8)),
        (lambda: nn.ConvTranspose2d(4, 4, 2, stride=2, bias=False), (1, 4, 4, 4)),
        (Siamese, (4, 8)),
    ],
)
def test_values_whose_squares_overflow_are_recovered(
    network: Callable[[], nn.Module], shape: tuple[int, ...], recover: str
) -> None:
    model, generator = seeded(network).eval(), torch.Generator().manual_seed(0)
    samples = [torch.zeros(shape), *(torch.randn(shape, generator=generator) for _ in range(16))]
    with torch.no_grad():
        wanted = [model(sample) for sample in samples]

    def error(factor: float) -> float:
        large = [(sample * factor,) for sample in samples]
        module = quantize(model, large[0], large, recover=recover, progress=False).module
        found = [module(*sample) / factor for sample in large]
        return float((torch.stack(found) - torch.stack(wanted)).square().sum())

    assert error(2.0**100) < 1.2 * error(1.0)


@pytest.mark.parametrize(
    "method", [lambda module, *_: module, correct_biases, round_weights_by_gptq], ids=["none", "biases", "gptq"]
)
@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (lambda: nn.Conv2d(3, 8, 1), (1, 3, 64, 64)),
        (lambda: nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2), (1, 4, 48, 48)),
        (lambda: nn.Conv1d(4, 4, 1), (1, 4, 4096)),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), (1, 4096, 8)),
        (lambda: Siamese(bias=True), (1024, 8)),
    ],
)
def test_biases_are_corrected_if_sums_overflow(
    network: Callable[[], nn.Module], shape: tuple[int, ...], method: Callable[..., GraphModule]
) -> None:
    """Sums over positions are above the limit of float32. `quantize` and the recovery compute such sums."""
    model, generator = seeded(network).eval(), torch.Generator().manual_seed(0)
    samples = [torch.rand(shape, generator=generator) + 0.5 for _ in range(3)]

    def error(factor: float) -> float:
        large = [(sample * factor,) for sample in samples]
        found = quantize(model, large[0], large, recover=None, progress=False)
        assert found.reference is not None
        return noise(found.reference, method(found.module, found.reference, large), large)

    assert error(2.0**120) < 1.2 * error(1.0)


@pytest.mark.parametrize("method", [correct_biases, round_weights_by_gptq])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("network", [lambda: nn.Linear(8, 8), lambda: Siamese(bias=True)])
def test_samples_that_are_not_finite_are_refused(
    network: Callable[[], nn.Module], value: float, method: Callable[..., GraphModule]
) -> None:
    reference, samples = exported(network().eval(), (4, 8)), [(torch.randn(4, 8),) for _ in range(2)]
    module = converted(reference, samples)
    with pytest.raises(CalibrationError, match=r"(?s)Give samples .*node 'linear"):
        method(module, reference, [(torch.full((4, 8), value),)])


# ---------------------------------------------------------------------------------------------------- few samples


def test_fewer_positions_change_the_weights_less() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, size = torch.randn(1, 500, 6, generator=generator, dtype=torch.float64), 6
    real = inputs + 0.3 * inputs.roll(1, 2)
    rows = torch.randn(1, 4, size, generator=generator, dtype=torch.float64)
    own, cross = (values.transpose(1, 2) @ inputs / 500 for values in (inputs, real))
    best = torch.linalg.solve(own, rows @ cross, left=False)

    def moved(count: float) -> float:
        """Returns how far weights moved from `rows` to the best weights for the samples."""
        wanted = _least_squares_weights(rows, _Moments(own, cross, count / (count + size)), CORRELATED_POSITIONS)
        return float(((wanted - rows) * (best - rows)).sum() / (best - rows).square().sum())

    shares = [moved(count) for count in (1, 100, 1e4, 1e9)]
    assert shares == sorted(shares)
    assert shares[0] < 0.01
    assert shares[3] == pytest.approx(1 / (1 + LEAST_SQUARES_DAMPING), abs=0.1)


def test_weights_are_not_fitted_to_few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """On unseen digits, the regularized weights are closer to float than weights that fit the seen digits better."""
    data = load_digits_split()
    module = exported(load_network(), (1, *data.test_images.shape[1:]))
    seen, unseen = ([(image[None],) for image in images] for images in (data.train_images[:40], data.test_images[:200]))
    found = []
    for correlated_positions in (0.0, CORRELATED_POSITIONS):
        monkeypatch.setattr(
            sys.modules[_least_squares_weights.__module__], "CORRELATED_POSITIONS", correlated_positions
        )
        quantized = converted(module, seen)
        round_weights_by_gptq(quantized, module, seen)
        found.append((noise(module, quantized, seen), noise(module, quantized, unseen)))
    (fitted, fitted_unseen), (pulled, pulled_unseen) = found
    assert fitted < pulled
    assert pulled_unseen < fitted_unseen


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("silence_channels", "zero_inactive_channels"),
        ("round_weights", "round_weights_by_gptq"),
        ("rounded_with_feedback", "gptq_codes"),
    ],
)
def test_old_names_are_deprecated_aliases(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"openneutron\.recovery\.{old} is now called {new}"):
        assert getattr(openneutron.recovery, old) is getattr(openneutron.recovery, new)
    with pytest.raises(AttributeError, match="no attribute 'silence'"):
        _ = openneutron.recovery.silence


# ------------------------------------------------------------------------------------------------------------ volumes


def volumes() -> nn.Sequential:
    """One channel with large weights followed by small ones, and one that is dead for each input."""
    model = nn.Sequential(nn.Conv3d(2, 6, 3, bias=False), nn.ReLU(), nn.Conv3d(6, 4, (1, 3, 3)), nn.ReLU())
    with torch.no_grad():
        model.get_parameter("0.weight")[0] *= 200
        model.get_parameter("2.weight")[:, 0] /= 200
    return model


@pytest.mark.parametrize("recover", ["fast", "auto"])
def test_convolutions_of_volumes_take_part(recover: str) -> None:
    model = seeded(volumes)
    samples = [(torch.randn(1, 2, 4, 7, 7, generator=torch.Generator().manual_seed(i)),) for i in range(40)]
    plain, recovered = (
        quantize(model, samples[0], samples, progress=False, **options)
        for options in ({"recover": None, "equalize": False, "correct_bias": False}, {"recover": recover})
    )
    found, wanted = (signal_to_noise(quantized.module, model, samples) for quantized in (plain, recovered))
    assert wanted > found + 6
    assert wanted > 30


def test_inactive_channels_of_volumes_are_zeroed() -> None:
    model = seeded(volumes)
    with torch.no_grad():
        model.get_submodule("0").bias = nn.Parameter(torch.zeros(6))
        model.get_parameter("0.bias")[1] = -1e4
    samples = [(torch.randn(1, 2, 4, 7, 7),) for _ in range(4)]
    module: GraphModule = torch.export.export(model, samples[0]).module()
    assert zero_inactive_channels(module, channel_ranges(module, samples)) == 1
