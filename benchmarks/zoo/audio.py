"""Networks for audio: sequences of frames."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["TCN", "GRUKeywords"]


class _CausalBlock(nn.Module):
    """Two causal dilated convolutions and a residual addition."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.past = 2 * dilation
        self.conv1, self.norm1 = nn.Conv1d(inputs, outputs, 3, dilation=dilation, bias=False), nn.BatchNorm1d(outputs)
        self.conv2, self.norm2 = nn.Conv1d(outputs, outputs, 3, dilation=dilation, bias=False), nn.BatchNorm1d(outputs)
        self.fit = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(F.pad(x, (self.past, 0)))))
        y = F.relu(self.norm2(self.conv2(F.pad(y, (self.past, 0)))))
        return F.relu(y + self.fit(x))


class TCN(nn.Module):
    """A temporal convolutional network with dilations 1 to 32. Classifies the last frame."""

    def __init__(self, bands: int = 40, channels: int = 48, classes: int = 12) -> None:
        super().__init__()
        widths = [bands, *[channels] * 6]
        self.blocks = nn.Sequential(
            *(_CausalBlock(inputs, channels, 2**level) for level, inputs in enumerate(widths[:-1]))
        )
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(x)[:, :, -1])
        return logits


class GRUKeywords(nn.Module):
    """Log-mel spectra [N, bands, frames] to logits: two GRU layers and a classifier of the last state."""

    def __init__(self, bands: int = 40, hidden: int = 64, classes: int = 12) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(bands)
        self.gru = nn.GRU(bands, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(self.norm(x).transpose(1, 2))
        logits: Tensor = self.head(states[:, -1])
        return logits
