"""Networks that write to constant positions: sums, means and maxima over the edges of a graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.both_flows import assert_one_delegate_in_both_flows, samples_of
from tests.flow_support import seeded
from torch import nn

NODES, EDGES, WIDTH = 12, 30, 8
Aggregation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

AGGREGATIONS: dict[str, Aggregation] = {
    "index_add": lambda zeros, to, sent: zeros.index_add(0, to, sent),
    "index_add_": lambda zeros, to, sent: zeros.index_add_(0, to, sent),
    "scatter_add_": lambda zeros, to, sent: zeros.scatter_add_(0, to[:, None].expand_as(sent), sent),
    "index_put_": lambda zeros, to, sent: zeros.index_put_((to,), sent, accumulate=True),
    "mean": lambda zeros, to, sent: zeros.scatter_reduce_(
        0, to[:, None].expand(-1, WIDTH), sent, "mean", include_self=False
    ),
    "maximum": lambda zeros, to, sent: zeros.index_reduce(0, to, sent, "amax", include_self=False),
}


class _GraphNet(nn.Module):
    """A convolution on a fixed graph with random edges."""

    def __init__(self, aggregation: Aggregation) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.aggregation, self.first, self.last = aggregation, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        for name in ("sources", "targets"):
            self.register_buffer(name, torch.randint(0, NODES, (EDGES,), generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sent = self.first(x)[self.get_buffer("sources")]
        zeros = torch.zeros(NODES, WIDTH)
        received: torch.Tensor = self.last(F.relu(self.aggregation(zeros, self.get_buffer("targets"), sent)))
        return received


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_a_graph_convolution_is_one_delegate(name: str) -> None:
    model = seeded(lambda: _GraphNet(AGGREGATIONS[name]))
    assert_one_delegate_in_both_flows(model, samples_of([(NODES, WIDTH)]), 25.0, recover=None)


@pytest.mark.parametrize("recover", ["fast", "auto"])
def test_a_graph_convolution_with_recovery(recover: str) -> None:
    model = seeded(lambda: _GraphNet(AGGREGATIONS["index_add"]))
    assert_one_delegate_in_both_flows(model, samples_of([(NODES, WIDTH)]), 25.0, recover=recover)
