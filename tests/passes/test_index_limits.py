"""An index out of range raises `InputError` in modules of the documented flow, and names the operator that reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.flow_support import convert, lower_documented, seeded
from tests.models import Model
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from openneutron import NeutronQuantizer, quantize
from openneutron.errors import InputError, OpenNeutronError
from openneutron.ops.index_limits import index_limits

Function = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
VALUES = torch.linspace(-1, 1, 24).reshape(4, 6)
READERS: dict[str, tuple[Function, int, int, str]] = {
    "embedding": (lambda m, x, i: m.e(i) + x, 0, 9, r"0 to 9.*aten\.embedding"),
    "a moved index": (lambda m, x, i: m.e(i[None].view(2, 2)).sum() + x, 0, 9, r"0 to 9.*aten\.embedding"),
    "two readers": (lambda m, x, i: m.e(i).sum() + m.l(x)[i].sum(), 0, 3, r"-4 to 3.*aten\.index"),
    "signed and unsigned readers": (
        lambda m, x, i: VALUES.flatten()[:4][i].sum() + m.e(i).sum() + m.l(x),
        0,
        3,
        r"(0 to 9.*embedding|-4 to 3.*index)",
    ),
    "gather": (lambda m, x, i: m.l(x).gather(1, i[:, None]), 0, 5, r"0 to 5.*aten\.gather"),
    "index_select": (lambda m, x, i: m.l(x).index_select(1, i), 0, 5, r"0 to 5.*aten\.index_select"),
    "second dimension": (lambda m, x, i: m.l(x)[:, i], -6, 5, r"-6 to 5.*aten\.index"),
    "scatter": (lambda m, x, i: m.l(x).scatter(1, i[:, None], 3.0), 0, 5, r"0 to 5.*aten\.scatter"),
    "scatter_add": (lambda m, x, i: m.l(x).scatter_add(1, i[:, None], x), 0, 5, r"0 to 5.*aten\.scatter_add"),
    "index_add": (lambda m, x, i: m.l(x).index_add(1, i, x[:, :4]), 0, 5, r"0 to 5.*aten\.index_add"),
    "index_copy": (lambda m, x, i: m.l(x).index_copy(1, i, x[:, :4]), 0, 5, r"0 to 5.*aten\.index_copy"),
    "index_fill": (lambda m, x, i: m.l(x).index_fill(1, i, 2.0), -6, 5, r"-6 to 5.*aten\.index_fill"),
    "index_put": (
        lambda m, x, i: m.l(x).index_put((torch.arange(4), i), x[:, 0]),
        -6,
        5,
        r"-6 to 5.*aten\.index_put",
    ),
    "take": (lambda m, x, i: m.l(x).take(i), -24, 23, r"-24 to 23.*aten\.take"),
    "take_along_dim": (
        lambda m, x, i: m.l(x).take_along_dim(i[:, None], 1),
        0,
        5,
        r"0 to 5.*aten\.(take_along_dim|gather)",
    ),
    "one_hot": (lambda m, x, i: F.one_hot(i, 6).float() + m.l(x), 0, 5, r"0 to 5.*aten\.one_hot"),
}


def prepared(function: Function) -> Any:
    model = seeded(lambda: Model(function, e=nn.Embedding(10, 6), l=nn.Linear(6, 6)))
    return prepare_pt2e(torch.export.export(model, (VALUES, torch.tensor([0, 1, 2, 3]))).module(), NeutronQuantizer())


@pytest.mark.parametrize("name", READERS)
def test_an_index_out_of_range(name: str) -> None:
    function, first, last, message = READERS[name]
    module = prepared(function)
    module(VALUES, torch.tensor([first, 0, 1, last]))
    for bad in (first - 1, last + 1) if name != "two readers" else (last + 1,):
        with pytest.raises(InputError, match=message) as error:
            module(VALUES, torch.tensor([0, 1, bad, 2]))
        assert error.value.source is not None


def read_by_tensors(shape: tuple[int, ...], *indices: torch.Tensor) -> list[list[tuple[int, int]]]:
    """Returns the limits of each index of `value[indices]` for a value of a shape."""
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(f"x{number}") for number in range(1 + len(indices))]
    for node, value in zip(nodes, (torch.zeros(shape), *indices), strict=True):
        node.meta["val"] = value
    graph.call_function(torch.ops.aten.index.Tensor, (nodes[0], nodes[1:]))
    return [[(limit.first, limit.last) for limit in index_limits(node)] for node in nodes[1:]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_masks_select_from_as_many_dimensions_as_they_have(dtype: torch.dtype) -> None:
    index = torch.zeros(1, dtype=torch.int64)
    assert read_by_tensors((3, 4, 5), torch.ones(3, 4, dtype=dtype), index) == [[], [(-5, 4)]]
    assert read_by_tensors((3, 4, 5), index, torch.ones(4, dtype=dtype), index) == [[(-3, 2)], [], [(-5, 4)]]
    assert read_by_tensors((3, 4, 5), torch.ones(3, dtype=dtype)) == [[]]


def test_integers_that_select_nothing() -> None:
    prepared(lambda m, x, i: m.l(x) * i.float().sum())(VALUES, torch.tensor([-100, 0, 1, 100]))


def test_the_converted_module_checks_indices_and_can_be_lowered() -> None:
    model = seeded(lambda: Model(lambda m, i: m.l(m.e(i)), e=nn.Embedding(10, 6), l=nn.Linear(6, 6)))
    sample = (torch.tensor([[1, 9]]),)
    converted = convert(model, sample)
    with pytest.raises(InputError, match="10 to 10"):
        converted(torch.tensor([[10, 10]]))
    assert lower_documented(converted, sample).delegates == 1


def test_the_short_flow() -> None:
    model = seeded(lambda: Model(lambda m, i: m.l(m.e(i)), e=nn.Embedding(10, 6), l=nn.Linear(6, 6)))
    with pytest.raises(OpenNeutronError, match="Check the integers"):
        quantize(model, (torch.tensor([[1, 9]]),), [(torch.tensor([[1, 10]]),)], progress=False)
