"""Quantizes a model in both flows, and checks the program."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tests.fidelity import signal_to_noise
from tests.flow_support import convert, lower_documented
from torch import nn

from openneutron import NeutronProgram, lower, quantize

__all__ = ["assert_one_delegate_in_both_flows", "one_delegate", "samples_of"]

Inputs = tuple[torch.Tensor, ...]


def samples_of(shapes: Sequence[tuple[int, ...]], count: int = 16) -> list[Inputs]:
    """Returns normally distributed values, equal in each run."""
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(count)]


def one_delegate(
    model: nn.Module, samples: Sequence[Inputs], floor: float, recover: str | None = "auto"
) -> NeutronProgram:
    """Returns the program of the short flow. Checks that it has one delegate and an SQNR of at least `floor` dB."""
    program = lower(quantize(model, samples[0], samples, recover=recover, progress=False))
    left = [(row.op, row.reason) for row in program.placement if row.where == "cpu"]
    assert not left
    assert len({row.partition for row in program.placement}) == 1
    decibels = signal_to_noise(program.run, model, [_copied(sample) for sample in samples[:2]])
    assert decibels >= floor, f"{decibels:.1f} dB"
    return program


def assert_one_delegate_in_both_flows(
    model: nn.Module, samples: Sequence[Inputs], floor: float, recover: str | None = "auto"
) -> None:
    """Checks `one_delegate` in the short flow with `recover`, and in the documented flow."""
    one_delegate(model, samples, floor, recover)
    lowered = lower_documented(convert(model, samples[0], calibration=samples), samples[0])
    assert (lowered.delegates, lowered.cpu) == (1, [])
    decibels = signal_to_noise(lowered.run, model, [_copied(sample) for sample in samples[:2]])
    assert decibels >= floor, f"{decibels:.1f} dB in the documented flow"


def _copied(sample: Inputs) -> Inputs:
    """Copies inputs, because a model may write to them."""
    return tuple(value.clone() for value in sample)
