"""States that get one value: each has a value of its own after preparation, and the program agrees with the module."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.flow_support import convert, lower_documented, seeded
from torch import Tensor, nn
from torch.fx import GraphModule

from openneutron import NeutronQuantizer, Stream, lower, quantize, reset
from openneutron.core.fx import is_state_write
from openneutron.model.state import next_value
from openneutron.passes.copy_values_of_states import copy_values_of_states

Write = Callable[["Memory", Tensor, Tensor], None]


class Memory(nn.Module):
    """Adds a layer of the input and three states, and writes to the states."""

    a: Tensor
    b: Tensor
    c: Tensor

    def __init__(self, write: Write) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.write = write
        for name in "abc":
            self.register_buffer(name, torch.zeros(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x) + self.a * self.b + self.c
        self.write(self, x, torch.tanh(result))
        return result


def write_three(memory: Memory, _: Tensor, value: Tensor) -> None:
    for state in (memory.a, memory.b, memory.c):
        state.copy_(value)


def write_input(memory: Memory, x: Tensor, _: Tensor) -> None:
    memory.a.copy_(x)
    memory.b.copy_(x)


def write_old_state(memory: Memory, _: Tensor, value: Tensor) -> None:
    memory.a.copy_(memory.c)
    memory.b.copy_(memory.c)
    memory.c.copy_(value)


def write_different(memory: Memory, x: Tensor, value: Tensor) -> None:
    memory.a.copy_(x)
    memory.b.copy_(value)


SHARED: dict[str, Write] = {
    "one value to three states": write_three,
    "the input": write_input,
    "the old value of another state": write_old_state,
}


def steps_of(count: int) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(1, 4, generator=generator),) for _ in range(count)]


def written_values(write: Write) -> list[str]:
    """Returns the names of the next values of the states after preparation."""
    module: GraphModule = torch.export.export(Memory(write).eval(), steps_of(1)[0]).module()
    prepared = NeutronQuantizer().prepare_graph(module, equalizes=False)
    assert not copy_values_of_states(prepared)
    return [next_value(node).name for node in prepared.graph.nodes if is_state_write(node)]


@pytest.mark.parametrize("name", SHARED)
def test_each_state_gets_a_value_of_its_own(name: str) -> None:
    values = written_values(SHARED[name])
    assert len(set(values)) == len(values)
    assert any(value.startswith("clone") for value in values)


def test_different_values_are_not_copied() -> None:
    assert not any(value.startswith("clone") for value in written_values(write_different))


@pytest.mark.parametrize("name", SHARED)
def test_the_program_agrees_with_the_module(name: str) -> None:
    model, steps = seeded(lambda: Memory(SHARED[name])).eval(), steps_of(6)
    quantized = quantize(model, steps[0], [Stream(steps)], recover=None, progress=False)
    program = lower(quantized)
    reset(quantized.module)
    for step in steps:
        assert torch.allclose(program.run(*step), quantized.module(*step), atol=1e-6)


def test_the_documented_flow_lowers_such_a_model() -> None:
    model, (step,) = seeded(lambda: Memory(write_three)).eval(), steps_of(1)
    assert lower_documented(convert(model, step), step).delegates == 1
