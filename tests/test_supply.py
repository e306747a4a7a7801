"""The files about dependencies: constraints.txt, the hashes of its versions, and their licences."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from tests.supply import CONSTRAINTS, HASHES, LICENCES, ROOT, UNKNOWN, hashes_text, licence_rows, normal, pinned


def rows_of_page() -> dict[str, tuple[str, str]]:
    found = re.findall(r"^\| (\S+) \| (\S+) \| (.+) \|$", LICENCES.read_text(), re.MULTILINE)
    return {name: (version, licence) for name, version, licence in found if name != "package"}


def test_each_tested_version_has_a_hash() -> None:
    text = HASHES.read_text()
    assert pinned(text) == pinned(CONSTRAINTS.read_text())
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)


def test_each_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for group in project["optional-dependencies"].values() for one in group)]
    names = {normal(re.split(r"[\[<>=!~ ]", one)[0]) for one in wanted}
    assert names - {"soundfile", "openneutron"} <= set(pinned(CONSTRAINTS.read_text()))


def test_requirements_of_the_installed_packages_are_pinned() -> None:
    """`pip install --require-hashes` refuses a package without a hash."""
    known = pinned(CONSTRAINTS.read_text())
    missing = {
        f"{found.metadata['Name']} needs {needed.name}"
        for found in importlib.metadata.distributions()
        if normal(found.metadata["Name"]) in known and normal(found.metadata["Name"]) != "torchvision"
        for needed in map(Requirement, found.requires or ())
        if (needed.marker is None or needed.marker.evaluate({"extra": ""})) and normal(needed.name) not in known
    }
    assert not missing


def test_the_page_has_the_licences_of_the_installed_packages() -> None:
    listed = rows_of_page()
    installed = {name: (version, licence) for name, version, licence in licence_rows()}
    assert len(installed) > 20
    assert {name: listed.get(name) for name in installed} == installed


def test_the_page_names_the_dependencies_of_openneutron() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for one in project["dependencies"]:
        name = normal(re.split(r"[\[<>=!~ ]", one)[0])
        assert rows_of_page()[name][1] != UNKNOWN, name


def test_hashes_equal_the_report() -> None:
    info = {"archive_info": {"hashes": {"sha256": "ab" * 32}}}
    one = {"metadata": {"name": "Some_Package", "version": "1.2+cpu"}, "download_info": info}
    assert hashes_text({"install": [one]}).splitlines()[-1] == f"some-package==1.2 --hash=sha256:{'ab' * 32}"
    with pytest.raises(KeyError):
        hashes_text({})
