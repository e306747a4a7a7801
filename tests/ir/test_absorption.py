"""`absorb_padding`: each rule as text, and equal results in LiteRT."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.net import FULLY, INT32, NO_ACTIVATION, Net, Q, constant, golden, text
from tests.runtime_models import litert

from openneutron.formats import tflite
from openneutron.ir.absorption import absorb_padding
from openneutron.ir.graph import Graph, QParams, Tensor
from openneutron.ir.kinds import CONCATENATION, CONV_2D, FULLY_CONNECTED, PAD, SLICE
from openneutron.ir.rewrites import copy_unwritten_outputs, eliminate_dead_code
from openneutron.ir.verify import verify
from openneutron.targets import TARGETS

TARGET = TARGETS["imxrt700"]
CONV: dict[str, Any] = {
    **NO_ACTIVATION,
    "padding": "VALID", "stride_h": 1, "stride_w": 1, "dilation_h_factor": 1, "dilation_w_factor": 1,
}  # fmt: skip


class Channels(Net):
    """Builds padding and slices of the last dimension, and operators with weights."""

    def pad(self, tensor: Tensor, channels: int) -> Tensor:
        more = channels - tensor.shape[-1]
        paddings = (*(((0, 0),) * (len(tensor.shape) - 1)), (0, more))
        return self.op(PAD, [tensor], (*tensor.shape[:-1], channels), paddings=paddings)

    def first(self, tensor: Tensor, channels: int, begin: int = 0) -> Tensor:
        size = (*tensor.shape[:-1], channels)
        return self.op(SLICE, [tensor], size, begin=(*((0,) * (len(size) - 1)), begin), size=size)

    def conv(self, tensor: Tensor, channels: int, weight: Tensor | None = None, kernel: int = 1) -> Tensor:
        batch, height, width, inputs = tensor.shape
        weight = weight or filters(channels, kernel, kernel, inputs)
        shape = (batch, height - kernel + 1, width - kernel + 1, channels)
        return self.op(CONV_2D, [tensor, weight, bias(channels)], shape, **CONV)

    def linear(self, rows: Tensor, outputs: int) -> Tensor:
        weight = filters(outputs, rows.shape[1])
        return self.op(FULLY_CONNECTED, [rows, weight, bias(outputs)], (rows.shape[0], outputs), **FULLY)


def filters(*shape: int) -> Tensor:
    data = (np.arange(np.prod(shape)) % 5 + 1).astype(np.int8).reshape(shape)
    return Tensor(shape, data.dtype, QParams.per_tensor(0.01, 0), data)


def bias(size: int) -> Tensor:
    return Tensor((size,), INT32, QParams.per_tensor(0.005, 0), np.arange(size, dtype=np.int32))


def absorbed(graph: Graph) -> str:
    """Returns the text after the pass, with constants by their shapes only."""
    result = eliminate_dead_code(verify(absorb_padding(graph, TARGET), "absorb_padding"))
    short = text(result).replace(" int8 q(0.01, 0)", "").replace(" int32 q(0.005, 0)", "")
    lines = (line.split(" dilation")[0].split(" keep_num")[0].split(" filter_h")[0] for line in short.splitlines())
    return "\n".join(lines)


class TestRules:
    def test_rule_1_padding_that_restores_a_slice_is_removed(self) -> None:
        net = Channels()
        x = net.first(net.pool(net.input(1, 3, 3, 8)), 5)
        assert absorbed(net.returns(net.first(net.pool(net.pad(x, 8)), 5))) == golden("""
            input %0: 1x3x3x8
            %1: 1x3x3x8 = MAX_POOL_2D(%0)
            %2: 1x3x3x8 = MAX_POOL_2D(%1)
            %3: 1x3x3x5 = SLICE(%2) begin=(0,0,0,0) size=(1,3,3,5)
            output %3
        """)

    def test_rule_1_through_operators_that_keep_channels_apart(self) -> None:
        net = Channels()
        x = net.pad(net.first(net.input(1, 2, 2, 8), 5), 8)
        both = net.op(CONCATENATION, [net.relu(x), net.add(x, x)], (1, 2, 4, 8), axis=2, **NO_ACTIVATION)
        assert "PAD" not in absorbed(net.returns(net.first(both, 5)))

    @pytest.mark.parametrize(
        "reader", ["output", "slice of more", "concatenation", "convolution", "slice from the end"]
    )
    def test_rule_1_keeps_padding_that_a_result_depends_on(self, reader: str) -> None:
        net = Channels()
        x = net.pad(net.first(net.pool(net.input(1, 2, 2, 8)), 5), 8)
        if reader == "slice of more":
            x = net.first(x, 6)
        elif reader == "concatenation":
            x = net.first(net.op(CONCATENATION, [x, x], (1, 2, 2, 16), axis=3, **NO_ACTIVATION), 5)
        elif reader == "convolution":
            x = net.conv(x, 4)
        elif reader == "slice from the end":
            x = net.first(x, 2, begin=5)
        assert "PAD" in absorbed(net.returns(x))

    def test_rule_1_padding_before_zero_weights_is_removed(self) -> None:
        net = Channels()
        x = net.pad(net.first(net.pool(net.input(1, 2, 2, 8)), 5), 8)
        data = np.pad(np.asarray(filters(4, 1, 1, 5).data), [(0, 0)] * 3 + [(0, 3)])
        assert "PAD" not in absorbed(net.returns(net.conv(x, 4, Tensor(data.shape, data.dtype, Q, data))))

    def test_rule_2_filters_of_zeros_pad(self) -> None:
        net = Channels()
        graph = net.returns(net.pool(net.pad(net.conv(net.input(1, 4, 4, 3), 5, kernel=3), 8)))
        assert absorbed(graph) == golden("""
            input %0: 1x4x4x3
            %3: 1x2x2x8 = CONV_2D(%0, c1: 8x3x3x3, c2: 8)
            %4: 1x2x2x8 = MAX_POOL_2D(%3)
            output %4
        """)

    def test_rule_2_rows_of_zeros_pad(self) -> None:
        net = Channels()
        assert absorbed(net.returns(net.relu(net.pad(net.linear(net.input(2, 6), 5), 8)))) == golden("""
            input %0: 2x6
            %3: 2x8 = FULLY_CONNECTED(%0, c1: 8x6, c2: 8)
            %4: 2x8 = RELU(%3)
            output %4
        """)

    def test_rule_2_scales_per_channel_go_on(self) -> None:
        net = Channels()
        weight = filters(2, 1, 1, 3)
        weight.qparams = QParams((0.01, 0.02), (0, 0), 0)
        graph = absorb_padding(net.returns(net.pad(net.conv(net.input(1, 2, 2, 3), 2, weight), 4)), TARGET)
        (conv,) = graph.ops
        assert conv.inputs[1].qparams == QParams((0.01, 0.02, 0.02, 0.02), (0, 0, 0, 0), 0)
        assert not np.asarray(conv.inputs[1].data)[2:].any()

    def test_rule_2_keeps_convolutions_with_other_readers(self) -> None:
        net = Channels()
        x = net.conv(net.input(1, 2, 2, 3), 5)
        assert "PAD" in absorbed(net.returns(net.pool(net.pad(x, 8)), net.relu(x)))

    def test_rule_2_keeps_padding_that_is_cheaper(self) -> None:
        net = Channels()
        x = net.conv(net.input(1, 32, 32, 64), 8, kernel=3)
        assert "PAD" in absorbed(net.returns(net.pad(x, 64)))

    def test_rule_3_weights_of_zero_slice(self) -> None:
        net = Channels()
        x = net.first(net.pool(net.input(1, 3, 3, 8)), 5)
        assert absorbed(net.returns(net.conv(x, 4, kernel=2), net.conv(x, 2))) == golden("""
            input %0: 1x3x3x8
            %1: 1x3x3x8 = MAX_POOL_2D(%0)
            %4: 1x2x2x4 = CONV_2D(%1, c2: 4x2x2x8, c3: 4)
            %7: 1x3x3x2 = CONV_2D(%1, c5: 2x1x1x8, c6: 2)
            output %4
            output %7
        """)

    def test_rule_3_of_rows(self) -> None:
        net = Channels()
        assert absorbed(net.returns(net.linear(net.first(net.relu(net.input(2, 8)), 5), 3))) == golden("""
            input %0: 2x8
            %1: 2x8 = RELU(%0)
            %4: 2x3 = FULLY_CONNECTED(%1, c2: 3x8, c3: 3)
            output %4
        """)

    def test_rule_3_keeps_products_that_would_cost_more(self) -> None:
        net = Channels()
        x = net.first(net.relu(net.input(1, 32, 32, 256)), 8)
        assert "SLICE" in absorbed(net.returns(net.conv(x, 64, kernel=3)))

    def test_rule_3_not_for_later_channels(self) -> None:
        net = Channels()
        x = net.first(net.relu(net.input(1, 3, 3, 8)), 5, begin=2)
        assert "SLICE" in absorbed(net.returns(net.conv(x, 4)))

    def test_rule_4_through_a_reshape_to_rows(self) -> None:
        net = Channels()
        x = net.reshape(net.first(net.pool(net.input(1, 2, 3, 8)), 5), 1, 30)
        graph = net.returns(net.linear(x, 4))
        assert absorbed(graph) == golden("""
            input %0: 1x2x3x8
            %1: 1x2x3x8 = MAX_POOL_2D(%0)
            %2: 1x48 = RESHAPE(%1) new_shape=(1,48)
            %5: 1x4 = FULLY_CONNECTED(%2, c3: 4x48, c4: 4)
            output %5
        """)

    def test_rule_4_not_for_rows_that_cut_through_channels(self) -> None:
        net = Channels()
        x = net.reshape(net.first(net.pool(net.input(1, 2, 3, 8)), 5), 10, 3)
        assert "SLICE" in absorbed(net.returns(net.linear(x, 4)))

    def test_all_rules_remove_operators_between_convolutions(self) -> None:
        net = Channels()
        x = net.conv(net.input(1, 6, 6, 3), 12, kernel=3)
        x = net.first(net.pool(net.pad(x, 16)), 12)
        x = net.first(net.pool(net.pad(x, 16)), 12)
        assert absorbed(net.returns(net.conv(x, 5))) == golden("""
            input %0: 1x6x6x3
            %3: 1x4x4x16 = CONV_2D(%0, c1: 16x3x3x3, c2: 16)
            %4: 1x4x4x16 = MAX_POOL_2D(%3)
            %5: 1x4x4x16 = MAX_POOL_2D(%4)
            %8: 1x4x4x5 = CONV_2D(%5, c6: 5x1x1x16, c7: 5)
            output %8
        """)


@st.composite
def graphs(draw: Any) -> Graph:
    """Returns chains and forks of padding, slices and other operators."""
    net = Channels()
    values = [net.input(1, 2, 2, draw(st.sampled_from([3, 5, 8])))]
    for _ in range(draw(st.integers(3, 10))):
        value = draw(st.sampled_from(values[-3:]))
        channels = value.shape[-1]
        kind = draw(st.sampled_from(["pad", "first", "first", "later", "pool", "relu", "add", "conv", "cat", "linear"]))
        if kind == "pad":
            values.append(net.pad(value, channels + draw(st.integers(1, 5))))
        elif kind == "first" and channels > 1:
            values.append(net.first(value, draw(st.integers(1, channels - 1))))
        elif kind == "later" and channels > 1:
            values.append(net.first(value, channels - 1, begin=1))
        elif kind == "pool":
            values.append(net.pool(value))
        elif kind == "relu":
            values.append(net.relu(value))
        elif kind == "add":
            values.append(net.add(value, draw(st.sampled_from([v for v in values if v.shape == value.shape]))))
        elif kind == "conv":
            values.append(net.conv(value, draw(st.integers(1, 6))))
        elif kind == "cat":
            values.append(net.op(CONCATENATION, [value, value], (1, 2, 2, 2 * channels), axis=3, **NO_ACTIVATION))
        elif kind == "linear":
            flat = net.linear(net.reshape(value, 1, 4 * channels), 8)
            values.append(net.reshape(flat, 1, 2, 2, 2))
    return net.returns(values[-1], draw(st.sampled_from(values[1:] or values)))


@given(graphs(), st.integers(0, 1000))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_absorption_does_not_change_results(graph: Graph, seed: int) -> None:
    generator = np.random.default_rng(seed)
    inputs = [generator.integers(-128, 128, tensor.shape, dtype=np.int8) for tensor in graph.inputs]
    after = eliminate_dead_code(verify(absorb_padding(graph, TARGET), "absorb_padding"))
    before, after = (verify(copy_unwritten_outputs(each), "copies") for each in (graph, after))
    assert len(after.ops) <= len(before.ops)
    expected = litert(tflite.write(before), *inputs)
    for found, wanted in zip(litert(tflite.write(after), *inputs), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_second_time_changes_nothing() -> None:
    net = Channels()
    x = net.first(net.pool(net.pad(net.conv(net.input(1, 4, 4, 3), 5, kernel=3), 8)), 5)
    once = eliminate_dead_code(absorb_padding(net.returns(net.conv(x, 4), net.add(x, constant(5))), TARGET))
    assert text(eliminate_dead_code(absorb_padding(once, TARGET))) == text(once)
