"""Judges a build: the verdict in one sentence, and the findings that block it or need a check."""

from __future__ import annotations

import math
from collections.abc import Iterator

from openneutron.core.numbers import in_percent
from openneutron.page.content import BLOCKED, CHECK, READY, AccuracyRow, AnalysisRows, Summary, Verdict
from openneutron.page.units import bytes_text, count_of, decibels_text, number_text
from openneutron.settings.declaration import RANDOM

__all__ = ["COSTLY_SHARE", "LOW_SQNR_DB", "SIGNIFICANCE", "is_beyond_chance", "mcnemar", "verdict_of"]

COSTLY_SHARE = 0.1
"""Operators on the CPU cost much if they take this share of the estimated cycles."""
SIGNIFICANCE = 0.05
LOW_SQNR_DB = 20.0
"""An SQNR of the outputs below this needs a decision: the analysis calls it unhealthy, too."""


def verdict_of(summary: Summary) -> Verdict:
    """Returns the verdict on a build. Its level is the level of the worst finding."""
    blocked, check = list(_blocked(summary)), list(_concerns(summary))
    reasons = (*blocked, *check)
    place = f"{summary.target.soc} ({summary.target.board or summary.target.name})"
    if blocked:
        return Verdict(BLOCKED, f"{summary.model} cannot go to the {place} as it is: {_joined(blocked)}.", reasons)
    if check:
        return Verdict(CHECK, f"{summary.model} runs on the {place}, but {_joined(check)}.", reasons)
    if summary.payload in ("portable", "mixed"):
        sentence = (
            f"{summary.model} is ready for NXP's converter: `openneutron compile` converts this portable "
            f"program to the device program for the {place}."
        )
        return Verdict(READY, sentence)
    return Verdict(READY, f"{summary.model} is ready for the {place}.")


def _blocked(summary: Summary) -> Iterator[str]:
    memory, target = summary.memory, summary.target
    if memory.verdict == "does not fit" and memory.on_board is not None:
        yield from (
            f"no region of the board has room for its {one.what} ({bytes_text(one.bytes)}, "
            f"{bytes_text(one.missing_bytes)} more than are free)"
            for one in memory.on_board.without_room
        )
    elif memory.verdict == "does not fit":
        yield (
            f"it needs {bytes_text(memory.needed_bytes)} of SRAM, {bytes_text(memory.missing_bytes)} more than there is"
            if memory.needed_bytes > (target.sram_bytes or 0)
            else f"its weights need {bytes_text(memory.missing_bytes)} more flash than there is"
        )
    if not any(row.where == "npu" for row in summary.placement):
        yield "no operator runs on the NPU"


def _concerns(summary: Summary) -> Iterator[str]:
    """Yields what a user should decide or check before a program is used, one clause for each."""
    if summary.options.get("calibrate") == RANDOM:
        yield "it was calibrated with random inputs, so only its memory and time are valid"
    if summary.memory.verdict == "fits with fetch_constants_to_sram":
        yield "it fits only with fetch_constants_to_sram, which leaves weights in flash"
    share = cpu_share(summary)
    if share is not None and share >= COSTLY_SHARE:
        count = count_of(len(summary.on_cpu), "operator")
        yield f"{count} on the CPU take{'s' if len(summary.on_cpu) == 1 else ''} about {in_percent(share)} of the time"
    for row in summary.accuracy[-1:]:
        if len(summary.accuracy) > 1 and is_beyond_chance(row, summary.accuracy[0]):
            yield _loss(row, summary.accuracy[0])
    analysis = summary.analysis
    if len(summary.accuracy) < 2 and analysis is not None and _is_low(analysis):  # no labelled samples tell more
        yield f"the SQNR of its outputs is only {decibels_text(analysis.output_sqnr_db)}"
    if summary.failures:
        count = count_of(len(summary.failures), "limit")
        yield f"the validation exceeds {count}: {summary.failures[0].rstrip('.')}"


def _is_low(analysis: AnalysisRows) -> bool:
    return bool(analysis.advice) or (analysis.output_sqnr_db is not None and analysis.output_sqnr_db < LOW_SQNR_DB)


def cpu_share(summary: Summary) -> float | None:
    """Returns the share of the estimated cycles that operators on the CPU take; None if it is unknown."""
    costs = [row.cpu_cycles for row in summary.on_cpu]
    if summary.cycles is None or any(cost is None for cost in costs):
        return None
    on_cpu = sum(cost for cost in costs if cost is not None)
    return on_cpu / max(1, on_cpu + summary.cycles)


def is_beyond_chance(row: AccuracyRow, reference: AccuracyRow) -> bool:
    """Whether `row` is worse than `reference` by more than chance explains.

    If the samples that changed sides are known, an exact McNemar test on them decides (two-sided, 5 %). Otherwise the
    value must be outside of the reference's interval.
    """
    if row.value is None or reference.value is None or row.metric != reference.metric:
        return row.value is None and reference.value is not None
    loss = reference.value - row.value if row.higher_is_better else row.value - reference.value
    if loss <= 0:
        return False
    if row.changed:
        return mcnemar(row.lost, row.gained) < SIGNIFICANCE
    if reference.interval is None:
        return False
    low, high = reference.interval
    return row.value < low if row.higher_is_better else row.value > high


def mcnemar(lost: int, gained: int) -> float:
    """Returns the two-sided p-value of McNemar's exact test: a binomial test of `lost` among all changed samples.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions", 1947.
    """
    changed, fewer = lost + gained, min(lost, gained)
    tail = sum(math.comb(changed, k) for k in range(fewer + 1))
    return min(1.0, float(2 * tail / 2**changed))


def _loss(row: AccuracyRow, reference: AccuracyRow) -> str:
    if row.value is None or reference.value is None:
        return f"the {row.metric} of {row.name} is not a number"
    points = abs(reference.value - row.value)
    unit = " points" if row.unit == "%" else f" {row.unit}".rstrip()
    return (
        f"{row.name} loses {number_text(points)}{unit} of {row.metric} against {reference.name}, which is beyond chance"
    )


def _joined(reasons: list[str]) -> str:
    return reasons[0] if len(reasons) == 1 else ", ".join(reasons[:-1]) + ", and " + reasons[-1]
