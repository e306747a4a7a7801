"""Operators on values without dimensions, such as the sum of a tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.oracle import Function, agreement, lowered, quantized
from torch import Tensor

from openneutron import lower, quantize

SHAPE = (1, 3, 4)
CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": lambda x: -x.mean(),
    "abs": lambda x: x.mean().abs(),
    "sign": lambda x: x.mean().sign(),
    "clamp to any limits": lambda x: x.mean().clamp(-0.03, 0.05),
    "relu": lambda x: F.relu(x.mean()),
    "hardtanh": lambda x: F.hardtanh(x.mean(), -0.01, 0.02),
    "a number minus": lambda x: 1 - x.mean(),
    "plus a number times": lambda x: torch.add(x.mean(), x.std(), alpha=0.3),
    "a tensor plus a number times": lambda x: torch.add(x, x.mean(), alpha=0.3),
    "a number times a tensor taken off": lambda x: torch.sub(x.mean(), x, alpha=0.7),
    "times a number": lambda x: x.mean() * 0.3,
    "prelu": lambda x: F.prelu(x.mean(), torch.tensor([0.2])),
    "leaky relu": lambda x: F.leaky_relu(x.mean(), 0.2),
    "comparison": lambda x: x.mean() * (x.mean() > 0.01),
    "where": lambda x: torch.where(x.mean() > 0, x.mean(), x.amax()),
    "minimum": lambda x: torch.minimum(x.amax(), torch.tensor(0.5)),
    "division": lambda x: x.mean() / (x.abs().mean() + 1),
    "hardswish": lambda x: F.hardswish(x.mean()),
    "softshrink": lambda x: F.softshrink(x.mean(), 0.01),
    "threshold": lambda x: F.threshold(x.mean(), 0.01, 0.0),
    "power": lambda x: x.amax() ** 2,
    "stack": lambda x: torch.stack([x.mean(), x.amax()]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_value_without_dimensions(name: str) -> None:
    model = quantized(Function(CASES[name]), (SHAPE,))
    program = lowered(model)
    assert any(row.where == "npu" for row in program.placement)
    assert agreement(program, model).worst <= 1


ALONG: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(0),
    "log_softmax": lambda x: F.log_softmax(x, -1) + x,
    "sum": lambda x: x.sum(0),
    "mean, kept": lambda x: x.mean(-1, keepdim=True),
    "amax": lambda x: x.amax(0),
    "cosine of two values": lambda x: F.cosine_similarity(x, 2 * x + 1, dim=0),
    "max": lambda x: x.max(0)[0],
    "max, kept": lambda x: x.max(0, keepdim=True)[0],
    "min": lambda x: x.min(-1).values,
    "flip": lambda x: x.flip(0),
    "variance and mean, kept": lambda x: torch.add(*torch.var_mean(x, 0, correction=0, keepdim=True)),
    "logsumexp": lambda x: x.logsumexp(0),
    "norm": lambda x: x.norm(dim=0),
    "norm of another order": lambda x: torch.linalg.vector_norm(x, 3, dim=-1),
    "var": lambda x: x.var(0, correction=0) + x,
    "std": lambda x: x.std(-1, correction=0) + x,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ALONG)
@pytest.mark.parametrize("is_input", [True, False])
def test_an_operator_along_a_dimension_of_a_value_without_dimensions(name: str, is_input: bool) -> None:
    function = ALONG[name]
    inputs = (torch.tensor(0.7) if is_input else torch.linspace(0.2, 1, 12).reshape(SHAPE),)
    model = Function(function if is_input else lambda x: function(x.mean() * 2) * 1.5).eval()
    made = quantize(model, inputs, [inputs], recover=None, progress=False)
    wanted, found = model(*inputs), lower(made).run(*inputs)
    assert isinstance(found, Tensor)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, atol=0.03, rtol=0.03)
