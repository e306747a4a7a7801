"""States without elements, states with constant next values, and states that reach no output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests import state_models as models
from tests.flow_support import seeded
from tests.model.test_state import STEPS, outputs, quantized_in, sqnr_db
from torch import nn

from openneutron import lower, quantize
from openneutron.model.state import states_of, store_of


@pytest.mark.parametrize("flow", ["short", "documented"])
def test_a_model_is_reset_without_a_float_state_that_reaches_no_output(flow: str) -> None:
    class Logs(models.RingBuffer):
        seen: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> Any:
            self.seen.copy_(x.mean())
            return super().forward(x)

    model = seeded(Logs)
    quantized = quantized_in(flow, model, models.stream(model, STEPS))
    quantized.reset()
    assert [str(store_of(state).target) for state in states_of(quantized.module.graph)] == ["cache"]


def test_a_state_that_reaches_no_output_is_not_kept() -> None:
    class Counts(nn.Module):
        calls: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.register_buffer("calls", torch.zeros(1, dtype=torch.int64))

        def forward(self, x: torch.Tensor) -> Any:
            self.calls += 1
            return self.linear(x)

    program = lower(quantize(Counts().eval(), (torch.ones(1, 4),), [torch.ones(1, 4)], recover=None))
    assert [row.where for row in program.placement] == ["npu"]


@pytest.mark.parametrize("flow", ["short", "documented"])
@pytest.mark.parametrize("shape", [(1, 0, 4), (0, 4), (1, 2, 4)])
@pytest.mark.filterwarnings("ignore::openneutron.quantizer.UnquantizedWarning")
def test_a_state_may_have_no_elements(flow: str, shape: tuple[int, ...]) -> None:
    class Remembers(nn.Module):
        kept: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("kept", torch.zeros(shape))

        def forward(self, x: torch.Tensor) -> Any:
            y = self.linear(x)
            self.kept = 0.5 * self.kept + y[: self.kept.shape[0]]
            return y, self.kept

    model = seeded(Remembers)
    generator = torch.Generator().manual_seed(0)
    one = (*[1] * (len(shape) - 1), 4)
    steps: list[models.Inputs] = [(torch.randn(one, generator=generator),) for _ in range(STEPS)]
    program = lower(quantized_in(flow, model, steps))
    assert [tuple(output.shape) for output in program.run(*steps[0])] == [tuple(y.shape) for y in model(*steps[0])]
    for kept in model.buffers():
        kept.zero_()
    program.reset()
    assert sqnr_db(outputs(model, steps), outputs(program.run, steps)) > 33


class ConstantNext(nn.Module):
    """A model whose buffer has the same value after each call, whatever its inputs are."""

    state: torch.Tensor
    constant: torch.Tensor

    def __init__(self, write: Callable[[ConstantNext], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.write = write
        self.register_buffer("state", torch.tensor([1.0, 0.0]))
        self.register_buffer("constant", torch.tensor([0.3, -0.7]))

    def forward(self, x: torch.Tensor) -> Any:
        y = self.linear(x) + 3 * self.state
        self.write(self)
        return y, y + self.constant


@pytest.mark.parametrize("flow", ["short", "documented"])
@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda m: m.state.zero_(), id="zero"),
        pytest.param(lambda m: m.state.fill_(0.5), id="fill"),
        pytest.param(lambda m: m.state.copy_(m.constant), id="buffer"),
        pytest.param(lambda m: m.state.copy_(m.constant * 2), id="product"),
        pytest.param(lambda m: m.state.copy_(m.constant.flip(0)), id="view"),
        pytest.param(lambda m: m.state.copy_(m.linear.bias), id="parameter"),
        pytest.param(lambda m: m.state.copy_(torch.full_like(m.state, 0.25)), id="full"),
    ],
)
@pytest.mark.filterwarnings("ignore::openneutron.quantizer.UnquantizedWarning")
def test_the_next_value_of_a_state_may_be_a_constant(flow: str, write: Callable[[ConstantNext], Any]) -> None:
    torch.manual_seed(0)
    model = ConstantNext(write).eval()
    steps: list[models.Inputs] = [(torch.randn(1, 4),) for _ in range(STEPS)]
    program = lower(quantized_in(flow, copy.deepcopy(model), steps))
    copies = [row for row in program.placement if "clone" in row.op]
    assert all("the next value of a buffer" in str(row.reason) for row in copies)
    assert sqnr_db(outputs(model, steps), outputs(program.run, steps)) > 30
