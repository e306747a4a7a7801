"""Networks that take one frame per call and keep earlier ones as state, each with a form without state.

`whole` computes the outputs of all calls at once, from all frames. A difference in int8 accuracy between `whole` and
the calls is therefore the cost of the state. Audio has the layout [1, features, frames].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["STREAMING", "KeywordSpotter", "StreamingNetwork", "StreamingTcn", "Whole", "WindowedTransformer"]


class StreamingNetwork(nn.Module):
    """A network over frames; `frame` is the shape of a frame."""

    frame: tuple[int, ...]

    def whole(self, frames: Tensor) -> Tensor:
        """Return the outputs of all calls for `frames` [1, features, count], as [1, outputs, count]."""
        raise NotImplementedError


class Whole(nn.Module):
    """The form of a network without state."""

    def __init__(self, network: StreamingNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, frames: Tensor) -> Tensor:
        """Map [1, features, count] to [1, outputs, count]."""
        return self.network.whole(frames)


class _CausalBlock(nn.Module):
    """A residual block of a temporal convolutional network: dilated over time, then pointwise."""

    cache: Tensor

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.over_time = nn.Conv1d(channels, channels, 3, dilation=dilation)
        self.pointwise = nn.Conv1d(channels, channels, 1)
        self.register_buffer("cache", torch.zeros(1, channels, 2 * dilation))

    def forward(self, x: Tensor) -> Tensor:
        frames = torch.cat([self.cache, x], -1)
        self.cache = frames[..., 1:]
        return self._mixed(frames, x)

    def whole(self, x: Tensor) -> Tensor:
        return self._mixed(F.pad(x, (self.cache.shape[-1], 0)), x)

    def _mixed(self, frames: Tensor, x: Tensor) -> Tensor:
        return torch.relu(x + self.pointwise(torch.relu(self.over_time(frames))))


class StreamingTcn(StreamingNetwork):
    """A temporal convolutional network with dilations 1, 2, 4 and 8: it sees 31 frames."""

    frame = (1, 16, 1)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(16, 24, 1)
        self.blocks = nn.ModuleList(_CausalBlock(24, 2**power) for power in range(4))
        self.head = nn.Conv1d(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(x)
        return result

    def whole(self, frames: Tensor) -> Tensor:
        x = torch.relu(self.stem(frames))
        for block in self.blocks:
            assert isinstance(block, _CausalBlock)
            x = block.whole(x)
        result: Tensor = self.head(x)
        return result


class KeywordSpotter(StreamingNetwork):
    """Depthwise separable convolutions over spectra, and the mean over the last frames, in ring buffers."""

    frame = (1, 40, 1)
    spectra: Tensor
    features: Tensor
    embeddings: Tensor
    history = 16

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, (8, 3), stride=(4, 1))
        self.depthwise = nn.Conv2d(16, 16, (3, 3), groups=16, padding=(1, 0))
        self.pointwise = nn.Conv2d(16, 24, 1)
        self.head = nn.Linear(24, 12)
        self.register_buffer("spectra", torch.zeros(1, 1, 40, 2))
        self.register_buffer("features", torch.zeros(1, 16, 9, 2))
        self.register_buffer("embeddings", torch.zeros(1, 24, self.history - 1))

    def forward(self, x: Tensor) -> Tensor:
        spectra = torch.cat([self.spectra, x.unsqueeze(1)], 3)
        self.spectra.copy_(spectra[..., 1:])
        features = torch.cat([self.features, torch.relu(self.stem(spectra))], 3)
        self.features.copy_(features[..., 1:])
        embeddings = torch.cat([self.embeddings, self._embedded(features)], 2)
        self.embeddings.copy_(embeddings[..., 1:])
        result: Tensor = self.head(embeddings.mean(2)).unsqueeze(2)
        return result

    def whole(self, frames: Tensor) -> Tensor:
        features = torch.relu(self.stem(F.pad(frames.unsqueeze(1), (2, 0))))
        embeddings = self._embedded(F.pad(features, (2, 0)))
        means = F.avg_pool1d(F.pad(embeddings, (self.history - 1, 0)), self.history, 1)
        result: Tensor = self.head(means.transpose(1, 2)).transpose(1, 2)
        return result

    def _embedded(self, features: Tensor) -> Tensor:
        return torch.relu(self.pointwise(torch.relu(self.depthwise(features)))).mean(2)


class _WindowedBlock(nn.Module):
    """Attention over the last frames with cached keys and values, and a feed-forward layer."""

    keys: Tensor
    values: Tensor

    def __init__(self, size: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.before_attention, self.before_feed_forward = nn.LayerNorm(size), nn.LayerNorm(size)
        self.project, self.mix = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.feed_forward = nn.Sequential(nn.Linear(size, 2 * size), nn.ReLU(), nn.Linear(2 * size, size))
        self.register_buffer("keys", torch.zeros(1, heads, window - 1, size // heads))
        self.register_buffer("values", torch.zeros(1, heads, window - 1, size // heads))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self._projected(x)
        keys, values = torch.cat([self.keys, key], 2), torch.cat([self.values, value], 2)
        self.keys, self.values = keys[:, :, 1:], values[:, :, 1:]
        return self._mixed(x, F.scaled_dot_product_attention(query, keys, values))

    def whole(self, x: Tensor) -> Tensor:
        query, key, value = self._projected(x)
        keys, values = (F.pad(part, (0, 0, self.window - 1, 0)) for part in (key, value))
        distance = torch.arange(keys.shape[2]) - torch.arange(x.shape[1]).unsqueeze(1)
        hidden = torch.zeros(distance.shape).masked_fill((distance < 0) | (distance >= self.window), -torch.inf)
        return self._mixed(x, F.scaled_dot_product_attention(query, keys, values, attn_mask=hidden))

    def _projected(self, x: Tensor) -> list[Tensor]:
        parts = self.project(self.before_attention(x)).chunk(3, -1)
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]

    def _mixed(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.mix(attended.transpose(1, 2).flatten(2))
        result: Tensor = x + self.feed_forward(self.before_feed_forward(x))
        return result


class WindowedTransformer(StreamingNetwork):
    """Two layers of attention over the last 16 frames, with a cache of keys and values."""

    frame = (1, 16, 1)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(16, 32), nn.Linear(32, 8)
        self.blocks = nn.ModuleList(_WindowedBlock(32, 2, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.transpose(1, 2))
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(x).transpose(1, 2)
        return result

    def whole(self, frames: Tensor) -> Tensor:
        x = self.stem(frames.transpose(1, 2))
        for block in self.blocks:
            assert isinstance(block, _WindowedBlock)
            x = block.whole(x)
        result: Tensor = self.head(x).transpose(1, 2)
        return result


STREAMING: dict[str, Callable[[], StreamingNetwork]] = {
    "streaming TCN": StreamingTcn,
    "keyword spotter": KeywordSpotter,
    "transformer with KV cache": WindowedTransformer,
}
