"""Weighted means of samples, as additional samples for training.

A recurrent layer has more weights than a few dozen calibration inputs have values. Training on these inputs alone would
reduce the errors of no other inputs. The float model gives the wanted values for any input, so weighted means of two
inputs are samples, too (inputs as in Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018, section 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from openneutron.recovery.layerwise import Samples

__all__ = ["MixedSamples"]


class MixedSamples(Sequence[tuple[Any, ...]]):
    """`samples`, followed by `count` weighted means of two of them, which are computed when they are read.

    The means are those of samples with an index in `mixed`. The weights are between 0 and 1 with equal chances. Integer
    and boolean tensors, and tensors whose shape differs in the two samples, are those of the first sample. The pairs
    and weights are the same in each process.
    """

    def __init__(self, samples: Samples, mixed: Sequence[int], count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randint(len(mixed), (count, 2), generator=generator).tolist()
        self._samples = samples
        self._pairs = [(mixed[first], mixed[second]) for first, second in chosen]
        self._weights: list[float] = torch.rand(count, generator=generator).tolist()

    def __len__(self) -> int:
        return len(self._samples) + len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> tuple[Any, ...]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[Any, ...]]: ...

    def __getitem__(self, index: int | slice) -> tuple[Any, ...] | list[tuple[Any, ...]]:
        """Returns one sample. Raises `IndexError` beyond the last one."""
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if index < len(self._samples):
            return self._samples[index]
        first, second = self._pairs[index - len(self._samples)]
        weight = self._weights[index - len(self._samples)]
        pairs = zip(self._samples[first], self._samples[second], strict=True)
        return tuple(_mean(*pair, weight) for pair in pairs)


def _mean(first: Any, second: Any, weight: float) -> Any:
    if not isinstance(first, Tensor) or not first.is_floating_point() or first.shape != second.shape:
        return first
    return torch.lerp(second, first, weight)
