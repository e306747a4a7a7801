"""The content of `summary.json`: its numbers, its verdict, and the errors of malformed files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.accuracy_models import images
from tests.page.summaries import percentage_row

from openneutron import NeutronProgram, QuantizedModel
from openneutron.accuracy import Analysis, analyze
from openneutron.accuracy.validate import validate
from openneutron.core.sources import portable_trace, short_source
from openneutron.errors import FormatError, InputError
from openneutron.formats import pte
from openneutron.formats.payload import parse
from openneutron.page import AccuracyRow, SampleRow, Summary, ValidationRow, summarize, wilson_interval
from openneutron.page.accuracy import accuracy_rows
from openneutron.page.content import AnalysisRows, PlacementRow
from openneutron.page.verdict import mcnemar, verdict_of
from openneutron.report.inspect import inspect_bytes
from openneutron.results.layerwise_accuracy import Advice
from openneutron.results.side_by_side import RunScores, SideBySide


@pytest.fixture(scope="module")
def found(healthy: QuantizedModel, net_program: NeutronProgram) -> Analysis:
    return analyze(None, healthy, images(3), program=net_program)


@pytest.fixture(scope="module")
def summary(healthy: QuantizedModel, net_program: NeutronProgram, found: Analysis) -> Summary:
    return summarize(
        "net", net_program, quantized=healthy, analysis=found, date="2026-01-02",
        options={"recover": None, "jobs": 2},
        accuracy=[percentage_row("float", 90.0, 100), percentage_row(".pte", 89.0, 100)],
        validation=[ValidationRow("output0", 40.5, 0.9999, 0.01, 2.0)], files={"model.pte": len(net_program.buffer)},
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ numbers


def test_the_numbers_equal_the_program(summary: Summary, net_program: NeutronProgram) -> None:
    estimate = net_program.estimate()
    assert (summary.cycles, summary.macs) == (estimate.cycles, estimate.macs)
    assert summary.memory.needed_bytes == estimate.fit.needed_bytes
    assert summary.memory.runtime_bytes == (estimate.memory.total_bytes if estimate.memory else None)
    assert [layer.cycles for layer in summary.layers] == [layer.cycles for layer in estimate.layers]
    assert [row.node for row in summary.placement] == [row.node for row in net_program.placement]
    assert sum(section.bytes for section in summary.sections) == summary.program_bytes == len(net_program.buffer)


def test_each_layer_on_the_npu_names_its_node_and_module(summary: Summary, net_program: NeutronProgram) -> None:
    rows = {row.node: row for row in net_program.placement}
    assert summary.layers
    for layer in summary.layers:
        assert layer.node in rows
        assert layer.module == rows[layer.node].module
    convolutions = [layer.node for layer in summary.layers if layer.operator == "CONV_2D"]
    assert convolutions == [row.node for row in net_program.placement if "convolution" in row.op][: len(convolutions)]


def test_the_live_bytes_of_each_layer_equal_its_tensors(summary: Summary) -> None:
    for number, layer in enumerate(summary.layers):
        alive = [one.bytes for one in summary.memory.tensors if one.first <= number <= one.last]
        assert sum(alive) == layer.live_bytes


def test_operators_on_the_cpu_have_a_reason_and_a_cost(summary: Summary) -> None:
    (linear,) = summary.on_cpu
    assert linear.reason
    assert linear.cpu_cycles is not None
    assert linear.cpu_cycles > 0


def test_the_analysis_keeps_the_histograms_of_the_worst_layers_only(summary: Summary, found: Analysis) -> None:
    rows = summary.analysis
    assert rows is not None
    assert [row.node for row in rows.layers] == [layer.node for layer in found.layers]
    assert [row.histogram is not None for row in rows.layers] == [index < 6 for index in range(len(rows.layers))]
    assert rows.output_sqnr_db == found.output_sqnr_db
    assert any(row.tolerance is not None for row in rows.layers)


def test_a_bare_file_gives_the_same_estimates(summary: Summary, net_program: NeutronProgram, tmp_path: Path) -> None:
    net_program.save(tmp_path / "net.pte")
    bare = summarize("net", tmp_path / "net.pte")
    assert (bare.cycles, bare.memory, bare.target) == (summary.cycles, summary.memory, summary.target)
    assert [row.op for row in bare.on_cpu] == ["aten::permute_copy.out", "aten::addmm.out"]
    assert len([row for row in bare.placement if row.where == "npu"]) == len(bare.layers)
    assert Summary.from_json(bare.as_json()) == bare


def test_a_tflite_file_is_refused(net_program: NeutronProgram) -> None:
    call = pte.read(net_program.buffer).methods[0].delegates[0]
    assert inspect_bytes(parse(call.payload).tflite, "it").format == "tflite"
    with pytest.raises(InputError, match=r"needs an ExecuTorch program \(\.pte\)"):
        summarize("net", parse(call.payload).tflite)


def test_a_validation_becomes_rows_and_failures(healthy: QuantizedModel, net_program: NeutronProgram) -> None:
    found = validate(net_program, quantized=healthy, samples=2, min_sqnr_db=200.0)
    summary = summarize("net", net_program, quantized=healthy, validation=found)
    assert [(row.sqnr_db, row.reference, row.samples) for row in summary.validation] == [
        (one.sqnr_db if math.isfinite(one.sqnr_db) else None, one.reference, 2) for one in found.outputs
    ]
    assert summary.failures == found.failures
    assert summary.failures
    assert summary.verdict.level == "check"


def test_options_are_text(summary: Summary) -> None:
    assert summary.options == {"recover": "none", "jobs": "2"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("/usr/lib/python3/site-packages/torchvision/models/vgg.py:12", "torchvision/models/vgg.py:12"),
        (f"{Path.cwd().as_posix()}/models/net.py:3", "models/net.py:3"),
        ("/elsewhere/net.py:3", "/elsewhere/net.py:3"),
        ("site-packages/torchvision/models/vgg.py:12", "torchvision/models/vgg.py:12"),
        ("net.py:3", "net.py:3"),
    ],
)
def test_source_lines_do_not_depend_on_the_place_of_the_project(source: str, expected: str) -> None:
    assert short_source(source) == expected


def test_source_lines_are_relative_to_a_given_folder() -> None:
    assert short_source("/here/nets/net.py:3", "/here/nets") == "net.py:3"
    assert short_source("/here/blocks/conv.py:3", "/here/nets") == "../blocks/conv.py:3"
    assert short_source("net.py:3", "/here/nets") == "net.py:3"


def test_stack_traces_keep_the_names_of_packages() -> None:
    here = Path(torch.__file__).parent
    trace = (
        f'  File "/here/nets/net.py", line 3, in forward\n    x = 1\n  File "{here}/nn/linear.py", line 7, in forward\n'
    )
    found = portable_trace(trace, "/here/nets")
    assert found == trace.replace("/here/nets/", "").replace(str(here), "site-packages/torch")


@pytest.mark.parametrize(
    ("percentage", "samples", "expected"),
    [
        # Computed with statsmodels.stats.proportion.proportion_confint(count, nobs, method="wilson").
        (90.0, 100, (82.56, 94.48)),
        (100.0, 10, (72.25, 100.0)),
        (0.0, 10, (0.0, 27.75)),
        (0.0, 0, (0.0, 100.0)),
    ],
)
def test_wilson(percentage: float, samples: int, expected: tuple[float, float]) -> None:
    assert wilson_interval(percentage, samples) == pytest.approx(expected, abs=0.01)


# ----------------------------------------------------------------------------------------------------------- accuracy


def test_results_side_by_side_become_rows_with_thumbnails(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    files = [tmp_path / f"{number}.png" for number in range(4)]
    for file in files:
        image.new("RGB", (200, 100), "red").save(file)
    results = SideBySide(
        "top1",
        (RunScores("float", 75.0, (100.0, 100.0, 100.0, 0.0), (0, 1, 0, 0)),
         RunScores(".pte", 50.0, (100.0, 0.0, 0.0, 100.0), (0, 0, 1, 1))),
        labels=(0, 1, 0, 1), names=("a", "b", "c", "d"), paths=tuple(files), classes=("cat", "dog"),
    )  # fmt: skip
    first, last = accuracy_rows(results)
    assert (first.value, first.samples, first.changed) == (75.0, 4, ())
    assert last.interval == wilson_interval(50.0, 4)
    assert (last.lost, last.gained) == (2, 1)
    assert [(one.name, one.label, one.before, one.after, one.is_lost) for one in last.changed] == [
        ("b", "dog", "dog", "cat", True), ("c", "cat", "cat", "dog", True), ("d", "dog", "cat", "dog", False),
    ]  # fmt: skip
    assert all((one.picture or "").startswith("data:image/jpeg;base64,") for one in last.changed)


def test_a_function_as_metric_has_no_changed_samples() -> None:
    runs = (RunScores("float", 1.0, (1.0, 1.0)), RunScores(".pte", float("nan"), (1.0, float("nan"))))
    first, last = accuracy_rows(SideBySide("file.py:score", runs))
    assert (first.unit, first.changed) == ("", ())
    assert (last.value, last.interval) == (None, None)


# ------------------------------------------------------------------------------------------------------------- format


def test_json_and_back(summary: Summary) -> None:
    text = summary.as_json()
    assert Summary.from_json(text) == summary
    assert Summary.from_json(text.encode()).as_json() == text


def changed(text: str, change: Callable[[dict[str, Any]], object]) -> str:
    data = json.loads(text)
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(format_version=99), "has version 99 .* this OpenNeutron reads version 1"),
        (lambda data: data.pop("format_version"), "is not a summary of a build"),
        (lambda data: data.pop("model"), "lacks the field 'model'"),
        (lambda data: data.update(colour="red"), "has an unknown field 'colour'"),
        (lambda data: data.update(model=3), "'model': expected text, found 3"),
        (lambda data: data.update(cycles=1.5), "'cycles': expected an integer, found 1.5"),
        (lambda data: data.update(cycles=True), "'cycles': expected an integer, found True"),
        (lambda data: data.update(layers={}), "'layers': expected a list"),
        (lambda data: data["placement"][1].update(where=None), r"'placement'\[1\], 'where': expected text, found None"),
        (lambda data: data["placement"].append("x"), "expected an object, found 'x'"),
        (lambda data: data["memory"].update(tensors=[{}]), r"'memory', 'tensors'\[0\] lacks the field 'name'"),
        (lambda data: data["accuracy"][0].update(interval=[1]), "'interval': expected a list of 2"),
        (lambda data: data.update(options=[]), "'options': expected an object"),
        (lambda data: data["accuracy"][0].update(higher_is_better=1), "'higher_is_better': expected true or false"),
    ],
)  # fmt: skip
def test_a_malformed_field_is_named(summary: Summary, change: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(FormatError, match=f"^out/summary.json.*{message}"):
        Summary.from_json(changed(summary.as_json(), change), "out/summary.json")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"text"', b"\xff\xfe", "[" * 100_000, '{"format_version": NaN}']
)
def test_other_text_is_refused(text: str | bytes) -> None:
    with pytest.raises(FormatError, match="summary"):
        Summary.from_json(text)


def test_infinite_numbers_are_refused_in_writing_and_reading(summary: Summary) -> None:
    with pytest.raises(FormatError, match="cannot be written"):
        replace(summary, milliseconds=float("nan")).as_json()
    text = summary.as_json().replace('"milliseconds": null', '"milliseconds": Infinity')
    assert "Infinity" in text
    with pytest.raises(FormatError, match="'milliseconds': expected a number, found inf"):
        Summary.from_json(text)


# ------------------------------------------------------------------------------------------------------------ verdict


def rows(lost: int, gained: int, samples: int = 200) -> list[AccuracyRow]:
    changes = [SampleRow(f"{i}.png", "cat", "cat", "dog", True) for i in range(lost)]
    changes += [SampleRow(f"{i}.jpg", "cat", "dog", "cat", False) for i in range(gained)]
    value = 90.0 - 100 * (lost - gained) / samples
    before = percentage_row("float", 90.0, samples)
    return [before, percentage_row(".pte", value, samples, tuple(changes))]


def on_cpu(cycles: int | None) -> PlacementRow:
    return PlacementRow("sort", "aten.sort.default", "cpu", None, "it is not supported", cpu_cycles=cycles)


ADVICE = Advice("a", None, "why", "what", "", None)
NPU = PlacementRow("conv2d", "aten.convolution.default", "npu", 0)


@pytest.mark.parametrize(
    ("change", "level", "sentence"),
    [
        ({}, "ready", "ready for NXP's converter: `openneutron compile`"),
        ({"payload": "device"}, "ready", r"^net is ready for the i\.MX RT700 \(imxrt700\)\.$"),
        ({"placement": (on_cpu(1000),)}, "blocked", "no operator runs on the NPU"),
        ({"placement": (NPU, on_cpu(None))}, "ready", "ready"),
        ({"placement": (NPU, on_cpu(10)), "cycles": 1000}, "ready", "ready"),
        ({"placement": (NPU, on_cpu(1000)), "cycles": 1000}, "check", "1 operator on the CPU takes about 50 %"),
        ({"placement": (NPU, on_cpu(500), on_cpu(500)), "cycles": 1000}, "check", "2 operators on the CPU take"),
        ({"accuracy": rows(1, 0)}, "ready", "ready"),
        ({"accuracy": rows(5, 5)}, "ready", "ready"),
        ({"accuracy": rows(0, 20)}, "ready", "ready"),
        ({"accuracy": rows(20, 2)}, "check", r"\.pte loses 9\.00 points of top1 against float, which is beyond chance"),
        (
            {"accuracy": [percentage_row("float", 90.0, 100), percentage_row(".pte", 89.0, 100)]},
            "ready",
            "ready",
        ),
        (
            {"accuracy": [percentage_row("float", 90.0, 100), percentage_row(".pte", 70.0, 100)]},
            "check",
            "loses 20.0 points",
        ),
        (
            {"accuracy": [AccuracyRow("float", 0.5, 9, metric="mae", unit=""), AccuracyRow(".pte", None, 9)]},
            "check",
            "is not a number",
        ),
        ({"analysis": AnalysisRows("Treat a.", 4, 4, 9.5, 10.0, 20.0, (), (ADVICE,))}, "check",
         r"but the SQNR of its outputs is only 9\.5 dB\.$"),
        ({"analysis": AnalysisRows("Treat all.", 4, 4, -0.04, -9.0, 0.0, ())}, "check", r"is only 0\.0 dB\.$"),
        ({"analysis": AnalysisRows("Treat all.", 4, 4, 19.9, 20.0, 30.0, ())}, "check", r"is only 19\.9 dB\.$"),
        ({"analysis": AnalysisRows("Well.", 4, 4, 20.0, 22.0, 30.0, ())}, "ready", "ready"),
        ({"analysis": AnalysisRows("Well.", 4, 4, None, None, None, ())}, "ready", "ready"),
        ({"analysis": AnalysisRows("Treat a.", 4, 4, 9.5, 10.0, 20.0, (), (ADVICE,)), "accuracy": rows(0, 0)}, "ready",
         "ready"),
        ({"failures": ("Output 'output0' has 3.0 dB against float, below 20.",)}, "check",
         r"the validation exceeds 1 limit: Output 'output0' has 3\.0 dB against float, below 20\.$"),
    ],
)  # fmt: skip
def test_the_verdict_names_the_findings_that_block(
    summary: Summary, change: dict[str, Any], level: str, sentence: str
) -> None:
    plain = replace(summary, placement=(NPU,), accuracy=(), validation=(), analysis=None)
    verdict = verdict_of(replace(plain, **change))
    assert verdict.level == level
    assert re.search(sentence, verdict.sentence)
    assert (not verdict.reasons) == (level == "ready")


def test_a_program_that_does_not_fit_is_blocked(summary: Summary) -> None:
    memory = replace(summary.memory, verdict="does not fit", needed_bytes=9 << 20, missing_bytes=3 << 19)
    verdict = verdict_of(replace(summary, memory=memory))
    assert verdict.level == "blocked"
    assert "it needs 9.00 MiB of SRAM, 1.50 MiB more than there is" in verdict.sentence


@pytest.mark.parametrize(
    ("lost", "gained", "expected"),
    [(0, 0, 1.0), (5, 5, 1.0), (6, 0, 0.03125), (0, 6, 0.03125), (9, 1, 0.021484375)],  # scipy.stats.binomtest
)
def test_mcnemar(lost: int, gained: int, expected: float) -> None:
    assert mcnemar(lost, gained) == pytest.approx(expected)
