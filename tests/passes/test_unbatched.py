"""Samples without a batch dimension: layers get one, on the NPU and for recovery."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.both_flows import assert_one_delegate_in_both_flows, one_delegate, samples_of
from tests.fidelity import signal_to_noise
from tests.flow_support import convert, seeded
from tests.models import Model, conv, image
from tests.passes.test_passes import after, names
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

from openneutron import NeutronQuantizer, lower, passes, quantize

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
        module = after(passes.add_batch_dimension, nn.Conv2d(4, 8, 3), image(4, 8, 8))
        assert names(module) == ["unsqueeze.default", "conv2d.default", "squeeze.dim"]

    @pytest.mark.parametrize("model", [nn.Conv2d(4, 8, 3), nn.Linear(8, 3)])
    def test_layers_of_a_batch_get_no_dimension(self, model: nn.Module) -> None:
        after(passes.add_batch_dimension, model, image(), changes=False)

    def test_no_squeeze_remains_between_layers_and_elementwise_operators(self) -> None:
        def function(m: Any, x: torch.Tensor) -> torch.Tensor:
            read: torch.Tensor = F.relu(m.c(F.max_pool2d(F.relu(m.c(x)), 2, 1, padding=1)[:, :8, :8]) + x)
            return torch.cat([read, F.hardswish(m.d(read))]).mean((1, 2))

        module = after(passes.add_batch_dimension, Model(function, c=conv(), d=conv()), image(4, 8, 8))
        expected = ["conv2d", "relu", "max_pool2d", "squeeze", "slice", "slice", "unsqueeze", "conv2d", "add", "relu"]
        expected += ["conv2d", "hardswish", "cat", "mean", "squeeze"]
        assert [name.split(".")[0] for name in names(module)] == ["unsqueeze", *expected]

    def test_operators_that_depend_on_the_rank_stay(self) -> None:
        model = Model(lambda m, x: torch.softmax(m.a(x), 0) + m.a(x).sum(), a=nn.Conv1d(4, 4, 1))
        assert "unsqueeze.default" not in names(after(passes.add_batch_dimension, model, image(4, 8)))[4:]

    def test_layers_to_keep_get_no_dimension(self) -> None:
        def keep_all(module: Any) -> bool:
            return passes.add_batch_dimension(module, lambda _: True)

        after(keep_all, nn.Linear(8, 3), image(8), changes=False)


@pytest.mark.parametrize("name", MODELS)
def test_one_delegate_in_both_flows(name: str) -> None:
    build, shapes = MODELS[name]
    assert_one_delegate_in_both_flows(seeded(build), samples_of(shapes, 40), 28.0, recover="auto")


@pytest.mark.parametrize("recover", [None, "fast"])
@pytest.mark.parametrize("name", ["conv_transpose2d", "linear", "view(-1)"])
def test_recovery(name: str, recover: str | None) -> None:
    build, shapes = MODELS[name]
    one_delegate(seeded(build), samples_of(shapes, 40), 28.0, recover)


ALIKE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d, relu, linear": (
        lambda: Model(lambda m, x: m.l(F.relu(m.c(x)).flatten(-2)), c=nn.Conv1d(3, 8, 3), l=nn.Linear(144, 5)), (3, 20),
    ),
    "linear, relu": (lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), (16,)),
    "conv2d, hard swish, pool": (
        lambda: Model(
            lambda m, x: m.b(F.avg_pool2d(F.hardswish(m.a(x)), 2)).mean((-2, -1)), a=nn.Conv2d(3, 8, 3),
            b=nn.Conv2d(8, 4, 3),
        ), (3, 10, 10),
    ),
    "a residual": (
        lambda: Model(lambda m, x: F.relu(m.b(F.relu(m.a(x))) + x), a=conv(), b=nn.Conv2d(4, 4, 1)), (4, 8, 8),
    ),
    "conv3d": (
        lambda: Model(lambda m, x: m.l(F.relu(m.c(x)).flatten(-4)), c=nn.Conv3d(2, 4, 3), l=nn.Linear(288, 4)),
        (2, 4, 8, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("recover", [None, "fast", "auto"])
@pytest.mark.parametrize("name", ALIKE)
def test_unbatched_networks_are_as_accurate_as_a_batch_of_one(name: str, recover: str | None) -> None:
    """Channels have different magnitudes, because observers must not treat them as samples."""
    build, shape = ALIKE[name]
    magnitudes = torch.logspace(0, 1.5, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    samples = [(sample * magnitudes if len(shape) > 1 else sample,) for (sample,) in samples_of((shape,), 40)]
    model = seeded(build)
    found = _quantized_db(model, samples, recover)
    assert found >= _quantized_db(model, [(sample[None],) for (sample,) in samples], recover) - 0.5


WEIGHTED: dict[str, tuple[Callable[[], nn.Module], Shapes]] = {
    "lstm": (lambda: Model(lambda m, x: m.h(m.l(x)[0][-1]), l=nn.LSTM(6, 8), h=nn.Linear(8, 3)), ((4, 6),)),
    "gru": (lambda: Model(lambda m, x: m.l(x)[0], l=nn.GRU(6, 8)), ((4, 6),)),
    "matrix @ vector": (lambda: Model(lambda m, x: m.l.weight @ x, l=nn.Linear(8, 5)), ((8,),)),
    "vector @ matrix": (lambda: Model(lambda m, x: x @ m.l.weight, l=nn.Linear(5, 8)), ((8,),)),
    "bilinear": (lambda: nn.Bilinear(4, 5, 3), ((4,), (5,))),
    "leading dimensions 7 and 5": (
        lambda: Model(
            lambda m, x, y: torch.cat([m.a(x).view(-1), m.b(y).view(-1)]), a=nn.Linear(6, 4), b=nn.Linear(3, 4)
        ), ((7, 6), (5, 3)),
    ),
    "leading dimensions 3 and 1": (
        lambda: Model(lambda m, x, y: m.a(x) + m.b(y), a=nn.Linear(6, 4), b=nn.Linear(3, 4)), ((3, 6), (1, 3)),
    ),
    "ranks 1 and 2": (
        lambda: Model(
            lambda m, x, y: m.a(x) + F.relu(m.b(y)).mean(1), a=nn.Linear(6, 4), b=nn.Conv1d(3, 4, 3)
        ), ((6,), (3, 9)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTED)
def test_recovery_loses_less_than_a_decibel(name: str) -> None:
    """One decibel may be chance for outputs with few values."""
    build, shapes = WEIGHTED[name]
    model, samples = seeded(build), samples_of(shapes, 40)
    assert _quantized_db(model, samples, "fast") >= _quantized_db(model, samples, None) - 1.0


def test_embedding() -> None:
    """Samples are indices. There are too few to read each row of the table."""
    model = seeded(lambda: Model(lambda m, x: m.l(F.relu(m.c(m.e(x).T)).view(-1)), e=nn.Embedding(10, 4),
                                 c=nn.Conv1d(4, 6, 3), l=nn.Linear(36, 3)))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    samples = [(torch.randint(10, (8,), generator=generator),) for _ in range(40)]
    plain, fast = (_quantized_db(model, samples, recover) for recover in (None, "fast"))
    assert fast >= max(plain - 1.0, 30.0)


def test_channels_do_not_count_as_samples_in_the_documented_flow() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Conv1d(8, 2, 3)))
    samples = [(x * torch.tensor([[1.0], [100.0]]),) for (x,) in samples_of(((2, 64),), 20)]
    assert signal_to_noise(convert(model, samples[0], calibration=samples), model, samples) > 28


def _quantized_db(model: nn.Module, samples: Sequence[tuple[torch.Tensor, ...]], recover: str | None) -> float:
    quantized = quantize(model, samples[0], samples, recover=recover, progress=False)
    return signal_to_noise(quantized.module, model, samples)


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
