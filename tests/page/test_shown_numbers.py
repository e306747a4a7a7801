"""Numbers on the page need no second reading: they have units, and the digits that a difference needs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.page.html_tree import parsed
from tests.page.summaries import small_summary

from openneutron.page import page_of
from openneutron.page.differences import Difference


@pytest.mark.parametrize(
    ("unit", "numbers", "texts"),
    [
        ("", (953_521, 953_520), ("953,521", "953,520", "-1 (under 0.1 %)")),
        ("", (2_000, 1_000), ("2,000", "1,000", "-1,000 (-50.0 %)")),
        ("", (0, 5_482), ("0", "5,482", "+5,482")),
        ("", (None, 5), ("unknown", "5", "unknown")),
        ("dB", (31.38, 29.75), ("31.4 dB", "29.8 dB", "-1.63 dB")),
        ("points", (80.0, 81.35), ("80.00 %", "81.35 %", "+1.35 points")),
    ],
)
def test_numbers_of_two_builds_have_units_and_the_digits_of_their_difference(
    unit: str, numbers: tuple[float | None, float | None], texts: tuple[str, str, str]
) -> None:
    found = Difference("number", unit, *numbers)
    assert (found.other_text, found.this_text, found.text) == texts


@pytest.mark.parametrize(
    ("lost", "gained", "text"), [(48, 12, "p < 0.001;"), (5, 4, "p = 1.00;"), (9, 1, "p = 0.0215;")]
)
def test_a_small_p_value_has_no_exponent(lost: int, gained: int, text: str) -> None:
    summary = small_summary()
    one, *_ = summary.accuracy[-1].changed
    changed = (replace(one, is_lost=True),) * lost + (replace(one, is_lost=False),) * gained
    rows = (*summary.accuracy[:-1], replace(summary.accuracy[-1], changed=changed))
    shown = parsed(page_of(replace(summary, accuracy=rows, analysis=None))).text
    assert text in " ".join(shown.replace("\N{NO-BREAK SPACE}", " ").split())
