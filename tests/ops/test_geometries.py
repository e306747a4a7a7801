"""Random geometries: lowered operators follow torch, and decompositions keep the function."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.alone import Quantized, decomposition_error, deviation, is_decomposed, random_codes

from openneutron.ir.graph import QParams

FLOAT_ERROR = 1e-5

examples = settings(max_examples=150, deadline=None)


def per_dimension(rank: int, low: int, high: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(low, high), min_size=rank, max_size=rank)


@st.composite
def transposed(draw: st.DrawFn) -> tuple[list[int], list[int], int, dict[str, Any]]:
    """Draws spatial shape, kernel, input channels of a group, and parameters of a transposed convolution."""
    rank = draw(st.integers(1, 2))
    stride, dilation = draw(per_dimension(rank, 1, 4)), draw(st.sampled_from([[1] * rank, [2] * rank, [1, 3][:rank]]))
    extra = [draw(st.integers(0, max(pair) - 1)) for pair in zip(stride, dilation, strict=True)]
    options = {
        "stride": stride,
        "padding": draw(per_dimension(rank, 0, 3)),
        "output_padding": extra,
        "groups": draw(st.sampled_from([1, 1, 2, 3])),
        "dilation": dilation,
    }
    return draw(per_dimension(rank, 1, 6)), draw(per_dimension(rank, 1, 5)), draw(st.integers(1, 3)), options


@examples
@given(transposed(), st.integers(1, 3), st.sampled_from([(), (1,), (2,)]), st.booleans(), st.integers(0, 2**32 - 1))
def test_transposed_convolutions(
    geometry: tuple[list[int], list[int], int, dict[str, Any]],
    outputs: int,
    batch: tuple[int, ...],
    per_channel: bool,
    seed: int,
) -> None:
    size, kernel, inputs, options = geometry
    reach = [
        (n - 1) * s + d * (k - 1) + 1 + extra - 2 * p
        for n, k, s, d, p, extra in zip(
            size, kernel, *(options[name] for name in ("stride", "dilation", "padding", "output_padding")), strict=True
        )
    ]
    assume(min(reach) >= 1)
    random, groups = np.random.default_rng(seed), options["groups"]
    scales = tuple(random.uniform(0.005, 0.02, outputs)) if per_channel else (0.01,)
    axis = 1 if per_channel else None
    products = tuple(0.02 * scale for scale in scales) * (groups if per_channel else 1)
    weight = random_codes(random, groups * inputs, outputs, *kernel).clip(min=-127)
    bias = random.integers(-2000, 2000, groups * outputs).astype(np.int32)
    bias_qparams = QParams(products, (0,) * len(products), 0 if per_channel else None)
    operands = {
        "input": Quantized(random_codes(random, *batch, groups * inputs, *size), QParams.per_tensor(0.02, 5)),
        "weight": Quantized(weight, QParams(scales, (0,) * len(scales), axis), constant=True),
        "bias": Quantized(bias, bias_qparams, constant=True),
    }
    target = "aten.conv_transpose1d.default" if len(size) == 1 else "aten.conv_transpose2d.input"
    assert deviation(target, operands, options) <= 1


def follows(target: str, shape: tuple[int, ...], options: dict[str, Any], seed: int, argument: str = "self") -> bool:
    random = np.random.default_rng(seed)
    operand = Quantized(random_codes(random, *shape), QParams.per_tensor(0.05, -7))
    values = {argument: operand.real.float()}
    if is_decomposed(target, values, options):
        return decomposition_error(target, values, options) <= FLOAT_ERROR
    return deviation(target, {argument: operand}, options) <= 1


@st.composite
def pools(draw: st.DrawFn) -> tuple[int, tuple[int, ...], dict[str, Any]]:
    """Draws the number of spatial dimensions, input shape and parameters of a pool."""
    rank = draw(st.integers(1, 2))
    kernel = draw(per_dimension(rank, 1, 5))
    padding = [draw(st.integers(0, k // 2)) for k in kernel]
    size = [draw(st.integers(max(1, k - 2 * p), 9)) for k, p in zip(kernel, padding, strict=True)]
    options = {
        "kernel_size": kernel,
        "stride": draw(per_dimension(rank, 1, 4)),
        "padding": padding,
        "ceil_mode": draw(st.booleans()),
    }
    return rank, (*draw(st.sampled_from([(), (1,), (2,)])), 3, *size), options


@examples
@given(pools(), st.booleans(), st.sampled_from([None, None, 1, 3]), st.integers(0, 2**32 - 1))
def test_average_pools(
    pool: tuple[int, tuple[int, ...], dict[str, Any]], counted: bool, divisor: int | None, seed: int
) -> None:
    rank, shape, options = pool
    override = {"divisor_override": divisor} if rank == 2 else {}
    assert follows(f"aten.avg_pool{rank}d.default", shape, {**options, "count_include_pad": counted, **override}, seed)


@examples
@given(pools(), st.integers(0, 2**32 - 1))
def test_max_pools(pool: tuple[int, tuple[int, ...], dict[str, Any]], seed: int) -> None:
    rank, shape, options = pool
    assert follows(f"aten.max_pool{rank}d.default", shape, {**options, "dilation": [1] * rank}, seed)


@examples
@given(st.data(), st.integers(1, 2), st.integers(0, 2**32 - 1))
def test_adaptive_average_pools(data: st.DataObject, rank: int, seed: int) -> None:
    shape = (2, 3, *data.draw(per_dimension(rank, 1, 9)))
    outputs = data.draw(per_dimension(rank, 1, 9))
    assert follows(f"aten.adaptive_avg_pool{rank}d.default", shape, {"output_size": outputs}, seed)


@examples
@given(st.data(), st.sampled_from(["upsample_nearest", "_upsample_nearest_exact", "upsample_linear"]), st.booleans(),
       st.integers(1, 2), st.integers(0, 2**32 - 1))  # fmt: skip
def test_resizes(data: st.DataObject, name: str, corners: bool, rank: int, seed: int) -> None:
    shape = (2, 3, *data.draw(per_dimension(rank, 1, 6)))
    name = "upsample_bilinear" if rank == 2 and name == "upsample_linear" else name
    options: dict[str, Any] = {"align_corners": corners} if "linear" in name else {}
    if data.draw(st.booleans()):
        options["output_size"] = data.draw(per_dimension(rank, 1, 20))
    else:
        factor = st.one_of(st.sampled_from([1.0, 2.0, 3.0, 4.0, 8.0, 16.0]), st.floats(1.0, 4.0))
        options["scale_factors"] = data.draw(st.lists(factor, min_size=rank, max_size=rank))
    assert follows(f"aten.{name}{rank}d.vec", shape, options, seed, "input")
