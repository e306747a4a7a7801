"""Operators on the CPU are checked against ExecuTorch's kernels before calibration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.exir import to_edge
from tests.flow_support import seeded
from tests.oracle import Function
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e

from openneutron import NeutronQuantizer, lower, quantize
from openneutron.core.fx import op_name
from openneutron.cpu.kernels import check_cpu_kernels
from openneutron.errors import HostError, ModelError
from openneutron.runtime import HostProgram

IMAGE, VIDEO, ROW = (1, 3, 8, 8), (1, 3, 4, 8, 8), (1, 64)
Call = Callable[..., Any]

REFUSED: dict[str, tuple[Call, tuple[int, ...], str]] = {
    "conv3d": (
        lambda x: F.conv3d(x, torch.ones(4, 3, 3, 3, 3)),
        VIDEO,
        r"convolution\.out does not support it.*got, 5",
    ),
    "transposed conv3d": (lambda x: F.conv_transpose3d(x, torch.ones(3, 4, 3, 3, 3)), VIDEO, "convolution.out"),
    "max_pool3d": (lambda x: F.max_pool3d(x, 2), VIDEO, "no kernel aten::max_pool3d_with_indices.out"),
    "adaptive_avg_pool3d": (lambda x: F.adaptive_avg_pool3d(x, 3), VIDEO, "no kernel aten::_adaptive_avg_pool3d.out"),
    "complex": (lambda x: torch.fft.rfft(x).abs(), ROW, r"not support complex numbers \(torch\.complex64\)"),
    "rrelu": (F.rrelu, ROW, "rrelu_with_noise"),
    "sort": (lambda x: x.sort(1)[0], ROW, "no kernel aten::sort.values"),
    "inverse": (torch.linalg.inv, (1, 4, 4), "linalg_inv"),
    "median": (lambda x: x.median(1)[0], ROW, "median"),
    "round to decimals": (lambda x: x.round(decimals=2), ROW, "round"),
}
TAKEN: dict[str, tuple[Call, tuple[int, ...]]] = {
    "sin": (torch.sin, IMAGE),
    "std": (lambda x: x.std(1), ROW),
    "topk": (lambda x: x.topk(3)[0], ROW),
    "argmax": (lambda x: x.argmax(1), ROW),
    "half": (lambda x: (x.half() * 2).float(), ROW),
    "rank 6": (lambda x: x.reshape(1, 3, 2, 4, 2, 4).sin(), IMAGE),
    "a mask": (lambda x: torch.where(x > 0, x, -x), ROW),
}


def left_of(function: Call, shape: tuple[int, ...]) -> list[tuple[Any, str]]:
    """Returns all operators of a function, as if the NPU ran none."""
    graph = torch.export.export(Function(function).eval(), (torch.rand(shape),)).graph
    return [(node, "None is taken.") for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("name", REFUSED)
def test_calls_that_no_kernel_supports_are_refused(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    function, shape, cause = REFUSED[name]
    with pytest.raises(ModelError, match=cause) as error:
        check_cpu_kernels(left_of(function, shape), trusts_table=False)
    assert "can run neither on the NPU nor on the CPU" in str(error.value)
    assert error.value.node is not None
    assert error.value.op is not None
    assert "://" not in str(error.value)
    assert "Check failed" not in capfd.readouterr().err


@pytest.mark.parametrize("name", TAKEN)
def test_calls_that_a_kernel_supports_are_accepted(name: str) -> None:
    check_cpu_kernels(left_of(*TAKEN[name]), trusts_table=False)


def test_all_refused_operators_are_named() -> None:
    with pytest.raises(
        ModelError, match=r"(?s)aten\.sort.*Other operators that can run on neither:.*aten\.median\.dim"
    ) as error:
        check_cpu_kernels(left_of(lambda x: (x.sort(1)[0].sin(), x.median(1)[0]), ROW), trusts_table=False)
    assert "aten.sin" not in str(error.value)


def test_operators_of_the_user_are_left_to_the_user() -> None:
    library: Any = torch.library.Library("openneutron_test_kernels", "DEF")  # type: ignore[no-untyped-call]
    library.define("theirs(Tensor x) -> Tensor")
    library.define("theirs.out(Tensor x, *, Tensor(a!) out) -> Tensor(a!)")
    library.impl("theirs", torch.clone, "CompositeExplicitAutograd")
    theirs: Any = torch.ops.openneutron_test_kernels.theirs
    check_cpu_kernels(left_of(theirs, ROW), trusts_table=False)


class Sorting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embed(x).sort(1)[0]  # type: ignore[no-any-return]


def assert_names_the_line(error: ModelError) -> None:
    assert error.op == "aten.sort.default"
    assert error.source is not None
    assert error.source.startswith(__file__)
    assert "Sorting" in str(error)


@pytest.mark.parametrize("documented", [False, True])
def test_an_operator_of_the_user_without_an_out_variant_is_refused(documented: bool) -> None:
    @torch.library.custom_op(f"openneutron_test::no_out_{documented}", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @twice.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    model, inputs = Function(lambda layer, x: layer(twice(x)), nn.Linear(8, 4)), (torch.ones(1, 8),)
    graph = torch.export.export(model.eval(), inputs).module()
    refuse = (
        (lambda: prepare_pt2e(graph, NeutronQuantizer())) if documented else (lambda: quantize(model, inputs, [inputs]))
    )
    with pytest.raises(ModelError, match=r"no_out_.*out variant.*overload name 'out'") as caught:
        refuse()
    assert caught.value.source is not None


def test_negative_padding_between_operators_on_the_cpu_is_refused() -> None:
    model = Function(lambda layer, x: F.pad(layer(x).prod(0), (-1, 0)), nn.Linear(8, 8)).eval()
    quantized = quantize(model, (torch.ones(2, 8),), [torch.ones(2, 8)], recover=None)
    with pytest.raises(ModelError, match=r"pad.*Padding values must be non-negative"):
        lower(quantized)


def test_quantize_refuses_before_calibration() -> None:
    seen: list[int] = []

    def samples() -> Any:
        for number in range(4):
            seen.append(number)
            yield torch.rand(ROW)

    model = seeded(Sorting)
    with pytest.raises(ModelError) as error:
        quantize(model, (torch.rand(ROW),), samples(), recover=None)
    assert_names_the_line(error.value)
    assert not seen


def test_the_documented_flow_refuses_at_prepare() -> None:
    exported = torch.export.export(seeded(Sorting), (torch.rand(ROW),)).module()
    with pytest.raises(ModelError) as error:
        prepare_pt2e(exported, NeutronQuantizer())
    assert_names_the_line(error.value)


def test_training_refuses_at_prepare() -> None:
    exported = torch.export.export(seeded(Sorting).train(), (torch.rand(ROW),)).module()
    with pytest.raises(ModelError) as error:
        prepare_qat_pt2e(exported, NeutronQuantizer(is_qat=True))
    assert_names_the_line(error.value)


def test_operators_that_layers_keeps_in_float_are_checked() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU()))
    with pytest.raises(ModelError, match=r"aten\.conv3d.*module '0'"):
        quantize(model, (torch.rand(VIDEO),), [torch.rand(VIDEO)], recover=None, layers={"0": "float"})


class TestHostErrors:
    def program(self, function: Call, shape: tuple[int, ...]) -> bytes:
        exported = torch.export.export(Function(function).eval(), (torch.rand(shape),))
        return bytes(to_edge(exported).to_executorch().buffer)

    def test_a_program_with_a_missing_kernel(self) -> None:
        with pytest.raises(HostError, match=r"lacks: aten::max_pool3d_with_indices\.out"):
            HostProgram.from_bytes(self.program(lambda x: F.max_pool3d(x, 2), VIDEO))

    def test_a_kernel_that_fails(self) -> None:
        program = HostProgram.from_bytes(self.program(lambda x: F.conv3d(x, torch.ones(4, 3, 3, 3, 3)), VIDEO))
        with pytest.raises(HostError, match=r"aten::convolution\.out rejects its inputs \(.*got, 5\)"):
            program.run(torch.rand(VIDEO))


def test_nothing_is_tried_twice() -> None:
    left = left_of(lambda x: x.std(1), ROW)
    check_cpu_kernels(left, trusts_table=False)
    assert all(node.meta["custom"] for node, _ in left if op_name(node).startswith("aten."))
