"""Views of the IR, compared with numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.net import INT8, TO_NCHW, TO_NHWC, Net, Q, Shape
from tests.random_ir import steps_of

from openneutron.ir.graph import Array, Tensor
from openneutron.ir.kinds import TRANSPOSE
from openneutron.ir.views import View, swapped_blocks


@st.composite
def chains(draw: Any) -> tuple[Shape, list[tuple[str, Shape]]]:
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4)))
    return shape, steps_of(shape, draw, draw(st.integers(1, 5)))


def viewed(shape: Shape, steps: Sequence[tuple[str, Shape]], data: Array) -> tuple[View | None, Array]:
    """Returns a chain as a view (None if impossible), and as computed by numpy."""
    view: View | None = View.identity(Tensor(shape, INT8, Q))
    for step, operand in steps:
        data = data.transpose(operand) if step == "transpose" else data.reshape(operand)
        if view is not None:
            view = view.permuted(operand) if step == "transpose" else view.reshaped(operand)
    return view, data


class TestViews:
    @given(chains())
    @settings(max_examples=400, deadline=None)
    def test_a_chain_of_views_equals_numpy(self, chain: tuple[Shape, list[tuple[str, Shape]]]) -> None:
        shape, steps = chain
        data = np.arange(math.prod(shape)).reshape(shape)
        view, expected = viewed(shape, steps, data)
        assume(view is not None)
        assert view is not None
        np.testing.assert_array_equal(view.evaluate(data), expected)
        net = Net()
        emitted = view.emit(lambda kind, operand, value, out: net.op(kind, [value], out, **{kind.operands[0]: operand}))
        assert len(net.ops) <= 3
        for op in net.ops:
            data = data.transpose(op.attrs["perm"]) if op.kind is TRANSPOSE else data.reshape(op.output.shape)
            assert data.shape == op.output.shape
        assert emitted.shape == expected.shape
        np.testing.assert_array_equal(data, expected)

    @given(chains())
    @settings(max_examples=200, deadline=None)
    def test_view_undoes_itself(self, chain: tuple[Shape, list[tuple[str, Shape]]]) -> None:
        shape, steps = chain
        view, _ = viewed(shape, steps, np.zeros(shape))
        assume(view is not None)
        assert view is not None
        undone = view.unapplied(view)
        assert undone is not None
        assert undone.in_stored_order
        assert undone.shape == shape

    @given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.randoms(use_true_random=False))
    @settings(max_examples=200, deadline=None)
    def test_dimension_permutation_of_a_transpose(self, sizes: list[int], random: Any) -> None:
        shape, perm = tuple(sizes), random.sample(range(len(sizes)), len(sizes))
        found = View.identity(Tensor(shape, INT8, Q)).permuted(perm).dimension_permutation()
        assert found is not None
        data = np.arange(math.prod(shape)).reshape(shape)
        np.testing.assert_array_equal(data.transpose(found), data.transpose(perm))

    @pytest.mark.parametrize(
        ("shape", "perm", "blocks"),
        [
            ((1, 3, 4, 5), TO_NCHW, (12, 5)),
            ((1, 3, 4, 5), TO_NHWC, (3, 20)),
            ((2, 3, 4, 5), TO_NCHW, None),
            ((6, 5), (1, 0), (6, 5)),
            ((2, 3, 4), (1, 2, 0), (2, 12)),
            ((2, 3, 4), (2, 1, 0), None),
            ((2, 1, 4), (2, 1, 0), (2, 4)),
            ((2, 1, 4), (1, 0, 2), (8, 1)),
            ((1, 1), (1, 0), (1, 1)),
        ],
    )
    def test_swapped_blocks(self, shape: Shape, perm: Shape, blocks: tuple[int, int] | None) -> None:
        assert swapped_blocks(shape, perm) == blocks
        if blocks is not None:
            data = np.arange(math.prod(shape)).reshape(shape)
            np.testing.assert_array_equal(data.transpose(perm).ravel(), data.reshape(blocks).T.ravel())

    def test_a_reshape_that_splits_an_atom_is_not_a_view(self) -> None:
        assert View.identity(Tensor((2, 3), INT8, Q)).permuted((1, 0)).reshaped((2, 3)) is None
        assert View.identity(Tensor((2, 3), INT8, Q)).reshaped((3, 2)) is not None
