"""Top-1 after training on digits, read row by row by small recurrent networks, and the script of docs/options.md."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.recurrent import Task, digits

from openneutron import distill, finish_training, prepare_training

POINTS = 0.5  # 450 test images: two of them


def top1(module: Any, task: Task) -> float:
    with torch.no_grad():
        return float((module(task.tests).argmax(1) == task.labels).float().mean()) * 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "bits", "gain"),
    [("lstm", 8, -POINTS), ("gru", 8, -POINTS), ("bilstm", 8, -POINTS), ("attention", 8, -POINTS), ("lstm", 2, 2.0)],
)
def test_training_does_not_lose(network: str, bits: int, gain: float) -> None:
    task = digits(network)
    module = prepare_training(task.model, task.calibration[0], task.calibration, recover=None, weight_bits=bits)
    before = top1(module, task)
    distill(module, task.training, steps=60, rate=0.05)
    trained = finish_training(module)
    after = top1(module, task)
    assert after >= before + gain
    converted = torch.cat([trained(one[None]) for one in task.tests[:50]]).argmax(1)
    with torch.no_grad():
        assert int((converted != module(task.tests[:50]).argmax(1)).sum()) <= 1


@pytest.mark.slow
def test_script_of_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = (Path(__file__).parents[2] / "docs" / "options.md").read_text()
    (script,) = re.findall(r"<!-- run by tests/training/test_digits.py -->\n((?: {4}.*\n|\n)+)", document)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with torch.enable_grad():
        exec(compile(textwrap.dedent(script), "options.md", "exec"), names)
    assert {row.where for row in names["program"].placement} == {"npu"}
