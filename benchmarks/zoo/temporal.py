"""Networks that process several frames at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["TemporalShiftNet"]


class _Shifted(nn.Module):
    """A residual block that reads an eighth of its channels from the next frame and an eighth from the previous one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.fold = channels // 8

    def forward(self, x: Tensor) -> Tensor:
        shifted = torch.zeros_like(x)
        shifted[:-1, : self.fold] = x[1:, : self.fold]
        shifted[1:, self.fold : 2 * self.fold] = x[:-1, self.fold : 2 * self.fold]
        shifted[:, 2 * self.fold :] = x[:, 2 * self.fold :]
        return torch.relu(x + self.second(self.first(shifted)))


class TemporalShiftNet(nn.Module):
    """Temporal shift (Lin et al. 2019) in a small residual network.

    Frames are the batch, and each frame is classified.
    """

    def __init__(self, classes: int = 20) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(_Shifted(32), nn.MaxPool2d(2), _Shifted(32))
        self.head = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return scores
