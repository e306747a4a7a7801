"""Decomposition of transposed convolutions over three dimensions into transposed convolutions over two."""

from __future__ import annotations

import torch
from torch.fx import Node

from openneutron.core.fx import shape_of
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.facts import Facts, LayerKind
from openneutron.ops.windows import of_each_dim

__all__ = ["DECOMPOSED"]

aten = torch.ops.aten

RANK = 3


def _pad_dim(rewriting: Rewriting, value: Node, dim: int, before: int, after: int) -> Node:
    """Pads one dimension with zeros; a negative number crops it."""
    if not before and not after:
        return value
    widths = [0, 0] * (len(shape_of(value)) - dim - 1) + [before, after]
    return rewriting.call(aten.constant_pad_nd.default, value, widths)


def _transposed_convolution(rewriting: Rewriting) -> Node:
    """Writes a conv_transpose3d as one conv_transpose2d over height and width, with frames as channels.

    Let s be the stride along depth. Output frame q * s + r is the sum over t of the input frame q - t, convolved with
    frame t * s + r of the kernel. The conv_transpose2d computes one image for each q. The input channels of the image
    are the input frames q - t for all t; its output channels are the output frames q * s + r for all r < s. The frames
    of one channel are adjacent, so each group consists of adjacent channels.
    """
    args = rewriting.args
    source, weight, bias = args["input"], args["weight"], args["bias"]
    if len(shape_of(source)) == RANK + 1:
        source = rewriting.call(aten.unsqueeze.default, source, 0)
    (stride, *strides), (dilation, *dilations), (padding, *paddings), (more, *mores) = (
        of_each_dim(args[name], RANK) for name in ("stride", "dilation", "padding", "output_padding")
    )
    batch, channels, length, *image = shape_of(source)
    extent = (shape_of(weight)[2] - 1) * dilation + 1
    taps = -(-(extent + max(0, more - padding)) // stride)
    count = length + taps - 1

    frames = rewriting.call(aten.permute.default, source, [0, 2, 1, 3, 4])
    frames = _pad_dim(rewriting, frames, 1, taps - 1, taps - 1)
    if taps > 1:
        starts = range(taps - 1, -1, -1)
        met = [rewriting.call(aten.slice.Tensor, frames, 1, start, start + count) for start in starts]
        each = [rewriting.call(aten.unsqueeze.default, run, 3) for run in met]
        frames = rewriting.call(aten.cat.default, each, 3)
    images = rewriting.call(aten.reshape.default, frames, [batch * count, channels * taps, *image])
    done = rewriting.call(
        aten.conv_transpose2d.input, images, _move_frames_to_channels(rewriting, weight, taps, stride, dilation),
        _repeat_bias(rewriting, bias, stride), strides, paddings, mores, args["groups"], dilations,
    )  # fmt: skip
    _, outputs, depth, *size = (
        rewriting.shape[-RANK - 2 :] if len(rewriting.shape) > RANK + 1 else (1, *rewriting.shape)
    )
    split = rewriting.call(aten.reshape.default, done, [batch, count, outputs, stride, *size])
    woven = rewriting.call(aten.permute.default, split, [0, 2, 1, 3, 4, 5])
    whole = rewriting.call(aten.reshape.default, woven, [batch, outputs, count * stride, *size])
    result = whole
    if depth != count * stride:
        result = rewriting.call(aten.slice.Tensor, whole, 2, padding, padding + depth)
    return rewriting.call(aten.reshape.default, result, list(rewriting.shape)) if len(rewriting.shape) == 4 else result


def _move_frames_to_channels(rewriting: Rewriting, weight: Node, taps: int, stride: int, dilation: int) -> Node:
    """Reshapes a weight [inputs, outputs of a group, depth, h, w] to [inputs * taps, outputs * stride, h, w].

    Frame t * stride + r of the kernel becomes tap t and output frame r. Zeros fill up the last tap, and the gaps of a
    dilated kernel.
    """
    inputs, outputs, depth, *kernel = shape_of(weight)
    if dilation > 1:
        spaced = rewriting.call(aten.unsqueeze.default, weight, 3)
        spaced = _pad_dim(rewriting, spaced, 3, 0, dilation - 1)
        weight = rewriting.call(aten.reshape.default, spaced, [inputs, outputs, depth * dilation, *kernel])
    weight = _pad_dim(rewriting, weight, 2, 0, taps * stride - depth * dilation)
    split = rewriting.call(aten.reshape.default, weight, [inputs, outputs, taps, stride, *kernel])
    moved = rewriting.call(aten.permute.default, split, [0, 2, 1, 3, 4, 5])
    return rewriting.call(aten.reshape.default, moved, [inputs * taps, outputs * stride, *kernel])


def _repeat_bias(rewriting: Rewriting, bias: Node | None, stride: int) -> Node | None:
    """Returns a bias of the conv_transpose2d: each element of `bias` `stride` times, for the frames of one channel."""
    if bias is None or stride == 1:
        return bias
    column = rewriting.call(aten.unsqueeze.default, bias, 1)
    rows = rewriting.call(aten.cat.default, [column] * stride, 1)
    return rewriting.call(aten.reshape.default, rows, [shape_of(bias)[0] * stride])


DECOMPOSED = (
    Decomposition(
        name="transposed convolution of volumes",
        targets=("aten.conv_transpose3d.input",),
        rewrite=_transposed_convolution,
        facts=Facts(layer=LayerKind.TRANSPOSED, is_continuous=True),
        becomes="permute, slice, cat and conv_transpose2d, with frames as input and output channels",
        notes="An activation after it is not fused.",
    ),
)
