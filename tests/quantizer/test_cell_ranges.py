"""Ranges of units of cell states that conversion selects without a recipe."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.flow_support import seeded
from tests.recovery.test_cell_scales import (
    SCALED,
    STEPS,
    UNITS,
    Network,
    Sample,
    joined,
    samples_of,
    scaled_cells,
    sqnr,
)
from torch import nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from openneutron import lower, quantize
from openneutron.accuracy.analyze import analyze
from openneutron.quantizer import Int8Quantizer, cell_errors
from openneutron.quantizer.cell_ranges import CellObserver
from openneutron.recovery import correct_biases, recover_exported

ONE_LAYER = SCALED["one layer"][0]
# The least gain in dB; several layers or directions gain less than chance in these small networks.
GAINS = {
    "one layer": 0.3,
    "initial state": 0.3,
    "both directions": -1.5,
    "constant state": -1.5,
    "two layers": -1.5,
}


def prepared_by(model: nn.Module, samples: list[Sample], quantizer: Int8Quantizer | None = None) -> GraphModule:
    exported = torch.export.export(model, samples[0]).module()
    prepared: GraphModule = prepare_pt2e(exported, quantizer or Int8Quantizer())
    for sample in samples:
        prepared(*sample)
    return prepared


def scaled_steps(module: GraphModule) -> int:
    return sum(node.name.endswith("_times_range") for node in module.graph.nodes)


@pytest.mark.parametrize("name", GAINS)
def test_conversion_gives_units_their_ranges(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, _ = SCALED[name]
    model, samples, tests = seeded(build).eval(), samples_of(build), samples_of(build, 16, seed=1)
    with torch.no_grad():
        wanted = joined(model, tests)
    prepared = prepared_by(model, samples)
    with_one_range = copy.deepcopy(prepared)
    converted = convert_pt2e(prepared)
    assert scaled_steps(converted) >= STEPS - 1
    monkeypatch.setattr(cell_errors, "WORTHWHILE", 0.0)
    narrow = convert_pt2e(with_one_range)
    assert scaled_steps(narrow) == 0
    assert not any(node.op == "call_module" and "cell_ranges" in str(node.target) for node in converted.graph.nodes)
    assert sqnr(wanted, joined(converted, tests)) > sqnr(wanted, joined(narrow, tests)) + GAINS[name]
    program = lower(converted, samples[0])
    assert {row.where for row in program.placement} == {"npu"}
    assert sqnr(joined(converted, tests[:4]), joined(program.run, tests[:4])) > 30


@pytest.mark.parametrize(
    "build",
    [
        lambda: Network(torch.full((UNITS,), 2.0)),
        SCALED["last cell state is read"][0],
    ],
    ids=["equal ranges", "last cell state is read"],
)
def test_conversion_changes_no_other_layer(build: Callable[[], nn.Module]) -> None:
    model, samples = seeded(build).eval(), samples_of(build)
    assert scaled_steps(convert_pt2e(prepared_by(model, samples))) == 0


def test_a_recipe_selects_before_calibration() -> None:
    model, samples = seeded(ONE_LAYER).eval(), samples_of(ONE_LAYER)
    graph = Int8Quantizer().transform_for_annotation(torch.export.export(model, samples[0]).module())
    recover_exported(graph, samples)
    prepared = prepare_pt2e(graph, Int8Quantizer())
    assert not any(isinstance(module, CellObserver) for module in prepared.modules())


def test_wide_states_get_no_ranges_of_units() -> None:
    model, samples = seeded(ONE_LAYER).eval(), samples_of(ONE_LAYER)
    prepared = prepared_by(model, samples, Int8Quantizer(wide=[nn.LSTM]))
    assert scaled_steps(convert_pt2e(prepared)) == 0


def test_the_float_graph_of_quantize_gets_the_same_ranges() -> None:
    samples = samples_of(ONE_LAYER)
    quantized = quantize(seeded(ONE_LAYER).eval(), samples[0], samples, recover=None, progress=False)
    assert quantized.reference is not None
    assert scaled_cells(quantized.reference) == STEPS
    expected = joined(seeded(ONE_LAYER).eval(), samples)
    assert torch.allclose(joined(quantized.reference, samples), expected, atol=1e-4)
    assert analyze(None, quantized, samples).layers


def test_processes_find_the_same_ranges() -> None:
    samples = samples_of(ONE_LAYER)
    model = seeded(ONE_LAYER).eval()
    one, two = (
        quantize(model, samples[0], samples, recover=None, progress=False, batch_size=1, jobs=jobs) for jobs in (1, 2)
    )
    assert torch.equal(joined(one, samples), joined(two, samples))


def test_analysis_and_bias_correction_of_a_converted_module() -> None:
    model, samples = seeded(ONE_LAYER).eval(), samples_of(ONE_LAYER)
    converted = convert_pt2e(prepared_by(model, samples))
    analysis: Any = analyze(model, converted, samples)
    cells = [layer for layer in analysis.layers if layer.node.endswith("_times_range")]
    assert len(cells) == STEPS - 1
    assert min(layer.sqnr_db for layer in cells) > 10
    reference = Int8Quantizer().transform_for_annotation(torch.export.export(model, samples[0]).module())
    wanted, before = joined(model, samples), joined(converted, samples)
    after = joined(correct_biases(converted, reference, samples), samples)
    assert sqnr(wanted, after) > sqnr(wanted, before) - 1


def test_state_of_an_observer_is_kept() -> None:
    model, samples = seeded(ONE_LAYER).eval(), samples_of(ONE_LAYER, 4)
    prepared = prepared_by(model, samples)
    fresh = prepare_pt2e(torch.export.export(model, samples[0]).module(), Int8Quantizer())
    fresh.load_state_dict(prepared.state_dict())
    (first,), (second,) = (
        [module for module in each.modules() if isinstance(module, CellObserver)] for each in (prepared, fresh)
    )
    assert all(torch.equal(value, second.state()[name]) for name, value in first.state().items())


def test_layers_read_the_nodes_once() -> None:
    """All observers of a module share the map from names to nodes, so conversion is linear in nodes."""
    build, _ = SCALED["two layers"]
    prepared = prepared_by(seeded(build).eval(), samples_of(build))
    maps = [module._nodes for module in prepared.modules() if isinstance(module, CellObserver)]
    convert_pt2e(prepared)
    assert len(maps) == 2
    assert maps[0] is maps[1]
