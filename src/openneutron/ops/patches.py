"""Decompositions of unfold and im2col (extract windows from a tensor) and of col2im (sums windows into an image)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class _Windows:
    """The geometry of the windows of im2col and col2im, each field as (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def counts(self, image: tuple[int, int]) -> tuple[int, int]:
        """Returns the number of windows in an image, along height and width."""
        axes = zip(image, self.kernel, self.dilation, self.padding, self.stride, strict=True)
        rows, columns = ((size + 2 * pad - step * (kernel - 1) - 1) // stride + 1
                         for size, kernel, step, pad, stride in axes)  # fmt: skip
        return rows, columns

    def are_tiles_of(self, image: tuple[int, int]) -> bool:
        """Whether each pixel of an image is in exactly one window."""
        covers = all(size % step == 0 for size, step in zip(image, self.stride, strict=True))
        return self.kernel == self.stride and self.dilation == (1, 1) and self.padding == (0, 0) and covers

    def one_hot_filters(self, rewriting: Rewriting, channels: int) -> Node:
        """Adds one-hot filters, one for each channel and kernel position: [channels * positions, 1, h, w]."""
        filters = torch.eye(math.prod(self.kernel)).reshape(-1, 1, *self.kernel)
        return rewriting.constant(filters.repeat(channels, 1, 1, 1))


def _windows_of(instance: OpInstance) -> _Windows:
    return _Windows(
        *(_height_and_width(instance.args[name]) for name in ("kernel_size", "stride", "padding", "dilation"))
    )


def _height_and_width(values: Sequence[int]) -> tuple[int, int]:
    height, width = tuple(values) * 2 if len(values) == 1 else values
    return height, width


def _extract_windows(rewriting: Rewriting) -> Node:
    instance, values = rewriting.instance, rewriting.args["self"]
    *batch, channels, height, width = instance.shape_of("self")
    windows = _windows_of(instance)
    rows, columns = windows.counts((height, width))
    if windows.are_tiles_of((height, width)):
        blocks = [math.prod(batch), channels, rows, windows.kernel[0], columns, windows.kernel[1]]
        split = rewriting.call(aten.reshape.default, values, blocks)
        patches = rewriting.call(aten.permute.default, split, [0, 1, 3, 5, 2, 4])
        return rewriting.call(aten.reshape.default, patches, list(instance.shape))
    images = rewriting.call(aten.reshape.default, values, [math.prod(batch), channels, height, width])
    weight = windows.one_hot_filters(rewriting, channels)
    options = (list(windows.stride), list(windows.padding), list(windows.dilation), channels)
    patches = rewriting.call(aten.conv2d.default, images, weight, None, *options)
    return rewriting.call(aten.reshape.default, patches, list(instance.shape))


def _fold_windows(rewriting: Rewriting) -> Node:
    instance, values = rewriting.instance, rewriting.args["self"]
    *batch, channels, height, width = instance.shape
    windows = _windows_of(instance)
    rows, columns = windows.counts((height, width))
    if windows.are_tiles_of((height, width)):
        blocks = [math.prod(batch), channels, *windows.kernel, rows, columns]
        split = rewriting.call(aten.reshape.default, values, blocks)
        image = rewriting.call(aten.permute.default, split, [0, 1, 4, 2, 5, 3])
        return rewriting.call(aten.reshape.default, image, list(instance.shape))
    shape = [math.prod(batch), channels * math.prod(windows.kernel), rows, columns]
    split = rewriting.call(aten.reshape.default, values, shape)
    axes = zip((rows, columns), windows.stride, windows.padding, windows.dilation, windows.kernel, strict=True)
    covered = [(count - 1) * step - 2 * pad + dilation * (size - 1) + 1 for count, step, pad, dilation, size in axes]
    output_padding = [size - end for size, end in zip((height, width), covered, strict=True)]
    weight = windows.one_hot_filters(rewriting, channels)
    options = (list(windows.stride), list(windows.padding), output_padding, channels, list(windows.dilation))
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
