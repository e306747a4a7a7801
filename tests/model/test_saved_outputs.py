"""Files of quantized models whose outputs are named tuples, such as the results of torch.max."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from openneutron import lower, quantize


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class Heads:
    values: Any
    other: Any


class Net(nn.Module):
    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.form = nn.Linear(8, 5), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.fc(x))


@pytest.mark.parametrize(
    "form",
    [
        lambda x: torch.max(x, 1),
        lambda x: {"best": torch.max(x, 1), "all": x},
        lambda x: [x, (torch.min(x, 1), x.exp())],
        lambda x: Heads(torch.max(x, 1), x),
        lambda x: Pair(x, torch.max(x, 1)),
        lambda x: x,
    ],
    ids=["max", "in a dict", "in a list", "in a dataclass", "a named tuple", "a tensor"],
)
def test_a_saved_model_lowers_to_the_same_outputs(form: Callable[[Tensor], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = [torch.randn(1, 8) for _ in range(4)]
    quantized = quantize(Net(form).eval(), data[0], data, recover=None, progress=False)
    quantized.save(tmp_path / "net.pt2")
    wanted = tree_leaves(lower(quantized).run(data[0]))
    found = tree_leaves(lower(tmp_path / "net.pt2").run(data[0]))
    assert len(found) == len(wanted) > 0
    assert all(map(torch.equal, found, wanted))
