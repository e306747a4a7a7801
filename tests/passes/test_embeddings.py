"""Embeddings with `max_norm` and `padding_idx`, and bags of embeddings, of indices that are inputs of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.fidelity import signal_to_noise
from tests.flow_support import convert, lower_documented, seeded
from tests.models import Model
from torch import nn

from openneutron import lower, quantize
from openneutron.errors import ModelError

Function = Callable[[Any, torch.Tensor], torch.Tensor]
SAMPLES = [(torch.tensor([[1, 2, 3], [4, 5, start]]),) for start in range(4)]

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "max_norm": lambda: nn.Embedding(10, 8, max_norm=0.7),
    "max_norm of another order, padding_idx": lambda: nn.Embedding(10, 8, max_norm=1.5, norm_type=1.0, padding_idx=2),
    "padding_idx": lambda: nn.Embedding(10, 8, padding_idx=0),
    "bag": lambda: nn.EmbeddingBag(10, 8),
    "bag of sums, padding_idx": lambda: nn.EmbeddingBag(10, 8, mode="sum", padding_idx=3),
    "bag of maxima, max_norm": lambda: nn.EmbeddingBag(10, 8, mode="max", max_norm=0.7),
}


@pytest.mark.parametrize("name", LAYERS)
def test_embeddings_in_both_flows(name: str) -> None:
    function: Function = lambda m, indices: m.last(m.rows(indices) + 0.1 * m.rows(indices + 1))  # noqa: E731
    model = seeded(lambda: Model(function, rows=LAYERS[name](), last=nn.Linear(8, 4)))
    quantized = quantize(model, SAMPLES[0], SAMPLES, recover=None, progress=False)
    documented = lower_documented(convert(model, SAMPLES[0], calibration=SAMPLES), SAMPLES[0])
    for run in (lower(quantized).run, documented.run):
        assert signal_to_noise(run, model, SAMPLES) > 30


def test_a_clipped_weight_that_something_else_reads_is_refused() -> None:
    function: Function = lambda m, indices: m.rows(indices) @ m.rows.weight.t()  # noqa: E731
    model = seeded(lambda: Model(function, rows=nn.Embedding(10, 8, max_norm=0.7)))
    with pytest.raises(ModelError, match=r"writes to the parameter 'rows\.weight'"):
        quantize(model, SAMPLES[0], SAMPLES, recover=None, progress=False)
