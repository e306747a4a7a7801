"""Weighted means of samples as additional samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openneutron.training.mixed_samples import MixedSamples

SAMPLES = [
    (torch.full((2, 3), float(number)), torch.tensor([number]), torch.zeros(number % 2 + 1)) for number in range(6)
]


def test_samples_come_first_and_are_unchanged() -> None:
    mixed = MixedSamples(SAMPLES, [1, 2], 4)
    assert len(mixed) == 10
    assert [mixed[index] for index in range(6)] == SAMPLES


def test_means_are_of_the_chosen_samples() -> None:
    mixed = MixedSamples(SAMPLES, [1, 3, 4], 40)
    weights = []
    for value, number, other in mixed[6:]:
        (code,) = number.tolist()
        assert code in {1, 3, 4}  # integers are those of the first sample
        assert other.shape in {(1,), (2,)}  # as of the first sample if the shapes differ
        assert len(value.unique()) == 1
        assert 1 <= float(value.max()) <= 4
        weights.append(float(value.max()))
    assert len(set(weights)) > 20


def test_means_depend_on_no_global_seed() -> None:
    def values(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [value for value, *_ in MixedSamples(SAMPLES, range(6), 8)]

    assert all(map(torch.equal, values(0), values(1)))


def test_means_are_computed_from_both_samples() -> None:
    mixed = MixedSamples([(torch.zeros(1),), (torch.ones(1),)], [0, 1], 50)
    values = [float(value) for (value,) in mixed[2:]]
    assert any(0 < value < 1 for value in values)
    assert min(values) >= 0
    assert max(values) <= 1


def test_index_beyond_the_last_sample() -> None:
    mixed = MixedSamples(SAMPLES, [0], 1)
    assert torch.equal(mixed[-1][0], SAMPLES[0][0])
    with pytest.raises(IndexError):
        mixed[7]
