"""Keeps the calibration inputs in memory up to a limit, and the rest in temporary files.

The tensors of a file are mapped into memory: the system reads them when they are used, and drops them when memory is
needed. So the data of a generator may be larger than the memory. Quantization uses a mapped tensor like any other.
"""

from __future__ import annotations

import logging
import mmap
import tempfile
from typing import Any

import torch
from torch import Tensor

from openneutron.core.files import reason_of
from openneutron.core.numbers import rounded_up
from openneutron.errors import CalibrationError

__all__ = ["MOST_BYTES", "SampleStore"]

MOST_BYTES = 2 * 2**30
"""The bytes of calibration inputs that are kept in memory. Later inputs are written to temporary files."""
_BYTES_OF_A_FILE = 64 * 2**20
_ALIGNMENT = 64
_LOGGER = logging.getLogger(__name__)


class SampleStore:
    """Keeps samples: tuples of tensors and constants.

    Raises `CalibrationError` if a temporary file cannot be written.
    """

    def __init__(self, most_bytes: int = MOST_BYTES, bytes_of_a_file: int = _BYTES_OF_A_FILE) -> None:
        self._left = most_bytes
        self._bytes_of_a_file = bytes_of_a_file
        self._waiting: list[tuple[list[tuple[Any, ...]], int]] = []
        self._waiting_bytes = 0
        self.files = 0
        """The number of temporary files. A file has no name, and is freed with the last tensor mapped from it."""

    def keep(self, samples: list[tuple[Any, ...]], sample: tuple[Any, ...]) -> None:
        """Appends `sample` to `samples`. Beyond the limit, replaces it later by an equal sample mapped from a file."""
        size = sum(map(_aligned_bytes, filter(_is_plain, sample)))
        samples.append(sample)
        if size <= self._left and not self._waiting and not self.files:
            self._left -= size
            return
        self._waiting.append((samples, len(samples) - 1))
        self._waiting_bytes += size
        if self._waiting_bytes >= self._bytes_of_a_file:
            self.write()

    def write(self) -> None:
        """Writes the samples that wait for a file, and maps them into memory."""
        if not self._waiting or not self._waiting_bytes:
            return
        if not self.files:
            _LOGGER.info(
                "The calibration inputs need more memory than the limit. The rest is kept in temporary files in %s.",
                tempfile.gettempdir(),
            )
        try:
            with tempfile.TemporaryFile() as file:
                for samples, index in self._waiting:
                    for value in filter(_is_plain, samples[index]):
                        data = _packed(value).flatten().view(torch.uint8).numpy().data
                        file.write(data)
                        file.write(bytes(_aligned_bytes(value) - len(data)))
                file.flush()
                mapped = mmap.mmap(file.fileno(), self._waiting_bytes, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CalibrationError(
                f"The calibration inputs need more memory than {MOST_BYTES // 2**30} GiB, and the rest cannot be "
                f"written to the folder for temporary files, {tempfile.gettempdir()}: {reason_of(error)}. Give fewer "
                "inputs, or set TMPDIR to a folder with more space."
            ) from error
        offset = 0
        for samples, index in self._waiting:
            values = list(samples[index])
            for place, value in enumerate(values):
                if _is_plain(value):
                    values[place] = _mapped(mapped, offset, value)
                    offset += _aligned_bytes(value)
            samples[index] = tuple(values)
        self.files += 1
        self._waiting, self._waiting_bytes = [], 0


def _is_plain(value: Any) -> bool:
    return type(value) is Tensor and value.is_cpu and value.layout is torch.strided and value.numel() > 0


def _aligned_bytes(tensor: Tensor) -> int:
    """Returns the bytes of a tensor in a file, where each tensor begins at a multiple of `_ALIGNMENT`."""
    return rounded_up(tensor.numel() * tensor.element_size(), _ALIGNMENT)


def _order(tensor: Tensor) -> list[int]:
    """Returns the dimensions from the outermost to the innermost in memory."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda dim: -strides[dim])


def _packed(tensor: Tensor) -> Tensor:
    return tensor.detach().permute(_order(tensor)).contiguous()


def _mapped(mapped: mmap.mmap, offset: int, like: Tensor) -> Tensor:
    """Returns the tensor at `offset` in a file, with the shape, dtype and order of dimensions of `like`."""
    order = _order(like)
    flat = torch.frombuffer(mapped, dtype=like.dtype, count=like.numel(), offset=offset)
    return flat.view([like.shape[dim] for dim in order]).permute([order.index(dim) for dim in range(like.dim())])
