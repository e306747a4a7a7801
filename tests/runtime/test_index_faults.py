"""Runs with indices out of range: the error names the input, the index and the valid indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.oracle import Function
from torch import Tensor, nn

from openneutron import load, lower, quantize
from openneutron.errors import HostError

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


def test_in_a_process_of_its_own() -> None:
    quantized = quantize(nn.Embedding(9, 8).eval(), (IDS,), [(IDS,)], recover=None, progress=False)
    program = load(lower(quantized).buffer, isolated=True)
    with pytest.raises(HostError, match=r"holds the index 99\. Give indices from 0 to 8"):
        program.run(torch.tensor([0, 99, 1]))
