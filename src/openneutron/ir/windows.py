"""The windows of convolutions and pools along one spatial dimension."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["Window"]


@dataclass(frozen=True)
class Window:
    """The windows of a convolution or pool along one spatial dimension; sizes are in elements."""

    size: int
    outputs: int
    kernel: int
    stride: int
    dilation: int
    padding_before: int
    """Padding at the start, as in torch."""

    @property
    def extent(self) -> int:
        """Kernel size including dilation: the elements from the first to the last one of one window."""
        return (self.kernel - 1) * self.dilation + 1

    @property
    def reach(self) -> int:
        """Number of elements from the start of the first window to the end of the last window."""
        return (self.outputs - 1) * self.stride + self.extent

    @property
    def padding_after(self) -> int:
        """Padding at the end that the last window reads. torch may add more padding, which no window reads."""
        return max(0, self.reach - self.size - self.padding_before)

    @property
    def has_same_padding(self) -> bool:
        """Whether the padding equals TFLite's padding SAME."""
        if self.outputs != -(-self.size // self.stride):
            return False
        total = max(0, self.reach - self.size)
        return (self.padding_before, self.padding_after) == (total // 2, total - total // 2)

    @property
    def is_tiling(self) -> bool:
        """Whether concatenating tensors along this dimension concatenates their outputs.

        Requires that each window reads elements of one tensor and no padding.
        """
        return self.padding_before == 0 and self.extent <= self.stride and self.size % self.stride == 0

    def repeated(self, count: int) -> Window:
        """Returns the window for `count` concatenated tensors."""
        return replace(self, size=count * self.size, outputs=count * self.outputs)

    @property
    def has_valid_padding(self) -> bool:
        """Whether no window reads padding."""
        return self.padding_before == self.padding_after == 0

    def zeros_for_same(self) -> tuple[int, int] | None:
        """Returns the fewest zeros before and after the kernel with which padding SAME has the same windows.

        SAME gives ceil(size / stride) outputs, and pads by half of what the windows need, rounded down, at the start.
        A zero after the kernel adds `dilation` elements to this need, and a zero before it also shifts the kernel by
        `dilation`. Returns None if SAME gives another number of outputs, or if no number of zeros fits.
        """
        if self.outputs != -(-self.size // self.stride):
            return None
        needed, found = self.reach - self.size, []
        for odd in (0, 1):
            surplus, rest = divmod(2 * self.padding_before + odd - needed, self.dilation)
            zeros = (max(0, -surplus), max(0, surplus))
            padding = max(0, needed + sum(zeros) * self.dilation)
            if rest == 0 and padding // 2 == self.padding_before + zeros[0] * self.dilation:
                found.append(zeros)
        return min(found, key=sum, default=None)
