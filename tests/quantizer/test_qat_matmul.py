"""Each form of a matrix product with a parameter trains quantized. Forms that remove the parameter are rejected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from tests.flow_support import lower_documented, worst_lsb
from tests.models import Model, conv, image
from torch import nn
from torch.export import export
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

from openneutron import NeutronQuantizer
from openneutron.errors import ModelError

STEPS = 4
Shape = tuple[int, ...]


class Product(nn.Module):
    """A function of inputs and trainable parameters."""

    def __init__(self, function: Callable[..., torch.Tensor], *shapes: Shape) -> None:
        super().__init__()
        self.function = function
        seeds = range(len(shapes))
        values = [image(*shape, seed=seed) / 2 for shape, seed in zip(shapes, seeds, strict=True)]
        self.weights = nn.ParameterList(values)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs, *self.weights)


@dataclass(frozen=True)
class Case:
    label: str
    function: Callable[..., torch.Tensor] = field(repr=False)
    inputs: tuple[Shape, ...]
    weights: tuple[Shape, ...]


def case(label: str, function: Callable[..., torch.Tensor], inputs: Shape, *weights: Shape) -> Case:
    return Case(label, function, (inputs,), weights)


CASES = (
    case("mm", torch.mm, (4, 8), (8, 6)),
    case("mm from the left", lambda x, w: torch.mm(w, x), (8, 4), (6, 8)),
    case("mm with a computed weight", lambda x, w: torch.mm(x, w * 2 + 1), (4, 8), (8, 6)),
    case("mm with a part of a weight", lambda x, w: torch.mm(x, w[:, :6]), (4, 8), (8, 9)),
    case("mm twice", lambda x, w: torch.mm(F.relu(torch.mm(x, w)), w), (4, 8), (8, 8)),
    case("mm with a weight and its transpose", lambda x, w: torch.mm(F.relu(torch.mm(x, w)), w.t()), (4, 8), (8, 6)),
    case("mm, bias, relu", lambda x, w, b: F.relu(torch.mm(x, w) + b), (4, 8), (8, 6), (6,)),
    case("matmul", torch.matmul, (4, 8), (8, 6)),
    case("operator", lambda x, w: x @ w, (2, 4, 8), (8, 6)),
    case("operator, transposed", lambda x, w: x @ w.T, (4, 8), (6, 8)),
    case("vector", torch.matmul, (4, 8), (8,)),
    case("matmul of four dimensions", torch.matmul, (2, 3, 4, 8), (3, 8, 6)),
    case("mv", torch.mv, (4, 8), (8,)),
    case("dot", torch.dot, (8,), (8,)),
    case("vecdot", torch.linalg.vecdot, (4, 8), (8,)),
    case("bmm", torch.bmm, (2, 4, 8), (2, 8, 6)),
    case("bmm of one matrix", torch.bmm, (1, 4, 8), (1, 8, 6)),
    case("baddbmm", lambda x, w, b: torch.baddbmm(b, x, w), (2, 4, 8), (2, 8, 6), (2, 4, 6)),
    case("baddbmm, scaled", lambda x, w, b: torch.baddbmm(b, x, w, alpha=0.5, beta=2), (2, 4, 8), (2, 8, 6), (2, 4, 6)),
    case("addbmm", lambda x, w, b: torch.addbmm(b, x, w), (2, 4, 8), (2, 8, 6), (4, 6)),
    case("addmm", lambda x, w, b: torch.addmm(b, x, w), (4, 8), (8, 6), (6,)),
    case("addmm with a matrix", lambda x, w, b: torch.addmm(b, x, w), (4, 8), (8, 6), (4, 6)),
    case("addmm, scaled", lambda x, w, b: torch.addmm(b, x, w, alpha=0.5, beta=2), (4, 8), (8, 6), (6,)),
    case("addmv", lambda x, w, b: torch.addmv(b, x, w), (4, 8), (8,), (4,)),
    case("einsum", lambda x, w: torch.einsum("bi,io->bo", x, w), (4, 8), (8, 6)),
    case("einsum of heads", lambda x, w: torch.einsum("bti,ihd->bhtd", x, w), (2, 4, 8), (8, 2, 3)),
    case("linear", F.linear, (4, 8), (6, 8), (6,)),
    case("linear with a vector", F.linear, (4, 8), (8,)),
    case("linear of one row", F.linear, (8,), (6, 8), (6,)),
    Case("bilinear", F.bilinear, ((4, 8), (4, 5)), ((6, 8, 5), (6,))),
    case("bilinear with itself", lambda x, w: F.bilinear(x, x, w), (4, 8), (6, 8, 8)),
    case("inner", torch.inner, (4, 8), (6, 8)),
    case("tensordot", lambda x, w: torch.tensordot(x, w, 1), (4, 8), (8, 6)),
    case("multi_dot", lambda x, v, w: torch.linalg.multi_dot([x, v, w]), (4, 8), (8, 6), (6, 5)),
    case("chain_matmul", torch.chain_matmul, (4, 8), (8, 6), (6, 5)),
    case("outer", torch.outer, (8,), (6,)),
)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label.replace(" ", "_"))


def samples_of(case: Case) -> list[tuple[torch.Tensor, ...]]:
    return [tuple(image(*shape, seed=seed + 7 * i) for i, shape in enumerate(case.inputs)) for seed in range(STEPS)]


def prepared(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> GraphModule:
    module: GraphModule = prepare_qat_pt2e(export(model, inputs).module(), NeutronQuantizer(is_qat=True))
    return module


@every_case
@pytest.mark.parametrize("training", [True, False])
def test_products_train_and_become_one_delegate(case: Case, training: bool) -> None:
    model, samples = Product(case.function, *case.weights).train(training), samples_of(case)
    module = prepared(model, samples[0])
    for sample in samples:
        module(*sample).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())
    converted = convert_pt2e(module)
    with torch.no_grad():
        errors = [model(*sample) - converted(*sample) for sample in samples]
        signals = [model(*sample) for sample in samples]
    power, noise = (torch.stack([value.square().mean() for value in values]).sum() for values in (signals, errors))
    assert 10 * torch.log10(power / noise) > 25
    if training:
        program = lower_documented(converted, samples[0])
        assert program.delegates == 1
        assert not set(program.cpu) - {"aten.view_copy.default"}  # an output without dimensions
        assert worst_lsb(converted, program.run, samples) <= 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(lambda _, x: torch.sin(x)), "OpenNeutron has no such operator"),
        (nn.Identity(), "no operators"),
    ],
)
def test_nothing_to_train_is_refused_at_prepare(model: nn.Module, message: str) -> None:
    inputs = (image(2, 4, 3, 5, 5),)
    with pytest.raises(ModelError, match=rf"nothing to train quantized[\s\S]*{message}"):
        prepared(model.train(), inputs)


def test_the_refusal_names_operator_and_source_line() -> None:
    with pytest.raises(ModelError, match="nothing to train") as error:
        prepared(Model(lambda _, x: torch.sin(x)), (image(),))
    assert error.value.op == "aten.sin.default"
    assert error.value.source is not None


def test_layers_that_leave_everything_in_float_are_named() -> None:
    module = export(conv().train(), (image(),)).module()
    with pytest.raises(ModelError, match="`layers` leaves all of them in float"):
        prepare_qat_pt2e(module, NeutronQuantizer(is_qat=True, layers={"": "float"}))
