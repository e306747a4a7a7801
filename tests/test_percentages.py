"""Percentages have one form in all texts: a number, a space and the sign, such as "88 %"."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from openneutron.core.numbers import in_percent

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "examples", "benchmarks")
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
JOINED = re.compile(r"\d%")
"""A number that is joined with the sign, or the presentation type ".1%", which joins them."""


def joined(source: str) -> Iterator[str]:
    """Yields the texts of a module that join a number and the sign. The format of an f-string is a text, too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and JOINED.search(node.value):
            yield node.value


@pytest.mark.parametrize(("share", "digits", "text"), [(0.876, 0, "88 %"), (0.0125, 1, "1.2 %"), (-0.014, 1, "-1.4 %")])
def test_a_share_in_percent(share: float, digits: int, text: str) -> None:
    assert in_percent(share, digits) == text


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("f'{share:.1%}'", 1),
        ("'{share:.1%}'.format(share=1)", 1),
        ("'more than 5% of it'", 1),
        ("f'{100 * share:.1f} %'", 0),
        ("'%d files' % count", 0),
    ],
)
def test_joined_percentages_are_found(source: str, count: int) -> None:
    assert len(list(joined(source))) == count


@pytest.mark.parametrize("folder", FOLDERS)
def test_texts_of_the_sources_separate_number_and_sign(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = [f"{file.relative_to(ROOT)}: {text}" for file in files for text in joined(file.read_text())]
    assert found == [], "write percentages by core.numbers.in_percent"


def test_documents_separate_number_and_sign() -> None:
    found = [f"{file.relative_to(ROOT)}: {match}" for file in DOCUMENTS for match in JOINED.findall(file.read_text())]
    assert found == []
