"""Errors of the user's functions, paths and names, in each verb: exit code 2, and a message that names the cause."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tests.cli.builds import MODEL, SOURCE, Here, run

FAULTY = """
import sys

def transform(image):
    return helper(image)

def helper(image):
    raise KeyError("no such band")  # the line

def metric(outputs, label):
    raise ZeroDivisionError("no weight")  # the line

def metric_that_ends(outputs, label):
    sys.exit(3)  # the line

def data():
    yield from ()
    raise OSError("the camera is off")  # the line

def logs(image):
    import logging
    logging.getLogger(__name__).error("no sensor")
    logging.getLogger(__name__).warning("old sensor")
    return image

def warns(image):
    raise UserWarning("old format")  # the line

class Samples:
    def __len__(self):
        return 4
    def __getitem__(self, index):
        raise RuntimeError("no sample")  # the line

samples = Samples()
"""
NET = SOURCE.replace("        super().__init__()", "        super().__init__()\n        len(width)")


def line_of(text: str) -> list[str]:
    """Returns the lines of the marked statements, as messages show them."""
    return [f"faulty.py:{number}" for number, line in enumerate(text.splitlines(), 1) if "# the line" in line]


@pytest.fixture
def faulty(work: Path) -> Path:
    (work / "faulty.py").write_text(FAULTY)
    return work


TRANSFORM = ("--transform", "faulty.py:transform")
CALIBRATED = ("net.py:Net", "--weights", "w.pt", "--input", "1,1,8,8", "--recover", "none")


@pytest.mark.slow
@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    ("arguments", "message", "line"),
    [
        (("run", "out/model.pte", "labelled/left/000.png", *TRANSFORM), "KeyError: 'no such band'", 0),
        (("run", "out/model.pte", "labelled/left/000.png", "--transform", "faulty.py:warns"), "UserWarning", 4),
        (("evaluate", "out/model.pte", "--evaluate", "labelled", *TRANSFORM), "KeyError: 'no such band'", 0),
        (
            ("evaluate", "out", "--metric", "faulty.py:metric"),
            "The metric of",
            1,
        ),
        (("evaluate", "out", "--metric", "faulty.py:metric_that_ends"), "SystemExit: 3", 2),
        (("evaluate", "out", "--metric", "faulty.py:metric", "--jobs", "2"), "ZeroDivisionError: no weight", 1),
        (("validate", "out", "--calibrate", "faulty.py:data"), "OSError: the camera is off", 3),
        (("quantize", *CALIBRATED, "--calibrate", "photos", *TRANSFORM, "-o", "q.pt2"), "The transform of photos", 0),
        (("quantize", *CALIBRATED, "--calibrate", "faulty.py:data", "-o", "q.pt2"), "the camera is off", 3),
        (("quantize", *CALIBRATED, "--calibrate", "faulty.py:samples", "-o", "q.pt2"), "RuntimeError: no sample", 5),
        (("build", *CALIBRATED, "--calibrate", "photos", *TRANSFORM, "-o", "faulty"), "KeyError", 0),
        (("analyze", "--model", *CALIBRATED, "--calibrate", "photos", *TRANSFORM), "KeyError", 0),
    ],
)
def test_an_error_in_a_function_of_the_user(
    here: Here, faulty: Path, arguments: tuple[str, ...], message: str, line: int
) -> None:
    result = here(*arguments)
    assert result.code == 2, result.text
    assert message in result.err
    assert line_of(FAULTY)[line] in result.err
    assert "fault of OpenNeutron" not in result.err
    assert "Traceback" not in result.text
    assert result.out == ""


@pytest.mark.slow
@pytest.mark.usefixtures("built")
def test_an_error_that_a_function_of_the_user_logs_is_printed(faulty: Path) -> None:
    result = run(faulty, "run", "out/model.pte", "labelled/left/000.png", "--transform", "faulty.py:logs")
    assert "no sensor" in result.err
    assert "old sensor" not in result.text


@pytest.mark.slow
def test_verbose_prints_the_traceback(here: Here, faulty: Path, built: Path) -> None:
    result = here("run", "out/model.pte", "labelled/left/000.png", *TRANSFORM, "-v")
    assert result.code == 2
    assert "Traceback" in result.err
    assert "in helper" in result.err


def test_errors_inside_constructors_are_not_argument_errors(here: Here, work: Path, tmp_path: Path) -> None:
    (work / "inner.py").write_text(NET)
    options = ("--input", "1,1,8,8", "--calibrate", "photos", "-o", tmp_path / "out")
    result = here("build", "inner.py:Net", *options)
    assert result.code == 2
    assert "'inner.py:Net' failed: TypeError: object of type 'int' has no len()" in result.err
    assert "inner.py:7" in result.err
    result = here("build", "inner.py:Net", "--args", "depth=3", *options)
    assert result.code == 2
    assert "cannot be called with these arguments: got an unexpected keyword argument 'depth'" in result.err
    assert "It takes (width=4)" in result.err


LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ("build", "net.py:Net", "--calibrate", LONG),
        ("build", f"{LONG}.pt2", "--calibrate", "photos"),
        ("build", f"{LONG}.py:Net", "--calibrate", "photos"),
        ("build", *MODEL, "--calibrate", "photos", "-o", LONG),
        ("build", "--config", LONG),
        ("quantize", *MODEL, "--calibrate", "photos", "-o", f"{LONG}.pt2"),
        ("lower", LONG),
        ("run", LONG, "a.png"),
        ("evaluate", LONG),
        ("report", LONG),
        ("inspect", LONG),
        ("init", LONG),
    ],
)
def test_a_name_that_is_too_long(here: Here, arguments: tuple[str, ...]) -> None:
    result = here(*arguments)
    assert result.code == 2, result.text
    words = " ".join(result.text.replace("│", " ").split())
    assert "too long" in words or "does not exist" in words
    assert "fault of OpenNeutron" not in words


def test_a_path_without_rights(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the system's answer is replaced."""
    found = os.stat

    def stat(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if "locked" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return found(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", stat)
    for arguments in (
        ("build", "net.py:Net", "--calibrate", "locked/photos"),
        ("build", "locked/net.py:Net", "--calibrate", "photos"),
        ("build", *MODEL, "--calibrate", "photos", "--weights", "locked/w.pt"),
        ("init", "locked/new.toml"),
    ):
        result = here(*arguments)
        assert result.code == 2, result.text
        assert "Permission denied" in result.err
        assert "fault of OpenNeutron" not in result.text


@pytest.mark.slow
def test_names_that_are_not_utf_8(here: Here, built: Path, work: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    labelled = tmp_path / "labelled"
    for side, other in (("left", "right"), ("right", "left")):  # wrong labels, so that samples are lost
        (labelled / side).mkdir(parents=True)
        try:
            (labelled / side / f"{name}.png").write_bytes((work / f"labelled/{other}/000.png").read_bytes())
        except OSError:
            pytest.skip("this file system has names in UTF-8 only")
    result = here("evaluate", built, "--evaluate", labelled, "--json")
    assert result.code == 0, result.text
    assert json.loads(result.out)["accuracy"]
    result.out.encode()
    folder = tmp_path / name
    folder.mkdir()
    (folder / "model.pte").write_bytes((built / "model.pte").read_bytes())
    for arguments in (
        ("run", built, labelled / f"left/{name}.png"),
        ("run", built, labelled / f"left/{name}.png", "--json"),
        ("inspect", folder, "--json"),
        ("report", folder, "-o", folder / "report.html"),
    ):
        result = here(*arguments)
        assert result.code == 0, result.text
        result.out.encode(errors="backslashreplace" if "--json" not in arguments else "strict")
    assert (folder / "report.html").read_bytes().decode()
    images = tmp_path / f"{name} images"
    images.mkdir()
    (images / "000.png").write_bytes((work / "labelled/left/000.png").read_bytes())
    result = here("build", *MODEL, "--calibrate", images, "-o", tmp_path / "out")
    assert result.code == 2
    assert "is not UTF-8" in result.err
    assert "caf\\xe9" in result.err


@pytest.mark.slow
def test_operators_of_a_bare_program_are_not_reported_as_moved(here: Here, built: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "model.pte").write_bytes((built / "model.pte").read_bytes())
    for first, second in ((built, bare), (bare, built), (built, bare / "model.pte")):
        result = here("compare", first, second, "--json")
        assert result.code == 0, result.text
        assert result.json["moves"] == []
        assert all(row["this"] == row["other"] for row in result.json["differences"])
        assert here("report", first, "--other", second, "-o", tmp_path / "page.html").code == 0
        assert "Each operator runs where it runs in the other build." in (tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_extract_takes_the_analysis_of_a_build(here: Here, built: Path, tmp_path: Path) -> None:
    result = here("extract", built, "-o", tmp_path, "--model-explorer", "--json")
    assert result.code == 0, result.text
    assert {Path(path).name for path in result.json["files"]} >= {"sqnr.json", "placement.json", "cycles.json"}
    assert json.loads((tmp_path / "sqnr.json").read_text())["model"]["results"]


@pytest.mark.slow
def test_a_full_disk_keeps_the_files_of_the_build_before(
    here: Here, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    for name in ("model.pte", "summary.json"):
        (output / name).write_bytes(b"before")
    flush = os.fsync
    count = 0

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise OSError(28, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    result = here("build", "-c", "out/openneutron.toml", "-o", output, "--recover", "none", "--no-analyze")
    assert result.code == 2, result.text
    assert "No space left on device. Free some space" in result.err
    assert {path.name: path.read_bytes() for path in output.iterdir()} == {
        "model.pte": b"before",
        "summary.json": b"before",
    }
