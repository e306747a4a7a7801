"""Data of files and functions in quantize, analyze and evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.data.test_audio import write as write_wave
from tests.flow_support import seeded
from torch import Tensor, nn

from openneutron import lower, quantize
from openneutron.accuracy import analyze, evaluate, evaluate_side_by_side
from openneutron.data import read_data
from openneutron.errors import CalibrationError, InputError
from openneutron.model.data import InputForm, inputs_in, streams_in


class Sum(nn.Module):
    """Two classes of two inputs: the sum is negative or positive."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        with torch.no_grad():
            self.linear.weight[:] = torch.tensor([-1.0, 1.0])[:, None]
            self.linear.bias[:] = 0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear(x + y)  # type: ignore[no-any-return]


def values(index: int) -> dict[str, Any]:
    sign = 1 if index % 2 else -1
    return {"y": np.full(3, sign * (index + 1) / 8, np.float32), "x": np.full(3, sign / 4, np.float32)}


def test_archives_of_several_inputs_calibrate_and_evaluate(tmp_path: Path) -> None:
    for index in range(8):
        folder = tmp_path / "files" / ("positive" if index % 2 else "negative")
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / f"{index}.npz", **values(index))
    stacked = {name: np.stack([values(index)[name] for index in range(8)]) for name in ("x", "y")}
    arrays: dict[str, Any] = {**stacked, "labels": np.arange(8) % 2}
    np.savez(tmp_path / "all.npz", **arrays)
    model, example = Sum().eval(), (torch.zeros(1, 3), torch.zeros(1, 3))
    quantized = quantize(model, example, tmp_path / "files", progress=False)
    program = lower(quantized)
    for data in (tmp_path / "files", tmp_path / "all.npz"):
        found = evaluate_side_by_side({"float": model, "int8": quantized, ".pte": program}, data)
        assert [run.value for run in found.runs] == [100, 100, 100]
        assert sorted(found.labels or ()) == [0] * 4 + [1] * 4
        assert analyze(None, quantized, data).samples == 8
    np.savez(tmp_path / "one.npz", x=stacked["x"])
    with pytest.raises(CalibrationError, match=r"takes \(torch.float32 \(1, 3\), torch.float32 \(1, 3\)\)"):
        quantize(model, example, tmp_path / "one.npz", progress=False)


def test_recordings_calibrate_and_evaluate(tmp_path: Path) -> None:
    for index in range(6):
        folder = tmp_path / ("loud" if index % 2 else "quiet")
        folder.mkdir(exist_ok=True)
        wave = np.sin(np.arange(50 + index) / 3) * (0.8 if index % 2 else 0.1)
        write_wave(folder / f"{index}.wav", wave)

    class Loudness(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mean = x.abs().mean(2)
            return torch.cat([mean, 0.6 - mean], 1)

    net = Loudness().eval()
    quantized = quantize(net, (torch.zeros(1, 1, 64),), str(tmp_path), progress=False)
    found = evaluate_side_by_side({"float": net, "int8": quantized, ".pte": lower(quantized)}, tmp_path)
    assert [run.value for run in found.runs] == [100, 100, 100]
    assert found.classes == ("loud", "quiet")


FUNCTIONS = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from openneutron import Stream

x, y = torch.arange(24.0).reshape(8, 3), torch.arange(8)

def streams():
    for start in (0, 3):
        yield Stream(list(x[start : start + 3, None]))

def pair_streams():
    for start in (0, 3):
        yield Stream([(row[None], 1) for row in x[start : start + 3]])

def loader():
    return DataLoader(TensorDataset(x, y), batch_size=4)

def tensor():
    return x

def pairs():
    return [(row, int(label)) for row, label in zip(x, y)]
"""


def test_results_of_functions_are_read_as_in_python(tmp_path: Path) -> None:
    file = tmp_path / "data_functions.py"
    file.write_text(FUNCTIONS)
    rows = torch.arange(24.0).reshape(8, 3)
    for batch in (1, 2):
        forms = [InputForm("x", (batch, 3), torch.float32)]
        for name in ("loader", "tensor"):
            found = [x for (x,) in inputs_in(f"{file}:{name}", forms)]
            assert torch.equal(torch.cat(found), rows)
            assert len(found) == 8 // batch
    forms = [InputForm("x", (1, 3), torch.float32)]
    assert [len(list(steps)) for steps in streams_in(f"{file}:streams", forms)] == [3, 3]
    for labelled in (False, True):
        samples = read_data(f"{file}:pairs", labelled=labelled)
        assert torch.equal(torch.cat([x for (x,) in inputs_in(samples, forms)]), rows)
        assert torch.equal(torch.cat([x for (x,) in inputs_in(samples.limited(2), forms)]), rows[[0, 4]])
    halved = read_data(f"{file}:pairs", labelled=True, transform=lambda x: x / 2)
    assert torch.equal(torch.cat([x for (x,) in inputs_in(halved, forms)]), rows / 2)


def test_streams_of_a_function_are_evaluated(tmp_path: Path) -> None:
    (tmp_path / "stream_functions.py").write_text(FUNCTIONS)

    class Counter(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1, 3))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return self.count + 0 * x

    def counted(outputs: Tensor, label: int) -> float:
        return float(outputs.max())

    example = (torch.zeros(1, 3),)
    exported = torch.export.export(Counter().eval(), example).module()
    runs = {"float": Counter().eval(), "exported": exported, "a function": lambda x: x}
    found = evaluate_side_by_side(runs, f"{tmp_path / 'stream_functions.py'}:pair_streams", counted)
    assert found["float"].scores == found["exported"].scores == (1, 2, 3, 1, 2, 3)


def test_samples_of_files_are_stacked_to_batches(tmp_path: Path) -> None:
    for index in range(5):
        np.save(tmp_path / f"{index}.npy", np.full(3, index, np.float32))
    found = [x for (x,) in inputs_in(tmp_path, [InputForm("x", (2, 3), torch.float32)])]
    assert [x[:, 0].tolist() for x in found] == [[0, 1], [2, 3]]


def test_messages_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    np.save(tmp_path / "0" / "a.npy", np.zeros(4, np.float32))
    linear = seeded(lambda: nn.Linear(3, 2)).eval()
    quantized = quantize(linear, (torch.zeros(1, 3),), [torch.ones(1, 3)], progress=False)
    message = r"a\.npy is .*torch.float32 \((1, )?4,?\).*takes \(torch.float32 \(1, 3\)\)"
    with pytest.raises(InputError, match=message):
        analyze(None, quantized, tmp_path)
    with pytest.raises(InputError, match=message):
        evaluate(quantized, tmp_path)
