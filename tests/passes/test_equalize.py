"""Equalization: the function does not change, channel scales become even, and limits of scaling are respected."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.flow_support import seeded
from tests.models import Model
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

from openneutron import NeutronQuantizer, passes, quantize
from openneutron.accuracy import analyze
from openneutron.core.constants import constant_of
from openneutron.core.fx import arguments
from openneutron.errors import OptionError
from openneutron.ops.declared import layer_kind
from openneutron.ops.facts import LayerKind
from openneutron.passes import equalize as equalizing
from openneutron.passes.equalize import equalize, was_equalized
from openneutron.passes.scalable_channels import scaling_of
from openneutron.recovery import recover_exported
from openneutron.targets import NeutronTargetSpec

TARGET = NeutronTargetSpec("imxrt700").neutron_target
CHANNELS = 8
SHAPE = (1, CHANNELS, 6, 6)


def image(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def graph_of(model: nn.Module, *inputs: Tensor) -> GraphModule:
    """Returns the float graph that the quantizer equalizes."""
    module: Any = torch.export.export(model, inputs or (image(),)).module()
    return passes.prepare(module, TARGET)


def outputs(module: Any, value: Tensor) -> list[Tensor]:
    with torch.no_grad():
        found = module(value)
    return [found] if isinstance(found, Tensor) else list(found)


def weights(module: GraphModule) -> list[Tensor]:
    """Returns the weights of all layers, [outputs, inputs of a group, taps], in graph order."""
    found = []
    for node in module.graph.nodes:
        weight = constant_of(module, arguments(node).get("weight")) if layer_kind(node) is not None else None
        if weight is not None:
            weight = weight.transpose(0, 1) if layer_kind(node) is LayerKind.TRANSPOSED else weight
            found.append(weight.reshape(*weight.shape[:2], -1))
    return found


def is_kept(module: GraphModule, model: Any, inputs: list[Tensor]) -> None:
    for value in inputs:
        for found, expected in zip(outputs(module, value), outputs(model, value), strict=True):
            assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


# ------------------------------------------------------------------------------------------------------ random graphs


def scale_channels(layer: Any, generator: torch.Generator) -> Any:
    """Gives the outputs of a layer very different ranges."""
    with torch.no_grad():
        factors = 10 ** (2 * torch.rand(layer.weight.shape[0], generator=generator) - 1)
        layer.weight.mul_(factors.reshape(-1, *[1] * (layer.weight.dim() - 1)))
        if layer.weight.shape[0] == layer.bias.shape[0]:
            layer.bias.mul_(factors)
    return layer


STEPS = (
    "conv", "pointwise", "depthwise", "grouped", "transposed", "linear", "relu", "relu6", "leaky", "max pool",
    "avg pool", "add", "cat", "slice", "shuffle", "pad", "gate", "shared", "sigmoid", "upsample", "maximum",
)  # fmt: skip


class Random(nn.Module):
    """A random graph: each step reads the previous value or an older one, and some values are also outputs."""

    def __init__(self, steps: list[tuple[str, int]], seed: int, extra_output: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.steps, self.extra_output = steps, extra_output
        made: dict[str, Callable[[], nn.Module]] = {
            "conv": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
            "pointwise": lambda: nn.Conv2d(CHANNELS, CHANNELS, 1),
            "depthwise": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS),
            "grouped": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=2),
            "transposed": lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1),
            "linear": lambda: nn.Linear(CHANNELS, CHANNELS),
            "cat": lambda: nn.Conv2d(2 * CHANNELS, CHANNELS, 1),
            "pad": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3),
            "gate": lambda: nn.Conv2d(CHANNELS, CHANNELS, 1),
        }
        self.layers = nn.ModuleList(
            scale_channels(made[name](), generator) if name in made else nn.Identity() for name, _ in steps
        )
        self.common = scale_channels(nn.Conv2d(CHANNELS, CHANNELS, 1), generator)
        self.head = nn.Linear(CHANNELS, 3)

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for (name, back), layer in zip(self.steps, self.layers, strict=True):
            values.append(self.step(name, layer, values[-1], values[-1 - back % len(values)]))
        result = self.head(values[-1].mean((2, 3)))
        return (result, values[len(values) // 2] * 1.0) if self.extra_output else result

    def step(self, name: str, layer: Any, value: Tensor, other: Tensor) -> Tensor:
        match name:
            case "linear":
                return layer(value.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]
            case "cat":
                return layer(torch.cat([value, other], 1))  # type: ignore[no-any-return]
            case "pad":
                return layer(F.pad(value, (1, 1, 1, 1)))  # type: ignore[no-any-return]
            case "gate":
                return value * torch.sigmoid(layer(value.mean((2, 3), keepdim=True)))
            case "shared":
                return self.common(value) + self.common(other)  # type: ignore[no-any-return]
            case "slice":
                return torch.cat([value[:, 4:], other[:, :4]], 1)
            case "shuffle":
                return value.view(1, 2, 4, 6, 6).permute(0, 2, 1, 3, 4).reshape(1, 8, 6, 6)
            case "upsample":
                return F.interpolate(value[:, :, ::2, ::2], scale_factor=2)
        functions: dict[str, Callable[[Tensor], Tensor]] = {
            "relu": F.relu, "relu6": F.relu6, "leaky": lambda v: F.leaky_relu(v, 0.1), "sigmoid": torch.sigmoid,
            "max pool": lambda v: F.max_pool2d(v, 3, 1, 1), "avg pool": lambda v: F.avg_pool2d(v, 3, 1, 1),
            "add": lambda v: v + other, "maximum": lambda v: torch.maximum(v, other),
        }  # fmt: skip
        return functions[name](value) if name in functions else layer(value)


class TestRandomGraphs:
    @pytest.mark.slow
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 4)), min_size=2, max_size=9),
        seed=st.integers(0, 1000), extra_output=st.booleans(),
    )  # fmt: skip
    def test_equalization_keeps_results(self, steps: list[tuple[str, int]], seed: int, extra_output: bool) -> None:
        model = seeded(lambda: Random(steps, seed, extra_output), seed)
        module = graph_of(model)
        equalize(module)
        is_kept(module, model, [image(seed), 10 * image(seed + 1)])


# ------------------------------------------------------------------------------------------ removal of channel scales


def spread(rows: Tensor) -> float:
    """Returns the ratio of the largest to the smallest range of a weight's output channels."""
    ranges = rows.flatten(1).abs().amax(1)
    return float(ranges.max() / ranges.min())


def unequal(first: Any, readers: list[Any], seed: int, order: Tensor) -> None:
    """Inserts channel scales between a layer and its readers in this `order`. The function does not change."""
    generator = torch.Generator().manual_seed(seed)
    factors = 10 ** (6 * torch.rand(CHANNELS, generator=generator) - 3)
    with torch.no_grad():
        first.weight.mul_(factors.reshape(-1, *[1] * (first.weight.dim() - 1)))
        first.bias.mul_(factors)
        for reader in readers:
            reader.weight.div_(factors[order].reshape(1, -1, *[1] * (reader.weight.dim() - 2)))


CHAINS: dict[str, tuple[Callable[[Any, Tensor], Any], tuple[str, ...]]] = {
    "relu": (lambda m, x: m.c(F.relu(m.a(x))), ("c",)),
    "leaky relu": (lambda m, x: m.c(F.leaky_relu(m.a(x), 0.2)), ("c",)),
    "two readers": (lambda m, x: m.c(y := F.relu(m.a(x))) + m.d(y), ("c", "d")),
    "pool": (lambda m, x: m.c(F.max_pool2d(F.relu(m.a(x)), 2)), ("c",)),
    "mean": (lambda m, x: m.c(m.a(x).mean((2, 3), keepdim=True)), ("c",)),
    "gate": (lambda m, x: m.c(m.a(x) * torch.sigmoid(m.d(x))), ("c",)),
    "shuffle": (lambda m, x: m.c(m.a(x).view(1, 2, 4, 6, 6).transpose(1, 2).reshape(SHAPE)), ("c",)),
}


class TestScales:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("name", CHAINS)
    def test_equalization_removes_inserted_scales(self, name: str, seed: int) -> None:
        function, readers = CHAINS[name]
        model: Any = seeded(lambda: Model(function, **{key: nn.Conv2d(CHANNELS, CHANNELS, 1) for key in "acd"}), seed)
        order = torch.arange(CHANNELS).reshape(2, 4).t().flatten() if name == "shuffle" else torch.arange(CHANNELS)
        unequal(model.a, [getattr(model, key) for key in readers], seed, order)
        module = graph_of(model)
        assert spread(weights(module)[0]) > 50
        assert equalize(module)
        is_kept(module, model, [image(1), image(2)])
        for rows in weights(module)[:1]:
            assert spread(rows) < 4

    def test_equalization_along_a_residual_and_a_depthwise_convolution(self) -> None:
        def function(m: Any, x: Tensor) -> Any:
            start = m.a(x)
            return m.e(start + m.d(F.relu(m.b(F.relu(m.c(start))))))

        def build() -> nn.Module:
            wide = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)
            return Model(function, b=wide, **{key: nn.Conv2d(CHANNELS, CHANNELS, 1) for key in "acde"})

        model: Any = seeded(build)
        factors = 10 ** torch.linspace(-3, 3, CHANNELS)
        with torch.no_grad():
            for layer in (model.a, model.d):
                layer.weight.mul_(factors.reshape(-1, 1, 1, 1))
                layer.bias.mul_(factors)
            for layer in (model.c, model.e):
                layer.weight.div_(factors.reshape(1, -1, 1, 1))
            model.c.weight.mul_(factors.reshape(-1, 1, 1, 1))
            model.c.bias.mul_(factors)
            model.b.weight.div_(factors.reshape(-1, 1, 1, 1))
        module = graph_of(model)
        assert equalize(module)
        is_kept(module, model, [image(1), image(2)])
        assert max(map(spread, weights(module))) < 6

    def test_one_factor_of_all_channels_does_not_grow(self) -> None:
        """Without a common reference for the ranges, the factor grew with each round in the past."""
        model: Any = seeded(lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU()))
        with torch.no_grad():
            model[0].weight[1:] *= 1e-2
        module = graph_of(model)
        equalize(module)
        assert max(float(rows.abs().max()) for rows in weights(module)) < 30

    def test_dead_channels_stay_dead(self) -> None:
        model: Any = seeded(lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)))
        with torch.no_grad():
            model[0].weight[3] = 1e-20
        module = graph_of(model)
        equalize(module)
        assert float(weights(module)[0][3].abs().max()) < 1e-18


# -------------------------------------------------------------------------------------------------------------- rules


def layers() -> dict[str, nn.Module]:
    return {
        "a": nn.Conv2d(CHANNELS, CHANNELS, 1), "b": nn.Conv2d(CHANNELS, CHANNELS, 1),
        "c": nn.Conv2d(CHANNELS, CHANNELS, 1), "t": nn.ConvTranspose2d(CHANNELS, CHANNELS, 2),
        "d": nn.Conv2d(CHANNELS, CHANNELS, 3, groups=CHANNELS), "g": nn.Conv2d(CHANNELS, CHANNELS, 1, groups=2),
        "l": nn.Linear(CHANNELS, CHANNELS), "f": nn.Linear(CHANNELS * 36, 3), "w": nn.Conv2d(16, CHANNELS, 1),
    }  # fmt: skip


# Operators between layer a and the layers after it.
HANDED_ON: dict[str, Callable[[Any, Tensor], Any]] = {
    "nothing": lambda m, x: m.c(m.a(x)),
    "relu": lambda m, x: m.c(F.relu(m.a(x))),
    "leaky relu": lambda m, x: m.c(F.leaky_relu(m.a(x))),
    "max pool": lambda m, x: m.c(F.max_pool2d(m.a(x), 2)),
    "avg pool": lambda m, x: m.c(F.avg_pool2d(m.a(x), 2)),
    "adaptive pool": lambda m, x: m.c(F.adaptive_avg_pool2d(m.a(x), 1)),
    "mean": lambda m, x: m.l(m.a(x).mean((2, 3))),
    "sum": lambda m, x: m.l(m.a(x).sum((2, 3))),
    "amax": lambda m, x: m.l(m.a(x).amax((2, 3))),
    "resize": lambda m, x: m.c(F.interpolate(m.a(x), scale_factor=2)),
    "zeros around": lambda m, x: m.c(F.pad(m.a(x), (1, 1, 1, 1))),
    "addition": lambda m, x: m.c(m.a(x) + m.b(x)),
    "subtraction": lambda m, x: m.c(m.a(x) - m.b(x)),
    "maximum": lambda m, x: m.c(torch.maximum(m.a(x), m.b(x))),
    "minimum": lambda m, x: m.c(torch.minimum(m.a(x), m.b(x))),
    "multiplication by a gate": lambda m, x: m.c(m.a(x) * torch.sigmoid(x)),
    "multiplication by a number": lambda m, x: m.c(F.relu(m.a(x)) * 3.0),
    "concatenation": lambda m, x: m.w(torch.cat([m.a(x), m.b(x)], 1)),
    "concatenation with the input": lambda m, x: m.w(torch.cat([m.a(x), x], 1)),
    "slice": lambda m, x: m.c(torch.cat([(y := m.a(x))[:, 4:], y[:, :4]], 1)),
    "flatten": lambda m, x: m.f(m.a(x).flatten(1)),
    "permute": lambda m, x: m.l(m.a(x).permute(0, 2, 3, 1)),
    "transposed": lambda m, x: m.c(m.t(m.a(x))),
    "depthwise": lambda m, x: m.c(m.d(m.a(x))),
    "grouped": lambda m, x: m.c(m.g(m.a(x))),
}
# Operators between layers that would compute something else after a factor.
PINNED: dict[str, Callable[[Any, Tensor], Any]] = {
    "relu6": lambda m, x: m.c(F.relu6(m.a(x))),
    "clamp from 0": lambda m, x: m.c(F.hardtanh(m.a(x), 0.0, 2.0)),
    "clamp": lambda m, x: m.c(F.hardtanh(m.a(x), -1.0, 1.0)),
    "sigmoid": lambda m, x: m.c(torch.sigmoid(m.a(x))),
    "tanh": lambda m, x: m.c(torch.tanh(m.a(x))),
    "hardswish": lambda m, x: m.c(F.hardswish(m.a(x))),
    "gelu": lambda m, x: m.c(F.gelu(m.a(x))),
    "softmax": lambda m, x: m.c(m.a(x).softmax(1)),
    "a number that is added": lambda m, x: m.c(F.relu(m.a(x)) + 1.0),
    "a value that is not scaled": lambda m, x: m.c(m.a(x) + x),
    "ones around": lambda m, x: m.c(F.pad(m.a(x), (1, 1, 1, 1), value=1.0)),
    "multiplication by itself": lambda m, x: m.c((y := m.a(x)) * y),
    "mean over channels": lambda m, x: m.a(x).mean(1),
    "a maximum over channels": lambda m, x: m.c(m.a(x) * m.a(x).amax(1, keepdim=True)),
    "an output": lambda m, x: (y := m.a(x), m.c(y)),
    "a shared weight": lambda m, x: m.c(m.a(m.a(x))),
    "columns of an image": lambda m, x: m.c(m.a(x).transpose(1, 2).reshape(SHAPE)),
}


def first_weight(module: GraphModule) -> Tensor:
    return weights(module)[0]


class TestRules:
    @pytest.mark.parametrize("name", HANDED_ON)
    def test_operators_that_pass_factors_on(self, name: str) -> None:
        model: Any = seeded(lambda: Model(HANDED_ON[name], **layers()))
        with torch.no_grad():
            model.a.weight[2] *= 1e-2
        module = graph_of(model)
        before = first_weight(module)
        assert equalize(module)
        assert not torch.equal(first_weight(module), before)
        is_kept(module, model, [image(1), image(2)])

    @pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "as exported"])
    @pytest.mark.parametrize("name", PINNED)
    def test_factors_stop_at_pinned_operators(self, name: str, prepared: bool) -> None:
        model: Any = seeded(lambda: Model(PINNED[name], **layers()))
        with torch.no_grad():
            model.a.weight[2] *= 1e-2
        module: Any = graph_of(model) if prepared else torch.export.export(model, (image(),)).module()
        before, original = first_weight(module), copy.deepcopy(module)
        equalize(module)
        assert torch.equal(first_weight(module), before)
        is_kept(module, original, [10 * image(1), image(2)])

    def test_a_layer_without_a_batch_keeps_its_function(self) -> None:
        model: Any = seeded(lambda: Model(lambda m, x: m.c(F.relu(m.a(x))), **layers()))
        inputs = image(0, SHAPE[1:])
        module = graph_of(model, inputs)
        equalize(module)
        torch.testing.assert_close(module(inputs), model(inputs), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ the documented flow


def lopsided() -> Any:
    """Returns three convolutions with very different channel scales, and the same function with even ones."""
    model: Any = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 1), nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU(),
            nn.Conv2d(CHANNELS, 4, 1),
        )
    )  # fmt: skip
    for first, second in ((0, 2), (2, 4)):
        unequal(model[first], [model[second]], seed=first, order=torch.arange(CHANNELS))
    return model


def prepared(model: nn.Module, **options: Any) -> GraphModule:
    found: GraphModule = prepare_pt2e(torch.export.export(model, (image(),)).module(), NeutronQuantizer(**options))
    return found


def converted(model: nn.Module, **options: Any) -> GraphModule:
    module = prepared(model, **options)
    for seed in range(8):
        module(image(seed))
    found: GraphModule = convert_pt2e(module)
    return found


def observed_weights(module: GraphModule) -> list[Tensor]:
    """Returns the float weights of a prepared module's layers, in graph order."""
    layers = [node for node in module.graph.nodes if layer_kind(node) is not None]
    return [constant_of(module, arguments(node)["weight"].args[0]) for node in layers]  # type: ignore[misc]


def noise_of(module: GraphModule, model: nn.Module) -> float:
    pairs = [(outputs(module, image(seed))[0], outputs(model, image(seed))[0]) for seed in range(20, 30)]
    return sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(b.square().sum()) for _, b in pairs)


class TestDocumentedFlow:
    def test_the_function_is_kept_and_int8_loses_less(self) -> None:
        model = lopsided()
        is_kept(prepared(model), model, [image(1), 10 * image(2)])
        assert noise_of(converted(model), model) < 0.1 * noise_of(converted(model, equalize=False), model)

    def test_without_equalization_weights_do_not_change(self) -> None:
        model = lopsided()
        original = [model[index].weight for index in (0, 2, 4)]
        for weight, expected in zip(observed_weights(prepared(model, equalize=False)), original, strict=True):
            assert torch.equal(weight, expected)
        for weight, other in zip(observed_weights(prepared(model)), original, strict=True):
            assert not torch.equal(weight, other)

    @pytest.mark.parametrize("key", ["2", nn.ReLU, "aten.relu.default"])
    def test_equalization_keeps_the_results_of_float_operators(self, key: Any) -> None:
        model = lopsided()
        module = torch.export.export(model, (image(),)).module()
        module = NeutronQuantizer(layers={key: "float"}).transform_for_annotation(module)
        is_kept(module, model, [image(1), image(2)])
        for rows, index in zip(weights(module), (0, 2, 4), strict=True):
            assert torch.equal(rows, model[index].weight.flatten(2))

    @pytest.mark.parametrize("layers", [{"2": "per_channel"}, {"0": "per_channel", "4": "per_channel"}])
    def test_layers_of_other_granularity(self, layers: dict[Any, str]) -> None:
        model = lopsided()
        is_kept(prepared(model, layers=layers), model, [image(1), image(2)])
        assert noise_of(converted(model, layers=layers), model) < 0.1 * noise_of(
            converted(model, layers=layers, equalize=False), model
        )

    def test_a_graph_is_equalized_once(self) -> None:
        quantizer = NeutronQuantizer()
        module = quantizer.transform_for_annotation(torch.export.export(lopsided(), (image(),)).module())
        assert was_equalized(module)
        before = weights(module)
        again = weights(quantizer.transform_for_annotation(copy.deepcopy(module)))
        assert all(map(torch.equal, again, before))

    def test_recovered_modules_are_not_equalized_again(self) -> None:
        plain = NeutronQuantizer(equalize=False)
        module = plain.transform_for_annotation(torch.export.export(lopsided(), (image(),)).module())
        assert was_equalized(module) is False
        recover_exported(module, [(image(seed),) for seed in range(4)])
        assert was_equalized(module)
        before = weights(module)
        assert all(map(torch.equal, weights(NeutronQuantizer().transform_for_annotation(module)), before))

    @pytest.mark.parametrize("equalized", [True, False])
    def test_recovery_starts_from_the_unequalized_model(self, equalized: bool) -> None:
        model, samples = lopsided(), [(image(seed),) for seed in range(4)]
        found = quantize(model, samples[0], samples, recover="fast", equalize=equalized)
        plain = NeutronQuantizer(equalize=False)
        expected = plain.transform_for_annotation(torch.export.export(model, (image(),)).module())
        recover_exported(expected, samples, equalizes=equalized)
        assert found.reference is not None
        assert all(map(torch.equal, weights(found.reference), weights(expected)))

    def test_channels_are_not_equalized_in_training(self) -> None:
        model = lopsided().train()
        module = torch.export.export(model, (image(),)).module()
        module = NeutronQuantizer(is_qat=True).transform_for_annotation(module)
        assert was_equalized(module) is False
        for rows, index in zip(weights(module), (0, 2, 4), strict=True):
            assert torch.equal(rows, model[index].weight.flatten(2))

    @pytest.mark.parametrize("options", [{}, {"equalize": False}, {"is_qat": True}])
    def test_analyze_compares_the_module_with_its_float_graph(self, options: dict[str, Any]) -> None:
        model = lopsided()
        if options.get("is_qat"):
            module = prepare_qat_pt2e(
                torch.export.export(copy.deepcopy(model).train(), (image(),)).module(), NeutronQuantizer(is_qat=True)
            )
            for seed in range(8):
                module(image(seed))
            module = convert_pt2e(module)
        else:
            module = converted(model, **options)
        found = analyze(model, module, [(image(seed),) for seed in range(4)])
        assert found.output_sqnr_db > (25 if options == {} else 0)
        first = next(layer for layer in found.layers if layer.node == "conv2d")
        assert first.sqnr_db > 25

    def test_options_other_than_true_and_false_are_refused(self) -> None:
        with pytest.raises(OptionError, match="equalize takes True or False, not 'no'"):
            NeutronQuantizer(equalize="no")  # type: ignore[arg-type]


def test_rounds_end_when_factors_have_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = 0
    relative_ranges = equalizing._Tensors.relative_ranges

    def counted(tensors: Any, logs: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal rounds
        rounds += 1
        return relative_ranges(tensors, logs)

    monkeypatch.setattr(equalizing._Tensors, "relative_ranges", counted)
    layers = [nn.Conv2d(CHANNELS, CHANNELS, 1), nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 3, groups=CHANNELS), nn.ReLU()]
    model = seeded(lambda: nn.Sequential(*layers, nn.Conv2d(CHANNELS, CHANNELS, 1)).eval())
    assert equalize(graph_of(model))
    assert 5 < rounds < equalizing.ROUNDS


def test_pinned_channels_are_represented_by_their_largest_weight() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval())
    tensors = equalizing._Tensors.from_layers(scaling_of(graph_of(model, image(shape=(1, 2, 6, 6)))).layers, {})
    assert [tuple(weight.shape) for weight in tensors.weights] == [(1, 8, 1), (1, 1, 8)]


@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 4, 6), (5, 1, 1), (1, 1, 9)])
@pytest.mark.parametrize("block", [1, 11, 1000])
def test_the_largest_products_do_not_depend_on_blocks(
    shape: tuple[int, int, int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equalizing, "BLOCK", block)
    groups, outputs, inputs = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(shape, generator=generator)
    rows, columns = torch.rand(groups, outputs, generator=generator), torch.rand(groups, inputs, generator=generator)
    of_outputs, of_inputs = equalizing._largest_products(weight, rows.flatten(), columns.flatten())
    assert of_outputs.tolist() == (weight * columns[:, None]).amax(2).flatten().tolist()
    assert of_inputs.tolist() == (weight * rows[:, :, None]).amax(1).flatten().tolist()
