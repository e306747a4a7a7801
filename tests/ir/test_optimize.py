"""All passes of the IR together, on random graphs, with results compared in LiteRT."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.net import FULLY, NO_ACTIVATION, Net, constant, golden, text
from tests.random_ir import graphs
from tests.runtime_models import litert

from openneutron.formats import tflite
from openneutron.ir.build import optimize
from openneutron.ir.graph import Graph, Tensor
from openneutron.ir.kinds import CONCATENATION, FULLY_CONNECTED, SLICE, TRANSPOSE
from openneutron.ir.rewrites import copy_unwritten_outputs, eliminate_dead_code
from openneutron.ir.text import dump
from openneutron.ir.verify import verify


def transposed(graph: Graph) -> int:
    """Returns the number of elements that TRANSPOSEs move."""
    return sum(op.output.size for op in graph.ops if op.kind is TRANSPOSE)


class TestOptimize:
    @given(graphs(), st.integers(0, 1000))
    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def test_optimization_does_not_change_results(self, graph: Graph, seed: int) -> None:
        generator = np.random.default_rng(seed)
        inputs = [generator.integers(-128, 128, tensor.shape, dtype=np.int8) for tensor in graph.inputs]
        optimized = optimize(graph)
        plain = litert(tflite.write(verify(copy_unwritten_outputs(graph), "copies")), *inputs)
        for found, expected in zip(litert(tflite.write(optimized), *inputs), plain, strict=True):
            np.testing.assert_array_equal(found, expected)

    @given(graphs())
    @settings(max_examples=100, deadline=None)
    def test_no_values_are_transposed_beyond_the_model(self, graph: Graph) -> None:
        assert transposed(optimize(graph)) <= transposed(eliminate_dead_code(graph))

    @pytest.mark.parametrize("case", [
        lambda net, x, y: [net.add(x, net.transpose(y, 1, 0))],
        lambda net, x, y: [net.add(net.transpose(y, 1, 0), x)],
        lambda net, x, y: [net.transpose(net.add(x, net.transpose(y, 1, 0)), 1, 0)],
        lambda net, x, _: [net.relu(net.add(x, net.transpose(x, 1, 0)))],
        lambda net, x, _: [net.relu(x), net.relu(net.reshape(x, 4))],
        lambda net, x, _: [x, net.relu(net.reshape(x, 4))],
        lambda net, x, y: [x, x, net.relu(y), y],
    ])  # fmt: skip
    def test_second_time_changes_nothing(self, case: Callable[[Net, Tensor, Tensor], list[Tensor]]) -> None:
        net = Net()
        once = optimize(net.returns(*case(net, net.input(2, 2), net.input(2, 2))))
        assert dump(optimize(once)) == dump(once)

    def test_equal_constants_make_equal_operators(self) -> None:
        net = Net()
        x = net.input(2, 4)
        first, second = (net.op(FULLY_CONNECTED, [x, constant(3, 4), constant(3)], (2, 3), **FULLY) for _ in range(2))
        assert text(optimize(net.returns(net.add(first, second)))) == golden("""
            input %0: 2x4
            %3: 2x3 = FULLY_CONNECTED(%0, c1: 3x4, c2: 3) keep_num_dims=False weights_format=DEFAULT
            %4: 2x3 = ADD(%3, %3)
            output %4
        """)

    def test_operators_that_differ_only_in_views_are_merged(self) -> None:
        net = Net()
        x = net.input(3, 4)
        there_and_back = net.relu(net.transpose(net.relu(net.transpose(x, 1, 0)), 1, 0))
        both = optimize(net.returns(net.add(there_and_back, net.relu(net.relu(x)))))
        assert [op.kind.name for op in both.ops] == ["RELU", "RELU", "ADD"]

    def test_slices_with_a_view_between_are_merged(self) -> None:
        net = Net()
        inner = net.op(SLICE, [net.input(4, 6)], (3, 6), begin=(1, 0), size=(3, 6))
        outer = net.op(SLICE, [net.transpose(inner, 1, 0)], (6, 2), begin=(0, 1), size=(6, 2))
        assert text(optimize(net.returns(outer))) == golden("""
            input %0: 4x6
            %1: 2x6 = SLICE(%0) begin=(2,0) size=(2,6)
            %2: 6x2 = TRANSPOSE(%1) perm=(1,0)
            output %2
        """)

    def test_views_do_not_move_after_operators_that_enlarge_values(self) -> None:
        net = Net()
        x = net.transpose(net.input(2, 3), 1, 0)
        twice = net.op(CONCATENATION, [x, x], (6, 2), axis=0, **NO_ACTIVATION)
        assert text(optimize(net.returns(net.relu(twice)))) == golden("""
            input %0: 2x3
            %1: 3x2 = TRANSPOSE(%0) perm=(1,0)
            %2: 6x2 = CONCATENATION(%1, %1) axis=0
            %3: 6x2 = RELU(%2)
            output %3
        """)

    def test_views_move_to_outputs_on_a_tie(self) -> None:
        net = Net()
        x = net.relu(net.reshape(net.input(3, 4), 12))
        assert text(optimize(net.returns(x))) == golden("""
            input %0: 3x4
            %1: 3x4 = RELU(%0)
            %2: 12 = RESHAPE(%1) new_shape=(12,)
            output %2
        """)
