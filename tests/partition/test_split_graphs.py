"""Operators that would split a graph: whole models in one delegate, in both flows and in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.both_flows import assert_one_delegate_in_both_flows, samples_of
from tests.flow_support import lower_documented, seeded
from tests.oracle import Function
from tests.qat_support import prepared, train
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from openneutron import NeutronQuantizer, lower, quantize
from openneutron.errors import ModelError

Shape = tuple[int, ...]
IMAGE: Shape = (1, 3, 12, 12)


def conv(inputs: int = 3, outputs: int = 8) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def between(function: Callable[[torch.Tensor], torch.Tensor], outputs: int = 8) -> Callable[[], nn.Module]:
    """Returns a model with `function` of an image between two convolutions."""
    return lambda: Function(lambda a, b, x: b(function(a(x))), conv(), conv(outputs))


def addcmul(values: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(torch.zeros(8, 1, 1), torch.ones(8, 1, 1), values)


class GlobalResponseNorm(nn.Module):
    """The global response normalization of ConvNeXt V2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.rand(channels)), nn.Parameter(torch.rand(channels))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        norm = torch.norm(values, p=2, dim=(1, 2), keepdim=True)
        spread = norm / (norm.mean(-1, keepdim=True) + 1e-6)
        scaled: torch.Tensor = self.gamma * (values * spread) + self.beta
        return scaled + values


def volumes() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(3, 8, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0)),
        nn.BatchNorm3d(8),
        nn.AvgPool3d(2),
        nn.Conv3d(8, 4, 1),
    )


def similarity() -> nn.Module:
    return Function(lambda layer, x, y: F.cosine_similarity(layer(x), layer(y)), nn.Linear(16, 32))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Shape, ...], float]] = {
    "addcmul": (between(addcmul), (IMAGE,), 30),
    "lerp": (between(lambda x: torch.lerp(x, x.sigmoid(), 0.25)), (IMAGE,), 30),
    "both broadcast": (between(lambda x: x.mean(3, keepdim=True) + x.mean(2, keepdim=True)), (IMAGE,), 28),
    "channels by a list": (between(lambda x: x[:, [0, 2, 5, 1]], 4), (IMAGE,), 30),
    "mask": (between(lambda x: x * (x > 0.5).float()), (IMAGE,), 22),
    "logsumexp": (lambda: Function(lambda a, x: a(x).mean((2, 3)).logsumexp(1), conv()), (IMAGE,), 30),
    "windows": (lambda: Function(lambda a, b, x: b(a(x).unfold(-1, 8, 4)), nn.Conv1d(3, 8, 3), nn.Linear(8, 4)),
                ((1, 3, 34),), 30),
    "columns": (lambda: Function(lambda a, b, x: b(F.unfold(a(x), 3).transpose(1, 2)), conv(), nn.Linear(72, 4)),
                (IMAGE,), 30),
    "cosine similarity": (similarity, ((4, 16), (4, 16)), 25),
    "local response norm": (lambda: nn.Sequential(conv(), nn.LocalResponseNorm(5), conv(8)), (IMAGE,), 30),
    "dilated pool": (lambda: nn.Sequential(conv(), nn.MaxPool2d(3, 2, 1, dilation=2), conv(8)), (IMAGE,), 30),
    "global response norm": (lambda: nn.Sequential(nn.Linear(8, 16), GlobalResponseNorm(16), nn.Linear(16, 8)),
                             ((1, 6, 6, 8),), 28),
    "volumes": (volumes, ((1, 3, 4, 12, 12),), 28),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_one_delegate_in_both_flows(name: str) -> None:
    make, shapes, floor = MODELS[name]
    assert_one_delegate_in_both_flows(seeded(make).eval(), samples_of(shapes), floor, recover="fast")


TRAINED: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    name: (MODELS[name][0], MODELS[name][1][0][1:])
    for name in ("lerp", "channels by a list", "mask", "columns", "local response norm", "volumes")
}


@pytest.mark.parametrize("name", TRAINED)
def test_one_delegate_after_training(name: str) -> None:
    make, shape = TRAINED[name]
    module: Any = train(prepared(seeded(make), shape), shape, steps=2)
    lowered = lower_documented(convert_pt2e(module), (torch.zeros(1, *shape),))
    assert (lowered.delegates, lowered.cpu) == (1, [])


CASTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "to a dtype": lambda x: (x > 0.5).to(torch.float32),
    "float": lambda x: (x > 0.5).float(),
    "to another": lambda x: (x > 0.5).to(x),
    "to a device": lambda x: (x > 0.5).to("cpu", torch.float32),
    "type_as": lambda x: (x > 0.5).type_as(x),
}


@pytest.mark.parametrize("recover", [None, "fast"])
@pytest.mark.parametrize("name", CASTS)
def test_truth_values_cast_to_float_stay_on_the_npu(name: str, recover: str | None) -> None:
    model = seeded(lambda: Function(lambda a, b, x: b((y := a(x)) * CASTS[name](y)), nn.Linear(8, 8), nn.Linear(8, 4)))
    assert_one_delegate_in_both_flows(model.eval(), samples_of([(4, 8)]), 18, recover)


SELECTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "columns": lambda mask, x: x.abs()[:, (x[0] > 0) & mask],
    "of all values": lambda mask, x: x.abs().masked_select((x > 0) & mask),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_selection_by_a_mask_of_the_data_is_refused_by_name(name: str) -> None:
    model, samples = Function(SELECTIONS[name], torch.tensor([True, False, True, True])).eval(), samples_of([(2, 4)])
    with pytest.raises(ModelError, match=r"how many values of a mask are true(?s:.)*torch\.where") as error:
        quantize(model, samples[0], samples, recover=None, progress=False)
    assert error.value.op in ("aten.index.Tensor", "aten.masked_select.default")
    exported = torch.export.export(model, samples[0]).module()
    with pytest.raises(ModelError, match="how many values of a mask are true"):
        prepare_pt2e(exported, NeutronQuantizer())


@pytest.mark.parametrize("compared", [lambda x: x > 0.5, lambda x: x >= 0.5, lambda x: x == 0.5, lambda x: x != 0.5])
def test_a_comparison_is_exact_at_the_number_itself(compared: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Half of the outputs of a sigmoid equal one of its codes, and every other value after a relu is zero."""
    model = Function(lambda x: compared(x.relu().sigmoid()).float())
    samples = samples_of([(1, 200)])
    program = lower(quantize(model.eval(), samples[0], samples, recover=None, progress=False))
    values = torch.tensor([[-3.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0, -0.5]]).repeat(1, 25)
    torch.testing.assert_close(program.run(values), model(values), atol=0.01, rtol=0)
