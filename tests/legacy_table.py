"""The limits of the legacy generation as a specification of TFLite operators."""

from __future__ import annotations

from collections.abc import Callable

from openneutron.ir.cost import array_of
from openneutron.ir.graph import Graph, Op
from openneutron.targets import NeutronTarget

__all__ = ["faults"]


def faults(graph: Graph, target: NeutronTarget) -> list[str]:
    """Returns the operators of `graph` that break a limit of the legacy generation, as text."""
    checked = ((op, LIMITS.get(op.kind.name)) for op in graph.ops)
    return [
        f"{op.kind.name} of {[tensor.shape for tensor in op.inputs]} to {op.output.shape} with {dict(op.attrs)}"
        for op, holds in checked
        if holds is not None and not holds(op, target)
    ]


def _channels(op: Op, target: NeutronTarget) -> bool:
    return op.inputs[0].shape[-1] % target.channel_granularity == 0


def _slopes(op: Op, target: NeutronTarget) -> bool:
    """Whether the slopes, or the channels in either layout if there is one slope, are a multiple of the granularity."""
    shape, slopes = op.inputs[0].shape, max(op.inputs[1].shape, default=1)
    candidates = (slopes,) if slopes > 1 else (shape[1], shape[-1])
    return any(channels % target.channel_granularity == 0 for channels in candidates)


def _one_image(op: Op, _: NeutronTarget) -> bool:
    return op.inputs[0].shape[0] == 1


def _mean(op: Op, target: NeutronTarget) -> bool:
    is_spatial = tuple(op.attrs["axes"]) == (1, 2) and len(op.inputs[0].shape) == 4
    return is_spatial and bool(op.attrs["keep_dims"]) and _channels(op, target)


def _concatenation(op: Op, target: NeutronTarget) -> bool:
    channel = -1 if len(op.output.shape) == 4 else min(1, len(op.output.shape) - 1)
    whole = all(tensor.shape[channel] % target.channel_granularity == 0 for tensor in op.inputs)
    return op.attrs["axis"] != 0 and len(op.inputs) >= 2 and whole


def _slice(op: Op, target: NeutronTarget) -> bool:
    sizes = zip(op.inputs[0].shape, op.output.shape, strict=True)
    return all(size % target.channel_granularity == 0 for size, kept in sizes if size != kept)


def _transpose(op: Op, target: NeutronTarget) -> bool:
    batch, height, width, channels = op.inputs[0].shape
    positions = height * width
    if 1 in (positions, channels):
        return batch == 1
    whole = 0 in (channels % target.channel_granularity, positions % target.channel_granularity)
    return op.attrs["perm"] == (0, 3, 1, 2) and batch == 1 and whole


def _transposed(op: Op, target: NeutronTarget) -> bool:
    (outputs, height, width, inputs), stride = op.inputs[0].shape, (op.attrs["stride_h"], op.attrs["stride_w"])
    whole = inputs % target.channel_granularity == 0 and outputs % target.channel_granularity == 0
    return op.inputs[1].shape[0] == 1 and height == 1 and stride[0] == 1 and stride[1] <= min(2, width) and whole


def _softmax(op: Op, target: NeutronTarget) -> bool:
    fits = op.output.shape[-1] < 4096 // array_of(target).pipelines * 4
    fits = fits and op.output.size <= 65536 * target.channel_granularity
    return len(op.output.shape) >= 2 and _channels(op, target) and fits


# By TFLite operator. Operators without an entry have no limit of the legacy generation only.
LIMITS: dict[str, Callable[[Op, NeutronTarget], bool]] = {
    "CONV_2D": _one_image,
    "DEPTHWISE_CONV_2D": _one_image,
    "MAX_POOL_2D": _channels,
    "MEAN": _mean,
    "CONCATENATION": _concatenation,
    "SLICE": _slice,
    "TRANSPOSE": _transpose,
    "SOFTMAX": _softmax,
    "TRANSPOSE_CONV": _transposed,
    "PRELU": _slopes,
    "RESIZE_BILINEAR": _channels,
    "RESIZE_NEAREST_NEIGHBOR": _channels,
}
