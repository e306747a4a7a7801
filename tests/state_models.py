"""Small models with state in different forms, and their inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

Inputs = tuple[torch.Tensor, ...]


class RingBuffer(nn.Module):
    """A causal convolution of one frame per call, between convolutions of one frame: [1, 4, 1] to [1, 5, 1]."""

    frame = (1, 4, 1)
    cache: torch.Tensor

    def __init__(self, frames: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv1d(4, 8, 1), nn.Conv1d(8, 5, 1)
        self.over_time = nn.Conv1d(8, 8, 3)
        self.register_buffer("cache", torch.zeros(1, 8, frames))

    def forward(self, x: torch.Tensor) -> Any:
        frames = torch.cat([self.cache, torch.relu(self.first(x))], -1)
        self.store(frames[..., -self.cache.shape[-1] :])
        return self.last(torch.relu(self.over_time(frames[..., -3:])))

    def store(self, frames: torch.Tensor) -> None:
        self.cache = frames

    def whole(self, x: torch.Tensor) -> Any:
        """Computes all frames at once."""
        frames = nn.functional.pad(torch.relu(self.first(x)), (2, 0))
        return self.last(torch.relu(self.over_time(frames)))


class Whole(nn.Module):
    """A model of all frames of a recording."""

    def __init__(self, model: RingBuffer) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        return self.model.whole(x)


class Copied(RingBuffer):
    """copy_ writes the cache."""

    def store(self, frames: torch.Tensor) -> None:
        self.cache.copy_(frames)


class Filled(RingBuffer):
    """The cache does not start with zeros, and is not saved with the model."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.linspace(0, 1, 16).reshape(1, 8, 2), persistent=False)


class DelayLine(nn.Module):
    """Buffers that take the values of others: the order of writes must not matter."""

    frame = (1, 6)
    older: torch.Tensor
    old: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(24, 3)
        self.register_buffer("older", torch.zeros(1, 8))
        self.register_buffer("old", torch.zeros(1, 8))

    def forward(self, x: torch.Tensor) -> Any:
        new = torch.relu(self.first(x))
        out = self.last(torch.cat([self.older, self.old, new], -1))
        self.older.copy_(self.old)
        self.old.copy_(new)
        return out


class InputKept(nn.Module):
    """The difference to the last input, which is stored unchanged."""

    frame = (1, 6)
    last: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.linear = nn.Linear(6, 4)
        self.register_buffer("last", torch.zeros(1, 6))

    def forward(self, x: torch.Tensor) -> Any:
        change = x - self.last
        self.last.copy_(x)
        return self.linear(change)


class Gru(nn.Module):
    """A cell that stores its hidden state."""

    frame = (1, 6)
    hidden: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.cell, self.last = nn.GRUCell(6, 8), nn.Linear(8, 3)
        self.register_buffer("hidden", torch.zeros(1, 8))

    def forward(self, x: torch.Tensor) -> Any:
        self.hidden = self.cell(x, self.hidden)
        return self.last(self.hidden)


class Lstm(nn.Module):
    """A layer over chunks of four frames that stores both of its states."""

    frame = (1, 4, 6)
    hidden: torch.Tensor
    cell: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.layer, self.last = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)
        self.register_buffer("hidden", torch.zeros(1, 1, 8))
        self.register_buffer("cell", torch.zeros(1, 1, 8))

    def forward(self, x: torch.Tensor) -> Any:
        steps, (hidden, cell) = self.layer(x, (self.hidden, self.cell))
        self.hidden.copy_(hidden)
        self.cell.copy_(cell)
        return self.last(steps)


class Attention(nn.Module):
    """Attention over the last frames, whose keys and values are stored."""

    frame = (1, 1, 8)
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, frames: int = 6) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.project, self.last = nn.Linear(8, 24), nn.Linear(8, 3)
        self.register_buffer("keys", torch.zeros(1, 2, frames, 4))
        self.register_buffer("values", torch.zeros(1, 2, frames, 4))

    def forward(self, x: torch.Tensor) -> Any:
        query, key, value = (part.reshape(1, 2, 1, 4) for part in self.project(x).chunk(3, -1))
        self.keys = torch.cat([self.keys[:, :, 1:], key], 2)
        self.values = torch.cat([self.values[:, :, 1:], value], 2)
        mixed = nn.functional.scaled_dot_product_attention(query, self.keys, self.values)
        return self.last(mixed.reshape(1, 1, 8))


class Shifted(nn.Module):
    """A window whose parts are written in place."""

    frame = (1, 8)
    window: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.linear = nn.Linear(8, 8)
        self.register_buffer("window", torch.zeros(4, 8))

    def forward(self, x: torch.Tensor) -> Any:
        self.window[:-1] = self.window[1:].clone()
        self.window[-1] = torch.relu(x[0])
        return self.linear(self.window)


class Written(nn.Module):
    """A window that is written at a position given by an input."""

    window: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.linear = nn.Linear(8, 8)
        self.register_buffer("window", torch.zeros(4, 8))

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> Any:
        self.window.index_copy_(0, position, torch.relu(x))
        return self.linear(self.window)


class Counter(nn.Module):
    """A count of integers, which is an output before and after the update."""

    frame = (1, 6)
    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.linear = nn.Linear(6, 4)
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        before = self.count.clone()
        self.count += 1
        return self.linear(x), self.count, before


class Returned(nn.Module):
    """An output is the stored value before the call."""

    frame = (1, 6)
    last: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.linear = nn.Linear(6, 4)
        self.register_buffer("last", torch.ones(1, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        new, old = torch.relu(self.linear(x)), self.last.clone()
        self.last.copy_(new)
        return new + old, old


def stream(model: Any, steps: int, seed: int = 0) -> list[Inputs]:
    """Returns the inputs of consecutive calls of a model."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(model.frame, generator=generator),) for _ in range(steps)]
