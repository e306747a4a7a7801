"""Samples without a batch dimension: layers get one, on the NPU and for recovery."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.both_flows import assert_one_delegate_in_both_flows, one_delegate, samples_of
from tests.flow_support import seeded
from tests.models import Model, image
from tests.passes.test_passes import after, names
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

from openneutron import NeutronQuantizer, lower, passes

Shapes = tuple[tuple[int, ...], ...]
MODELS: dict[str, tuple[Callable[[], nn.Module], Shapes]] = {
    "linear": (lambda: nn.Linear(8, 5), ((8,),)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3)), ((3, 20),)),
    "conv2d": (lambda: nn.Conv2d(9, 8, 3, padding="same"), ((9, 7, 7),)),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1)), ((4, 7, 7),)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(3, 4, 2), ((3, 9),)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(2, 2, 3, dilation=2), ((2, 7, 7),)),
    "a classifier": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(0), nn.Linear(72, 5)),
        ((3, 8, 8),),
    ),
    "view(-1)": (
        lambda: Model(lambda m, x: m.b(F.relu(m.a(x)).view(-1)), a=nn.Linear(6, 4), b=nn.Linear(20, 3)), ((5, 6),),
    ),
    "inputs of different leading dimensions": (
        lambda: Model(lambda m, x, y: m.a(x) + m.b(y).sum(0), a=nn.Linear(6, 4), b=nn.Linear(3, 4)), ((6,), (5, 3)),
    ),
}  # fmt: skip


class TestBatchLayers:
    def test_a_layer_of_one_sample_gets_a_batch_dimension(self) -> None:
        module = after(passes.batch_layers, nn.Conv2d(4, 8, 3), image(4, 8, 8))
        assert names(module) == ["unsqueeze.default", "conv2d.default", "squeeze.dim"]

    @pytest.mark.parametrize("model", [nn.Conv2d(4, 8, 3), nn.Linear(8, 3)])
    def test_not_one_of_a_batch(self, model: nn.Module) -> None:
        after(passes.batch_layers, model, image(), changes=False)

    def test_not_one_that_is_to_stay(self) -> None:
        after(lambda module: passes.batch_layers(module, lambda _: True), nn.Linear(8, 3), image(8), changes=False)


@pytest.mark.parametrize("name", MODELS)
def test_one_delegate_in_both_flows(name: str) -> None:
    build, shapes = MODELS[name]
    assert_one_delegate_in_both_flows(seeded(build), samples_of(shapes, 40), 28.0, recover="auto")


@pytest.mark.parametrize("recover", [None, "fast"])
@pytest.mark.parametrize("name", ["conv_transpose2d", "linear", "view(-1)"])
def test_recovery(name: str, recover: str | None) -> None:
    build, shapes = MODELS[name]
    one_delegate(seeded(build), samples_of(shapes, 40), 28.0, recover)


@pytest.mark.parametrize("name", ["conv1d", "a classifier"])
def test_training(name: str) -> None:
    build, (shape, *_) = MODELS[name]
    inputs = image(*shape)
    prepared = prepare_qat_pt2e(
        torch.export.export(seeded(build).train(), (inputs,)).module(), NeutronQuantizer(is_qat=True)
    )
    prepared(inputs).sum().backward()
    program = lower(convert_pt2e(prepared), (inputs,))
    assert {row.where for row in program.placement} == {"npu"}
