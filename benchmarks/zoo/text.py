"""A network of the BERT family, whose attention mask hides padding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["Bert"]

HIDDEN_BY_BERT = -10000.0
PADDING = 4  # tokens; the last ones


class _Layer(nn.Module):
    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(features, features) for _ in range(4))
        self.wide, self.narrow = nn.Linear(features, 4 * features), nn.Linear(4 * features, features)
        self.attended, self.done = nn.LayerNorm(features), nn.LayerNorm(features)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        layers = (self.query, self.key, self.value)
        query, key, value = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        context = (scores + mask).softmax(-1) @ value
        x = self.attended(x + self.out(context.transpose(1, 2).flatten(2)))
        result: Tensor = self.done(x + self.narrow(torch.nn.functional.gelu(self.wide(x))))
        return result


class Bert(nn.Module):
    """Embedded tokens [N, features + 1, length] to logits [N, classes].

    If the last channel of the first token is above 0, the last `PADDING` tokens are padding. One float input therefore
    contains both tokens and mask. The mask is computed as BERT computes it from integers.
    """

    def __init__(self, features: int = 32, heads: int = 4, layers: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(features, heads) for _ in range(layers))
        self.classifier = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        is_padded = (x[:, -1, :1] > 0).long()
        is_last = (torch.arange(x.shape[2]) >= x.shape[2] - PADDING).long()
        attention_mask = 1 - is_padded * is_last
        mask = (1.0 - attention_mask[:, None, None].float()) * HIDDEN_BY_BERT
        tokens = x[:, :-1].transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens, mask)
        classes: Tensor = self.classifier(tokens[:, 0])
        return classes
