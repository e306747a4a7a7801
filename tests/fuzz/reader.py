"""A reader of files for fuzzing, and small files that several readers need."""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tests.fuzz.mutations import mutated
from torch import nn

from openneutron import QuantizedModel, lower, quantize

__all__ = ["Reader", "in_file", "in_folder", "program", "quantized"]


@dataclass(frozen=True)
class Reader:
    """A function that reads bytes; any error must be an `OpenNeutronError`."""

    read: Callable[[bytes], object]
    examples: Callable[[], list[bytes]]
    words: tuple[bytes, ...] = ()
    """Byte strings of the format, which mutations insert."""
    damage: Callable[[bytes, random.Random], bytes] | None = None
    """Changes the contents of a file and makes its checksums right again; None for a format without checksums."""
    mutants: int = 500
    """The number of mutants in the tests."""
    memory: int = 64 << 20
    """Bytes that it may use in addition to four times the file."""

    def mutant(self, files: Sequence[bytes], chance: random.Random) -> bytes:
        """Returns a damaged copy of one of `files`."""
        data = chance.choice(files)
        if self.damage is not None and chance.random() < 0.5:
            return self.damage(data, chance)
        return mutated(data, files, self.words, chance)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.b(torch.cos(self.a(x)))
        return found


@functools.cache
def quantized() -> QuantizedModel:
    """Returns a small quantized model."""
    torch.manual_seed(0)
    data = [torch.randn(1, 3, 6, 6) for _ in range(2)]
    return quantize(_Net().eval(), (data[0],), data, recover=None)


@functools.cache
def program() -> bytes:
    """Returns its portable program, with two delegates and CPU kernels."""
    return lower(quantized(), payload="portable").buffer


def in_file(read: Callable[[Path], object], suffix: str) -> Callable[[bytes], None]:
    """Returns a function that writes its argument to a file with `suffix` and reads the file."""
    return in_folder(lambda folder: read(folder / f"file{suffix}"), f"file{suffix}")


def in_folder(
    read: Callable[[Path], object], name: str, before: Callable[[Path], object] = lambda _: None
) -> Callable[[bytes], None]:
    """Returns a function that writes its argument to the file `name` of a folder and reads the folder.

    `before` makes the other files of the folder.
    """

    def call(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            before(Path(folder))
            Path(folder, name).write_bytes(data)
            read(Path(folder))

    return call
