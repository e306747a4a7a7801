"""Sparse constants become dense ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.both_flows import assert_one_delegate_in_both_flows, samples_of
from tests.flow_support import seeded
from tests.models import Model
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from openneutron import NeutronQuantizer, passes, quantize
from openneutron.errors import OpenNeutronError

EDGES = torch.eye(5) + torch.diag(torch.full((4,), 0.5), 1)
LAYOUTS: dict[str, Callable[[], torch.Tensor]] = {
    "coo": EDGES.to_sparse,
    "csr": EDGES.to_sparse_csr,
    "csc": EDGES.to_sparse_csc,
}
PRODUCTS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "torch.sparse.mm": lambda m, x: torch.sparse.mm(m.edges, m.layer(x)),
    "operator": lambda m, x: m.edges @ m.layer(x),
    "to_dense": lambda m, x: m.edges.to_dense() @ m.layer(x),
}


def graph_network(product: str, layout: str) -> nn.Module:
    return seeded(lambda: Model(PRODUCTS[product], layer=nn.Linear(4, 6), edges=LAYOUTS[layout]()))


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(("product", "layout"), [
    ("torch.sparse.mm", "coo"), ("torch.sparse.mm", "csr"), ("operator", "csr"), ("operator", "csc"),
    ("to_dense", "coo"),
])  # fmt: skip
def test_graph_networks_are_one_delegate(product: str, layout: str) -> None:
    assert_one_delegate_in_both_flows(graph_network(product, layout), samples_of([(5, 4)]), 30.0, "fast")


def test_dense_constants_are_kept() -> None:
    model = Model(lambda m, x: m.edges @ x, edges=EDGES)
    module = torch.export.export(model, (torch.ones(5, 4),)).module()
    before = copy.deepcopy(module).code
    assert not passes.densify_constants(module)
    assert module.code == before


@pytest.mark.parametrize("documented", [False, True])
def test_a_sparse_input_is_refused(documented: bool) -> None:
    model = seeded(lambda: Model(lambda m, x, edges: torch.sparse.mm(edges, m.layer(x)), layer=nn.Linear(4, 6)))
    sample = (torch.ones(5, 4), EDGES.to_sparse())
    exported = torch.export.export(model, sample).module()
    with pytest.raises(OpenNeutronError, match=r"sparse.*to_dense"):
        prepare_pt2e(exported, NeutronQuantizer()) if documented else quantize(model, sample, [sample], progress=False)
