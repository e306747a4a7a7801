"""Passes of the IR as text before and after, and `verify`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tests.net import FULLY, INT8, INT32, NO_ACTIVATION, TO_NCHW, TO_NHWC, Net, Q, constant, golden, text

from openneutron.ir.graph import Array, Graph, Kind, Op, QParams, Tensor
from openneutron.ir.kinds import ABS, ADD, CONCATENATION, FULLY_CONNECTED, MEAN, PAD, RELU, RESHAPE, SLICE, TRANSPOSE
from openneutron.ir.layout import propagate_layouts
from openneutron.ir.rewrites import (
    copy_unwritten_outputs,
    eliminate_dead_code,
    hoist_format_conversions,
    hoisted_ends,
    share_constants,
    transpose_as_images,
)
from openneutron.ir.verify import IRError, verify


def sunk(graph: Graph) -> str:
    return text(verify(propagate_layouts(graph), "propagate_layouts"))


class TestSinkViews:
    def test_rule_1_views_that_cancel_emit_nothing(self) -> None:
        net = Net()
        x = net.transpose(net.input(1, 2, 3, 4), *TO_NHWC)
        y = net.relu(net.transpose(net.reshape(net.reshape(x, 12, 2), 1, 3, 4, 2), *TO_NCHW))
        assert sunk(net.returns(y)) == golden("""
            input %0: 1x2x3x4
            %1: 1x2x3x4 = RELU(%0)
            output %1
        """)

    def test_rule_1_a_chain_of_moves_is_emitted_as_one_move(self) -> None:
        net = Net()
        x = net.transpose(net.transpose(net.input(2, 3, 4), 1, 0, 2), 2, 0, 1)
        assert sunk(net.returns(x)) == golden("""
            input %0: 2x3x4
            %1: 4x3x2 = TRANSPOSE(%0) perm=(2,1,0)
            output %1
        """)

    def test_rule_2_elementwise_operator_passes_its_view_on(self) -> None:
        net = Net()
        x, y = (net.transpose(net.input(1, 3, 4, 2), *TO_NCHW) for _ in range(2))
        assert sunk(net.returns(net.transpose(net.add(x, y), *TO_NHWC))) == golden("""
            input %0: 1x3x4x2
            input %1: 1x3x4x2
            %2: 1x3x4x2 = ADD(%0, %1)
            output %2
        """)

    def test_rule_2_broadcast_operand_follows(self) -> None:
        net = Net()
        x = net.transpose(net.input(1, 3, 4, 2), *TO_NCHW)
        assert sunk(net.returns(net.transpose(net.add(x, constant(2, 1, 1)), *TO_NHWC))) == golden("""
            input %0: 1x3x4x2
            %2: 1x3x4x2 = ADD(%0, c1: 1x1x1x2)
            output %2
        """)

    def test_rule_2_any_view_passes_an_operator_on_equal_shapes(self) -> None:
        net = Net()
        x = net.reshape(net.transpose(net.input(2, 3, 4), 1, 0, 2), 3, 8)
        y = net.transpose(net.reshape(net.relu(x), 3, 2, 4), 1, 0, 2)
        assert sunk(net.returns(y)) == golden("""
            input %0: 2x3x4
            %1: 2x3x4 = RELU(%0)
            output %1
        """)

    def test_rule_2_not_if_the_other_operand_cannot_follow(self) -> None:
        net = Net()
        x = net.reshape(net.transpose(net.input(2, 3, 4), 1, 0, 2), 3, 8)
        assert sunk(net.returns(net.add(x, net.input(8)))) == golden("""
            input %0: 2x3x4
            input %1: 8
            %2: 3x2x4 = TRANSPOSE(%0) perm=(1,0,2)
            %3: 3x8 = RESHAPE(%2) new_shape=(3,8)
            %4: 3x8 = ADD(%3, %1)
            output %4
        """)

    def test_rule_2_not_if_both_other_input_and_output_would_move(self) -> None:
        net = Net()
        x, y = net.input(3, 4), net.input(4, 3)
        assert sunk(net.returns(net.relu(net.add(x, net.transpose(y, 1, 0))))) == golden("""
            input %0: 3x4
            input %1: 4x3
            %2: 3x4 = TRANSPOSE(%1) perm=(1,0)
            %3: 3x4 = ADD(%0, %2)
            %4: 3x4 = RELU(%3)
            output %4
        """)

    def test_rule_2_if_readers_prefer_the_order_of_the_view(self) -> None:
        net = Net()
        x, y = net.input(3, 4), net.input(4, 3)
        assert sunk(net.returns(net.transpose(net.add(x, net.transpose(y, 1, 0)), 1, 0))) == golden("""
            input %0: 3x4
            input %1: 4x3
            %2: 4x3 = TRANSPOSE(%0) perm=(1,0)
            %3: 4x3 = ADD(%2, %1)
            output %3
        """)

    def test_rule_3_axes_are_renumbered(self) -> None:
        net = Net()
        x = net.transpose(net.input(1, 3, 4, 2), *TO_NCHW)
        mean = net.op(MEAN, [x], (1, 2), axes=(2, 3), keep_dims=False)
        both = net.op(CONCATENATION, [x, x], (1, 4, 3, 4), axis=1, **NO_ACTIVATION)
        pad = net.op(PAD, [x], (1, 2, 6, 4), paddings=((0, 0), (0, 0), (1, 2), (0, 0)))
        part = net.op(SLICE, [x], (1, 1, 3, 4), begin=(0, 1, 0, 0), size=(1, 1, 3, 4))
        outputs = [mean, *(net.transpose(tensor, *TO_NHWC) for tensor in (both, pad, part))]
        assert sunk(net.returns(*outputs)) == golden("""
            input %0: 1x3x4x2
            %1: 1x2 = MEAN(%0) axes=(1,2) keep_dims=False
            %2: 1x3x4x4 = CONCATENATION(%0, %0) axis=3
            %3: 1x6x4x2 = PAD(%0) paddings=((0,0),(1,2),(0,0),(0,0))
            %4: 1x3x4x1 = SLICE(%0) begin=(0,0,0,1) size=(1,3,4,1)
            output %1
            output %2
            output %3
            output %4
        """)

    def test_rule_3_not_for_a_view_that_splits_a_dimension(self) -> None:
        net = Net()
        x = net.reshape(net.input(6, 4), 2, 3, 4)
        assert sunk(net.returns(net.op(MEAN, [x], (2, 4), axes=(1,), keep_dims=False))) == golden("""
            input %0: 6x4
            %1: 2x3x4 = RESHAPE(%0) new_shape=(2,3,4)
            %2: 2x4 = MEAN(%1) axes=(1,) keep_dims=False
            output %2
        """)

    def test_rule_5_weight_takes_the_features_in_stored_order(self) -> None:
        net = Net()
        flat = net.reshape(net.transpose(net.input(1, 2, 2, 3), *TO_NCHW), 1, 12)
        bias = Tensor((1,), INT32, Q, np.zeros(1, np.int32))
        weight = constant(1, 12)
        graph = propagate_layouts(net.returns(net.op(FULLY_CONNECTED, [flat, weight, bias], (1, 1), **FULLY)))
        assert text(graph) == golden("""
            input %0: 1x2x2x3
            %1: 1x12 = RESHAPE(%0) new_shape=(1,12)
            %4: 1x1 = FULLY_CONNECTED(%1, c2: 1x12, c3: 1 int32 q(0.5, 0)) keep_num_dims=False weights_format=DEFAULT
            output %4
        """)
        permuted = np.asarray(graph.ops[1].inputs[1].data).reshape(2, 2, 3)
        np.testing.assert_array_equal(permuted, np.arange(12).reshape(3, 2, 2).transpose(1, 2, 0))

    def test_rule_5_not_if_rows_and_features_mix(self) -> None:
        net = Net()
        rows = net.transpose(net.input(3, 2), 1, 0)
        bias = Tensor((1,), INT32, Q, np.zeros(1, np.int32))
        assert sunk(net.returns(net.op(FULLY_CONNECTED, [rows, constant(1, 3), bias], (2, 1), **FULLY))) == golden("""
            input %0: 3x2
            %1: 2x3 = TRANSPOSE(%0) perm=(1,0)
            %4: 2x1 = FULLY_CONNECTED(%1, c2: 1x3, c3: 1 int32 q(0.5, 0)) keep_num_dims=False weights_format=DEFAULT
            output %4
        """)

    def test_rule_6_operator_with_fixed_order_gets_its_view_once(self) -> None:
        net = Net()
        x = net.transpose(net.input(1, 2, 3, 4), *TO_NHWC)
        assert sunk(net.returns(net.pool(x), net.pool(x))) == golden("""
            input %0: 1x2x3x4
            %1: 1x3x4x2 = TRANSPOSE(%0) perm=(0,2,3,1)
            %2: 1x3x4x2 = MAX_POOL_2D(%1) filter_height=1 filter_width=1 padding=VALID stride_h=1 stride_w=1
            %3: 1x3x4x2 = MAX_POOL_2D(%1) filter_height=1 filter_width=1 padding=VALID stride_h=1 stride_w=1
            output %2
            output %3
        """)

    def test_rule_7_view_of_a_constant_is_a_constant(self) -> None:
        net = Net()
        graph = propagate_layouts(net.returns(net.add(net.input(3, 2), net.transpose(constant(2, 3), 1, 0))))
        assert text(graph) == golden("""
            input %0: 3x2
            %2: 3x2 = ADD(%0, c1: 3x2)
            output %2
        """)
        np.testing.assert_array_equal(np.asarray(graph.ops[0].inputs[1].data), np.arange(6).reshape(2, 3).T)


class TestRewrites:
    def test_dead_operators_are_removed(self) -> None:
        net = Net()
        x = net.input(4)
        net.relu(net.relu(x))
        alive = net.op(ABS, [x], (4,))
        assert text(eliminate_dead_code(net.returns(alive))) == golden("""
            input %0: 4
            %1: 4 = ABS(%0)
            output %1
        """)

    def test_equal_constants_are_merged(self) -> None:
        net = Net()
        y = net.add(net.add(net.input(4), constant(4)), constant(4))
        assert text(share_constants(net.returns(net.add(y, constant(4, start=1))))) == golden("""
            input %0: 4
            %2: 4 = ADD(%0, c1: 4)
            %3: 4 = ADD(%2, c1: 4)
            %5: 4 = ADD(%3, c4: 4)
            output %5
        """)

    @pytest.mark.parametrize(
        "other",
        [
            Tensor((4,), INT8, QParams.per_tensor(0.25, 0), np.arange(4, dtype=np.int8)),
            Tensor((1, 4), INT8, Q, np.arange(4, dtype=np.int8).reshape(1, 4)),
            Tensor((1,), INT32, Q, np.arange(4, dtype=np.int8).view(np.int32)),
        ],
        ids=["qparams", "shape", "dtype"],
    )
    def test_constants_that_only_share_bytes_stay(self, other: Tensor) -> None:
        x = Tensor((4,), INT8, Q)
        op = Op(FULLY_CONNECTED, (x, constant(4), other), Tensor((4,), INT8, Q))
        inputs = share_constants(Graph((x,), (op.output,), (op,))).ops[0].inputs
        assert inputs[1] is not inputs[2]

    def test_outputs_that_nothing_writes_are_copied(self) -> None:
        net = Net()
        x = net.input(4)
        y = net.relu(x)
        graph = verify(copy_unwritten_outputs(Graph((x,), (y, x, y, constant(2)), tuple(net.ops))), "copies")
        assert text(graph) == golden("""
            input %0: 4
            %1: 4 = RELU(%0)
            %2: 4 = RESHAPE(%0) new_shape=(4,)
            %3: 4 = RESHAPE(%1) new_shape=(4,)
            %5: 2 = RESHAPE(c4: 2) new_shape=(2,)
            output %1
            output %2
            output %3
            output %5
        """)

    def test_outputs_that_are_written_stay(self) -> None:
        net = Net()
        graph = net.returns(net.relu(net.input(4)))
        assert text(copy_unwritten_outputs(graph)) == text(graph)

    def test_format_conversions_at_the_edges_are_hoisted(self) -> None:
        net = Net()
        x = net.input(1, 2, 3, 4)
        y = net.pool(net.transpose(x, *TO_NHWC))
        before = net.returns(net.transpose(y, *TO_NCHW))
        graph = hoist_format_conversions(before)
        assert hoisted_ends(before, graph) == ((True,), (True,))
        assert text(graph) == golden("""
            input %0: 1x3x4x2
            %1: 1x3x4x2 = MAX_POOL_2D(%0) filter_height=1 filter_width=1 padding=VALID stride_h=1 stride_w=1
            output %1
        """)

    def test_format_conversions_that_are_not_alone_stay(self) -> None:
        net = Net()
        x = net.input(1, 2, 3, 4)
        y = net.transpose(net.pool(net.transpose(x, *TO_NHWC)), *TO_NCHW)
        before = net.returns(y, net.relu(x), net.relu(y))
        graph = hoist_format_conversions(before)
        assert hoisted_ends(before, graph) == ((False,), (False, False, False))
        assert text(graph) == text(before)

    def test_transposes_as_images_rule_1_two_runs_are_swapped(self) -> None:
        net = Net()
        x = net.transpose(net.input(1, 2, 3, 4), *TO_NHWC)
        assert text(transpose_as_images(net.returns(net.transpose(x, 2, 3, 0, 1)))) == golden("""
            input %0: 1x2x3x4
            %1: 1x2x1x12 = RESHAPE(%0) new_shape=(1,2,1,12)
            %2: 1x12x2x1 = TRANSPOSE(%1) perm=(0,3,1,2)
            %3: 1x3x4x2 = RESHAPE(%2) new_shape=(1,3,4,2)
            %4: 1x3x1x8 = RESHAPE(%2) new_shape=(1,3,1,8)
            %5: 1x8x3x1 = TRANSPOSE(%4) perm=(0,3,1,2)
            %6: 4x2x1x3 = RESHAPE(%5) new_shape=(4,2,1,3)
            output %6
        """)

    def test_transposes_as_images_rule_1_not_for_images_and_other_permutations(self) -> None:
        net = Net()
        net.transpose(net.input(1, 2, 3, 4), *TO_NCHW)
        net.transpose(net.input(2, 2, 3, 4), *TO_NCHW)
        graph = net.returns(net.transpose(net.input(2, 3, 4), 0, 2, 1))
        assert text(transpose_as_images(graph)) == text(graph)

    def test_transposes_as_images_rule_2_reshapes_read_through(self) -> None:
        net = Net()
        x = net.reshape(net.relu(net.input(2, 3, 4)), 6, 4)
        graph = net.returns(net.reshape(net.transpose(x, 1, 0), 2, 12))
        assert text(eliminate_dead_code(transpose_as_images(graph))) == golden("""
            input %0: 2x3x4
            %1: 2x3x4 = RELU(%0)
            %2: 1x6x1x4 = RESHAPE(%1) new_shape=(1,6,1,4)
            %3: 1x4x6x1 = TRANSPOSE(%2) perm=(0,3,1,2)
            %4: 2x12 = RESHAPE(%3) new_shape=(2,12)
            output %4
        """)


def single(kind: Kind, inputs: Sequence[Tensor], output: Tensor, **attrs: Any) -> Graph:
    op = Op(kind, tuple(inputs), output, attrs, "node_7")
    read = tuple(dict.fromkeys(tensor for tensor in inputs if tensor.data is None))
    return Graph(read, (output,), (op,))


def tensor(*shape: int, qparams: QParams = Q, data: Array | None = None) -> Tensor:
    return Tensor(shape, INT8, qparams, data)


def never_written() -> Graph:
    return Graph((), (written := tensor(2),), (Op(RELU, (tensor(2),), written, {}, "node_7"),))


def written_twice() -> Graph:
    x, y = tensor(2), tensor(2)
    return Graph((x,), (y,), (Op(RELU, (x,), y), Op(ABS, (x,), y, {}, "node_7")))


FAULTS = {
    "reads a tensor that no operator wrote": never_written(),
    "writes a tensor twice": written_twice(),
    "has a tensor of shape (0, 2)": single(RELU, [tensor(0, 2)], tensor(0, 2)),
    "has a tensor without a zero point for each scale": single(RELU, [tensor(2, qparams=QParams((), ()))], tensor(2)),
    "has a scale that is not positive": single(RELU, [tensor(2, qparams=QParams((0.0,), (0,)))], tensor(2)),
    "has a constant of another shape or dtype than its tensor": single(
        ADD, [tensor(2), tensor(2, data=np.zeros(3, np.int8))], tensor(2)
    ),
    "has output shape (2, 3) for inputs [(2, 3)] with {'perm': (1, 0)}": single(
        TRANSPOSE, [tensor(2, 3)], tensor(2, 3), perm=(1, 0)
    ),
    "has output shape (2, 2) for inputs [(2, 3)] with {'perm': (0, 0)}": single(
        TRANSPOSE, [tensor(2, 3)], tensor(2, 2), perm=(0, 0)
    ),
    "has output shape (7,) for inputs [(2, 3)] with {'new_shape': (7,)}": single(
        RESHAPE, [tensor(2, 3)], tensor(7), new_shape=(7,)
    ),
    "has output shape (6,) for inputs [(2, 3)] with {'new_shape': (3,)}": single(
        RESHAPE, [tensor(2, 3)], tensor(6), new_shape=(3,)
    ),
    "has output shape (3, 3) for inputs [(2,), (3, 1)] with {}": single(ADD, [tensor(2), tensor(3, 1)], tensor(3, 3)),
    "has output shape (3,) for inputs [(2,), (3,)] with {}": single(ADD, [tensor(2), tensor(3)], tensor(3)),
    "has output shape (2,) for inputs [(2,)] with {'axes': (1,)}": single(MEAN, [tensor(2)], tensor(2), axes=(1,)),
    "has output shape (2,) for inputs [(2,)] with {'paddings': ()}": single(PAD, [tensor(2)], tensor(2), paddings=()),
}


class TestVerify:
    @pytest.mark.parametrize("message", FAULTS)
    def test_fault_is_named(self, message: str) -> None:
        with pytest.raises(IRError) as raised:
            verify(FAULTS[message], "here")
        assert str(raised.value).startswith(f"after here: {FAULTS[message].ops[-1].kind.name} {message}")
        assert raised.value.node == "node_7"

    def test_output_that_nothing_wrote(self) -> None:
        with pytest.raises(IRError, match="after here: an output that no operator wrote"):
            verify(Graph((), (tensor(2),), ()), "here")
