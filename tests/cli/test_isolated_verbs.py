"""Verbs run a program in a separate process. If that process dies, the verb reports an error and does not crash."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.cli.builds import Here

from openneutron import load
from openneutron.accuracy import evaluate
from openneutron.errors import HostError
from openneutron.runtime import HostProgram

DIES = """
import os, signal
from openneutron.runtime import child
answer = child._Server.answer
def die(self, request):
    if request[0] == "call":
        os.kill(os.getpid(), signal.SIGSEGV)
    return answer(self, request)
child._Server.answer = die
child.serve()
"""
PIXELS = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 1, 8, 8)
VERBS = {
    "run": ("run", "out", "photos/left"),
    "evaluate": ("evaluate", "out"),
    "validate": ("validate", "out"),
    "compare": ("compare", "out", "out", "--samples", "1"),
    "package": ("package", "out", "--vectors", "1"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_end_of_the_process_is_an_error(
    here: Here, built: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openneutron.runtime.child._CODE", DIES)
    result = here(*VERBS[verb])
    assert result.code == 2
    assert "ended the process that ran it (SIGSEGV)" in " ".join(result.text.split())
    assert not Path("firmware").exists()
    assert here(*VERBS[verb], "--in-process").code == 0


@pytest.mark.parametrize("form", ["build", "package"])
def test_a_board_is_compared_with_a_program_in_a_child_process(
    here: Here, built: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, dump = built if form == "build" else package(built, tmp_path / "package"), tmp_path / "wrong.bin"
    values = load(built / "model.pte").run(PIXELS).numpy()
    dump.write_bytes((3 * values + 7).tobytes())
    verb = ("validate", program, "--against", dump, "--samples", "1")
    monkeypatch.setattr("openneutron.runtime.child._CODE", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    result = here(*verb)
    assert result.code == 2, result.text
    assert "ended the process that ran it (SIGSEGV)" in " ".join(result.text.split())
    assert here(*verb, "--in-process").code == 1


def package(build: Path, folder: Path) -> Path:
    """Writes a package with one vector, without the sources of its firmware."""
    folder.mkdir()
    (folder / "net.pte").write_bytes((build / "model.pte").read_bytes())
    outputs = load(build / "model.pte").run(PIXELS).numpy().tobytes()
    (folder / "test_vectors.bin").write_bytes(PIXELS.tobytes() + outputs + bytes(-len(outputs) % 16))
    manifest = {"name": "net", "payload": "portable", "vectors": 1, "tolerance_lsb": 1.0}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_outputs_equal_a_run_in_this_process(here: Here, built: Path, tmp_path: Path) -> None:
    files = [tmp_path / "isolated.npz", tmp_path / "here.npz"]
    for file, option in zip(files, ([], ["--in-process"]), strict=True):
        assert here(*VERBS["run"], "-o", file, *option).code == 0
    isolated, others = map(np.load, files)
    assert isolated.files == others.files
    assert all(np.array_equal(isolated[name], others[name]) for name in isolated.files)


@pytest.mark.parametrize("options", [[], ["--in-process"]])
def test_the_time_is_measured_in_the_child_process(
    here: Here, built: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def counted(file: Path, *, isolated: bool = False) -> HostProgram:
        found.append(isolated)
        return load(file, isolated=isolated)

    monkeypatch.setattr("openneutron.workflow.runs.load", counted)
    result = here("run", "out", "photos/left", "--repeat", "2", "--json", *options)
    assert result.json["runs"][0]["seconds"] > 0
    assert found == [not options]


def test_evaluate_of_a_file(built: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, data = built / "model.pte", [(np.zeros((1, 1, 8, 8), np.float32), 0)]
    value = evaluate(load(file), data)
    assert evaluate(file, data) == value
    assert evaluate(load(file, isolated=True), data, jobs=2) == value
    monkeypatch.setattr("openneutron.runtime.child._CODE", DIES)
    with pytest.raises(HostError, match="SIGSEGV"):
        evaluate(str(file), data)
