"""Operators on the CPU by the user's option or by limits of the generation, and their reasons."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from executorch.exir import to_edge_transform_and_lower
from tests import models
from tests.flow_support import (
    convert,
    lower_documented,
    seeded,
    worst_lsb,
)
from tests.models import Model, conv, image, small
from tests.oracle import Function
from torch import nn

from openneutron import (
    NeutronPartitioner,
    generate_neutron_compile_spec,
    lower,
    quantize,
)
from openneutron.errors import (
    OptionError,
)
from openneutron.partition.blocked_names import check_forms
from openneutron.partition.partitioner import CpuWarning


class TestOperatorsNotToDelegate:
    @pytest.fixture(scope="class")
    def converted(self) -> torch.fx.GraphModule:
        model = seeded(
            lambda: Model(lambda m, x: m.l((m.c(x) + m.d(x)).flatten(1)), c=conv(), d=conv(), l=nn.Linear(256, 5))
        )
        return convert(model, (image(),))

    def blocked(self, converted: torch.fx.GraphModule, *names: str) -> set[str]:
        """Checks operators on the CPU. The program's results are still correct."""
        program = lower(converted, (image(),), operators_not_to_delegate=list(names))
        assert worst_lsb(converted, program.run, [(image(),)]) <= 1
        documented = lower_documented(converted, (image(),), operators_not_to_delegate=list(names))
        assert worst_lsb(converted, documented.run, [(image(),)]) <= 1
        return {row.node for row in program.placement if row.where == "cpu"}

    @pytest.mark.parametrize(
        "name",
        ["aten::conv2d", "aten.conv2d", "aten.conv2d.default", "aten::conv2d.default", "aten.convolution.default",
         "aten::convolution"],
    )  # fmt: skip
    def test_operator_names(self, converted: torch.fx.GraphModule, name: str) -> None:
        assert self.blocked(converted, name) == {"conv2d", "conv2d_1"}

    def test_node_names(self, converted: torch.fx.GraphModule) -> None:
        assert self.blocked(converted, "conv2d_1") == {"conv2d_1"}

    def test_names_match_as_a_whole(self, converted: torch.fx.GraphModule) -> None:
        assert self.blocked(converted, "aten::addmm") == set()
        assert self.blocked(converted, "aten::add") == {"add"}

    def test_everything_blocked_is_a_program_on_the_cpu(self, converted: torch.fx.GraphModule) -> None:
        names = ["aten::conv2d", "aten::add", "aten::linear", "aten::flatten"]
        assert {"conv2d", "conv2d_1", "add", "linear"} <= self.blocked(converted, *names)

    @pytest.mark.parametrize("name", ["conv", "conv2", "aten", "aten::conv2", "add.Tensor", "conv2d_12"])
    def test_unknown_names_list_near_matches(self, converted: torch.fx.GraphModule, name: str) -> None:
        with pytest.raises(OptionError, match=f"'{name}', which is neither an operator nor a node") as error:
            lower(converted, (image(),), operators_not_to_delegate=[name])
        assert name in ("aten", "conv") or "conv2d" in str(error.value) or "add" in str(error.value)

    def test_reason_names_the_option(self, converted: torch.fx.GraphModule) -> None:
        rows = lower(converted, (image(),), operators_not_to_delegate=["aten::add"]).placement
        (row,) = (row for row in rows if row.where == "cpu")
        assert row.reason == "'aten::add' is in operators_not_to_delegate."
        assert row.op == "aten.add.Tensor"
        assert row.partition is None
        assert row.source is not None
        assert Path(models.__file__).name in row.source


def test_a_model_without_anything_for_the_npu_still_lowers() -> None:
    model = Model(lambda _, x: torch.sin(x))
    lowered = lower_documented(convert(model, (image(),)), (image(),))
    assert (lowered.delegates, lowered.cpu) == (0, ["aten.sin.default"])
    found = lowered.run(image())
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found, torch.sin(image()))


def test_a_warning_gives_the_reason_of_each_operator_on_the_cpu() -> None:
    model = Model(lambda m, x: torch.sin(m.c(x)), c=conv())
    exported = torch.export.export(convert(model.eval(), (image(),)), (image(),))
    partitioner = NeutronPartitioner(generate_neutron_compile_spec("imxrt700"))
    with pytest.warns(CpuWarning, match=r"sin \(aten\.sin\.default, .*models\.py:\d+\): OpenNeutron has no such"):
        to_edge_transform_and_lower(exported, partitioner=[partitioner])


class TestLegacyGeneration:
    def test_operators_that_break_a_limit_run_on_the_cpu_with_this_reason(self) -> None:
        inputs = (image(2, 4, 8, 8),)
        quantized = quantize(seeded(small), inputs, [inputs])
        assert {row.where for row in lower(quantized).placement} == {"npu"}
        program = lower(quantized, neutron_converter_flavor="SDK_25_06")
        reasons = {row.node: row.reason for row in program.placement if row.where == "cpu"}
        assert (reasons["conv2d"] or "").startswith("imxrt700 takes convolution only if: The batch size is 1, or ")
        assert worst_lsb(quantized.module, program.run, [inputs]) <= 1


def test_an_output_of_which_the_cpu_needs_only_the_shape_is_left_out() -> None:
    """ExecuTorch decomposes meshgrid. The first result does not depend on the values of the second operand."""

    def rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.sigmoid(x).flatten()
        return torch.meshgrid(values[:3], values[1:3], indexing="ij")[0].argmax(0), values

    inputs = (torch.randn(1, 8, generator=torch.Generator().manual_seed(0)),)
    converted = convert(Function(rows).eval(), inputs)
    program = lower_documented(converted, inputs)
    for found, expected in zip(program.run(*inputs), converted(*inputs), strict=True):
        assert torch.allclose(found, expected)


@pytest.mark.parametrize(
    ("name", "is_possible"),
    [
        ("aten::silu", True), ("aten.add.Tensor", True), ("aten::conv2d.default", True), ("aten.view_copy", True),
        ("conv2d_12", True), ("mul_tensor", True), ("_to_copy", True), ("getitem_1", True),
        ("dim_order_ops._to_dim_order_copy.default", True), ("quantized::linear", True),
        ("aten::conv2", False), ("aten", False), ("aten.", False), ("head", False), ("layer1.0.conv1", False),
        ("conv1", False), ("add.Tensor", False),
    ],
)  # fmt: skip
def test_names_that_no_program_can_have_are_refused_without_a_program(name: str, is_possible: bool) -> None:
    if is_possible:
        check_forms([name])
    else:
        with pytest.raises(OptionError, match=f"'{name}', which is neither an operator nor the name of a node. Give"):
            check_forms([name])
