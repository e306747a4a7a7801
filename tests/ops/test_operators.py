"""Lowers each operator of the table to a `.pte`, and checks each of its limits."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.case import Case, Rejected
from tests.flow_support import flat
from tests.operator_cases import CASES, REJECTED
from tests.oracle import (
    Function,
    agreement,
    everything_on_the_npu,
    lowered,
    quantized,
    quantized_elsewhere,
    samples_like,
)
from torch import nn

from openneutron.compile_spec import CompileOptions
from openneutron.core.fx import op_name
from openneutron.errors import ModelError
from openneutron.ops import DECLARED, DECOMPOSITIONS, OPERATORS
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import Constraint
from openneutron.partition.placing import placement
from openneutron.passes import decompose
from openneutron.targets import TARGETS

Shape = tuple[int, ...]
LEGACY = "SDK_25_06"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_program_follows_the_converted_module(case: Case) -> None:
    model = quantized(case.build(), case.shapes, case.spread, **dict(case.options))
    program = lowered(model)
    on_cpu = tuple(row.op for row in program.placement if row.where == "cpu")
    assert on_cpu == case.on_cpu, program.placement
    assert case.on_cpu or everything_on_the_npu(program), program.placement
    found = agreement(program, model, spread=case.spread)
    assert found.worst <= case.spec.tolerance, found


DECOMPOSED_CASES = [case for case in CASES if case.target in DECOMPOSITIONS]


@pytest.mark.parametrize("case", DECOMPOSED_CASES, ids=lambda case: case.id)
@torch.no_grad()
def test_decomposition_keeps_the_float_function(case: Case) -> None:
    approximation = DECOMPOSITIONS[case.target].approximation
    model = case.build().eval()
    first, *_ = samples = samples_like(case.shapes, 3, 2, case.spread)
    module = torch.export.export(model, first).module()
    assert decompose(module, TARGETS["imxrt700"]) or case.target in OPERATORS
    for inputs in samples:
        for got, want in zip(flat(module(*inputs)), flat(model(*inputs)), strict=True):
            error = (got - want).abs().max() / max(1.0, float(want.abs().max()))
            assert error <= approximation, error


@pytest.mark.parametrize("target", sorted(OPERATORS.keys() | DECOMPOSITIONS.keys()))
def test_every_target_has_cases_that_meet_it(target: str) -> None:
    cases = [case for case in CASES if case.target == target]
    assert cases
    model = cases[0].build().eval()
    exported = torch.export.export(model, samples_like(cases[0].shapes, 1, 0, (0.0, 1.0))[0])
    if target in OPERATORS and OPERATORS[target].name == "requantize":
        exported = torch.export.export(quantized(model, cases[0].shapes).module, exported.example_inputs[0])
    assert target in {op_name(node) for node in exported.graph.nodes}


def test_cases_have_names_of_their_own() -> None:
    ids = [case.id for case in CASES]
    assert sorted(set(ids)) == sorted(ids)


@pytest.mark.parametrize("case", [case for case in REJECTED if not case.padded], ids=lambda case: case.id)
def test_operators_that_break_a_limit_run_on_the_cpu(case: Rejected) -> None:
    torch.manual_seed(0)
    if not case.lowers:
        with pytest.raises(ModelError, match="can run neither on the NPU nor on the CPU") as error:
            quantized(case.model(), case.shapes)
        assert case.reason in str(error.value)
        return
    model = (quantized_elsewhere if case.quantized_elsewhere else quantized)(case.model(), case.shapes)
    options = CompileOptions(neutron_converter_flavor=LEGACY if case.is_legacy else None)
    rows = placement(torch.export.export(model.module, model.example_inputs), options)
    assert any((row.reason or "").startswith(case.reason) for row in rows if row.where == "cpu"), rows
    if not case.lowers_for_legacy:
        with pytest.raises(ModelError, match=re.escape(case.constraint.message)):
            lowered(model, neutron_converter_flavor=options.neutron_converter_flavor)
        return
    program = lowered(model, neutron_converter_flavor=options.neutron_converter_flavor)
    assert program.placement == rows
    assert agreement(program, model).worst <= 1


@pytest.mark.parametrize("case", [case for case in REJECTED if case.padded], ids=lambda case: case.id)
def test_padding_lifts_a_limit(case: Rejected) -> None:
    torch.manual_seed(0)
    model = quantized(case.model(), case.shapes)
    broken = [
        node
        for node in torch.export.export(model.module, model.example_inputs).graph.nodes
        if op_name(node) in case.declared.targets and not case.constraint.holds(OpInstance(node, TARGETS["imxrt700"]))
    ]
    assert broken
    program = lowered(model, neutron_converter_flavor=LEGACY)
    assert everything_on_the_npu(program), program.placement
    assert agreement(program, model).worst <= case.declared.tolerance


@pytest.mark.parametrize("case", [case for case in REJECTED if case.is_legacy], ids=lambda case: case.id)
def test_the_modern_generation_lifts_legacy_limits(case: Rejected) -> None:
    torch.manual_seed(0)
    assert everything_on_the_npu(lowered(quantized(case.model(), case.shapes)))


# NeutronQuantizer rejects a model in train mode, decomposes slices with steps, and removes empty parts of
# concatenations.
NEVER_MET = {"is_in_eval_mode", "slices_without_steps", "concatenates_equal_ranks"}


def _limits() -> list[Any]:
    return [
        pytest.param(limit, id=f"{spec.name}-{limit.holds.__name__}")
        for spec in DECLARED
        for limit in spec.constraints
        if limit.holds.__name__ not in NEVER_MET
    ]


@pytest.mark.parametrize("limit", _limits())
def test_every_limit_has_a_model_that_breaks_it(limit: Constraint) -> None:
    assert [case for case in REJECTED if case.constraint is limit]


def test_messages_name_their_numbers() -> None:
    messages = {limit.message for spec in DECLARED for limit in spec.constraints}
    assert "Kernel is at most 4096, stride at most 4096, dilation at most 4096." in messages
    assert not [message for message in messages if "{" in message or not message.endswith(".")]


def test_scalar_operand_is_a_constant() -> None:
    model = quantized(Function(lambda layer, x: F.relu(layer(x) + 1.5), nn.Conv2d(3, 4, 1)), ((1, 3, 5, 5),))
    program = lowered(model)
    assert everything_on_the_npu(program)
    assert agreement(program, model).worst <= 1
