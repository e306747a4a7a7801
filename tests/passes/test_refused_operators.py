"""Random number operators and control flow are rejected before calibration, with the user's source line."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.flow_support import seeded, worst_lsb
from tests.models import Model
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from openneutron import NeutronQuantizer, lower, quantize
from openneutron.errors import ModelError

Function = Callable[[Any, torch.Tensor], Any]
INPUTS = (torch.linspace(-1, 1, 24).reshape(3, 8),)

DRAW: dict[str, Function] = {
    "rand_like": lambda m, x: m.l(x) + torch.rand_like(x),
    "randn": lambda m, x: m.l(x) + torch.randn(3, 8),
    "randint": lambda m, x: m.l(x) + torch.randint(0, 3, (3, 8)),
    "randperm": lambda m, x: m.l(x)[torch.randperm(3)],
    "bernoulli": lambda m, x: m.l(x) * torch.bernoulli(x.sigmoid()),
    "bernoulli_": lambda m, x: m.l(x) * torch.empty_like(x).bernoulli_(0.5),
    "normal": lambda m, x: torch.normal(m.l(x), 1.0),
    "normal_": lambda m, x: m.l(x) + torch.empty(3, 8).normal_(),
    "uniform_": lambda m, x: m.l(x) + torch.empty(3, 8).uniform_(),
    "multinomial": lambda m, x: torch.multinomial(m.l(x).softmax(-1), 2),
    "gumbel_softmax": lambda m, x: F.gumbel_softmax(m.l(x)),
    "attention": lambda m, x: F.scaled_dot_product_attention(*(m.l(x)[None],) * 3, dropout_p=0.3),
}
TRAIN: dict[str, Function] = {
    "dropout": lambda m, x: m.l(F.dropout(x, 0.5, training=True)),
    "alpha_dropout": lambda m, x: F.alpha_dropout(m.l(x), 0.5, training=True),
    "dropout2d": lambda m, x: F.dropout2d(m.l(x)[None], 0.5, training=True),
    "dropout in place": lambda m, x: F.dropout(m.l(x), 0.5, training=True, inplace=True),
    "feature_alpha_dropout": lambda m, x: F.feature_alpha_dropout(m.l(x)[None], 0.5, training=True),
    "rrelu": lambda m, x: F.rrelu(m.l(x), training=True),
    "batch_norm": lambda m, x: F.batch_norm(m.l(x), torch.zeros(8), torch.ones(8), training=True),
}
DRAW_NOTHING: dict[str, Function] = {
    "dropout": lambda m, x: m.l(F.dropout(x, 0.5, training=False)),
    "rrelu": lambda m, x: F.rrelu(m.l(x)),
    "attention": lambda m, x: F.scaled_dot_product_attention(*(m.l(x)[None],) * 3),
    "dropout of nothing": lambda m, x: m.l(F.dropout(x, 0, training=True)),
    "dropout of nothing in place": lambda m, x: F.dropout(m.l(x), 0.0, training=True, inplace=True) * 2,
    "alpha_dropout of nothing": lambda m, x: F.alpha_dropout(m.l(x), 0.0, training=True),
    "dropout2d of nothing": lambda m, x: F.dropout2d(m.l(x)[None], 0.0, training=True),
    "feature_alpha_dropout of nothing": lambda m, x: F.feature_alpha_dropout(m.l(x)[None], 0.0, training=True),
    "nothing reads it": lambda m, x: (torch.rand_like(x), m.l(x))[1],
}


def _scan(m: Any, x: torch.Tensor) -> Any:
    from torch._higher_order_ops import scan

    return scan(lambda carry, row: (carry + row, carry * 2.0), torch.zeros(8), m.l(x))[1]


def _associative_scan(m: Any, x: torch.Tensor) -> Any:
    from torch._higher_order_ops import associative_scan

    return associative_scan(lambda a, b: a + b, m.l(x), dim=0, combine_mode="generic")


def _while_loop(m: Any, x: torch.Tensor) -> Any:
    from torch._higher_order_ops import while_loop

    return m.l(while_loop(lambda i, _: i < 3, lambda i, a: (i + 1, a * 2), (torch.tensor(0), x))[1])  # type: ignore[no-untyped-call]


def _map(m: Any, x: torch.Tensor) -> Any:
    from torch._higher_order_ops.map import map as map_rows

    return map_rows(lambda row: row.relu() * 2, m.l(x))  # type: ignore[arg-type,misc]


CONTROL_FLOW: dict[str, Function] = {
    "cond": lambda m, x: m.l(torch.cond(x.sum() > 0, lambda a: a.relu(), lambda a: a * 2, (x,))),
    "while_loop": _while_loop, "map": _map, "scan": _scan, "associative_scan": _associative_scan,
}  # fmt: skip


def _refused(function: Function, pattern: str) -> None:
    """Checks that both flows reject it and give the source line."""
    model = seeded(lambda: Model(function, l=nn.Linear(8, 8)))
    with pytest.raises(ModelError, match=pattern) as short:
        quantize(model, INPUTS, [INPUTS], progress=False)
    with pytest.raises(ModelError, match=pattern) as documented:
        prepare_pt2e(torch.export.export(model, INPUTS).module(), NeutronQuantizer())
    for caught in (short, documented):
        assert caught.value.node is not None
        assert "test" in (caught.value.source or "") or "models.py" in (caught.value.source or "")


@pytest.mark.parametrize("name", DRAW)
def test_an_operator_that_draws_random_numbers(name: str) -> None:
    _refused(DRAW[name], "draws new random numbers")


@pytest.mark.parametrize("name", TRAIN)
def test_a_function_with_training(name: str) -> None:
    _refused(TRAIN[name], r"This call of \w+ has training=True.*Call it with training=self\.training")


@pytest.mark.parametrize("name", DRAW_NOTHING)
def test_random_operators_that_draw_no_numbers_are_accepted(name: str) -> None:
    model = seeded(lambda: Model(DRAW_NOTHING[name], l=nn.Linear(8, 8)))
    prepare_pt2e(torch.export.export(model, INPUTS).module(), NeutronQuantizer())


@pytest.mark.parametrize("name", [name for name in DRAW_NOTHING if "of nothing" in name])
def test_a_dropout_of_probability_zero_is_removed(name: str) -> None:
    model = seeded(lambda: Model(DRAW_NOTHING[name], l=nn.Linear(8, 8)))
    quantized = quantize(model, INPUTS, [INPUTS], recover=None, progress=False)
    program = lower(quantized)
    assert {row.where for row in program.placement} == {"npu"}
    assert worst_lsb(quantized.module, program.run, [INPUTS]) <= 1


def test_a_dropout_module_in_train_mode() -> None:
    for probability, taken in ((0.0, True), (0.5, False)):
        drop = nn.Dropout(probability)
        model = Model(lambda m, x: m.drop(m.l(x)), l=nn.Linear(8, 8), drop=drop).eval()
        drop.train()
        with nullcontext() if taken else pytest.raises(ModelError, match=r"'drop' \(Dropout\) is in train mode, and"):
            quantize(model, INPUTS, [INPUTS], recover=None, progress=False)


@pytest.mark.parametrize("name", CONTROL_FLOW)
def test_control_flow(name: str) -> None:
    _refused(CONTROL_FLOW[name], f"control flow of torch.{name}")


def test_an_associative_scan_that_runs_on_no_cpu() -> None:
    from torch._higher_order_ops import associative_scan

    model = Model(lambda m, x: associative_scan(lambda a, b: a + b, m.l(x), dim=0), l=nn.Linear(8, 8)).eval()
    with pytest.raises(ModelError, match=r"control flow of torch\.associative_scan"):
        quantize(model, INPUTS, [INPUTS], progress=False)


PYTHON: dict[str, Function] = {
    "if": lambda m, x: m.l(x) if x.sum() > 0 else x,
    "range": lambda m, x: sum(m.l(x) * step for step in range(int(x.abs().max()))),
    "slice": lambda m, x: m.l(x)[: int(x.abs().sum())],
    "item": lambda m, x: m.l(x) * x.sum().item(),
}


@pytest.mark.parametrize("name", PYTHON)
def test_control_flow_of_python(name: str) -> None:
    model = Model(PYTHON[name], l=nn.Linear(8, 8)).eval()
    with pytest.raises(ModelError, match=r"values of a tensor") as caught:
        quantize(model, INPUTS, [INPUTS], progress=False)
    assert caught.value.source is not None
