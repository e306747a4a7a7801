"""Writes a summary as one self-contained HTML page that works offline, printed, and without scripts."""

from __future__ import annotations

import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openneutron.core.files import write_file
from openneutron.core.progress import phase_bar
from openneutron.errors import OptionError
from openneutron.page import charts, differences, headings, units
from openneutron.page.accuracy import MOST_PICTURES
from openneutron.page.content import AnalysisRows, LayerRow, PlacementRow, ProfileRow, SampleRow, Summary
from openneutron.page.verdict import cpu_share, is_beyond_chance, mcnemar

__all__ = ["MOST_BYTES", "analysis_page", "check_page_packages", "page_of", "write_page"]

_PACKAGES = {"jinja2": "jinja2", "vl_convert": "vl-convert-python"}
"""The modules that the page needs, and the packages that have them."""

MOST_BYTES = 1 << 20
"""The largest size of a page."""
DRAWING_SHARES = (4, 1, 1, 3, 1)
"""Relative durations of drawing the charts of memory, tensors, cycles and accuracy, and of rendering the page. The
first chart also starts the drawing library."""
MOST_ROWS = (400, 200, 100, 50, 20)
"""The largest number of rows of a table: the first with which the page has at most `MOST_BYTES`."""
PICTURE_BYTES = 300_000
_TEXT_OUTSIDE_OF_CELLS = re.compile(r"(?:<(?!td\b)[^<>]*>)[^<>]+")
_NUMBER_AND_UNIT = re.compile(r"(\d) (%|points\b|dB\b|[KM]iB\b|B\b|ms\b|MHz\b|LSB\b|thousand\b|million\b|billion\b)")
TOP_LAYERS = 10
LONGEST_UNBROKEN = 14
SHORTEST_PART = 4


@dataclass(frozen=True)
class _Group:
    """The operators of one name: how many run where, and the different reasons of those on the CPU."""

    op: str
    on_npu: int
    on_cpu: int
    reasons: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class _Kind:
    """The operators of one kind on the NPU: their number, and the sums of their estimates."""

    operator: str
    times: int
    cycles: int
    macs: int


def write_page(
    path: str | os.PathLike[str],
    summary: Summary,
    other: Summary | None = None,
    compared: tuple[Summary, Summary] | None = None,
) -> None:
    """Writes `page_of(summary, other, compared)` to a file.

    Raises `OutputError` if the file cannot be written, and `OptionError` if an optional package is not installed.
    """
    write_file(path, page_of(summary, other, compared).encode(errors="backslashreplace"))


def page_of(summary: Summary, other: Summary | None = None, compared: tuple[Summary, Summary] | None = None) -> str:
    """Returns the page of a build, of at most `MOST_BYTES`. With `other`, it shows the differences to that build.

    If one of the two has no nodes, because it is a bare program, `compared` has the summaries of both bare programs,
    which are compared instead.

    Tables of large networks are cut; the page then names the number of rows that only `summary.json` has. Raises
    `OptionError` if jinja2 or vl-convert-python is not installed.
    """
    with phase_bar("Drawing", DRAWING_SHARES) as end_phase:
        drawn = {"memory": charts.memory_chart(summary) if summary.layers else None}
        end_phase()
        drawn["tensors"] = charts.tensors_chart(summary)
        end_phase()
        drawn["cycles"] = charts.cycles_chart(summary.layers)
        end_phase()
        analysis_values = _analysis_values(summary.analysis)
        end_phase()
        return _page(summary, drawn, analysis_values, other, compared)


def _page(
    summary: Summary,
    drawn: Mapping[str, charts.Chart | None],
    analysis_values: Mapping[str, Any],
    other: Summary | None,
    compared: tuple[Summary, Summary] | None,
) -> str:
    changed = summary.accuracy[-1].changed if len(summary.accuracy) > 1 else ()
    content = dict(
        summary=summary,
        title=f"{summary.model} on the {summary.target.soc}",
        groups=_groups(summary.placement),
        placement=_cpu_first(summary.placement),
        cpu_share=cpu_share(summary),
        top=_most_cycles(summary.layers),
        kinds=_kinds(summary.layers),
        counts_sides=len(summary.accuracy) > 1 and summary.accuracy[0].counts_sides,
        charts=drawn,
        shows_sram=charts.shows_sram(summary),
        pictures=_pictures(changed),
        changed=_lost_first(changed),
        beyond_chance=[is_beyond_chance(row, summary.accuracy[0]) for row in summary.accuracy],
        chance=None if not changed else mcnemar(summary.accuracy[-1].lost, summary.accuracy[-1].gained),
        other=other,
        measured=_measured(summary),
        **analysis_values,
        **_of_other(compared or (None if other is None else (summary, other))),
    )
    return _small_enough(_environment().get_template("report.html"), content)


def _small_enough(template: Any, content: Mapping[str, Any]) -> str:
    """Renders the page with as many rows as fit into it."""
    pages: Iterator[str] = (_with_units_unbroken(template.render(most_rows=most, **content)) for most in MOST_ROWS)
    page = ""
    for page in pages:
        if len(page.encode()) <= MOST_BYTES:
            break
    return page


def _with_units_unbroken(page: str) -> str:
    """Joins numbers and units by no-break spaces, so that no line begins with a unit. Cells of tables stay breakable,
    because they must fit into narrow columns.
    """
    return _TEXT_OUTSIDE_OF_CELLS.sub(lambda text: unbroken(text[0]), page)


def unbroken(text: str) -> str:
    """Joins numbers and units of a text by no-break spaces."""
    return _NUMBER_AND_UNIT.sub("\\1\N{NO-BREAK SPACE}\\2", text)


def analysis_page(analysis: AnalysisRows) -> str:
    """Returns a page that has only the sections about the accuracy of layers.

    Raises `OptionError` as `page_of` does.
    """
    title = "Accuracy by layer"
    return _small_enough(_environment().get_template("analysis.html"), {"title": title, **_analysis_values(analysis)})


def _analysis_values(analysis: AnalysisRows | None) -> dict[str, Any]:
    histograms = [] if analysis is None else [layer for layer in analysis.layers if layer.histogram is not None]
    return {
        "analysis": analysis,
        "sqnr": None if analysis is None else charts.sqnr_chart(analysis),
        "recurrent": [] if analysis is None else [(loop, charts.steps_chart(loop)) for loop in analysis.recurrent],
        "histograms": [
            (layer, charts.histogram_chart(layer, layer.histogram)) for layer in histograms if layer.histogram
        ],
    }


def _of_other(compared: tuple[Summary, Summary] | None) -> dict[str, Any]:
    if compared is None:
        return {"differences": [], "moves": [], "layer_changes": [], "settings": []}
    summary, other = compared
    return {
        "differences": differences.differences_of(summary, other),
        "moves": differences.moves_between(summary, other),
        "layer_changes": differences.layer_differences(summary, other),
        "settings": list(differences.setting_differences(summary, other)),
    }


def _groups(rows: Sequence[PlacementRow]) -> list[_Group]:
    """Returns the operators by name: those on the CPU first, then the most frequent."""
    names = Counter(row.op for row in rows)
    on_cpu = Counter(row.op for row in rows if row.where == "cpu")
    reasons: dict[str, Counter[str]] = {}
    for row in rows:
        if row.reason is not None:
            reasons.setdefault(row.op, Counter())[row.reason] += 1
    order = sorted(names, key=lambda op: (-on_cpu[op], -names[op], op))
    return [_Group(op, names[op] - on_cpu[op], on_cpu[op], tuple(reasons.get(op, Counter()).items())) for op in order]


def _cpu_first(rows: Sequence[PlacementRow]) -> list[tuple[int, PlacementRow]]:
    """Returns the rows with their position in the graph, those on the CPU first."""
    return sorted(enumerate(rows), key=lambda item: item[1].where == "npu")


def _most_cycles(layers: Sequence[LayerRow]) -> list[tuple[int, LayerRow]]:
    return sorted(enumerate(layers), key=lambda item: -item[1].cycles)[:TOP_LAYERS]


def _kinds(layers: Sequence[LayerRow]) -> list[_Kind]:
    """Returns the sums of each kind of operator, those with most cycles first.

    Returns none if there is one kind, or if the table of the layers with most cycles has all layers.
    """
    times = Counter(layer.operator for layer in layers)
    if len(layers) <= TOP_LAYERS or len(times) == 1:
        return []
    cycles, macs = Counter[str](), Counter[str]()
    for layer in layers:
        cycles[layer.operator] += layer.cycles
        macs[layer.operator] += layer.macs
    order = sorted(times, key=lambda name: (-cycles[name], name))
    return [_Kind(name, times[name], cycles[name], macs[name]) for name in order]


def _measured(summary: Summary) -> list[ProfileRow]:
    """Returns the rows of a profile, those whose estimates are most wrong first."""
    if summary.profile is None:
        return []
    return [*summary.profile.worst, *(row for row in summary.profile.rows if row.estimated is None)]


def _lost_first(changed: Sequence[SampleRow]) -> list[SampleRow]:
    return sorted(changed, key=lambda one: not one.is_lost)


def _pictures(changed: Sequence[SampleRow]) -> list[SampleRow]:
    """Returns the samples whose pictures fit into the page, lost ones first."""
    chosen: list[SampleRow] = []
    size = 0
    for one in _lost_first(changed):
        size += len(one.picture or "")
        if (
            one.picture is not None
            and is_picture(one.picture)
            and size <= PICTURE_BYTES
            and len(chosen) < MOST_PICTURES
        ):
            chosen.append(one)
    return chosen


def is_picture(uri: str) -> bool:
    """Whether a text is the `data:` URI of a picture that browsers show, so that the page loads nothing."""
    return uri.startswith(("data:image/png;base64,", "data:image/jpeg;base64,", "data:image/webp;base64,"))


def check_page_packages() -> None:
    """Raises `OptionError` if a package that the page needs is not installed. Does not import the packages."""
    missing = [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise OptionError(
            f"The report needs {' and '.join(missing)}, which is not installed: pip install 'openneutron[report]'."
        )


def _environment() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise OptionError(
            "The page needs jinja2, which is not installed: pip install 'openneutron[report]'. summary.json does not "
            "need it."
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("openneutron.page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        size=units.bytes_text, number=units.number_text, db=units.decibels_text, percent=units.percent_text,
        ends=units.range_text, breakable=breakable, unbroken=unbroken, code=with_code,
        count=lambda value: f"{value:,}", op=units.short_op,
        measure=units.measure_text, gain=units.gain_text,
        large=headings.large_text, count_of=units.count_of,
    )  # fmt: skip
    environment.globals.update(
        {name: getattr(headings, name) for name in headings.__all__},
        busy_classes=charts.BUSY_CLASSES,
    )
    return environment


def breakable(text: str) -> Any:
    """Escapes a name. Browsers may break a long name after dots, slashes, underscores and 24 other characters."""
    import markupsafe

    parts = [text] if len(text) <= LONGEST_UNBROKEN else re.findall(r"[^./_]{1,24}[./_]*|[./_]+", text)
    return markupsafe.Markup("<wbr>").join(_without_short_parts(parts))


def _without_short_parts(parts: Sequence[str]) -> list[str]:
    """Joins parts shorter than `SHORTEST_PART` with the part before, so that no line consists of one digit."""
    joined = [*parts[:1]]
    for part in parts[1:]:
        if len(part) < SHORTEST_PART and len(joined[-1]) + len(part) <= LONGEST_UNBROKEN:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def with_code(text: str) -> Any:
    """Escapes a text, and marks the parts between backticks as code."""
    import markupsafe

    return markupsafe.Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(markupsafe.escape(text))))
