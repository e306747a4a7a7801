"""Fixtures of the tests of verbs: a folder with a model and data, its build, and verbs in this process."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tests.cli.builds import MODEL, SOURCE, Here, Result, images, run, train

from openneutron.cli import main


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with net.py, w.pt, and images in photos/ and labelled/."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "net.py").write_text(SOURCE)
    train(folder)
    images(folder / "photos", 10, 0)
    images(folder / "labelled", 20, 1)
    return folder


@pytest.fixture
def here(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Runs a verb in this process, which has torch already, in the folder `work`."""
    monkeypatch.chdir(work)
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as end:
            main(list(map(str, arguments)))
        printed = capsys.readouterr()
        done = subprocess.CompletedProcess[str]([], int(end.value.code or 0), printed.out, printed.err)
        result = Result(str(arguments[0]), done)
        assert "-v" in arguments or "Traceback" not in result.text
        return result

    return call


@pytest.fixture(scope="session")
def built(work: Path) -> Path:
    """The folder of a build."""
    result = run(work, "build", *MODEL, "--calibrate", "photos", "--evaluate", "labelled", "-o", "out", "--json")
    assert result.code == 0, result.text
    return work / "out"
