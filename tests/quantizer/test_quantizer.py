"""The quantizer's annotations by each rule, its warnings, and the linear growth of its work."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.flow_support import convert, qparams, seeded
from tests.models import Model, bn, conv, image, trained
from torch import nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import HistogramObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import (
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationSpec,
    SharedQuantizationSpec,
)

from openneutron import NeutronQuantizer, lower, quantize
from openneutron.core.constants import attribute
from openneutron.core.fx import is_dequantize, is_quantize, op_name
from openneutron.errors import ModelError
from openneutron.quantizer import DistributionObserver, UnquantizedWarning
from openneutron.quantizer.int8_quantizer import annotated
from openneutron.quantizer.torchao_folding import is_folded_wrongly, protect_from_wrong_folding

ANNOTATION = "quantization_annotation"


def annotate(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> dict[str, Node]:
    """Returns the nodes of the annotated graph by name."""
    quantizer = NeutronQuantizer(**options)
    module = torch.export.export(model.eval(), inputs or (image(),)).module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnquantizedWarning)
        module = quantizer.annotate(quantizer.transform_for_annotation(module))
    return {node.name: node for node in module.graph.nodes}


def output_spec(node: Node) -> Any:
    return node.meta[ANNOTATION].output_qspec


def input_specs(node: Node) -> list[Any]:
    return list(node.meta[ANNOTATION].input_qspec_map.values())


@pytest.mark.parametrize("prepare", [prepare_pt2e, prepare_qat_pt2e])
@pytest.mark.parametrize(("is_converted", "state"), [(False, "prepared by prepare_pt2e"), (True, "quantized")])
def test_a_graph_is_prepared_once(prepare: Callable[..., GraphModule], is_converted: bool, state: str) -> None:
    is_qat = prepare is prepare_qat_pt2e
    module = torch.export.export(conv().train(is_qat), (image(),)).module()
    prepared = prepare(module, NeutronQuantizer(is_qat=is_qat))
    prepared(image())
    again = convert_pt2e(prepared) if is_converted else prepared
    with pytest.raises(ModelError, match=rf"graph is {state} already.*Give the result of torch\.export\.export"):
        prepare(again, NeutronQuantizer(is_qat=is_qat))


class TestContract:
    def test_convolution(self) -> None:
        nodes = annotate(Model(lambda m, x: m.c(x), c=conv()))
        activation, weight, bias = input_specs(nodes["conv2d"])
        assert isinstance(activation, QuantizationSpec)
        assert (activation.dtype, activation.quant_min, activation.quant_max) == (torch.int8, -128, 127)
        assert activation.qscheme == torch.per_tensor_affine
        assert (weight.dtype, weight.quant_min, weight.quant_max) == (torch.int8, -127, 127)
        assert weight.qscheme == torch.per_tensor_symmetric
        assert isinstance(bias, DerivedQuantizationSpec)
        assert bias.dtype == torch.int32
        assert bias.derived_from == [
            (nodes["inputs_0"], nodes["conv2d"]),
            (nodes["c_weight"], nodes["conv2d"]),
        ]
        assert isinstance(output_spec(nodes["conv2d"]), QuantizationSpec)

    def test_bias_is_input_times_weight(self) -> None:
        module = convert(seeded(lambda: Model(lambda m, x: m.c(x), c=conv())), (image(),))
        (node,) = (node for node in module.graph.nodes if op_name(node) == "aten.conv2d.default")
        activation, weight, bias = (operand.args for operand in node.all_input_nodes)
        assert isinstance(activation[1], float)
        assert isinstance(weight[1], float)
        assert bias[1] == pytest.approx(activation[1] * weight[1], rel=1e-6)
        assert (weight[2], bias[2], bias[5]) == (0, 0, torch.int32)

    def test_per_channel_layers(self) -> None:
        model = seeded(lambda: Model(lambda m, x: m.l(m.c(x).flatten(1)), c=conv(4, 8), l=nn.Linear(512, 3)))
        nodes = annotate(model, weight_granularity="per_channel")
        _, weight, bias = input_specs(nodes["conv2d"])
        assert (weight.qscheme, weight.ch_axis) == (torch.per_channel_symmetric, 0)
        assert (bias.qscheme, bias.ch_axis) == (torch.per_channel_symmetric, 0)
        _, weight, bias = input_specs(nodes["linear"])
        assert (weight.qscheme, weight.ch_axis) == (torch.per_channel_symmetric, 0)
        assert (bias.qscheme, bias.ch_axis) == (torch.per_channel_symmetric, 0)
        quantized = quantize(model, (image(),), [image()], weight_granularity="per_channel")
        assert {row.where for row in lower(quantized).placement} == {"npu"}
        found = lower(quantized).run(image())
        assert isinstance(found, torch.Tensor)
        torch.testing.assert_close(found, quantized(image()), atol=0.02, rtol=0)

    def test_per_channel_transposed_convolutions(self) -> None:
        """The output channels are dimension 1 of the weight, and all groups have the same scales."""
        model = seeded(lambda: nn.ConvTranspose2d(4, 6, 3, groups=2))
        _, weight, bias = input_specs(annotate(model, weight_granularity="per_channel")["conv_transpose2d"])
        assert (weight.qscheme, weight.ch_axis) == (torch.per_channel_symmetric, 1)
        assert (bias.qscheme, bias.ch_axis) == (torch.per_channel_symmetric, 0)
        module = quantize(model, (image(),), [image()], weight_granularity="per_channel").module
        (node,) = (node for node in module.graph.nodes if op_name(node) == "aten.conv_transpose2d.input")
        scales, biases = (attribute(module, str(operand.args[1].target)) for operand in node.all_input_nodes[1:])
        assert len(scales) == 3
        torch.testing.assert_close(biases, (scales * node.args[0].args[1]).repeat(2))

    def test_weights_read_along_different_dimensions_have_one_scale(self) -> None:
        """An autoencoder may read one weight in both directions."""
        model = Model(lambda m, x: F.conv_transpose2d(F.relu(F.conv2d(x, m.c.weight)), m.c.weight), c=conv(4, 8))
        quantized = quantize(seeded(lambda: model).eval(), (image(),), [image()], weight_granularity="per_channel")
        assert {row.where for row in lower(quantized).placement} == {"npu"}
        nodes = annotate(model, weight_granularity="per_channel")
        assert input_specs(nodes["conv2d"])[1].qscheme == torch.per_tensor_symmetric

    @pytest.mark.parametrize(
        ("function", "scale", "zero_point"),
        [(torch.sigmoid, 1 / 256, -128), (torch.tanh, 1 / 128, 0), (lambda x: F.softmax(x, 1), 1 / 256, -128)],
    )
    def test_fixed_outputs(self, function: Callable[..., Any], scale: float, zero_point: int) -> None:
        nodes = annotate(Model(lambda m, x: function(m.c(x)), c=conv()))
        spec = output_spec(list(nodes.values())[-2])
        assert isinstance(spec, FixedQParamsQuantizationSpec)
        assert (spec.scale, spec.zero_point) == (scale, zero_point)


class TestFusedActivations:
    @pytest.mark.parametrize(
        "activation", [F.relu, F.relu6, lambda x: F.hardtanh(x, 0, 6), lambda x: F.hardtanh(x, -1, 1), F.relu_]
    )
    def test_nothing_between(self, activation: Callable[..., Any]) -> None:
        nodes = list(annotate(Model(lambda m, x: activation(m.c(x)), c=conv())).values())
        producer, follower = nodes[-3], nodes[-2]
        assert op_name(producer) == "aten.conv2d.default"
        assert output_spec(producer) is None
        assert input_specs(follower) == []
        assert isinstance(output_spec(follower), QuantizationSpec)

    @pytest.mark.parametrize("activation", [torch.sigmoid, torch.tanh, lambda x: F.hardtanh(x, -2, 2), torch.abs])
    def test_activations_that_the_target_cannot_fuse_are_not_moved(self, activation: Callable[..., Any]) -> None:
        nodes = annotate(Model(lambda m, x: activation(m.c(x)), c=conv()))
        assert output_spec(nodes["conv2d"]) is not None

    def test_activations_of_a_producer_with_other_readers_are_not_fused(self) -> None:
        def function(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = m.c(x)
            return F.relu(y), y

        nodes = annotate(Model(function, c=conv()))
        assert output_spec(nodes["conv2d"]) is not None
        assert len(input_specs(nodes["relu"])) == 1

    def test_not_after_operators_without_fusion(self) -> None:
        nodes = annotate(Model(lambda _, x: F.relu(F.max_pool2d(x, 2))))
        assert output_spec(nodes["max_pool2d"]) is not None
        assert output_spec(nodes["relu"]) is not None

    def test_only_the_first_of_two_activations_is_fused(self) -> None:
        nodes = annotate(Model(lambda m, x: F.relu(F.relu6(m.c(x))), c=conv()))
        assert output_spec(nodes["conv2d"]) is None
        assert len(input_specs(nodes["relu"])) == 1


def scales(module: GraphModule) -> dict[str, tuple[object, object]]:
    """Returns scale and zero point of each operator's output, by operator."""
    return {
        op_name(node.args[0]): (node.args[1], node.args[2])
        for node in module.graph.nodes
        if is_quantize(node) and isinstance(node.args[0], Node)
    }


class TestSharedGroups:
    @pytest.mark.parametrize(
        "move",
        [
            lambda x: F.max_pool2d(x, 2), lambda x: x.flatten(1), lambda x: x.view(1, -1), lambda x: F.pad(x, (1, 1)),
            lambda x: x.permute(0, 2, 3, 1), lambda x: x.reshape(4, -1), lambda x: F.avg_pool2d(x, 2),
            lambda x: F.hardtanh(x, -2, 2),
        ],
    )  # fmt: skip
    def test_operators_that_move_values_keep_the_qparams_of_their_inputs(self, move: Callable[..., Any]) -> None:
        module = convert(seeded(lambda: Model(lambda m, x: move(m.c(x)), c=conv())), (image(),))
        found = scales(module)
        moved = next(value for name, value in found.items() if name not in ("placeholder", "aten.conv2d.default"))
        assert moved == found["aten.conv2d.default"]

    @pytest.mark.parametrize("change", [torch.abs, lambda x: x.mean((2, 3)), lambda x: F.adaptive_avg_pool2d(x, 1)])
    def test_operators_that_change_the_range_have_own_qparams(self, change: Callable[..., Any]) -> None:
        module = convert(seeded(lambda: Model(lambda m, x: change(F.max_pool2d(m.c(x), 2)), c=conv())), (image(),))
        found = scales(module)
        *_, changed = found.values()  # in graph order
        assert changed != found["aten.max_pool2d.default"]

    def test_ranges_propagate_through_concatenations_and_moves(self) -> None:
        def function(m: Any, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([F.max_pool2d(m.c(x), 2), F.avg_pool2d(m.d(x) * 1, 2)], 1).abs()

        nodes = annotate(Model(function, c=conv(), d=conv()))
        specs = [output_spec(nodes[name]) for name in ("conv2d", "max_pool2d", "avg_pool2d", "cat")]
        assert sum(isinstance(spec, SharedQuantizationSpec) for spec in specs) == 3
        assert isinstance(specs[0], QuantizationSpec)

    def test_a_chain_of_moves_takes_the_range_of_all(self) -> None:
        model = seeded(lambda: Model(lambda m, x: torch.cat([m.c(x), 9 + x.abs()], 1).abs(), c=conv()))
        found = scales(convert(model, (image(),)))
        assert found["aten.cat.default"] == found["aten.conv2d.default"]

    def test_equal_fixed_qparams_are_concatenated_without_requantization(self) -> None:
        model = Model(lambda m, x: torch.cat([torch.sigmoid(m.c(x)), torch.sigmoid(m.d(x))], 1), c=conv(), d=conv())
        found = scales(convert(model.eval(), (image(),)))
        assert found["aten.cat.default"] == (1 / 256, -128)

    def test_different_fixed_qparams_are_requantized(self) -> None:
        def function(m: Any, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([torch.sigmoid(m.c(x)), torch.tanh(x), m.d(x)], 1).abs()

        model = Model(function, c=conv(), d=conv())
        module = convert(model.eval(), (image(),))
        found = scales(module)
        assert found["aten.sigmoid.default"] == (1 / 256, -128)
        assert found["aten.tanh.default"] == (1 / 128, 0)
        (cat,) = (node for node in module.graph.nodes if op_name(node) == "aten.cat.default")
        (read,) = cat.args[:1]
        assert {(node.args[1], node.args[2]) for node in read} == {found["aten.cat.default"]}
        requantized = [node for node in module.graph.nodes if is_quantize(node) and is_dequantize(node.args[0])]
        assert len(requantized) == 2
        assert {row.where for row in lower(module, (image(),)).placement} == {"npu"}

    @pytest.mark.parametrize(
        ("function", "requantized"),
        [
            (lambda m, x: torch.cat([m.c(x), m.d(x)], 1).abs(), 0),
            (lambda m, x: torch.cat([F.max_pool2d(y := m.c(x), 1), y.flip(1)], 1).abs(), 0),
            (lambda m, x: torch.cat([y := m.c(x), m.e(y)], 1).abs(), 1),
            (lambda m, x: torch.cat([F.max_pool2d(y := m.c(x), 3, 1, 1), m.e(y)], 1).abs(), 0),
            (lambda m, x: torch.cat([m.e(torch.cat([y := m.c(x), z := m.d(x)], 1)[:, 2:6]), y, z], 1).abs(), 2),
            (lambda m, x: (y := m.c(x), torch.cat([y, m.d(x)], 1).abs()), 1),
            (lambda m, x: torch.cat([x, m.d(x)], 1).abs(), 0),
            (lambda m, x: torch.maximum(y := m.c(x), m.e(y)), 1),
            (lambda m, x: torch.maximum(y := m.c(x), torch.ones(1)) + m.e(y), 0),
        ],
    )
    def test_values_with_computing_readers_keep_their_range(
        self, function: Callable[..., Any], requantized: int
    ) -> None:
        module = convert(seeded(lambda: Model(function, c=conv(4), d=conv(4), e=nn.Conv2d(4, 4, 1))), (image(),))
        found = [node for node in module.graph.nodes if is_quantize(node) and is_dequantize(node.args[0])]
        assert len(found) == requantized


def _observed(node: Node) -> Node:
    """Returns the value that an observer reads, directly or through other observers."""
    while node.op == "call_module":
        (node,) = node.all_input_nodes
    return node


class TestObservers:
    def test_a_custom_class_sees_activations_and_not_weights(self) -> None:
        module = torch.export.export(seeded(lambda: Model(lambda m, x: F.relu(m.c(x)), c=conv())), (image(),)).module()
        prepared = prepare_pt2e(module, NeutronQuantizer(observer=HistogramObserver))
        kinds = [type(child).__name__ for child in prepared.children()]
        assert kinds.count("HistogramObserver") == 2
        assert kinds.count("WeightObserver") == 1
        prepared(image())
        assert {row.where for row in lower(convert_pt2e(prepared), (image(),)).placement} == {"npu"}

    def test_outputs_of_the_model_keep_their_extremes(self) -> None:
        model = seeded(lambda: Model(lambda m, x: (m.c(y := m.d(x)).flatten(1), F.relu(y)), c=conv(), d=conv()))
        prepared = prepare_pt2e(torch.export.export(model, (image(),)).module(), NeutronQuantizer())
        kinds = {
            str(_observed(node)): type(prepared.get_submodule(node.target)).__name__
            for node in prepared.graph.nodes
            if node.op == "call_module" and "activation_post_process" in node.target
        }
        assert {name: kind for name, kind in kinds.items() if not name.startswith(("c_", "d_"))} == {
            "inputs_0": "DistributionObserver", "conv2d": "DistributionObserver",
            "conv2d_1": "RangeObserver", "flatten": "RangeObserver", "relu": "RangeObserver",
        }  # fmt: skip

    def test_a_chosen_observer_sees_outputs_too(self) -> None:
        module = torch.export.export(seeded(conv), (image(),)).module()
        prepared = prepare_pt2e(module, NeutronQuantizer(observer=DistributionObserver.with_args(range_by="kl")))
        found = [child for child in prepared.children() if isinstance(child, DistributionObserver)]
        assert [child.range_by for child in found] == ["kl", "kl"]
        assert all(child.origin is not None for child in found)

    def test_an_observer_with_arguments(self) -> None:
        observer = HistogramObserver.with_args(bins=64)
        prepared = prepare_pt2e(
            torch.export.export(seeded(conv), (image(),)).module(), NeutronQuantizer(observer=observer)
        )
        bins = {child.bins for child in prepared.children() if isinstance(child, HistogramObserver)}
        assert bins == {64}


class TestUnquantized:
    def warning(self, model: nn.Module, *inputs: torch.Tensor) -> str:
        with pytest.warns(UnquantizedWarning) as caught:
            quantize(model.eval(), inputs or (image(),), [inputs or (image(),)])
        (message,) = (str(item.message) for item in caught if item.category is UnquantizedWarning)
        return message

    def test_the_warning_names_node_operator_line_and_reason(self) -> None:
        message = self.warning(Model(lambda m, x: torch.sin(m.c(x)), c=conv()))
        head, line = message.splitlines()
        assert head == "These operators stay in float:"
        assert re.match(r"  sin \(aten\.sin\.default, /.*\.py:\d+\): ", line)
        assert line.endswith("OpenNeutron has no such operator; docs/operators.md lists those it has.")

    def test_a_limit_is_quoted(self) -> None:
        message = self.warning(Model(lambda m, x: F.max_pool2d(m.c(x), 1, stride=4097), c=conv()))
        assert "The NPU takes max_pool only if: Stride is at most 4096." in message

    def test_a_weight_that_is_computed(self) -> None:
        message = self.warning(Model(lambda m, x, w: m.c(F.conv2d(x, w)), c=conv()), image(), image(4, 4, 1, 1))
        assert "Its weight is computed while the model runs, not a constant." in message

    def test_integers(self) -> None:
        message = self.warning(Model(lambda m, x, i: (m.c(x), i.abs()), c=conv()), image(), torch.arange(5))
        assert "only float32 is quantized" in message

    def test_indices(self) -> None:
        message = self.warning(Model(lambda m, x: m.c(x).argmax(1), c=conv()))
        assert "argmax (aten.argmax.default" in message
        assert message.endswith("It returns torch.int64; only float32 is quantized.")

    def test_a_limit_of_a_decomposition_is_quoted_once(self) -> None:
        message = self.warning(Model(lambda m, x: m.c(x).max(1)[1] * 1.0, c=conv()))
        assert "max over a dimension becomes amax only if: No operator reads its indices." in message
        assert "getitem" not in message

    def test_quantized_models_cause_no_warning(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UnquantizedWarning)
            quantize(seeded(lambda: Model(lambda m, x: F.relu(m.c(x)), c=conv())), (image(),), [image()])

    def test_limits_of_the_legacy_generation_do_not_prevent_quantization(self) -> None:
        nodes = annotate(Model(lambda m, x: m.c(x), c=conv()), image(2, 4, 8, 8))
        assert output_spec(nodes["conv2d"]) is not None


def read_twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.c(x)
    result: torch.Tensor = m.b(y) + y
    return result


class TestTorchaoFolding:
    @pytest.mark.parametrize(
        ("build", "wrong"),
        [
            (lambda: nn.Sequential(conv(), bn(), conv()), False),
            (lambda: nn.Sequential(bn(), conv(), conv()), False),
            (lambda: Model(read_twice, c=conv(), b=bn()), True),
            (lambda: Model(lambda m, x: m.b(m.c(m.a(m.c(x)))), c=conv(), a=bn(), b=bn()), True),
            (lambda: Model(lambda m, x: m.c(m.a(m.c(x))), c=conv(), a=bn()), True),
            (lambda: Model(lambda m, x: m.c(m.c(x)), c=conv()), False),
            (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3), bn()), False),
            (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), bn()), True),
            (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), conv()), False),
        ],
    )
    def test_models_that_torchao_folds_wrongly(self, build: Callable[[], nn.Module], wrong: bool) -> None:
        module = torch.export.export(build().eval(), (image(),)).module()
        assert is_folded_wrongly(module) == wrong

    def test_a_second_protection_does_nothing(self) -> None:
        from torchao.quantization.pt2e import quantize_pt2e

        protect_from_wrong_folding()
        once = quantize_pt2e._fuse_conv_bn_
        protect_from_wrong_folding()
        assert quantize_pt2e._fuse_conv_bn_ is once

    def test_models_that_torchao_folds_correctly_are_left_to_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from openneutron.quantizer import torchao_folding

        def refuse(_: GraphModule) -> bool:
            raise AssertionError

        monkeypatch.setattr(torchao_folding, "fold_batch_norm", refuse)
        convert(seeded(lambda: nn.Sequential(conv(), bn())), (image(),))


class NormAsArithmetic(nn.Module):
    """A batch norm written as a product and a sum."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        self.scale = nn.Buffer(scale.detach().reshape(-1, 1, 1))
        self.shift = nn.Buffer((norm.bias - norm.running_mean * scale).detach().reshape(-1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + self.shift


@pytest.mark.parametrize(("deviation", "floor"), [(1.0, 39.0), (3.0, 36.0)])
@torch.no_grad()
def test_a_batch_norm_is_more_accurate_as_a_convolution_than_as_arithmetic(deviation: float, floor: float) -> None:
    def sqnr(norm: nn.Module) -> float:
        model = nn.Sequential(nn.ReLU(), norm, nn.ReLU()).eval()
        samples = [image(1, 16, 16, 16, seed=sample) * deviation for sample in range(8)]
        quantized = quantize(model, (samples[0],), samples)
        want, got = (torch.cat([module(sample) for sample in samples]) for module in (model, quantized.module))
        return float(10 * torch.log10(want.square().sum() / (got - want).square().sum()))

    norms = [seeded(lambda: trained(nn.BatchNorm2d(16)), seed) for seed in range(4)]
    found, others = [sqnr(norm) for norm in norms], [sqnr(NormAsArithmetic(norm)) for norm in norms]
    assert min(found) > floor
    assert sum(found) > sum(others)


def test_batch_norm_is_folded_before_weights_are_quantized() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(4, 4, 3), trained(nn.BatchNorm2d(4)), nn.ReLU()))
    short, documented = quantize(model, (image(),), [image()]).module, convert(model, (image(),))
    assert len(qparams(short)) == len(qparams(documented))
    torch.testing.assert_close(short(image()), documented(image()), atol=0.05, rtol=0)


def test_every_annotation_is_seen() -> None:
    nodes = annotate(Model(lambda m, x: torch.sin(F.relu(m.c(x))), c=conv()))
    module = nodes["conv2d"].graph.owning_module
    assert module is not None
    assert [node.name for node in annotated(module)] == ["conv2d", "relu"]
