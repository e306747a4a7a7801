"""Errors of the user's functions name the user's line, and errors of OpenNeutron keep their messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openneutron.core import fx, user_code
from openneutron.core.fx import is_library
from openneutron.core.user_code import code_of_user, prefixes_of
from openneutron.errors import InputError, ModelError


def function_in(file: Path, body: str) -> Callable[[], Any]:
    """Returns the function `f` with this body, which is compiled as a part of `file`."""
    names: dict[str, Any] = {"json": json}
    exec(compile(f"def f():\n    {body}\n", str(file), "exec"), names)
    found: Callable[[], Any] = names["f"]
    return found


def source_of_error(function: Callable[[], Any]) -> str | None:
    with pytest.raises(InputError) as caught, code_of_user("The function"):
        function()
    return caught.value.source


def test_the_line_of_the_user_is_named_and_not_that_of_a_library(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    assert source_of_error(function_in(file, "json.loads('{')")) == f"{file}:2"


@pytest.mark.parametrize("name", ["openneutron_of_mine.py", "openneutron_mine/a.py"])
def test_a_file_named_like_the_package_counts_as_user_code(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = prefixes_of([tmp_path / "openneutron"])  # all neighbours of an installed one are libraries
    monkeypatch.setattr(user_code, "_NOT_OF_USER", package)
    monkeypatch.setattr(fx, "_OWN_FOLDER", package)
    file = tmp_path / name
    assert source_of_error(function_in(file, "1 / 0")) == f"{file}:2"
    assert not is_library(str(file))
    assert is_library(str(tmp_path / "openneutron" / "a.py"))


def test_files_of_python_and_of_the_package_count_as_libraries() -> None:
    for file in (json.__file__, user_code.__file__, str(Path(user_code.__file__).resolve()), "<string>"):
        assert is_library(file)


def test_installed_packages_are_recognized_through_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real, target_is_directory=True)
    file = tmp_path / "mine.py"
    monkeypatch.setattr(user_code, "_NOT_OF_USER", prefixes_of([link]))
    for folder in (real, link):
        fails = function_in(folder / "package.py", "1 / 0")
        with pytest.raises(InputError) as caught, code_of_user("The function"):
            fails()
        assert caught.value.source is not None
        assert caught.value.source.startswith(__file__)
    assert source_of_error(function_in(file, "1 / 0")) == f"{file}:2"


def test_an_error_of_openneutron_keeps_its_node_and_its_line() -> None:
    with pytest.raises(ModelError) as caught, code_of_user("The transform", place="cat.png"):
        raise ModelError("It fails.", node="add", op="aten.add.Tensor", source="mine.py:3")
    found = caught.value
    assert (found.node, found.op, found.source) == ("add", "aten.add.Tensor", "mine.py:3")
    assert str(found) == "cat.png: It fails. [node 'add', aten.add.Tensor, at mine.py:3]"
