"""Random graphs of the IR, and random chains of views."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st
from tests.net import FULLY, INT32, NO_ACTIVATION, Net, Shape, constant

from openneutron.ir.graph import Graph, QParams, Tensor
from openneutron.ir.kinds import CONCATENATION, FULLY_CONNECTED, MEAN, PAD, SLICE

__all__ = ["graphs", "steps_of"]


def steps_of(shape: Shape, draw: Callable[[Any], Any], count: int) -> list[tuple[str, Shape]]:
    """Draws a chain of transposes and reshapes of a tensor of `shape`."""
    steps: list[tuple[str, Shape]] = []
    for _ in range(count):
        if draw(st.booleans()):
            perm = tuple(draw(st.permutations(range(len(shape)))))
            steps.append(("transpose", perm))
            shape = tuple(shape[dim] for dim in perm)
        else:
            shape = draw(st.sampled_from(factorizations(math.prod(shape))))
            steps.append(("reshape", shape))
    return steps


def factorizations(size: int) -> list[Shape]:
    """Draws shapes of up to four dimensions with `size` elements."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    shapes: list[Shape] = [(size,), (1, size)]
    for first in divisors:
        rest = size // first
        shapes.append((first, rest))
        shapes += [(first, second, rest // second) for second in divisors if rest % second == 0]
        shapes += [(1, first, second, rest // second) for second in divisors if rest % second == 0]
    return sorted(set(shapes))


@st.composite
def graphs(draw: Any) -> Graph:
    """Draws graphs of elementwise, axis and view operators, with shared values and up to three outputs."""
    net = Net()
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=2, max_size=4)))
    values = [net.input(*shape), net.input(*shape)]
    for _ in range(draw(st.integers(2, 9))):
        value = draw(st.sampled_from(values))
        values.append(_random_operator(draw, net, value, values))
    outputs = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
    return net.returns(*outputs)


def _random_operator(draw: Any, net: Net, value: Tensor, values: list[Tensor]) -> Tensor:
    shape, rank = value.shape, len(value.shape)
    axis = draw(st.integers(0, rank - 1))
    kinds = [
        "transpose",
        "reshape",
        "relu",
        "add",
        "constant",
        "mean",
        "cat",
        "pad",
        "slice",
        "fully connected",
        "convolved rows",
    ]
    kind = draw(st.sampled_from(kinds))
    if kind in ("transpose", "reshape"):
        ((step, operand),) = steps_of(shape, draw, 1)
        return net.transpose(value, *operand) if step == "transpose" else net.reshape(value, *operand)
    if kind == "relu":
        return net.relu(value)
    if kind == "add":
        return net.add(value, draw(st.sampled_from([other for other in values if other.shape == shape])))
    if kind == "constant":
        return net.add(value, constant(*(size if draw(st.booleans()) else 1 for size in shape)))
    if kind == "mean":
        keep = draw(st.booleans()) or rank == 1
        kept = tuple(1 if dim == axis else size for dim, size in enumerate(shape) if keep or dim != axis)
        return net.op(MEAN, [value], kept, axes=(axis,), keep_dims=keep)
    if kind == "cat":
        joined = tuple(2 * size if dim == axis else size for dim, size in enumerate(shape))
        return net.op(CONCATENATION, [value, value], joined, axis=axis, **NO_ACTIVATION)
    if kind == "pad":
        paddings = tuple((1, 2) if dim == axis else (0, 0) for dim in range(rank))
        padded = tuple(size + sum(pair) for size, pair in zip(shape, paddings, strict=True))
        return net.op(PAD, [value], padded, paddings=paddings)
    if kind == "slice":
        begin = tuple(size - 1 if dim == axis else 0 for dim, size in enumerate(shape))
        size = tuple(1 if dim == axis else size for dim, size in enumerate(shape))
        return net.op(SLICE, [value], size, begin=begin, size=size)
    features = shape[-1]
    bias = Tensor((2,), INT32, QParams.per_tensor(0.25, 0), np.array([3, -5], np.int32))
    if kind == "convolved rows":
        image = net.reshape(value, 1, value.size // features, 1, features)
        return net.convolved_rows(image, constant(2, 1, 1, features, start=-3), bias)
    rows = net.reshape(value, value.size // features, features)
    return net.op(FULLY_CONNECTED, [rows, constant(2, features, start=-3), bias], (rows.shape[0], 2), **FULLY)
