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
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e

from openneutron import NeutronQuantizer, passes, quantize
from openneutron.errors import ModelError, OpenNeutronError
from openneutron.targets import TARGETS

SAMPLE = (torch.linspace(-1, 1, 20).reshape(5, 4),)
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


READERS: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], str]] = {
    "indices": (lambda m, x: m.layer(x)[m.edges.coalesce().indices()[0]], "coo"),
    "values": (lambda m, x: m.layer(x).sum() * m.edges.coalesce().values(), "coo"),
    "crow_indices": (lambda m, x: m.layer(x)[m.edges.crow_indices()[:3]], "csr"),
    "col_indices": (lambda m, x: m.layer(x)[m.edges.col_indices()], "csr"),
    "row_indices": (lambda m, x: m.layer(x)[m.edges.row_indices()], "csc"),
    "_nnz": (lambda m, x: m.layer(x) * m.edges._nnz(), "coo"),
    "_sparse_softmax": (lambda m, x: torch.sparse.mm(torch.sparse.softmax(m.edges, 1), m.layer(x)), "coo"),
    "sparse_coo_tensor": (
        lambda m, x: torch.sparse.mm(torch.sparse_coo_tensor(torch.ones(2, 1).long(), x[0, :1], (5, 5)), m.layer(x)),
        "coo",
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("documented", [False, True])
@pytest.mark.parametrize("name", READERS)
def test_operators_without_a_dense_counterpart_are_refused(name: str, documented: bool) -> None:
    function, layout = READERS[name]
    model = seeded(lambda: Model(function, layer=nn.Linear(4, 6), edges=LAYOUTS[layout]())).eval()
    exported = torch.export.export(model, SAMPLE).module()
    with pytest.raises(ModelError, match=rf"dense.*register it as a buffer.*aten\.{name}") as error:
        prepare_pt2e(exported, NeutronQuantizer()) if documented else quantize(model, SAMPLE, [SAMPLE], progress=False)
    assert error.value.source is not None


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_dead_operator_is_refused_before_batch_norms_are_folded() -> None:
    layer = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    model = seeded(lambda: Model(READERS["_nnz"][0], layer=layer, edges=LAYOUTS["coo"]())).eval()
    exported = torch.export.export(model, SAMPLE).module()
    with pytest.raises(ModelError, match=r"aten\._nnz"):
        prepare_pt2e(exported, NeutronQuantizer())


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("function", [
    lambda m, x: torch.sparse.mm(m.edges.coalesce() * 2, m.layer(x)),
    lambda m, x: torch.sparse.mm(m.edges.to_sparse_csr(), m.layer(x)),
    lambda m, x: torch.sparse.mm(m.layer(x).T.to_sparse(), m.edges.to_dense()),
])  # fmt: skip
def test_conversions_of_the_layout_are_removed(function: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    model = seeded(lambda: Model(function, layer=nn.Linear(4, 6), edges=LAYOUTS["coo"]())).eval()
    module = passes.prepare(torch.export.export(model, SAMPLE).module(), TARGETS["imxrt700"])
    assert all(node.meta["val"].layout is torch.strided for node in module.graph.nodes if "val" in node.meta)
    torch.testing.assert_close(module(*SAMPLE), model(*SAMPLE))


@pytest.mark.filterwarnings("ignore:Sparse")
def test_training_of_a_sparse_parameter_is_refused() -> None:
    model = seeded(lambda: Model(PRODUCTS["torch.sparse.mm"], layer=nn.Linear(4, 6), edges=EDGES))
    model.edges = nn.Parameter(LAYOUTS["coo"]())
    exported = torch.export.export(model.train(), SAMPLE).module()
    with pytest.raises(ModelError, match=r"would not be trained: 'edges'.*requires_grad_"):
        prepare_qat_pt2e(exported, NeutronQuantizer(is_qat=True))


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
