"""Regions that torch.export wraps (no_grad, autocast, checkpoint) become part of the graph. Control
flow is rejected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.both_flows import assert_one_delegate_in_both_flows, one_delegate, samples_of
from tests.flow_support import convert, flat, seeded
from tests.models import Model, bn, conv, image
from tests.passes.test_passes import after, exported, names
from tests.qat_support import operators, prepared, train
from torch import nn
from torch._ops import HigherOrderOperator
from torch.utils.checkpoint import checkpoint

from openneutron import lower, passes
from openneutron.errors import ModelError

Function = Callable[..., Any]


def _without_gradients(m: Any, x: torch.Tensor) -> Any:
    with torch.no_grad():
        y = F.relu(m.c(x))
    return m.d(y)


@torch.no_grad()
def _all_without_gradients(m: Any, x: torch.Tensor) -> Any:
    return m.d(F.relu(m.c(x)))


def _mode_set_by_calls(m: Any, x: torch.Tensor) -> Any:
    torch.set_grad_enabled(False)
    y = F.relu(m.c(x))
    torch.set_grad_enabled(True)
    return m.d(y)


def _without_autocast(m: Any, x: torch.Tensor) -> Any:
    y = m.c(x)
    with torch.autocast(x.device.type, enabled=False):
        y = y.float() * torch.sigmoid(y.float())
    return m.d(y)


def _nested(m: Any, x: torch.Tensor) -> Any:
    with torch.no_grad():
        y = m.c(x)
        with torch.autocast("cpu", enabled=False):
            left, right = y.chunk(2, 1)
            with torch.enable_grad():
                y = torch.cat([right * torch.tensor([1.0, 2.0]).view(2, 1, 1), F.relu(left)], 1)
        return m.d(y)


def _with_batch_norm(m: Any, x: torch.Tensor) -> Any:
    with torch.no_grad():
        y = F.relu(m.b(m.c(x)))
    return m.d(y)


def _checkpointed(m: Any, x: torch.Tensor) -> Any:
    return m.d(checkpoint(lambda y: F.relu(m.c(y)), x, use_reentrant=False))


def _in_bfloat16(m: Any, x: torch.Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = F.relu(m.c(x))
    return m.d(y.float())


def _inference(m: Any, x: torch.Tensor) -> Any:
    with torch.inference_mode():
        y = F.relu(m.c(x))
    return m.d(y)


@torch.inference_mode()
def _all_inference(m: Any, x: torch.Tensor) -> Any:
    return m.d(F.relu(m.c(x)))


def _cond(m: Any, x: torch.Tensor) -> Any:
    return torch.cond(x.sum() > 0, m.c, m.d, (x,))


def _while_loop(m: Any, x: torch.Tensor) -> Any:
    def body(i: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return i + 1, y * 2

    loop: Any = torch.while_loop
    return m.c(loop(lambda i, _: i < 3, body, (torch.tensor(0), x))[1])


def _cond_without_gradients(m: Any, x: torch.Tensor) -> Any:
    with torch.no_grad():
        return _cond(m, x)


REGIONS: list[Function] = [
    _without_gradients, _all_without_gradients, _mode_set_by_calls, _without_autocast, _nested, _with_batch_norm,
    _checkpointed, _all_inference,
]  # fmt: skip


def _model(function: Function) -> nn.Module:
    return seeded(lambda: Model(function, c=conv(), d=conv(), b=bn()))


class TestInlineRegions:
    @pytest.mark.parametrize("function", [*REGIONS, _in_bfloat16])
    def test_rule_1_operators_of_a_region_move_into_the_graph(self, function: Function) -> None:
        module = exported(_model(function))
        changed = any(isinstance(node.target, HigherOrderOperator) for node in module.graph.nodes)
        assert passes.inline_regions(module) == changed
        module.graph.lint()
        assert sum(name == "conv2d.default" for name in names(module)) == 2
        assert not any("wrap" in name for name in names(module))
        assert {name for name, _ in module.named_children()} <= {"c", "d", "b", "_guards_fn"}

    @pytest.mark.parametrize("function", [_without_gradients, _nested, _with_batch_norm])
    def test_inlining_does_not_change_results(self, function: Function) -> None:
        model = _model(function)
        module = exported(model)
        assert passes.inline_regions(module)
        torch.testing.assert_close(module(image()), model(image()))

    def test_a_graph_without_regions_stays(self) -> None:
        after(passes.inline_regions, _model(lambda m, x: m.d(F.relu(m.c(x)))), changes=False)

    def test_rule_2_not_without_training(self) -> None:
        module = exported(_model(_without_gradients))
        passes.inline_regions(module)
        assert "detach.default" not in names(module)

    def test_rule_3_computes_in_float32(self) -> None:
        module = exported(_model(_in_bfloat16))
        passes.inline_regions(module)
        assert {node.meta["val"].dtype for node in module.graph.nodes if "val" in node.meta} == {torch.float32}


@pytest.mark.parametrize("function", REGIONS)
def test_one_delegate_in_both_flows(function: Function) -> None:
    assert_one_delegate_in_both_flows(_model(function), samples_of([(1, 4, 8, 8)]), 25.0, recover=None)


@pytest.mark.parametrize("recover", [None, "fast", "auto"])
def test_recovery(recover: str | None) -> None:
    one_delegate(_model(_nested), samples_of([(1, 4, 8, 8)]), 25.0, recover)


def test_autocast_to_a_smaller_dtype_is_one_delegate() -> None:
    assert_one_delegate_in_both_flows(_model(_in_bfloat16), samples_of([(1, 4, 8, 8)]), 25.0, recover=None)


def test_a_region_of_inference_mode_within() -> None:
    model = _model(_inference).requires_grad_(requires_grad=False)
    one_delegate(model, samples_of([(1, 4, 8, 8)]), 25.0, None)


def test_a_region_of_inference_mode_within_a_model_with_gradients() -> None:
    model, samples = _model(_inference), samples_of([(1, 4, 8, 8)])
    with torch.no_grad():
        one_delegate(model, samples, 25.0, None)


@pytest.mark.parametrize(
    ("function", "name"), [(_cond, "cond"), (_while_loop, "while_loop"), (_cond_without_gradients, "cond")]
)
def test_control_flow_is_refused_by_name(function: Function, name: str) -> None:
    with pytest.raises(ModelError, match=name) as caught:
        convert(_model(function), (image(),))
    assert caught.value.op == name
    assert caught.value.source


class TestTraining:
    def test_operands_of_a_region_without_gradients_are_not_trained(self) -> None:
        module = prepared(seeded(lambda: Model(_without_gradients, c=conv(), d=conv())))
        outputs = flat(module(image(2, 4, 8, 8)))
        outputs[0].sum().backward()
        gradients = [value.grad is not None for name, value in module.named_parameters() if name.startswith("c.")]
        assert not any(gradients)
        assert any(value.grad is not None for value in module.parameters())

    def test_a_region_is_quantized(self) -> None:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        module = prepared(seeded(lambda: Model(_without_autocast, c=conv(), d=conv())))
        converted = convert_pt2e(train(module))
        assert not any("wrap" in name for name in operators(converted))
        program = lower(converted, (image(6, 4, 8, 8),))
        assert {row.where for row in program.placement} == {"npu"}
