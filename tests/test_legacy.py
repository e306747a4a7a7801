"""The legacy generation of converters: padded operands, whole networks, all targets."""

from __future__ import annotations

import pytest
from tests.case import Case
from tests.graphs import partition_graphs
from tests.legacy_cases import LEGACY_CASES
from tests.legacy_table import faults
from tests.oracle import agreement, everything_on_the_npu, lowered, quantized

from openneutron.targets import TARGETS

LEGACY = "SDK_25_06"


@pytest.mark.parametrize("case", LEGACY_CASES, ids=lambda case: case.id)
def test_program_follows_the_converted_module(case: Case) -> None:
    model = quantized(case.build(), case.shapes, case.spread)
    program = lowered(model, neutron_converter_flavor=LEGACY)
    assert everything_on_the_npu(program), program.placement
    (graph,) = partition_graphs(model, neutron_converter_flavor=LEGACY)
    assert not faults(graph, TARGETS["imxrt700"])
    assert agreement(program, model).worst <= case.spec.tolerance
