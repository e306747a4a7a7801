"""The kernel that computes each value: kernels with several outputs, in-place kernels, and those without a result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
from torch import Tensor, nn

from openneutron.cpu.signatures import signature_of
from openneutron.formats import pte
from openneutron.formats.kernel_calls import DEQUANTIZE, computing_call, qparams_of_call, writers_of, written_values
from openneutron.formats.pte import KernelCall, Method, Slot

QUANTIZED = "quantized_decomposed::quantize_per_tensor.out"
DEQUANTIZED = "quantized_decomposed::dequantize_per_tensor.out"
SLOTS = (*(Slot(rank=1, kind="tensor") for _ in range(6)), Slot(kind="tensors", items=2, members=(4, -1, 5)))
"""Six tensors, and a list of two of them and None."""
NUMBERS = len(SLOTS)
QPARAMS = (Slot(constant=0.5), Slot(constant=-128), Slot(constant=127), Slot(constant=1))


def method_of(*calls: KernelCall) -> Method:
    return Method("forward", (), (), calls, (), (), slots=SLOTS + QPARAMS)


CALLS = {
    "out": ("aten::add.out", (0, 1, NUMBERS, 2, 2), (2,)),
    "two outputs": ("aten::max.dim_max", (0, NUMBERS, NUMBERS, 4, 5, 6), (4, 5)),
    "a list of outputs": ("aten::split_copy.Tensor_out", (0, NUMBERS, NUMBERS, 6, 6), (4, 5)),
    "in place, with a result": ("aten::copy_", (0, 1, NUMBERS, 2), (0, 2)),
    "in place, without a result": ("executorch_prim::et_copy_index.tensor", (0, 1, NUMBERS), (0,)),
    "no argument declared as written": ("executorch_prim::et_view.default", (0, NUMBERS, 3), (3,)),
    "unknown": ("mine::operator.out", (0, 1, 3), (3,)),
    "unknown, with a list": ("mine::operator.out", (0, 6), (4, 5)),
    "no arguments": ("mine::operator.out", (), ()),
}


@pytest.mark.parametrize(("name", "arguments", "expected"), CALLS.values(), ids=CALLS)
def test_values_that_a_kernel_writes(name: str, arguments: tuple[int, ...], expected: tuple[int, ...]) -> None:
    call = KernelCall(name, arguments=arguments)
    method = method_of(call)
    assert written_values(method, call, signature_of) == expected
    assert writers_of(method, signature_of) == dict.fromkeys(expected, call)


DEQUANTIZE_CALL = KernelCall(DEQUANTIZED, arguments=(0, *range(NUMBERS, NUMBERS + 4), NUMBERS, 1, 1))
MOVES = {
    "clone": KernelCall("dim_order_ops::_clone_dim_order.out", arguments=(1, NUMBERS, NUMBERS, 2, 2)),
    "copy of the second argument": KernelCall("aten::copy.out", arguments=(3, 1, NUMBERS, 2, 2)),
    "copy in place": KernelCall("aten::copy_", arguments=(2, 1, NUMBERS, 2)),
    "copy to an index": KernelCall("executorch_prim::et_copy_index.tensor", arguments=(2, 1, NUMBERS)),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_kernels_that_move_are_skipped(move: KernelCall) -> None:
    method = method_of(DEQUANTIZE_CALL, move)
    call = computing_call(writers_of(method, signature_of), 2)
    assert call is DEQUANTIZE_CALL
    assert qparams_of_call(method, call, DEQUANTIZE) == (0.5, -128)


def test_qparams_are_those_of_their_positions() -> None:
    """A program stores equal constants once, so the zero point may be the value that is also the least integer."""
    repeated = KernelCall(QUANTIZED, arguments=(0, NUMBERS, NUMBERS + 1, NUMBERS + 1, NUMBERS + 2, NUMBERS + 3, 1))
    assert qparams_of_call(method_of(repeated), repeated, "quantize_per_tensor") == (0.5, -128)
    computed = KernelCall(QUANTIZED, arguments=(0, 2, 3, NUMBERS + 1, NUMBERS + 2, NUMBERS + 3, 1))
    assert qparams_of_call(method_of(computed), computed, "quantize_per_tensor") is None


class Written(nn.Module):
    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.state.add_(x)
        return self.state * 2


class Outputs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = torch.max(x, 1)
        return values, indices


class Parts(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x, 2)


class Rows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + 1).index_put((torch.tensor([0, 2]),), torch.zeros(4))


MODELS: dict[str, tuple[Callable[[], nn.Module], bool, tuple[str, ...]]] = {
    "outputs of one kernel": (Outputs, False, ("aten::max.dim_max", "aten::max.dim_max")),
    "parts": (Parts, False, ("aten::split_with_sizes_copy.out",) * 2),
    "a state": (Written, False, ("aten::mul.out",)),
    "a kernel in place": (Rows, True, ("aten::index_put_",)),
}


@pytest.mark.parametrize(("make", "reinplace", "expected"), MODELS.values(), ids=MODELS)
def test_writers_of_outputs(make: Callable[[], nn.Module], reinplace: bool, expected: tuple[str, ...]) -> None:
    exported = torch.export.export(make().eval(), (torch.randn(4, 4),))
    edge = to_edge(exported, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    program = edge.to_executorch(ExecutorchBackendConfig(run_reinplace_pass=reinplace))
    (method,) = pte.read(bytes(program.buffer)).methods
    writers = writers_of(method, signature_of)
    assert tuple(writers[number].name for number in method.output_numbers[-len(expected) :]) == expected
