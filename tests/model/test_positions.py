"""Inputs that are called by their positions, "input0", wherever arguments have names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.flow_support import convert, lower_documented
from torch import Tensor, nn

from openneutron import NeutronProgram, QuantizedModel, load, lower, quantize
from openneutron.accuracy import evaluate
from openneutron.errors import InputError
from openneutron.model.arguments import MISSING, check_names, leaves_at
from openneutron.model.arguments import Path as LeafPath
from openneutron.model.data import forms_of, inputs_in

NESTED: list[LeafPath] = [("x", "a.b"), ("x", "a", "b"), ("n",)]


@pytest.mark.parametrize(
    ("paths", "args", "kwargs", "values"),
    [
        ([("x",), ("y",)], (), {"input0": 1, "input1": 2}, [1, 2]),
        ([("x",), ("y",)], (1,), {"input1": 2}, [1, 2]),
        ([("x",), ("y",)], (), {"y": 2, "input0": 1}, [1, 2]),
        (NESTED, (), {"input0": 1, "input1": 2, "n": 3}, [1, 2, 3]),
        (NESTED, ({"a.b": 1},), {"input1": 2}, [1, 2, MISSING]),
        ([("input1",), ("x",)], (), {"input1": 1}, [1, MISSING]),
        ([("x", "input1"), ("x", "input0")], (), {"input0": 1, "input1": 2}, [MISSING, MISSING]),
        ([("x",)], (), {"input1": 1, "input00": 2, "input": 3, "input-1": 4}, [MISSING]),
    ],
)
def test_values_by_position(
    paths: list[LeafPath], args: tuple[Any, ...], kwargs: dict[str, Any], values: list[Any]
) -> None:
    assert leaves_at(paths, args, kwargs) == values


@pytest.mark.parametrize(
    ("paths", "args", "kwargs", "message"),
    [
        ([("x",), ("y",)], (1,), {"input0": 1}, "p got its input 'x' twice: also as 'input0'. Give it once"),
        ([("x",), ("y",)], (), {"y": 1, "input1": 1}, "p got its input 'y' twice: also as 'input1'"),
        (NESTED, ({"a": {"b": 1}},), {"input1": 1}, "p got its input 'x.a.b' twice: also as 'input1'"),
        ([("x",)], (), {"input1": 1}, "p has no input 'input1'; its inputs are 'x'"),
        ([("x", "input0")], (), {"input0": 1}, "p has no input 'input0'; its inputs are 'x'"),
    ],
)
def test_wrong_positions_are_refused(
    paths: list[LeafPath], args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        check_names(paths, args, kwargs, "p")
    assert message in str(caught.value)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.sub(torch.relu(self.layer(x)), self.layer(other))


def pair(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 8, generator=generator), torch.randn(1, 8, generator=generator)


@pytest.fixture(scope="module")
def quantized() -> QuantizedModel:
    torch.manual_seed(0)
    return quantize(Pair().eval(), pair(0), [pair(seed) for seed in range(4)], recover=None, progress=False)


@pytest.fixture(scope="module")
def program(quantized: QuantizedModel) -> NeutronProgram:
    return lower(quantized)


def test_runs_by_position(program: NeutronProgram) -> None:
    x, other = pair(9)
    host = load(program.buffer)
    wanted = host.run(x, other)
    assert torch.equal(host.run(input1=other, input0=x), wanted)
    assert torch.equal(host.run(x, input1=other), wanted)
    assert torch.equal(host.run(other=other, input0=x), wanted)
    with pytest.raises(InputError, match="got its input 'x' twice: also as 'input0'"):
        host.run(x, other, input0=x)
    with pytest.raises(InputError, match="got no input 'x'"):
        host.run(input1=other)


def test_a_quantized_model_takes_positions(quantized: QuantizedModel) -> None:
    x, other = pair(9)
    wanted = quantized(x, other)
    assert torch.equal(quantized(input1=other, input0=x), wanted)
    assert torch.equal(quantized(x, input1=other), wanted)
    assert torch.equal(quantized(other=other, input0=x), wanted)
    with pytest.raises(InputError, match="got its input 'x' twice: also as 'input0'"):
        quantized(x, other, input0=x)


class OfDict(nn.Module):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["a"] + batch["b"]


def test_a_quantized_model_refuses_the_position_of_a_part() -> None:
    batch = {"a": torch.ones(1, 4), "b": torch.ones(1, 4)}
    found = quantize(OfDict().eval(), (batch,), [(batch,)])
    with pytest.raises(InputError, match=r"'input0' of the quantized model is 'batch.a'.*Give the whole argument 'b"):
        found(input0=batch["a"], input1=batch["b"])


def test_data_by_position(quantized: QuantizedModel) -> None:
    x, other = pair(9)
    for given in ({"input0": x, "input1": other}, {"other": other, "input0": x}):
        (values,) = inputs_in([given], forms_of(quantized.module))
        assert torch.equal(values[0], x)
        assert torch.equal(values[1], other)


@pytest.mark.parametrize("kind", ["quantized", "module", "program", "int8 program"])
def test_evaluation_by_position(quantized: QuantizedModel, kind: str, tmp_path: Path) -> None:
    runs: dict[str, Callable[[], Any]] = {
        "quantized": lambda: quantized,
        "module": lambda: quantized.module,
        "program": lambda: lower(quantized),
        "int8 program": lambda: load(lower(quantized, int8_io=True).buffer),
    }
    run = runs[kind]()
    by_name = [({"x": pair(seed)[0], "other": pair(seed)[1]}, 0) for seed in range(3)]
    by_position = [({"input0": pair(seed)[0], "input1": pair(seed)[1]}, 0) for seed in range(3)]
    for seed, (sample, _) in enumerate(by_position):
        (tmp_path / "class").mkdir(exist_ok=True)
        arrays: dict[str, Any] = {name: value.numpy() for name, value in sample.items()}
        np.savez(tmp_path / "class" / f"{seed}.npz", **arrays)
    scores = [evaluate(run, data, lambda out, _: float(out.sum())) for data in (by_name, by_position, str(tmp_path))]
    assert scores[0] == pytest.approx(scores[1])
    assert scores[0] == pytest.approx(scores[2])


def test_a_documented_program_runs_by_position() -> None:
    x, other = pair(9)
    torch.manual_seed(0)
    host = load(lower_documented(convert(Pair().eval(), pair(0)), pair(0)).pte)
    wanted = host.run(x, other)
    assert torch.equal(host.run(input1=other, input0=x), wanted)
    assert torch.equal(host.run(x, input1=other), wanted)
    with pytest.raises(InputError, match=r"does not contain the names.*or by position \(input0\)"):
        host.run(x, input2=other)
    with pytest.raises(InputError, match="twice"):
        host.run(x, other, input1=other)
