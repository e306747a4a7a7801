"""Held-out samples select the damping of least-squares weights for shared weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.flow_support import seeded
from torch import nn

from openneutron import quantize
from openneutron.recovery import gptq_rounding
from openneutron.recovery.gptq_rounding import (
    CORRELATED_POSITIONS,
    CORRELATED_POSITIONS_OF_SHARED,
    _MomentSums,
    _select_correlated_positions,
)
from openneutron.recovery.weighted_layers import layers_of

INPUTS, POSITIONS = 16, 64


def linear() -> Any:
    """Returns the only layer of a quantized linear."""
    samples = [(torch.ones(1, INPUTS),)]
    model = seeded(lambda: nn.Linear(INPUTS, 8))
    (layer,) = layers_of(quantize(model, samples[0], samples, recover=None, progress=False).module)
    return layer


@pytest.mark.parametrize(
    ("is_common", "correlated_positions"), [(True, CORRELATED_POSITIONS_OF_SHARED[0]), (False, CORRELATED_POSITIONS)]
)
def test_held_out_samples_select_the_damping(is_common: bool, correlated_positions: float) -> None:
    """Weights should fit errors of the inputs that are the same in held-out samples, and not those that differ."""
    layer, generator = linear(), torch.Generator().manual_seed(0)
    sums = _MomentSums(layer)
    held_out = _MomentSums(layer, sums.origins)
    common = torch.randn(INPUTS, INPUTS, generator=generator) * 0.2
    for part, sign in ((sums, 1), (held_out, 1 if is_common else -1)):
        real = torch.randn(1, POSITIONS, INPUTS, generator=generator)
        part.add(real + sign * real @ common, real)
        part.accumulate()
    assert (
        _select_correlated_positions(layer.real_weight, layer, sums.moments(), held_out.moments())
        == correlated_positions
    )


def test_merged_sums_equal_the_sums_of_all_samples() -> None:
    layer, generator = linear(), torch.Generator().manual_seed(0)
    rows = 3 + torch.randn(2, 1, POSITIONS, INPUTS, generator=generator)
    first, second, whole = _MomentSums(layer), _MomentSums(layer), _MomentSums(layer)
    second.origins = first.origins
    for part, values in zip((first, second), rows, strict=True):
        for sums in (part, whole):
            sums.add(values, 2 * values)
            sums.accumulate()
    first.merge(second)
    for found, wanted in zip(
        (first.moments().own, first.moments().cross), (whole.moments().own, whole.moments().cross), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    assert first.count == whole.count


@pytest.mark.parametrize(("samples", "selections"), [(4, 0), (16, 1)])
def test_few_samples_are_all_used(samples: int, selections: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that two operators read has its damping selected, if there are enough samples to hold some out."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(INPUTS, INPUTS)

        def forward(self, x: torch.Tensor) -> Any:
            return self.layer(self.layer(x).relu())

    calls: list[float] = []

    def select(*args: Any) -> float:
        calls.append(_select_correlated_positions(*args))
        return calls[-1]

    monkeypatch.setattr(gptq_rounding, "_select_correlated_positions", select)
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(1, INPUTS, generator=generator),) for _ in range(samples)]
    quantize(seeded(Twice), data[0], data, progress=False)
    assert len(calls) == selections
