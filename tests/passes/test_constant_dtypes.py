"""Constants and parts of concatenations that are not float32, in models that compute in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.both_flows import samples_of
from tests.fidelity import signal_to_noise
from tests.flow_support import convert, lower_documented, seeded
from tests.models import Model
from torch import nn

from openneutron import lower, quantize
from openneutron.errors import ModelError

Function = Callable[[Any, torch.Tensor], Any]

TAKEN: dict[str, Function] = {
    "double converted to float": lambda m, x: m.l(x) + m.doubles.float(),
    "half converted to the dtype of a value": lambda m, x: m.l(x) + m.halves.to(x.dtype),
    "bfloat16 converted like a value": lambda m, x: m.l(x) * m.brain.to(x),
    "part of a double": lambda m, x: m.l(x) + m.doubles[:1].type_as(x),
    "double number": lambda m, x: m.l(x) * m.number - m.number,
    "double number as divisor": lambda m, x: m.l(x) / m.number,
}
REFUSED: dict[str, Function] = {
    "double": lambda m, x: m.l(x) + m.doubles,
    "returned half": lambda m, x: (m.l(x), m.halves),
}
CONCATENATIONS: dict[str, Function] = {
    "integers first": lambda m, x: torch.cat([m.ids.expand(2, 8), m.l(x)], 1),
    "integers last": lambda m, x: torch.cat([m.l(x), m.ids.expand(2, 8)], 1),
    "computed integers": lambda m, x: torch.cat([(x > 0).int(), m.l(x)], 1),
    "truth values": lambda m, x: torch.cat([x > 0, m.l(x)], 1),
    "stack": lambda m, x: torch.stack([(x > 0).long(), m.l(x)]),
    "hstack": lambda m, x: torch.hstack([x > 0, m.l(x)]),
}


def _model(function: Function) -> nn.Module:
    values = torch.linspace(-1, 1, 8)
    return seeded(
        lambda: Model(
            function, l=nn.Linear(8, 8), doubles=values.double(), halves=values.half(), brain=values.bfloat16(),
            number=torch.tensor(2.5, dtype=torch.float64), ids=torch.arange(8),
        )
    )  # fmt: skip


@pytest.mark.parametrize("name", [*TAKEN, *CONCATENATIONS])
def test_the_dtype_is_converted_in_both_flows(name: str) -> None:
    model, samples = _model({**TAKEN, **CONCATENATIONS}[name]), samples_of([(2, 8)])
    program = lower(quantize(model, samples[0], samples, recover="fast", progress=False))
    assert signal_to_noise(program.run, model, samples[:2]) > 30
    if name in TAKEN:
        assert not [row for row in program.placement if row.where == "cpu"]
    documented = lower_documented(convert(model, samples[0], calibration=samples), samples[0])
    assert signal_to_noise(documented.run, model, samples[:2]) > 30


@pytest.mark.parametrize("name", REFUSED)
def test_a_constant_dtype_that_changes_the_result_dtype_is_refused(name: str) -> None:
    samples = samples_of([(2, 8)], 2)
    with pytest.raises(ModelError, match=r"float(64|16) is not supported") as error:
        quantize(_model(REFUSED[name]), samples[0], samples, progress=False)
    assert error.value.op == "get_attr"
