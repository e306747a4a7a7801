"""Tensors without elements are not computed, quantized or put into a partition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.both_flows import assert_one_delegate_in_both_flows, one_delegate, samples_of
from tests.flow_support import convert, flat, lower_documented, seeded
from tests.models import Model
from tests.passes.test_passes import after, names
from torch import nn

from openneutron import lower, passes, quantize

Function = Callable[..., Any]


def _a_concatenation(m: Any, x: torch.Tensor) -> Any:
    return m.b(torch.cat([m.c(x)[:, :0], m.a(x)], 1))


def _an_old_form_of_empty(m: Any, x: torch.Tensor) -> Any:
    return m.b(torch.cat([torch.tensor([]), m.a(x)], 1))


def _parts_of_a_split(m: Any, x: torch.Tensor) -> Any:
    first, second, third = m.a(x).tensor_split((2, 2), 1)
    return m.b(torch.cat([first, second, third], 1))


def _a_write(m: Any, x: torch.Tensor) -> Any:
    y = m.a(x)
    y[:, :0] = m.c(x)[:, :0]
    return m.b(y)


def _a_sum(m: Any, x: torch.Tensor) -> Any:
    return m.b(m.a(x) + m.c(x)[:, :0].sum())


def _a_product(m: Any, x: torch.Tensor) -> Any:
    return m.b(m.a(x) + m.c(x)[..., :0] @ torch.ones(0, 8))


CASES: list[Function] = [_a_concatenation, _an_old_form_of_empty, _parts_of_a_split, _a_write, _a_sum, _a_product]


def _model(function: Function) -> nn.Module:
    return seeded(lambda: Model(function, a=nn.Linear(8, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 8)))


class TestRemoveEmpties:
    def test_rule_1_tensors_without_elements_become_constants(self) -> None:
        module = after(passes.remove_empties, Model(lambda _, x: (x * 2, (x * 3)[:, :0] + 1)))
        assert names(module) == ["mul.Tensor"]

    def test_rule_2_a_concatenation_leaves_out_empty_parts(self) -> None:
        module = after(passes.remove_empties, Model(lambda _, x: torch.cat([x[:, :0], x, x[:, 4:], x], 1)))
        assert names(module) == ["cat.default"]

    def test_tensors_with_elements_stay(self) -> None:
        after(passes.remove_empties, Model(lambda _, x: torch.cat([x[:, :1], x], 1)), changes=False)


@pytest.mark.parametrize("function", CASES)
def test_one_delegate_in_both_flows(function: Function) -> None:
    assert_one_delegate_in_both_flows(_model(function), samples_of([(1, 6, 8)]), 25.0, recover=None)


@pytest.mark.parametrize("recover", ["fast", "auto"])
def test_recovery(recover: str) -> None:
    one_delegate(_model(_a_concatenation), samples_of([(1, 6, 8)]), 25.0, recover)


def test_an_output_without_elements() -> None:
    model = _model(lambda m, x: (m.b(m.a(x)), m.c(x)[:, :0]))
    samples = samples_of([(1, 6, 8)], 8)
    programs = (
        lower(quantize(model, samples[0], samples, recover=None, progress=False)),
        lower_documented(convert(model, samples[0], calibration=samples), samples[0]),
    )
    for program in programs:
        assert [tuple(value.shape) for value in flat(program.run(*samples[0]))] == [(1, 6, 8), (1, 0, 8)]


def test_an_input_without_elements() -> None:
    model = _model(lambda m, x, y: m.b(m.a(torch.cat([x, y], 1))))
    samples = samples_of([(1, 6, 8), (1, 0, 8)], 8)
    program = lower(quantize(model, samples[0], samples, recover=None, progress=False))
    assert {row.where for row in program.placement} == {"npu"}
    assert tuple(flat(program.run(*samples[0]))[0].shape) == (1, 6, 8)
