"""A clock that goes backwards, or is before 1980, as on a machine without a battery."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from openneutron import lower, quantize
from openneutron.data.outputs import save_outputs


def backwards() -> Callable[[], float]:
    moments = count()
    return lambda: 1e9 - 3600.0 * next(moments)


@pytest.mark.parametrize("clock", [backwards(), lambda: 0.0], ids=["backwards", "1970"])
def test_a_model_is_lowered_and_its_files_are_written(
    clock: Callable[[], float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()).eval(), [torch.randn(1, 2, 6, 6) for _ in range(2)]
    monkeypatch.setattr("time.time", clock)
    quantized = quantize(model, (data[0],), data)
    program = lower(quantized, payload="portable", intermediates_dir=str(tmp_path))
    program.save(tmp_path / "model.pte")
    program.package(tmp_path / "firmware")
    quantized.save(tmp_path / "model.pt2")
    assert lower(tmp_path / "model.pt2", payload="portable").buffer == program.buffer
    output = program.run(data[0])
    save_outputs(tmp_path / "out.npz", (output, output))
    assert np.array_equal(np.load(tmp_path / "out.npz")["output1"], output.numpy())
