"""Records calibration inputs in a prepared module, for methods that need them at conversion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchao.quantization.pt2e import ObserverBase

__all__ = ["RECORDED_BYTES", "InputRecorder"]

RECORDED_BYTES = 64 << 20
"""Limit in bytes of the inputs that one recorder keeps. It keeps at least one sample."""

Sample = tuple[Any, ...]


class InputRecorder(ObserverBase):
    """Keeps the first samples that the prepared module gets, up to `RECORDED_BYTES`. Observes no range.

    `sizes` are the first dimensions of the inputs of one sample; None for an input without dimensions and for an
    argument that is not a tensor. Inputs with k times these sizes are k samples. Merging the recorders of consecutive
    parts of a stream gives the recorder of the whole stream.
    """

    def __init__(self, sizes: Sequence[int | None]) -> None:
        super().__init__(dtype=torch.float32)
        self._is_impure = True  # keeps the call in the graph, although nothing reads its output
        self._sizes = tuple(sizes)
        self.samples: list[Sample] = []
        self._bytes = 0

    def forward(self, *inputs: Any) -> None:
        """Records the inputs of the prepared module, in their order."""
        count = self._count(inputs)
        for index in range(count):
            if not self._record(tuple(map(self._part, inputs, self._sizes, [index] * len(inputs)))):
                break

    def _count(self, inputs: Sample) -> int:
        """Returns the number of samples in `inputs`."""
        counts = [len(value) // size for value, size in zip(inputs, self._sizes, strict=True) if size]
        return min(counts, default=1)

    @staticmethod
    def _part(value: Any, size: int | None, index: int) -> Any:
        if not isinstance(value, Tensor):
            return value
        part = value if size is None else value[index * size : (index + 1) * size]
        return part.detach().to("cpu", copy=True)

    def _record(self, sample: Sample) -> bool:
        """Keeps `sample` if there is room. Returns whether it was kept."""
        size = sum(value.numel() * value.element_size() for value in sample if isinstance(value, Tensor))
        if self.samples and self._bytes + size > RECORDED_BYTES:
            self._bytes = RECORDED_BYTES  # later samples, which may be smaller, are not kept either
            return False
        self.samples.append(sample)
        self._bytes += size
        return True

    def calculate_qparams(self, **_: Any) -> None:
        """Returns None, because this observer selects no range."""

    def state(self) -> dict[str, Any]:
        """Returns the recorded samples, for `merge`."""
        return {"samples": list(self.samples)}

    def merge(self, later: Mapping[str, Any]) -> None:
        """Adds the `state` of a recorder that saw the next part of the stream."""
        for sample in later["samples"]:
            if not self._record(sample):
                break

    def get_extra_state(self) -> dict[str, Any]:
        """Returns the recorded samples for `state_dict`, because no buffer holds them."""
        return self.state()

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restores the recorded samples from `load_state_dict`."""
        self.samples, self._bytes = [], 0
        self.merge(state)
