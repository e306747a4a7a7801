"""Writes the files about dependencies: hashes of the tested versions, and licences of the installed packages.

    pip install --dry-run --ignore-installed --no-deps -r constraints.txt --report report.json
    python -m tests.supply hashes report.json > constraints-hashes.txt
    pip install --dry-run --ignore-installed --require-hashes -r constraints-hashes.txt
    python -m tests.supply licences > docs/licences.md

The third command fails if a package needs another one that constraints.txt lacks. `tests/test_supply.py` checks both
files, and that constraints.txt has all requirements of the installed packages.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
HASHES = ROOT / "constraints-hashes.txt"
LICENCES = ROOT / "docs" / "licences.md"
UNKNOWN = "not stated"
_HEADER = """\
# The versions of constraints.txt with the hashes of their files for CPython 3.11 on Linux x86-64, for
#   pip install --require-hashes -r constraints-hashes.txt
# The file of torch is its wheel for CPUs (2.13.0+cpu), which PyTorch's own index has.
# Written by `python -m tests.supply hashes`; see tests/supply.py.
"""
_TITLE = """\
# Licences of the dependencies

OpenNeutron is licensed under BSD-3-Clause. The table lists the packages of `constraints.txt`: the dependencies of
OpenNeutron, of its tests and of its documents, with the licences that their metadata state for the tested versions. It
is written by `python -m tests.supply licences`. NXP's converter, driver and firmware are not among them.

| package | version | licence |
|---|---|---|
"""

__all__ = ["HASHES", "LICENCES", "hashes_text", "licence_of", "licences_text", "pinned"]


def pinned(text: str) -> dict[str, str]:
    """Returns the version of each package in the text of a requirements file, by the normalized name (PEP 503)."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE)
    return {normal(name): version for name, version in found}


def normal(name: str) -> str:
    """Returns the normalized name of a package (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def hashes_text(report: dict[str, object]) -> str:
    """Returns the text of constraints-hashes.txt, from the report of `pip install --report`."""
    lines: dict[str, str] = {}
    for one in report["install"]:  # type: ignore[attr-defined]
        name, version = normal(one["metadata"]["name"]), one["metadata"]["version"].split("+")[0]
        digest = one["download_info"]["archive_info"]["hashes"]["sha256"]
        lines[name] = f"{name}=={version} --hash=sha256:{digest}"
    return _HEADER + "".join(f"{lines[name]}\n" for name in sorted(lines))


def licence_of(found: importlib.metadata.Distribution) -> str:
    """Returns the licence of a package: from its metadata, else the title of its licence file."""
    metadata: Any = found.metadata
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classifiers = [one for one in metadata.get_all("Classifier") or () if one.startswith("License ::")]
    named = [one.split(" :: ")[-1] for one in classifiers if not one.endswith("OSI Approved")]
    files = [one for one in found.files or () if one.name.startswith(("LICENSE", "LICENCE"))]
    stated = metadata.get("License") or (files[0].read_text() if files else "")
    if "Redistribution and use in source and binary forms" in stated and "to endorse or promote" in stated:
        stated = "BSD-3-Clause"
    text = stated.strip().splitlines()
    return ", ".join(named) or (text[0][:60].strip() if text else UNKNOWN)


def licence_rows() -> Iterator[tuple[str, str, str]]:
    """Returns name, version and licence of each package of constraints.txt that is installed."""
    for name, version in sorted(pinned(CONSTRAINTS.read_text()).items()):
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if found.version.split("+")[0] == version:
            yield name, version, licence_of(found).replace("|", "/")


def licences_text() -> str:
    """Returns the text of docs/licences.md."""
    return _TITLE + "".join(f"| {name} | {version} | {licence} |\n" for name, version, licence in licence_rows())


def main() -> None:
    """Prints the hashes of a report of pip with `hashes FILE`; without arguments, docs/licences.md."""
    if sys.argv[1:2] == ["hashes"]:
        print(hashes_text(json.loads(Path(sys.argv[2]).read_text())), end="")
    else:
        print(licences_text(), end="")


if __name__ == "__main__":
    main()
