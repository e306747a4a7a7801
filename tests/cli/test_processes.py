"""Each verb as a process: one right use, whose JSON follows the schema, and one wrong use, which names the mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.builds import MODEL, run
from typer.main import get_command

from openneutron.cli.verbs import app

RIGHT: dict[str, tuple[object, ...]] = {
    "targets": (),
    "operators": ("conv2d",),
    "inspect": ("out",),
    "extract": ("out", "-o", "extracted"),
    "report": ("out", "-o", "page.html"),
    "compare": ("out", "out/model.pte"),
    "run": ("out", "photos/left/000.png"),
    "validate": ("out",),
    "package": ("out", "-o", "package of a process"),
}
"""Right uses that no other test runs as a process. `TestBuild` and `TestSteps` run build, quantize and lower."""
WRONG: dict[str, tuple[tuple[object, ...], str]] = {
    "build": (("net.py:Nett", "--input", "1,1,8,8", "--calibrate", "photos", "-o", "none"), "Nett"),
    "quantize": ((*MODEL, "--calibrate", "photos", "-o", "m.onnx"), "written as .pt2"),
    "lower": (("missing.pt2", "-o", "m.pte"), "missing.pt2"),
    "analyze": (("--model", "net.py:Net"), "--"),
    "run": (("out", "missing.png"), "missing.png"),
    "evaluate": (("out", "--evaluate", "missing"), "missing"),
    "validate": (("w.pt",), "w.pt"),
    "report": (("out", "-o", "nowhere/page.html"), "nowhere"),
    "compare": (("out", "w.pt"), "w.pt"),
    "package": (("out", "-o", "labelled"), "labelled"),
    "inspect": (("net.py",), "net.py"),
    "extract": (("missing.pte",), "missing.pte"),
    "operators": (("--target", "imxrt7000"), "imxrt700"),
    "compile": (("out/model.pte", "-o", "d.pte", "--flavor", "SDK_1"), "SDK_1"),
    "doctor": (("--flavour", "SDK_1"), "--flavour"),
    "init": (("nowhere/new.toml",), "nowhere"),
    "profile": (("missing.etdump", "--program", "out/model.pte"), "missing.etdump"),
    "fit-costs": (("missing.etdump", "--program", "out/model.pte", "-o", "board.toml"), "missing.etdump"),
    "targets": (("show", "imxrt7000"), "imxrt700"),
}


def test_each_verb_has_a_row() -> None:
    assert WRONG.keys() == get_command(app).commands.keys()  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("verb", RIGHT)
def test_each_verb_succeeds_and_prints_json(verb: str, work: Path, built: Path) -> None:
    result = run(work, verb, *RIGHT[verb], "--json")
    assert result.code == 0, result.text
    assert result.json is not None


@pytest.mark.slow
@pytest.mark.parametrize("verb", WRONG)
def test_wrong_use(verb: str, work: Path, built: Path) -> None:
    arguments, text = WRONG[verb]
    result = run(work, verb, *arguments)
    assert result.code == 2, result.text
    assert text in result.err
    assert result.out == ""


_TORCH_AND_DATA = ("torch", "PIL", "openneutron.data", "openneutron.vendor.sdk")
WITHOUT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "help": (("build", "--help"), ("numpy", *_TORCH_AND_DATA)),
    "a missing program": (("inspect", "missing.pte"), ("numpy", *_TORCH_AND_DATA)),
    "a missing file of compare": (("compare", "missing.pte", "missing.pte"), ("numpy", *_TORCH_AND_DATA)),
    "a missing model": (("build", "missing.py:Net"), ("numpy", *_TORCH_AND_DATA)),
    "inspect": (("inspect", "out/model.pte"), _TORCH_AND_DATA),
    "extract": (("extract", "out/model.pte", "-o", "models"), _TORCH_AND_DATA),
    "targets": (("targets",), _TORCH_AND_DATA[:3]),
}
"""Arguments, and modules that the command does not need: their import takes most of the time of its answer."""


@pytest.mark.slow
@pytest.mark.parametrize("case", WITHOUT)
def test_a_fast_answer_imports_no_slow_module(case: str, work: Path, built: Path) -> None:
    arguments, absent = WITHOUT[case]
    code = (
        "import sys\nfrom openneutron.cli import main\ntry:\n    main(sys.argv[1:])\n"
        "except SystemExit:\n    print(*sorted(sys.modules), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=True)
    assert "typer" in done.stderr.split()
    assert not set(absent).intersection(done.stderr.split())


@pytest.mark.slow
def test_a_wrong_shape_is_one_line_without_the_log_of_torch(work: Path) -> None:
    model = ("torch.nn:Linear", "--args", "10, 2", "--input", "1,11", "--calibrate", "random")
    result = run(work, "build", *model, "-o", "never written")
    assert result.code == 2
    assert "for each argument of forward(input)." in result.err
    assert result.err.count("\n") == 1
