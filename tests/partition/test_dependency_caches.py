"""Lowering leaves no lowered program in the caches of ExecuTorch and torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._export.utils as torch_export
from executorch.exir.backend.utils import is_same_node
from executorch.exir.lowered_backend_module import LoweredBackendModule
from tests.flow_support import seeded
from tests.models import Model, conv, image
from torch._subclasses.fake_tensor import FakeTensorMode

from openneutron import lower, quantize
from openneutron.partition import dependency_caches, partitioner
from openneutron.partition.dependency_caches import forget_lowered_programs


def keeps_a_program(key: Any) -> bool:
    return any(isinstance(value, LoweredBackendModule) for value in key.key)


@pytest.mark.parametrize("between", [torch.relu, torch.sin], ids=["one delegate", "two delegates"])
def test_calls_of_lowered_programs_are_forgotten(between: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(lambda: Model(lambda m, x: m.d(between(m.c(x))), c=conv(), d=conv()))
    quantized = quantize(model, (image(),), [image()] * 2, recover=None)
    for owner in (dependency_caches, partitioner):
        monkeypatch.setattr(owner, "forget_lowered_programs", lambda: None)
    lower(quantized)
    calls = FakeTensorMode.cache
    others = {key for key in calls if not keeps_a_program(key)}
    assert 0 < len(others) < len(calls)
    forget_lowered_programs()
    assert set(calls) == others


def test_lowering_needs_none_of_the_private_functions_and_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(lambda: Model(lambda m, x: m.c(x), c=conv()))
    quantized = quantize(model, (image(),), [image()] * 2, recover=None)
    expected = lower(quantized).buffer
    load = torch_export._materialize_cpp_cia_ops
    with monkeypatch.context() as patch:
        patch.delattr(torch_export, "_materialize_cpp_cia_ops")
        with dependency_caches.load_composite_operators_once():
            assert not hasattr(torch_export, "_materialize_cpp_cia_ops")
    assert torch_export._materialize_cpp_cia_ops is load
    monkeypatch.setattr(dependency_caches, "is_same_node", is_same_node.__wrapped__)  # without a cache
    monkeypatch.setattr(dependency_caches, "FakeTensorMode", object)
    monkeypatch.setattr(dependency_caches, "torch_export", object())
    assert lower(quantized).buffer == expected
