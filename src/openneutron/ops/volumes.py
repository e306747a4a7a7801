"""Decompositions of pools and resizes of volumes [N, C, D, H, W] into two 2-D operators: on frames, then on depth."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch.fx import Node

from openneutron.core.fx import shape_of
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.facts import Facts, never_negative_if_first
from openneutron.ops.graph_builder import mean, mul
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.reductions import has_unused_indices
from openneutron.ops.windows import of_each_dim

__all__ = ["DECOMPOSED"]

aten = torch.ops.aten

RANK = 3

# A function from images to images, [N, C, H, W].
_ImageOperator = Callable[[Node], Node]


def _apply_to_frames_and_depth(
    rewriting: Rewriting, frames: _ImageOperator | None, depth: _ImageOperator | None
) -> Node:
    """Applies `frames` to all frames [N * D, C, H, W], then `depth` to images [N, C, D, H * W]. None is identity."""
    value = rewriting.args["self"]
    if len(shape_of(value)) == RANK + 1:
        value = rewriting.call(aten.unsqueeze.default, value, 0)
    if frames is not None:
        value = _apply_to_frames(rewriting, value, frames)
    if depth is not None:
        batch, channels, length, *image = shape_of(value)
        flat = rewriting.call(aten.reshape.default, value, [batch, channels, length, math.prod(image)])
        pooled = depth(flat)
        value = rewriting.call(aten.reshape.default, pooled, [batch, channels, shape_of(pooled)[2], *image])
    return rewriting.call(aten.reshape.default, value, list(rewriting.shape))


def _apply_to_frames(rewriting: Rewriting, value: Node, frames: _ImageOperator) -> Node:
    batch, channels, length, *image = shape_of(value)
    order = [0, 2, 1, 3, 4]
    moved = rewriting.call(aten.permute.default, value, order)
    done = frames(rewriting.call(aten.reshape.default, moved, [batch * length, channels, *image]))
    split = rewriting.call(aten.reshape.default, done, [batch, length, channels, *shape_of(done)[2:]])
    return rewriting.call(aten.permute.default, split, order)


def _pool_frames_and_depth(rewriting: Rewriting, target: torch._ops.OpOverload, *names: str, **options: object) -> Node:
    """Adds a pool over frames and a pool over depth.

    `names` are the arguments after kernel and stride, with one number per dimension; `options` are the last arguments
    of `target`.
    """
    args = rewriting.args
    kernel, stride = of_each_dim(args["kernel_size"], RANK), of_each_dim(args["stride"] or args["kernel_size"], RANK)
    numbers = [kernel, stride, *(of_each_dim(args[name], RANK) for name in names)]

    def pool(*axes: int | None) -> _ImageOperator | None:
        chosen = [
            [unit if axis is None else own[axis] for axis in axes] for own, unit in zip(numbers, _UNITS, strict=False)
        ]
        if all(own == [unit, unit] for own, unit in zip(chosen, _UNITS, strict=False)):
            return None
        return lambda images: rewriting.call(target, images, *chosen, *options.values())

    return _apply_to_frames_and_depth(rewriting, pool(1, 2), pool(0, None))


# Kernel, stride, padding and dilation that do not change a dimension.
_UNITS = (1, 1, 0, 1)


def _max_pool(rewriting: Rewriting) -> Node:
    return _pool_frames_and_depth(
        rewriting, aten.max_pool2d.default, "padding", "dilation", ceil_mode=rewriting.args["ceil_mode"]
    )


def _max_pool_without_indices(rewriting: Rewriting) -> list[Node]:
    return [_max_pool(rewriting)]


def _average_pool(rewriting: Rewriting) -> Node:
    args = rewriting.args
    override = args["divisor_override"]
    pooled = _pool_frames_and_depth(
        rewriting,
        aten.avg_pool2d.default,
        "padding",
        ceil_mode=args["ceil_mode"],
        count_include_pad=args["count_include_pad"] or override is not None,
    )
    factor = 1.0 if override is None else math.prod(of_each_dim(args["kernel_size"], RANK)) / override
    return pooled if factor == 1 else mul(rewriting, pooled, factor)


def _adaptive_pool(rewriting: Rewriting, pool: Callable[[Node, list[int]], Node]) -> Node:
    instance = rewriting.instance
    sizes, outputs = instance.shape_of("self")[-RANK:], instance.shape[-RANK:]

    def pool_to(*wanted: int) -> _ImageOperator:
        return lambda images: pool(images, list(wanted))

    frames = pool_to(*outputs[1:]) if outputs[1:] != sizes[1:] else None
    depth = pool_to(outputs[0], math.prod(outputs[1:])) if outputs[0] != sizes[0] else None
    return _apply_to_frames_and_depth(rewriting, frames, depth)


def _adaptive_average(rewriting: Rewriting) -> Node:
    if rewriting.shape[-RANK:] == (1,) * RANK:
        return mean(rewriting, rewriting.args["self"], range(-RANK, 0))
    return _adaptive_pool(
        rewriting, lambda images, size: rewriting.call(aten.adaptive_avg_pool2d.default, images, size)
    )


def _adaptive_maximum(rewriting: Rewriting) -> list[Node]:
    if rewriting.shape[-RANK:] == (1,) * RANK:
        return [rewriting.call(aten.amax.default, rewriting.args["self"], list(range(-RANK, 0)), True)]
    pool = aten.adaptive_max_pool2d.default
    return [
        _adaptive_pool(rewriting, lambda images, size: _first_output(rewriting, rewriting.call(pool, images, size)))
    ]


def _first_output(rewriting: Rewriting, outputs: Node) -> Node:
    """Returns the first of several outputs."""
    node = rewriting.instance.node
    with node.graph.inserting_before(node):
        first = node.graph.call_function(operator.getitem, (outputs, 0))
    first.meta = {**outputs.meta, "val": outputs.meta["val"][0]}
    return first


def _resize_rewrite(target: torch._ops.OpOverload, *names: str) -> Callable[[Rewriting], Node]:
    """Returns a rewrite that resizes frames, then depth.

    `names` are the arguments of `target` between the output size and the scale factors.
    """

    def rewrite(rewriting: Rewriting) -> Node:
        args, instance = rewriting.args, rewriting.instance
        factors = args["scale_factors"]
        sizes, outputs = instance.shape_of("input")[-RANK:], instance.shape[-RANK:]

        def resize_to(wanted: Sequence[int], by: Sequence[float] | None) -> _ImageOperator:
            given = (None, list(by)) if by else (list(wanted), None)
            size, scales = given
            return lambda images: rewriting.call(target, images, size, *(args[name] for name in names), scales)

        frames = resize_to(outputs[1:], factors and factors[1:]) if outputs[1:] != sizes[1:] else None
        across = math.prod(outputs[1:])
        depth = resize_to((outputs[0], across), factors and (factors[0], 1.0)) if outputs[0] != sizes[0] else None
        return _apply_to_frames_and_depth(rewriting, frames, depth)

    return rewrite


def _lacks_a_batch(instance: OpInstance) -> bool:
    return len(instance.shape_of("input")) == RANK + 1


def _convolution_of_one(rewriting: Rewriting) -> Node:
    """Adds a batch dimension of 1 before the convolution, and removes it after."""
    args = dict(rewriting.instance.args)
    args.pop("self")
    batch = rewriting.call(aten.unsqueeze.default, args.pop("input"), 0)
    target = rewriting.instance.node.target
    assert isinstance(target, torch._ops.OpOverload)
    return rewriting.call(aten.squeeze.dim, rewriting.call(target, batch, *args.values()), 0)


BY_FRAMES = "over height and width of all frames (permute, reshape), and over depth as the height of an image"

DECOMPOSED = (
    Decomposition(
        name="convolution of a volume without batch",
        targets=("aten.conv3d.default", "aten.conv3d.padding"),
        rewrite=_convolution_of_one,
        applies=_lacks_a_batch,
        becomes="unsqueeze, conv3d, squeeze",
    ),
    Decomposition(
        name="max_pool of volumes",
        targets=("aten.max_pool3d.default",),
        rewrite=_max_pool,
        facts=Facts(sign=never_negative_if_first),
        becomes=f"max_pool2d {BY_FRAMES}",
    ),
    Decomposition(
        name="max_pool of volumes with indices",
        targets=("aten.max_pool3d_with_indices.default",),
        rewrite=_max_pool_without_indices,
        constraints=(has_unused_indices,),
        becomes=f"max_pool2d {BY_FRAMES}",
    ),
    Decomposition(
        name="avg_pool of volumes",
        targets=("aten.avg_pool3d.default",),
        rewrite=_average_pool,
        facts=Facts(sign=never_negative_if_first),
        becomes=f"avg_pool2d {BY_FRAMES}; mul for divisor_override",
        tolerance=2,
        notes="Each of the two averages may round a tie in another direction than torch; see avg_pool.",
    ),
    Decomposition(
        name="adaptive_avg_pool of volumes",
        targets=("aten.adaptive_avg_pool3d.default",),
        rewrite=_adaptive_average,
        becomes=f"mean if the output has one value per channel, else adaptive_avg_pool2d {BY_FRAMES}",
    ),
    Decomposition(
        name="adaptive_max_pool of volumes",
        targets=("aten.adaptive_max_pool3d.default",),
        rewrite=_adaptive_maximum,
        constraints=(has_unused_indices,),
        becomes=f"amax if the output has one value per channel, else adaptive_max_pool2d {BY_FRAMES}",
    ),
    Decomposition(
        name="upsample_nearest of volumes",
        targets=("aten.upsample_nearest3d.vec",),
        rewrite=_resize_rewrite(aten.upsample_nearest2d.vec),
        becomes=f"upsample_nearest2d {BY_FRAMES}",
    ),
    Decomposition(
        name="upsample_trilinear",
        targets=("aten.upsample_trilinear3d.vec",),
        rewrite=_resize_rewrite(aten.upsample_bilinear2d.vec, "align_corners"),
        becomes=f"upsample_bilinear2d {BY_FRAMES}",
    ),
)
