"""The text that a verb prints and its JSON have the same facts: each number and name of the text is in the JSON."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.cli.builds import MODEL, Here
from torch import Tensor, nn

from openneutron import lower, quantize

VERBS: tuple[tuple[str, ...], ...] = (
    ("build", *MODEL, "--calibrate", "photos", "--evaluate", "labelled", "-o", "{tmp}/out"),
    ("build", *MODEL, "--calibrate", "photos", "--target", "frdm_mcxn947", "-o", "{tmp}/out"),
    ("quantize", *MODEL, "--calibrate", "photos", "-o", "{tmp}/q.pt2"),
    ("quantize", *MODEL, "--calibrate", "photos", "--recover", "none", "-o", "{tmp}/q.pt2"),
    ("lower", "out", "-o", "{tmp}/m.pte"),
    ("lower", "out", "--operators-not-to-delegate", "aten::linear", "-o", "{tmp}/m.pte"),
    ("analyze", "--config", "out/openneutron.toml"),
    ("run", "out", "labelled/left/000.png", "--repeat", "2"),
    ("run", "out", "labelled/left/000.png", "--labels", "{tmp}/labels.txt"),
    ("evaluate", "out"),
    ("evaluate", "out", "--metric", "net.py:metric"),
    ("validate", "out"),
    ("validate", "out", "--min-sqnr", "90", "--max-lsb", "0"),
    ("report", "out", "-o", "{tmp}/report.html", "--csv", "{tmp}/layers.csv"),
    ("compare", "out", "out"),
    ("compare", "out", "{tmp}/other.pte"),
    ("inspect", "out"),
    ("inspect", "out", "--layers", "--target", "frdm_mcxn947"),
    ("operators", "log_softmax"),
    ("targets",),
    ("targets", "show", "imx95"),
    ("targets", "show", "frdm_mcxn947"),
    ("package", "out", "-o", "{tmp}/firmware"),
    ("extract", "out", "-o", "{tmp}/extracted"),
    ("init", "{tmp}/openneutron.toml"),
    ("doctor",),
)
NO_FACTS = r"95 %|add up to 100 %|[\d.]+ ms on this machine|[\d,]+ left"
"""Texts with numbers that are no facts, that differ from run to run, or that are differences of two other numbers."""
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?: [KMG]iB| ms| MHz)?")
_UNITS = {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "ms": 1e-3, "MHz": 1e6}


def leaves(value: Any) -> Iterator[Any]:
    """Yields the texts and numbers of a document, the lengths of its lists, and how often a key has a value there."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield name
            yield from leaves(one)
    elif isinstance(value, list):
        yield len(value)
        rows = [tuple(sorted(row.items())) for row in value if isinstance(row, dict)]
        yield from Counter(pair for row in rows for pair in row if isinstance(pair[1], (str, bool, int))).values()
        for one in value:
            yield from leaves(one)
    elif value is not None:
        yield value


def missing_numbers(text: str, document: Any) -> list[str]:
    """Returns the numbers of a text that a document has neither as a number, rounded as in the text, nor in a text."""
    found = list(leaves(document))
    texts = sorted({one for one in found if isinstance(one, str)}, key=len, reverse=True)
    for one in texts:
        if re.search(r"\d", one):
            text = text.replace(one, " ")
    text = re.sub(NO_FACTS, " ", text)
    numbers = [float(one) for one in found if isinstance(one, (int, float)) and not isinstance(one, bool)]
    numbers += [float(hertz) / 1e6 for hertz in re.findall(r'"clock_hz": (\d+)', json.dumps(document))]  # column in MHz
    if cycles := document.get("cycles"):  # shares of all cycles
        numbers += [one / cycles for one in numbers]
    return [shown[0] for shown in _NUMBER.finditer(text) if not any(is_shown(shown[0], one) for one in numbers)]


def is_shown(text: str, number: float) -> bool:
    """Whether `text` shows a number, or a share in percent, rounded to the digits of the text."""
    digits, _, unit = text.partition(" ")
    value = float(digits.replace(",", "")) * _UNITS.get(unit, 1)
    mantissa = digits.partition("e")[0]
    places = len(mantissa.partition(".")[2])
    exponent = int(digits.partition("e")[2] or 0)
    step = 10.0 ** (exponent - places) * _UNITS.get(unit, 1)
    if unit == "ms":  # milliseconds or seconds
        number = min((number, number / 1000), key=lambda one: abs(one - value))
    is_rounded = places or exponent or unit or not number.is_integer()
    return value == number or any(is_rounded and abs(value - one) <= 0.5001 * step for one in (number, 100 * number))


@pytest.mark.parametrize(
    ("text", "document", "missing"),
    [
        ("1,024 bytes, 81.57 %", {"bytes": 1024, "value": 81.566}, []),
        ("0.25 %, 3 of 4, 1.5 ms", {"share": 0.0025, "rows": [{"on": True}] * 3 + [{"on": False}], "s": 0.0015}, []),
        ("in 2 delegates", {"name": "conv2d_2"}, ["2"]),
        ("conv2d_2 1x3 416 KiB", {"name": "conv2d_2", "bytes": 425984, "shape": "1x3"}, []),
        ("-1.2 dB", {"sqnr_db": -1.3}, ["-1.2"]),
    ],
)
def test_missing_numbers(text: str, document: Any, missing: list[str]) -> None:
    assert missing_numbers(text, document) == missing


@pytest.mark.slow
@pytest.mark.parametrize("arguments", VERBS, ids=lambda row: " ".join((row[0], *row[-3:])))
def test_the_numbers_of_the_text_are_in_the_json(
    here: Here, built: Path, tmp_path: Path, arguments: Sequence[str]
) -> None:
    folders = tmp_path / "text", tmp_path / "json"
    for folder in folders:
        folder.mkdir()
        (folder / "labels.txt").write_text("left\nright\n")
        if "{tmp}/other.pte" in arguments:
            here("lower", built, "--operators-not-to-delegate", "aten::linear", "-o", folder / "other.pte")
    printed, document = (
        here(*(one.format(tmp=folder) for one in arguments), *extra)
        for folder, extra in zip(folders, ((), ("--json",)), strict=True)
    )
    assert printed.code == document.code, printed.text
    assert document.code in (0, 1), document.text
    text = printed.out.replace(str(folders[0]), "FOLDER")
    assert missing_numbers(text, json.loads(document.out.replace(str(folders[1]), "FOLDER"))) == [], text


class WithConstants(nn.Module):
    """Has an argument of each type. torch.export writes the values of all but the first into the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x: Tensor, options: Mapping[str, Any]) -> Tensor:
        result: Tensor = self.layer(x) * options["scale"]
        return result.clamp(max=options["most"]) if options["mode"] == "fast" else -result


CONSTANTS: dict[str, tuple[Any, str, Any, str]] = {
    "mode": ("fast", "str", "fast", "'fast'"),
    "empty": ("", "str", "", "''"),
    "scale": (0.5, "float", 0.5, "0.5"),
    "most": (math.inf, "float", "inf", "inf"),
    "least": (-math.inf, "float", "-inf", "-inf"),
    "flag": (True, "bool", True, "True"),
    "count": (3, "int", 3, "3"),
    "nothing": (None, "none", None, "None"),
}
"""The value of each constant, its dtype and its value in JSON, and its text."""
INPUTS = [
    {"name": "x", "dtype": "float32", "shape": [1, 16], "value": None},
    *(
        {"name": f"options.{name}", "dtype": dtype, "shape": [], "value": value}
        for name, (_, dtype, value, _) in CONSTANTS.items()
    ),
]
TEXTS = ["  in  x: float32 (1, 16)", *(f"  in  options.{name}: {row[3]}" for name, row in CONSTANTS.items())]


@pytest.mark.slow
def test_verbs_show_constants_alike(here: Here, tmp_path: Path) -> None:
    arguments = (torch.ones(1, 16), {name: row[0] for name, row in CONSTANTS.items()})
    torch.export.save(torch.export.export(WithConstants().eval(), arguments), tmp_path / "net.pt2")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32))
    quantizing = ("quantize", tmp_path / "net.pt2", "--calibrate", tmp_path / "x.npy", "-o", tmp_path / "q.pt2")
    lowering = ("lower", tmp_path / "q.pt2", "-o", tmp_path / "m.pte")
    for verb in (quantizing, lowering):
        assert here(*verb, "--json").json["inputs"] == INPUTS
        assert [line for line in here(*verb).out.splitlines() if line.startswith("  in")] == TEXTS


def test_results_show_constants_alike() -> None:
    arguments = (torch.ones(1, 16), {name: row[0] for name, row in CONSTANTS.items()})
    quantized = quantize(WithConstants().eval(), arguments, [arguments], recover=None, progress=False)
    for result in (quantized, lower(quantized)):
        assert json.loads(json.dumps(result.as_dict(), allow_nan=False))["inputs"] == INPUTS
        assert [line for line in str(result).splitlines() if line.startswith("  in")] == TEXTS
        rows = [value for name, value in result.as_table().rows if name == "input"]
        assert rows == [line.removeprefix("  in  ") for line in TEXTS]
