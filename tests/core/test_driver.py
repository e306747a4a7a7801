"""The driver of passes: timing, checks and dumps."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from openneutron.core.driver import DUMP_VARIABLE, Driver
from openneutron.errors import OutputError

# In these tests, a graph is a list of numbers.
Numbers = list[int]


def check(graph: Numbers, after: str) -> None:
    if -1 in graph:
        raise ValueError(f"after {after}: a negative number")


def doubled(graph: Numbers) -> Numbers:
    return [2 * number for number in graph]


def negative(graph: Numbers) -> Numbers:
    return [*graph, -1]


def driver(folder: Path | None = None) -> Driver[Numbers]:
    return Driver("numbers", str, check, folder)


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DUMP_VARIABLE, raising=False)


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.txt"))}


def test_the_driver_times_each_pass(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "openneutron.core.driver")
    running = driver()
    assert running.run("double", "double all", doubled, [1, 2]) == [2, 4]
    (run,) = running.runs
    assert (run.name, run.purpose) == ("double", "double all")
    assert run.seconds >= 0
    assert "numbers: double took" in caplog.text


@pytest.mark.parametrize("given", ["variable", "intermediates_dir", "both"])
def test_the_driver_dumps_the_graph_before_and_after_each_pass(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_variable, by_option = tmp_path / "new" / "a", tmp_path / "b"
    by_option.mkdir()
    if given != "intermediates_dir":
        monkeypatch.setenv(DUMP_VARIABLE, str(by_variable))
    running = driver(None if given == "variable" else by_option)
    running.run("again", "", doubled, running.run("double", "double all", doubled, [1]))
    running.finish()
    folders = {"variable": [by_variable], "intermediates_dir": [by_option / "passes"]}
    for folder in folders.get(given, [by_variable, by_option / "passes"]):
        written = files(folder)
        assert "double: double all\n" in written.pop("000_numbers/passes.txt")
        assert written == {
            "000_numbers/00_double_before.txt": "[1]", "000_numbers/00_double_after.txt": "[2]",
            "000_numbers/01_again_before.txt": "[2]", "000_numbers/01_again_after.txt": "[4]",
        }  # fmt: skip


def test_each_driver_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path))
    (tmp_path / "007_older").mkdir()
    (tmp_path / "notes").mkdir()
    names = [folder.name for running in (driver(), driver()) for folder in running.folders]
    assert names == ["008_numbers", "009_numbers"]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    running = driver()
    running.run("double", "", doubled, [1])
    running.finish()
    assert list(tmp_path.iterdir()) == []


def test_the_driver_dumps_a_graph_before_its_check_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match="after negate"):
        driver().run("negate", "", negative, [1])
    assert files(tmp_path)["000_numbers/00_negate_after.txt"] == "[1, -1]"


def test_intermediates_dir_must_exist(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is not a folder"):
        driver(tmp_path / "missing")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(OutputError, match=DUMP_VARIABLE):
        driver()
