"""The name in the manifest of a package never leads to another folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openneutron.errors import FormatError
from openneutron.settings.package_files import program_of_package


@pytest.mark.parametrize("name", ["../net", "/etc/passwd", "a/b", "..", "", "a\\b", "a\0b", "net.pte", None, 3])
def test_other_folders_are_refused(name: object, tmp_path: Path) -> None:
    folder = tmp_path / "firmware"
    folder.mkdir()
    (tmp_path / "net.pte").write_bytes(b"secret")
    (folder / "manifest.json").write_text(json.dumps({"name": name}))
    with pytest.raises(FormatError, match="the name of the program is not an identifier"):
        program_of_package(folder)


def test_a_name_is_a_file_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "net"}')
    assert program_of_package(tmp_path) == tmp_path / "net.pte"
