"""`wide="auto"`: the LSTMs whose cell states get two int8 tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.oracle import samples_like
from torch import nn

from openneutron import NeutronQuantizer, QuantizedModel, quantize
from openneutron.errors import OptionError
from openneutron.recovery.large_cell_states import modules_with_large_cell_states

STEPS, FEATURES = 12, 3
DATA = [(x.abs(),) for (x,) in samples_like(((1, STEPS, FEATURES),), 8, 0, (0.0, 1.0))]


class Pair(nn.Module):
    """Two LSTMs. The first one sums its inputs if `sums` is set, so its cell states grow to about 10."""

    def __init__(self, *, sums: bool) -> None:
        super().__init__()
        self.first = nn.LSTM(FEATURES, 4, batch_first=True)
        self.second = nn.LSTM(4, 4, batch_first=True)
        if sums:
            values = {name: value.detach() for name, value in self.first.named_parameters()}
            values["bias_ih_l0"].view(4, 4)[[0, 1, 3]] = 6.0
            values["weight_ih_l0"][8:12] = 2.0

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.first(x)[0])[0]


def pair(*, sums: bool) -> Pair:
    torch.manual_seed(0)
    return Pair(sums=sums).eval()


def wide_layers(model: QuantizedModel) -> int:
    """Returns the number of layers with wide cell states. Each has three clamps a step, less four at the start."""
    assert model.reference is not None
    clamps = [node for node in model.reference.graph.nodes if node.target is torch.ops.aten.hardtanh.default]
    return round(len(clamps) / (3 * STEPS - 4))


@pytest.mark.parametrize(("sums", "names"), [(True, ["first"]), (False, [])])
def test_modules_are_found_by_their_cell_states(sums: bool, names: list[str]) -> None:
    exported = torch.export.export(pair(sums=sums), DATA[0]).module()
    graph = NeutronQuantizer().prepare_graph(exported, equalizes=False)
    assert modules_with_large_cell_states(graph, DATA) == names


def test_an_lstm_that_is_the_model_is_found() -> None:
    exported = torch.export.export(pair(sums=True).first, DATA[0]).module()
    graph = NeutronQuantizer().prepare_graph(exported, equalizes=False)
    assert modules_with_large_cell_states(graph, DATA) == [""]


@pytest.mark.parametrize("recover", [None, "auto"])
@pytest.mark.parametrize(("sums", "layers"), [(True, 1), (False, 0)])
def test_quantize_selects_layers(sums: bool, layers: int, recover: str | None) -> None:
    assert wide_layers(quantize(pair(sums=sums), DATA[0], DATA, recover=recover, wide="auto")) == layers
    assert wide_layers(quantize(pair(sums=sums), DATA[0], DATA, recover=recover)) == 0


def test_only_quantize_takes_wide_auto() -> None:
    with pytest.raises(OptionError, match=r"Only quantize\(\) takes 'auto'"):
        NeutronQuantizer(wide="auto")
