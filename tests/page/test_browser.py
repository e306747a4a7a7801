"""The page in Chromium: no errors, nothing cut off, enough contrast, at all widths and in both themes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.page.summaries import large_summary, small_summary

from openneutron.page import write_page
from openneutron.page.html import analysis_page

pytestmark = [pytest.mark.browser, pytest.mark.slow]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = Path(os.environ.get("OPENNEUTRON_AXE", "node_modules/axe-core/axe.min.js"))
WIDTHS = (400, 701, 1000, 1600)

# Elements outside of the page, contents wider than their element, and texts of charts outside of their chart.
CUT_OFF = """() => {
  const found = [];
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) found.push(`page: ${document.documentElement.scrollWidth} px`);
  for (const one of document.querySelectorAll("body *")) {
    const box = one.getBoundingClientRect();
    if (!box.width) continue;
    const text = `${one.tagName} '${one.textContent.trim().slice(0, 30)}'`;
    if (one.tagName === "text") {
      const chart = one.closest("svg").getBoundingClientRect();
      const inside = box.left >= chart.left - 1 && box.right <= chart.right + 1 && box.bottom <= chart.bottom + 2;
      if (!inside) found.push(`${text} leaves its chart`);
      if (box.height < 9) found.push(`${text} is ${box.height} px high`);
    }
    if (one.closest("svg") && one.tagName !== "svg") continue;
    if (box.right > width + 1 || box.left < -1) found.push(`${text}: ${box.left} to ${box.right} px`);
    const inline = getComputedStyle(one).display === "inline";
    if (!inline && one.clientWidth && one.scrollWidth > one.clientWidth + 1) found.push(`${text} is cut off`);
  }
  for (const one of document.querySelectorAll(".figures dd")) {  // a number and its unit are not broken within a word
    for (const match of one.textContent.matchAll(/\\S+/g)) {
      const word = document.createRange();
      word.setStart(one.firstChild, match.index);
      word.setEnd(one.firstChild, match.index + match[0].length);
      if (word.getClientRects().length > 1) found.push(`'${match[0]}' is broken`);
    }
  }
  return found.slice(0, 3);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; see CONTRIBUTING.md")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed; see CONTRIBUTING.md")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    summary = small_summary()
    assert summary.analysis is not None
    other = replace(summary, cycles=10, placement=summary.placement[:-1], options={})
    long = "a" * 60 + ".encoder.layers.{0}.output_projection_with_a_long_name"
    write_page(folder / "small.html", summary, other)
    write_page(folder / "long.html", replace(large_summary(40, name=long), model="Model" * 20, cycles=71_700), other)
    (folder / "analysis.html").write_text(analysis_page(summary.analysis))
    return {file.stem: file for file in folder.iterdir()}


class Opened:
    """A page in the browser, and what its console said."""

    def __init__(self, browser: Any, file: Path, width: int, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        self.page = self.context.new_page()
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def open_details(self) -> None:
        self.page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["small", "long", "analysis"])
def test_no_text_is_cut_off(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    with Opened(browser, pages[name], width) as opened:
        assert opened.page.evaluate(CUT_OFF) == []
        opened.open_details()
        assert opened.page.evaluate(CUT_OFF) == []
        assert opened.messages == []
        assert [url for url in opened.requests if not url.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1000, 1600])
def test_texts_have_contrast_and_elements_names(browser: Any, pages: dict[str, Path], theme: str, width: int) -> None:
    if not AXE.is_file():
        pytest.skip("axe-core is not installed; see CONTRIBUTING.md")
    with Opened(browser, pages["small"], width, color_scheme=theme) as opened:
        opened.open_details()
        opened.page.evaluate(AXE.read_text())
        result = opened.page.evaluate("axe.run()")
        assert [(one["id"], [node["html"] for node in one["nodes"]][:3]) for one in result["violations"]] == []
        assert any(one["id"] == "color-contrast" for one in result["passes"])


def test_the_buttons_choose_the_theme(browser: Any, pages: dict[str, Path]) -> None:
    def background(opened: Opened) -> Any:
        return opened.page.evaluate("getComputedStyle(document.body).backgroundColor")

    for system in ("light", "dark"):
        with Opened(browser, pages["small"], 1000, color_scheme=system, java_script_enabled=True) as opened:
            colors = {"auto": background(opened)}
            for choice in ("light", "dark", "auto"):
                opened.page.check(f"#theme-{choice}")
                colors[choice] = background(opened)
            assert colors["light"] != colors["dark"]
            assert colors["auto"] == colors[system]


def test_the_keyboard_reaches_search_and_order(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["small"], 1000) as opened:
        page = opened.page
        opened.open_details()
        box = page.locator("#search-all-operators")
        box.focus()
        page.keyboard.type("NET.PY:99 sort")
        rows = page.locator("#all-operators tbody tr:visible")
        assert rows.count() == 1
        assert "no such operator" in rows.first.inner_text()
        assert page.locator(".search[data-table=all-operators] [role=status]").inner_text() == "1 of 13 rows"
        box.fill("")
        assert rows.count() == 13
        heading = page.locator("#all-cycles thead th", has_text="cycles").first
        heading.locator("button").focus()
        page.keyboard.press("Enter")
        cycles = page.locator("#all-cycles tbody tr td[data-label=cycles]").all_inner_texts()
        assert cycles == sorted(cycles)
        page.keyboard.press("Enter")
        assert page.locator("#all-cycles tbody tr td[data-label=cycles]").all_inner_texts() == cycles[::-1]
        assert heading.get_attribute("aria-sort") == "descending"


def test_without_scripts_only_the_search_is_missing(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["small"], 1000, java_script_enabled=False) as opened:
        page = opened.page
        assert page.locator(".search:visible").count() == 0
        page.locator("summary", has_text="operators").first.click()
        assert page.locator("#all-operators tbody tr:visible").count() == 13
        assert opened.messages == []


def test_the_printed_page_is_light_and_has_the_rows_that_are_open(
    browser: Any, pages: dict[str, Path], tmp_path: Path
) -> None:
    with Opened(browser, pages["small"], 1000, color_scheme="dark") as opened:
        opened.page.emulate_media(media="print", color_scheme="dark")
        assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert opened.page.locator(".theme:visible").count() == 0
        assert opened.page.locator("#all-operators tbody tr:visible").count() == 0
        opened.open_details()
        assert opened.page.locator("#all-operators tbody tr:visible").count() == 13
        opened.page.pdf(path=tmp_path / "report.pdf", format="A4")
        assert (tmp_path / "report.pdf").stat().st_size > 20_000


def test_the_printed_page_is_as_wide_as_the_paper(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["small"], 718) as opened:  # A4 without Chromium's margins, at 96 dpi
        opened.page.emulate_media(media="print")
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= 718
