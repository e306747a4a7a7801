"""docs/data.md lists the forms and options that the code has."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from openneutron import data
from openneutron.data import files, tables
from openneutron.data.images import INTERPOLATIONS

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_every_type_of_file_is_listed() -> None:
    for suffix in files.SAMPLE_TYPES | files.TABLES - {".wave"}:
        assert suffix == ".wave" or re.search(rf"{re.escape(suffix)}\b", TEXT), suffix
    for name in tables.LABEL_NAMES | {"path", "file", "filename", "image"}:
        assert name in TEXT


def test_every_option_of_a_transform_is_listed() -> None:
    table = TEXT.split("## Transforms", 1)[1]
    for field in (*dataclasses.fields(data.ImageTransform), *dataclasses.fields(data.AudioTransform)):
        assert re.search(rf"\b{field.name}\b", table), field.name
    for name in INTERPOLATIONS:
        assert f'"{name}"' in table


def test_the_names_in_the_examples_exist() -> None:
    for line in re.findall(r"^    from (openneutron[\w.]*) import (.*)$", TEXT, re.MULTILINE):
        module = __import__(line[0], fromlist=["_"])
        for name in line[1].split(", "):
            assert hasattr(module, name), name
