"""quantize() and lower() do each of these once: preparation, placement, IR of a partition, bytes of a payload."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from executorch.exir import to_edge_transform_and_lower
from tests.flow_support import names_of_inputs, seeded
from tests.models import Model, conv, image
from torch import nn

from openneutron import NeutronPartitioner, NeutronQuantizer, QuantizedModel, lower, passes, quantize
from openneutron.compile_spec import CompileOptions
from openneutron.formats import payload
from openneutron.partition import backend, compile, partitioner, placing

LEGACY = {"neutron_converter_flavor": "SDK_25_12"}


def model() -> nn.Module:
    return seeded(lambda: Model(lambda m, x: m.c(torch.relu(m.c(x))), c=conv()))


def quantized(recover: str | None = None) -> QuantizedModel:
    return quantize(model(), (image(),), [image()] * 3, recover=recover)


def count(monkeypatch: pytest.MonkeyPatch, counts: Counter[str], name: str, *owners: Any) -> None:
    """Counts the calls of a function, which each of `owners` has under its name."""
    function: Callable[..., Any] = getattr(owners[0], name)

    def counted(*args: Any, **named: Any) -> Any:
        counts[name] += 1
        return function(*args, **named)

    for owner in owners:
        monkeypatch.setattr(owner, name, counted)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    found: Counter[str] = Counter()
    count(monkeypatch, found, "place", placing, partitioner)
    count(monkeypatch, found, "build", compile)
    count(monkeypatch, found, "prepare", passes)
    count(monkeypatch, found, "pack", payload.Payload)
    count(monkeypatch, found, "parse", payload, backend)
    return found


@pytest.mark.parametrize("recover", [None, "fast", "auto"])
def test_quantize_prepares_the_graph_once(recover: str | None, counts: Counter[str]) -> None:
    quantized(recover)
    assert counts["prepare"] == 1


# The legacy generation builds a partition twice: with its inputs in their memory format, and as images.
@pytest.mark.parametrize(("options", "builds"), [({}, 1), (LEGACY, 2)])
def test_lower_places_and_builds_and_packs_once(options: dict[str, Any], builds: int, counts: Counter[str]) -> None:
    lower(quantized(), **options)
    assert (counts["place"], counts["build"], counts["pack"], counts["parse"]) == (1, builds, 1, 1)


@pytest.mark.parametrize(("options", "builds"), [({}, 1), (LEGACY, 2)])
def test_the_documented_call_places_and_builds_and_packs_once(
    options: dict[str, Any], builds: int, counts: Counter[str]
) -> None:
    exported = torch.export.export(quantized().module, (image(),))
    specs = CompileOptions(**options).to_specs()
    to_edge_transform_and_lower(exported, partitioner=[NeutronPartitioner(specs)])
    assert (counts["place"], counts["build"], counts["pack"], counts["parse"]) == (1, builds, 1, 1)


def test_both_calls_give_equal_bytes() -> None:
    converted = quantized()
    exported = torch.export.export(converted.module, (image(),))
    specs = CompileOptions().to_specs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        methods = names_of_inputs(exported)
        edge = to_edge_transform_and_lower(
            exported, partitioner=[NeutronPartitioner(specs)], constant_methods=methods
        )
    assert bytes(edge.to_executorch().buffer) == lower(converted).buffer


def test_a_copy_for_prepared_graphs_does_not_change_the_quantizer() -> None:
    quantizer = NeutronQuantizer()
    before = dict(vars(quantizer))
    changed = quantizer.replace(takes_prepared_graphs=True, observer="an observer")
    assert vars(quantizer) == before
    assert (changed.observer, changed.observer_of_outputs) == ("an observer", quantizer.observer_of_outputs)


def test_prepare_pt2e_skips_prepared_graphs() -> None:
    exported = torch.export.export(model().eval(), (image(),)).module()
    quantizer = NeutronQuantizer()
    graph = quantizer.prepare_graph(exported, equalizes=False)
    nodes = list(graph.graph.nodes)
    takes_prepared = quantizer.replace(takes_prepared_graphs=True)
    assert list(takes_prepared.transform_for_annotation(graph).graph.nodes) == nodes
