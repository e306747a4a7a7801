"""Runs with indices out of range: the error names the input, the index and the valid indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.oracle import Function
from torch import Tensor, nn

from openneutron import load, lower, quantize
from openneutron.errors import HostError, HostProcessError

ROWS = 7
IDS = torch.tensor([0, 2, 1])


def rows() -> Tensor:
    return torch.linspace(-1, 1, ROWS * 8).reshape(ROWS, 8)


CASES: dict[str, tuple[Callable[[], Any], tuple[Tensor, ...], Tensor, str]] = {
    "embedding": (
        lambda: nn.Embedding(9, 8), (IDS,), torch.tensor([0, 99, 1]),
        "'input' holds the index 99. Give indices from 0 to 8",
    ),
    "embedding, negative": (
        lambda: nn.Embedding(9, 8), (IDS,), torch.tensor([0, -1, 1]),
        "the index -1. Give indices from 0 to 8",
    ),
    "embedding of int32": (
        lambda: nn.Embedding(9, 8), (IDS.int(),), torch.tensor([0, 9, 1]).int(),
        "holds the index 9",
    ),
    "reshaped": (
        lambda: lambda x, i: x[i.reshape(1, 3)], (rows(), IDS), torch.tensor([0, 7, 1]),
        "index 7. Give indices from -7 to 6",
    ),
    "rows": (lambda: lambda x, i: x[i], (rows(), IDS), torch.tensor([0, -8, 1]), "index -8. Give indices from -7 to 6"),
    "columns": (
        lambda: lambda x, i: x[:, i], (rows(), IDS), torch.tensor([0, 8, 1]),
        "index 8. Give indices from -8 to 7",
    ),
    "written rows": (
        lambda: lambda x, i: x.index_put((i,), x[:3] * 0.5), (rows(), IDS), torch.tensor([0, 8, 1]), "from -7 to 6",
    ),
    "index_select": (
        lambda: lambda x, i: x.index_select(1, i), (rows(), IDS), torch.tensor([0, 8, 1]),
        "8. Give indices from 0 to 7",
    ),
    "gather": (
        lambda: lambda x, i: x.gather(-1, i), (rows(), IDS.expand(ROWS, 3)), torch.full((ROWS, 3), 12),
        "12. Give indices from 0 to 7",
    ),
    "scatter": (
        lambda: lambda x, i: torch.zeros(ROWS, 8).scatter(0, i, x), (rows(), torch.zeros(ROWS, 8).long()),
        torch.full((ROWS, 8), 7), "7. Give indices from 0 to 6",
    ),
    "scatter_add": (
        lambda: lambda x, i: x.scatter_add(1, i, x * 0.5), (rows(), torch.zeros(ROWS, 8).long()),
        torch.full((ROWS, 8), 9), "9. Give indices from 0 to 7",
    ),
    "index_add": (
        lambda: lambda x, i: x.index_add(0, i, x[:3]), (rows(), IDS), torch.tensor([0, 9, 1]),
        "from -7 to 6",
    ),
    "computed": (
        lambda: lambda x, i: x[i * 2 + 1], (rows(), IDS), torch.tensor([0, 5, 1]),
        r"computes its indices from 'inputs_1' \(0 to 5\). Give values for which they are from -7 to 6",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_index_out_of_range(name: str) -> None:
    make, inputs, wrong, message = CASES[name]
    made = make()
    model = made.eval() if isinstance(made, nn.Module) else Function(made).eval()
    quantized = quantize(model, inputs, [inputs], recover=None, progress=False)
    program = lower(quantized)
    program.run(*inputs)
    for run in (program.run, load(program.buffer).run):
        with pytest.raises(HostError, match=message if run == program.run else message.split("'")[-1]) as caught:
            run(*inputs[:-1], wrong)
        assert "the CPU kernel aten::" in str(caught.value)
        assert (run(*inputs) - quantized(*inputs)).abs().max() < 0.1


class TwoTables(nn.Module):
    """Reads a table of 9 rows at reshaped indices, and one of 200 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Embedding(9, 8), nn.Embedding(200, 8)

    def forward(self, times: Tensor, ids: Tensor) -> Tensor:
        found: Tensor = self.small(ids.reshape(3, 1)).sum(1) + self.large(times.reshape(1, 3)).sum(0)
        return found


class Kept(nn.Module):
    """Reads a table of 5 rows at the indices of the last run, and a table of 200 rows at the indices of this run."""

    at: Tensor

    def __init__(self, reshapes: bool) -> None:
        super().__init__()
        self.small, self.large, self.reshapes = nn.Embedding(5, 8), nn.Embedding(200, 8), reshapes
        self.register_buffer("at", torch.tensor([0, 1, 2]))

    def forward(self, ids: Tensor) -> Tensor:
        at = self.at.reshape(3, 1) if self.reshapes else self.at
        found: Tensor = self.small(at).reshape(3, 8) + self.large(ids)
        self.at.copy_(ids)
        return found


class Counter(nn.Module):
    """Reads a table of 2 rows at the number of the run."""

    runs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2, 8)
        self.register_buffer("runs", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.table(self.runs * 1) + x
        self.runs += 1
        return found


STATE_MESSAGE = r"from the state of shape \(3,\) and dtype int64\. Call reset\(\) .* from 0 to 4"
RUNS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], list[list[list[int]]], str]] = {
    "another input of the same size": (
        TwoTables, (IDS, IDS), [[[199, 10, 3], [0, 99, 1]]], r"'ids' holds the index 99\. Give indices from 0 to 8",
    ),
    "the input of the second kernel": (
        TwoTables, (IDS, IDS), [[[0, 300, 3], [0, 8, 1]]], r"'times' holds the index 300\. Give indices from 0 to 199",
    ),
    "a state": (lambda: Kept(False), (IDS,), [[[0, 99, 1]], [[0, 100, 1]]], STATE_MESSAGE),
    "a state, and an input with a fault": (lambda: Kept(False), (IDS,), [[[0, 99, 1]], [[0, 250, 1]]], STATE_MESSAGE),
    "a reshaped state": (lambda: Kept(True), (IDS,), [[[0, 99, 1]], [[0, 100, 1]]], STATE_MESSAGE),
    "an input beside a state": (
        lambda: Kept(False), (IDS,), [[[0, 4, 1]], [[0, 250, 1]]], r"'ids' holds the index 250\. .* from 0 to 199",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_the_value_that_holds_the_index(name: str) -> None:
    make, inputs, runs, message = RUNS[name]
    program = lower(quantize(make().eval(), inputs, [inputs], recover=None, progress=False))
    *before, wrong = [[torch.tensor(values) for values in run] for run in runs]
    for run in before:
        program.run(*run)
    with pytest.raises(HostError, match=message):
        program.run(*wrong)
    program.reset()
    program.run(*inputs)


def test_indices_that_are_computed_from_a_state() -> None:
    inputs = (torch.randn(1, 8),)
    program = lower(quantize(Counter().eval(), inputs, [inputs], recover=None, progress=False))
    program.run(*inputs)
    program.run(*inputs)
    with pytest.raises(HostError, match=r"computes its indices from the state of shape \(1,\) .* from 0 to 1\."):
        program.run(*inputs)


def test_in_a_process_of_its_own() -> None:
    quantized = quantize(nn.Embedding(9, 8).eval(), (IDS,), [(IDS,)], recover=None, progress=False)
    program = load(lower(quantized).buffer, isolated=True)
    wrong = torch.tensor([0, 99, 1])
    for run in (lambda: program.run(wrong), lambda: program.seconds((wrong,), {}, 2)):
        with pytest.raises(HostError, match=r"holds the index 99\. Give indices from 0 to 8"):
            run()


def test_the_time_of_a_run() -> None:
    quantized = quantize(nn.Embedding(9, 8).eval(), (IDS,), [(IDS,)], recover=None, progress=False)
    program = load(lower(quantized).buffer)
    with pytest.raises(HostError, match=r"holds the index 99\. Give indices from 0 to 8"):
        program.seconds((torch.tensor([0, 99, 1]),), {}, 2)


def test_the_type_of_the_error_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log of a process that has ended may name a kernel that rejected its indices."""
    quantized = quantize(nn.Embedding(9, 8).eval(), (IDS,), [(IDS,)], recover=None, progress=False)
    program = load(lower(quantized).buffer)

    def ended(_: Any) -> None:
        raise HostProcessError("the process ended: aten::embedding.out")

    monkeypatch.setattr(program._session, "call", ended)
    with pytest.raises(HostProcessError, match=r"holds the index 99\. Give indices from 0 to 8"):
        program.run(torch.tensor([0, 99, 1]))
