"""Parts that a program concatenates into an output: each part keeps its own qparams."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.fidelity import signal_to_noise
from tests.flow_support import Inputs, convert, lower_documented, seeded
from tests.oracle import Function
from torch import Tensor, nn
from torchao.quantization.pt2e import HistogramObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

from openneutron import NeutronQuantizer, QuantizedModel, lower, quantize
from openneutron.core.fx import is_dequantize, output_node
from openneutron.partition.quantized_io import FloatIOWarning
from openneutron.quantizer.observers import RangeObserver
from openneutron.quantizer.output_parts import LinkedParts, PartObserver

LEAST_SQNR = 30.0  # dB, for each part
Split = Callable[[Any], Sequence[Tensor]]


def trunk(conv: nn.Module, x: Tensor) -> Tensor:
    return F.relu(conv(x))


def boxes(m: Any, x: Tensor) -> Tensor:
    """Returns [1, 4, H, W], with values of some hundreds."""
    pixels: Tensor = m(x) * 300
    return pixels


def model_of(function: Callable[..., Any]) -> nn.Module:
    def forward(first: nn.Module, b: nn.Module, s: nn.Module, last: nn.Module, x: Tensor) -> Any:
        features = trunk(first, x)
        return function(boxes(b, features), s(features), last, x)

    convolutions = (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1))
    return Function(forward, *convolutions)


def samples(count: int = 8, seed: int = 0) -> list[Inputs]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(1, 3, 12, 12, generator=generator),) for _ in range(count)]


def halves(dim: int) -> Split:
    return lambda found: found.chunk(2, dim)


def in_first(dim: int) -> Split:
    return lambda found: [*found[0].chunk(2, dim), *found[1:]]


def with_levels(b: Tensor, s: Tensor, *_: Any) -> Tensor:
    levels = [(b, s.sigmoid()), (F.avg_pool2d(b, 2), F.avg_pool2d(s, 2).sigmoid())]
    return torch.cat([torch.cat([part.flatten(2) for part in parts], 1) for parts in levels], 2)


def computed_with_too(b: Tensor, s: Tensor, last: nn.Module, _: Tensor) -> tuple[Tensor, Tensor]:
    joined = torch.cat([b, s.sigmoid()], 1)
    return joined, last(joined[:, :4])


# name: function of boxes, scores, a convolution and the input; its parts; the operators on the CPU
Case = tuple[Callable[..., Any], Split, set[str]]
CAT, VIEW, PERMUTE = "aten.cat.default", "aten.view_copy.default", "aten.permute_copy.default"
IN_FLOAT: dict[str, Case] = {
    "along channels": (lambda b, s, *_: torch.cat([b, s.sigmoid()], 1), halves(1), {CAT}),
    "both fixed": (lambda b, s, *_: torch.cat([(b / 300).tanh(), s.softmax(1)], 1), halves(1), {CAT}),
    "moved before": (lambda b, s, *_: torch.cat([b.flatten(2), s.sigmoid().flatten(2)], 1), halves(1), {CAT}),
    "moved after": (
        lambda b, s, *_: torch.cat([b, s.sigmoid()], 1).flatten(2).transpose(1, 2), halves(2), {CAT, VIEW, PERMUTE},
    ),
    "stack": (lambda b, s, *_: torch.stack([b, s.softmax(1)], 1), halves(1), {CAT, VIEW}),
    "levels": (with_levels, halves(1), {CAT}),
    "in a dictionary": (lambda b, s, *_: {"both": torch.cat([b, s.sigmoid()], 1)}, lambda f: (
        f["both"] if isinstance(f, dict) else f).chunk(2, 1), {CAT}),
    "an input": (lambda b, *rest: torch.cat([b, rest[-1]], 1), lambda f: (f[:, :4], f[:, 4:]), {CAT}),
    "a constant": (
        lambda _, s, *__: torch.cat([s.sigmoid(), torch.full((1, 1, 10, 10), 640.0)], 1),
        lambda f: (f[:, :4], f[:, 4:]), {CAT},
    ),
    "a padding value": (lambda _, s, *__: F.pad(s, (0, 1), value=500.0), lambda f: [f[..., :-1]],
                        {"aten.constant_pad_nd.default"}),
    "computed with too": (computed_with_too, in_first(1), {CAT}),
}  # fmt: skip
ON_THE_NPU: dict[str, Case] = {
    "nearly equal ranges": (lambda b, s, *_: torch.cat([b / 300, s], 1), halves(1), set()),
    "one value twice": (lambda b, *_: torch.cat([b, b.flip(3)], 1), halves(1), set()),
    "equal fixed qparams": (lambda b, s, *_: torch.cat([(b / 300).sigmoid(), s.softmax(1)], 1), halves(1), set()),
    "zeros": (lambda b, *_: torch.cat([torch.zeros(1, 2, 10, 10), b], 1), lambda f: [f[:, 2:]], set()),
    "padded with zero": (lambda b, *_: F.pad(b, (0, 1)), lambda f: [f[..., :-1]], set()),
    "computed with": (lambda b, s, last, _: last(torch.cat([b, s.sigmoid()], 1)[:, :4]), lambda f: [f], set()),
    "returned and computed with": (
        lambda b, s, last, _: ((j := torch.cat([b / 300, s], 1)), last(j[:, :4])), in_first(1), set(),
    ),
}  # fmt: skip
CASES = {**IN_FLOAT, **ON_THE_NPU}


def built(name: str) -> tuple[nn.Module, list[Inputs]]:
    if name == "an input":
        function = CASES[name][0]
        return seeded(lambda: model_of(lambda b, s, last, x: function(b, s, last, x[..., 1:-1, 1:-1]))), samples()
    return seeded(lambda: model_of(CASES[name][0])), samples()


def assert_parts_are_kept(model: nn.Module, found: Callable[..., Any], parts: Split, inputs: Sequence[Inputs]) -> None:
    for place in range(len(parts(model(*inputs[0])))):
        kept = signal_to_noise(lambda *x: parts(found(*x))[place], lambda *x: parts(model(*x))[place], inputs)  # noqa: B023
        assert kept > LEAST_SQNR, f"part {place}: {kept:.1f} dB"


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_each_part_keeps_its_resolution(name: str) -> None:
    _, parts, on_cpu = CASES[name]
    model, inputs = built(name)
    model_quantized = quantize(model, inputs[0], inputs, recover=None)
    program = lower(model_quantized)
    assert_parts_are_kept(model, program.run, parts, inputs)
    assert_parts_are_kept(model, model_quantized, parts, inputs)
    left = {row.op: row.reason for row in program.placement if row.where == "cpu"}
    assert left.keys() == on_cpu
    assert all("keep their own qparams" in str(reason) for reason in left.values())
    assert {row.partition for row in program.placement if row.where == "npu"} == {0}


@torch.no_grad()
@pytest.mark.parametrize("name", ["along channels", "levels", "computed with too", "nearly equal ranges"])
def test_the_documented_flow(name: str) -> None:
    _, parts, on_cpu = CASES[name]
    model, inputs = built(name)
    lowered = lower_documented(convert(model, inputs[0], calibration=inputs), inputs[0])
    assert_parts_are_kept(model, lowered.run, parts, inputs)
    assert (lowered.delegates, set(lowered.cpu)) == (1, on_cpu)


@torch.no_grad()
@pytest.mark.parametrize("recover", ["fast", "auto"])
@pytest.mark.parametrize("name", ["moved after", "computed with too"])
def test_recovery(name: str, recover: str) -> None:
    model, inputs = built(name)
    quantized = quantize(model, inputs[0], inputs, recover=recover)
    assert_parts_are_kept(model, lower(quantized).run, CASES[name][1], inputs)


@torch.no_grad()
def test_a_chosen_observer() -> None:
    model, inputs = built("nearly equal ranges")
    quantized = quantize(model, inputs[0], inputs, recover=None, observer=HistogramObserver)
    assert {row.where for row in lower(quantized).placement} == {"npu"}


def test_observers_of_parts_merge() -> None:
    options = {"dtype": torch.int8, "quant_min": -128, "quant_max": 127, "qscheme": torch.per_tensor_affine}
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(64, generator=generator) for _ in range(4)]

    def observers() -> list[PartObserver]:
        joins = [LinkedParts()]
        return [PartObserver(observer=RangeObserver, joins=joins, **options) for _ in range(2)]

    (first, second), (whole, other) = observers(), observers()
    for value in values:
        whole(value)
    other(values[0])
    second(values[0])
    first(values[0])
    assert first.calculate_qparams() != whole.calculate_qparams()
    later = observers()[0]
    for value in values[1:]:
        later(value)
    first.merge(later.state())
    assert first.calculate_qparams() == whole.calculate_qparams() == second.calculate_qparams()


@pytest.mark.parametrize("name", ["along channels", "nearly equal ranges"])
def test_training(name: str) -> None:
    _, parts, on_cpu = CASES[name]
    model, inputs = built(name)
    exported = torch.export.export(model.train(), inputs[0]).module()
    prepared = prepare_qat_pt2e(exported, NeutronQuantizer(is_qat=True))
    for sample in inputs:
        prepared(*sample)
    lowered = lower_documented(convert_pt2e(prepared), inputs[0])
    with torch.no_grad():
        assert_parts_are_kept(model.eval(), lowered.run, parts, inputs)
    assert (lowered.delegates, set(lowered.cpu)) == (1, on_cpu)


class TestInt8Outputs:
    def program(self, name: str) -> tuple[QuantizedModel, str]:
        model, inputs = built(name)
        quantized = quantize(model, inputs[0], inputs, recover=None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.lowered = lower(quantized, int8_io=True)
        return quantized, "\n".join(str(item.message) for item in caught if item.category is FloatIOWarning)

    def test_a_float_concatenation_states_its_cost(self) -> None:
        _, message = self.program("along channels")
        assert "3,200 bytes instead of 800" in message
        assert "return the parts as separate outputs" in message
        assert self.lowered.outputs[0].dtype == torch.float32

    def test_a_concatenation_on_the_npu_is_int8(self) -> None:
        _, message = self.program("nearly equal ranges")
        assert not message
        assert self.lowered.outputs[0].dtype == torch.int8


def test_parts_of_nearly_equal_ranges_have_equal_qparams() -> None:
    model, inputs = built("nearly equal ranges")
    converted = convert(model, inputs[0], calibration=inputs)
    (joined,) = output_node(converted.graph).all_input_nodes
    assert len({node.args[1:3] for node in joined.all_input_nodes if is_dequantize(node)}) == 1
