"""Operators that take sizes from a tensor: written with numbers if the tensor is a constant, else refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.flow_support import convert, seeded
from tests.models import Model
from torch import nn

from openneutron import lower, quantize
from openneutron.errors import ModelError

REPEATS = [1, 2, 0, 1, 1, 1, 2, 1]
CONSTANT: dict[str, Callable[..., torch.Tensor]] = {
    "tensor_split at a position": lambda m, x: m.l(x).tensor_split(torch.tensor([3]), 1)[1] * 2,
    "tensor_split at positions of a buffer": lambda m, x: m.l(x).tensor_split(m.positions, 1)[1] * 2,
    "tensor_split in parts": lambda m, x: m.l(x).tensor_split(torch.tensor(2), 1)[0] * 2,
    "narrow": lambda m, x: torch.narrow(m.l(x), 1, torch.tensor(2), 3) * 2,
    "repeat_interleave": lambda m, x: m.l(x).repeat_interleave(m.repeats, 1) * 2,
    "repeat_interleave of all values": lambda m, x: m.l(x).repeat_interleave(torch.tensor([2])) * 2,
    "repeat_interleave with a size": lambda m, x: m.l(x).repeat_interleave(m.repeats, 1, output_size=9) * 2,
}
COMPUTED: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "tensor_split": (lambda m, x: m.l(x).tensor_split((x[0, :1] > 0).long() + 2, 1)[1] * 2, "fixed positions"),
    "repeat_interleave": (lambda m, x: m.l(x).repeat_interleave((x[0] > 0).long(), 1), "index_select"),
}


def model(function: Callable[..., torch.Tensor]) -> nn.Module:
    constants = {"positions": torch.tensor([3, 5]), "repeats": torch.tensor(REPEATS)}
    return seeded(lambda: Model(function, l=nn.Linear(8, 8), **constants))


def samples() -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2, 8, generator=generator),) for _ in range(4)]


@pytest.mark.parametrize("name", CONSTANT)
def test_a_constant(name: str) -> None:
    """In both flows."""
    tested, data = model(CONSTANT[name]), samples()
    wanted = tested(*data[0])
    for found in (
        convert(tested, data[0], calibration=data)(*data[0]),
        lower(quantize(tested, data[0], data, recover=None, progress=False)).run(*data[0]),
    ):
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize("name", COMPUTED)
def test_sizes_that_are_computed(name: str) -> None:
    function, advice = COMPUTED[name]
    tested, data = model(function), samples()
    for call in (
        lambda: convert(tested, data[0], calibration=data),
        lambda: quantize(tested, data[0], data, recover=None, progress=False),
    ):
        with pytest.raises(ModelError, match=advice) as error:
            call()
        assert error.value.source is not None
