"""The content of a build as `summary.json`, and the page that shows it.

summary = summarize("ResNet20", program, quantized=quantized, analysis=found, date="2026-11-29")
Path("summary.json").write_text(summary.as_json())
write_page("report.html", summary)
"""

from openneutron.page.content import (
    AccuracyRow,
    FileRow,
    SampleRow,
    Summary,
    ValidationRow,
    Verdict,
)
from openneutron.page.html import page_of, write_page
from openneutron.page.summary import summarize, with_board_fit
from openneutron.results.intervals import wilson_interval

__all__ = [
    "AccuracyRow",
    "FileRow",
    "SampleRow",
    "Summary",
    "ValidationRow",
    "Verdict",
    "page_of",
    "summarize",
    "wilson_interval",
    "with_board_fit",
    "write_page",
]  # fmt: skip
