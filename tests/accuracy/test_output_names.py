"""Outputs have the keys that the model gives them, wherever a user sees them."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._pytree import tree_structure, treespec_dumps

from openneutron import load, lower, quantize
from openneutron.accuracy import validate
from openneutron.accuracy.compare_programs import compare_outputs
from openneutron.cli.tables import table_of_differences
from openneutron.model.arguments import output_names
from openneutron.page import summarize
from openneutron.report.inspect import inspect
from openneutron.settings import Settings
from openneutron.workflow.runs import run_files


@dataclass
class Heads:
    boxes: Any
    scores: Any


class Net(nn.Module):
    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.box, self.score = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 1, 1)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        x = self.body(x).relu()
        return self.form(self.box(x), self.score(x).sigmoid())


@pytest.mark.parametrize(
    ("form", "names"),
    [
        (lambda a, b: {"boxes": a, "scores": b}, ("boxes", "scores")),
        (lambda a, b: Heads(boxes=a, scores=b), ("boxes", "scores")),
        (lambda a, b: {"heads": [a, {"score": b}]}, ("heads.0", "heads.1.score")),
        (lambda a, b: ({"boxes": a}, b), ("0.boxes", "output 1")),
        (lambda a, b: (a, b), ("output 0", "output 1")),
        (lambda a, b: [a, (b,)], ("output 0", "output 1")),
    ],
)
def test_a_program_names_its_outputs(form: Callable[[Tensor, Tensor], Any], names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    data = [torch.randn(1, 1, 6, 6) for _ in range(3)]
    quantized = quantize(Net(form).eval(), data[0], data, recover=None)
    program = lower(quantized)
    assert load(program.buffer).output_names() == names
    found = validate(program, None, data, quantized=quantized, samples=2, max_lsb=1)
    assert [row.name for row in found.outputs if row.reference == "int8"] == list(names)
    assert f"  {names[0]} against float: " in str(found)
    summary = summarize("net", program, quantized=quantized, validation=found)
    assert [row.name for row in summary.validation] == [*names, *names]
    assert [text.partition(": ")[0] for text in summary.outputs] == list(names)
    failed = validate(program, None, data, quantized=quantized, samples=2, min_sqnr_db=200).failures
    title = "Output 0" if names[0] == "output 0" else f"Output '{names[0]}'"
    assert failed[0].startswith(f"{title} has ")


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    data = [torch.randn(1, 1, 6, 6) for _ in range(3)]
    net = Net(lambda boxes, scores: {"boxes": boxes, "scores": scores}).eval()
    path = tmp_path_factory.mktemp("detector") / "net.pte"
    lower(quantize(net, data[0], data, recover=None)).save(path)
    np.save(path.with_name("x.npy"), data[0].numpy())
    return path


def test_verbs_name_outputs(detector: Path) -> None:
    output = detector.with_name("out.npz")
    (run,) = run_files(detector, [str(detector.with_name("x.npy"))], Settings(), output=output)
    assert [row.name for row in run.outputs] == ["boxes", "scores"]
    assert sorted(np.load(output)) == ["boxes", "scores"]
    assert [edge.name for edge in inspect(detector).outputs] == ["boxes", "scores"]
    text = io.StringIO()
    Console(file=text, width=120).print(table_of_differences([], [], compare_outputs(detector, detector, samples=1)))
    assert "boxes" in text.getvalue()


@pytest.mark.parametrize(
    ("tree", "count", "names"),
    [
        ({"a": 1, "b": (2, None)}, 3, ("a", "b.0", "b.1")),
        (1, 1, ("output 0",)),
        ({"a.b": 1, "a": {"b": 2}}, 2, ("output 0", "output 1")),
        ({"a": 1}, 2, ("output 0", "output 1")),
        ({3: 1}, 1, ("output 0",)),
        ({"output 1": 1, 1: 2}, 2, ("output 0", "output 1")),
        ({"output 1": 1, "output 0": 2}, 2, ("output 1", "output 0")),
        ({"output 1": 1, 1: 2, "output 0": 3, "b": 4}, 4, ("output 0", "output 1", "output 2", "b")),
        ({"output 1": 1, "b": 2, 1: 3}, 3, ("output 1", "b", "output 2")),
    ],
)
def test_names_in_trees(tree: Any, count: int, names: tuple[str, ...]) -> None:
    assert output_names(treespec_dumps(tree_structure(tree)), count) == names


@pytest.mark.parametrize("text", [None, "", "[]", "[1]", "[1, 2]", "[" * 10000, '[1, {"type": "x"}]'])
def test_unknown_trees_have_positions(text: str | None) -> None:
    assert output_names(text, 2, "out{}") == ("out0", "out1")
