"""Calibration inputs beyond the limit of memory are kept in temporary files."""

from __future__ import annotations

import functools
import logging
import tempfile
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.flow_support import seeded
from torch import Tensor, nn

from openneutron import quantize
from openneutron.errors import CalibrationError
from openneutron.model import data
from openneutron.model.sample_store import SampleStore


def samples() -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 4, 5, generator=generator)
    return [
        (image, torch.tensor(3), 7, None),
        (image.contiguous(memory_format=torch.channels_last), torch.tensor([True]), "text", 1.5),
        (image.permute(3, 1, 0, 2), torch.zeros(0, 3), torch.arange(5, dtype=torch.int16), -1),
        (image[:, ::2], image[0, 0, 0, 0], image.to(torch.float16), torch.tensor(0)),
    ]


@pytest.mark.parametrize("bytes_of_a_file", [1, 300, 10**6])
@pytest.mark.parametrize("most_bytes", [0, 600])
def test_samples_are_equal_in_values_and_layout(most_bytes: int, bytes_of_a_file: int) -> None:
    store, kept = SampleStore(most_bytes, bytes_of_a_file), list[tuple[Any, ...]]()
    for sample in samples():
        store.keep(kept, sample)
    store.write()
    assert store.files
    assert len(kept) == len(samples())
    for found, given in zip(kept, samples(), strict=True):
        for value, expected in zip(found, given, strict=True):
            if not isinstance(expected, Tensor):
                assert value == expected
                continue
            assert (value.dtype, value.shape) == (expected.dtype, expected.shape)
            assert torch.equal(value, expected)
            for layout in (torch.contiguous_format, torch.channels_last)[: 2 if expected.dim() == 4 else 1]:
                if expected.is_contiguous(memory_format=layout):
                    assert value.is_contiguous(memory_format=layout)


def test_samples_within_the_limit_are_returned_unchanged() -> None:
    store, kept, given = SampleStore(10**6), list[tuple[Any, ...]](), samples()
    for sample in given:
        store.keep(kept, sample)
    store.write()
    assert all(found is sample for found, sample in zip(kept, given, strict=True))
    assert store.files == 0


def test_mapped_samples_can_be_written_to() -> None:
    kept: list[tuple[Any, ...]] = []
    store = SampleStore(0)
    store.keep(kept, (torch.zeros(4),))
    store.write()
    kept[0][0].add_(1)
    assert kept[0][0].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("recover", [None, "fast"])
def test_a_generator_of_more_than_the_limit_gives_the_same_model(
    recover: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)))
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def inputs() -> Iterator[tuple[Tensor]]:
        nonlocal most
        generator = torch.Generator().manual_seed(0)
        for _ in range(64):
            value = torch.randn(1, 16, generator=generator)
            alive.append(weakref.ref(value))
            most = max(most, sum(reference() is not None for reference in alive))
            yield (value,)

    example = (torch.ones(1, 16),)
    expected = quantize(model, example, inputs(), recover=recover)
    assert most == 64
    alive.clear()
    most = 0
    monkeypatch.setattr(data, "SampleStore", functools.partial(SampleStore, 1024, 256))
    with caplog.at_level(logging.INFO, "openneutron"):
        found = quantize(model, example, inputs(), recover=recover)
    assert most <= (1024 + 256) // 64 + 2
    assert "kept in temporary files" in caplog.text
    assert found.module.code == expected.module.code
    values = expected.module.state_dict()
    assert all(torch.equal(value, values[name]) for name, value in found.module.state_dict().items())


def test_a_folder_without_space_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    store = SampleStore(0, 1)
    with pytest.raises(CalibrationError, match="No space left on device"):
        store.keep([], (torch.zeros(4),))
