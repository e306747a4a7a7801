"""Operators that only move values: exact results, few TFLite operators, and a reason if they run on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.case import Case
from tests.flow_support import flat, worst_lsb
from tests.oracle import Function, agreement, everything_on_the_npu, lowered, quantized, samples_like
from tests.shape_cases import CASES
from torch import nn

from openneutron import CompileOptions, QuantizedModel, quantize
from openneutron.core.fx import is_operator, op_name
from openneutron.ops import DECOMPOSITIONS, OPERATORS
from openneutron.ops.spec import OutputRule
from openneutron.partition.clusters import Constants
from openneutron.partition.compile import lower_partition
from openneutron.partition.placing import place
from openneutron.passes import prepare
from openneutron.quantizer import UnquantizedWarning
from openneutron.runtime import HostProgram
from openneutron.targets import TARGETS

Shape = tuple[int, ...]


def only_moves(case: Case) -> bool:
    """Whether only the first operator of a case computes."""
    module = torch.export.export(case.build(), samples_like(case.shapes, 1, 0, (0.0, 1.0))[0]).module()
    specs = [OPERATORS[op_name(node)] for node in prepare(module, TARGETS["imxrt700"]).graph.nodes if is_operator(node)]
    return all(spec.output is OutputRule.SHARED for spec in specs if spec.name != "hardtanh")


def test_values_are_moved_exactly() -> None:
    """Tests all cases in one program. Each output equals the quantized module exactly."""
    cases = [case for case in CASES if only_moves(case)]
    assert {case.target for case in cases} >= {case.target for case in CASES}
    shapes = [shape for case in cases for shape in case.shapes]

    def every(*parts: Any) -> list[Any]:
        models, inputs = parts[: len(cases)], iter(parts[len(cases) :])
        return [model(*(next(inputs) for _ in case.shapes)) for model, case in zip(models, cases, strict=True)]

    model = quantized(Function(every, *(case.build() for case in cases)), shapes)
    program = lowered(model)
    left = [row for row in program.placement if row.where == "cpu"]
    assert all((row.reason or "").startswith("Its output is only returned by the program") for row in left), left
    host = HostProgram.from_bytes(program.buffer)
    assert worst_lsb(model.module, host.run, samples_like(shapes, 2, 1, (0.0, 1.25))) < 0.01


def operators(model: QuantizedModel) -> Counter[str]:
    """Returns the number of TFLite operators of each kind in the only partition of a model."""
    exported = torch.export.export(model.module, model.example_inputs)
    placed = place(exported, CompileOptions())
    (partition,) = placed.partitions
    return Counter(op.kind.name for op in lower_partition(Constants(placed.program), partition).ops)


def built(function: Callable[..., Any], *shapes: Shape, parts: Callable[[], list[nn.Module]] = list) -> QuantizedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return quantized(Function(function, *parts()), shapes)


def convs(*channels: tuple[int, int], kernel: int = 3, **options: Any) -> list[nn.Module]:
    return [nn.Conv2d(*pair, kernel, padding=kernel // 2, **options) for pair in channels]


class TestLayout:
    """An NCHW program has TRANSPOSEs at its inputs and outputs. Any other TRANSPOSE comes from an operator that moves
    values.
    """

    ENDS = 2

    def check(self, model: QuantizedModel, **expected: int) -> None:
        found = operators(model)
        assert found == Counter(expected) + Counter({"TRANSPOSE": self.ENDS}), found
        program = lowered(model)
        assert everything_on_the_npu(program)
        assert agreement(program, model).worst <= 1

    def test_shufflenet_unit(self) -> None:
        def unit(a: Any, b: Any, c: Any, x: torch.Tensor) -> torch.Tensor:
            left, right = F.channel_shuffle(x.relu(), 2).chunk(2, 1)
            return F.channel_shuffle(torch.cat([left, c(b(a(right))).relu()], 1), 2)

        def two(*parts: Any) -> torch.Tensor:
            a, b, c, d, e, f, x = parts
            return F.max_pool2d(unit(d, e, f, unit(a, b, c, F.max_pool2d(x, 2))), 2)

        model = built(two, (1, 16, 16, 16), parts=lambda: convs(*[(8, 8)] * 6))
        # A shuffle is RESHAPE, TRANSPOSE and RESHAPE. One shuffle is between the two units.
        counts = {"CONV_2D": 6, "SLICE": 4, "CONCATENATION": 2, "RELU": 2, "MAX_POOL_2D": 2}
        self.check(model, **counts, RESHAPE=6, TRANSPOSE=3)

    def test_shuffle_written_with_views(self) -> None:
        def shuffle(a: Any, b: Any, x: torch.Tensor) -> Any:
            y = a(x).view(1, 2, 4, 8, 8).transpose(1, 2).contiguous().view(1, 8, 8, 8)
            return b(y)

        self.check(built(shuffle, (1, 3, 8, 8), parts=lambda: convs((3, 8), (8, 4))), CONV_2D=2, RESHAPE=2, TRANSPOSE=1)

    def test_espcn_tail(self) -> None:
        def tail(a: Any, b: Any, x: torch.Tensor) -> torch.Tensor:
            return F.pixel_shuffle(b(a(x).relu()), 3)

        model = built(tail, (1, 1, 12, 12), parts=lambda: convs((1, 8), (8, 9)))
        # The input has one channel and needs no TRANSPOSE. The TRANSPOSE of the output also shuffles.
        found = operators(model)
        assert found == {"CONV_2D": 2, "RESHAPE": 3, "TRANSPOSE": 1}, found
        assert agreement(lowered(model), model).worst <= 1

    def test_yolo_focus(self) -> None:
        def focus(a: Any, x: torch.Tensor) -> Any:
            return a(torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1))

        model = built(focus, (1, 3, 8, 8), parts=lambda: convs((12, 8)))
        # One TRANSPOSE converts the NCHW input, the other one the output.
        self.check(model, CONV_2D=1, RESHAPE=2)

    def test_swin_patch_merging(self) -> None:
        def merging(a: Any, x: torch.Tensor) -> Any:
            y = x.relu()
            return a(torch.cat([y[:, i::2, j::2, :] for j in range(2) for i in range(2)], -1))

        model = built(merging, (1, 6, 6, 8), parts=lambda: [nn.Linear(32, 16)])
        found = operators(model)
        assert found == {"RELU": 1, "RESHAPE": 3, "TRANSPOSE": 1, "FULLY_CONNECTED": 1}, found

    def test_unet_skip(self) -> None:
        def skip(a: Any, b: Any, c: Any, x: torch.Tensor) -> Any:
            y = a(x).relu()
            z = b(F.max_pool2d(y, 2)).relu().repeat_interleave(2, 2).repeat_interleave(2, 3)
            return c(torch.cat([y, z], 1))

        model = built(skip, (1, 3, 8, 8), parts=lambda: convs((3, 4), (4, 4), (8, 2)))
        # The pool also reads the skipped value, which therefore keeps its range. A MUL requantizes it for the
        # concatenation.
        self.check(model, CONV_2D=3, MAX_POOL_2D=1, RESHAPE=3, CONCATENATION=3, MUL=1)

    def test_resnet_shortcut(self) -> None:
        def block(a: Any, b: Any, c: Any, x: torch.Tensor) -> Any:
            y = a(x).relu()
            return (c(b(y).relu()) + F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))).relu()

        def parts() -> list[nn.Module]:
            return [*convs((3, 4)), nn.Conv2d(4, 8, 3, 2, 1), *convs((8, 8))]

        # The PAD is in the shortcut. The convolution with a stride has a larger kernel in place of a PAD.
        self.check(built(block, (1, 3, 8, 8), parts=parts), CONV_2D=3, MAX_POOL_2D=1, PAD=1, ADD=1)

    def test_chunks_of_channels(self) -> None:
        def gate(a: Any, b: Any, x: torch.Tensor) -> Any:
            left, right = a(x).chunk(2, 1)
            return b(left * right.sigmoid())

        model = built(gate, (1, 3, 8, 8), parts=lambda: convs((3, 8), (4, 3)))
        self.check(model, CONV_2D=2, SLICE=2, LOGISTIC=1, MUL=1)

    def test_select_and_unsqueeze(self) -> None:
        def pick(a: Any, b: Any, x: torch.Tensor) -> Any:
            y = a(x)
            return b(torch.cat([y[:, i].unsqueeze(1) for i in (3, 1)], 1))

        model = built(pick, (1, 3, 8, 8), parts=lambda: convs((3, 4), (2, 3)))
        self.check(model, CONV_2D=2, SLICE=2, CONCATENATION=1)

    def test_branches_of_an_nchw_input(self) -> None:
        def branches(a: Any, b: Any, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([a(x[:, :2]), b(x[:, 2:]), F.max_pool2d(x, 3, 1, 1)], 1).abs()

        model = built(branches, (1, 4, 8, 8), parts=lambda: convs((2, 4), (2, 4)))
        # The convolution that reads the first channels reads all channels, with zero weights for the others.
        self.check(model, CONV_2D=2, SLICE=1, MAX_POOL_2D=1, CONCATENATION=1, ABS=1)


class TestLeftOnTheCpu:
    def test_several_outputs_have_one_reason(self) -> None:
        def function(x: torch.Tensor) -> torch.Tensor:
            first, second = torch.split((x * 4.0).to(torch.int32), 2, 1)
            return first.float() + second.float()

        calibration = samples_like([(1, 4, 3, 3)], 2, 0, (0.0, 1.0))
        with pytest.warns(UnquantizedWarning) as warned:
            model = quantize(Function(function).eval(), calibration[0], calibration)
        (warning,) = (each for each in warned if each.category is UnquantizedWarning)
        lines = str(warning.message).splitlines()[1:]
        assert [line.split("(")[1].split(",")[0] for line in lines] == [
            "aten.to.dtype", "aten.split.Tensor", "aten.to.dtype", "aten.to.dtype"
        ]  # fmt: skip
        program = lowered(model)
        reasons = {row.node: row.reason for row in program.placement if row.where == "cpu"}
        assert reasons["split"] == (
            "split becomes slice for each part for float32 values only, when the model is quantized."
        )
        assert not any("getitem" in row.op or "assert" in row.op for row in program.placement)
        assert agreement(program, model).worst <= 1

    def test_an_operator_that_nobody_declared(self) -> None:
        model = built(lambda x: x.relu().topk(2, 1)[0], (1, 4, 3))
        (row,) = (row for row in lowered(model).placement if row.where == "cpu")
        assert (row.op, row.partition) == ("aten.topk.default", None)
        assert row.reason is not None
        assert row.reason.startswith("OpenNeutron has no such operator")

    def test_no_elements(self) -> None:
        program = lowered(built(lambda x: (x.relu(), x[:, :0]), (2, 3)))
        assert everything_on_the_npu(program)
        assert program.run(torch.ones(2, 3))[1].shape == (2, 0)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x: x.relu()[1], ((3,),)),
        (lambda x: x.relu().squeeze(), ((1, 1),)),
        (lambda x: (x.relu()[0] + x.relu()[2], x[1]), ((3,),)),
        (lambda x, y: x.relu() * y, ((3,), ())),
    ],
)
def test_scalars_at_the_ends_of_a_partition(function: Callable[..., Any], shapes: tuple[Shape, ...]) -> None:
    model = built(function, *shapes)
    program = lowered(model)
    assert everything_on_the_npu(program), program.placement
    found = agreement(program, model)
    assert found.worst <= 1
    assert [value.shape for value in flat(program.run(*model.example_inputs))] == [
        value.shape for value in flat(model(*model.example_inputs))
    ]


def test_decompositions_are_declared_for_the_operators_that_need_them() -> None:
    """A strided slice has the same name as a slice, so the table of cases only tests its form for the NPU."""
    strided = DECOMPOSITIONS["aten.slice.Tensor"]
    cases = [case for case in CASES if case.label.startswith("step:")]
    assert strided.name == "strided slice"
    for case in cases:
        inputs = samples_like(case.shapes, 1, 2, (0.0, 1.0))[0]
        module = torch.export.export(case.build().eval(), inputs).module()
        prepared = prepare(module, TARGETS["imxrt700"])
        slices = [node for node in prepared.graph.nodes if op_name(node) == "aten.slice.Tensor"]
        assert all(len(node.args) < 5 for node in slices), case.id
        torch.testing.assert_close(prepared(*inputs), case.build().eval()(*inputs), rtol=0, atol=0)
