"""`openneutron validate --against`: a board's outputs against a program, a package, and the exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from docs.generators.schemas import SCHEMAS
from tests.verbs import call_verb
from torch import nn

from openneutron import load, lower, quantize

VECTORS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a program, and the package of the same program."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()).eval()
    data = [torch.randn(1, 3, 7, 7) for _ in range(VECTORS)]
    folder = tmp_path_factory.mktemp("board")
    lower(quantize(model, (data[0],), data, recover=None), int8_io=True).save(folder / "net.pte")
    host = load(folder / "net.pte")
    np.save(folder / "samples.npy", torch.cat(data).numpy())
    package = folder / "package"
    package.mkdir()
    (package / "net.pte").write_bytes((folder / "net.pte").read_bytes())
    rows = [host.inputs[0].quantize(value) for value in data]
    parts = [value.numpy().tobytes() for codes in rows for value in (codes, host.run(codes))]
    (package / "test_vectors.bin").write_bytes(b"".join(part + bytes(-len(part) % 16) for part in parts))
    manifest = {"name": "net", "payload": "portable", "vectors": VECTORS, "tolerance_lsb": 2.0}
    (package / "manifest.json").write_text(json.dumps(manifest))
    outputs = [host.run(codes).numpy() for codes in rows]
    (folder / "right.bin").write_bytes(b"".join(value.tobytes() for value in outputs))
    (folder / "uint8.bin").write_bytes(b"".join((value.view(np.uint8) ^ 0x80).tobytes() for value in outputs))
    near = [np.minimum(value.astype(int) + 2, 127).astype(np.int8) for value in outputs]
    (folder / "near.bin").write_bytes(b"".join(value.tobytes() for value in near))
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> Any:
    monkeypatch.chdir(folder)
    return lambda *arguments: call_verb(monkeypatch, capsys, *arguments)


def test_right_outputs(run: Any) -> None:
    code, text = run("validate", "net.pte", "--against", "right.bin", "--calibrate", "samples.npy")
    assert code == 0
    assert "3 vectors agree" in text


def test_mistake_fails_and_is_named(run: Any) -> None:
    code, text = run("validate", "net.pte", "--against", "uint8.bin", "--calibrate", "samples.npy", "--json")
    found, _ = json.JSONDecoder().raw_decode(text)
    jsonschema.validate(found, SCHEMAS["validate --against"])
    assert code == 1
    assert not found["passed"]
    assert [one["mistake"] for one in found["diagnoses"]] == ["uint8 for int8"]
    assert found["outputs"][0]["wrong"] > 0


def test_package_gives_the_vectors_and_the_limit(run: Any) -> None:
    assert run("validate", "package", "--against", "near.bin")[0] == 0
    code, text = run("validate", "package", "--against", "near.bin", "--max-lsb", "1")
    assert code == 1
    assert "limit 1 LSB" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"payload": "device"}, "which this machine cannot run"),
        ({"name": 3}, "the name of the program is not an identifier"),
        ({"vectors": 9}, "9 vectors of the program take"),
        ({"tolerance_lsb": None}, "no tolerance"),
    ],
)
def test_damaged_package(run: Any, folder: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    manifest = json.loads((folder / "package" / "manifest.json").read_text())
    for name in ("net.pte", "test_vectors.bin"):
        (tmp_path / name).write_bytes((folder / "package" / name).read_bytes())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | change))
    code, text = run("validate", str(tmp_path), "--against", "right.bin")
    assert code == 2
    assert message in " ".join(text.split())


def test_limits_of_the_other_comparison(run: Any) -> None:
    code, text = run("validate", "net.pte", "--against", "right.bin", "--min-sqnr", "30")
    assert code == 2
    assert "Leave one out" in " ".join(text.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "package"),
        ("run", "package", "samples.npy"),
        ("extract", "package", "-o", "models"),
        ("report", "package", "-o", "page.html"),
        ("compare", "package", "net.pte"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_verbs_that_read_a_program_take_a_package(arguments: tuple[str, ...], run: Any) -> None:
    code, text = run(*arguments, "--quiet")
    assert code == 0, text
