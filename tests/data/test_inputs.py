"""Reading files as inputs of a program, and writing its outputs as files and classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.data.test_audio import write as write_wave

from openneutron.data import (
    ClassNames,
    ImageTransform,
    SkippedFilesWarning,
    inputs_of_files,
    save_outputs,
    summarize_outputs,
    thumbnail,
    top_classes,
)
from openneutron.data.inputs import check_files
from openneutron.errors import InputError, OptionError, OutputError
from openneutron.model.data import InputForm
from openneutron.runtime.program import ConstantInfo, TensorInfo

IMAGE = [TensorInfo((1, 3, 4, 6), torch.float32)]
PAIR = [TensorInfo((1, 2), torch.float32), ConstantInfo(7), TensorInfo((1, 3), torch.float32)]


def image(path: Path, level: int = 51) -> Path:
    Image.new("RGB", (9, 9), (level,) * 3).save(path)
    return path


def array(path: Path, *shape: int, value: float = 1, dtype: Any = np.float32) -> Path:
    np.save(path, np.full(shape, value, dtype))
    return path


def test_each_file_is_a_run_of_a_program_with_one_input(tmp_path: Path) -> None:
    files = [image(tmp_path / "a.png"), array(tmp_path / "b.npy", 3, 4, 6), array(tmp_path / "c.npy", 1, 3, 4, 6)]
    runs = inputs_of_files(files, IMAGE)
    assert [(run.paths, run.name) for run in runs] == [((file,), str(file)) for file in files]
    assert [tuple(run.inputs[0].shape) for run in runs] == [(1, 3, 4, 6)] * 3
    assert torch.allclose(runs[0].inputs[0], torch.tensor(0.2))
    dark = inputs_of_files(files[:1], IMAGE, ImageTransform(mean=0.2))
    assert torch.allclose(dark[0].inputs[0], torch.tensor(0.0))
    assert len(inputs_of_files([f"input0={files[0]}"], IMAGE)) == 1


def test_a_folder_stands_for_its_files(tmp_path: Path) -> None:
    image(tmp_path / "b.png")
    image(tmp_path / "a.png")
    (tmp_path / "notes.txt").touch()
    with pytest.warns(SkippedFilesWarning, match=r"notes\.txt"):
        runs = inputs_of_files([tmp_path], IMAGE)
    assert [run.paths[0].name for run in runs] == ["a.png", "b.png"]


@pytest.mark.parametrize(("batch", "count"), [(1, 6), (2, 3), (3, 2)])
def test_an_array_of_several_samples_is_a_run_for_each_batch(batch: int, count: int, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(12, dtype=np.float32).reshape(6, 2))
    runs = inputs_of_files([tmp_path / "a.npy"], [TensorInfo((batch, 2), torch.float32)])
    assert len(runs) == count
    assert torch.equal(torch.cat([run.inputs[0] for run in runs]), torch.arange(12.0).reshape(6, 2))
    assert runs[1].name == f"{tmp_path / 'a.npy'}[{batch}]"
    (tmp_path / "a.csv").write_text("x,y\n1,2\n3,4\n")
    assert inputs_of_files([tmp_path / "a.csv"], [TensorInfo((1, 2), torch.float32)])[1].inputs[0].tolist() == [[3, 4]]


@pytest.mark.parametrize("order", ["{a} {b}", "first={a} second={b}", "second={b} first={a}", "{a} second={b}",
                                   "second={b} {a}"])  # fmt: skip
def test_several_inputs_by_position_and_by_name(order: str, tmp_path: Path) -> None:
    a, b = array(tmp_path / "a=1.npy", 2), array(tmp_path / "b.npy", 1, 3, value=2)
    (run,) = inputs_of_files(order.format(a=a, b=b).split(), PAIR, names=["first", "number", "second"])
    assert [run.inputs[0].tolist(), run.inputs[1], run.inputs[2].tolist()] == [[[1, 1]], 7, [[2, 2, 2]]]
    assert run.paths == (a, b)


@pytest.mark.parametrize("order", ["{a} {b}", "input0={a} input2={b}", "input2={b} {a}", "{both}"])
@pytest.mark.parametrize("names", [["x.a.b", "n", "x.a.b"], None])
def test_inputs_of_one_name_are_called_by_their_positions(order: str, names: list[str] | None, tmp_path: Path) -> None:
    a, b = array(tmp_path / "a.npy", 1, 2), array(tmp_path / "b.npy", 1, 2, value=2)
    np.savez(tmp_path / "both.npz", input2=np.load(b), input0=np.load(a))
    forms = [
        InputForm("x.a.b", (1, 2), torch.float32),
        InputForm("n", (), None, constant=7),
        InputForm("x.a.b", (1, 2), torch.float32),
    ]
    files = order.format(a=a, b=b, both=tmp_path / "both.npz").split()
    (run,) = inputs_of_files(files, forms, names=names)
    assert [run.inputs[0].tolist(), run.inputs[1], run.inputs[2].tolist()] == [[[1, 1]], 7, [[2, 2]]]
    with pytest.raises(OptionError, match=r"'x\.a\.b' in '.*' is not an input of the program: input0, input2"):
        inputs_of_files([f"x.a.b={a}", str(b)], forms, names=names)


@pytest.mark.parametrize(("names", "text"), [([], "0 names"), (["a", "b"], r"2 names \(a, b\)")])
def test_another_number_of_names_than_of_inputs(names: list[str], text: str, tmp_path: Path) -> None:
    file = array(tmp_path / "a.npy", 3, 4, 6)
    with pytest.raises(OptionError, match=rf"`names` has {text}.* has 1 inputs\. Give a name for each input"):
        inputs_of_files([file], IMAGE, names=names)


def test_archives_of_several_inputs(tmp_path: Path) -> None:
    for index in range(2):
        arrays: dict[str, Any] = {"b": np.full((1, 3), index, np.float32), "a": np.full(2, -index, np.float32)}
        np.savez(tmp_path / f"{index}.npz", **arrays)
    forms = [
        InputForm("a", (1, 2), torch.float32),
        InputForm("n", (), None, constant=5),
        InputForm("b", (1, 3), torch.float32),
    ]
    runs = inputs_of_files([tmp_path / "0.npz", tmp_path / "1.npz"], forms)
    assert [[v.tolist() if hasattr(v, "tolist") else v for v in run.inputs] for run in runs] == [
        [[[0, 0]], 5, [[0, 0, 0]]], [[[-1, -1]], 5, [[1, 1, 1]]],
    ]  # fmt: skip
    one = inputs_of_files([tmp_path / "1.npz"], forms[:1])
    assert one[0].inputs[0].tolist() == [[-1, -1]]
    with pytest.raises(
        InputError, match=r"must have the arrays a, c, but has b, a|must have the arrays a, c, but has a, b"
    ):
        inputs_of_files([tmp_path / "0.npz"], [forms[0], InputForm("c", (1, 3), torch.float32)])
    with pytest.raises(InputError, match=r"the arrays b, a, but none has the name of .* as 'c'"):
        inputs_of_files([tmp_path / "0.npz"], [InputForm("c", (1, 3), torch.float32)])


def test_quantized_inputs(tmp_path: Path) -> None:
    forms = [TensorInfo((1, 3, 4, 6), torch.int8, 1 / 255, -128)]
    (run,) = inputs_of_files([image(tmp_path / "a.png", 51)], forms)
    assert run.inputs[0].dtype == torch.int8
    assert run.inputs[0].unique().tolist() == [51 - 128]
    codes = array(tmp_path / "codes.npy", 1, 3, 4, 6, value=5, dtype=np.int8)
    assert inputs_of_files([codes], forms)[0].inputs[0].unique().tolist() == [5]


def test_recordings(tmp_path: Path) -> None:
    (run,) = inputs_of_files([write_wave(tmp_path / "a.wav")], [TensorInfo((1, 1, 500), torch.float32)])
    assert run.inputs[0].shape == (1, 1, 500)


@pytest.mark.parametrize(
    ("forms", "files", "error", "message"),
    [
        (IMAGE, ["none.png"], InputError, r"none\.png' does not exist"),
        (IMAGE, ["bad.png"], InputError, r"bad\.png cannot be read as an image"),
        (IMAGE, ["a.pt"], InputError, r"type of '.*a\.pt' is unknown"),
        (IMAGE, [], InputError, r"Give a file for each input: input0"),
        (
            IMAGE,
            ["double.npy"],
            InputError,
            r"is torch.float64 .* takes torch.float32 \(1, 3, 4, 6\)\. Save it as float32",
        ),
        (IMAGE, ["two.npy"], InputError, r"two\.npy is torch.float32 \(2,\); the input 'input0' takes"),
        (IMAGE, ["input=a.png"], OptionError, r"'input' in '.*' is not an input.*: input0\. Did you mean 'input0'"),
        (IMAGE, ["image=a.png"], OptionError, r"not an input of the program: input0\. The program has no names"),
        (IMAGE, ["a.wav"], InputError, r"a\.wav: The model's input .* is not a waveform"),
        (PAIR, ["two.npy"], InputError, r"takes 2 inputs \(input0: torch.float32 \(1, 2\), input2: .*\), but 1 files"),
        (PAIR, ["two.npy"] * 3, InputError, "but 3 files are given"),
        (PAIR, ["input0=two.npy", "input0=two.npy"], OptionError, "The input 'input0' is given twice"),
        (PAIR, ["two.npy", "two.npy"], InputError, r"two\.npy is torch.float32 \(2,\); the input 'input2' takes"),
        ([ConstantInfo(3)], ["two.npy"], InputError, "has no tensor inputs"),
        (
            [TensorInfo((1, 5), torch.float32)],
            ["a.png"],
            InputError,
            r"a\.png: The model's input \(1, 5\) is not an image",
        ),
    ],
)
def test_files_that_do_not_fit(
    forms: Any, files: list[str], error: type[Exception], message: str, folder_of_files: Path
) -> None:
    with pytest.raises(error, match=message):
        inputs_of_files(files, forms)


@pytest.mark.parametrize(
    ("names", "files", "order"),
    [
        (["x", "y"], ["y=1.npy", "x=0.npy"], [0, 1]),
        (["x", "y"], ["input1=1.npy", "input0=0.npy"], [0, 1]),
        (["batch.ids", "batch.0"], ["batch.0=1.npy", "batch.ids=0.npy"], [0, 1]),
        (["input1", "input0"], ["input1=0.npy", "input0=1.npy"], [0, 1]),
        (["x", "y"], ["by_name.npz"], [0, 1]),
        (["a", "b"], ["by_position.npz"], [0, 1]),
        (["input1", "b"], ["turned.npz"], [1, 0]),
    ],
)
def test_an_input_has_its_name_and_its_position(
    names: list[str], files: list[str], order: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    zero, one = (np.full((1, 2), value, np.float32) for value in (0, 1))
    np.save("0.npy", zero)
    np.save("1.npy", one)
    np.savez("by_name.npz", x=zero, y=one)
    np.savez("by_position.npz", input0=zero, input1=one)
    np.savez("turned.npz", b=zero, input1=one)
    forms = [TensorInfo((1, 2), torch.float32)] * 2
    check_files(files, dict(zip(("input0", "input1"), names, strict=True)))
    (run,) = inputs_of_files(files, forms, names=names)
    assert [value[0, 0].item() for value in run.inputs] == order


def test_a_position_does_not_stand_for_another_input(tmp_path: Path) -> None:
    path = tmp_path / "one.npz"
    np.savez(path, input1=np.zeros((1, 2), np.float32))
    with pytest.raises(InputError, match="must have the arrays input1, b"):
        inputs_of_files([path], [TensorInfo((1, 2), torch.float32)] * 2, names=["input1", "b"])


@pytest.fixture
def folder_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("bad.png", "a.pt"):
        Path(name).touch()
    array(Path("double.npy"), 1, 3, 4, 6, dtype=np.float64)
    array(Path("two.npy"), 2)
    image(Path("a.png"))
    write_wave(Path("a.wav"))
    return tmp_path


# ------------------------------------------------------------------------------------------------------------- outputs


def test_the_classes_with_the_largest_values() -> None:
    rows = top_classes(torch.tensor([[0.1, 0.7, 0.2], [3.0, 3.0, float("nan")]]), ["a", "b", "c"], 2)
    assert [[(one.index, one.name, round(one.score, 3)) for one in row] for row in rows] == [
        [(1, "b", 0.7), (2, "c", 0.2)], [(0, "a", 3), (1, "b", 3)],
    ]  # fmt: skip
    assert [one.name for one in top_classes(torch.tensor([3, 9, -1], dtype=torch.int8), k=9)[0]] == ["1", "0", "2"]
    assert top_classes(np.ones((1, 2, 1, 1)), ClassNames(("a", "b")))[0][0].name == "a"
    with pytest.raises(InputError, match="The labels name 2 classes, but the output has 3"):
        top_classes(torch.zeros(1, 3), ["a", "b"])
    with pytest.raises(InputError, match=r"shape \(1, 3, 4, 4\)"):
        top_classes(torch.zeros(1, 3, 4, 4))
    for k in (0, True, 1.5):
        with pytest.raises(OptionError, match="k must be a positive number"):
            top_classes(torch.zeros(3), k=k)  # type: ignore[arg-type]


def test_outputs_as_files(tmp_path: Path) -> None:
    first, second = torch.arange(6.0).reshape(2, 3), torch.tensor([1], dtype=torch.int8)
    save_outputs(tmp_path / "a.npy", first)
    assert np.array_equal(np.load(tmp_path / "a.npy"), first.numpy())
    save_outputs(tmp_path / "a.npz", (first, second, 3, None), ["x", "y", "n", "none"])
    with np.load(tmp_path / "a.npz") as found:
        assert {name: found[name].tolist() for name in found.files} == {"x": first.tolist(), "y": [1], "n": 3}
    content = (tmp_path / "a.npz").read_bytes()
    save_outputs(tmp_path / "b.npz", (first, second, 3, None), ["x", "y", "n", "none"])
    assert (tmp_path / "b.npz").read_bytes() == content
    with pytest.raises(OptionError, match=r"holds one array, but there are 2 outputs\. Give a \.npz file"):
        save_outputs(tmp_path / "c.npy", (first, second))
    with pytest.raises(OptionError, match=r"must be a \.npy or a \.npz file"):
        save_outputs(tmp_path / "c.txt", first)
    with pytest.raises(OutputError, match="does not exist"):
        save_outputs(tmp_path / "none" / "c.npy", first)
    with pytest.raises(InputError, match="There are 1 outputs, but 2 names"):
        save_outputs(tmp_path / "c.npz", first, ["a", "b"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "a.npz", "b.npz"]


def test_a_summary_of_outputs() -> None:
    rows = summarize_outputs((torch.arange(8.0).reshape(2, 4), torch.zeros(0, 2), 3, None))
    assert [(row.name, row.dtype, row.shape) for row in rows] == [
        ("output0", "float32", (2, 4)), ("output1", "float32", (0, 2)), ("output2", "int", None),
        ("output3", "NoneType", None),
    ]  # fmt: skip
    assert (rows[0].minimum, rows[0].mean, rows[0].maximum, rows[0].first) == (0, 3.5, 7, (0, 1, 2, 3, 4, 5))
    assert rows[2].first == (3,)


def test_thumbnails(tmp_path: Path) -> None:
    uri = thumbnail(image(tmp_path / "a.png"))
    assert uri is not None
    assert uri.startswith("data:image/jpeg;base64,/9j/")
    with Image.open(tmp_path / "a.png") as opened:
        pixels = np.array(opened)
        assert thumbnail(opened) == thumbnail(pixels) == thumbnail(torch.from_numpy(pixels).permute(2, 0, 1)) == uri
    for other in (tmp_path / "a.npy", pixels / 255, 3, None):
        assert thumbnail(other) is None
    (tmp_path / "b.png").touch()
    with pytest.raises(InputError, match=r"b\.png cannot be read"):
        thumbnail(tmp_path / "b.png")
