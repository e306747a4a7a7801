"""Several forms of a model on the same labelled data."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.flow_support import convert, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from openneutron import NeutronProgram, QuantizedModel, lower, quantize
from openneutron.accuracy import SideBySide, evaluate, evaluate_side_by_side
from openneutron.accuracy.evaluate import top1, top5
from openneutron.data import AudioTransform, ImageTransform, Waveform, read_data, thumbnail
from openneutron.errors import InputError, OptionError
from openneutron.results.intervals import normal_interval
from openneutron.runtime.program import HostProgram

CLASSES = ("ant", "bee", "cat")
PER_CLASS = 4


class Levels(nn.Module):
    """Scores of three levels of grey: dark, medium, light."""

    def __init__(self, *, mistake: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 4 * 4, 3)
        with torch.no_grad():
            self.linear.weight[:] = torch.tensor([-1.0, 0.0, 1.0])[:, None] / 48
            self.linear.bias[:] = torch.tensor([0.3, 0.1, -0.2 if mistake else -0.7])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))  # type: ignore[no-any-return]


def model(*, mistake: bool = False) -> nn.Module:
    return Levels(mistake=mistake).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for index in range(PER_CLASS):
            level = 20 + 100 * label + 3 * index
            Image.new("RGB", (6, 9), (level, level, level)).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def quantized(folder: Path) -> QuantizedModel:
    return quantize(model(), (torch.zeros(1, 3, 4, 4),), folder, progress=False)


@pytest.fixture(scope="module")
def program(quantized: QuantizedModel) -> NeutronProgram:
    return lower(quantized)


def test_a_folder_calibrates_and_evaluates(quantized: QuantizedModel, program: NeutronProgram, folder: Path) -> None:
    found = evaluate_side_by_side({"float": model(), "int8": quantized, ".pte": program}, folder)
    assert [run.name for run in found.runs] == ["float", "int8", ".pte"]
    assert (found.samples, found.unit, found.metric, found.classes) == (12, "%", "top1", CLASSES)
    assert found["float"].value == 100
    for run in found.runs:
        assert len(run.scores) == len(run.predictions or ()) == 12
        assert run.value == pytest.approx(sum(run.scores) / 12)
        assert run.interval is not None
        assert 0 < run.interval[0] < 100 <= run.interval[1] + 1e-9
    assert found["int8"].predictions == found[".pte"].predictions
    # The documented flow gives a module that takes the same folder, and a module alone needs a transform.
    assert evaluate(quantized.module, folder) == evaluate(quantized, str(folder)) == found["int8"].value
    assert evaluate(model(), read_data(folder, labelled=True, transform=ImageTransform(resize=(4, 4)))) == 100
    with pytest.raises(InputError, match=r"its size is not known\. Give a transform"):
        evaluate(model(), folder)


def test_a_module_of_the_documented_flow(folder: Path) -> None:
    inputs = [sample.inputs[None] for sample in read_data(folder, transform=ImageTransform(resize=(4, 4)))]
    module = convert(model(), (inputs[0],), calibration=[(x,) for x in inputs])
    assert evaluate_side_by_side({"int8": module}, folder)["int8"].value == evaluate(module, folder)


def test_samples_that_changed_sides(folder: Path) -> None:
    example = (torch.zeros(1, 3, 4, 4),)
    right, wrong = (torch.export.export(net, example).module() for net in (model(), model(mistake=True)))
    found = evaluate_side_by_side({"right": right, "wrong": wrong}, folder)
    lost = [(s.index, s.path, s.label, s.before, s.after) for s in found.lost("wrong")]
    assert lost == [(4 + i, folder / "bee" / f"{i}.png", 1, 1, 2) for i in range(PER_CLASS)]
    assert found.gained("wrong") == found.changed("right") == ()
    reverse = evaluate_side_by_side({"wrong": wrong, "right": right}, folder)
    assert [sample.index for sample in reverse.gained("right")] == [4, 5, 6, 7]
    assert reverse.lost("right") == ()
    assert str(found).splitlines()[0] == "top1 on 12 samples"
    assert str(found).splitlines()[2].endswith("lost 4, gained 0")
    for line in str(found).splitlines()[1:]:
        assert re.search(r"  \d+\.\d\d %  \(\d+\.\d\d to \d+\.\d\d\)", line), line
    rows = found.as_dict()["runs"]
    assert [row["name"] for row in rows] == ["right", "wrong"]
    assert rows[1]["changed"][0] == {
        "index": 4, "name": str(folder / "bee" / "0.png"), "path": str(folder / "bee" / "0.png"), "label": "bee",
        "before": "bee", "after": "cat", "is_lost": True,
    }  # fmt: skip
    with pytest.raises(KeyError):
        found["float"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_each_sample_is_read_once(jobs: int, folder: Path) -> None:
    read: list[float] = []

    def transform(image: Any) -> Tensor:
        read.append(0)
        return ImageTransform(resize=(4, 4))(image)

    done = []
    found = evaluate_side_by_side(
        {"a": model(), "b": model(mistake=True)}, folder, jobs=jobs, transform=transform,
        progress=lambda *numbers: done.append(numbers),
    )  # fmt: skip
    assert len(read) == 12
    assert done == [(number, 12) for number in range(1, 13)]
    assert [run.value for run in found.runs] == pytest.approx([100, 200 / 3])


def square_error(outputs: Tensor, label: Any) -> float:
    return float((outputs - label).square().mean())


def test_a_score_that_is_not_finite_can_be_written_as_json() -> None:
    found = evaluate_side_by_side({"a": nn.Identity()}, [(torch.tensor([math.inf]), 0.0)] * 3, square_error)
    (run,) = json.loads(json.dumps(found.as_dict(), allow_nan=False))["runs"]
    assert (found.runs[0].value, run["value"]) == (math.inf, None)


def test_metrics_of_the_user(tmp_path: Path) -> None:
    data = [(torch.full((1, 2), float(i)), i * 1.0) for i in range(5)]
    (tmp_path / "own.py").write_text(
        "def error(outputs, label):\n    return (outputs - label).square().mean()\nsize = 3\n"
    )
    for metric in (square_error, f"{tmp_path / 'own.py'}:error"):
        for jobs in (1, 2):
            found = evaluate_side_by_side({"a": nn.Identity(), "b": nn.Hardtanh(0, 3)}, data, metric, jobs=jobs)
            assert [run.value for run in found.runs] == [0, 0.2]
            assert found["b"].scores == (0, 0, 0, 0, 1)
            assert found["b"].interval == pytest.approx((0.2 - 0.391993, 0.2 + 0.391993), abs=1e-5)
            assert (found.unit, found.names, found.labels, found.classes) == ("", None, None, None)
            assert "changed" not in found.as_dict()["runs"][0]
            with pytest.raises(OptionError, match=r"does not tell whether a sample is right\. Use top1 or top5"):
                found.lost("b")
    assert normal_interval([1.0]) is None
    with pytest.raises(OptionError, match="is a int, not a function of outputs and label"):
        evaluate(nn.Identity(), data, f"{tmp_path / 'own.py'}:size")
    with pytest.raises(OptionError, match=r"The metric is 'eror' in .*Did you mean 'error'"):
        evaluate(nn.Identity(), data, f"{tmp_path / 'own.py'}:eror")


def test_functions_of_files_run_in_other_processes(tmp_path: Path) -> None:
    from openneutron.core.objects import load_object

    (tmp_path / "own_net.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n        return x + 1\n"
    )
    net = load_object(f"{tmp_path / 'own_net.py'}:Net")()
    data = [(torch.eye(3)[i : i + 1], i) for i in range(3)]
    assert evaluate(net, data, jobs=2) == 100


def test_top5() -> None:
    outputs = torch.tensor([[5.0, 4, 3, 2, 1, 0], [0, 0, 0, 0, 0, 0]])
    assert [top5(outputs[:1], label) for label in range(6)] == [100] * 5 + [0]
    assert [top5(outputs[1:], label) for label in range(6)] == [100] * 5 + [0]
    assert [top1(outputs[1:], label) for label in range(3)] == [100, 0, 0]
    assert top5(outputs, torch.tensor([5, 0])) == 50
    broken = torch.tensor([[float("nan"), 1, 2]])
    assert [top1(broken, label) for label in range(3)] == [0, 0, 0]
    assert evaluate(nn.Identity(), [(outputs[:1], 4), (outputs[:1], 5)], "top5") == 50


@pytest.mark.parametrize("shape", [(0,), (0, 3), (1, 0)])
@pytest.mark.parametrize("label", [0, torch.tensor([0, 1]), torch.zeros(0, dtype=torch.int64)])
def test_outputs_without_classes(shape: tuple[int, ...], label: Any) -> None:
    with pytest.raises(InputError, match="top1 needs an output with values for classes"):
        top1(torch.zeros(shape), label)


def test_an_output_without_dimensions_is_one_row_of_one_class() -> None:
    assert top1(torch.tensor(0.5), 0) == 100
    with pytest.raises(InputError, match="a class index for each of 1 rows"):
        top1(torch.tensor(0.5), torch.tensor([0, 1]))


@pytest.mark.parametrize("label", [-1, 6, torch.tensor([7])])
@pytest.mark.parametrize("metric", [top1, top5])
def test_labels_that_are_not_indices(label: Any, metric: Callable[[Any, Any], float]) -> None:
    with pytest.raises(InputError, match=r"is not an index of the output, which has 6 classes"):
        metric(torch.zeros(1, 6), label)


@pytest.mark.parametrize("names", [("ant", "bee"), ("ant", "bee", "cat", "dog")])
def test_folders_of_other_classes_than_the_model(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "0.png")
    exported = torch.export.export(model(), (torch.zeros(1, 3, 4, 4),)).module()
    with pytest.raises(InputError, match=rf"The data name {len(names)} classes, but the model's output has 3"):
        evaluate(exported, tmp_path)
    labelled = read_data(tmp_path, labelled=True, labels=["ant", "cat", "bee"]) if len(names) == 2 else None
    if labelled is not None:
        assert evaluate_side_by_side({"a": exported}, labelled).labels == (0, 2)


def test_integers_may_be_a_part_of_the_classes(tmp_path: Path) -> None:
    for name in ("0", "2"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4), (120 * int(name),) * 3).save(tmp_path / name / "0.png")
    exported = torch.export.export(model(), (torch.zeros(1, 3, 4, 4),)).module()
    assert evaluate(exported, tmp_path) == 100


def test_data_of_other_forms(quantized: QuantizedModel, folder: Path, tmp_path: Path) -> None:
    samples = read_data(folder, labelled=True)
    pixels = np.stack([np.array(sample.inputs.resize((4, 4))) for sample in samples])
    np.savez(tmp_path / "a.npz", x=pixels, y=np.array(samples.labels))
    floats = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    (tmp_path / "list.csv").write_text("".join(f"{s.path},{s.label}\n" for s in samples))
    (tmp_path / "data_of_levels.py").write_text(
        f"import torch\nfrom pathlib import Path\nfrom openneutron.data import read_data\n"
        f"def pairs():\n    return [(s.inputs, s.label) for s in read_data({str(folder)!r}, labelled=True)]\n"
    )
    expected = evaluate_side_by_side({"a": quantized}, samples)
    for data in (
        tmp_path / "a.npz", tmp_path / "list.csv", f"{tmp_path / 'data_of_levels.py'}:pairs",
        read_data(f"{tmp_path / 'data_of_levels.py'}:pairs", labelled=True),
        [(floats[index : index + 1], index // 4) for index in range(12)], [(s.inputs, s.label) for s in samples],
    ):  # fmt: skip
        found = evaluate_side_by_side({"a": quantized}, data)
        assert found["a"].predictions == expected["a"].predictions
        picture = thumbnail(found.inputs_of(11))
        assert (picture is None) == (found.data is None)


def test_int8_inputs_and_outputs(quantized: QuantizedModel, program: NeutronProgram, folder: Path) -> None:
    integers = lower(quantized, int8_io=True)
    found = evaluate_side_by_side({".pte": program, "int8_io": integers}, folder)
    assert found[".pte"].predictions == found["int8_io"].predictions
    mean: Callable[[Any, Any], float] = lambda outputs, _: float(outputs.float().mean())  # noqa: E731
    values = evaluate_side_by_side({".pte": program, "int8_io": integers}, folder, mean)
    assert values["int8_io"].value == pytest.approx(values[".pte"].value, abs=0.02)
    assert evaluate_side_by_side({"a": integers}, folder, jobs=2)["a"].predictions == found[".pte"].predictions


def test_batches(folder: Path) -> None:
    batched = torch.export.export(model(), (torch.zeros(4, 3, 4, 4),)).module()
    single = torch.export.export(model(), (torch.zeros(1, 3, 4, 4),)).module()
    found = evaluate_side_by_side({"float": model(), "a": batched}, folder)
    assert (found["a"].value, len(found["a"].scores), len(found.names or ())) == (100, 12, 12)
    assert found["a"].predictions == evaluate_side_by_side({"a": single}, folder)["a"].predictions
    with pytest.raises(OptionError, match="The runs have different batch sizes: a 4, b 1"):
        evaluate_side_by_side({"a": batched, "b": single}, folder)
    assert len(evaluate_side_by_side({"a": batched}, read_data(folder, labelled=True, limit=7))["a"].scores) == 4


def test_recordings() -> None:
    data = [(Waveform(torch.full((1, 8), level), 16000), label) for label, level in enumerate((-1.0, 1.0))]
    net = nn.Linear(10, 2)
    with torch.no_grad():
        net.weight[:] = torch.tensor([-1.0, 1.0])[:, None]
        net.bias[:] = 0
    exported = torch.export.export(net.eval(), (torch.zeros(1, 10),)).module()
    assert evaluate(exported, data) == 100
    assert evaluate(exported, data, transform=AudioTransform(16000)) == 100
    with pytest.raises(InputError, match=r"has 16000 frames per second; the model takes 8000"):
        evaluate(exported, data, transform=AudioTransform(8000))


def test_wrong_runs_and_data_are_refused(folder: Path) -> None:
    exported = torch.export.export(model(), (torch.zeros(1, 3, 4, 4),)).module()
    wrong: list[Any] = [{}, exported, [exported]]
    for runs in wrong:
        with pytest.raises(OptionError, match="runs must be a mapping from names to models"):
            evaluate_side_by_side(runs, folder)
    with pytest.raises(InputError, match=r"has no folders of classes"):
        evaluate(exported, folder / "ant")
    with pytest.raises(InputError, match=r"has no labels\. Give a folder"):
        evaluate(exported, read_data(folder))
    transformed = read_data(folder, labelled=True, transform=ImageTransform())
    with pytest.raises(OptionError, match="have a transform already"):
        evaluate(exported, transformed, transform=ImageTransform())
    with pytest.raises(OptionError, match="transform must be a function"):
        evaluate(exported, folder, transform=3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="mean has 2 numbers"):
        evaluate(exported, folder, transform=ImageTransform(mean=(0.5, 0.5)))
    loader = DataLoader(TensorDataset(torch.zeros(2, 3, 4, 4), torch.zeros(2)))
    with pytest.raises(OptionError, match="A transform takes single samples"):
        evaluate(exported, loader, transform=ImageTransform())
    grey = torch.export.export(seeded(lambda: nn.Conv2d(2, 1, 1)).eval(), (torch.zeros(1, 2, 4, 4),)).module()
    with pytest.raises(InputError, match="is not an image of 1 or 3 channels"):
        evaluate(grey, folder)


def test_the_result_is_plain_data(folder: Path) -> None:
    exported = torch.export.export(model(), (torch.zeros(1, 3, 4, 4),)).module()
    first, second = (evaluate_side_by_side({"a": exported}, folder) for _ in range(2))
    assert first == second
    assert isinstance(first, SideBySide)
    assert "predictions" not in repr(first)


class Sum(nn.Module):
    """A running sum with a limit."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        self.total = (0.5 * self.total + x).clamp(-4, 4)
        return self.total * 1.0


@pytest.mark.parametrize("form", ["float", "int8", ".pte", ".pt2"])
def test_evaluation_begins_and_ends_with_the_initial_state(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(1, 3, generator=generator) for _ in range(8)]
    module = Sum().eval()
    quantized = quantize(module, (data[0],), data, recover=None, progress=False)
    run: Any = {
        "float": module, "int8": quantized, ".pte": HostProgram(lower(quantized).portable),
        ".pt2": torch.export.export(module, (data[0],)),
    }[form]  # fmt: skip
    pairs = [(x, 0) for x in data]

    def metric(outputs: Tensor, _: int) -> float:
        return float(outputs.abs().sum())

    first = evaluate(run, pairs, metric)
    assert evaluate(run, pairs, metric) == first
    with pytest.raises(InputError, match="pair of inputs and label"):
        evaluate(run, [*pairs, data[0]], metric)
    assert evaluate(run, pairs, metric) == first


@dataclasses.dataclass
class Scores:
    level: Any
    nothing: Any
    count: Any


class Structured(nn.Module):
    """Returns scores of grey levels, None and a number in a container."""

    def __init__(self, container: Callable[..., Any]) -> None:
        super().__init__()
        self.levels, self.container = Levels(), container

    def forward(self, x: Tensor) -> Any:
        return self.container(level=self.levels(x), nothing=None, count=7)


def level_of_dict(outputs: Any, label: Any) -> float:
    return 100.0 * int(outputs["level"].argmax() == label and outputs["nothing"] is None and outputs["count"] == 7)


def level_of_dataclass(outputs: Any, label: Any) -> float:
    return level_of_dict(vars(outputs), label)


def level_of_tuple(outputs: Any, label: Any) -> float:
    return 100.0 * int(outputs[0].argmax() == label and outputs[-1] == 7)


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(("container", "metric"), [(dict, level_of_dict), (Scores, level_of_dataclass)])
def test_a_metric_reads_the_outputs_of_each_form(
    container: Callable[..., Any], metric: Callable[[Any, Any], float], jobs: int, folder: Path
) -> None:
    model = Structured(container).eval()
    module = quantize(model, (torch.zeros(1, 3, 4, 4),), folder, progress=False)
    program = lower(module)
    forms = {"float": model, "int8": module, "lowered": program, "loaded": program.buffer}
    found = evaluate_side_by_side(forms, folder, metric, jobs=jobs)
    assert [run.value for run in found.runs] == [100, 100, 100, 100]
    assert evaluate(program.buffer, folder, level_of_tuple) == 100


class Ordered(nn.Module):
    """Two values of an input, in a dict with the given order of its keys."""

    def __init__(self, *keys: str) -> None:
        super().__init__()
        self.keys = keys

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        values = {"a": x, "b": 2 * x}
        return {key: values[key] for key in self.keys}


class Halved:
    """No registered container: its constructor does not take its fields."""

    def __init__(self, whole: Tensor) -> None:
        self.half = whole / 2


class ReturnsHalved(nn.Module):
    def forward(self, x: Tensor) -> Halved:
        return Halved(x)


def first_value(outputs: Any, label: Any) -> float:
    return float(outputs["a"])


def half_value(outputs: Any, label: Any) -> float:
    return float(outputs.half)


def test_outputs_of_custom_types_reach_the_metric_unchanged() -> None:
    data = [(torch.tensor([[3.0]]), 0)]
    found = evaluate_side_by_side({"ba": Ordered("b", "a").eval(), "ab": Ordered("a", "b").eval()}, data, first_value)
    assert [run.value for run in found.runs] == [3, 3]
    runs = {"first": ReturnsHalved().eval(), "second": ReturnsHalved().eval()}
    assert [run.value for run in evaluate_side_by_side(runs, data, half_value).runs] == [1.5, 1.5]
