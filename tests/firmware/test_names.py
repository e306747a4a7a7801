"""The names of inputs and outputs in the headers of a package, for names that are not ASCII."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from openneutron import load, lower, quantize
from openneutron.accuracy.board_tensors import board_inputs, board_outputs
from openneutron.firmware.config import c_string

NAMES = ["image", "größe", "画像", "音声", 'a"b\\n', "what??/", "tab\t", "a.*/b", "é1", "é9"]
compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs cc")


def printed(folder: Path, includes: str, texts: list[str]) -> bytes:
    """Returns what a C program prints that writes each of the expressions `texts` and a zero byte."""
    lines = "".join(f"fwrite({text}, 1, sizeof({text}), stdout);\n" for text in texts)
    (folder / "names.c").write_text(f"{includes}#include <stdio.h>\nint main(void) {{\n{lines}return 0;\n}}\n")
    command = ("cc", "-std=c11", "-Wall", "-Wextra", "-pedantic", "-Werror", "-I.", "names.c", "-o", "names")
    subprocess.run(command, cwd=folder, check=True, timeout=60)
    return subprocess.run([folder / "names"], check=True, capture_output=True, timeout=60).stdout


@compiler
def test_strings_of_c_hold_any_name(tmp_path: Path) -> None:
    literals = [c_string(name) for name in NAMES]
    assert all(text.isascii() and text.isprintable() for text in literals)
    assert printed(tmp_path, "", literals).decode().split("\0") == [*NAMES, ""]


class Media(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, 画像: Tensor, 音声: Tensor) -> dict[str, Tensor]:  # noqa: N803, PLC2401
        return {"größe": self.layer(画像).relu(), "合計": self.layer(画像) + self.layer(音声)}


@compiler
def test_names_of_a_package(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = [(torch.randn(1, 8), torch.randn(1, 8)) for _ in range(3)]
    program = lower(quantize(Media().eval(), data[0], data, recover=None, progress=False))
    folder = tmp_path / "package"
    program.package(folder, vectors=2)
    host = load(program.buffer)
    names = [*host.input_names(), *host.output_names()]
    assert names == ["画像", "音声", "größe", "合計"]
    macros = [f"MODEL_{kind}_{index}_NAME" for kind in ("INPUT", "OUTPUT") for index in range(2)]
    assert printed(folder, '#include "model_config.h"\n', macros).decode().split("\0") == [*names, ""]
    header = (folder / "model_config.h").read_text(encoding="utf-8")
    assert all(f"'{name}': float32 1x" in header for name in names)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [one["name"] for kind in ("inputs", "outputs") for one in manifest[kind]] == names
    assert [one.name for one in (*board_inputs(host), *board_outputs(host))] == names
    values = [*data[0], *host.run(*data[0])]
    arrays: dict[str, Any] = {name: value.numpy()[None] for name, value in zip(names, values, strict=True)}
    np.savez(tmp_path / "vectors.npz", **arrays)
    program.package(tmp_path / "again", vectors=tmp_path / "vectors.npz")
