"""Adds operators by one declaration and one case each. Nothing else in the package knows them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.oracle import Function, agreement, everything_on_the_npu, lowered, quantized
from torch.fx import Node

from openneutron import ops
from openneutron.errors import ModelError
from openneutron.ir.graph import QParams, Tensor
from openneutron.ir.kinds import MUL
from openneutron.ops import document
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.elementwise import element_macs
from openneutron.ops.lowering import INT8, Lowering
from openneutron.ops.spec import OpSpec

SHAPE = (1, 4, 6, 5)
aten = torch.ops.aten


@torch.library.custom_op("openneutron_tests::thrice", mutates_args=())
def thrice(values: torch.Tensor) -> torch.Tensor:
    return values * 3


@torch.library.custom_op("openneutron_tests::bent", mutates_args=())
def bent(values: torch.Tensor) -> torch.Tensor:
    return values * torch.sigmoid(values)


for known in (thrice, bent):
    known.register_fake(torch.empty_like)


def lower_thrice(lowering: Lowering) -> Tensor:
    """Emits MUL by three."""
    three = lowering.constant(np.array([3], INT8), QParams.per_tensor(1.0, 0))
    inputs = lowering.tensor("values")
    return lowering.emit(MUL, [inputs, three], lowering.shape, fused_activation_function="NONE")


def rewrite_bent(rewriting: Rewriting) -> Node:
    inputs = rewriting.args["values"]
    return rewriting.call(aten.mul.Tensor, inputs, rewriting.call(aten.sigmoid.default, inputs))


THRICE = OpSpec(
    name="thrice",
    targets=("openneutron_tests.thrice.default",),
    inputs=("values",),
    lower=lower_thrice,
    macs=element_macs,
    becomes="MUL by three",
)
BENT = Decomposition(
    name="bent",
    targets=("openneutron_tests.bent.default",),
    rewrite=rewrite_bent,
    becomes="sigmoid, mul",
)


def model() -> Function:
    def forward(convolution: torch.nn.Module, values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = bent(thrice(convolution(values)))
        return result

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Function(forward, torch.nn.Conv2d(4, 4, 1))


def test_one_declaration_suffices_for_an_operator_in_the_pte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ops.OPERATORS, THRICE.targets[0], THRICE)
    monkeypatch.setitem(ops.DECOMPOSITIONS, BENT.targets[0], BENT)
    quantized_model = quantized(model(), (SHAPE,))
    program = lowered(quantized_model)
    assert everything_on_the_npu(program), program.placement
    assert [row.op for row in program.placement] == [
        "aten.convolution.default", "openneutron_tests.thrice.default", "aten.sigmoid.default", "aten.mul.Tensor",
    ]  # fmt: skip
    assert agreement(program, quantized_model).worst <= 1


def test_without_its_declaration_an_operator_is_refused() -> None:
    with pytest.raises(ModelError, match=r"openneutron_tests\.thrice\.default .* neither on the NPU nor on the CPU"):
        quantized(model(), (SHAPE,))


def test_the_docs_are_written_from_the_declarations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "SPECS", (*ops.SPECS, THRICE))
    monkeypatch.setattr(document, "DECOMPOSED", (*ops.DECOMPOSED, BENT))
    written = document.document()
    assert "## thrice\n" in written
    assert "| bent | `openneutron_tests.bent.default` | sigmoid, mul | 1 |" in written
