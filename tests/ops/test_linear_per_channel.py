"""Linears whose weight has one scale per output: accuracy, IR, limits, shared weights, recovery, both flows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.fidelity import signal_to_noise
from tests.flow_support import convert, lower_documented, seeded, worst_lsb
from tests.graphs import kinds, partition_graphs
from tests.net import golden
from tests.oracle import Function, agreement, everything_on_the_npu, lowered, quantized, samples_like
from torch import nn

from openneutron import NeutronQuantizer, QuantizedModel, lower, quantize
from openneutron.core.fx import op_name
from openneutron.ir.cost import cycles_of
from openneutron.ir.graph import Graph
from openneutron.ir.text import dump
from openneutron.targets import TARGETS

Shape = tuple[int, ...]

PER_CHANNEL: dict[str, Any] = {"weight_granularity": "per_channel"}
FACTORS = torch.logspace(-2, 0.5, 12)


def rows() -> torch.Tensor:
    """Returns a weight [12, 16] whose rows have different ranges."""
    return torch.randn(12, 16, generator=torch.Generator().manual_seed(1)) * FACTORS[:, None]


def linear(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight, bias)


def addmm(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.addmm(bias, x, weight.T)


def mm(weight: torch.Tensor, _: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, weight.T)


def matmul(weight: torch.Tensor, _: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x @ weight.T


PRODUCTS: dict[str, tuple[Callable[..., torch.Tensor], Shape, Shape]] = {
    "linear": (linear, (12,), (3, 16)),
    "linear of rank 1": (linear, (12,), (16,)),
    "linear of rank 4": (linear, (12,), (2, 1, 3, 16)),
    "linear with a bias [1, p]": (linear, (1, 12), (3, 16)),
    "addmm": (addmm, (12,), (3, 16)),
    "addmm with a bias [1, p]": (addmm, (1, 12), (3, 16)),
    "mm": (mm, (12,), (3, 16)),
    "matmul": (matmul, (12,), (2, 3, 16)),
}


def product(name: str) -> tuple[nn.Module, Shape]:
    function, bias, shape = PRODUCTS[name]
    constant = torch.randn(bias, generator=torch.Generator().manual_seed(2)) * FACTORS
    return Function(function, rows(), constant), shape


def scales(model: QuantizedModel) -> list[bool]:
    """Returns, for each layer in order, whether its weight has several scales."""
    layers = ("aten.linear.default", "aten.addmm.default", "aten.mm.default")
    return [
        any("per_channel" in op_name(operand) for operand in node.all_input_nodes)
        for node in model.module.graph.nodes
        if op_name(node) in layers
    ]


class TestBothFlows:
    @pytest.mark.parametrize("recover", [None, "fast"])
    @pytest.mark.parametrize("name", PRODUCTS)
    def test_each_product(self, name: str, recover: str | None) -> None:
        model, shape = product(name)
        quantized_model = quantized(model, (shape,), recover=recover, **PER_CHANNEL)
        assert scales(quantized_model) == [True]
        program = lowered(quantized_model)
        assert everything_on_the_npu(program)
        assert agreement(program, quantized_model).worst <= 1
        (graph,) = partition_graphs(quantized_model)
        assert [kind for kind in kinds(graph) if kind != "RESHAPE"] == ["CONV_2D"]

    @pytest.mark.parametrize("name", PRODUCTS)
    def test_each_product_in_the_documented_flow(self, name: str) -> None:
        model, shape = product(name)
        samples = samples_like((shape,), 4, 0, (0.0, 1.0))
        converted = convert(model, samples[0], quantizer=NeutronQuantizer(**PER_CHANNEL), calibration=samples)
        program = lower_documented(converted, samples[0])
        assert (program.delegates, program.cpu) == (1, [])
        assert worst_lsb(converted, program.run, samples) <= 1

    @pytest.mark.parametrize("activation", [F.relu, F.relu6, torch.tanh])
    def test_an_activation_after_a_linear_per_channel(self, activation: Callable[..., torch.Tensor]) -> None:
        model = quantized(Function(lambda layer, x: activation(layer(x)), nn.Linear(16, 12)), ((3, 16),), **PER_CHANNEL)
        assert agreement(lowered(model), model).worst <= 1
        (graph,) = partition_graphs(model)
        is_fused = activation is not torch.tanh
        assert [kind for kind in kinds(graph) if kind != "RESHAPE"] == ["CONV_2D", *([] if is_fused else ["TANH"])]

    @pytest.mark.parametrize("target", sorted(TARGETS))
    def test_each_target(self, target: str) -> None:
        model = quantized(nn.Linear(13, 5), ((3, 13),), target=target, **PER_CHANNEL)
        assert everything_on_the_npu(lowered(model))


def with_a_quiet_feature(shape: Shape, count: int) -> list[tuple[torch.Tensor, ...]]:
    """Returns inputs whose first feature is small."""
    return [(x * torch.tensor([0.02, *[1.0] * (shape[-1] - 1)]),) for (x,) in samples_like((shape,), count, 0, (0, 1))]


class TestAccuracy:
    """One output reads a small feature with a large weight, so one scale for all outputs is coarse."""

    def decibels(self, model: nn.Module, shape: Shape, **options: Any) -> float:
        samples = with_a_quiet_feature(shape, 24)
        program = lower(quantize(model, samples[0], samples, **options))
        return signal_to_noise(program.run, model, samples[:8])

    @pytest.mark.parametrize("recover", [None, "fast"])
    def test_a_linear(self, recover: str | None) -> None:
        model = seeded(lambda: nn.Linear(16, 12))
        with torch.no_grad():
            model.get_parameter("weight")[0, 0] = 20
        coarse, fine = (
            self.decibels(model, (4, 16), recover=recover, weight_granularity=granularity)
            for granularity in ("per_tensor", "per_channel")
        )
        assert fine > coarse + 6, (coarse, fine)

    def test_gates_of_an_lstm(self) -> None:
        model = seeded(lambda: Function(lambda part, x: part(x)[0], nn.LSTM(8, 16, batch_first=True)))
        with torch.no_grad():
            model.get_parameter("part0.weight_ih_l0")[0, 0] = 20
        coarse, fine = (
            self.decibels(model, (1, 3, 8), recover=None, weight_granularity=granularity)
            for granularity in ("per_tensor", "per_channel")
        )
        assert fine > coarse + 5, (coarse, fine)


def ir(model: QuantizedModel) -> str:
    """Returns the IR of the only partition without qparams."""
    (graph,) = partition_graphs(model)
    return "\n".join(_without_qparams(line) for line in dump(graph).splitlines())


def _without_qparams(line: str) -> str:
    head, *parts = line.split(" q")
    return head + "".join(part[part.index(")" if part.startswith("(") else "]") + 1 :] for part in parts)


class TestIR:
    def test_after_an_image(self) -> None:
        """The order of the features is folded into the filters, so nothing is transposed."""

        def function(conv: nn.Module, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return layer(F.relu(conv(x)).flatten(1))  # type: ignore[no-any-return]

        model = quantized(Function(function, nn.Conv2d(8, 4, 1), nn.Linear(24, 5)), ((1, 8, 2, 3),), **PER_CHANNEL)
        (graph,) = partition_graphs(model, use_neutron_for_format_conversion=False)
        assert kinds(graph) == ["CONV_2D", "RESHAPE", "CONV_2D", "RESHAPE"]
        assert agreement(lowered(model), model).worst <= 1

    def test_layers_in_sequence(self) -> None:
        layers = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 2))
        assert ir(quantized(layers, ((3, 4),), **PER_CHANNEL)) == golden("""
            input %0: 3x4 int8
            %1: 1x3x1x4 int8 = RESHAPE(%0) new_shape=(1,3,1,4)
            %4: 1x3x1x6 int8 = CONV_2D(%1, c2: 6x1x1x4 int8, c3: 6 int32) dilation_h_factor=1 dilation_w_factor=1 fused_activation_function=RELU padding=VALID stride_h=1 stride_w=1
            %7: 1x3x1x6 int8 = CONV_2D(%4, c5: 6x1x1x6 int8, c6: 6 int32) dilation_h_factor=1 dilation_w_factor=1 padding=VALID stride_h=1 stride_w=1
            %8: 1x3x1x6 int8 = LOGISTIC(%7)
            %11: 1x3x1x2 int8 = CONV_2D(%8, c9: 2x1x1x6 int8, c10: 2 int32) dilation_h_factor=1 dilation_w_factor=1 padding=VALID stride_h=1 stride_w=1
            %12: 3x2 int8 = RESHAPE(%11) new_shape=(3,2)
            output %12
        """)  # noqa: E501

    @pytest.mark.parametrize("target", ["imxrt700", "mcxn94x", "imx95"])
    @pytest.mark.parametrize("shape", [(1, 16), (5, 13), (2, 3, 40)])
    def test_a_linear_per_channel_takes_the_cycles_of_a_fully_connected(self, shape: Shape, target: str) -> None:
        def products(granularity: str) -> Graph:
            layer = nn.Linear(shape[-1], 11)
            (graph,) = partition_graphs(quantized(layer, (shape,), target=target, weight_granularity=granularity))
            return graph

        one, several = products("per_tensor"), products("per_channel")
        cycles = [
            cycles_of((op for op in graph.ops if op.kind.name in ("FULLY_CONNECTED", "CONV_2D")), TARGETS[target])
            for graph in (one, several)
        ]
        assert cycles[0] == cycles[1]

    @pytest.mark.slow
    @pytest.mark.parametrize("network", [nn.LSTM, nn.GRU])
    def test_steps_of_a_recurrent_network_need_no_reshapes(self, network: Any) -> None:
        torch.manual_seed(0)
        model = Function(lambda part, x: part(x)[0], network(5, 8))
        graph, longer = (partition_graphs(quantized(model, ((steps, 1, 5),), **PER_CHANNEL))[0] for steps in (2, 3))
        assert kinds(graph).count("RESHAPE") == kinds(longer).count("RESHAPE")
        (coarse,) = partition_graphs(quantized(model, ((3, 1, 5),)))
        assert len(longer.ops) <= len(coarse.ops) + 5

    def test_one_scale_gives_a_fully_connected(self) -> None:
        (graph,) = partition_graphs(quantized(nn.Linear(16, 12), ((3, 16),)))
        assert kinds(graph) == ["FULLY_CONNECTED"]


class TestLimits:
    FEATURES = 65528  # the largest multiple of 8 up to 65535

    @pytest.mark.parametrize(("features", "several"), [(FEATURES, True), (FEATURES + 1, False)])
    def test_more_features_than_a_convolution_accumulates_have_one_scale(self, features: int, several: bool) -> None:
        model = quantized(nn.Linear(features, 2), ((1, features),), **PER_CHANNEL)
        assert scales(model) == [several]
        program = lowered(model)
        assert everything_on_the_npu(program)
        assert agreement(program, model).worst <= 1

    def test_limits_do_not_apply_to_scales_of_another_quantizer(self) -> None:
        quantized_ops: Any = torch.ops.quantized_decomposed
        features = self.FEATURES + 1
        activation = (0.05, 3, -128, 127, torch.int8)

        def function(codes: torch.Tensor, steps: torch.Tensor, zeros: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            weight = quantized_ops.dequantize_per_channel(codes, steps, zeros, 0, -127, 127, torch.int8)
            x = quantized_ops.dequantize_per_tensor(quantized_ops.quantize_per_tensor(x, *activation), *activation)
            y = quantized_ops.quantize_per_tensor(F.linear(x, weight), *activation)
            return quantized_ops.dequantize_per_tensor(y, *activation)  # type: ignore[no-any-return]

        codes = torch.randint(-127, 128, (2, features), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
        constants = codes, torch.tensor([1e-5, 1e-4]), torch.zeros(2, dtype=torch.int64)
        example = samples_like(((1, features),), 1, 0, (0.0, 1.0))[0]
        exported = torch.export.export(Function(function, *constants), example)
        program = lower(QuantizedModel(exported.module(), example, "imxrt700"))
        reasons = {row.op: row.reason for row in program.placement if row.where == "cpu"}
        assert "per channel only if: The features, rounded up to a multiple of" in str(reasons["aten.linear.default"])

    @pytest.mark.parametrize(("flavor", "where"), [("SDK_25_06", "cpu"), ("SDK_25_09", "npu"), ("3.1.1", "npu")])
    @pytest.mark.parametrize("name", ["linear", "addmm with a bias [1, p]", "mm"])
    def test_old_converters(self, name: str, flavor: str, where: str) -> None:
        model, shape = product(name)
        quantized_model = quantized(model, (shape,), **PER_CHANNEL)
        program = lowered(quantized_model, neutron_converter_flavor=flavor)
        (row,) = (row for row in program.placement if row.op.startswith(f"aten.{name.split(' ', maxsplit=1)[0]}"))
        assert row.where == where
        assert where == "npu" or "SDK_25_09 is the first that supports both" in str(row.reason)
        assert agreement(program, quantized_model).worst <= 1

    def test_channels_that_the_legacy_generation_pads(self) -> None:
        def function(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return layer(F.max_pool2d(x, 2).flatten(1))  # type: ignore[no-any-return]

        model = quantized(Function(function, nn.Linear(5 * 4, 3)), ((1, 5, 4, 4),), **PER_CHANNEL)
        program = lowered(model, neutron_converter_flavor="SDK_25_09")
        assert everything_on_the_npu(program)
        assert agreement(program, model).worst <= 1
        (graph,) = partition_graphs(model, neutron_converter_flavor="SDK_25_09")
        assert "SLICE" not in kinds(graph)


class TestSharedWeights:
    @pytest.mark.parametrize(("network", "recover"), [(nn.LSTM, "fast"), (nn.GRU, None), (nn.RNN, "fast")])
    def test_steps_store_a_weight_once(self, network: Any, recover: str | None) -> None:
        layer = seeded(lambda: Function(lambda part, x: part(x)[0], network(5, 8)))
        model = quantized(layer, ((3, 1, 5),), recover=recover, **PER_CHANNEL)
        assert all(scales(model))
        (graph,) = partition_graphs(model)
        weights = {id(op.inputs[1]) for op in graph.ops if op.kind.name == "CONV_2D"}
        assert len(weights) == (2 if network is nn.RNN else 4)  # an LSTM and a GRU have two products
        assert "FULLY_CONNECTED" not in kinds(graph)
        program = lowered(model)
        assert everything_on_the_npu(program)
        assert agreement(program, model).worst <= 2

    def test_readers_of_both_orders_share_one_scale(self) -> None:
        """An autoencoder may multiply by a weight and by its transpose, which have other output channels."""
        model = Function(lambda weight, x: F.linear(F.relu(torch.mm(x, weight)), weight), rows())
        quantized_model = quantized(model, ((3, 12),), **PER_CHANNEL)
        assert scales(quantized_model) == [False, False]
        assert everything_on_the_npu(lowered(quantized_model))

    def test_rows_of_zeros(self) -> None:
        weight = torch.cat([torch.zeros(3, 16), rows()])
        model = quantized(Function(lambda weight, x: F.linear(x, weight), weight), ((3, 16),), **PER_CHANNEL)
        program = lowered(model)
        assert agreement(program, model).worst <= 1
        assert torch.equal(program.run(torch.randn(3, 16))[:, :3], torch.zeros(3, 3))


class TestNetworks:
    NETWORKS: tuple[tuple[Callable[[], nn.Module], Shape], ...] = (
        (lambda: nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0), (1, 5, 16)),
        (
            lambda: Function(lambda part, x: part(x, x, x)[0], nn.MultiheadAttention(16, 2, batch_first=True)),
            (1, 5, 16),
        ),
        (lambda: Function(lambda part, x: part(x)[0], nn.LSTM(16, 8, bidirectional=True)), (2, 1, 16)),
        (lambda: Function(lambda part, x: part(x)[0], nn.LSTMCell(16, 8)), (1, 16)),
        (lambda: Function(lambda part, x: part(x, x * 2), nn.Bilinear(16, 16, 3)), (2, 16)),
        (lambda: Function(lambda w, x: torch.einsum("bti,io->bto", x, w), torch.randn(16, 7)), (2, 3, 16)),
        (lambda: nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)), (3, 16)),
    )

    @pytest.mark.parametrize("number", range(len(NETWORKS)))
    def test_all_linears_have_several_scales(self, number: int) -> None:
        build, shape = self.NETWORKS[number]
        model = quantized(seeded(build), (shape,), recover="fast", **PER_CHANNEL)
        assert scales(model)
        assert all(scales(model))
        program = lowered(model)
        assert everything_on_the_npu(program)
        assert agreement(program, model).worst <= 2
        (estimated,) = {layer.operator for layer in program.estimate().layers} & {"CONV_2D", "FULLY_CONNECTED"}
        assert estimated == "CONV_2D"
