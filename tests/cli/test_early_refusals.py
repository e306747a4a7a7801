"""Wrong values of options are refused before the first long step: most of them before torch is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.builds import MODEL, Here

BUILD = ("build", *MODEL, "--calibrate", "photos", "-o", "refused")
WITHOUT_TORCH: tuple[tuple[tuple[str, ...], str], ...] = (
    ((*BUILD, "--args", "width="), "args takes literals"),
    ((*BUILD, "--weights", "none.pt"), "'none.pt' does not exist"),
    ((*BUILD, "--input", "1,b"), "An input is a shape"),
    ((*BUILD, "--calibration-samples", "0"), "a number of 1 or more"),
    ((*BUILD, "--evaluate", "labeled"), "Did you mean 'labelled'"),
    ((*BUILD, "--labels", "none.txt"), "'none.txt' does not exist"),
    ((*BUILD, "--metric", "net.py:metrik"), "Did you mean 'metric'"),
    ((*BUILD, "--crop", "0"), "crop must be a positive integer"),
    ((*BUILD, "--scale", "0"), "scale must be a positive number"),
    ((*BUILD, "--std", "0"), "std must be positive"),
    ((*BUILD, "--channels", "gray"), "Did you mean 'grey'"),
    ((*BUILD, "--recovery-seconds=-1"), "a number of 0 or more"),
    ((*BUILD, "--layers", "head=flaot"), "Did you mean 'float'"),
    ((*BUILD, "--weight-bits", "9"), "from 2 to 8"),
    ((*BUILD, "--jobs", "0"), "a number of 1 or more"),
    ((*BUILD, "--flavor", "SDK_1"), "neither an SDK release"),
    ((*BUILD, "--payload", "devic"), "Did you mean 'device'"),
    ((*BUILD, "--operators-not-to-delegate", "aten::relu,aten::add"), "takes operator or node names"),
    ((*BUILD, "--extra-flags", "fast"), "extra_flags takes 'name=value'"),
    ((*BUILD, "--intermediates-dir", "none"), "'none' does not exist"),
    ((*BUILD, "--target", "imxrt7"), "Did you mean 'imxrt700'"),
    ((*BUILD, "--date", "1.1.2026"), "YYYY-MM-DD"),
    ((*BUILD, "--calibrate", "random", "--evaluate", "labelled"), "leave out --evaluate"),
    (("quantize", *MODEL, "--calibrate", "random", "-o", "m.pt2"), "only for `openneutron build`"),
    (("analyze", "--model", *MODEL, "--calibrate", "random"), "only for `openneutron build`"),
    (("quantize", *MODEL, "--calibrate", "photos", "-o", "none/m.pt2"), "folder 'none' does not exist"),
    (("lower", "out", "--extra-flags", "fast"), "extra_flags takes 'name=value'"),
    (("lower", "out", "--operators-not-to-delegate", " "), "takes operator or node names"),
    (("lower", "out", "--intermediates-dir", "none"), "'none' does not exist"),
    (("analyze", "--calibrate", "photos", "--quantized", "w.pt"), "is not a quantized model"),
    (("run", "out", "none.png"), "'none.png' does not exist"),
    (("run", "out", "photos", "-o", "x.txt"), ".npy or a .npz file"),
    (("evaluate", "out", "--evaluate", "labelled", "--metric", "top3"), "Did you mean 'top5'"),
    (("validate", "out", "--against", "none"), "'none' does not exist"),
    (("validate", "out", "--against", "w.pt", "--min-sqnr", "3"), "Leave one out"),
    (("package", "out", "--tolerance=-1"), "a number of 0 or more"),
    (("package", "out", "--vectors", "0"), "not a valid number of test vectors"),
    (("profile", "net.py", "--program", "out", "-o", "none/x.html"), "folder 'none' does not exist"),
    (("report", "out", "--quantized", "out/quantized.pt2"), "Give both"),
    (("compare", "out", "none"), "'none' does not exist"),
    (("inspect", "out", "--target", "imx"), "Unknown target"),
    (("compile", "out", "-o", "x.pte", "--flavor", "SDK_9"), "neither an SDK release"),
    (("extract", "out", "-o", "x", "--quantized", "w.pt"), "is not a quantized model"),
    (("operators", "--flavor", "SDK_1"), "neither an SDK release"),
    (("doctor", "--target", "imx"), "Unknown target"),
    (("targets", "show", "frdm_mcxn947", "-o", "board.txt"), "ends in .toml"),
    (("fit-costs", "net.py", "--program", "out", "-o", "board.txt"), "ends in .toml"),
)
BEFORE_CALIBRATION: tuple[tuple[tuple[str, ...], str], ...] = (
    (("--operators-not-to-delegate", "aten::conv2"), "Near matches: aten::conv2d"),
    (("--operators-not-to-delegate", "head"), "use keep_float for a module"),
    (("--operators-not-to-delegate", "body.0"), "use keep_float for a module"),
    (("--keep-float", "hed"), "Near matches: head"),
    (("--layers", "body.1.x=float"), "matches no module"),
    (("--wide", "hed"), "matches no module"),
)
_ALL = """
import contextlib, io, json, sys
from openneutron.cli import main

found = []
for arguments in json.load(sys.stdin):
    err = io.StringIO()
    code = None
    with contextlib.redirect_stdout(err), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as end:
            code = end.code
    found.append((code, " ".join(err.getvalue().split()), "torch" in sys.modules))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def refusals(work: Path, built: Path) -> list[tuple[int, str, bool]]:
    """The exit code and the message of each row of `WITHOUT_TORCH`, and whether torch was imported then."""
    given = json.dumps([arguments for arguments, _ in WITHOUT_TORCH])
    environment = {**os.environ, "COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, "-c", _ALL], cwd=work, env=environment, input=given, capture_output=True, text=True, check=True
    )
    found: list[tuple[int, str, bool]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("row", range(len(WITHOUT_TORCH)), ids=lambda row: " ".join(WITHOUT_TORCH[row][0][-2:]))
def test_wrong_values_are_refused_without_torch(refusals: list[tuple[int, str, bool]], row: int) -> None:
    code, message, has_torch = refusals[row]
    assert code == 2, message
    assert WITHOUT_TORCH[row][1] in message
    assert not has_torch


@pytest.mark.parametrize(("options", "message"), BEFORE_CALIBRATION)
def test_names_are_checked_before_calibration(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    def calibrated(*_: object) -> None:
        raise AssertionError("the model is quantized")

    monkeypatch.setattr("openneutron.flow.quantize_by_recipe", calibrated)
    result = here("build", *MODEL, "--calibrate", "photos", "-o", tmp_path / "out", *options)
    assert result.code == 2, result.text
    assert message in result.err
