"""Windows over height and width: the geometry that convolutions and pools share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from openneutron.core.fx import op_name
from openneutron.ir.graph import Kind, Layout, Tensor
from openneutron.ops.lowering import Lowering
from openneutron.ops.site import Site

__all__ = ["PAD", "PADV2", "Window", "image_shape", "pad_behind", "pad_spatial", "spatial", "spatial_rank"]

PAD = Kind("PAD", "PadOptions", Layout.AXES, operands=("paddings",), dimensions=("paddings",))
PADV2 = Kind("PADV2", "PadV2Options", Layout.AXES, operands=("paddings",), dimensions=("paddings",))


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


def spatial_rank(site: Site) -> int:
    """The spatial dimensions that an operator has by its name: 1 or 2."""
    return 1 if "1d" in op_name(site.node) else 2


def spatial(site: Site, name: str, unit: int) -> tuple[int, int]:
    """A parameter for height and width; `unit` is that of the height of one dimension."""
    value, rank = site.args[name], spatial_rank(site)
    values = (value,) if isinstance(value, int) else tuple(value)
    height, width = (unit, *(values * rank if len(values) == 1 else values))[-2:]
    return int(height), int(width)


def image_shape(site: Site, shape: Sequence[int]) -> tuple[int, ...]:
    """[N, C, H, W] of a value that may lack a batch, and may have one spatial dimension: then its height is 1."""
    rank = spatial_rank(site)
    *batch, channels = shape[:-rank]
    return (*(batch or [1]), channels, *(1, *shape[-rank:])[-2:])


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


def pad_behind(lowering: Lowering, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor in a larger shape, real zero behind what it has."""
    if shape == tensor.shape:
        return tensor
    paddings = tuple((0, size - old) for size, old in zip(shape, tensor.shape, strict=True))
    return lowering.emit(PAD, [tensor], shape, tensor.qparams, paddings=paddings)
