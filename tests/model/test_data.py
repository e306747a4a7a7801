"""Data of any form as model inputs, with equal results in calibration, analysis and evaluation."""

from __future__ import annotations

import re
import sys
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.flow_support import seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from openneutron import NeutronQuantizer, Stream, lower, quantize
from openneutron.accuracy import analyze
from openneutron.accuracy.compare import compare_layers
from openneutron.errors import CalibrationError, InputError, OptionError
from openneutron.model.data import InputForm, calibration_inputs, forms_of, inputs_in, items_of


def form(*sizes: int | None, name: str = "image", dtype: torch.dtype = torch.float32) -> InputForm:
    return InputForm(name, sizes, dtype)


FORM = [form(1, 3, 8, 8)]
PAIR = [form(1, 2, name="a"), form(1, 3, name="b")]


def images(count: int = 1, seed: int = 0) -> Tensor:
    return torch.randn((count, 3, 8, 8), generator=torch.Generator().manual_seed(seed))


def joined(data: Any, forms: list[InputForm] = FORM, **options: Any) -> Tensor:
    return torch.cat([x for (x,) in inputs_in(data, forms, **options)])


class Numbered(Dataset[tuple[Tensor, int]]):
    """A data set like torchvision's: images without a batch dimension, and labels, by number."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return images(5)[index], index


# ------------------------------------------------------------------------------------------------------ accepted data


def test_tensors_tuples_lists_and_mappings() -> None:
    x, label = images(), torch.tensor([3])
    named = {"image": x}
    for item in (x, (x,), [x], (x, label), [x, 3], named, {**named, "label": 3}, ((x,), 3), (named, 3)):
        ((found,),) = inputs_in([item], FORM)
        assert found is x


def test_several_inputs_by_name() -> None:
    a, b = torch.ones(1, 2), torch.ones(1, 3)
    for item in ({"b": b, "a": a}, (a, b), (a, b, 7)):
        (found,) = inputs_in([item], PAIR)
        assert [id(value) for value in found] == [id(a), id(b)]
    with pytest.raises(InputError, match=r"Item 1 of the data lacks 'b', which is an input of forward\. Is it 'bb'\?"):
        list(inputs_in([{"a": a, "b": b}, {"a": a, "bb": b}], PAIR))


def test_a_batch_of_one_may_be_missing() -> None:
    assert torch.equal(joined(list(images(3))), images(3))
    assert torch.equal(joined([(image, 3) for image in images(3)]), images(3))
    ((a, b),) = inputs_in([(torch.ones(2), torch.ones(1, 3))], PAIR)
    assert (a.shape, b.shape) == ((1, 2), (1, 3))
    with pytest.raises(InputError, match="Item 0"):
        joined(list(images(3)), [form(2, 3, 8, 8)])


def test_a_data_set_by_number() -> None:
    assert torch.equal(joined(Numbered()), images(5))
    assert torch.equal(joined(Subset(Numbered(), [3, 1])), images(5)[[3, 1]])
    assert torch.equal(joined(TensorDataset(images(4), torch.arange(4))), images(4))


def test_samples_are_read_on_access() -> None:
    endless = (images(seed=seed) for seed in count())
    assert len(list(islice(inputs_in(endless, FORM), 3))) == 3
    assert torch.equal(next(endless), images(seed=3))


def test_a_data_loader_is_split_and_loses_its_labels() -> None:
    data = TensorDataset(images(10), torch.arange(10))
    assert torch.equal(joined(DataLoader(data, batch_size=4)), images(10))
    pairs = list(inputs_in(DataLoader(data, batch_size=5), [form(2, 3, 8, 8)]))
    assert [tuple(x.shape) for (x,) in pairs] == [(2, 3, 8, 8)] * 4
    doubled = joined(DataLoader(data, batch_size=4), transform=lambda batch: (2 * batch[0], batch[1]))
    assert torch.equal(doubled, 2 * images(10))
    assert torch.equal(joined(DataLoader(data, batch_size=None)), images(10))


def test_rows_of_one_tensor_are_samples() -> None:
    assert torch.equal(joined(images(7)), images(7))
    assert torch.equal(joined(images(7), transform=lambda part: part + 1), images(7) + 1)
    assert len(list(inputs_in(images(7), [form(2, 3, 8, 8)]))) == 3


def test_batches_of_any_size_for_a_dynamic_batch() -> None:
    assert [len(x) for (x,) in inputs_in([images(2), images(3), images()[0]], [form(None, 3, 8, 8)])] == [2, 3, 1]
    for data in (images(4), DataLoader(TensorDataset(images(4)), batch_size=3)):
        assert [len(x) for (x,) in inputs_in(data, [form(None, 3, 8, 8)])] == [1] * 4


def test_arrays_of_a_folder_in_order(tmp_path: Path) -> None:
    for index in (2, 0, 1):
        array = np.full((3, 8, 8), index, dtype=np.float32)
        np.save(tmp_path / f"{index}.npy", array if index else array[None])
    (tmp_path / "notes.txt").write_text("no array")
    for folder in (tmp_path, str(tmp_path)):
        assert [float(x.mean()) for (x,) in inputs_in(folder, FORM)] == [0, 1, 2]
    doubled = inputs_in(tmp_path, FORM, transform=lambda array: 2 * array)
    assert [float(x.mean()) for (x,) in doubled] == [0, 2, 4]


def test_images_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    Image.new("RGB", (20, 30), (255, 0, 51)).save(tmp_path / "class" / "b.png")
    Image.new("L", (8, 8), 102).save(tmp_path / "a.png")
    first, second = (x for (x,) in inputs_in(tmp_path, FORM))
    assert first[0, :, 4, 4].tolist() == pytest.approx([0.4, 0.4, 0.4])
    assert second[0, :, 4, 4].tolist() == pytest.approx([1, 0, 0.2])
    assert first.shape == second.shape == (1, 3, 8, 8)
    (grey, _) = inputs_in(tmp_path, [form(1, 1, 5, 6)])
    assert float(grey[0].mean()) == pytest.approx(0.4)


def test_a_transform_gets_an_image(tmp_path: Path) -> None:
    Image.new("RGB", (20, 30), (255, 0, 51)).save(tmp_path / "b.png")

    def transform(image: Image.Image) -> Tensor:
        assert image.size == (20, 30)
        return torch.full((3, 8, 8), -2.0)

    assert float(joined(tmp_path, transform=transform).mean()) == -2


def test_inputs_of_an_exported_module() -> None:
    class Net(nn.Module):
        def forward(self, input: Tensor, *, indices: Tensor) -> Tensor:
            return input[:, 0] + indices

    size = torch.export.Dim("size")
    shapes = {"input": {0: size}, "indices": {0: size}}
    given = {"indices": torch.zeros(5, dtype=torch.int64)}
    module = torch.export.export(Net(), (torch.zeros(5, 2),), given, dynamic_shapes=shapes).module()
    found = forms_of(module)
    assert [one.path for one in found] == [("input",), ("indices",)]
    expected = [form(None, 2, name="input"), form(None, name="indices", dtype=torch.int64)]
    assert [(one.name, one.sizes, one.dtype) for one in found] == [(one.name, one.sizes, one.dtype) for one in expected]
    assert [str(one) for one in forms_of(module)] == ["torch.float32 (any, 2)", "torch.int64 (any,)"]


# ------------------------------------------------------------------------------------------------------ rejected data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "must be an iterable"),
        ({"image": images()}, "must be an iterable"),
        ("/nowhere", "'/nowhere' does not exist"),
        (
            [images(2)],
            r"Item 0 of the data is \(torch.float32 \(2, 3, 8, 8\)\); the model takes \(torch.float32 \(1",
        ),
        ([images(), images().double()], r"Item 1 of the data is .*\. Convert them to float32"),
        ([images().to(torch.uint8)], r"Scale bytes as for the training.*tensor\.float\(\) / 255"),
        ([images().to(torch.complex64)], r"takes real numbers: give tensor\.real or tensor\.abs"),
        ([images().numpy().astype(">f4")], "A numpy array of the inputs cannot be converted to a tensor"),
        ([images(), "three"], r"Item 1 of the data is \('three'\)"),
        ([images() / 0], "Item 0 of the data contains NaN or infinite"),
        (images(3)[:, :2], "Item 0 of the data is"),
        (torch.tensor(3.0), "Item 0 of the data is"),
        ([[*images(4)]], r"Item 0 of the data is a list of 4 samples.*Stream\("),
        ([[(x,) for x in images(3)]], r"Item 0 of the data is a list of 3 samples.*Stream\("),
        ([tuple((x,) for x in images(3))], r"Item 0 of the data is a tuple of 3 samples.*Stream\("),
        (DataLoader(TensorDataset(images(4)[:, :2])), "Item 0 of the data is"),
    ],
)
def test_data_of_other_forms_are_refused(data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(inputs_in(data, FORM))
    with pytest.raises(CalibrationError, match=message):
        calibration_inputs(data, FORM)


LONGER = "pad or cut the data to it. For sequences of any length, .* as a Stream"


@pytest.mark.parametrize(
    ("shape", "is_advised"),
    [((1, 9, 4), True), ((1, 3, 4), True), ((1, 6, 5), True), ((2, 6, 4), False), ((6,), False)],
)
def test_sequences_of_another_length_are_refused_with_advice(shape: tuple[int, ...], is_advised: bool) -> None:
    class Sequences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.GRU(4, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)[0]  # type: ignore[no-any-return]

    module = torch.export.export(Sequences().eval(), (torch.zeros(1, 6, 4),)).module()
    prepared = prepare_pt2e(module, NeutronQuantizer())
    with pytest.raises(InputError) as documented:
        prepared(torch.zeros(shape))
    with pytest.raises(CalibrationError) as calibrated:
        quantize(Sequences().eval(), torch.zeros(1, 6, 4), [torch.zeros(shape)], progress=False)
    for error in (documented, calibrated):
        assert bool(re.search(LONGER, str(error.value))) == is_advised


@pytest.mark.parametrize("recover", [None, "fast", "auto"])
def test_streams_of_any_lengths_calibrate_a_model_of_one_step(recover: str | None) -> None:
    class Step(nn.Module):
        h: Tensor
        c: Tensor

        def __init__(self, cell: nn.LSTMCell) -> None:
            super().__init__()
            self.cell = cell
            self.register_buffer("h", torch.zeros(1, cell.hidden_size))
            self.register_buffer("c", torch.zeros(1, cell.hidden_size))

        def forward(self, frame: Tensor) -> Tensor:
            h, c = self.cell(frame, (self.h, self.c))
            self.h.copy_(h)
            self.c.copy_(c)
            return h  # type: ignore[no-any-return]

    torch.manual_seed(0)
    cell = nn.LSTMCell(4, 6).eval()
    recordings = [torch.randn(length, 4) for length in (5, 12, 9, 3, 7, 6, 11)]
    streams = [Stream(list(recording[:, None])) for recording in recordings]
    quantized = quantize(Step(cell).eval(), recordings[0][:1], streams, recover=recover, progress=False)
    found, wanted = [], []
    for recording in recordings:
        state = None
        quantized.reset()
        for frame in recording[:, None]:
            with torch.no_grad():
                state = cell(frame, state)
            wanted.append(state[0])
            found.append(quantized(frame))
    error = torch.cat(found) - torch.cat(wanted)
    assert error.square().mean() < 0.003 * torch.cat(wanted).square().mean()


@pytest.mark.parametrize("data", [[], iter(()), images(0)], ids=["list", "iterator", "tensor"])
def test_nothing_to_calibrate_with(data: Any) -> None:
    with pytest.raises(CalibrationError, match="are empty"):
        calibration_inputs(data, FORM)


def test_a_transform_that_cannot_be_called() -> None:
    with pytest.raises(OptionError, match="transform must be a function"):
        list(inputs_in(images(2), FORM, transform=3))  # type: ignore[arg-type]


def test_a_module_that_takes_a_number() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, factor: int) -> Tensor:
            return x * factor

    forms = forms_of(torch.export.export(Scaled(), (torch.ones(1, 2), 3)).module())
    assert [str(one) for one in forms] == ["torch.float32 (1, 2)", "3"]
    x = torch.randn(1, 2)
    for item in (x, (x, 3), {"x": x, "factor": 3}, {"x": x}, x.numpy(), ((x, 3), "label")):
        assert [values[1] for values in inputs_in([item], forms)] == [3]
        assert all(torch.equal(values[0], x) for values in inputs_in([item], forms))
    with pytest.raises(InputError, match=r"Item 0 of the data is .*, 4\); the model takes .*, 3\)"):
        list(inputs_in([(x, 4)], forms))


def test_too_few_inputs() -> None:
    with pytest.raises(InputError, match=r"is \(torch.float32 \(1, 2\)\); the model takes \(torch.float32 \(1, 2\), "):
        list(inputs_in([torch.ones(1, 2)], PAIR))


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    def refuses(message: str, forms: list[InputForm] = FORM) -> None:
        with pytest.raises(InputError, match=message):
            list(inputs_in(tmp_path, forms))

    refuses(r"has no file of a known type \(.*\.bmp")
    (tmp_path / "a.png").write_bytes(b"no image")
    refuses(r"a\.png cannot be read as an image")
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    for other in (form(1, 2, 8, 8), form(1, 3), form(1, 3, None, 8)):
        refuses(r"not an image of 1 or 3 channels\. Give a transform", [other])
    refuses("takes several", FORM * 2)
    (tmp_path / "0.npy").write_bytes(b"no array")
    refuses(r"0\.npy cannot be read as an array")


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match="Reading images needs Pillow"):
        list(inputs_in(tmp_path, FORM))


# ------------------------------------------------------------------------------------- equal results in all functions


def network() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, image in enumerate(images(6)):
        np.save(tmp_path / f"{index}.npy", image.numpy())
    return tmp_path


@pytest.mark.parametrize("form_of_data", ["folder", "data set", "loader", "tensor", "mappings"])
def test_analyze_takes_all_forms_of_calibration_data(form_of_data: str, folder: Path) -> None:
    forms: dict[str, Any] = {
        "folder": folder,
        "data set": TensorDataset(images(6), torch.arange(6)),
        "loader": DataLoader(TensorDataset(images(6), torch.arange(6)), batch_size=4),
        "tensor": images(6),
        "mappings": [{"input": image} for image in images(6)],
    }
    data = forms[form_of_data]
    quantized = quantize(network(), (images(),), data)
    expected = quantize(network(), (images(),), [image[None] for image in images(6)])
    assert torch.equal(quantized.module(images(seed=1)), expected.module(images(seed=1)))
    doubling: dict[str, Any] = {"transform": lambda item: 2 * item} if form_of_data == "folder" else {}
    inputs = [image[None] * (2 if doubling else 1) for image in images(6)]
    assert analyze(None, quantized, data, **doubling).layers == analyze(None, quantized, inputs).layers
    program = lower(quantized)
    comparison = compare_layers(quantized, program, data, **doubling)
    assert comparison == compare_layers(quantized, program, inputs)
    assert comparison.samples == 4


def test_items_of_an_object_that_is_not_iterable() -> None:
    with pytest.raises(InputError, match="must be an iterable of inputs"):
        items_of(None)  # type: ignore[arg-type]
