"""Windows over height and width: the geometry that convolutions and pools share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from openneutron.core.fx import op_name
from openneutron.ir.graph import Tensor
from openneutron.ir.kinds import PAD, PADV2
from openneutron.ops.lowering import Lowering
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import legacy_constraint

__all__ = [
    "MAX_WEIGHTS_OF_ONE_OUTPUT", "Window", "has_aligned_channels", "image_shape", "of_each_dim", "pad_at_end",
    "pad_spatial", "spatial", "spatial_dims", "spatial_rank",
]  # fmt: skip


MAX_WEIGHTS_OF_ONE_OUTPUT = 65535
"""Products that the NPU adds up for one output value."""


@dataclass(frozen=True)
class Window:
    """A window along one spatial dimension, sizes in elements."""

    size: int
    outputs: int
    kernel: int
    stride: int
    dilation: int
    begin: int
    """Padding in front, as torch has it; what torch pads behind but never reads is left out."""

    @property
    def extent(self) -> int:
        """Elements from the first that the kernel reads to the last."""
        return (self.kernel - 1) * self.dilation + 1

    @property
    def reach(self) -> int:
        """Elements from the first that some window reads to the last."""
        return (self.outputs - 1) * self.stride + self.extent

    @property
    def end(self) -> int:
        """Padding behind that some window reads."""
        return max(0, self.reach - self.size - self.begin)

    @property
    def is_same(self) -> bool:
        """Whether TFLite's padding SAME puts the same padding in the same places."""
        if self.outputs != -(-self.size // self.stride):
            return False
        total = max(0, self.reach - self.size)
        return (self.begin, self.end) == (total // 2, total - total // 2)

    @property
    def is_tiling(self) -> bool:
        """Whether tensors end to end could be one: no window reads padding, or from two of them."""
        return self.begin == 0 and self.extent <= self.stride and self.size % self.stride == 0

    def repeated(self, count: int) -> Window:
        """The window along `count` tensors end to end."""
        return replace(self, size=count * self.size, outputs=count * self.outputs)

    @property
    def is_valid(self) -> bool:
        """Whether no window reads padding."""
        return self.begin == self.end == 0


def of_each_dim(argument: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """An argument of a convolution or pool for each of `dims` spatial dimensions; one number stands for all of them."""
    values = (argument,) if isinstance(argument, int) else tuple(argument)
    return values * dims if len(values) == 1 else values


def spatial_dims(node: Node) -> int | None:
    """The spatial dimensions that an operator has by its name: 1, 2 or 3; None for any other operator."""
    return next((dims for dims in (1, 2, 3) if f"{dims}d" in op_name(node)), None)


def spatial_rank(instance: OpInstance) -> int:
    """The spatial dimensions that an operator has by its name: 1 or 2."""
    return 1 if "1d" in op_name(instance.node) else 2


def spatial(instance: OpInstance, name: str, unit: int) -> tuple[int, int]:
    """A parameter for height and width; `unit` is that of the height of one dimension."""
    height, width = (unit, *of_each_dim(instance.args[name], spatial_rank(instance)))[-2:]
    return int(height), int(width)


def image_shape(instance: OpInstance, shape: Sequence[int]) -> tuple[int, ...]:
    """[N, C, H, W] of a value that may lack a batch, and may have one spatial dimension: then its height is 1."""
    rank = spatial_rank(instance)
    *batch, channels = shape[:-rank]
    return (*(batch or [1]), channels, *(1, *shape[-rank:])[-2:])


@legacy_constraint
def has_aligned_channels(instance: OpInstance) -> bool:
    """The channels are a multiple of the MACs of a pipeline."""
    return image_shape(instance, instance.shape_of("self"))[1] % instance.target.channel_granularity == 0


def pad_spatial(
    lowering: Lowering,
    nhwc: Tensor,
    windows: Sequence[Window],
    value: Tensor | None = None,
    *,
    allow_same: bool = True,
) -> tuple[Tensor, str]:
    """The padded input and TFLite's name of the padding that is left to the operator.

    SAME or VALID where the geometry allows; else an explicit PAD with real zero, or a PADV2 with `value`. `allow_same`
    is off where the operator treats its own padding in another way than torch.
    """
    if all(window.is_valid for window in windows):
        return nhwc, "VALID"
    if allow_same and all(window.is_same for window in windows):
        return nhwc, "SAME"
    paddings = ((0, 0), *((window.begin, window.end) for window in windows), (0, 0))
    shape = tuple(size + sum(pair) for size, pair in zip(nhwc.shape, paddings, strict=True))
    if value is None:
        return lowering.emit(PAD, [nhwc], shape, nhwc.qparams, paddings=paddings), "VALID"
    return lowering.emit(PADV2, [nhwc, value], shape, nhwc.qparams, paddings=paddings), "VALID"


def pad_at_end(lowering: Lowering, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor in a larger shape, real zero behind what it has."""
    if shape == tensor.shape:
        return tensor
    paddings = tuple((0, size - old) for size, old in zip(shape, tensor.shape, strict=True))
    return lowering.emit(PAD, [tensor], shape, tensor.qparams, paddings=paddings)
