"""Programs of other quantizers: operators that keep values do not split partitions, and results are
equal bit by bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.flow_support import Lowered, convert, lower_documented, seeded
from tests.oracle import Function
from torch import nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, Quantizer

from openneutron import CompileOptions
from openneutron.core.fx import is_dequantize, is_quantize, op_name
from openneutron.partition.placing import Placed, place
from openneutron.partition.qdq_propagation import propagate_qdq
from openneutron.quantizer import RangeObserver, qspecs

Move = Callable[[torch.Tensor], torch.Tensor]
IMAGE = (1, 4, 8, 8)
LAST = torch.channels_last


class ComputeQuantizer(Quantizer):  # type: ignore[misc]
    """Quantizes inputs and outputs of convolutions, linears and sums only.

    With `quantizes_outputs=False`, outputs are quantized by their readers, as quantizers for x86 do.
    """

    def __init__(self, *, quantizes_outputs: bool) -> None:
        self.quantizes_outputs = quantizes_outputs

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            if op_name(node) in ("aten.conv2d.default", "aten.linear.default"):
                self._annotate(node, self._weighted(node))
            elif op_name(node) == "aten.add.Tensor":
                self._annotate(node, {value: self._activation(value) for value in node.all_input_nodes})
        return model

    def validate(self, model: GraphModule) -> None:
        pass

    def _annotate(self, node: Node, edges: Any) -> None:
        is_last = any(user.op == "output" for user in node.users)
        output = self._activation(node) if self.quantizes_outputs or is_last else None
        node.meta["quantization_annotation"] = QuantizationAnnotation(edges, output, _annotated=True)

    def _activation(self, node: Node) -> Any:
        return qspecs.activation(qspecs.ObservedValue(node), RangeObserver)

    def _weighted(self, node: Node) -> Any:
        inputs, weight, bias = node.args[:3]
        assert isinstance(inputs, Node)
        assert isinstance(weight, Node)
        assert isinstance(bias, Node)
        return {
            inputs: self._activation(inputs),
            weight: qspecs.weight(node, None),
            bias: qspecs.bias((inputs, node), (weight, node), bias, per_channel=False),
        }


def foreign(
    function: Callable[..., Any], parts: Callable[[], list[nn.Module]], *, quantizes_outputs: bool
) -> GraphModule:
    model = seeded(lambda: Function(function, *parts()))
    inputs = (torch.randn(IMAGE, generator=torch.Generator().manual_seed(0)),)
    prepared = prepare_pt2e(
        torch.export.export(model, inputs).module(), ComputeQuantizer(quantizes_outputs=quantizes_outputs)
    )
    prepared(*inputs)
    converted: GraphModule = convert_pt2e(prepared)
    return converted


def exported(converted: GraphModule) -> torch.export.ExportedProgram:
    return torch.export.export(converted, (torch.randn(IMAGE),))


def placed(converted: GraphModule) -> Placed:
    return place(exported(converted), CompileOptions())


def checked(converted: GraphModule) -> Lowered:
    """Lowers the program, and checks that its outputs equal the outputs of the converted module, bit for bit."""
    inputs = (torch.randn(IMAGE, generator=torch.Generator().manual_seed(1)),)
    lowered = lower_documented(converted, inputs)
    torch.testing.assert_close(lowered.run(*inputs), converted(*inputs), rtol=0, atol=1e-6)
    return lowered


def two_convolutions(channels: int = 8) -> Callable[[], list[nn.Module]]:
    return lambda: [nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(channels, 4, 1)]


MOVES: dict[str, tuple[Move, int]] = {
    "clone": (torch.clone, 8),
    "alias": (torch.ops.aten.alias, 8),
    "channels last": (lambda x: x.contiguous(memory_format=LAST), 8),
    "to channels last": (lambda x: x.to(memory_format=LAST), 8),
    "to float": (lambda x: x.to(torch.float32, copy=True), 8),
    "dropout": (lambda x: F.dropout(x, training=False), 8),
    "transpose": (lambda x: x.transpose(2, 3), 8),
    "view": (lambda x: x.view(1, 8, 4, 16), 8),
    "channel shuffle": (lambda x: F.channel_shuffle(x, 2), 8),
    "slice": (lambda x: x[:, 2:6], 4),
    "pad": (lambda x: F.pad(x, (1, 1, 1, 1)), 8),
    "reflect": (lambda x: F.pad(x, (1, 1, 1, 1), "reflect"), 8),
    "max pool": (lambda x: F.max_pool2d(x, 2), 8),
    "a chain": (lambda x: F.max_pool2d(x.permute(0, 3, 2, 1).contiguous(), 2).clone()[:, :, :, :2], 8),
    "a fork": (lambda x: torch.cat([x[:, :4], x[:, 4:].clone()], 1), 8),
}


@pytest.mark.parametrize("quantizes_outputs", [True, False], ids=["quantized before", "quantized after"])
@pytest.mark.parametrize("move", MOVES)
def test_a_move_between_convolutions_is_in_their_delegate(move: str, *, quantizes_outputs: bool) -> None:
    function, channels = MOVES[move]
    converted = foreign(
        lambda a, b, x: b(function(a(x))), two_convolutions(channels), quantizes_outputs=quantizes_outputs
    )
    lowered = checked(converted)
    assert (lowered.delegates, lowered.cpu) == (1, [])
    assert {row.where for row in placed(converted).rows} == {"npu"}


@pytest.mark.parametrize("quantizes_outputs", [True, False])
def test_flattened_for_a_linear(*, quantizes_outputs: bool) -> None:
    def parts() -> list[nn.Module]:
        return [nn.Conv2d(4, 8, 3, padding=1), nn.Linear(512, 5)]

    lowered = checked(foreign(lambda a, b, x: b(a(x).flatten(1)), parts, quantizes_outputs=quantizes_outputs))
    assert (lowered.delegates, lowered.cpu) == (1, [])


def test_moves_at_inputs_and_outputs_are_in_the_delegate() -> None:
    def function(a: Any, b: Any, x: torch.Tensor) -> Any:
        return b(a(x.transpose(2, 3))).permute(0, 2, 3, 1)

    lowered = checked(foreign(function, two_convolutions(), quantizes_outputs=True))
    assert (lowered.delegates, lowered.cpu) == (1, [])


def test_readers_of_several_kinds() -> None:
    def function(a: Any, b: Any, x: torch.Tensor) -> Any:
        y = a(x).clone()
        return b(y) + y[:, :4], y.exp()

    lowered = checked(foreign(lambda a, b, x: function(a, b, x)[0], two_convolutions(), quantizes_outputs=True))
    assert (lowered.delegates, lowered.cpu) == (1, [])
    both = foreign(function, two_convolutions(), quantizes_outputs=True)
    rows = placed(both).rows
    assert [row.op for row in rows if row.where == "cpu"] == ["aten.exp.default"]
    assert len(placed(both).partitions) == 1


def test_unequal_scales_are_requantized() -> None:
    def function(a: Any, b: Any, c: Any, x: torch.Tensor) -> Any:
        return b(torch.cat([a(x), c(x + x)], 1))

    def parts() -> list[nn.Module]:
        return [*two_convolutions(16)(), nn.Conv2d(4, 8, 1)]

    converted = foreign(function, parts, quantizes_outputs=True)
    inputs = (torch.randn(IMAGE),)
    lowered = lower_documented(converted, inputs)
    assert lowered.delegates == 1
    (scale,) = (node.args[1] for node in converted.graph.nodes if is_dequantize(node) and node.users and any(
        user.op == "output" for user in node.users))  # fmt: skip
    found = lowered.run(*inputs)
    assert isinstance(found, torch.Tensor)
    assert (found - converted(*inputs)).abs().max() <= 1.01 * float(scale)


def test_qdq_does_not_move_across_rounded_values() -> None:
    converted = foreign(
        lambda a, b, x: b(F.pad(a(x), (1, 1), value=0.123)), two_convolutions(), quantizes_outputs=False
    )
    program = exported(converted)
    assert propagate_qdq(program, CompileOptions()).program is program
    reasons = {row.node: row.reason for row in placed(converted).rows}
    assert reasons["pad"] == "It is not quantized: 'conv2d' is in float."


def test_a_step_that_no_quantizer_of_ours_wrote_has_a_reason() -> None:
    converted = foreign(lambda a, b, x: b(a(x)[:, :, ::2]), two_convolutions(), quantizes_outputs=True)
    (row,) = (row for row in placed(converted).rows if row.where == "cpu")
    assert (row.op, len(placed(converted).partitions)) == ("aten.slice_copy.Tensor", 2)
    assert row.reason == "imxrt700 takes slice only if: The step is 1."
    assert checked(converted).delegates == 2


def test_outputs_of_a_split_have_one_reason() -> None:
    def function(a: Any, b: Any, x: torch.Tensor) -> Any:
        first, second = a(x).chunk(2, 1)
        return b(torch.cat([second, first], 1))

    converted = foreign(function, two_convolutions(), quantizes_outputs=True)
    rows = [row for row in placed(converted).rows if row.where == "cpu"]
    assert [row.op for row in rows] == ["aten.chunk.default"]
    assert checked(converted).delegates == 2


def test_quantization_that_nothing_on_the_npu_needs_is_not_written() -> None:
    """A quantize and dequantize between operators of the CPU would only cost time."""

    def function(a: Any, b: Any, x: torch.Tensor) -> Any:
        return b(a(x)).clone().flatten(1).exp()

    converted = foreign(function, two_convolutions(), quantizes_outputs=True)
    program = exported(converted)
    before = [op_name(node) for node in program.graph.nodes]
    blocked = CompileOptions(operators_not_to_delegate=("aten.clone", "aten.flatten", "aten.conv2d"))
    assert [op_name(node) for node in place(program, blocked).program.graph.nodes] == before
    free = place(program, CompileOptions())
    assert sum(map(is_quantize, free.program.graph.nodes)) == sum(map(is_quantize, program.graph.nodes)) + 2
    assert [row.op for row in free.rows if row.where == "cpu"] == ["aten.exp.default"]


def test_our_own_quantizer_leaves_no_float_operators_between_quantized_ones() -> None:
    def function(a: Any, b: Any, x: torch.Tensor) -> Any:
        return b(F.channel_shuffle(a(x), 2).contiguous()).flatten(1)

    model, inputs = seeded(lambda: Function(function, *two_convolutions()())), (torch.randn(IMAGE),)
    program = torch.export.export(convert(model, inputs), inputs)
    assert propagate_qdq(program, CompileOptions()).program is program


def test_propagation_does_not_change_its_input() -> None:
    converted = foreign(
        lambda a, b, x: b(a(x).to(memory_format=LAST).clone()), two_convolutions(), quantizes_outputs=True
    )
    program = exported(converted)
    code = program.graph_module.code
    propagated = propagate_qdq(program, CompileOptions())
    assert program.graph_module.code == code
    assert propagated.program is not program
    assert "_assert_tensor_metadata" in code
    assert "_assert_tensor_metadata" not in propagated.program.graph_module.code


STEPS: dict[str, Callable[..., torch.Tensor]] = {
    "conv": lambda layer, x, _: layer(x),
    "flip": lambda _, x, __: x.flip(3),
    "clone": lambda _, x, __: x.clone(),
    "swap": lambda _, x, __: x.transpose(2, 3),
    "cat": lambda _, x, y: torch.cat([x[:, :2], y[:, 2:]], 1),
    "add": lambda _, x, y: x + y,
    "pool": lambda _, x, __: F.max_pool2d(x, 3, 1, 1),
    "exp": lambda _, x, __: torch.tanh(x).exp(),
}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=8),
    st.booleans(),
)
def test_numbers_stay_the_same_to_the_bit(steps: list[tuple[str, int, int]], quantizes_outputs: bool) -> None:
    """A quantized program returns the same values before and after Q/DQ propagation."""

    def function(layer: Any, x: torch.Tensor) -> torch.Tensor:
        values = [x]
        for kind, first, second in steps:
            values.append(STEPS[kind](layer, values[-1 - first % len(values)], values[-1 - second % len(values)]))
        return values[-1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = foreign(function, lambda: [nn.Conv2d(4, 4, 3, padding=1)], quantizes_outputs=quantizes_outputs)
    program, inputs = exported(converted), (torch.randn(IMAGE),)
    propagated = place(program, CompileOptions()).program
    propagated.graph.lint()
    assert torch.equal(propagated.module()(*inputs), program.module()(*inputs))
