"""Models, arguments, shapes and weights that a command names wrongly."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.cli.builds import Here, images
from torch import nn

import openneutron
from openneutron.accuracy.evaluate import check_classes
from openneutron.errors import InputError
from openneutron.model import loading

DATA = ("--calibrate", "photos")
WRONG_MODELS = [
    (("net.py", *DATA), "names a file, but no object in it. Give 'net.py:NAME'. The file defines Net, metric."),
    (("photos", *DATA), "The model 'photos' must have the form 'file.py:name' or 'package.module:name'."),
    (("fold.er", *DATA), "The model 'fold.er' is a folder. Give file.py:name"),
    (("model.pte", *DATA), "'model.pte' is not a model. It is a program already. Give the model that it was made of"),
    (("w.safetensors", *DATA), "It contains weights and no model. Give the model as file.py:name"),
    (("a.npy", *DATA), "'a.npy' is not a model. Give file.py:name of a class or function"),
    (("net.py:Net", "--args", "width=", *DATA), 'args takes literals of Python, such as "width=16'),
    (("net.py:Net", "--args", "__import__('os')", *DATA), "args takes literals of Python"),
    (("net.py:Net", *DATA, "--jobs", "0"), "'jobs' is a number from 1 to 1024, not 0."),
    (("net.py:Net", *DATA, "--batch-size", "-2"), "'batch_size' is a number of 1 or more, not -2."),
    (("net.py:Net", *DATA, "--calibration-samples", "0"), "'calibration_samples' is a number of 1 or more, not 0."),
    (("net.py:Net", *DATA, "--evaluation-samples", "0"), "'evaluation_samples' is a number of 1 or more, not 0."),
    (("net.py:Net", *DATA, "--weight-bits", "9"), "'weight_bits' is a number from 2 to 8, not 9."),
    (("net.py:Net", *DATA, "--recovery-seconds", "-1"), "'recovery_seconds' is a number of 0 or more, not -1.0."),
    (("net.py:Net", *DATA, "-o", "w.pt"), "Cannot create the folder 'w.pt': there is a file of this name."),
    (("net.py:Net", *DATA, "-o", "net.py/out"), "Cannot create the folder 'net.py/out': 'net.py' is a file."),
    (("net.py:Net", "--input", "0,1,8,8", *DATA), "sizes of an input are at least 1, but '0,1,8,8' has a 0"),
]
WITHOUT_TORCH = """
import contextlib, io, sys
from openneutron.cli import main
for arguments in {calls}:
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        main(["build", *arguments])
    print(err.getvalue(), "=" * 9)
print("torch" in sys.modules)
"""


def test_wrong_models_are_refused_without_torch(work: Path) -> None:
    (work / "fold.er").mkdir(exist_ok=True)
    for name in ("model.pte", "w.safetensors", "a.npy"):
        (work / name).touch()
    code = WITHOUT_TORCH.format(calls=[list(arguments) for arguments, _ in WRONG_MODELS])
    source = str(Path(openneutron.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=True)
    *answers, imports_torch = done.stdout.split("=" * 9)
    assert imports_torch.strip() == "False"
    for (arguments, message), answer in zip(WRONG_MODELS, answers, strict=True):
        assert message in answer, arguments


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_missing_package_of_models_is_refused(here: Here, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.delitem(sys.modules, library, raising=False)
    result = here("build", f"{library}:resnet18", *DATA)
    assert result.code == 2
    assert f"{library}:resnet18 needs the package {library}: pip install {library}." in result.err


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_package_of_models_for_another_torch(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{library}.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, library, raising=False)
    with pytest.raises(
        InputError, match=f"its import failed: RuntimeError: operator nms .* Install the release of {library}"
    ):
        loading.load_model(f"{library}:resnet18")


LAZY = """
from torch import nn

class Lazy(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(16, 8), nn.LazyLinear(4))
"""


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("verb", ["build", "quantize"])
def test_a_model_with_lazy_parameters_is_refused(
    here: Here, tmp_path: Path, caplog: pytest.LogCaptureFixture, verb: str, verbose: bool
) -> None:
    (tmp_path / "net.py").write_text(LAZY)
    np.save(tmp_path / "x.npy", np.zeros((4, 16), np.float32))
    output = tmp_path / ("out" if verb == "build" else "q.pt2")
    options = ("--input", "1,16", "--calibrate", tmp_path / "x.npy", "-o", output, *["-v"] * verbose)
    with caplog.at_level(logging.INFO):
        result = here(verb, f"{tmp_path / 'net.py'}:Lazy", *options)
    assert result.code == 2, result.text
    assert "'1.weight' has no shape yet, because its module is lazy. Call the model once" in result.err
    assert ("136 parameters" in caplog.text) == verbose
    assert not output.exists()


@pytest.mark.parametrize("shape", ["1,3,99999999999999,32", "9999999999999999999", "int64:1,99999999999999"])
def test_a_shape_that_does_not_fit_in_memory(here: Here, shape: str) -> None:
    result = here("build", "net.py:Net", "--input", shape, *DATA)
    assert result.code == 2, result.text
    assert "does not fit in memory. Give the shape that the model takes." in result.err


def test_torch_without_memory(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reports a lack of memory as a RuntimeError."""

    def large(*_: object) -> None:
        torch.empty(1 << 60)

    monkeypatch.setattr("openneutron.vendor.doctor.check_converter", large)
    result = here("doctor")
    assert result.code == 2, result.text
    assert "There is not enough memory. Use fewer processes" in result.err


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "EOFError"), (b"hello", "KeyError"), (b"PK\x03\x04broken", "Save the weights with torch.save")],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_file_of_weights(here: Here, tmp_path: Path, content: bytes, reason: str, suffix: str) -> None:
    file = tmp_path / f"damaged{suffix}"
    file.write_bytes(content)
    result = here("build", "net.py:Net", "--weights", file, "--input", "1,1,8,8", *DATA, "-o", tmp_path / "out")
    assert result.code == 2, result.text
    assert "is not a file of weights (" in result.err
    assert "Save the weights with torch.save(model.state_dict(), file) or as .safetensors." in result.err
    assert suffix != ".pt" or reason in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("left", "right", "up"), "The data name 3 classes, but the model's output has 2"),
        (("0", "7"), "The label 7 is not an index of the output, which has 2 classes."),
    ],
)
def test_classes_are_compared_before_the_first_step(
    here: Here, tmp_path: Path, folders: tuple[str, ...], message: str
) -> None:
    images(tmp_path / "images", 1, 0)
    for folder in folders:
        (tmp_path / "labelled" / folder).mkdir(parents=True)
        data = (tmp_path / "images/left/000.png").read_bytes()
        (tmp_path / "labelled" / folder / "0.png").write_bytes(data)
    data_of = ("--calibrate", "photos", "--evaluate", tmp_path / "labelled")
    result = here("build", "net.py:Net", "--input", "1,1,8,8", *data_of, "-o", tmp_path / "out")
    assert result.code == 2, result.text
    assert message in result.err
    assert "quantize:" not in result.err
    assert not (tmp_path / "out").exists()


class Counter(nn.Module):
    """Writes to a buffer in each call."""

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return x + self.count


def test_the_check_of_classes_keeps_the_state_of_the_model(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((4, 3), np.float32), label=np.array([0, 1, 2, 5]))
    model = Counter().eval()
    with pytest.raises(InputError, match="The label 5 is not an index of the output"):
        check_classes(model, (torch.zeros(1, 3),), tmp_path / "data.npz")
    assert float(model.count) == 0


class Failing(Counter):
    """Fails after a write to its buffer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        super().forward(x)
        raise ValueError("no such shape")


def test_the_check_of_classes_keeps_the_state_of_a_model_that_fails(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((4, 3), np.float32), label=np.array([0, 1, 2, 0]))
    model = Failing().eval()
    with pytest.raises(InputError, match=r"^The model does not run on the example inputs .*no such shape"):
        check_classes(model, (torch.zeros(1, 3),), tmp_path / "data.npz")
    assert float(model.count) == 0
