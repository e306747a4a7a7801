"""Networks whose programs a simulated board runs, and mistakes in its inputs and outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from openneutron import NeutronProgram, lower, quantize
from openneutron.accuracy.board_dump import Array, BoardTensor
from openneutron.accuracy.board_outputs import (
    MISTAKES,
    BoardInputs,
    BoardValidation,
    validate_board,
    vectors_of_data,
)  # fmt: skip
from openneutron.accuracy.board_simulation import Simulation
from openneutron.accuracy.board_tensors import board_inputs, board_outputs
from openneutron.accuracy.validate import load_program

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Image(nn.Module):
    """Gives two outputs, of which one has an image's layout."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.features(x).relu()
        return found, self.head(found[:, :, ::2, 1:].amax((2, 3)))


class Pair(nn.Module):
    """Takes two inputs of the same shape, and gives two outputs of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(16, 24)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.first(x) + 0.5 * self.second(y), self.second(x).tanh()


class Signal(nn.Module):
    """Computes on (batch, channels, length)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.conv(x).sigmoid()
        return found


class Sums(nn.Module):
    """Returns a decaying sum of all its inputs, which a buffer stores."""

    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(1, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total = (0.5 * self.total + x).clamp(-4, 4)
        return self.total * 1.0


class Classes(nn.Module):
    """Gives the probabilities of ten classes for a batch of images. They are all near 0.1."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.features(x).relu().mean((2, 3))).softmax(1)
        return found


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], bool]] = {
    "image": (Image, ((1, 3, 8, 6),), False),
    "channels last": (Image, ((1, 3, 8, 6),), True),
    "pair": (Pair, ((1, 16), (1, 16)), False),
    "signal": (Signal, ((1, 4, 20),), False),
    "state": (Sums, ((1, 12),), False),
    "classes": (Classes, ((4, 3, 8, 6),), True),
}


VECTORS = 5


@dataclass(frozen=True)
class Board:
    """A board that runs a program of one of the networks."""

    simulation: Simulation
    vectors: BoardInputs
    expected: tuple[tuple[Array, ...], ...]

    @property
    def input(self) -> BoardTensor:
        return self.simulation.inputs[0]

    def with_inputs(self, change: Callable[[Array], Array], number: int = 0) -> list[tuple[Array, ...]]:
        """Returns the outputs of a board that changes one input."""
        inputs = [
            tuple(change(value) if position == number else value for position, value in enumerate(vector))
            for vector in self.vectors.inputs
        ]
        return list(self.simulation.run(inputs))

    def with_output(self, number: int, change: Callable[[Array], Array]) -> list[tuple[Array, ...]]:
        """Returns the outputs of a board that changes one output."""
        return [
            tuple(change(value) if position == number else value for position, value in enumerate(outputs))
            for outputs in self.expected
        ]

    def check(self, outputs: Sequence[Sequence[Array]] | bytes, **options: object) -> BoardValidation:
        data = outputs if isinstance(outputs, bytes) else raw(outputs)
        return validate_board(self.simulation.host, data, self.vectors, **options)  # type: ignore[arg-type]


def raw(outputs: Sequence[Sequence[Array]]) -> bytes:
    return b"".join(value.tobytes() for vector in outputs for value in vector)


def serial(outputs: Sequence[Sequence[Array]], width: int = 32) -> bytes:
    """Returns the text that the main.cpp of a package prints."""
    return "".join(
        f"OUTPUT {vector} {output} {at} {value.tobytes()[at : at + width].hex()}\r\n"
        for vector, values in enumerate(outputs)
        for output, value in enumerate(values)
        for at in range(0, value.nbytes, width)
    ).encode()


@functools.cache
def board(name: str, int8_io: bool) -> Board:
    make, shapes, channels_last = NETWORKS[name]
    torch.manual_seed(3)
    model = make().eval()
    generator = torch.Generator().manual_seed(1)
    pixels = [tuple(torch.rand(shape, generator=generator) for shape in shapes) for _ in range(2 * VECTORS)]
    data = [tuple(_normalized(value) for value in sample) for sample in pixels]
    if channels_last:
        data = [tuple(value.to(memory_format=torch.channels_last) for value in sample) for sample in data]
    program = lower(quantize(model, data[0], data, recover=None), int8_io=int8_io)
    return board_of(program, data, starts=frozenset({0}) if name == "state" else None)


def board_of(program: NeutronProgram, data: Sequence[tuple[torch.Tensor, ...]], *, starts: frozenset[int] | None = None,
             count: int = VECTORS) -> Board:  # fmt: skip
    """Returns a board that runs the first `count` of the data."""
    host = load_program(program)
    vectors = vectors_of_data(host, data, count)
    if starts is not None:
        vectors = replace(vectors, starts=starts)
    simulation = Simulation(host, board_inputs(host), board_outputs(host), vectors.starts)
    return Board(simulation, vectors, tuple(simulation.run(vectors.inputs)))


def _normalized(value: torch.Tensor) -> torch.Tensor:
    if value.dim() != 4:
        return 3 * value - 1.2
    mean, std = (torch.tensor(one).reshape(1, 3, 1, 1) for one in (MEAN, STD))
    return (value - mean) / std


def named(found: BoardValidation) -> list[str]:
    assert not found.passed
    assert {one.mistake for one in found.diagnoses} <= set(MISTAKES)
    return [one.mistake for one in found.diagnoses]


def as_floats(tensor: BoardTensor, codes: Array) -> Array:
    return ((codes.astype(np.float64) - tensor.zero_point) * float(tensor.scale or 1)).astype(np.float32)


def as_codes(tensor: BoardTensor, values: Array) -> Array:
    return (
        (np.rint(values.astype(np.float64) / float(tensor.scale or 1)) + tensor.zero_point)
        .clip(-128, 127)
        .astype(np.int8)
    )


def words_reversed(values: Array, group: int) -> Array:
    return np.frombuffer(values.tobytes(), np.uint8).reshape(-1, group)[:, ::-1].reshape(-1).view(values.dtype)


def late(values: Array, shift: int) -> Array:
    return np.frombuffer(bytes(shift) + values.tobytes()[:-shift], values.dtype)


def early(values: Array, shift: int) -> Array:
    return np.frombuffer(values.tobytes()[shift:] + bytes(range(1, shift + 1)), values.dtype)


def other_order(tensor: BoardTensor, values: Array) -> Array:
    """Returns channels first for channels last, and the reverse."""
    rank = len(tensor.shape)
    dims = (0, *range(2, rank), 1) if tensor.dim_order == tuple(range(rank)) else (0, rank - 1, *range(1, rank - 1))
    return values.reshape(tensor.memory_shape).transpose(dims).reshape(-1)
