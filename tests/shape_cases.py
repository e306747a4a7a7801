"""Table of the operator tests: operators that only move values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tests.case import Case, Rejected, Shape, move, moved, of

__all__ = ["CASES", "REJECTED"]

aten = torch.ops.aten
IMAGE: Shape = (2, 4, 6, 8)

Function = Callable[[torch.Tensor], Any]

split: Callable[..., Any] = torch.split


def case(target: str, label: str, function: Function, shape: Shape = IMAGE) -> Case:
    """Returns a case of `function` after an operator that is worth a partition."""
    return Case(f"aten.{target}", label, moved(function), (shape,))


def both(target: str, label: str, function: Callable[..., Any], *shapes: Shape) -> Case:
    """Returns a case of `function` of two or more values, each after an operator that is worth a partition."""
    return Case(f"aten.{target}", label, of(lambda *values: function(*map(move, values))), shapes or (IMAGE, IMAGE))


def between(target: str, label: str, function: Function, channels: int, shape: Shape = IMAGE) -> Case:
    """Returns a case of `function` between convolutions, whose images are stored NHWC."""

    def make() -> torch.nn.Module:
        first, last = torch.nn.Conv2d(shape[1], 8, 3, padding=1), torch.nn.Conv2d(channels, 3, 1)
        return of(lambda a, b, x: b(function(a(x))), first, last)()

    return Case(f"aten.{target}", f"between convolutions: {label}", make, (shape,))


def _splits() -> list[Case]:
    def rejoined(parts: Any) -> torch.Tensor:
        first, *rest = parts
        return torch.cat([*rest, first.abs()], 1)

    return [
        case("split.Tensor", "equal", lambda x: split(x, 2, 1)),
        case("split.Tensor", "with a rest", lambda x: split(x, 3, -2)),
        case("split.Tensor", "one part", lambda x: split(x, 9, 2)),
        case("split.Tensor", "one part unread", lambda x: split(x, 2, 1)[1]),
        between("split.Tensor", "channels", lambda x: rejoined(split(x, 4, 1)), 8),
        case("split.sizes", "unequal", lambda x: aten.split.sizes(x, [1, 3], 1)),
        case("split_with_sizes.default", "unequal", lambda x: split(x, [1, 2, 3], 2)),
        case("unsafe_split.Tensor", "rows", lambda x: x.unsafe_split(2, 2)),
        case("unsafe_split_with_sizes.default", "batch", lambda x: aten.unsafe_split_with_sizes(x, [1, 1], 0)),
        case("chunk.default", "equal", lambda x: x.chunk(2, 1)),
        case("chunk.default", "unequal", lambda x: x.chunk(4, 2)),
        case("chunk.default", "fewer than asked for", lambda x: x.chunk(5, 1)),
        between("chunk.default", "channels", lambda x: rejoined(x.chunk(2, 1)), 8),
        case("unsafe_chunk.default", "columns", lambda x: x.unsafe_chunk(2, -1)),
        case("tensor_split.sections", "unequal", lambda x: x.tensor_split(4, 2)),
        case("tensor_split.indices", "indices", lambda x: x.tensor_split((1, -1), 3)),
        case("tensor_split.indices", "an empty part", lambda x: x.tensor_split((2, 2), 1)[::2]),
        case("hsplit.int", "image", lambda x: x.hsplit(2)),
        case("hsplit.int", "rank 1", lambda x: x.hsplit(3), (9,)),
        case("hsplit.array", "image", lambda x: x.hsplit((1, 2))),
        case("vsplit.int", "image", lambda x: x.vsplit(2)),
        case("vsplit.array", "matrix", lambda x: x.vsplit((2,)), (5, 3)),
        case("dsplit.int", "image", lambda x: x.dsplit(3)),
        case("dsplit.array", "image", lambda x: x.dsplit((1, 4))),
        case("unbind.int", "channels", lambda x: x.unbind(1)),
        case("unbind.int", "negative", lambda x: x.unbind(-1), (2, 3)),
        case("unbind.int", "iteration", lambda x: [row + 1.0 for row in x]),
        case("unbind.int", "attention's heads", lambda x: x.reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0),
             (2, 5, 24)),
    ]  # fmt: skip


def _parts() -> list[Case]:
    return [
        case("select.int", "channel", lambda x: x[:, 1]),
        case("select.int", "negative", lambda x: x.select(-1, -2)),
        case("select.int", "batch", lambda x: x[1]),
        case("select.int", "rank 1", lambda x: x[2], (5,)),
        case("select.int", "two", lambda x: x[:, 3, 2]),
        between("select.int", "one channel", lambda x: x[:, 5].unsqueeze(1), 1),
        between("select.int", "two channels", lambda x: torch.stack([x[:, 5], x[:, 2]], 1), 2),
        case("narrow.default", "rows", lambda x: x.narrow(2, 1, 3)),
        case("narrow.default", "negative", lambda x: x.narrow(-1, -3, 2)),
        case("unfold.default", "columns", lambda x: x.unfold(3, 2, 2)),
        case("unfold.default", "with a rest", lambda x: x.unfold(2, 4, 4)),
        case("unfold.default", "patches", lambda x: x.unfold(2, 3, 3).unfold(3, 4, 4)),
    ]


def _steps() -> list[Case]:
    def step(label: str, function: Function, shape: Shape = IMAGE) -> Case:
        return case("slice.Tensor", f"step: {label}", function, shape)

    def every(label: str, function: Function, channels: int = 8) -> Case:
        return between("slice.Tensor", f"step: {label}", function, channels)

    def phases(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)

    return [
        step("rows and columns", lambda x: x[:, :, ::2, ::2]),
        step("odd sizes", lambda x: x[:, :, ::2, ::3], (2, 3, 7, 8)),
        step("with offsets", lambda x: x[:, :, 1::2, 2::3]),
        step("with an end", lambda x: x[:, :, :5:2, -7:-1:4]),
        step("larger than the image", lambda x: x[:, :, ::9]),
        step("one dimension twice", lambda x: x[:, :, ::2][:, :, ::2]),
        step("batch", lambda x: x[::2]),
        step("channels", lambda x: x[:, 1::2]),
        step("channels with a rest", lambda x: x[:, ::3]),
        step("that only the front can fill", lambda x: x[:, 1::2], (2, 5, 3, 3)),
        step("that nothing can fill", lambda x: x[::2], (5, 3)),
        step("rank 3", lambda x: x[..., ::2], (2, 3, 9)),
        step("rank 1", lambda x: x[1::4], (10,)),
        step("rank 5", lambda x: x[:, :, :, ::2], (2, 3, 2, 4, 3)),
        every("rows and columns", lambda x: x[:, :, ::2, ::2]),
        every("offsets", lambda x: x[:, :, 1::2, 1::3]),
        every("channels", lambda x: x[:, ::2], 4),
        every("channels with a rest", lambda x: x[:, 1::3], 3),
        every("shortcut that adds channels", lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)), 16),
        every("focus", phases, 32),
    ]


def _stacks() -> list[Case]:
    return [
        both("stack.default", "in front", lambda x, y: torch.stack([x, y])),
        both("stack.default", "channels", lambda x, y: torch.stack([x, y], 1)),
        both("stack.default", "last dimension", lambda x, y: torch.stack([x, y], -1)),
        both("stack.default", "rank 1", lambda x, y: torch.stack([x, y], 1), (5,), (5,)),
        case("stack.default", "of one", lambda x: torch.stack([x], 2)),
        between("stack.default", "interleaved", lambda x: torch.stack([x, x.abs()], 2).flatten(1, 2), 16),
        both("concatenate.default", "channels", lambda x, y: aten.concatenate([x, y], 1)),
        both("hstack.default", "channels", lambda x, y: torch.hstack([x, y])),
        both("hstack.default", "rank 1", lambda x, y: torch.hstack([x, y]), (3,), (4,)),
        both("vstack.default", "batches", lambda x, y: torch.vstack([x, y])),
        both("vstack.default", "rank 1", lambda x, y: torch.vstack([x, y]), (3,), (3,)),
        both("row_stack.default", "rank 1", lambda x, y: aten.row_stack([x, y]), (3,), (3,)),
        both("dstack.default", "rows", lambda x, y: torch.dstack([x, y])),
        both("dstack.default", "rank 2", lambda x, y: torch.dstack([x, y]), (3, 4), (3, 4)),
        both("column_stack.default", "rank 1 and 2", lambda x, y: torch.column_stack([x, y]), (3,), (3, 4)),
    ]


def _repeats() -> list[Case]:
    return [
        case("expand.default", "channels", lambda x: x[:, :1].expand(-1, 3, -1, -1)),
        case("expand.default", "more dimensions", lambda x: x.expand(3, 2, 4, 6, 8)),
        case("expand.default", "17 copies", lambda x: x.expand(17, 5), (1, 5)),
        case("expand.default", "100 copies", lambda x: x.expand(3, 100), (3, 1)),
        case("expand.default", "two dimensions", lambda x: x.expand(2, 4, 6, 8), (2, 4, 1, 1)),
        case("expand.default", "nothing", lambda x: x.expand(-1, 4, 6, 8)),
        case("expand.default", "nearest neighbors",
             lambda x: x[:, :, :, None, :, None].expand(2, 4, 6, 2, 8, 2).reshape(2, 4, 12, 16)),
        both("expand.default", "that a sum does itself", lambda x, y: x + y.expand(2, 4, 6, 8), IMAGE, (1, 4, 1, 1)),
        both("expand_as.default", "channels", lambda x, y: x.abs() * 2.0 + y[:, :1].expand_as(x)),
        both("expand_as.default", "read elsewhere", lambda x, y: torch.cat([x, y.expand_as(x)], 1), IMAGE, (4, 1, 1)),
        case("broadcast_to.default", "channels", lambda x: torch.broadcast_to(x, (2, 3, 4, 5)), (2, 1, 4, 5)),
        both("broadcast_tensors.default", "one of two", torch.broadcast_tensors, IMAGE, (4, 1, 8)),
        case("repeat.default", "two dimensions", lambda x: x.repeat(1, 3, 2, 1)),
        case("repeat.default", "more dimensions", lambda x: x.repeat(2, 1, 2), (3, 4)),
        case("repeat.default", "nothing", lambda x: x.repeat(1, 1, 1, 1)),
        case("tile.default", "columns", lambda x: x.tile(3)),
        case("tile.default", "rank 1", lambda x: x.tile(2, 11), (4,)),
        case("repeat_interleave.self_int", "rows", lambda x: x.repeat_interleave(2, 2)),
        case("repeat_interleave.self_int", "all", lambda x: x.repeat_interleave(3), (2, 5)),
        case("repeat_interleave.self_int", "channels", lambda x: x.repeat_interleave(9, 1)),
        case("repeat_interleave.self_int", "once", lambda x: x.repeat_interleave(1, 1)),
        case("repeat_interleave.self_int", "rank 5", lambda x: x.repeat_interleave(2, 3), (2, 3, 2, 4, 3)),
        between("repeat_interleave.self_int", "rows and columns",
                lambda x: x.repeat_interleave(2, 2).repeat_interleave(3, 3), 8),
        between("repeat_interleave.self_int", "channels", lambda x: x.repeat_interleave(2, 1), 16),
        between("repeat.default", "channels", lambda x: x.repeat(1, 2, 1, 1), 16),
    ]  # fmt: skip


def _turns() -> list[Case]:
    return [
        case("roll.default", "columns", lambda x: x.roll(3, 3)),
        case("roll.default", "rows and columns", lambda x: x.roll((-1, 2), (2, 3))),
        case("roll.default", "flat", lambda x: x.roll(5), (3, 4)),
        case("roll.default", "once around", lambda x: x.roll((6, 9), (2, -1))),
        between("roll.default", "rows and columns", lambda x: x.roll((1, 1), (2, 3)), 8),
        case("flip.default", "columns", lambda x: x.flip(3)),
        case("flip.default", "two dimensions", lambda x: x.flip((0, -2))),
        case("fliplr.default", "matrix", torch.fliplr, (3, 4)),
        case("flipud.default", "matrix", torch.flipud, (3, 4)),
        between("flip.default", "rows", lambda x: x.flip(2), 8),
        case("rot90.default", "once", lambda x: torch.rot90(x, 1, (2, 3))),
        case("rot90.default", "twice", lambda x: torch.rot90(x, 2, (2, 3))),
        case("rot90.default", "back", lambda x: torch.rot90(x, -1, (3, 2))),
        case("rot90.default", "not at all", lambda x: torch.rot90(x, 4, (2, 3))),
    ]


def _shuffles() -> list[Case]:
    return [
        case("pixel_shuffle.default", "2", lambda x: F.pixel_shuffle(x, 2)),
        case("pixel_shuffle.default", "3 rank 3", lambda x: F.pixel_shuffle(x, 3), (9, 2, 4)),
        case("pixel_shuffle.default", "rank 5", lambda x: F.pixel_shuffle(x, 2), (2, 3, 8, 2, 4)),
        between("pixel_shuffle.default", "2", lambda x: F.pixel_shuffle(x, 2), 2),
        case("pixel_unshuffle.default", "2", lambda x: F.pixel_unshuffle(x, 2)),
        case("pixel_unshuffle.default", "2 rank 3", lambda x: F.pixel_unshuffle(x, 2), (3, 6, 4)),
        between("pixel_unshuffle.default", "2", lambda x: F.pixel_unshuffle(x, 2), 32),
        case("channel_shuffle.default", "2", lambda x: F.channel_shuffle(x, 2)),
        case("channel_shuffle.default", "3 rank 3", lambda x: F.channel_shuffle(x, 3), (2, 6, 5)),
        case("native_channel_shuffle.default", "2", lambda x: torch.native_channel_shuffle(x, 2)),
        between("channel_shuffle.default", "4", lambda x: F.channel_shuffle(x, 4), 8),
    ]


def _views() -> list[Case]:
    matrix: Shape = (3, 5)
    return [
        case("ravel.default", "image", torch.ravel),
        both("view_as.default", "flat", lambda x, y: x.view_as(y), IMAGE, (8, 48)),
        both("reshape_as.default", "flat", lambda x, y: x.transpose(1, 2).reshape_as(y), IMAGE, (8, 48)),
        case("movedim.int", "channels last", lambda x: x.movedim(1, -1)),
        case("movedim.intlist", "two", lambda x: x.movedim((0, 1), (2, 0))),
        case("moveaxis.int", "channels", lambda x: torch.moveaxis(x, 1, 2)),
        case("moveaxis.intlist", "two", lambda x: torch.moveaxis(x, (1, 3), (3, 0))),
        case("swapaxes.default", "1,2", lambda x: x.swapaxes(1, 2)),
        case("swapdims.default", "negative", lambda x: x.swapdims(-1, 1)),
        case("t.default", "matrix", torch.t, matrix),
        case("t.default", "rank 1", torch.t, (5,)),
        case("numpy_T.default", "matrix", lambda x: x.T, matrix),
        case("mT.default", "image", lambda x: x.mT),
        case("mH.default", "image", lambda x: x.mH),
        case("matrix_H.default", "matrix", lambda x: x.H, matrix),
        case("adjoint.default", "image", lambda x: x.adjoint()),
    ]


def _copies() -> list[Case]:
    last = torch.channels_last
    return [
        case("clone.default", "image", torch.clone),
        case("clone.default", "channels last", lambda x: x.clone(memory_format=last)),
        case("contiguous.default", "after a permute", lambda x: x.permute(0, 2, 3, 1).contiguous().view(2, -1)),
        case("contiguous.default", "channels last", lambda x: x.contiguous(memory_format=last)),
        case("alias.default", "image", aten.alias),
        case("detach.default", "image", torch.detach),
        case("detach_.default", "image", aten.detach_),
        case("lift_fresh_copy.default", "image", aten.lift_fresh_copy),
        case("to.dtype", "float32", lambda x: x.float().relu()),
        case("to.dtype", "a copy", lambda x: x.to(torch.float32, copy=True)),
        case("to.dtype_layout", "channels last", lambda x: x.to(memory_format=last).relu()),
        case("to.dtype_layout", "device", lambda x: x.to("cpu")),
        both("to.device", "of another", lambda x, y: torch.cat([x.to(y), y])),
        both("to.other", "another", lambda x, y: torch.cat([aten.to.other(x, y), y])),
        both("type_as.default", "another", lambda x, y: torch.cat([x.type_as(y), y])),
        case("_to_copy.default", "channels last", lambda x: aten._to_copy(x, memory_format=last)),
        between("contiguous.default", "channels last", lambda x: x.contiguous(memory_format=last), 8),
    ]


def _pads() -> list[Case]:
    def pad(label: str, mode: str, shape: Shape, *widths: int) -> Case:
        return case("pad.default", f"{mode} {label}", lambda x: F.pad(x, widths, mode), shape)

    line, volume = (2, 3, 5), (1, 2, 3, 4, 3)
    return [
        pad("image", "replicate", IMAGE, 1, 2, 3, 1),
        pad("line in front", "replicate", line, 4, 0),
        pad("by many", "replicate", line, 20, 9),
        pad("volume", "replicate", volume, 1, 1, 0, 2, 1, 0),
        pad("image", "circular", IMAGE, 1, 2, 3, 1),
        pad("line end", "circular", line, 0, 5),
        pad("volume", "circular", volume, 1, 1, 0, 2, 1, 0),
        between("pad.default", "replicate", lambda x: F.pad(x, (1, 1, 1, 1), "replicate"), 8),
        between("pad.default", "circular", lambda x: F.pad(x, (1, 1, 1, 1), "circular"), 8),
        case("reflection_pad1d.default", "line", lambda x: aten.reflection_pad1d(x, [2, 1]), line),
        case("reflection_pad2d.default", "image", lambda x: aten.reflection_pad2d(x, [2, 1, 0, 3])),
        case("reflection_pad3d.default", "volume", lambda x: aten.reflection_pad3d(x, [1, 1, 2, 0, 1, 0]), volume),
        case("replication_pad1d.default", "line", lambda x: aten.replication_pad1d(x, [2, 1]), line),
        case("replication_pad2d.default", "image", lambda x: aten.replication_pad2d(x, [2, 1, 0, 3])),
        case("replication_pad3d.default", "volume", lambda x: aten.replication_pad3d(x, [1, 1, 2, 0, 1, 0]), volume),
    ]


CASES: tuple[Case, ...] = (
    *_splits(), *_parts(), *_steps(), *_stacks(), *_repeats(), *_turns(), *_shuffles(), *_views(), *_copies(), *_pads(),
)  # fmt: skip


GRANULES: Shape = (1, 8, 6, 6)
deep: Shape = (1, 2, 1, 2, 2, 1, 2)
pair = of(lambda x, y: torch.cat([move(x), move(y)], 3))

REJECTED: tuple[Rejected, ...] = (
    Rejected("cat", "has_rank_for_kernels", "", pair, (deep, deep)),
    Rejected("pad", "has_rank_for_kernels", "", moved(lambda x: F.pad(x, (1, 1))), (deep,)),
    Rejected("pad", "crops_constants_only", "reflect", moved(lambda x: F.pad(x, (-1, 1), "reflect")), ((2, 3, 5),)),
    Rejected("pad", "pads_without_copies", "", moved(lambda x: F.pad(x, (1, 1), "replicate")), ((2, 3, 5),)),
    Rejected("repeat", "has_rank_for_kernels", "", moved(lambda x: x.repeat(1, 1, 1, 2, 1, 1, 1)), (deep,)),
    Rejected("repeat", "is_of_the_modern_generation", "", moved(lambda x: x.repeat(1, 2, 1, 1)), (GRANULES,)),
    Rejected("repeat_interleave", "has_rank_for_interleaving", "",
             moved(lambda x: x.repeat_interleave(2, 1)), (deep[:6],)),
    Rejected("repeat_interleave", "is_of_the_modern_generation", "",
             moved(lambda x: x.repeat_interleave(2, 1)), (GRANULES,)),
    Rejected("roll", "has_rank_for_kernels", "", moved(lambda x: x.roll(1, 1)), (deep,)),
    Rejected("roll", "is_of_the_modern_generation", "", moved(lambda x: x.roll(1, 1)), (GRANULES,)),
    Rejected("flip", "has_rank_for_kernels", "", moved(lambda x: x.flip(1)), (deep,)),
    Rejected("flip", "flips_few_indices", "", moved(lambda x: x.flip(1)), ((2, 17),)),
    Rejected("flip", "is_of_the_modern_generation", "", moved(lambda x: x.flip(1)), (GRANULES,)),
    Rejected("pixel_shuffle", "is_of_the_modern_generation", "", moved(lambda x: F.pixel_shuffle(x, 2)), (GRANULES,)),
    Rejected("pixel_unshuffle", "is_of_the_modern_generation", "",
             moved(lambda x: F.pixel_unshuffle(x, 2)), (GRANULES,)),
    Rejected("channel_shuffle", "is_of_the_modern_generation", "",
             moved(lambda x: F.channel_shuffle(x, 2)), (GRANULES,)),
    Rejected("unfold", "has_rank_for_transpose", "", moved(lambda x: x.unfold(1, 2, 2)), (deep[:6],)),
    Rejected("unfold", "is_of_the_modern_generation", "", moved(lambda x: x.unfold(2, 2, 2)), (GRANULES,)),
)  # fmt: skip
