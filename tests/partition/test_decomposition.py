"""ExecuTorch decomposes a partitioned program without a trace, unless it has operators that may be decomposed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._export.utils
from tests.flow_support import convert, lower_documented, seeded
from tests.models import IMAGE, Model, conv, image, small
from torch.export import ExportedProgram

from openneutron import lower, quantize
from openneutron.partition import delegate_call

Build = Callable[[], Model]

# name: model, and whether its program is traced to decompose it
MODELS: dict[str, tuple[Build, bool]] = {
    "one delegate": (small, False),
    "two outputs": (lambda: Model(lambda m, x: (m.c(x), torch.relu(m.d(x))), c=conv(), d=conv()), False),
    "float operator between delegates": (
        lambda: Model(lambda m, x: m.d(torch.sin(m.c(x))), c=conv(), d=conv()), True,
    ),
    "one value returned twice": (lambda: Model(lambda m, x: (m.c(x),) * 2, c=conv()), True),
    "an input returned": (lambda: Model(lambda m, x: (x, m.c(x)), c=conv()), True),
    "a constant returned": (lambda: Model(lambda m, x: (m.c(x), m.k), c=conv(), k=torch.ones(3)), True),
    "a state": (lambda: Model(_adds_to_state, c=conv(), k=torch.zeros(IMAGE)), True),
}  # fmt: skip


def _adds_to_state(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.k.add_(m.c(x))
    return torch.relu(m.k)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[ExportedProgram]:
    """Returns the list of programs that torch decomposes in the test."""
    found: list[ExportedProgram] = []
    decompose = ExportedProgram.run_decompositions

    def counted(program: ExportedProgram, *args: Any) -> ExportedProgram:
        found.append(program)
        decomposed: ExportedProgram = decompose(program, *args)
        return decomposed

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    return found


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_program_has_the_bytes_of_a_traced_program(
    name: str, channels_last: bool, traced: list[ExportedProgram], monkeypatch: pytest.MonkeyPatch
) -> None:
    build, needs_trace = MODELS[name]
    sample = image().contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = quantize(seeded(build), (sample,), [sample] * 2, recover=None)
    program = lower(quantized).buffer
    assert bool(traced) == needs_trace
    monkeypatch.setattr(delegate_call, "is_decomposed", lambda _: False)
    assert lower(quantized).buffer == program
    assert traced


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Returns a list that gets an item each time torch loads the composite operators."""
    found: list[None] = []
    utils: Any = torch._export.utils
    load, collect = utils._materialize_cpp_cia_ops, utils._collect_all_valid_cia_ops_for_namespace
    monkeypatch.setattr(utils, "_materialize_cpp_cia_ops", lambda: found.append(load()))
    uncached = getattr(collect, "__wrapped__", collect)
    monkeypatch.setattr(utils, "_collect_all_valid_cia_ops_for_namespace", uncached)
    return found


def test_the_documented_flow_is_not_traced_after_partitioning(traced: list[ExportedProgram], loads: list[None]) -> None:
    lower_documented(convert(seeded(small), (image(),)), (image(),))
    assert not traced
    assert not loads


@pytest.mark.parametrize(("name", "count"), [("one delegate", 0), ("float operator between delegates", 1)])
def test_composite_operators_are_loaded_at_most_once_for_a_program(name: str, count: int, loads: list[None]) -> None:
    build, _ = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = quantize(seeded(build), (image(),), [image()] * 2, recover=None)
    load = torch._export.utils._materialize_cpp_cia_ops
    loads.clear()
    lower(quantized)
    assert len(loads) == count
    assert torch._export.utils._materialize_cpp_cia_ops is load
