"""Each operator of the table on its way to the `.pte`, and each of its limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.case import Case, move, moved, of
from tests.operator_cases import CASES, conv
from tests.oracle import Function, agreement, everything_on_the_npu, lowered, quantized, samples_like
from torch import nn

from openneutron.errors import HostError
from openneutron.fx import op_name
from openneutron.ops import OPERATORS, SPECS
from openneutron.ops.spec import Constraint
from openneutron.targets import Generation

Shape = tuple[int, ...]
LEGACY = "SDK_25_06"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_program_follows_the_converted_module(case: Case) -> None:
    model = quantized(case.build(), case.shapes, case.spread, **dict(case.options))
    program = lowered(model)
    assert everything_on_the_npu(program), program.placement
    found = agreement(program, model, spread=case.spread)
    assert found.worst <= case.spec.tolerance, found


@pytest.mark.parametrize("target", OPERATORS)
def test_every_target_has_cases_that_meet_it(target: str) -> None:
    cases = [case for case in CASES if case.target == target]
    assert cases
    model = cases[0].build().eval()
    exported = torch.export.export(model, samples_like(cases[0].shapes, 1, 0, (0.0, 1.0))[0])
    if OPERATORS[target].name == "requantize":
        exported = torch.export.export(quantized(model, cases[0].shapes).module, exported.example_inputs[0])
    assert target in {op_name(node) for node in exported.graph.nodes}


def test_cases_have_names_of_their_own() -> None:
    ids = [case.id for case in CASES]
    assert sorted(set(ids)) == sorted(ids)


@dataclass(frozen=True)
class Rejected:
    """A model whose operator `spec` breaks one limit and no other."""

    spec: str
    limit: str
    label: str
    model: Callable[[], nn.Module] = field(repr=False)
    shapes: tuple[Shape, ...]
    runs: bool = True
    """Whether ExecuTorch has a CPU kernel for it."""

    @property
    def constraint(self) -> Constraint:
        (spec,) = (spec for spec in SPECS if spec.name == self.spec)
        (limit,) = (limit for limit in spec.constraints if limit.holds.__name__ == self.limit)
        return limit

    @property
    def is_legacy(self) -> bool:
        return Generation.MODERN not in self.constraint.generations

    @property
    def id(self) -> str:
        return f"{self.spec}-{self.limit}-{self.label}".replace(" ", "_").rstrip("-_")


def addmm(**scales: Any) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda bias, weight, values: torch.addmm(bias, values, weight, **scales)


def pool(*args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.AvgPool2d(*args, **options)


def cat(dim: int) -> Callable[[], nn.Module]:
    return of(lambda x, y: torch.cat([move(x), move(y)], dim))


def permute(*dims: int) -> Callable[[], nn.Module]:
    return moved(lambda x: x.permute(dims))


BIAS, MATRIX, IMAGE = torch.linspace(-1, 1, 6), torch.linspace(-1, 1, 60).reshape(10, 6), (1, 8, 6, 6)
vector = of(lambda weight, x: F.linear(x, weight), torch.linspace(-1, 1, 10))
with_nothing = of(lambda nothing, x: torch.cat([nothing, move(x)], 0), torch.zeros(0))
crop_by_reflection = moved(lambda x: F.pad(x, (-1, 1), "reflect"))
replicate = moved(lambda x: F.pad(x, (1, 1), "replicate"))

REJECTED = (
    Rejected("convolution", "has_a_batch", "2d", conv(2, 3, 5, 3), ((3, 7, 7),)),
    Rejected("convolution", "has_a_batch", "1d", conv(1, 3, 5, 3), ((3, 7),)),
    Rejected("convolution", "has_supported_geometry", "kernel", conv(2, 1, 2, (1, 4097)), ((1, 1, 1, 4100),)),
    Rejected("convolution", "has_supported_geometry", "stride", conv(2, 1, 2, 1, stride=(1, 4097)), ((1, 1, 2, 4100),)),
    Rejected("convolution", "has_supported_geometry", "dilation", conv(1, 1, 2, 2, dilation=4097), ((1, 1, 4100),)),
    Rejected("convolution", "fits_accumulation", "", conv(2, 8192, 2, 3), ((1, 8192, 3, 3),)),
    Rejected("convolution", "has_batch_of_one", "", conv(2, 3, 5, 3), ((2, 3, 7, 7),)),
    Rejected("convolution", "splits_into_whole_granules", "", conv(2, 6, 6, 3, groups=2), ((1, 6, 7, 7),)),
    Rejected("adaptive_avg_pool2d", "averages_whole_granules", "", lambda: nn.AdaptiveAvgPool2d(1), ((1, 12, 6, 6),)),
    Rejected("hardtanh", "is_a_relu", "", lambda: nn.Hardtanh(-2.0, 3.0), (IMAGE,)),
    Rejected("slice", "slices_without_steps", "", moved(lambda x: x[:, :, ::2]), (IMAGE,)),
    Rejected("slice", "slices_whole_granules", "", moved(lambda x: x[:, 4:]), ((1, 12, 6, 6),)),
    Rejected("linear", "has_a_matrix_as_weight", "", vector, ((4, 10),)),
    Rejected("addmm", "has_a_plain_bias", "matrix", of(addmm(), MATRIX[:4], MATRIX), ((4, 10),)),
    Rejected("addmm", "has_a_plain_bias", "one value", of(addmm(), BIAS[:1], MATRIX), ((4, 10),)),
    Rejected("addmm", "does_not_scale", "alpha", of(addmm(alpha=2.0), BIAS, MATRIX), ((4, 10),)),
    Rejected("addmm", "does_not_scale", "beta", of(addmm(beta=0.5), BIAS, MATRIX), ((4, 10),)),
    Rejected("avg_pool2d", "has_small_kernel", "kernel", pool((1, 4097), 1), ((1, 2, 1, 4100),)),
    Rejected("avg_pool2d", "has_small_kernel", "stride", pool(1, (1, 4097)), ((1, 2, 1, 4100),)),
    Rejected("avg_pool2d", "does_not_round_up", "", pool(2, ceil_mode=True), ((1, 3, 7, 7),)),
    Rejected("avg_pool2d", "divides_by_the_window", "divisor", pool(2, divisor_override=3), ((1, 3, 6, 6),)),
    Rejected("avg_pool2d", "divides_by_the_window", "padding", pool(3, 2, 1, count_include_pad=False), (IMAGE,)),
    Rejected("adaptive_avg_pool2d", "has_equal_windows", "", lambda: nn.AdaptiveAvgPool2d((4, 3)), (IMAGE,)),
    Rejected("adaptive_avg_pool2d", "has_small_kernel", "", lambda: nn.AdaptiveAvgPool2d((1, 2)), ((1, 1, 1, 8194),)),
    Rejected("max_pool2d", "has_small_stride", "", lambda: nn.MaxPool2d(1, (1, 4097)), ((1, 8, 1, 4100),)),
    Rejected("max_pool2d", "is_not_dilated", "", lambda: nn.MaxPool2d(2, dilation=2), (IMAGE,)),
    Rejected("max_pool2d", "does_not_round_up", "", lambda: nn.MaxPool2d(2, ceil_mode=True), ((1, 8, 7, 7),)),
    Rejected("max_pool2d", "has_whole_granules", "", lambda: nn.MaxPool2d(2), ((1, 12, 6, 6),)),
    Rejected("mean", "keeps_a_dimension", "", of(lambda x: x.mean((0, 1))), ((3, 5),)),
    Rejected("mean", "means_over_an_image", "rank 3", of(lambda x: x.mean((1, 2), True)), ((8, 6, 6),)),
    Rejected("mean", "means_over_an_image", "keepdim", of(lambda x: x.mean((2, 3))), (IMAGE,)),
    Rejected("mean", "means_over_an_image", "width", of(lambda x: x.mean(3, True)), (IMAGE,)),
    Rejected("mean", "means_over_an_image", "channels", of(lambda x: x.mean((2, 3), True)), ((1, 12, 6, 6),)),
    Rejected("add", "has_one_full_operand", "", of(lambda x, y: x + y), ((4, 1), (1, 5))),
    Rejected("add", "has_alpha_one", "", of(lambda x, y: torch.add(x, y, alpha=2)), ((4, 5), (4, 5))),
    Rejected("softmax", "is_over_the_channels", "rank 2", of(lambda x: x.softmax(0)), ((4, 5),)),
    Rejected("softmax", "is_over_the_channels", "rank 4", of(lambda x: x.softmax(2)), ((1, 4, 5, 3),)),
    Rejected("softmax", "has_few_softmax_channels", "channels", of(lambda x: x.softmax(1)), ((1, 2041),)),
    Rejected("softmax", "has_few_softmax_channels", "positions", of(lambda x: x.softmax(1)), ((4097, 2),)),
    Rejected("softmax", "has_few_softmax_channels", "elements", of(lambda x: x.softmax(1)), ((1025, 512),)),
    Rejected("softmax", "has_legacy_softmax_size", "granules", of(lambda x: x.softmax(1)), ((2, 10),)),
    Rejected("softmax", "has_legacy_softmax_size", "rank 1", of(lambda x: x.softmax(0)), ((16,),)),
    Rejected("reshape", "has_rank_for_reshape", "", moved(lambda x: x.view(1, 2, 1, 3, 2, 1, 2, 1)), ((2, 12),)),
    Rejected("permute", "has_rank_for_transpose", "", permute(6, 5, 4, 3, 2, 1, 0), ((1, 2, 1, 3, 2, 1, 2),)),
    Rejected("permute", "permutes_whole_granules", "not to NCHW", permute(0, 2, 3, 1), (IMAGE,)),
    Rejected("permute", "permutes_whole_granules", "channels", permute(0, 3, 1, 2), ((1, 2, 2, 3),)),
    Rejected("permute", "permutes_whole_granules", "batch", permute(0, 3, 1, 2), ((2, 8, 8, 8),)),
    Rejected("permute", "permutes_whole_granules", "rank 2", permute(1, 0), ((8, 8),)),
    Rejected("cat", "does_not_concatenate_batches", "", cat(0), (IMAGE, IMAGE)),
    Rejected("cat", "concatenates_whole_granules", "", cat(1), (IMAGE, (1, 4, 6, 6))),
    Rejected("cat", "concatenates_equal_ranks", "", with_nothing, ((4, 5),)),
    Rejected("pad", "pads_by_constant_or_reflection", "replicate", replicate, ((2, 3, 5),)),
    Rejected("pad", "does_not_crop_a_reflection", "", crop_by_reflection, ((2, 3, 5),)),
    Rejected("pad", "does_not_crop", "", moved(lambda x: F.pad(x, (-1, 1))), ((2, 3, 5),), runs=False),
)  # fmt: skip


@pytest.mark.parametrize("case", REJECTED, ids=lambda case: case.id)
def test_what_breaks_a_limit_runs_on_the_cpu(case: Rejected) -> None:
    torch.manual_seed(0)
    model = quantized(case.model(), case.shapes)
    program = lowered(model, neutron_converter_flavor=LEGACY if case.is_legacy else None)
    taker = "imxrt700" if case.is_legacy else "The NPU"
    reasons = [row.reason for row in program.placement if row.where == "cpu"]
    assert f"{taker} takes {case.spec} only if: {case.constraint.message}" in reasons, program.placement
    if case.runs:
        assert agreement(program, model).worst <= 1
    else:
        with pytest.raises(HostError, match="failed"):
            program.run(*model.example_inputs)


@pytest.mark.parametrize("case", [case for case in REJECTED if case.is_legacy], ids=lambda case: case.id)
def test_the_modern_generation_lifts_legacy_limits(case: Rejected) -> None:
    torch.manual_seed(0)
    assert everything_on_the_npu(lowered(quantized(case.model(), case.shapes)))


def _limits() -> list[Any]:
    return [
        pytest.param(limit, id=f"{spec.name}-{limit.holds.__name__}")
        for spec in SPECS
        for limit in spec.constraints
        if limit.holds.__name__ != "is_in_eval_mode"  # NeutronQuantizer refuses a model in train mode as a whole
    ]


@pytest.mark.parametrize("limit", _limits())
def test_every_limit_has_a_model_that_breaks_it(limit: Constraint) -> None:
    assert [case for case in REJECTED if case.constraint is limit]


def test_messages_name_their_numbers() -> None:
    messages = {limit.holds.__name__: limit.message for spec in SPECS for limit in spec.constraints}
    assert messages["has_supported_geometry"] == "Kernel is at most 4096, stride at most 4096, dilation at most 4096."
    assert not [message for message in messages.values() if "{" in message or not message.endswith(".")]


def test_scalar_operand_is_a_constant() -> None:
    model = quantized(Function(lambda layer, x: F.relu(layer(x) + 1.5), nn.Conv2d(3, 4, 1)), ((1, 3, 5, 5),))
    program = lowered(model)
    assert everything_on_the_npu(program)
    assert agreement(program, model).worst <= 1
