"""Verbs whose output nothing reads, as in `openneutron build ... | head -1`, still write their files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.builds import MODEL

from openneutron.cli.closed_streams import EXIT_CODE

WRITERS: dict[str, tuple[tuple[object, ...], str]] = {
    "init": (("closed.toml",), "closed.toml"),
    "build": ((*MODEL, "--calibrate", "photos", "-o", "closed"), "closed/report.html"),
    "quantize": ((*MODEL, "--calibrate", "photos", "-o", "closed.pt2"), "closed.pt2"),
    "lower": (("out/quantized.pt2", "-o", "closed.pte"), "closed.pte"),
    "run": (("out", "photos/left/000.png", "-o", "closed.npy"), "closed.npy"),
    "report": (("out", "-o", "closed.html"), "closed.html"),
    "extract": (("out", "-o", "closed-tflite"), "closed-tflite"),
    "package": (("out", "-o", "closed-package"), "closed-package"),
}
"""The arguments of each verb, and the last file or folder that it writes."""


def without_reader(folder: Path, stream: str, *arguments: object, unbuffered: str = "") -> tuple[int, str]:
    """Runs a verb with a pipe without a reader as `stream`. Returns the exit code and the text of the other stream."""
    read, write = os.pipe()
    os.close(read)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: write}
    command = [sys.executable, "-m", "openneutron", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": unbuffered}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, text=True, check=False, **streams)  # type: ignore[call-overload]
    finally:
        os.close(write)
    return done.returncode, (done.stdout or "") + (done.stderr or "")


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["stderr", "stdout"])
@pytest.mark.parametrize("verb", WRITERS)
def test_a_verb_writes_its_files_without_a_reader(verb: str, stream: str, work: Path, built: Path) -> None:
    arguments, written = WRITERS[verb]
    name = written.replace("closed", f"closed-{stream}")
    given = [str(one).replace("closed", f"closed-{stream}") for one in arguments]
    code, text = without_reader(work, stream, verb, *given)
    assert (work / name).exists(), text
    assert code in (0, EXIT_CODE), text
    assert "Traceback" not in text
    assert "Exception ignored" not in text


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [("targets",), ("operators",), ("--version",), ("--help",)])
def test_results_without_a_reader_end_as_a_shell_expects(
    arguments: tuple[str, ...], unbuffered: str, tmp_path: Path
) -> None:
    assert without_reader(tmp_path, "stdout", *arguments, unbuffered=unbuffered) == (EXIT_CODE, "")


def test_wrong_use_keeps_its_exit_code_without_a_reader(tmp_path: Path) -> None:
    assert without_reader(tmp_path, "stderr", "inspect", "missing.pte") == (2, "")
