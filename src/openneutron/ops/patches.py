"""Decompositions of unfold and im2col (extract windows from a tensor) and of col2im (sums windows into an image)."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import constraint

__all__ = ["DECOMPOSED"]

aten = torch.ops.aten

MAX_PARTS = 64


def _overlaps(instance: OpInstance) -> bool:
    return bool(instance.args["step"] != instance.args["size"] and instance.shape_of("self"))


@constraint
def unfolds_in_few_parts(instance: OpInstance) -> bool:
    """The size of a window is at most {MAX_PARTS} times the step."""
    return bool(-(-instance.args["size"] // instance.args["step"]) <= MAX_PARTS)


def _unfold(rewriting: Rewriting) -> Node:
    """Splits the dimension into parts of `step` elements, and concatenates consecutive parts to each window.

    If `size` is not a multiple of `step`, a slice crops the windows to `size`.
    """
    values, instance = rewriting.args["self"], rewriting.instance
    size, step = rewriting.args["size"], rewriting.args["step"]
    dim = rewriting.args["dimension"] % len(instance.shape_of("self"))
    windows, count = instance.shape[dim], -(-size // step)
    shape = instance.shape_of("self")
    before, length, after = shape[:dim], shape[dim], shape[dim + 1 :]
    missing = (windows + count - 1) * step - length
    if missing > 0:
        padding = [0, 0] * len(after) + [0, missing]
        values = rewriting.call(aten.constant_pad_nd.default, values, padding)
    elif missing < 0:
        values = rewriting.call(aten.slice.Tensor, values, dim, 0, length + missing)
    split = rewriting.call(aten.reshape.default, values, [*before, windows + count - 1, step, *after])
    parts = [rewriting.call(aten.slice.Tensor, split, dim, first, first + windows) for first in range(count)]
    joined = parts[0] if count == 1 else rewriting.call(aten.cat.default, parts, dim + 1)
    if count * step != size:
        joined = rewriting.call(aten.slice.Tensor, joined, dim + 1, 0, size)
    return rewriting.call(aten.movedim.int, joined, dim + 1, -1)


def _height_and_width(instance: OpInstance, name: str) -> tuple[int, int]:
    values = tuple(instance.args[name])
    first, second = values * 2 if len(values) == 1 else values
    return first, second


def _window_counts(instance: OpInstance, image: tuple[int, int]) -> list[int]:
    """Returns the number of windows in an image, along height and width."""
    names = ("kernel_size", "dilation", "padding", "stride")
    axes = zip(image, *(_height_and_width(instance, name) for name in names), strict=True)
    return [(size + 2 * pad - step * (kernel - 1) - 1) // stride + 1 for size, kernel, step, pad, stride in axes]


def _is_tiling(instance: OpInstance, image: tuple[int, int]) -> bool:
    """Whether each pixel is in exactly one window."""
    kernel, dilation, padding, stride = (
        _height_and_width(instance, name) for name in ("kernel_size", "dilation", "padding", "stride")
    )
    covers = all(size % step == 0 for size, step in zip(image, stride, strict=True))
    return kernel == stride and dilation == (1, 1) and padding == (0, 0) and covers


def _one_hot(rewriting: Rewriting, channels: int) -> Node:
    """Returns one-hot filters, one for each channel and kernel position: [channels * positions, 1, h, w]."""
    kernel = _height_and_width(rewriting.instance, "kernel_size")
    filters = torch.eye(math.prod(kernel)).reshape(-1, 1, *kernel)
    return rewriting.constant(filters.repeat(channels, 1, 1, 1))


def _extract_windows(rewriting: Rewriting) -> Node:
    instance, values = rewriting.instance, rewriting.args["self"]
    *batch, channels, height, width = instance.shape_of("self")
    kernel, stride, padding, dilation = (
        _height_and_width(instance, name) for name in ("kernel_size", "stride", "padding", "dilation")
    )
    rows, columns = _window_counts(instance, (height, width))
    if _is_tiling(instance, (height, width)):
        blocks = [math.prod(batch), channels, rows, kernel[0], columns, kernel[1]]
        split = rewriting.call(aten.reshape.default, values, blocks)
        windows = rewriting.call(aten.permute.default, split, [0, 1, 3, 5, 2, 4])
        return rewriting.call(aten.reshape.default, windows, list(instance.shape))
    images = rewriting.call(aten.reshape.default, values, [math.prod(batch), channels, height, width])
    weight = _one_hot(rewriting, channels)
    options = (list(stride), list(padding), list(dilation), channels)
    windows = rewriting.call(aten.conv2d.default, images, weight, None, *options)
    return rewriting.call(aten.reshape.default, windows, list(instance.shape))


def _fold_windows(rewriting: Rewriting) -> Node:
    instance, values = rewriting.instance, rewriting.args["self"]
    *batch, channels, height, width = instance.shape
    kernel, stride, padding, dilation = (
        _height_and_width(instance, name) for name in ("kernel_size", "stride", "padding", "dilation")
    )
    rows, columns = _window_counts(instance, (height, width))
    if _is_tiling(instance, (height, width)):
        blocks = [math.prod(batch), channels, *kernel, rows, columns]
        split = rewriting.call(aten.reshape.default, values, blocks)
        image = rewriting.call(aten.permute.default, split, [0, 1, 4, 2, 5, 3])
        return rewriting.call(aten.reshape.default, image, list(instance.shape))
    windows = [math.prod(batch), channels * math.prod(kernel), rows, columns]
    split = rewriting.call(aten.reshape.default, values, windows)
    reach = [
        (count - 1) * step - 2 * pad + spread * (size - 1) + 1
        for count, step, pad, spread, size in zip((rows, columns), stride, padding, dilation, kernel, strict=True)
    ]
    beyond = [size - end for size, end in zip((height, width), reach, strict=True)]
    weight = _one_hot(rewriting, channels)
    options = (list(stride), list(padding), beyond, channels, list(dilation))
    image = rewriting.call(aten.conv_transpose2d.input, split, weight, None, *options)
    return rewriting.call(aten.reshape.default, image, list(instance.shape))


DECOMPOSED = (
    Decomposition(
        name="unfold with windows that overlap",
        targets=("aten.unfold.default",),
        rewrite=_unfold,
        applies=_overlaps,
        constraints=(unfolds_in_few_parts,),
        becomes="reshape into parts of one step, slice for each part of a window, cat, permute",
    ),
    Decomposition(
        name="im2col",
        targets=("aten.im2col.default",),
        rewrite=_extract_windows,
        becomes="reshape and permute if each pixel is in exactly one window, else depthwise conv2d with one-hot "
        "filters",
    ),
    Decomposition(
        name="col2im",
        targets=("aten.col2im.default",),
        rewrite=_fold_windows,
        becomes="reshape and permute if each pixel is in exactly one window, else depthwise conv_transpose2d with "
        "one-hot filters",
    ),
)
