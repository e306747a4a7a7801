"""Summaries and pages of programs of every kind: device programs, several delegates, states, float parts, nothing on
the NPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.accuracy_models import images, net, quantized, sabotaged
from tests.flow_support import seeded
from tests.page.html_tree import parsed
from tests.page.summaries import small_summary
from tests.vendor.test_sdk import DOUBLES
from torch import Tensor, nn

from openneutron import NeutronProgram, QuantizedModel, lower, quantize
from openneutron.accuracy import analyze
from openneutron.page import Summary, page_of, summarize


class Streaming(nn.Module):
    """A network with a state and two outputs, one of which is a number that is not quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("state", torch.zeros(1, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        state: Tensor = self.state  # type: ignore[assignment]
        value = torch.relu(self.linear(x + state))
        state.copy_(value)
        return value, x.argmax(1)


def streaming() -> QuantizedModel:
    return quantize(seeded(Streaming), (torch.ones(1, 8),), [torch.ones(1, 8), -torch.ones(1, 8)], recover=None)


def apart(**options: Any) -> Callable[[QuantizedModel], NeutronProgram]:
    return lambda model: lower(model, **options)


CASES: dict[str, tuple[Callable[[], QuantizedModel], Callable[[QuantizedModel], NeutronProgram]]] = {
    "one delegate": (lambda: quantized(net()), lower),
    "two delegates": (lambda: quantized(net()), apart(operators_not_to_delegate=["conv2d_1"])),
    "int8 inputs and outputs": (lambda: quantized(net()), apart(int8_io=True)),
    "a layer to treat": (lambda: quantized(sabotaged()), lower),
    "state": (streaming, lower),
    "another target": (lambda: quantized(net(), target="imx95"), lower),
    "legacy": (lambda: quantized(net()), apart(neutron_converter_flavor="SDK_25_06", payload="portable")),
}


@pytest.mark.parametrize("name", CASES)
def test_a_program_of_any_kind_has_a_summary_and_a_page(name: str) -> None:
    build, lowered = CASES[name]
    model = build()
    program = lowered(model)
    data = [torch.ones(1, 8)] if name == "state" else images(2)
    summary = summarize(name, program, quantized=model, analysis=analyze(None, model, data))
    assert Summary.from_json(summary.as_json()) == summary
    estimate = program.estimate()
    assert (summary.cycles, summary.memory.needed_bytes) == (estimate.cycles, estimate.fit.needed_bytes)
    assert {layer.node for layer in summary.layers} <= {None, *(row.node for row in summary.placement)}
    assert {layer.delegate for layer in summary.layers} == {row.partition for row in summary.placement} - {None}
    for number, layer in enumerate(summary.layers):
        assert layer.live_bytes == sum(one.bytes for one in summary.memory.tensors if one.first <= number <= one.last)
    parsed(page_of(summary))


def test_nothing_on_the_npu_is_blocked() -> None:
    with pytest.warns(UserWarning, match="Nothing of this program runs on the NPU"):
        program = lower(quantize(nn.Conv2d(4, 4, 1).eval(), torch.ones(1, 4, 2, 2), [torch.ones(1, 4, 2, 2)]),
                        operators_not_to_delegate=["conv2d"])  # fmt: skip
    summary = summarize("cpu", program)
    assert (summary.payload, summary.verdict.level) == ("none", "blocked")
    parsed(page_of(summary))


def test_a_device_program_has_the_sizes_of_its_microcode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(DOUBLES))
    monkeypatch.setenv("OPENNEUTRON_CACHE", str(tmp_path / "cache"))
    model = quantized(net())
    program, portable = lower(model, payload="device"), lower(model, payload="portable")
    summary, estimated = summarize("net", program, quantized=model), summarize("net", portable, quantized=model)
    assert (summary.payload, estimated.payload) == ("device", "portable")
    assert summary.layers == estimated.layers
    assert summary.program_bytes == len(program.buffer)
    assert summary.memory.weight_bytes != estimated.memory.weight_bytes
    assert "converter" not in summary.verdict.sentence
    bare = summarize("net", program.buffer)
    assert (bare.payload, bare.cycles, bare.layers) == ("device", None, ())
    assert bare.memory.weight_bytes == summary.memory.weight_bytes
    parsed(page_of(bare, summary))


def test_recurrent_layers_of_one_module_share_the_changes_by_options() -> None:
    summary = small_summary()
    assert summary.analysis is not None
    (first,) = summary.analysis.recurrent
    second = replace(first, name="'lstm' (number 2)", error_share=-0.25, gain_db=-1.25)
    page = parsed(page_of(replace(summary, analysis=replace(summary.analysis, recurrent=(first, second)))))
    (section,) = (one for one in page.all("section") if one.attributes.get("id") == "recurrent")
    text = " ".join(section.text.split())
    assert "2 recurrent layers were measured, each with all of its steps." in text
    changes = "With the whole layer in float, the SQNR of the outputs changes by"
    assert f"The steps cause 75.0 % of the error. {changes} +6.2 dB;" in text
    assert f"The steps do not increase the error. {changes} -1.2 dB;" in text
    assert [table.rows()[1:] for table in section.all("table")] == [
        [['wide=["lstm"]', "+2.5 dB", "simulated"], ["prepare_training(quantized)", "unknown", "limit"]]
    ]
