"""A folder with a model and data for tests of verbs, and the verbs as processes or in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from docs.generators.schemas import SCHEMAS
from torch import nn

Image = pytest.importorskip("PIL.Image")
__all__ = ["MODEL", "NAMES", "SOURCE", "Here", "Result", "images", "run", "train"]

SOURCE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(width * 16, 2)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))

def metric(outputs, label):
    return 100.0 * float(outputs.argmax() == label)
"""
NAMES = ("left", "right")


class Result:
    """The exit code and the output of a process."""

    def __init__(self, verb: str, done: subprocess.CompletedProcess[str]) -> None:
        self.verb, self.code, self.out, self.err = verb, done.returncode, done.stdout, done.stderr
        self.text = self.out + self.err

    @property
    def json(self) -> Any:
        """The one document on stdout, which follows the schema of the verb."""
        found = json.loads(self.out)
        if self.verb in SCHEMAS:
            jsonschema.validate(found, SCHEMAS[self.verb])
        return found


Here = Callable[..., Result]


def run(folder: Path, *arguments: object) -> Result:
    command = [sys.executable, "-m", "openneutron", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    result = Result(str(arguments[0]), done)
    assert "Traceback" not in result.text
    return result


def images(folder: Path, count: int, seed: int) -> None:
    """Writes images that are bright on the side that their folder names."""
    numbers = np.random.default_rng(seed)
    for side, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = numbers.integers(0, 120, (8, 8))
            pixels[:, 4 * side : 4 * side + 4] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index:03}.png")


def train(folder: Path) -> None:
    namespace: dict[str, Any] = {}
    exec(SOURCE, namespace)
    torch.manual_seed(0)
    module: nn.Module = namespace["Net"]()
    numbers = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (256,), generator=numbers)
    x = torch.rand(256, 1, 8, 8, generator=numbers) * 0.47
    x[labels == 0, :, :, :4] += 0.39
    x[labels == 1, :, :, 4:] += 0.39
    optimizer = torch.optim.Adam(module.parameters(), 0.02)
    for _ in range(30):
        loss: Any = nn.functional.cross_entropy(module((x - 0.4) / 0.2), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in module.state_dict().items()}}, folder / "w.pt"
    )


MODEL = ("net.py:Net", "--weights", "w.pt", "--input", "1,1,8,8", "--mean", "0.4", "--std", "0.2")
