"""The page: valid HTML of at most 1 MB that loads nothing, with the numbers of `summary.json`."""

from __future__ import annotations

import builtins
import functools
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import vl_convert
from tests.page.html_tree import Element, parsed
from tests.page.summaries import large_summary, percentage_row, picture, small_summary

from openneutron.errors import OptionError, OutputError
from openneutron.page import AccuracyRow, SampleRow, Summary, page_of, write_page
from openneutron.page.charts import cycles_chart, histogram_chart, memory_chart, sqnr_chart, tensors_chart
from openneutron.page.content import Memory, PlacementRow
from openneutron.page.differences import differences_of, setting_differences
from openneutron.page.headings import differences_heading, errors_cancel, layers_heading, recipe_facts, resident_label
from openneutron.page.html import MOST_BYTES, analysis_page, breakable, is_picture
from openneutron.page.summary import summarize
from openneutron.page.units import measure_text
from openneutron.recovery import Recipe
from openneutron.results.layerwise_accuracy import Bins


@pytest.fixture(scope="module", autouse=True)
def draw_equal_charts_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vl_convert, "vegalite_to_svg", functools.cache(vl_convert.vegalite_to_svg))
        yield


@pytest.fixture(scope="module")
def summary() -> Summary:
    return Summary.from_json(small_summary().as_json())


@pytest.fixture(scope="module")
def page(summary: Summary) -> Element:
    other = replace(
        summary, date="2025-12-31", cycles=(summary.cycles or 0) - 1000, program_bytes=summary.program_bytes + 24,
        placement=summary.placement[:-1], options={"recover": "none"},
    )  # fmt: skip
    return parsed(page_of(summary, other))


def section(page: Element, name: str) -> Element:
    (found,) = page.all("section", id=name)
    return found


def table(page: Element, name: str, number: int = 0) -> list[list[str]]:
    return list(section(page, name).all("table"))[number].rows()


def count(value: int) -> str:
    return f"{value:,}"


# ------------------------------------------------------------------------------------------------------------ numbers


def test_accuracy_rows_equal_the_summary(page: Element, summary: Summary) -> None:
    for cells, row in zip(table(page, "accuracy")[1:], summary.accuracy, strict=True):
        assert row.value is not None
        assert row.interval is not None
        assert cells[:2] == [row.name, row.metric]
        assert float(cells[2].removesuffix(" %")) == pytest.approx(row.value, rel=0.005)
        assert [float(end) for end in cells[3].split(" to ")] == pytest.approx(row.interval, rel=0.005)
        assert cells[4] == count(row.samples)
        assert cells[5] == ("" if row is summary.accuracy[0] else f"{row.lost}, {row.gained}")
    assert summary.accuracy[1].lost == 6


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (81.35, "%", "81.35 %"), (100.0, "%", "100.00 %"), (0.0, "%", "0.00 %"), (None, "%", "unknown %"),
        (0.123456, "", "0.123"), (12.3456, "dB", "12.3 dB"),
    ],
)  # fmt: skip
def test_percentages_have_two_digits_after_the_point(value: float | None, unit: str, text: str) -> None:
    assert measure_text(value, unit) == text


def test_no_line_begins_with_a_unit(summary: Summary) -> None:
    page = page_of(summary)
    texts = re.findall(r"(?:<(?!td\b)[^<>]*>)([^<>]+)", page.partition("</style>")[2].partition("<script>")[0])
    assert not [text for text in texts if re.search(r"\d (%|dB|[KM]iB|ms|MHz|LSB|thousand)(?!\w)", text)]
    assert any("\N{NO-BREAK SPACE}dB" in text for text in texts)


def test_validation_rows_equal_the_summary(page: Element) -> None:
    assert table(page, "validation")[1:] == [
        ["output0", "float model", "31.2 dB", "0.999125", "0.0625", "3.00", "16"],
        ["output0", "int8 model", "no error", "1.000000", "0", "0", "16"],
    ]


def test_each_operator_has_its_place_module_source_and_reason(page: Element, summary: Summary) -> None:
    (rows,) = (one.rows()[1:] for one in page.all("table", id="all-operators"))
    shown = {int(row[0]): row[1:] for row in rows}
    for number, row in enumerate(summary.placement):
        place = "CPU" if row.where == "cpu" else f"NPU, delegate {row.partition}"
        op = "sort" if "sort" in row.op else "convolution"
        assert shown[number] == [row.node, op, place, row.module, row.source, row.reason or ""]
    assert next(row[1] for row in rows).startswith("sort")  # those on the CPU come first


def test_operators_are_counted_by_name(page: Element, summary: Summary) -> None:
    assert table(page, "placement")[1:] == [["sort", "0", "1"], ["convolution", "12", "0"]]
    on_cpu = table(page, "placement", 1)
    assert "runs on" not in on_cpu[0]
    assert on_cpu[1][-1] == "OpenNeutron has no such operator."
    row = summary.on_cpu[0]
    many = replace(summary, placement=(*summary.placement, *(replace(row, node=f"sort_{i}") for i in range(20))))
    assert table(parsed(page_of(many)), "placement")[1] == ["sort", "0", "21", f"{row.reason} (21 times)"]


@pytest.mark.parametrize(
    ("work", "utilization", "color"),
    [
        ("elements", 0.01, "--weights"), ("part", 0.0, "--weights"), ("convolution", 0.01, "--busy-0"),
        ("matrix_product", 0.3, "--busy-2"), ("", 0.9, "--busy-3"),
    ],
)  # fmt: skip
def test_only_products_are_colored_by_the_busy_share(
    summary: Summary, work: str, utilization: float, color: str
) -> None:
    chart = cycles_chart([replace(summary.layers[0], work=work, utilization=utilization)])
    assert chart is not None
    assert re.findall(r'fill="var\((--weights|--busy-\d)\)"', chart.wide) == [color]


def test_memory_equals_the_summary(page: Element, summary: Summary) -> None:
    memory, shown = summary.memory, {row[0]: row[1] for row in table(page, "memory")[1:]}
    assert shown["SRAM needed"] == count(memory.needed_bytes)
    assert shown["SRAM of the target"] == count(summary.target.sram_bytes or 0)
    assert shown["flash of the target"] == "unknown"
    assert shown["weights of all layers"] == count(memory.weight_bytes)
    assert shown["arena of intermediate tensors"] == count(memory.scratch_bytes)
    assert shown["largest sum of tensors alive"] == count(memory.peak_bytes)
    assert shown["planned by ExecuTorch, with inputs and outputs"] == count(memory.planned_bytes)
    assert shown["method allocator of ExecuTorch"] == count(memory.method_bytes)
    tensors = table(page, "memory", 1)[1:]
    assert tensors == [
        [
            one.name,
            " \N{MULTIPLICATION SIGN} ".join(map(str, one.shape)),
            count(one.bytes),
            count(one.offset),
            str(one.first),
            str(one.last),
        ]
        for one in memory.tensors
    ]


@pytest.mark.parametrize("layers", [1, 2, 12, 500], ids=lambda count: f"{count}_operators")
def test_the_number_of_an_operator_is_at_its_middle(summary: Summary, layers: int) -> None:
    tensors = tuple(one for one in summary.memory.tensors if one.last < layers) or summary.memory.tensors[:1]
    tensors = tuple(replace(one, first=min(one.first, layers - 1), last=min(one.last, layers - 1)) for one in tensors)
    memory = replace(summary.memory, tensors=tensors)
    longer = replace(summary, layers=(summary.layers * layers)[:layers], memory=memory)
    for chart in (memory_chart(longer), cycles_chart(longer.layers), tensors_chart(longer)):
        assert chart is not None
        for drawn in (chart.narrow, chart.wide):
            ticks = re.findall(r'text-anchor="middle" transform="translate\(([\d.]+),[\d.]+\)"[^>]*>(\d+)<', drawn)
            widths = [float(x) / (int(number) + 0.5) for x, number in ticks]
            assert widths
            assert widths == pytest.approx([widths[-1]] * len(widths), rel=0.01)
            assert 0 <= int(ticks[-1][1]) < layers


def test_the_chart_of_memory_ends_at_the_needed_bytes(summary: Summary) -> None:
    for memory in (replace(summary.memory, needed_bytes=3 << 20), summary.memory):
        shown = replace(summary, memory=memory)
        assert memory.resident_bytes + memory.scratch_bytes + memory.runtime_bytes == memory.needed_bytes
        keys = [one.text for one in section(parsed(page_of(shown)), "memory").all("li")]
        assert keys.count(resident_label(memory)) == 1


@pytest.mark.parametrize(
    ("both", "weights", "activations", "cancel"),
    [(34.9, 37.4, 32.5, True), (29.7, 39.5, 29.68, False), (20.0, 25.0, 21.0, False), (None, None, None, False),
     (30.0, None, 29.0, True)],
)  # fmt: skip
def test_the_page_says_if_errors_cancel(
    summary: Summary, both: float | None, weights: float | None, activations: float | None, *, cancel: bool
) -> None:
    assert summary.analysis is not None
    found = replace(summary.analysis, output_sqnr_db=both, weights_sqnr_db=weights, activations_sqnr_db=activations)
    assert errors_cancel(found) is cancel


def test_the_recipe_has_names_for_people() -> None:
    every = {one.name: str(one.default) for one in fields(Recipe)}
    labels = [label for label, _ in recipe_facts(every)]
    assert len(labels) == len(every)
    assert not [label for label in labels if "_" in label]
    assert recipe_facts({"new_field": "yes"}) == [("new_field", "yes")]


def test_settings_that_differ_have_the_names_of_the_page() -> None:
    summary = small_summary()
    this = replace(summary, options={"int8_io": "yes", "min_new_thing": "3"}, recipe={"range_by": "mse"})
    other = replace(summary, options={}, recipe={"range_by": "none"})
    assert list(setting_differences(this, other)) == [
        ("int8 inputs and outputs", "not given", "yes"),
        ("min new thing", "not given", "3"),
        ("ranges of activations", "selected by the observer", "mse"),
    ]
    page = page_of(this, other)
    assert "int8_io</" not in page
    assert "min_new_thing" not in page


@pytest.mark.parametrize("count", [5, 400])
def test_the_sqnr_of_many_layers_is_drawn_with_few_points(count: int) -> None:
    analysis = small_summary().analysis
    assert analysis is not None
    layers = tuple(replace(analysis.layers[0], position=i, node=f"n{i}", sqnr_db=20.0 + i % 7) for i in range(count))
    chart = sqnr_chart(replace(analysis, layers=layers, advice=()))
    assert chart is not None
    assert bool(chart.note) is (count > 60)
    for svg, most in ((chart.narrow, 60), (chart.wide, 180)):
        longest = max(path.count("L") + 1 for path in re.findall(r' d="(M[^"]*)"', svg))
        assert longest <= max(most, 5)


def test_layers_have_the_cycles_of_the_summary(page: Element, summary: Summary) -> None:
    (rows,) = (one.rows()[1:] for one in page.all("table", id="all-cycles"))
    for number, (cells, layer) in enumerate(zip(rows, summary.layers, strict=True)):
        assert cells[:4] == [str(number), layer.node, layer.operator, layer.module]
        assert cells[5] == count(layer.cycles)
        assert float(cells[6].removesuffix(" %")) == pytest.approx(100 * layer.cycles / (summary.cycles or 0), abs=0.06)
        assert float(cells[7].removesuffix(" %")) == pytest.approx(100 * layer.utilization, abs=0.06)
        assert cells[8:] == [count(layer.macs), count(layer.weight_bytes)]
    top = table(page, "cycles")[1:]
    assert [row[0] for row in top] == [str(number) for number in range(11, 1, -1)]


def test_cycles_are_summed_by_operator(summary: Summary) -> None:
    layers = tuple(
        replace(layer, operator="TANH" if number % 3 else "FULLY_CONNECTED", cycles=100, macs=number)
        for number, layer in enumerate(summary.layers)
    )
    mixed = parsed(page_of(replace(summary, layers=layers, cycles=1_200)))
    assert table(mixed, "cycles")[1:] == [
        ["TANH", "8", "800", "66.7 %", "48"], ["FULLY_CONNECTED", "4", "400", "33.3 %", "18"],
    ]  # fmt: skip
    few = parsed(page_of(replace(summary, layers=layers[:10])))
    assert table(few, "cycles")[0][0] == "position"


def test_samples_change_sides_only_for_top1_and_top5(summary: Summary) -> None:
    rows = [replace(row, metric="error", unit="", changed=()) for row in summary.accuracy]
    page = parsed(page_of(replace(summary, accuracy=tuple(rows))))
    assert "lost, gained" not in table(page, "accuracy")[0]
    assert not list(page.all("section", id="samples"))
    assert "Intervals are those of the mean" in page.text


@pytest.mark.parametrize(
    ("shares", "heading"),
    [
        ((0.419, 0.3, None), "The largest share of the error, 41.9 %, is that of conv2d_0 (block0.conv_0)."),
        ((-0.1, 0.003, None), "The largest share of the error, 0.3 %, is that of conv2d_1 (block1.conv_1)."),
        ((None, -0.2, None), "No layer needs treatment."),
    ],
)
def test_the_heading_of_the_layers_names_the_largest_share(
    summary: Summary, shares: tuple[float | None, ...], heading: str
) -> None:
    assert summary.analysis is not None
    layers = [replace(one, error_share=share) for one, share in zip(summary.analysis.layers, shares, strict=False)]
    found = layers_heading(replace(summary.analysis, advice=(), layers=tuple(layers)))
    assert found.endswith(heading)
    assert found.startswith("No layer needs treatment.")


def test_layers_have_the_accuracy_of_the_summary(page: Element, summary: Summary) -> None:
    assert summary.analysis is not None
    (rows,) = (one.rows()[1:] for one in page.all("table", id="all-layers"))
    for cells, layer in zip(rows, summary.analysis.layers, strict=True):
        assert layer.sqnr_db is not None
        assert cells[0] == str(layer.position)
        assert cells[1].startswith(layer.node)
        assert cells[4:6] == [f"{layer.sqnr_db:.1f} dB", "45.2 dB"]
        assert cells[8:] == ["1, 2 of 16", "3 of 16", "1"]
    assert [row[1] for row in table(page, "sqnr")[1:]] == ["21.5 dB", "25.2 dB", "27.8 dB"]


def test_the_differences_equal_two_summaries(page: Element, summary: Summary) -> None:
    rows = {row[0]: row[1:] for row in table(page, "differences")[1:]}
    assert rows["bytes of the .pte"] == [
        count(summary.program_bytes + 24),
        count(summary.program_bytes),
        "-24 (under 0.1 %)",
    ]
    assert rows["estimated cycles of the NPU"][2].startswith("+1,000 (+")
    assert rows["operators on the CPU"] == ["0", "1", "+1"]
    assert rows["top1 of .pte"] == ["90.50 %", "90.50 %", "equal"]
    assert rows["SQNR of the outputs"][2] == "equal"
    assert table(page, "differences", 1)[1:] == [
        ["sort_0", "sort", "not there", "CPU", "OpenNeutron has no such operator."]
    ]
    assert table(page, "differences", 2)[1:] == [["recover", "none", "auto"], ["calibrate", "not given", "photos/"]]


def test_a_lower_accuracy_is_worse_and_fewer_bytes_are_better(page: Element) -> None:
    rows = [row for row in section(page, "differences").all("tr") if "bytes of the .pte" in row.text]
    assert [cell.attributes["class"] for cell in rows[0].all("td")][-1] == "n better"


@pytest.mark.parametrize(
    ("samples", "note", "judgement"), [(800, "", "worse"), (80, " (on 80 and on 800 samples)", "")]
)
def test_accuracies_are_judged_on_equally_many_samples(
    summary: Summary, samples: int, note: str, judgement: str
) -> None:
    other = replace(summary, accuracy=(percentage_row(".pte", 91.0, samples),))
    (found,) = (one for one in differences_of(summary, other) if one.name.startswith("top1"))
    assert (found.name, found.judgement) == (f"top1 of .pte{note}", judgement)
    assert (found.text, found.other_text, found.this_text) == ("-0.50 points", "91.00 %", "90.50 %")


@pytest.mark.parametrize(
    ("moves", "heading"),
    [
        (0, "Each operator runs where it runs in the other build."),
        (1, "1 operator runs elsewhere than in the other build."),
        (2, "2 operators run elsewhere than in the other build."),
    ],
)
def test_the_heading_of_the_differences_counts_moves(moves: int, heading: str) -> None:
    assert differences_heading(moves) == heading


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [(1.0, {"0", "1", "2"}), (10.0, {"0", "10", "20"}), (1e-6, {"0", "1e-6"}), (1e-8, {"0", "1e-8"})],
)
def test_ticks_of_histograms_are_short_numbers(summary: Summary, scale: float, ticks: set[str]) -> None:
    assert summary.analysis is not None
    bins = Bins(-1.5 * scale, 2.25 * scale, (5, 9, 3), (5, 8, 4))
    texts = set(re.findall(r"<text[^>]*>([^<]*)</text>", histogram_chart(summary.analysis.layers[0], bins)))
    assert ticks <= texts
    assert "0.00" not in texts


def test_without_operators_on_the_cpu_no_column_is_empty(summary: Summary) -> None:
    page = parsed(page_of(replace(summary, placement=tuple(row for row in summary.placement if row.where == "npu"))))
    table = next(section(page, "placement").all("table"))
    assert table.rows()[0] == ["operator", "on the NPU"]


def test_headings_are_sentences(page: Element) -> None:
    headings = [" ".join(one.text.replace("estimate", "").split()) for one in page.all("h2")]
    assert headings == [
        "The top1 of .pte is 90.50 %, and that of float is 91.25 %.",
        "The outputs of the .pte have an SQNR of at least 31.2 dB against the float model, on 16 samples.",
        "12 of 13 operators run on the NPU, in 1 delegate; 1 runs on the CPU.",
        "The program needs 1.18 MiB of 7.50 MiB of SRAM.",
        "The NPU takes about 242 thousand cycles.",
        "The outputs of the int8 model have an SQNR of 21.5 dB against the float model, on 16 samples.",
        "The recurrent layer was measured with all of its steps.",
        "This layer loses most of the accuracy.",
        "6 samples are right only in float, and 3 only in .pte.",
        "1 operator runs elsewhere than in the other build.",
        "This is how the program was built.",
    ]


def test_estimates_are_marked(page: Element) -> None:
    for name in ("placement", "memory", "cycles"):
        assert any("estimate" in one.text for one in section(page, name).all("span", class_="estimate"))


# ----------------------------------------------------------------------------------------------------------- the file


def test_the_page_loads_nothing(summary: Summary) -> None:
    page = page_of(summary)
    sources = re.findall(r'(?:src|href|action|data)="([^"]*)"', page)
    assert sources
    assert all(one.startswith(("#", "data:image/png;base64,")) for one in sources)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|http://(?!www\.w3\.org)|https://", page)


def test_names_are_text_and_not_html(summary: Summary) -> None:
    assert "<1>" not in page_of(summary)
    hostile = replace(
        summary, model="<script>alert(1)</script>", options={"a": '"><img src=x onerror=alert(1)>'},
        placement=(PlacementRow("<b>", "aten.<i>.default", "cpu", None, "</table><script>", "a&b", '"'),),
    )  # fmt: skip
    page = page_of(hostile)
    assert "alert(1)</script>" not in page
    assert "<img src=x" not in page
    parsed(page)


def test_only_pictures_are_embedded(summary: Summary) -> None:
    assert is_picture(picture())
    for uri in ("http://there/a.png", "data:text/html;base64,AAAA", "data:image/svg+xml;base64,AAAA", "javascript:1"):
        assert not is_picture(uri)
        sample = SampleRow("a", "cat", "cat", "dog", True, uri)
        rows = (summary.accuracy[0], percentage_row(".pte", 80.0, 10, (sample,)))
        assert uri not in page_of(replace(summary, accuracy=rows))


def test_the_same_summary_gives_the_same_page(summary: Summary) -> None:
    assert page_of(summary) == page_of(summary)


def bare(summary: Summary) -> Summary:
    return replace(
        summary, accuracy=(), validation=(), analysis=None, options={}, recipe={}, versions={}, seconds={}, date=None,
        files=(), sections=(), inputs=(), outputs=(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("bare", bare),
        ("nothing on the NPU", lambda one: replace(
            one, layers=(), placement=one.placement[-1:], cycles=0, payload="none",
            memory=Memory("fits", 10, 0, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0))),
        ("no operators", lambda one: replace(bare(one), layers=(), placement=(), cycles=0)),
        ("all on the NPU", lambda one: replace(one, placement=one.placement[:-1])),
        ("one operator", lambda one: replace(
            one, layers=one.layers[:1], placement=one.placement[:1], memory=replace(one.memory, tensors=()))),
        ("device", lambda one: replace(bare(one), payload="device", layers=(), cycles=None)),
        ("memory unknown", lambda one: replace(one, target=replace(one.target, sram_bytes=None))),
        ("clock known", lambda one: replace(one, milliseconds=1.25, target=replace(one.target, clock_hz=150_000_000))),
        ("streamed", lambda one: replace(one, memory=replace(
            one.memory, verdict="fits with fetch_constants_to_sram", needed_bytes=340_000))),
        ("too large", lambda one: replace(one, memory=replace(
            one.memory, verdict="does not fit", needed_bytes=9 << 20, missing_bytes=1 << 20, blame=("CONV_2D 't1'",)))),
        ("another metric", lambda one: replace(
            one, accuracy=(AccuracyRow("float", 0.5, 10, None, (), "mAP", ""), AccuracyRow(".pte", None, 10)))),
        ("float only", lambda one: replace(one, accuracy=one.accuracy[:1])),
        ("exact", lambda one: replace(one, analysis=replace(
            one.analysis, output_sqnr_db=None, weights_sqnr_db=None, activations_sqnr_db=None, advice=(), layers=tuple(
                replace(layer, sqnr_db=None, own_sqnr_db=None, weights_sqnr_db=None, activations_sqnr_db=None,
                        error_share=None, histogram=None) for layer in one.analysis.layers)))),
        ("empty network", lambda one: replace(one, analysis=replace(one.analysis, layers=(), advice=()))),
        ("failures", lambda one: replace(one, failures=("Output 'output0' has 3 dB.", "Layer a has 9 LSB."))),
        ("samples without pictures", lambda one: replace(one, accuracy=(one.accuracy[0], replace(
            one.accuracy[1], changed=tuple(replace(c, picture=None) for c in one.accuracy[1].changed))))),
        ("legacy", lambda one: replace(one, flavor="SDK_25_06")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_every_part_may_be_missing(summary: Summary, name: str, change: Callable[[Any], Summary]) -> None:
    changed = change(summary)
    document = parsed(page_of(Summary.from_json(changed.as_json()), summary))
    assert "None" not in document.text
    assert "nan" not in re.findall(r"[a-z]+", document.text)


def test_a_page_of_a_large_network_stays_small_and_lists_omissions() -> None:
    name = "encoder.layers.{0}.self_attention.output_projection.with_a_long_name_{0}"
    summary = large_summary(4000, changed=3000, name=name)
    start = time.perf_counter()
    page = page_of(summary, replace(summary, placement=()))
    assert time.perf_counter() - start < 30
    assert len(page.encode()) <= MOST_BYTES
    text = " ".join(parsed(page).text.split())
    assert re.search(r"4,\d\d\d more rows are in summary.json", text)
    assert "All 3,000 samples" in text


def test_the_page_of_an_analysis_alone(summary: Summary) -> None:
    assert summary.analysis is not None
    document = parsed(analysis_page(summary.analysis))
    assert [one.attributes["id"] for one in document.all("section")] == ["sqnr", "recurrent", "layers"]


def test_long_names_may_break() -> None:
    assert str(breakable("first.second_c/<d>")) == "first.<wbr>second_c/&lt;d&gt;"
    assert str(breakable("features.2.conv.1.0")) == "features.2.<wbr>conv.1.0"
    assert str(breakable("DEPTHWISE_CONV_2D")) == "DEPTHWISE_<wbr>CONV_2D"
    assert str(breakable("a.b_c/<d>")) == "a.b_c/&lt;d&gt;"
    assert max(map(len, str(breakable("x" * 100)).split("<wbr>"))) == 24
    assert str(breakable("")) == ""


def test_commands_in_the_verdict_are_code(summary: Summary) -> None:
    ready = replace(summary, verdict=replace(summary.verdict, sentence="Use `a <b>`."))
    assert "Use <code>a &lt;b&gt;</code>." in page_of(ready)


def test_columns_without_any_value_are_left_out(summary: Summary) -> None:
    unknown = replace(
        summary, placement=tuple(replace(row, module=None, source=None) for row in summary.placement),
        layers=tuple(replace(row, module=None, source=None) for row in summary.layers),
    )  # fmt: skip
    document = parsed(page_of(unknown))
    assert table(document, "placement", 1)[0] == ["position", "node", "operator", "reason"]
    assert "module" not in table(document, "cycles")[0]


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("package", ["jinja2", "vl_convert"])
def test_a_missing_package_is_named_with_its_command(
    summary: Summary, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    load = builtins.__import__

    def fail(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == package:
            raise ImportError(f"No module named '{name}'", name=name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(OptionError, match=r"pip install 'openneutron\[report\]'"):
        page_of(summary)


def test_a_folder_that_does_not_exist_is_an_output_error(summary: Summary, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        write_page(tmp_path / "nowhere" / "report.html", summary)


def test_reading_summaries_and_writing_pages_need_no_torch() -> None:
    code = "import sys, openneutron.page; print([n for n in ('torch', 'executorch', 'vl_convert') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_page_of_mobilenet_takes_at_most_three_seconds_and_one_megabyte() -> None:
    """Measures summary and page, which is all that a build adds to the analysis."""
    import torch
    from benchmarks.zoo.torchvision_models import MissingTorchvisionError, torchvision_models
    from tests.flow_support import seeded

    from openneutron import lower, quantize
    from openneutron.accuracy import analyze

    try:
        model = seeded(torchvision_models().mobilenet_v2)
    except MissingTorchvisionError as error:
        pytest.skip(str(error))
    images = [torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    quantized = quantize(model.eval(), (images[0],), images, recover=None)
    program = lower(quantized)
    found = analyze(None, quantized, images[:1], program=program, candidates=1, share_samples=1)
    start = time.process_time()  # of all threads; other processes may take the processors meanwhile
    page = page_of(summarize("MobileNetV2", program, quantized=quantized, analysis=found))
    seconds = time.process_time() - start
    assert len(page.encode()) <= MOST_BYTES
    assert seconds < 3
