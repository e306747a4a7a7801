"""`extend_kernels`: the rule as text, and equal results in LiteRT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tests.graphs import kinds, partition_graphs
from tests.net import INT32, NO_ACTIVATION, Net, golden, text
from tests.oracle import quantized
from tests.runtime_models import litert

from openneutron.formats import tflite
from openneutron.ir.graph import Graph, Kind, QParams, Tensor
from openneutron.ir.kernel_extension import extend_kernels
from openneutron.ir.kinds import CONV_2D, DEPTHWISE_CONV_2D, PAD
from openneutron.ir.rewrites import eliminate_dead_code
from openneutron.ir.verify import verify
from openneutron.ir.windows import Window
from openneutron.targets import TARGETS

IMX95 = TARGETS["imx95"]

Pair = tuple[int, int]


class Padded(Net):
    """Builds PADs of height and width, and convolutions without padding."""

    def pad(self, nhwc: Tensor, height: Pair, width: Pair, channels: Pair = (0, 0)) -> Tensor:
        paddings = ((0, 0), height, width, channels)
        shape = [size + sum(pair) for size, pair in zip(nhwc.shape, paddings, strict=True)]
        return self.op(PAD, [nhwc], shape, paddings=paddings)

    def conv(
        self, nhwc: Tensor, kernel: Pair, stride: Pair, dilation: Pair = (1, 1), outputs: int | None = None
    ) -> Tensor:
        """A depthwise convolution unless `outputs` is given."""
        batch, *sizes, channels = nhwc.shape
        extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        outs = [(size - extent) // s + 1 for size, extent, s in zip(sizes, extents, stride, strict=True)]
        kind: Kind = DEPTHWISE_CONV_2D if outputs is None else CONV_2D
        weight = filters(1, *kernel, channels) if outputs is None else filters(outputs, *kernel, channels)
        last = channels if outputs is None else outputs
        bias = Tensor((last,), INT32, QParams.per_tensor(0.005, 0), np.arange(last, dtype=np.int32))
        attrs: dict[str, Any] = {
            **NO_ACTIVATION, "padding": "VALID", "stride_h": stride[0], "stride_w": stride[1],
            "dilation_h_factor": dilation[0], "dilation_w_factor": dilation[1],
        }  # fmt: skip
        if outputs is None:
            attrs["depth_multiplier"] = 1
        return self.op(kind, [nhwc, weight, bias], (batch, *outs, last), **attrs)


def filters(*shape: int) -> Tensor:
    data = (np.arange(np.prod(shape)) % 7 - 3).astype(np.int8).reshape(shape)
    return Tensor(shape, data.dtype, QParams.per_tensor(0.01, 0), data)


def extended(graph: Graph, target: str = "imx95") -> Graph:
    return eliminate_dead_code(verify(extend_kernels(graph, TARGETS[target]), "extend_kernels"))


def lines(graph: Graph) -> str:
    """Returns the text of a graph, with constants by their shapes only."""
    short = text(graph).replace(" int8 q(0.01, 0)", "").replace(" int32 q(0.005, 0)", "")
    return "\n".join(line.split(" depth")[0].split(" dilation")[0] for line in short.splitlines())


def test_a_kernel_with_a_stride_gets_a_row_and_a_column_of_zeros() -> None:
    net = Padded()
    graph = extended(net.returns(net.conv(net.pad(net.input(1, 32, 32, 64), (1, 0), (1, 0)), (3, 3), (2, 2))))
    assert lines(graph) == golden("""
        input %0: 1x32x32x64
        %3: 1x16x16x64 = DEPTHWISE_CONV_2D(%0, c1: 1x4x4x64, c2: 64)
        output %3
    """)
    (conv,) = graph.ops
    weight = np.asarray(conv.inputs[1].data)
    assert conv.attrs["padding"] == "SAME"
    assert not weight[:, 3].any()
    assert not weight[:, :, 3].any()


def test_padding_at_the_start_only() -> None:
    net = Padded()
    causal = net.pad(net.input(1, 1, 64, 64), (0, 0), (2, 0))
    (conv,) = extended(net.returns(net.conv(causal, (1, 2), (1, 1), (1, 2)))).ops
    assert np.asarray(conv.inputs[1].data)[0, 0, :, 0].tolist() == [-3, -2, 0]


def test_scales_of_channels_stay() -> None:
    net = Padded()
    output = net.conv(net.pad(net.input(1, 32, 32, 64), (1, 0), (1, 0)), (3, 3), (2, 2))
    weight = net.ops[-1].inputs[1]
    weight.qparams = QParams((0.01,) * 64, (0,) * 64, 3)
    assert extended(net.returns(output)).ops[0].inputs[1].qparams == weight.qparams


def test_all_convolutions_that_read_one_padding() -> None:
    net = Padded()
    padded = net.pad(net.input(1, 32, 32, 64), (1, 0), (1, 0))
    graph = extended(net.returns(net.conv(padded, (3, 3), (2, 2)), net.conv(padded, (3, 3), (2, 2))))
    assert [op.kind.name for op in graph.ops] == ["DEPTHWISE_CONV_2D"] * 2


@pytest.mark.parametrize(
    "reason", ["another reader", "output", "channels", "outputs", "cost", "products", "depthwise products", "qparams"]
)
def test_the_padding_stays(reason: str) -> None:
    net = Padded()
    size = (1, 32, 32, 512) if reason == "products" else (1, 32, 32, 64)
    image = net.input(*size)
    padded = net.pad(image, (1, 0), (1, 0), (0, 8) if reason == "channels" else (0, 0))
    outputs = [net.conv(padded, (3, 3), (2, 2))]
    if reason == "another reader":
        outputs.append(net.relu(padded))
    elif reason == "output":
        outputs.append(padded)
    elif reason == "outputs":  # SAME would give 17 outputs
        outputs = [net.conv(net.pad(net.input(1, 33, 33, 64), (1, 0), (1, 0)), (5, 5), (2, 2))]
    elif reason == "products":
        outputs = [net.conv(net.pad(image, (9, 8), (9, 8)), (11, 11), (2, 2), outputs=8)]
    elif reason == "depthwise products":  # 66 x 66 x 16 is more than 65535
        outputs = [net.conv(net.pad(net.input(1, 64, 64, 16), (1, 0), (1, 0)), (63, 63), (64, 64))]
    elif reason == "qparams":
        padded.qparams = QParams.per_tensor(0.25, 1)
    graph = net.returns(*outputs)
    found = extended(graph, "mcxn94x" if reason == "cost" else "imx95")
    assert [op.kind.name for op in found.ops] == [op.kind.name for op in eliminate_dead_code(graph).ops]


@pytest.mark.parametrize(("target", "has_slice"), [("imx95", False), ("imxrt700", True)])
def test_transposed_convolutions_with_output_padding(target: str, has_slice: bool) -> None:
    """A larger kernel replaces the crop if the target needs fewer cycles for it."""
    model = torch.nn.ConvTranspose2d(32, 16, 3, 2, 1, output_padding=1)
    (graph,) = partition_graphs(quantized(model, ((1, 32, 32, 32),), target=target))
    (conv,) = (op for op in graph.ops if op.kind.name == "TRANSPOSE_CONV")
    assert ("SLICE" in kinds(graph)) == has_slice
    assert conv.inputs[0].shape[1:3] == ((3, 3) if has_slice else (4, 4))


@pytest.mark.parametrize(
    ("window", "zeros"),
    [
        (Window(size=32, outputs=16, kernel=3, stride=2, dilation=1, padding_before=1), (0, 1)),
        (Window(size=32, outputs=32, kernel=3, stride=1, dilation=1, padding_before=1), (0, 0)),
        (Window(size=32, outputs=32, kernel=3, stride=1, dilation=2, padding_before=4), (0, 2)),
        (Window(size=32, outputs=32, kernel=3, stride=1, dilation=1, padding_before=0), (1, 0)),
        (Window(size=33, outputs=16, kernel=3, stride=2, dilation=1, padding_before=0), None),
        (Window(size=32, outputs=32, kernel=2, stride=1, dilation=3, padding_before=0), (1, 0)),
    ],
)
def test_fewest_zeros(window: Window, zeros: Pair | None) -> None:
    assert window.zeros_for_same() == zeros


@dataclass(frozen=True)
class Axis:
    """The windows of a convolution along one dimension."""

    size: int
    kernel: int
    stride: int
    dilation: int
    padding: Pair


@st.composite
def axes(draw: Any) -> Axis:
    """Returns windows with the number of outputs of SAME."""
    size, kernel = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    before = draw(st.integers(0, 4))
    reach = (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1
    return Axis(size, kernel, stride, dilation, (before, max(0, reach - size - before)))


@given(axes(), axes(), st.sampled_from([None, 4]), st.integers(0, 1000))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_extension_does_not_change_results(vertical: Axis, horizontal: Axis, outputs: int | None, seed: int) -> None:
    net = Padded()
    image = net.input(2, vertical.size, horizontal.size, 4)
    padded = net.pad(image, vertical.padding, horizontal.padding)
    kernel, stride = (vertical.kernel, horizontal.kernel), (vertical.stride, horizontal.stride)
    graph = net.returns(net.conv(padded, kernel, stride, (vertical.dilation, horizontal.dilation), outputs))
    after = extended(graph)
    event(f"{len(graph.ops) - len(after.ops)} operators fewer")
    codes = np.random.default_rng(seed).integers(-128, 128, image.shape, dtype=np.int8)
    (found,), (expected,) = litert(tflite.write(after), codes), litert(tflite.write(graph), codes)
    np.testing.assert_array_equal(found, expected)
