"""The code of the tutorials and of other pages runs, and prints what the pages show."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.docs.pages import blocks_of, difference, run_page

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(
    page.relative_to(DOCS).as_posix()
    for page in DOCS.rglob("*.md")
    if any(block.language in ("python", "console") for block in blocks_of(page.read_text()))
)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_the_output_of_its_code(page: str, tmp_path: Path) -> None:
    run_page(DOCS / page, tmp_path)


def test_tutorials_have_code() -> None:
    tutorials = {page.name for page in (DOCS / "tutorials").glob("*.md")} - {"index.md"}
    assert tutorials == {Path(page).name for page in PAGES if page.startswith("tutorials/")}


@pytest.mark.parametrize(
    ("printed", "shown", "differs"),
    [
        ("a  1\nb 2\n", "a 1\nb 2", False),
        ("a 1\n", "a 2", True),
        ("a 20.5 dB\n", "a 21.0 dB", False),
        ("a 20.5 dB\n", "a 31.0 dB", True),
        ("24,500 bytes\n", "25,000 bytes", False),
        ("2,500 bytes\n", "25,000 bytes", True),
        ("90.1 % lost 2\n", "90.2 % lost 0", False),
        ("90.1 % lost 9\n", "90.2 % lost 0", True),
        ("┏━━┓\n┃ a ┃\n", "┏━━━┓\n┃ a ┃\n", False),
        ("a\nb\nc\n", "a\n...\nc", False),
        ("a\nb\nc\n", "a\n...", False),
        ("a\nb\n", "a", True),
        ("a\n", "a\nb", True),
        ("model (line 7): relu\n", "model (...): relu", False),
    ],
)
def test_difference(printed: str, shown: str, differs: bool) -> None:
    assert (difference(printed, shown) is not None) == differs
