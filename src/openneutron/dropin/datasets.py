"""The calibration data sets of ExecuTorch's example models for NXP."""

from __future__ import annotations

import lzma
import os
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from openneutron.errors import InputError, OptionError

__all__ = ["CalibrationDataset", "RandomCalibrationDataset"]


class CalibrationDataset(Dataset[Any]):
    """Samples from a file: pickled in ".xz", or saved by `torch.save` in ".pt".

    Reading such a file can run code in it, so open only files that you trust. Raises `InputError` for another suffix.
    """

    def __init__(self, data_path: str | os.PathLike[str]) -> None:
        path = os.fspath(data_path)
        if path.endswith(".xz"):
            with lzma.open(path) as file:
                self.examples: Sequence[Any] = pickle.load(file)
        elif path.endswith(".pt"):
            self.examples = torch.load(path, map_location="cpu", weights_only=False)
        else:
            raise InputError(f"'{path}' is not a file of samples: its name must end in .xz or .pt.")

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        """Returns a sample: data and label."""
        return self.examples[index]


class RandomCalibrationDataset(Dataset[tuple[torch.Tensor, int]]):
    """Uniform noise from 0 to 1 with labels, from torch's global random generator.

    With `balanced`, each class has the same number of samples, and `num_examples` must be a multiple of `num_classes`;
    otherwise, `OptionError` is raised.
    """

    def __init__(self, num_examples: int, sample_shape: Sequence[int], num_classes: int, balanced: bool = True) -> None:
        if balanced and num_examples % num_classes:
            raise OptionError(
                f"balanced needs a multiple of num_classes: {num_examples} samples cannot be divided equally among "
                f"{num_classes} classes."
            )
        labels = torch.randint(num_classes, (num_examples,))
        if balanced:
            labels = torch.arange(num_examples) % num_classes
            labels = labels[torch.randperm(num_examples)]
        self.examples = [(torch.rand(tuple(sample_shape)), int(label)) for label in labels]

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Returns a sample: data and label."""
        return self.examples[index]
