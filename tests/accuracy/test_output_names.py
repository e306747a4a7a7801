"""Outputs have the keys that the model gives them, and inputs the names of arguments, wherever a user sees them."""

from __future__ import annotations

import io
import json
import re
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

from openneutron import NeutronProgram, QuantizedModel, load, lower, quantize
from openneutron.accuracy import validate
from openneutron.accuracy.board_tensors import board_outputs
from openneutron.accuracy.compare_programs import compare_outputs
from openneutron.cli.tables import table_of_differences
from openneutron.model.arguments import Leaf, names_of_leaves, output_names
from openneutron.page import summarize
from openneutron.report.inspect import inspect, tensor_inputs
from openneutron.settings import Settings
from openneutron.workflow.runs import FileRun, run_files


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
        (lambda a, b: ({"boxes": a}, b), ("0.boxes", "output1")),
        (lambda a, b: (a, b), ("output0", "output1")),
        (lambda a, b: [a, (b,)], ("output0", "output1")),
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
    assert failed[0].startswith(f"Output '{names[0]}' has ")


@dataclass(frozen=True)
class Detector:
    """A program, its quantized model, and the names of its outputs."""

    path: Path
    program: NeutronProgram
    quantized: QuantizedModel
    names: list[str]


@pytest.fixture(scope="module", params=["a dict", "a tuple"])
def detector(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Detector:
    torch.manual_seed(0)
    data = [torch.randn(1, 1, 6, 6) for _ in range(3)]
    is_dict = request.param == "a dict"
    net = Net((lambda boxes, scores: {"boxes": boxes, "scores": scores}) if is_dict else lambda a, b: (a, b)).eval()
    path = tmp_path_factory.mktemp("detector") / "net.pte"
    quantized = quantize(net, data[0], data, recover=None)
    program = lower(quantized)
    program.save(path)
    np.save(path.with_name("x.npy"), data[0].numpy())
    return Detector(path, program, quantized, ["boxes", "scores"] if is_dict else ["output0", "output1"])


def run_once(one: Detector, output: Path | None = None) -> FileRun:
    return run_files(one.path, [f"x={one.path.with_name('x.npy')}"], Settings(), output=output)[0]


def arrays_of_run(one: Detector) -> list[str]:
    run_once(one, one.path.with_name("out.npz"))
    return sorted(np.load(one.path.with_name("out.npz")))


def firmware(one: Detector) -> list[str]:
    folder = one.path.with_name("firmware")
    one.program.package(folder, vectors=1)
    header = (folder / "model_config.h").read_text()
    named = re.findall(r'MODEL_OUTPUT_\d_NAME "(.+)"', header)
    assert [row["name"] for row in json.loads((folder / "manifest.json").read_text())["outputs"]] == named
    return named


def page_texts(one: Detector) -> list[str]:
    summary = summarize("net", one.program, quantized=one.quantized)
    return [text.partition(": ")[0] for text in summary.outputs]


def printed(text: str) -> list[str]:
    """The names of outputs at the starts of the lines of a program's text, or in the cells of a table."""
    return re.findall(r"^(?:  out |out |│ )(\w+)", text, re.MULTILINE)


def table_of_comparison(one: Detector) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=120).print(table_of_differences([], [], compare_outputs(one.path, one.path, samples=1)))
    return printed(text.getvalue())


PLACES: dict[str, Callable[[Detector], list[str]]] = {
    "load": lambda one: list(load(one.path).output_names()),
    "run --json": lambda one: [row.name for row in run_once(one).outputs],
    "run -o out.npz": arrays_of_run,
    "inspect": lambda one: [edge.name for edge in inspect(one.path).outputs],
    "validate": lambda one: [row.name for row in validate(one.program, None, samples=1, quantized=one.quantized).outputs
                             if row.reference == "int8"],
    "validate --against": lambda one: [row.name for row in board_outputs(load(one.path))],
    "compare --json": lambda one: [row.name for row in compare_outputs(one.path, one.path, samples=1)],
    "compare": table_of_comparison,
    "report": page_texts,
    "package": firmware,
    "print(program)": lambda one: printed(str(one.program)),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_an_output_has_one_name_in_all_results(detector: Detector, place: str) -> None:
    assert PLACES[place](detector) == detector.names


def name_in_firmware(one: Detector) -> str:
    folder = one.path.with_name("firmware_of_input")
    one.program.package(folder, vectors=1)
    header = (folder / "model_config.h").read_text()
    return str(re.findall(r'MODEL_INPUT_\d_NAME "(.+)"', header)[0])


PLACES_OF_INPUTS: dict[str, Callable[[Detector], str]] = {
    "load": lambda one: load(one.path).input_names()[0],
    "run": lambda one: str(load(one.path).leaves[0].path[0]),  # type: ignore[index]
    "inspect": lambda one: inspect(one.path).inputs[0].name,
    "names of files": lambda one: tensor_inputs(one.path)["input0"],
    "report of a bare program": lambda one: summarize("net", one.path).inputs[0].partition(": ")[0],
    "report of a build": lambda one: summarize("net", one.program).inputs[0].partition(": ")[0],
    "package": name_in_firmware,
    "print(program)": lambda one: re.findall(r"^(?:  in  |in  )(\w+)", str(one.program), re.MULTILINE)[0],
}


@pytest.mark.parametrize("place", PLACES_OF_INPUTS)
def test_an_input_has_one_name_in_all_results(detector: Detector, place: str) -> None:
    assert PLACES_OF_INPUTS[place](detector) == "x"


def test_outputs_that_are_not_tensors_keep_their_positions() -> None:
    torch.manual_seed(0)
    data = [torch.randn(1, 1, 6, 6) for _ in range(3)]
    program = lower(quantize(Net(lambda a, b: (3, a, b)).eval(), data[0], data, recover=None))
    assert load(program.buffer).output_names() == ("output0", "output1", "output2")
    assert [row.name for row in compare_outputs(program.buffer, program.buffer, samples=1)] == ["output1", "output2"]


@pytest.mark.parametrize(
    ("tree", "count", "names"),
    [
        ({"a": 1, "b": (2, None)}, 3, ("a", "b.0", "b.1")),
        (1, 1, ("output0",)),
        ({"a.b": 1, "a": {"b": 2}}, 2, ("output0", "output1")),
        ({"a": 1}, 2, ("output0", "output1")),
        ({3: 1}, 1, ("output0",)),
        ({"output1": 1, 1: 2}, 2, ("output0", "output1")),
        ({"output1": 1, "output0": 2}, 2, ("output1", "output0")),
        ({"output1": 1, 1: 2, "output0": 3, "b": 4}, 4, ("output0", "output1", "output2", "b")),
        ({"output1": 1, "b": 2, 1: 3}, 3, ("output1", "b", "output2")),
    ],
)
def test_names_in_trees(tree: Any, count: int, names: tuple[str, ...]) -> None:
    assert output_names(treespec_dumps(tree_structure(tree)), count) == names


@pytest.mark.parametrize("text", [None, "", "[]", "[1]", "[1, 2]", "[" * 10000, '[1, {"type": "x"}]'])
def test_unknown_trees_have_positions(text: str | None) -> None:
    assert output_names(text, 2, "out{}") == ("out0", "out1")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ([("x", "a.b"), ("x", "a", "b")], ("input0", "input1")),
        ([("y",), ("x", "a.b"), ("x", "a", "b")], ("y", "input1", "input2")),
        ([("x", 0), ("x", "0"), ("input0",)], ("input0", "input1", "input2")),
        ([("input1",), ("input0",)], ("input1", "input0")),
        ([], ("input0", "input1")),
    ],
)
def test_names_of_inputs_differ(paths: list[tuple[str | int, ...]], names: tuple[str, ...]) -> None:
    assert names_of_leaves([Leaf(path) for path in paths], 2) == names


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: dict[str, Any]) -> Tensor:
        found: Tensor = self.layer(x["a.b"]) + 2 * self.layer(x["a"]["b"])
        return found


def test_keys_of_one_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data: list[Any] = [({"a.b": torch.randn(1, 8), "a": {"b": torch.randn(1, 8)}},) for _ in range(3)]
    quantized = quantize(Nested().eval(), data[0], data, recover=None, progress=False)
    program = lower(quantized)
    program.save(tmp_path / "p.pte")
    assert [one["name"] for one in quantized.as_dict()["inputs"]] == ["input0", "input1"]
    assert [text.partition(": ")[0] for text in summarize("net", program).inputs] == ["input0", "input1"]
    host = load(tmp_path / "p.pte")
    assert host.input_names() == ["input0", "input1"]
    assert [one.name for one in inspect(tmp_path / "p.pte").inputs] == ["input0", "input1"]
    assert tensor_inputs(tmp_path / "p.pte") == {"input0": "input0", "input1": "input1"}
    files = [tmp_path / "ab.npy", tmp_path / "a_b.npy"]
    np.save(files[0], data[0][0]["a.b"].numpy())
    np.save(files[1], data[0][0]["a"]["b"].numpy())
    run_files(tmp_path / "p.pte", list(map(str, files)), Settings(), output=tmp_path / "out.npy", isolated=False)
    assert np.array_equal(np.load(tmp_path / "out.npy"), host.run(*data[0]).numpy())
