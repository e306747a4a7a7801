"""Training of operators that are infinite at zero, to which fake quantization rounds small values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.flow_support import lower_documented, seeded
from tests.models import Model, conv, image
from tests.qat_support import BATCH, operators, prepared, train
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from openneutron import lower
from openneutron.quantizer.trained_modules import ReplaceZeros

MODELS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "root of relu": lambda m, x: m.c(x).relu().sqrt(),
    "small power": lambda m, x: m.c(x).relu() ** 0.25,
    "standard deviation": lambda m, x: m.c(x) - m.c(x).std(1, keepdim=True),
    "norm": lambda m, x: m.c(x).norm(dim=1, keepdim=True) * x,
    "normalize": lambda m, x: F.normalize(m.c(x), dim=1),
    "hypot": lambda m, x: torch.hypot(m.c(x), x),
    "logarithm": lambda m, x: torch.log(m.c(x).relu() + 1e-3),
    "logarithm of a clamp": lambda m, x: torch.log10(m.c(x).clamp(min=1e-5)),
    "logarithm of an input": lambda m, x: m.c(torch.log(x)),
    "inverse root": lambda m, x: torch.rsqrt(m.c(x).square() + 1e-4),
    "cosine": lambda m, x: F.cosine_similarity(m.c(x), x, dim=1),
    "p norm of windows": lambda m, x: F.lp_pool2d(m.c(x).relu(), 2, 2),
    "group norm": lambda m, x: F.group_norm(m.c(x), 2),
}
LOWERED = {"root of relu", "normalize", "logarithm of an input", "group norm"}


def _trained(name: str) -> Any:
    function = MODELS[name]
    positive: Callable[[Any, torch.Tensor], torch.Tensor] = lambda m, x: function(m, x.abs() + 1e-4)  # noqa: E731
    return train(prepared(seeded(lambda: Model(function if "input" not in name else positive, c=conv()))))


@pytest.mark.parametrize("name", MODELS)
def test_small_values_train_and_convert(name: str) -> None:
    module = _trained(name)
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())
    move_exported_model_to_eval(module)
    example = image(BATCH, 4, 8, 8, seed=9)
    with torch.no_grad():
        trained = module(example)
    converted = convert_pt2e(module)
    assert bool(trained.isfinite().all())
    steps = float(trained.max() - trained.min()) / 255
    # The converted module computes zeros as the end of the range. After a few steps of training, it may still be far
    # from the values that replaced them.
    close = (converted(example) - trained).abs() <= 4 * steps + 0.02 * trained.abs()
    assert float(close.float().mean()) > 0.8
    if name in LOWERED:
        assert lower_documented(converted, (example,)).cpu == []


def test_a_logarithm_of_zeros_alone() -> None:
    zeros = torch.zeros(2, 3, requires_grad=True)
    torch.autograd.backward(torch.log(ReplaceZeros()(zeros)).sum())
    assert zeros.grad is not None
    assert bool((zeros.grad == 0).all())


def test_other_values_keep_their_gradients() -> None:
    values = torch.tensor([0.0, 0.5, 2.0], requires_grad=True)
    replaced = ReplaceZeros()(values)
    torch.testing.assert_close(replaced.detach(), torch.tensor([0.125, 0.5, 2.0]))
    torch.autograd.backward(replaced.log().sum())
    torch.testing.assert_close(values.grad, torch.tensor([0.0, 2.0, 0.5]))


def test_negative_values_are_not_replaced() -> None:
    assert bool(torch.log(ReplaceZeros()(torch.tensor([-1.0, 1.0])))[0].isnan())


def test_models_without_such_operators_have_no_replacement() -> None:
    module = prepared(Model(lambda m, x: torch.exp(m.c(x)), c=conv()))
    assert not [part for part in module.modules() if isinstance(part, ReplaceZeros)]


def test_conversion_removes_replace_zeros() -> None:
    module = _trained("root of relu")
    assert len([part for part in module.modules() if isinstance(part, ReplaceZeros)]) == 1
    converted = convert_pt2e(module)
    assert operators(converted)["aten.log.default"] == 1
    assert not [part for part in converted.modules() if isinstance(part, ReplaceZeros)]
    example = image(BATCH, 4, 8, 8, seed=9)
    torch.testing.assert_close(lower(converted, (example,)).run(example), converted(example), atol=0.05, rtol=0.0)
