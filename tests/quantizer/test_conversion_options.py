"""Unsupported options of `convert_pt2e` are rejected by name, so that no whole program runs on the CPU unnoticed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.flow_support import convert, seeded
from tests.models import Model, conv, image
from tests.qat_support import prepared
from torch import nn
from torch.export import export
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from openneutron import NeutronPartitioner, NeutronQuantizer, generate_neutron_compile_spec, lower, quantize
from openneutron.errors import OptionError
from openneutron.partition.partitioner import CpuWarning

MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Sequential(conv(), nn.ReLU()),
    "linear": lambda: nn.Linear(8, 8, bias=False),
    "constant": lambda: Model(lambda m, x: x + m.c, c=image(4, 1, 1)),
}
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())


def calibrated(build: Callable[[], nn.Module], **options: Any) -> GraphModule:
    module: GraphModule = prepare_pt2e(export(seeded(build), (image(),)).module(), NeutronQuantizer(**options))
    module(image())
    return module


def partition(module: nn.Module) -> None:
    """Runs step 5 of the documented flow, the part of OpenNeutron."""
    partitioner = NeutronPartitioner(compile_spec=generate_neutron_compile_spec("imxrt700"))
    partitioner.transform_for_pre_decomposition(export(module, (image(),)))


def lower_it(module: GraphModule) -> None:
    lower(module, (image(),))


both_entries = pytest.mark.parametrize("finish", [partition, lower_it])


@both_entries
@every_model
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_constants_that_are_quantized_at_run_time(
    build: Callable[[], nn.Module], granularity: str, finish: Callable[[GraphModule], None]
) -> None:
    converted = convert_pt2e(calibrated(build, weight_granularity=granularity), fold_quantize=False)
    with pytest.raises(OptionError, match="fold_quantize=False"):
        finish(converted)


@both_entries
def test_trained_constants_that_are_quantized_at_run_time(finish: Callable[[GraphModule], None]) -> None:
    module = prepared(nn.Sequential(conv(), nn.ReLU()))
    module(image(6, 4, 8, 8))
    with pytest.raises(OptionError, match="fold_quantize=False"):
        finish(convert_pt2e(module, fold_quantize=False))


@both_entries
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(conv(), nn.ReLU()),
        lambda: nn.Linear(8, 8),
        lambda: nn.MaxPool2d(2),
        nn.Sigmoid,
        lambda: Model(lambda _, x: torch.matmul(x, x)),
    ],
)
def test_arithmetic_of_integers(build: Callable[[], nn.Module], finish: Callable[[GraphModule], None]) -> None:
    converted = convert_pt2e(calibrated(build), use_reference_representation=True)
    with pytest.raises(OptionError, match="use_reference_representation=True"):
        finish(converted)


@both_entries
def test_nothing_to_fold_is_nothing_to_refuse(finish: Callable[[GraphModule], None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CpuWarning)
        finish(convert_pt2e(calibrated(nn.Sigmoid), fold_quantize=False))


def test_conversions_to_int8_inside_the_model_are_accepted() -> None:
    def codes(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = m.c(x)
        return y, y.round().clamp(-128, 127).to(torch.int8)

    partition(convert(seeded(lambda: Model(codes, c=conv())), (image(),)))


ON_THE_CPU: dict[str, Callable[[], nn.Module]] = {
    "an operator that the NPU lacks": lambda: Model(lambda _, x: torch.sin(x)),
    "no operators": nn.Identity,
}
every_cpu_model = pytest.mark.parametrize("build", ON_THE_CPU.values(), ids=ON_THE_CPU.keys())


@every_cpu_model
def test_a_program_without_the_npu_causes_a_warning(build: Callable[[], nn.Module]) -> None:
    quantized = quantize(build().eval(), (image(),), [image()], recover=None)
    with pytest.warns(CpuWarning, match="Nothing of this program runs on the NPU"):
        lower(quantized)
    with pytest.warns(CpuWarning, match="Nothing of this program runs on the NPU"):
        partition(quantized.module)


@pytest.mark.filterwarnings("ignore::openneutron.quantizer.UnquantizedWarning")
def test_a_warning_lists_float_layers_if_all_layers_are_float() -> None:
    quantized = quantize(seeded(conv), (image(),), [image()], layers={"": "float"})
    with pytest.warns(CpuWarning, match="Nothing of this program runs on the NPU"):
        lower(quantized)


def test_a_float_model_causes_a_warning() -> None:
    with pytest.warns(CpuWarning, match=r"Nothing of this program runs on the NPU[\s\S]*It is not quantized"):
        partition(seeded(conv))


def test_a_program_with_an_operator_on_the_npu_causes_no_warning() -> None:
    quantized = quantize(seeded(lambda: Model(lambda m, x: torch.sin(m.c(x)), c=conv())), (image(),), [image()])
    with warnings.catch_warnings():
        warnings.simplefilter("error", CpuWarning)
        lower(quantized)
    with pytest.warns(CpuWarning, match="^These operators run on the CPU:"):
        partition(quantized.module)
