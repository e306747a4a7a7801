"""Wrong values of options are refused before the first long step: most of them before torch is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.builds import MODEL, Here

from openneutron.cli.main import in_long_form

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
    ((*BUILD, "--jobs", "0"), "a number from 1 to 1024"),
    ((*BUILD, "--flavor", "SDK_1"), "neither an SDK release"),
    ((*BUILD, "--payload", "devic"), "Did you mean 'device'"),
    ((*BUILD, "--operators-not-to-delegate", "aten::relu,aten::add"), "takes operator or node names"),
    ((*BUILD, "--extra-flags", "fast"), "extra_flags takes 'name=value'"),
    ((*BUILD, "--intermediates-dir", "none"), "'none' does not exist"),
    ((*BUILD, "--target", "imxrt7"), "Did you mean 'imxrt700'"),
    ((*BUILD, "--date", "1.1.2026"), "YYYY-MM-DD"),
    ((*BUILD, "--calibrate", "random", "--evaluate", "labelled"), "leave out --evaluate"),
    ((*BUILD, "--jobs", "1000000000"), "a number from 1 to 1024"),
    ((*BUILD, "--date="), "The value of --date is empty"),
    ((*BUILD, "--target", ""), "The value of --target is empty"),
    ((*BUILD, "--weights", "photos"), "'photos' is a folder. Give a file"),
    ((*BUILD, "--labels", "photos"), "'photos' is a folder. Give a file"),
    ((*BUILD, "--intermediates-dir", "net.py"), "'net.py' is not a folder. Give a folder"),
    ((*BUILD, "--config", "dangling"), "'dangling' does not exist. It is a link to 'nowhere'"),
    ((*BUILD, "--evaluate", "empty"), "no file of a known type"),
    (("build", "photos:Net", "--calibrate", "photos"), "a folder without __init__.py. Give file.py:name"),
    (("build", *MODEL, "--calibrate", "empty"), "no file of a known type"),
    (("build", *MODEL, "--calibrate", "photos", "-o", "photos"), "it is an input of this command. Give another folder"),
    (("build", *MODEL, "--calibrate", "photos", "-o", ""), "The value of -o is empty"),
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
    (("package", "out", "--vectors", "net.py"), "is not a .npz file"),
    (("package", "out", "--name", "1x"), "identifier of C"),
    (("package", "out", "--name", "int"), "keyword of C"),
    (("package", "out", "--section", 'a"b'), "printable ASCII characters"),
    (("package", "out", "--samples", "none.npy"), "'none.npy' does not exist"),
    (("package", "out", "--portable", "net.py"), "is not an ExecuTorch program"),
    (("package", "net.py"), "is not an ExecuTorch program"),
    (("validate", "out", "--min-sqnr", "nan"), "takes a finite number of dB"),
    (("validate", "net.py"), "is not an ExecuTorch program"),
    (("inspect", "out", "--image-size", "3x3"), "needs --try-changes"),
    (("inspect", "out", "--try-changes", "--image-size", "3"), "is not a size of images"),
    (("evaluate", "out", "--jobs", "1000000000"), "1024"),
    (("run", "", "photos"), "An argument is empty"),
    (("run", "out", "imag=photos"), "not an input of the program"),
    (("run", "out", "x=none.npy"), "'none.npy' does not exist"),
    (("package", "out", "--samples", "imag=photos"), "not an input of the program"),
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
    (work / "empty").mkdir(exist_ok=True)
    if not (work / "dangling").is_symlink():
        (work / "dangling").symlink_to("nowhere")
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


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["run", "out", "--bgr"], ["run", "out", "--channels=bgr"]),
        (["run", "out", "--rgb", "--top", "3"], ["run", "out", "--channels=rgb", "--top", "3"]),
        (["run", "out", "--", "--bgr"], ["run", "out", "--", "--bgr"]),
        (["run", "bgr"], ["run", "bgr"]),
    ],
)
def test_short_forms_of_channels(given: list[str], wanted: list[str]) -> None:
    assert in_long_form(given) == wanted


def test_a_verb_takes_a_short_form(here: Here, built: Path) -> None:
    image = "labelled/left/000.png"
    assert "channels='rgb' makes images of 3 channels" in here("run", built, image, "--rgb").err
