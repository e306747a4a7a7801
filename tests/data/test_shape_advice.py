"""What messages say about arrays of another shape than the model takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from openneutron import quantize
from openneutron.accuracy import evaluate
from openneutron.data import inputs_of_files
from openneutron.data.shape_advice import size_advice
from openneutron.errors import OpenNeutronError
from openneutron.runtime.program import TensorInfo


@pytest.mark.parametrize(
    ("given", "sizes", "advice"),
    [
        ((49, 10), (1, 1, 49, 10), "Use reshape(1, 1, 49, 10)"),
        ((1, 1, 1, 6), (1, 6), "Use reshape(1, 6)"),
        ((4,), (1, 1, 4), "Use reshape(1, 1, 4)"),
        ((8, 6, 3), (1, 3, 8, 6), "array.transpose(2, 0, 1)"),
        ((1, 8, 6, 3), (1, 3, 8, 6), "array.transpose(0, 3, 1, 2)"),
        ((4, 8, 6, 3), (4, 3, 8, 6), "array.transpose(0, 3, 1, 2)"),
        ((1, 9, 4), (1, 6, 4), "pad or cut the data"),
        ((10, 49), (1, 1, 49, 10), ""),
        ((5,), (1, None), ""),
        ((1, 8, 8, 3), (1, 3, 8, 6), ""),
        ((3, 224, 224), (1, 3, 64, 64), "data of 64 x 64, for images with a transform that resizes them. Or quantize"),
        ((3, 224, 224), (1, 3, 64, 64), "--input 1,3,224,224."),
        ((1, 1, 50, 10), (1, 1, 49, 10), "Give data of 49 x 10"),
        ((10, 3, 9, 9), (4, 3, 8, None), "Give data of 8 x any"),
        ((2, 3, 32, 30), (2, 3, 64, 64), "--input 2,3,32,30"),
        ((1, 224, 224), (1, 3, 224, 224), ""),
        ((10, 3, 32, 32), (4, 3, 32, 32), ""),
        ((3, 32, 32), (4, 3, 32, 32), ""),
        ((3, 32, 32), (4, 3, None, 32), ""),
        ((3, 3, 3), (4, 3, 3, 3), ""),
        ((), (1, 2), ""),
    ],
)
def test_advice_about_a_shape(given: tuple[int, ...], sizes: tuple[int | None, ...], advice: str) -> None:
    found = size_advice(given, sizes)
    assert (advice in found) if advice else not found


def test_all_readers_advise(tmp_path: Path) -> None:
    for index in range(2):
        (tmp_path / "data" / str(index)).mkdir(parents=True)
        np.save(tmp_path / "data" / str(index) / "a.npy", np.zeros((5, 6), np.float32))
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(24, 2)).eval()
    good = [torch.randn(1, 1, 5, 6) for _ in range(3)]
    quantized = quantize(model, good[0], good, recover=None, progress=False)
    path = tmp_path / "data" / "0" / "a.npy"
    for call in (
        lambda: quantize(model, good[0], str(tmp_path / "data"), progress=False),
        lambda: evaluate(quantized, str(tmp_path / "data")),
        lambda: inputs_of_files([path], [TensorInfo((1, 1, 5, 6), torch.float32)]),
    ):
        with pytest.raises(OpenNeutronError, match=r"a\.npy is .*takes .*\. Only dimensions .* reshape\(1, 1, 5, 6\)"):
            call()
