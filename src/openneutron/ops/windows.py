"""The geometry of windows over height and width, for convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from openneutron.core.fx import op_name
from openneutron.ir.graph import Tensor
from openneutron.ir.kinds import PAD, PADV2
from openneutron.ir.windows import Window
from openneutron.ops.lowering import Lowering
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import legacy_constraint

__all__ = [
    "has_aligned_channels", "image_shape", "of_each_dim", "pad_at_end",
    "pad_spatial", "spatial", "spatial_dims", "spatial_rank",
]  # fmt: skip


def of_each_dim(argument: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """Returns an argument of a convolution or pool for each of `dims` spatial dimensions. One number is repeated."""
    values = (argument,) if isinstance(argument, int) else tuple(argument)
    return values * dims if len(values) == 1 else values


def spatial_dims(node: Node) -> int | None:
    """Returns the number of spatial dimensions in an operator's name: 1, 2 or 3; None for any other operator."""
    return next((dims for dims in (1, 2, 3) if f"{dims}d" in op_name(node)), None)


def spatial_rank(instance: OpInstance) -> int:
    """Returns the number of spatial dimensions of a 1-D or 2-D operator: 1 if its name has "1d", else 2."""
    return 1 if "1d" in op_name(instance.node) else 2


def spatial(instance: OpInstance, name: str, unit: int) -> tuple[int, int]:
    """Returns the argument `name` as (height, width); for a 1-D operator, the height gets `unit`."""
    height, width = (unit, *of_each_dim(instance.args[name], spatial_rank(instance)))[-2:]
    return int(height), int(width)


def image_shape(instance: OpInstance, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns `shape` as [N, C, H, W]. A missing batch dimension, and the height of a 1-D operator, are 1."""
    rank = spatial_rank(instance)
    *batch, channels = shape[:-rank]
    return (*(batch or [1]), channels, *(1, *shape[-rank:])[-2:])


@legacy_constraint
def has_aligned_channels(instance: OpInstance) -> bool:
    """The channels are a multiple of the MACs per pipeline."""
    return image_shape(instance, instance.shape_of("self"))[1] % instance.target.channel_granularity == 0


def pad_spatial(
    lowering: Lowering,
    nhwc: Tensor,
    windows: Sequence[Window],
    value: Tensor | None = None,
    *,
    allow_same: bool = True,
) -> tuple[Tensor, str]:
    """Returns the input, padded if needed, and TFLite's padding attribute for the operator: "SAME" or "VALID".

    If the padding is neither SAME nor VALID, emits a PAD with real zero, or a PADV2 with `value`, and returns "VALID".
    `allow_same` must be False for operators that treat SAME padding differently from torch.
    """
    if all(window.has_valid_padding for window in windows):
        return nhwc, "VALID"
    if allow_same and all(window.has_same_padding for window in windows):
        return nhwc, "SAME"
    paddings = ((0, 0), *((window.padding_before, window.padding_after) for window in windows), (0, 0))
    shape = tuple(size + sum(pair) for size, pair in zip(nhwc.shape, paddings, strict=True))
    if value is None:
        return lowering.emit(PAD, [nhwc], shape, nhwc.qparams, paddings=paddings), "VALID"
    return lowering.emit(PADV2, [nhwc, value], shape, nhwc.qparams, paddings=paddings), "VALID"


def pad_at_end(lowering: Lowering, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Pads `tensor` to `shape` with real zero at the end of each dimension; returns it unchanged if it has `shape`."""
    if shape == tensor.shape:
        return tensor
    paddings = tuple((0, size - old) for size, old in zip(shape, tensor.shape, strict=True))
    return lowering.emit(PAD, [tensor], shape, tensor.qparams, paddings=paddings)
