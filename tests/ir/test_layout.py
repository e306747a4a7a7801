"""Rules 3, 4 and 8 of `propagate_layouts`: the dimensions of operators with axes, and layout preferences."""

from __future__ import annotations

import numpy as np
import pytest
from tests.net import INT8, INT32, NO_ACTIVATION, TO_NCHW, TO_NHWC, Net, Q, constant, golden, text

from openneutron.ir.build import optimize
from openneutron.ir.graph import Graph, Op, QParams, Tensor
from openneutron.ir.kinds import CONCATENATION, PAD, SLICE
from openneutron.ir.layout import propagate_layouts
from openneutron.ir.layout_preferences import layout_preferences
from openneutron.ir.rewrites import eliminate_common_subexpressions, merge_slices
from openneutron.ir.unit_dimensions import map_unit_dimensions
from openneutron.ir.verify import verify
from openneutron.ir.views import View


def sunk(graph: Graph) -> str:
    return text(verify(propagate_layouts(graph), "propagate_layouts"))


def part(net: Net, tensor: Tensor, dim: int, first: int, count: int) -> Tensor:
    size = tuple(count if other == dim else length for other, length in enumerate(tensor.shape))
    begin = tuple(first if other == dim else 0 for other in range(len(size)))
    return net.op(SLICE, [tensor], size, begin=begin, size=size)


def nchw(net: Net, *nhwc: int) -> Tensor:
    """Returns an input stored as NHWC, in torch's dimension order."""
    return net.transpose(net.input(*nhwc), *TO_NCHW)


def shuffled(net: Net, tensor: Tensor, groups: int) -> Tensor:
    """Shuffles channels of groups: a view that is not a transpose of whole dimensions."""
    n, c, h, w = tensor.shape
    split = net.reshape(tensor, n, groups, c // groups, h, w)
    return net.reshape(net.transpose(split, 0, 2, 1, 3, 4), n, c, h, w)


class TestBlocks:
    def test_rule_3_dimensions_that_a_reshape_makes(self) -> None:
        net = Net()
        groups = net.reshape(nchw(net, 1, 3, 4, 6), 1, 2, 3, 3, 4)
        first = net.reshape(part(net, groups, 1, 0, 1), 1, 3, 3, 4)
        assert sunk(net.returns(net.pool(net.transpose(first, *TO_NHWC)))) == golden("""
            input %0: 1x3x4x6
            %1: 1x3x4x2x3 = RESHAPE(%0) new_shape=(1,3,4,2,3)
            %2: 1x3x4x1x3 = SLICE(%1) begin=(0,0,0,0,0) size=(1,3,4,1,3)
            %3: 1x3x4x3 = RESHAPE(%2) new_shape=(1,3,4,3)
            %4: 1x3x4x3 = MAX_POOL_2D(%3) filter_height=1 filter_width=1 padding=VALID stride_h=1 stride_w=1
            output %4
        """)

    def test_rule_3_a_unit_dimension_stays_after_its_predecessor(self) -> None:
        net = Net()
        spread = net.reshape(nchw(net, 1, 3, 4, 2), 1, 2, 3, 1, 4)
        twice = net.op(CONCATENATION, [spread, spread], (1, 2, 3, 2, 4), axis=3, **NO_ACTIVATION)
        rows = net.transpose(net.reshape(twice, 1, 2, 6, 4), *TO_NHWC)
        assert sunk(net.returns(rows)) == golden("""
            input %0: 1x3x4x2
            %1: 1x3x1x4x2 = RESHAPE(%0) new_shape=(1,3,1,4,2)
            %2: 1x3x2x4x2 = CONCATENATION(%1, %1) axis=2
            %3: 1x6x4x2 = RESHAPE(%2) new_shape=(1,6,4,2)
            output %3
        """)

    def test_rule_3_not_for_dimensions_of_nonadjacent_atoms(self) -> None:
        view = View.identity(Tensor((6, 4), constant(1).dtype, constant(1).qparams)).reshaped((2, 3, 4))
        assert view is not None
        mixed = view.permuted((1, 0, 2)).reshaped((6, 4))
        assert mixed is not None
        assert mixed.block_order() is None
        assert view.permuted((2, 0, 1)).block_order() == (1, 2, 0)


class TestWishes:
    def test_rule_4_transposes_give_the_order_that_readers_prefer(self) -> None:
        net = Net()
        x = shuffled(net, nchw(net, 1, 3, 4, 4), 2)
        pooled = [net.pool(net.transpose(part(net, x, 1, first, 2), *TO_NHWC)) for first in (0, 2)]
        assert sunk(net.returns(*pooled)) == golden("""
            input %0: 1x3x4x4
            %1: 12x2x2 = RESHAPE(%0) new_shape=(12,2,2)
            %2: 12x2x2 = TRANSPOSE(%1) perm=(0,2,1)
            %3: 1x3x4x4 = RESHAPE(%2) new_shape=(1,3,4,4)
            %4: 1x3x4x2 = SLICE(%3) begin=(0,0,0,0) size=(1,3,4,2)
            %5: 1x3x4x2 = MAX_POOL_2D(%4) filter_height=1 filter_width=1 padding=VALID stride_h=1 stride_w=1
            %6: 1x3x4x2 = SLICE(%3) begin=(0,0,0,2) size=(1,3,4,2)
            %7: 1x3x4x2 = MAX_POOL_2D(%6) filter_height=1 filter_width=1 padding=VALID stride_h=1 stride_w=1
            output %5
            output %7
        """)

    def test_rule_4_otherwise_the_transpose_stays_near_its_place(self) -> None:
        net = Net()
        x = shuffled(net, nchw(net, 1, 3, 4, 8), 2)
        again = shuffled(net, part(net, x, 1, 0, 4), 2)
        ops = propagate_layouts(net.returns(net.pool(net.transpose(again, *TO_NHWC)))).ops
        assert [op.kind.name for op in ops] == [
            "RESHAPE", "TRANSPOSE", "RESHAPE", "SLICE", "RESHAPE", "TRANSPOSE", "RESHAPE", "MAX_POOL_2D"
        ]  # fmt: skip
        assert ops[3].output.shape == (1, 3, 4, 4)

    def test_rule_4_one_transpose_of_an_input_replaces_several_later_ones(self) -> None:
        net = Net()
        x = net.input(1, 4, 2, 3)
        pooled = [net.pool(net.transpose(part(net, x, 1, first, 2), *TO_NHWC)) for first in (0, 2)]
        assert sunk(net.returns(*pooled)) == golden("""
            input %0: 1x4x2x3
            %1: 1x2x3x4 = TRANSPOSE(%0) perm=(0,2,3,1)
            %2: 1x2x3x2 = SLICE(%1) begin=(0,0,0,0) size=(1,2,3,2)
            %3: 1x2x3x2 = MAX_POOL_2D(%2) filter_height=1 filter_width=1 padding=VALID stride_h=1 stride_w=1
            %4: 1x2x3x2 = SLICE(%1) begin=(0,0,0,2) size=(1,2,3,2)
            %5: 1x2x3x2 = MAX_POOL_2D(%4) filter_height=1 filter_width=1 padding=VALID stride_h=1 stride_w=1
            output %3
            output %5
        """)

    def test_rule_4_and_of_an_output(self) -> None:
        net = Net()
        x = nchw(net, 1, 2, 3, 4)
        assert sunk(net.returns(part(net, x, 1, 0, 2), part(net, x, 1, 2, 2))) == golden("""
            input %0: 1x2x3x4
            %1: 1x4x2x3 = TRANSPOSE(%0) perm=(0,3,1,2)
            %2: 1x2x2x3 = SLICE(%1) begin=(0,0,0,0) size=(1,2,2,3)
            %3: 1x2x2x3 = SLICE(%1) begin=(0,2,0,0) size=(1,2,2,3)
            output %2
            output %3
        """)

    def test_rule_4_counts_a_value_read_twice_by_one_operator_once(self) -> None:
        net = Net()
        x = net.transpose(net.input(2, 2), 1, 0)
        twice = net.op(CONCATENATION, [x, x], (4, 2), axis=0, **NO_ACTIVATION)
        assert text(propagate_layouts(net.returns(twice, net.relu(x)))) == golden("""
            input %0: 2x2
            %1: 2x2 = TRANSPOSE(%0) perm=(1,0)
            %2: 4x2 = CONCATENATION(%1, %1) axis=0
            %3: 2x2 = RELU(%1)
            output %2
            output %3
        """)

    def test_rule_4_not_if_more_bytes_would_move(self) -> None:
        net = Net()
        x = nchw(net, 1, 2, 3, 9)
        graph = propagate_layouts(net.returns(part(net, x, 1, 0, 2), part(net, x, 1, 2, 2)))
        assert [op.kind.name for op in graph.ops] == ["SLICE", "SLICE", "TRANSPOSE", "TRANSPOSE"]

    def test_rule_4_not_for_a_single_reader(self) -> None:
        net = Net()
        x = net.input(1, 4, 2, 3)
        graph = propagate_layouts(net.returns(net.pool(net.transpose(part(net, x, 1, 0, 2), *TO_NHWC))))
        assert [op.kind.name for op in graph.ops] == ["SLICE", "TRANSPOSE", "MAX_POOL_2D"]

    def test_rule_4_moves_of_unit_dimensions_are_free(self) -> None:
        net = Net()
        planes = [net.reshape(part(net, nchw(net, 1, 3, 4, 2), 1, 0, 1), 1, 3, 4) for _ in range(2)]
        images = [net.reshape(plane, 1, 1, 3, 4) for plane in planes]
        both = net.op(CONCATENATION, images, (1, 2, 3, 4), axis=1, **NO_ACTIVATION)
        graph = propagate_layouts(net.returns(net.pool(net.transpose(both, *TO_NHWC))))
        assert [op.kind.name for op in graph.ops] == ["SLICE", "SLICE", "CONCATENATION", "MAX_POOL_2D"]

    def test_preferences_propagate_through_operators_of_any_order(self) -> None:
        net = Net()
        x = net.input(1, 4, 2, 3)
        padded = net.op(PAD, [x], (1, 4, 3, 3), paddings=((0, 0), (0, 0), (1, 0), (0, 0)))
        found = layout_preferences(net.returns(net.pool(net.transpose(net.relu(padded), *TO_NHWC)), net.relu(x)))
        assert found[id(padded)].preferred_order == TO_NHWC
        assert dict(found[id(x)].readers) == {TO_NHWC: 1, (0, 1, 2, 3): 1}
        assert dict(found[id(x)].elements) == {TO_NHWC: 36, (0, 1, 2, 3): 24}


def rows_of(net: Net, count: int, features: int) -> Tensor:
    """Adds the product of a linear with scales per channel, and returns it as [count, features]."""
    filters = constant(features, 1, 1, 2)
    bias = Tensor((features,), INT32, Q, np.zeros(features, np.int32))
    return net.reshape(net.convolved_rows(net.input(1, count, 1, 2), filters, bias), count, features)


class TestOtherUnits:
    """Rule 8."""

    def test_slices_of_a_linear_that_a_linear_reads(self) -> None:
        net = Net()
        gates = rows_of(net, 1, 4)
        state = net.add(part(net, gates, 1, 0, 2), part(net, net.relu(gates), 1, 2, 2))
        bias = Tensor((2,), INT32, Q, np.zeros(2, np.int32))
        product = net.convolved_rows(net.reshape(state, 1, 1, 1, 2), constant(2, 1, 1, 2), bias)
        graph = propagate_layouts(net.returns(product))
        assert [op.kind.name for op in graph.ops] == ["CONV_2D", "SLICE", "RELU", "SLICE", "ADD", "CONV_2D"]
        first, second = (op.attrs for op in graph.ops if op.kind is SLICE)
        assert (first["begin"], first["size"]) == ((0, 0, 0, 0), (1, 1, 1, 2))
        assert second["begin"] == (0, 0, 0, 2)

    def test_steps_are_concatenated_to_rows(self) -> None:
        net = Net()
        steps = [net.reshape(rows_of(net, 1, 4), 1, 1, 4) for _ in range(3)]
        both = net.op(CONCATENATION, steps, (1, 3, 4), axis=1, **NO_ACTIVATION)
        graph = propagate_layouts(net.returns(both))
        assert [op.kind.name for op in graph.ops] == ["CONV_2D", "CONV_2D", "CONV_2D", "CONCATENATION", "RESHAPE"]
        assert graph.ops[3].output.shape == (1, 3, 1, 4)
        assert graph.ops[3].attrs["axis"] == 1

    def test_padding(self) -> None:
        net = Net()
        padded = net.op(PAD, [rows_of(net, 3, 4)], (6, 4), paddings=((1, 2), (0, 0)))
        graph = propagate_layouts(net.returns(net.reshape(padded, 1, 6, 1, 4)))
        assert [op.kind.name for op in graph.ops] == ["CONV_2D", "PAD"]
        assert graph.ops[1].attrs["paddings"] == ((0, 0), (1, 2), (0, 0), (0, 0))

    def test_one_reshape_for_several_outputs(self) -> None:
        net = Net()
        gates = rows_of(net, 3, 4)
        graph = propagate_layouts(net.returns(*(part(net, gates, 1, begin, 1) for begin in range(4))))
        assert [op.kind.name for op in graph.ops] == ["CONV_2D", "RESHAPE", *["SLICE"] * 4]

    def test_not_without_a_linear_of_several_scales(self) -> None:
        net = Net()
        gates = net.reshape(net.pool(net.input(1, 3, 1, 4)), 3, 4)
        graph = propagate_layouts(net.returns(net.reshape(part(net, gates, 1, 0, 2), 1, 3, 1, 2)))
        assert [op.kind.name for op in graph.ops] == ["MAX_POOL_2D", "RESHAPE", "SLICE", "RESHAPE"]

    def test_concatenation_of_operands_with_one_and_with_several_rows(self) -> None:
        net = Net()
        both = net.op(CONCATENATION, [rows_of(net, 1, 4), rows_of(net, 3, 4)], (4, 4), axis=0, **NO_ACTIVATION)
        graph = propagate_layouts(net.returns(net.reshape(both, 1, 4, 1, 4)))
        assert [op.kind.name for op in graph.ops] == ["CONV_2D", "CONV_2D", "CONCATENATION"]
        assert graph.ops[2].attrs["axis"] == 1

    @pytest.mark.parametrize(
        ("stored", "shape", "axis"),
        [
            (((1, 3, 1, 4), (3, 1, 1, 4)), (3, 4), 0),  # the rows are another dimension
            (((1, 1, 4), (1, 1, 4)), (1, 4, 1), 2),  # no dimension follows the features
        ],
    )
    def test_unit_dimensions_that_do_not_correspond(
        self, stored: tuple[tuple[int, ...], ...], shape: tuple[int, ...], axis: int
    ) -> None:
        views = [_must(View.identity(Tensor(sizes, INT8, Q)).reshaped(shape)) for sizes in stored]
        output = tuple(2 * size if dim == axis else size for dim, size in enumerate(shape))
        op = Op(CONCATENATION, tuple(view.stored for view in views), Tensor(output, INT8, Q), {"axis": axis})
        assert map_unit_dimensions(op, views) is None


def _must(view: View | None) -> View:
    assert view is not None
    return view


class TestSharing:
    def test_equal_operators_are_merged(self) -> None:
        net = Net()
        x = net.input(2, 4)
        first, again, other = (part(net, x, 1, begin, 2) for begin in (0, 0, 2))
        assert text(
            eliminate_common_subexpressions(net.returns(net.add(first, other), net.add(again, other), again))
        ) == golden("""
            input %0: 2x4
            %1: 2x2 = SLICE(%0) begin=(0,0) size=(2,2)
            %2: 2x2 = SLICE(%0) begin=(0,2) size=(2,2)
            %3: 2x2 = ADD(%1, %2)
            output %3
            output %3
            output %1
        """)

    def test_not_with_other_qparams(self) -> None:
        net = Net()
        x = net.input(4)
        first, second = net.relu(x), net.relu(x)
        second.qparams = QParams.per_tensor(0.25, 0)
        assert len(eliminate_common_subexpressions(net.returns(first, second)).ops) == 2

    def test_slices_of_slices_are_merged(self) -> None:
        net = Net()
        inner = part(net, part(net, net.input(4, 6), 0, 1, 3), 1, 2, 3)
        assert text(optimize(net.returns(part(net, inner, 0, 1, 1)))) == golden("""
            input %0: 4x6
            %1: 1x3 = SLICE(%0) begin=(2,2) size=(1,3)
            output %1
        """)

    def test_a_slice_that_others_read_stays(self) -> None:
        net = Net()
        inner = part(net, net.input(4, 6), 0, 1, 3)
        assert text(merge_slices(net.returns(inner, part(net, inner, 1, 2, 3)))) == golden("""
            input %0: 4x6
            %1: 3x6 = SLICE(%0) begin=(1,0) size=(3,6)
            %2: 3x3 = SLICE(%0) begin=(1,2) size=(3,3)
            output %1
            output %2
        """)
