"""Evaluation of models and programs. Results do not depend on the number of processes."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.flow_support import seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from openneutron import load, lower, quantize
from openneutron.accuracy import evaluate
from openneutron.accuracy.evaluate import top1
from openneutron.errors import InputError, ModelError, OptionError


def data(count: int = 40) -> list[tuple[Tensor, int]]:
    images = torch.randn((count, 1, 4, 4), generator=torch.Generator().manual_seed(1))
    return [(image[None], index % 5) for index, image in enumerate(images)]


def network() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))).eval()


def largest(outputs: Tensor, label: int) -> float:
    return float(outputs.max()) * 0.1


class TwoOutputs(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": x + 1, "b": x.mean((1, 2, 3))}


def second_output(outputs: dict[str, Tensor], label: int) -> float:
    return float(outputs["b"]) + label


def test_top1_is_a_percentage() -> None:
    model = network()
    hits = [int(model(x).argmax()) == label for x, label in data()]
    assert 0 < sum(hits) < 40
    assert evaluate(model, data()) == pytest.approx(100 * sum(hits) / 40)
    assert evaluate(model, (pair for pair in data())) == evaluate(model, [((x,), label) for x, label in data()])


def test_top1_of_several_rows() -> None:
    outputs = torch.tensor([[1.0, 3, 2], [5, 0, 0], [0, 0, 1]])
    assert top1(outputs, torch.tensor([1, 0, 1])) == pytest.approx(200 / 3)
    assert top1((outputs, None), torch.tensor([1, 0, 2])) == 100
    assert [top1(outputs[:1, :, None], label) for label in (1, torch.tensor(1), torch.tensor([1]), np.int64(1), 0)] == [
        *[100.0] * 4, 0.0,
    ]  # fmt: skip
    for label in (torch.tensor([1, 0]), torch.tensor([[0, 1, 0]] * 3), torch.tensor([1.0, 0, 0]), "cat"):
        with pytest.raises(InputError, match=r"top1 takes (class indices|a class index)"):
            top1(outputs, label)


@pytest.mark.slow
def test_any_number_of_processes_evaluates_each_form(tmp_path: Path) -> None:
    model = network()
    quantized = quantize(model, (data()[0][0],), [x for x, _ in data()])
    program = lower(quantized)
    program.save(tmp_path / "model.pte")
    for run in (model, torch.export.export(model, (data()[0][0],)).module(), quantized, quantized.module, program,
                load(tmp_path / "model.pte")):  # fmt: skip
        for metric in ("top1", largest):
            one = evaluate(run, data(), metric)
            assert one == evaluate(run, data(), metric, jobs=2)
    assert evaluate(program, data(), largest) == evaluate(load(tmp_path / "model.pte"), data(), largest)


def test_batches_of_a_data_loader_are_cut_to_the_model_batch_size(tmp_path: Path) -> None:
    model, labels = network(), torch.arange(40) % 5
    images = torch.cat([x for x, _ in data()])
    loader = DataLoader(TensorDataset(images, labels), batch_size=16)
    quantized = quantize(model, (images[:1],), images)
    program = lower(quantized)
    program.save(tmp_path / "model.pte")
    for run in (model, quantized, quantized.module, program, load(tmp_path / "model.pte")):
        assert evaluate(run, loader) == evaluate(run, data())
        assert evaluate(run, loader, largest, jobs=2) == evaluate(run, data(), largest)


def test_batches_of_a_program_are_of_its_size() -> None:
    images, sizes = torch.randn(10, 1, 4, 4), []
    program = lower(quantize(network(), (images[:4],), images))

    def rows(outputs: Tensor, label: Tensor) -> float:
        sizes.append((len(outputs), label.tolist()))
        return 0.0

    evaluate(program, DataLoader(TensorDataset(images, torch.arange(10)), batch_size=10), rows)
    assert sizes == [(4, [0, 1, 2, 3]), (4, [4, 5, 6, 7])]


def test_several_inputs_and_data_without_batches() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    pairs = [((torch.eye(3)[i], torch.zeros(3)), i if i else 2) for i in range(3)]
    batched, single = (DataLoader[Any](pairs, batch_size=size) for size in (2, None))  # type: ignore[arg-type]
    for loader in (batched, single, pairs):
        assert evaluate(Sum(), loader) == pytest.approx(200 / 3)


@pytest.mark.parametrize(("jobs", "most"), [(1, 2), (2, 8)])
def test_samples_are_freed(jobs: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[evaluate.__module__], "SAMPLES_OF_A_JOB", 2)
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    counts = []

    def samples() -> Iterator[tuple[Tensor, int]]:
        for image, label in data():
            counts.append(len(alive))
            own = image.clone()
            alive.add(own)
            yield own, label
            del own

    assert evaluate(network(), samples(), jobs=jobs) == evaluate(network(), data())
    assert len(counts) == 40
    assert max(counts) <= most


def test_outputs_keep_their_form_in_other_processes() -> None:
    module = torch.export.export(TwoOutputs(), (data()[0][0],)).module()
    assert evaluate(module, data(), second_output, jobs=2) == evaluate(TwoOutputs(), data(), second_output)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"metric": "top7"}, OptionError, r"metric must be 'top1'.* Did you mean 'top5' or 'top1'"),
        ({"jobs": 0}, OptionError, "jobs must be"),
        ({"run": 3}, OptionError, "run must be a module"),
        ({"data": []}, InputError, "data are empty"),
        ({"data": [torch.zeros(1)]}, InputError, "Sample 0 is a Tensor instead of a pair"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(**{"run": network(), "data": data(), **arguments})


def test_models_that_cannot_be_pickled() -> None:
    model = network()
    model.lock = __import__("threading").Lock()
    with pytest.raises(ModelError, match="Use jobs=1"):
        evaluate(model, data(), jobs=2)


def test_a_metric_that_returns_nan_is_refused_by_name() -> None:
    def unbounded(outputs: Tensor, label: int) -> float:
        return float("nan")

    with pytest.raises(OptionError, match=r"The metric 'unbounded' returned NaN\. Give a metric"):
        evaluate(network(), data(), unbounded)
    assert evaluate(network(), data(), lambda *_: float("inf")) == float("inf")
