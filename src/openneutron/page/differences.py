"""Compares the summaries of two builds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from openneutron.page.content import PlacementRow, Summary
from openneutron.page.headings import option_facts, recipe_facts
from openneutron.page.units import number_text, short_op

__all__ = ["Difference", "Move", "differences_of", "layer_differences", "moves_between", "setting_differences"]

MOST_LAYERS = 10
SMALLEST_PERCENT = 0.1
"""The smallest change in percent that is shown as a number."""
_NUMBERED = re.compile(r"call \d+|t\d+")
"""The name of a kernel call of a bare `.pte`, or of an operator of its TFLite models: that of its output."""


@dataclass(frozen=True)
class Difference:
    """A number of two builds. None is unknown."""

    name: str
    """What the number is."""
    unit: str
    """Its unit; empty for counts and bytes."""
    other: float | None
    """The number of the other build, which is the first program of `openneutron compare`."""
    this: float | None
    """The number of this build, which is the second program of `openneutron compare`."""
    higher_is_better: bool = False
    """Whether a higher number is better."""
    is_comparable: bool = True
    """Whether both numbers were measured on equally many samples."""

    @property
    def change(self) -> float | None:
        """This minus other; None if one of them is unknown."""
        return None if self.other is None or self.this is None else self.this - self.other

    @property
    def text(self) -> str:
        """The change with its sign, and in percent of the other build for sizes and times."""
        change = self.change
        if change is None:
            return "unknown"
        if change == 0:
            return "equal"
        sign = "+" if change > 0 else "-"
        percent = self._percent(change) if self.other and not self.unit else ""
        return f"{sign}{self._number(abs(change))} {self.unit}".rstrip() + percent

    @property
    def other_text(self) -> str:
        """The number of the other build with its unit."""
        return self._with_unit(self.other)

    @property
    def this_text(self) -> str:
        """The number of this build with its unit."""
        return self._with_unit(self.this)

    def _with_unit(self, value: float | None) -> str:
        unit = "%" if self.unit == "points" else self.unit
        return "unknown" if value is None else f"{self._number(value)} {unit}".rstrip()

    def _number(self, value: float) -> str:
        """Returns a number with as many digits as the difference needs: two after the point for percentages."""
        if self.unit == "points":
            return f"{value:.2f}"
        return f"{value:,}" if isinstance(value, int) else number_text(value)

    def _percent(self, change: float) -> str:
        percent = 100 * change / (self.other or 1)
        return f" ({percent:+.1f} %)" if abs(percent) >= SMALLEST_PERCENT else f" (under {SMALLEST_PERCENT} %)"

    @property
    def judgement(self) -> str:
        """ "better", "worse" or ""."""
        if not self.change or not self.is_comparable:
            return ""
        return "better" if (self.change > 0) == self.higher_is_better else "worse"


@dataclass(frozen=True)
class Move:
    """An operator that runs elsewhere in this build, or that only one build has."""

    node: str
    """Name of the operator's node, or its kernel and the number of the call in a bare `.pte`."""
    op: str
    other: str
    """Where it runs in the other build, the first program of `openneutron compare`: "NPU", "CPU" or "not there"."""
    this: str
    """Where it runs in this build, the second program."""
    reason: str | None
    """The reason why it is on the CPU in this build; None if it is not."""


def differences_of(summary: Summary, other: Summary) -> list[Difference]:
    """Returns the numbers that both builds have: sizes, cycles, memory, placement, accuracy, SQNR."""
    rows: list[tuple[str, Callable[[Summary], float | None]]] = [
        ("bytes of the .pte", lambda one: one.program_bytes),
        ("estimated cycles of the NPU", lambda one: one.cycles),
        ("multiply-accumulates", lambda one: one.macs),
        ("bytes of SRAM needed", lambda one: one.memory.needed_bytes),
        ("bytes of weights", lambda one: one.memory.weight_bytes),
        ("bytes of the arena", lambda one: one.memory.scratch_bytes),
        ("bytes planned by ExecuTorch", lambda one: one.memory.planned_bytes),
        ("operators on the CPU", lambda one: len(one.on_cpu)),
        ("delegates", lambda one: len({row.partition for row in one.placement if row.where == "npu"})),
    ]
    found = [Difference(name, "", value(other), value(summary)) for name, value in rows]
    before = {(row.name, row.metric): row for row in other.accuracy}
    for row in summary.accuracy:
        if (match := before.get((row.name, row.metric))) is not None:
            unit = "points" if row.unit == "%" else row.unit
            is_comparable = row.samples == match.samples
            note = "" if is_comparable else f" (on {match.samples:,} and on {row.samples:,} samples)"
            name = f"{row.metric} of {row.name}{note}"
            found.append(Difference(name, unit, match.value, row.value, row.higher_is_better, is_comparable))
    if summary.analysis is not None and other.analysis is not None:
        values = other.analysis.output_sqnr_db, summary.analysis.output_sqnr_db
        found.append(Difference("SQNR of the outputs", "dB", *values, higher_is_better=True))
    return found


def moves_between(summary: Summary, other: Summary) -> list[Move]:
    """Returns the operators whose place differs, in the order of this build, then those that only the other has."""
    before, after = _by_name(other.placement), _by_name(summary.placement)
    moved = [
        Move(name, row.op, _place(before.get(name)), _place(row), row.reason)
        for name, row in after.items()
        if _place(before.get(name)) != _place(row)
    ]
    gone = [Move(name, row.op, _place(row), _place(None), None) for name, row in before.items() if name not in after]
    return [*moved, *gone]


def _by_name(rows: Sequence[PlacementRow]) -> dict[str, PlacementRow]:
    """Returns the rows by the names of their nodes.

    A bare `.pte` numbers its kernel calls and the tensors of its delegates. One operator more in one of two programs
    would change all later numbers, so such an operator is named by the number of the earlier ones of its kind.
    """
    found: dict[str, PlacementRow] = {}
    calls: Counter[str] = Counter()
    for row in rows:
        name = row.node
        if not row.module and not row.source and _NUMBERED.fullmatch(name):
            calls[row.op] += 1
            name = f"{short_op(row.op)}, call {calls[row.op]}"
        found[name] = row
    return found


def _place(row: PlacementRow | None) -> str:
    return "not there" if row is None else row.where.upper()


def layer_differences(summary: Summary, other: Summary) -> list[Difference]:
    """Returns the nodes whose estimated cycles on the NPU changed most, the largest change first."""
    before, after = _cycles(other), _cycles(summary)
    changed = (Difference(node, "", before.get(node, 0), after.get(node, 0)) for node in {**after, **before})
    return sorted((one for one in changed if one.change), key=lambda one: -abs(one.change or 0))[:MOST_LAYERS]


def _cycles(summary: Summary) -> dict[str, int]:
    cycles: dict[str, int] = {}
    for layer in summary.layers:
        if layer.node is not None:
            cycles[layer.node] = cycles.get(layer.node, 0) + layer.cycles
    return cycles


def setting_differences(summary: Summary, other: Summary) -> Iterator[tuple[str, str, str]]:
    """Returns the name of each setting that differs, with its text in the other and in this build.

    Options and recipes have the names and values of the section about the recipe.
    """
    facts: dict[str, Callable[[Mapping[str, str]], Iterable[tuple[str, str]]]]
    facts = {"options": option_facts, "recipe": recipe_facts, "versions": Mapping.items}
    for group, facts_of in facts.items():
        after, before = (dict(facts_of(getattr(one, group))) for one in (summary, other))
        for name in {**after, **before}:
            if after.get(name) != before.get(name):
                yield name, before.get(name, "not given"), after.get(name, "not given")
    for name, value, old in (
        ("target", summary.target.name, other.target.name),
        ("flavor", summary.flavor or "modern generation", other.flavor or "modern generation"),
        ("payload", summary.payload, other.payload),
    ):
        if value != old:
            yield name, old, value
