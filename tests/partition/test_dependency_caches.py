"""Lowering leaves no lowered program in the caches of ExecuTorch and torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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
