"""A package without its native module: functions that work, and errors that name the package to install."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from openneutron.errors import NativeModuleError
from openneutron.runtime import native

HIDDEN = """
import sys
sys.modules["openneutron.runtime._host"] = None  # Python then raises ModuleNotFoundError for it
"""
WALK = """
import sys, torch
from openneutron import inspect, load, lower, quantize
from openneutron.accuracy import analyze, evaluate
from openneutron.accuracy.compare import compare_layers
from openneutron.errors import HostError, NativeModuleError

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 4))
model.eval()
images = [torch.randn(1, 3, 8, 8) for _ in range(4)]
quantized = quantize(model, images[0], images)
program = lower(quantized, int8_io=True)
program.save(sys.argv[1])
loaded = load(sys.argv[1])
assert loaded.inputs == program.inputs and loaded.outputs == program.outputs
assert program.inputs[0].quantize(images[0]).dtype == torch.int8
assert all(row.where == "npu" for row in program.placement)
assert inspect(sys.argv[1], "imxrt700").estimate.cycles == program.estimate().cycles > 0
assert analyze(model, quantized, images).output_sqnr_db > 20
pairs = [(image, 0) for image in images]
assert 0 <= evaluate(quantized, pairs) <= 100
print(program, quantized)

inputs = program.inputs[0].quantize(images[0])
for call in (
    lambda: program.run(inputs),
    lambda: program.reset(),
    lambda: loaded.run(inputs),
    lambda: evaluate(program, pairs),
    lambda: evaluate(sys.argv[1], pairs, jobs=2),
    lambda: compare_layers(quantized, program, images),
    lambda: analyze(model, quantized, images, program=program),
):
    try:
        call()
    except HostError as error:
        assert isinstance(error, NativeModuleError)
        print("refused:", error)
"""
REFUSED_CALLS = 7


def test_all_but_running_works_without_the_native_module(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HIDDEN + WALK, str(tmp_path / "model.pte")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refused = [line for line in done.stdout.splitlines() if line.startswith("refused:")]
    assert len(refused) == REFUSED_CALLS
    assert all("Install a wheel for your platform" in line for line in refused)
    assert all("OPENNEUTRON_NATIVE=1 pip install" in line for line in refused)


def test_a_native_module_that_cannot_be_loaded_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError(f"libexecutorch.so: cannot open shared object file, needed by {name}")

    monkeypatch.setattr(native, "_import_module", native._import_module.__wrapped__)
    monkeypatch.setattr(importlib, "import_module", refuse)
    assert not native.is_installed()
    with pytest.raises(NativeModuleError, match="cannot open shared object file"):
        native.native_module()
