"""Decompositions of pools that the NPU lacks into convolutions, other pools and reductions."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from openneutron.ir.limits import MAX_WEIGHTS_OF_ONE_OUTPUT
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.graph_builder import reshape
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.pooling import (
    adaptive_windows,
    divides_as_tflite_does,
    divisors,
    has_even_windows,
    has_small_kernel,
    pool_windows,
)
from openneutron.ops.reductions import has_unused_indices
from openneutron.ops.spec import constraint
from openneutron.ops.windows import image_shape, spatial_rank

__all__ = ["DECOMPOSED"]

aten = torch.ops.aten

MAX_UNEVEN_WINDOWS = 16

# ATen's max pool by the number of spatial dimensions.
_MAX_POOLS = {1: aten.max_pool1d.default, 2: aten.max_pool2d.default}


@constraint
def fits_accumulation(instance: OpInstance) -> bool:
    """Kernel height x width x the MACs per pipeline is at most {MAX_WEIGHTS_OF_ONE_OUTPUT}."""
    elements = math.prod(window.kernel for window in pool_windows(instance))
    return elements * instance.target.channel_granularity <= MAX_WEIGHTS_OF_ONE_OUTPUT


def _average_by_convolution(rewriting: Rewriting) -> Node:
    """Adds a depthwise convolution that divides by one divisor, and a mul if the divisors of the windows differ."""
    instance = rewriting.instance
    vertical, horizontal = windows = pool_windows(instance)
    shape = image_shape(instance, instance.shape_of("self"))
    image = reshape(rewriting, rewriting.args["self"], shape)
    # Windows of ceil_mode may read more padding at the end than at the start.
    beyond = [max(0, window.padding_after - window.padding_before) for window in windows]
    if any(beyond):
        image = rewriting.call(aten.constant_pad_nd.default, image, [0, beyond[1], 0, beyond[0]])
    each = torch.from_numpy(divisors(instance)).to(torch.float32)
    elements = float(vertical.kernel * horizontal.kernel)
    common = float(each[0, 0]) if bool((each == each[0, 0]).all()) else elements
    weight = torch.full((shape[1], 1, vertical.kernel, horizontal.kernel), 1 / common)
    averages = rewriting.call(
        aten.conv2d.default,
        image,
        rewriting.constant(weight),
        None,
        [vertical.stride, horizontal.stride],
        [vertical.padding_before, horizontal.padding_before],
        [1, 1],
        shape[1],
    )
    if not bool((each == common).all()):
        averages = rewriting.call(aten.mul.Tensor, averages, rewriting.constant(common / each))
    return reshape(rewriting, averages, rewriting.shape)


def _max_pool_without_indices(rewriting: Rewriting) -> list[Node]:
    return [rewriting.call(_MAX_POOLS[spatial_rank(rewriting.instance)], *rewriting.args.values())]


@constraint
def has_few_uneven_windows(instance: OpInstance) -> bool:
    """All windows have one size and equal distances, or there are at most {MAX_UNEVEN_WINDOWS} along each dimension."""
    return has_even_windows.holds(instance) or max(instance.shape[-spatial_rank(instance) :]) <= MAX_UNEVEN_WINDOWS


def _adaptive_max_pool(rewriting: Rewriting) -> list[Node]:
    """Adds one max pool if all windows have one size and equal distances.

    Otherwise, for height and then for width, adds an amax of each window and a concatenation.
    """
    instance, values = rewriting.instance, rewriting.args["self"]
    rank = spatial_rank(instance)
    if has_even_windows.holds(instance):
        spatial = pool_windows(instance)[-rank:]
        kernel, stride = [window.kernel for window in spatial], [window.stride for window in spatial]
        return [rewriting.call(_MAX_POOLS[rank], values, kernel, stride)]
    for dim in range(-rank, 0):
        bounds = adaptive_windows(instance.shape_of("self")[dim], instance.shape[dim])
        windows = [rewriting.call(aten.slice.Tensor, values, dim, start, end) for start, end in bounds]
        extremes = [rewriting.call(aten.amax.default, window, [dim], True) for window in windows]
        values = rewriting.call(aten.cat.default, extremes, dim)
    return [values]


DECOMPOSED = (
    Decomposition(
        name="avg_pool with other divisors",
        targets=("aten.avg_pool1d.default", "aten.avg_pool2d.default"),
        rewrite=_average_by_convolution,
        applies=lambda instance: not divides_as_tflite_does.holds(instance),
        constraints=(has_small_kernel, fits_accumulation),
        becomes="depthwise conv2d, and mul by a constant if the divisors of the windows differ",
        notes="It applies to divisor_override, and to padding that does not count and is not TFLite's SAME.",
    ),
    Decomposition(
        name="max_pool with indices",
        targets=("aten.max_pool1d_with_indices.default", "aten.max_pool2d_with_indices.default"),
        rewrite=_max_pool_without_indices,
        constraints=(has_unused_indices,),
        becomes="max_pool1d or max_pool2d",
    ),
    Decomposition(
        name="adaptive_max_pool",
        targets=("aten.adaptive_max_pool1d.default", "aten.adaptive_max_pool2d.default"),
        rewrite=_adaptive_max_pool,
        constraints=(has_unused_indices, has_few_uneven_windows),
        becomes="max_pool1d or max_pool2d; slice, amax and cat along each dimension for uneven windows",
        notes="ExecuTorch cannot lower an adaptive max pool. A model with one that breaks these limits cannot become a "
        "`.pte`.",
    ),
)
